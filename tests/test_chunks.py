"""Action chunks: what a decision of h steps is to the buffer, the critic and the environment."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import run_here

import common
import parl_gaussian as parl

GAMMA = 0.9


def buffer_of(*lengths, terminal):
    """Episodes of so many steps, each ending in a terminal or at a time limit. Everywhere a number says where it is
    from: the state after step t of episode e is 100 e + t, the action there (100 e + t) / 1000, its reward -(t + 1)."""
    buffer = common.ReplayBuffer(1, 1)
    for e, length in enumerate(lengths):
        steps = np.arange(length)
        masks = np.ones(length)
        masks[-1] = 0 if terminal else 1
        states = 100.0 * e + np.arange(length + 1)[:, None]
        buffer.add_episode(states, (100 * e + steps[:, None]) / 1000, -(steps + 1.0), masks, -1.0 * steps)
    return buffer


def chunk_at(buffer, state, h):
    """The transition that begins in `state`, as numbers, or None where no chunk of h steps does."""
    batch = buffer.sample(500, np.random.default_rng(0), h, GAMMA)
    rows = (batch["obs"][:, 0] == state).nonzero()[:, 0]
    if not len(rows):
        return None
    named = ("actions", "rewards", "masks", "next_obs", "mc_returns")
    return {name: batch[name][rows[0]].numpy().round(5).tolist() for name in named}


def test_a_chunk_in_the_middle_by_hand():
    """Rewards not discounted, actions in another order, a next state one off, a return that is the chunk's."""
    buffer = buffer_of(6, terminal=False)
    for h, actions, reward in [
        (1, [0.002], -3.0),
        (2, [0.002, 0.003], -3 - 0.9 * 4),
        (3, [0.002, 0.003, 0.004], -3 - 0.9 * 4 - 0.81 * 5),
    ]:
        chunk = chunk_at(buffer, 2, h)
        assert chunk["actions"] == pytest.approx(actions) and chunk["rewards"] == pytest.approx(reward)
        assert (chunk["masks"], chunk["next_obs"], chunk["mc_returns"]) == (1.0, [2.0 + h], -2.0)


@pytest.mark.parametrize("h", [1, 2, 3])
def test_a_terminal_inside_a_chunk_ends_it(h):
    """Steps beyond it paid, a value that follows, an action of the next episode."""
    buffer = buffer_of(4, 4, terminal=True)
    last = chunk_at(buffer, 3, h)
    assert last["actions"] == pytest.approx([0.003] * h)  # repeated, never carried out
    assert (last["rewards"], last["masks"], last["next_obs"]) == (-4.0, 0.0, [4.0])
    before = chunk_at(buffer, 2, h)
    if h > 1:
        assert before["actions"] == pytest.approx([0.002, 0.003, 0.003][:h])
        assert before["rewards"] == pytest.approx(-3 - 0.9 * 4)
        assert (before["masks"], before["next_obs"]) == (0.0, [4.0])


def test_a_time_limit_inside_a_chunk_drops_it():
    """What would have followed is not known: nothing may be made up."""
    for h in (1, 2, 3):
        starts = [state for state in range(6) if chunk_at(buffer_of(6, 6, terminal=False), state, h)]
        assert starts == list(range(6 - h + 1))


def test_episodes_shorter_than_a_chunk():
    """One that ended in a terminal is filled up; one that was cut off is left out; none at all is said."""
    assert chunk_at(buffer_of(2, 6, terminal=True), 0, 5)["rewards"] == pytest.approx(-1 - 0.9 * 2)
    assert chunk_at(buffer_of(2, 6, terminal=False), 0, 5) is None
    with pytest.raises(common.InputError, match="--action-chunk 5: no episode has so many steps"):
        buffer_of(2, 3, terminal=False).sample(4, np.random.default_rng(0), 5, GAMMA)


def test_every_start_is_as_likely():
    """A longer episode's starts drawn as often as a shorter one's, none left out, none twice."""
    batch = buffer_of(3, 9, terminal=False).sample(20_000, np.random.default_rng(0), 3, GAMMA)
    states, counts = np.unique(batch["obs"].numpy(), return_counts=True)
    assert states.tolist() == [0, *range(100, 107)]
    assert np.abs(counts / 20_000 - 1 / 8).max() < 0.01


def test_a_chunk_of_one_step_is_the_step():
    """Bit for bit what it was before there were chunks: rows, types, numbers."""
    buffer, h1 = buffer_of(5, 7, terminal=True), {}
    rows = np.random.default_rng(3).integers(12, size=64)
    h1 = buffer.sample(64, np.random.default_rng(3), 1, GAMMA)
    for name in ("actions", "rewards", "masks", "mc_returns"):
        assert h1[name].dtype == torch.float32 and np.array_equal(h1[name].numpy(), getattr(buffer, name)[rows])
    assert np.array_equal(h1["next_state_rows"], h1["state_rows"] + 1)


