"""docs/your-own-policy.md: its code, as it stands there, takes a third party's policy through a whole run."""

import difflib
import functools
import importlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, run_here, snippet
from third_party_policy import ChunkPolicy, evaluate, train

import common
import envs

LIMIT = 40  # steps of an episode


class Puck(gym.Env):
    """A puck on a table, to be brought to rest on a target: both in mm, forces in N. Its velocity is not observed."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.target = self.np_random.uniform(300, 700, (2, 2))
        self.velocity = np.zeros(2)
        return self.observe(), {}

    def step(self, force):
        self.velocity = 0.8 * self.velocity + 8 * force
        self.position = self.position + self.velocity
        success = bool(np.linalg.norm(self.position - self.target) < 25 and np.linalg.norm(self.velocity) < 25)
        return self.observe(), float(success), success, False, {"success": success}

    def observe(self):
        return np.concatenate([self.position, self.target]).astype(np.float32)


HISTORY = {"Puck": Puck}
exec(snippet("def with_history"), HISTORY)  # which registers PuckHistory-v0
ENV_ID = "test_own_policy:PuckHistory-v0"
RUN = ["--env-id", ENV_ID, "--action-chunk", 4, "--bc-steps", 0, "--sparse-reward", "--reward-bias", -1]
RUN += ["--offline-steps", 50, "--online-steps", 60, "--batch-size", 32, "--num-eval-episodes", 20]
RUN += ["--num-samples", 4, "--num-keep", 2, "--num-gradient-steps", 1, "--policy-ema-rate", 0.05, "--num-threads", 1]
RUN += ["--hidden-dims", 16, 16, "--num-bins", 16, "--ensemble-size", 2]


def demonstrations(number):
    """Episodes of a driver that sways: its arrays as in a dataset file, and as [(obs (L, 4), force (L, 2))]."""
    generator, env, episodes, columns = np.random.default_rng(0), gym.wrappers.TimeLimit(Puck(), LIMIT), [], []
    for seed in range(number):
        gain, sway, done, rows, obs = generator.uniform(0.004, 0.02), np.zeros(2), False, [], env.reset(seed=seed)[0]
        while not done:
            puck, sway = env.unwrapped, 0.8 * sway + 0.5 * generator.normal(size=2)
            force = gain * (puck.target - puck.position) - 0.06 * puck.velocity + sway
            force = np.clip(force, -1.8, 1.6).astype(np.float32)  # not all that the environment allows
            new, reward, terminated, truncated, _ = env.step(force)
            rows.append((obs, force, reward, terminated, truncated, new))
            obs, done = new, terminated or truncated
        columns += rows
        episodes.append(tuple(np.stack(column) for column in zip(*rows, strict=True))[:2])
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    return {name: np.stack(c) for name, c in zip(names, zip(*columns, strict=True), strict=True)}, episodes


def make_files(folder, policy, num_steps):
    """What a user has: puck.npz, `policy` cloned in num_steps as policy.pt, and my_parl.py, which can be imported."""
    folder.mkdir(exist_ok=True)
    arrays, episodes = demonstrations(100)
    np.savez(folder / "puck.npz", **HISTORY["with_history"](arrays, 2))
    train(policy, episodes, num_steps)
    torch.save(policy.state_dict(), folder / "policy.pt")
    (folder / "my_parl.py").write_text(my_parl())
    sys.path.insert(0, str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    make_files(folder, ChunkPolicy(4, 2), 400)
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("my_parl", None)


def my_parl():
    """parl_diffusion.py with the page's lines at the page's places."""
    source = (ROOT / "parl_diffusion.py").read_text()
    for line, before, after in [
        ("from common import InputError\n", "", snippet("import ChunkPolicy")),
        ("# ======================================== CRITIC", snippet("class OwnPolicy") + "\n\n", ""),
    ]:
        assert source.count(line) == 1
        source = source.replace(line, before + line + after)
    source, number = re.subn(r".*self\.policy = DiffusionPolicy\(.*\n", snippet("OwnPolicy(obs_dim"), source)
    assert number == 1
    return source


@pytest.fixture(scope="module")
def own(folder):
    """The third party's policy from its file, and what its own loop says of it: {seed: (success, observations)}."""
    policy, env = ChunkPolicy(4, 2), gym.wrappers.TimeLimit(Puck(), LIMIT)
    policy.load_state_dict(torch.load(folder / "policy.pt", weights_only=True))
    policy.eval()
    return policy, {seed: evaluate(policy, env, seed) for seed in range(common.EVALUATION_SEED, 1_000_020)}