def test_starts_follow_a_buffer_that_grows_and_is_loaded():
    """Starts remembered from before an episode was added, or of another length of chunk."""
    buffer = buffer_of(4, terminal=False)
    assert len(buffer.chunk_starts(2)) == 3 and len(buffer.chunk_starts(3)) == 2
    buffer.add_episode(np.zeros((5, 1)), np.zeros((4, 1)), np.zeros(4), np.ones(4), np.zeros(4))
    assert buffer.chunk_starts(3).tolist() == [0, 1, 4, 5]
    other = common.ReplayBuffer(1, 1)
    other.load_state_dict(buffer.state_dict())
    assert other.chunk_starts(3).tolist() == [0, 1, 4, 5]


def test_the_td_target_looks_h_steps_ahead():
    """gamma in place of gamma^h."""
    args = parl.Args(action_chunk=3, discount=0.5, num_bins=0, ensemble_size=2, hidden_dims=(8,), q_min=-9.0, q_max=0.0)
    args.cql_weight = 0.0

    class Constant:
        def __call__(self, obs, actions, members=None):
            return torch.full((2, *actions.shape[:2]), -8.0), None

    batch = {name: torch.zeros(4, 6) for name in ("actions", "policy_actions", "next_policy_actions")}
    batch |= {"obs": torch.zeros(4, 2), "next_obs": torch.zeros(4, 2), "mc_returns": torch.zeros(4)}
    batch |= {"rewards": -torch.ones(4), "masks": torch.tensor([1.0, 1.0, 0.0, 0.0])}
    loss, _ = parl.critic_loss(Constant(), Constant(), batch, args)
    targets = torch.tensor([-1 - 0.125 * 8] * 2 + [-1.0] * 2)
    assert loss == pytest.approx((-8 - targets).square().mean().item())


class Corridor(gym.Env):
    """observation (1,): place; action (2,): its first number is added, its second ignored. Ends at 1, as a success, or
    after 20 steps; `sent` has all actions since the last reset."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.sent, self.steps = self.np_random.uniform(0, 0.5), [], 0
        return np.array([self.place], np.float32), {}

    def step(self, action):
        self.sent.append(np.array(action))
        self.place, self.steps = self.place + 0.1 * float(action[0]), self.steps + 1
        done = self.place >= 1
        return np.array([self.place], np.float32), float(done), done, self.steps >= 20, {"success": done}

    def render(self):
        return np.zeros((32, 32, 3), np.uint8)


def plan(obs, keys):
    """Chunks of 3 steps (N, 6): the first number of each moves on, the second is the decision's step, then its own."""
    steps = np.array([[step] for _, step in keys])
    seconds = (steps + np.arange(3) / 10) / 100
    return np.stack([np.ones_like(seconds), seconds], -1).reshape(len(obs), 6).astype(np.float32)


def test_a_chunk_is_carried_out_step_by_step():
    """Deciding at every step, rows of a chunk read as dimensions, a chunk that goes on in the next episode."""
    env = Corridor()
    first, second = common.run_episodes([env], plan, [0, 1])
    for episode in (first, second):
        length = len(episode["rewards"])
        expected = [(step - step % 3 + step % 3 / 10) / 100 for step in range(length)]
        assert episode["actions"][:, 1] == pytest.approx(expected, abs=1e-6) and episode["actions"].shape[1] == 2
        assert len(episode["observations"]) == length + 1 and episode["success"] and episode["masks"][-1] == 0
    assert len({len(first["rewards"]) % 3, len(second["rewards"]) % 3}) == 2  # one ended inside a chunk
    assert np.array_equal(env.sent, second["actions"])


def test_the_number_of_environments_does_not_matter():
    """A plan that moves to another episode, an environment asked twice, noise that is the row's place in the batch."""

    def noisy(obs, keys):
        noise = common.seeded_normal((len(obs), 6), keys).numpy()
        return np.clip(plan(obs, keys) + 0.3 * noise, -1, 1)

    one, eight = (common.run_episodes([Corridor() for _ in range(n)], noisy, range(11), batch_size=8) for n in (1, 8))
    assert len({len(episode["rewards"]) for episode in one}) > 1
    for first, second in zip(one, eight, strict=True):
        for name in first:
            assert np.array_equal(first[name], second[name])


def test_video_shows_every_step(tmp_path, monkeypatch):
    frames = {}
    monkeypatch.setattr(common, "write_video", lambda path, images: frames.setdefault(path.name, images))
    (episode,) = common.run_episodes([Corridor()], plan, [0], video_dir=tmp_path)
    assert len(frames["episode-0.mp4"]) == len(episode["rewards"])