def make_agent(folder, *flags):
    """The Agent of my_parl.py on the dataset, as a run makes it."""
    module = importlib.import_module("my_parl")
    args = common.parse([*map(str, RUN), *flags], module.Args, module.PRESETS, "")
    args.q_min, args.q_max = -100.0, 0.0
    dataset = envs.load_dataset(ENV_ID, folder / "puck.npz", 1, -1, args.discount, True)
    return module.Agent(dataset, 8, 8, args, torch.device("cpu"), np.random.default_rng(0))


def test_at_most_30_lines_differ():
    """A contract that grew: of lines added and removed, blank ones too."""
    before, after = ((ROOT / "parl_diffusion.py").read_text(), my_parl())
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))[2:]
    changed = [line for line in lines if line[0] in "+-"]
    assert len(changed) <= 30
    assert f"in {len(changed)} changed lines" in (ROOT / "docs" / "your-own-policy.md").read_text()
    assert all(len(line) <= 121 for line in changed)


@pytest.mark.parametrize("flags", [(), ("--no-normalize-obs",)])
def test_untouched_it_scores_what_it_scores_in_its_own_loop(flags, folder, own):
    """Normalised twice, actions in other units, a history or a chunk in another order, BatchNorm in training mode."""
    agent, (_, theirs) = make_agent(folder, *flags), own
    assert 0.3 < np.mean([success for success, _ in theirs.values()]) < 0.9  # so that a difference could be seen
    environments = [envs.make(ENV_ID, sparse=True) for _ in range(10)]
    ours = common.run_episodes(environments, agent.act_raw, list(theirs), batch_size=10)
    for (success, observations), episode in zip(theirs.values(), ours, strict=True):
        assert episode["success"] == success
        np.testing.assert_allclose(episode["observations"][:, 4:], observations, atol=0.1)  # mm


def test_normalised_twice_it_fails(folder, own):
    """The check above is one: without the line that undoes our normaliser the score falls."""
    agent, (_, theirs) = make_agent(folder), own
    agent.policy_ema.raw = lambda obs: obs.unflatten(-1, (2, -1))
    ours = common.run_episodes([envs.make(ENV_ID, sparse=True)] * 1, agent.act_raw, list(theirs))
    assert sum(episode["success"] for episode in ours) < sum(success for success, _ in theirs.values()) / 2