def test_a_stop_is_heeded_within_a_chunk():
    """Commands that a robot still gets after Ctrl-C."""
    asked, env = [], Corridor()

    def before_step():
        if len(env.sent) == 3:
            asked.append(1)
            raise SystemExit(130)

    with pytest.raises(SystemExit):
        common.run_episodes([env], lambda obs, keys: np.full((1, 10), 0.1), [0], before_step=before_step)
    assert len(env.sent) == 3 and asked == [1]


def test_a_stop_is_heeded_while_an_action_is_chosen():
    """Which takes long where the policy is large: neither is it sent, nor is another one chosen after a stop."""
    asked, env = [], Corridor()

    def act(obs, keys):
        asked.append(1)
        return np.full((1, 2), 0.1)

    def before_step():
        if asked:
            raise SystemExit(130)

    with pytest.raises(SystemExit):
        common.run_episodes([env], act, [0], before_step=before_step)
    assert env.sent == [] and asked == [1]
    with pytest.raises(SystemExit):
        common.run_episodes([env], act, [0], before_step=before_step)
    assert env.sent == [] and asked == [1]


class Short(gym.Env):
    """Cut off after 2 steps in its first episode, after 6 in the others."""

    observation_space = gym.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Short.episodes, self.steps = Short.episodes + 1, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.full(1, self.steps, np.float32), 0.0, False, self.steps == (2 if Short.episodes == 1 else 6), {}


gym.register("TestShort-v0", entry_point=f"{__name__}:Short", max_episode_steps=9)


def test_online_episodes_shorter_than_a_chunk(tmp_path):
    """All so far are: there is nothing to learn from yet. It ended the run, and each that went on with it."""
    rows = np.arange(24)
    arrays = dict(observations=rows[:, None] % 6, actions=np.zeros((24, 1)), rewards=rows % 6 == 5, terminals=rows < 0)
    np.savez(tmp_path / "data.npz", timeouts=rows % 6 == 5, **{k: v.astype(np.float32) for k, v in arrays.items()})
    flags = ["--action-chunk", 3, "--bc-steps", 2, "--offline-steps", 2, "--online-episodes", 3, "--batch-size", 4]
    flags += ["--num-eval-episodes", 0, "--hidden-dims", 8, "--num-bins", 8, "--width", 8, "--q-min", -1, "--q-max", 1]
    Short.episodes = 0
    flags += ["--dataset-path", tmp_path / "data.npz", "--env-id", "TestShort-v0"]
    run_here("parl_gaussian", *flags, "--run-dir", tmp_path / "run")
    online = [row for row in common.read_metrics(tmp_path / "run" / "metrics.csv") if row["phase"] == "online"]
    assert [row["train/length"] for row in online] == [2, 6, 6] and online[-1]["env_step"] == 14
    assert [row["gradient_step"] for row in online] == [4, 10, 16]
    assert "critic/loss" not in online[0] and "critic/loss" in online[1]


def test_cached_samples_are_those_of_the_state_h_steps_on():
    """The row after a state in place of the one that its chunk ends in."""

    class Policy:
        def sample(self, obs, num_samples):
            return (obs[:, None] / 1000).expand(-1, num_samples, -1)

    buffer = buffer_of(6, terminal=False)
    states = torch.from_numpy(buffer.states[: buffer.num_states])
    cache = parl.cache_samples(Policy(), states, 1, parl.Args(num_samples=2))
    batch = buffer.sample(32, np.random.default_rng(0), 3, GAMMA)
    expected = torch.cat([batch["obs"], batch["obs"] + 3])[:, None].expand(-1, 2, -1) / 1000
    torch.testing.assert_close(parl.draw_samples(None, batch, 2, cache), expected, rtol=0, atol=1e-5)  # float16


@pytest.mark.parametrize("script", ["parl_gaussian", "parl_diffusion", "parl_transformer"])
def test_a_run_with_chunks(script, tmp_path):
    """All phases; online steps and updates count environment steps; the buffer holds single ones."""
    flags = ["--action-chunk", 3, "--bc-steps", 5, "--offline-steps", 50, "--online-steps", 60, "--batch-size", 16]
    flags += ["--num-eval-episodes", 1, "--eval-every", 2000, "--hidden-dims", 8, "--num-bins", 8, "--width", 16]
    run_here(script, *flags, "--run-dir", tmp_path / "run")
    rows = common.read_metrics(tmp_path / "run" / "metrics.csv")
    online = [row for row in rows if row["phase"] == "online"]
    assert sum(row["train/length"] for row in online) == online[-1]["env_step"] >= 60
    assert online[-1]["gradient_step"] == 5 + 50 + online[-1]["env_step"]
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["act_dim"] == 6 and checkpoint["online"]["actions"].shape[1] == 2