def test_the_two_methods(folder, own):
    """Shapes, units, noise that other states change, samples of another state, a loss that does not train."""
    agent, (policy, _) = make_agent(folder), own
    obs = agent.normalized(agent.dataset.states[:3])
    before, generator = agent.policy_ema.state_dict(), torch.get_rng_state()
    before = {name: value.clone() for name, value in before.items()}
    actions = agent.policy_ema.sample(obs, 5, [(1, 0), (2, 0), (1, 0)])
    assert torch.equal(torch.get_rng_state(), generator)  # an evaluation leaves a run's noise alone
    assert actions.shape == (3, 5, 8) and not actions.requires_grad and actions.abs().max() <= 1
    assert torch.equal(actions[:1], agent.policy_ema.sample(obs[:1], 5, [(1, 0)])) and actions[0].std(0).min() > 0
    torch.manual_seed(hash((2, 0)))
    raw = torch.from_numpy(agent.dataset.states[1:2]).unflatten(-1, (2, -1)).repeat(5, 1, 1)
    with torch.no_grad():
        forces = policy.predict_action({"obs": raw})["action"]
    torch.testing.assert_close(actions[1].unflatten(-1, (4, 2)), forces / 2, rtol=0, atol=1e-4)
    for name, value in agent.policy_ema.state_dict().items():
        assert torch.equal(value, before[name]), name
    agent.policy_ema.model.predict_action = lambda given: {"action": given["obs"][:, -1:, :2].expand(-1, 4, -1) / 1000}
    places = torch.from_numpy(agent.dataset.states[:3, 4:6]) / 2000  # in training, of each state its own K
    torch.testing.assert_close(agent.policy_ema.sample(obs, 5), places.repeat(1, 4)[:, None].expand(-1, 5, -1))
    loss, batch = agent.policy.train().loss(obs, actions[:, 0]), {}
    loss.backward()
    assert loss.shape == () and all(value.grad.norm() > 0 for value in agent.policy.parameters())
    agent.policy.model.compute_loss = lambda given: batch.update(given) or given["action"].sum()
    agent.policy.loss(obs, torch.arange(24).reshape(3, 8) / 24)
    assert batch["action"].shape == (3, 8, 2) and batch["action"][0, 1].tolist() == pytest.approx([4 / 24, 6 / 24])
    assert torch.equal(batch["action"][:, 3:], batch["action"][:, 3:4].expand(-1, 5, -1))
    np.testing.assert_allclose(batch["obs"].flatten(1), agent.dataset.states[:3], atol=1e-3)


def test_the_dataset_has_the_history_that_the_environment_has():
    """Another order, a history that reaches into the episode before, a first observation that is not repeated."""
    env, frames, flat = envs.make(ENV_ID), [], []
    arrays, episodes = demonstrations(3)
    for seed, (_, forces) in enumerate(episodes):
        frames.append(env.reset(seed=seed)[0])
        frames += [env.step(force / 2)[0] for force in forces]
        flat.append(len(forces))
    for keys in (set(arrays), set(arrays) - {"next_observations"}):
        stacked = HISTORY["with_history"]({key: arrays[key] for key in keys}, 2)
        starts = np.cumsum([0, *flat])[:-1]
        for episode, start in enumerate(starts):
            seen = np.stack(frames[start + episode : start + episode + flat[episode] + 1])
            rows = slice(start, start + flat[episode])
            np.testing.assert_allclose(stacked["observations"][rows], seen[:-1], atol=1e-2)
            if "next_observations" in keys:
                np.testing.assert_allclose(stacked["next_observations"][rows], seen[1:], atol=1e-2)
    assert np.array_equal(HISTORY["with_history"](arrays, 1)["next_observations"], arrays["next_observations"])


@pytest.fixture(scope="module")
def finished(folder):
    run_here("my_parl", *RUN, "--dataset-path", folder / "puck.npz", "--run-dir", folder / "run")
    return folder / "run"


def load(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def test_all_phases(finished, own):
    """It is evaluated before it learns, learns in each phase that is its, and its BatchNorm's numbers are kept."""
    (policy, theirs), rows, checkpoint = own, common.read_metrics(finished / "metrics.csv"), load(finished)
    evaluated = [row for row in rows if "eval/policy_success_rate" in row]
    assert [row["phase"] for row in evaluated] == ["bc", "offline", "online"]
    score = np.mean([success for success, _ in theirs.values()])
    assert [row["eval/policy_success_rate"] for row in evaluated[:2]] == [pytest.approx(score)] * 2
    assert "policy/distill_loss" in rows[-1] and "eval/success_rate" in rows[-1] and rows[-1]["env_step"] >= 60
    assert checkpoint["policy_class"] == "OwnPolicy" and (checkpoint["obs_dim"], checkpoint["act_dim"]) == (8, 8)
    learned, averaged, moved = checkpoint["policy"], checkpoint["policy_ema"], 0
    for name, start in policy.state_dict().items():
        own, mean = learned[f"model.{name}"], averaged[f"model.{name}"]
        is_own_normalizer = name.startswith(("obs_", "action_"))
        assert torch.equal(own, start) == is_own_normalizer, name  # parameters and BatchNorm's numbers moved
        if name in dict(policy.named_buffers()):
            assert torch.equal(mean, own), name
        else:
            moved += (mean - start).norm() < (own - start).norm()
    assert moved > 10  # the average lies nearer to the start


def test_stopped_and_resumed(finished, folder, monkeypatch, capfd):
    """Noise from elsewhere than torch's generator, a buffer that no checkpoint has; then evaluated without its data."""
    module, updates, directory = importlib.import_module("my_parl"), [], folder / "stopped"
    update_policy = module.update_policy

    def interrupted(*arguments):
        updates.append(1)
        if len(updates) == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return update_policy(*arguments)

    monkeypatch.setattr(module, "update_policy", interrupted)
    command = [*RUN, "--dataset-path", folder / "puck.npz", "--run-dir", directory]
    with pytest.raises(SystemExit):
        run_here("my_parl", *command)
    assert load(directory)["counters"]["phase"] == "online"
    monkeypatch.undo()
    run_here("my_parl", *command)
    first, second = load(finished), load(directory)
    for name in ("policy", "policy_ema", "critic", "online"):
        assert all(torch.equal(value, second[name][key]) for key, value in first[name].items()), name
    (folder / "puck.npz").rename(folder / "away.npz")
    try:
        capfd.readouterr()
        run_here("my_parl", "--resume", directory, "--eval-only")
    finally:
        (folder / "away.npz").rename(folder / "puck.npz")
    result, row = json.loads(capfd.readouterr().out), common.read_metrics(directory / "metrics.csv")[-1]
    assert result == pytest.approx({name: row[name] for name in result}, abs=1e-3)


def test_another_run_can_start_from_it(finished, folder):
    """The normaliser in the checkpoint, not that of the dataset at hand."""
    arrays = dict(np.load(folder / "puck.npz"))
    np.savez(folder / "other.npz", **arrays | {name: arrays[name] + 300 for name in arrays if "observations" in name})
    short = ["--offline-steps", 2, "--online-steps", 0, "--policy-checkpoint", finished / "checkpoint.pt"]
    run_here("my_parl", *RUN, "--dataset-path", folder / "other.npz", *short, "--run-dir", folder / "next")
    (row, *_), last = (common.read_metrics(folder / name / "metrics.csv") for name in ("next", "run"))
    assert row["eval/policy_success_rate"] == last[-1]["eval/policy_success_rate"]


def measure_costs(folder):
    """The page's table: CPU seconds of an update (the median of 5) with a policy that is wider and denoises longer."""
    wide = functools.partial(ChunkPolicy, width=256, num_inference_steps=20)
    make_files(folder, wide(4, 2), 1)
    importlib.import_module("my_parl").ChunkPolicy = wide

    def seconds(function, repeats=5):
        began = [time.process_time() for _ in range(repeats + 1) if function() or True]
        return f"{np.median(np.diff(began)):.3f}"

    for number in (8, 32):
        sizes = f"--num-samples {number} --num-keep 3 --num-gradient-steps 3 --batch-size 128 --hidden-dims 128 128"
        agent = make_agent(folder, *sizes.split())
        cache = agent.cache_samples()
        print(
            *(f"K {number}: offline", seconds(lambda a=agent, c=cache: a.improve_critic(0, 128, c))),
            *("online, critic", seconds(lambda a=agent: a.improve_critic(0, 128))),
            *("online, distillation", seconds(lambda a=agent: a.distill(128, 1e-4))),
            *(f"the cache of {len(cache)} states", seconds(agent.cache_samples, 1)),
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    if sys.argv[1:]:
        make_files(Path(sys.argv[1]), ChunkPolicy(4, 2), 400)
    else:
        measure_costs(Path(tempfile.mkdtemp()))
