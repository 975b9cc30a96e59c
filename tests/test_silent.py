"""Nothing silent, while a run collects, logs and saves: wrong numbers, faults and accidents that once passed unseen.

Those of files and environments are in test_files.py and test_envs.py.
"""

import random
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run_here

import common
import parl_gaussian as parl


class Careless(gym.Env):
    """Scales its action in place, returns the same array at every step, ends by falling when it is told to.

    observation (2,): steps taken, last action; `fault`: what goes wrong, and at which step.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    pays = -1.0

    def __init__(self, fault="", at=2):
        self.fault, self.at, self.buffer, self.commands = fault, at, np.zeros(2, np.float32), []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.buffer[:] = 0
        return self.buffer, {}

    def step(self, action):
        self.commands.append(float(action[0]))
        action *= 0.05
        self.buffer[:] = self.buffer[0] + 1, action[0]
        now = self.buffer[0] == self.at
        if now and self.fault == "observation":
            self.buffer[1] = np.nan
        reward = np.inf if now and self.fault == "reward" else self.pays
        falls = bool(now and self.fault == "falls")
        return self.buffer, reward, falls, self.buffer[0] >= 5, {"success": False}


def constant(value):
    return lambda obs, keys: np.full((len(obs), 1), value, np.float32)


def test_what_is_stored_is_what_was_sent_and_seen():
    """An environment that changes its argument, or overwrites what it returned."""
    (episode,) = common.run_episodes([Careless()], constant(0.8), [0])
    assert episode["actions"] == pytest.approx(0.8)
    assert episode["observations"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_frames_and_images_are_copies(monkeypatch, tmp_path):
    """Every frame of a video, every stored image, the last one."""

    class Camera(Careless):
        observation_space = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)
        image = np.zeros((4, 4, 3), np.uint8)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.image[:] = 0
            return self.image, {}

        def step(self, action):
            _, *others = super().step(action)
            self.image += 1
            return self.image, *others

        def render(self):
            return self.image

    frames = []
    monkeypatch.setattr(common, "write_video", lambda path, images: frames.extend(images))
    (episode,) = common.run_episodes([Camera()], constant(0.0), [0], video_dir=tmp_path)
    assert episode["observations"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert [frame[0, 0, 0] for frame in frames] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault", ["observation", "reward"])
def test_what_is_not_finite_stops_before_the_next_command(fault):
    env = Careless(fault)
    message = rf"Careless, episode with reset seed 7, step \d: {fault} is not finite.*; no further action was sent"
    with pytest.raises(FloatingPointError, match=message):
        common.run_episodes([env], constant(0.5), [7])
    assert len(env.commands) == 2


def test_an_action_that_is_not_finite_is_never_sent():
    env = Careless()
    with pytest.raises(FloatingPointError, match=r"step 0: action is not finite, \[nan\]"):
        common.run_episodes([env], constant(np.nan), [7])
    assert env.commands == []


def test_an_action_out_of_bounds_is_never_sent():
    env = Careless()
    with pytest.raises(common.InputError, match=r"Careless.*step 0: action \[-1\.1\]; expected .* within \[-1, 1\]"):
        common.run_episodes([env], constant(-1.1), [7])
    assert env.commands == []


def test_an_environment_that_does_not_tell_success():
    class Mute(Careless):
        def step(self, action):
            return *super().step(action)[:4], {}

    with pytest.raises(common.InputError, match='step 0: info has no "success"; expected it at every step'):
        common.run_episodes([Mute()], constant(0.5), [7])


def test_spaces_that_envs_make_would_have_changed():
    """In a project without envs/: another range of actions, observations of other kinds."""
    box, unit = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,))
    common.check_spaces(SimpleNamespace(observation_space=box, action_space=unit))
    for obs, act, message in [
        (gym.spaces.Dict(a=box), unit, "observations are Dict.*FlattenObservation"),
        (gym.spaces.Box(-1, 1, (2, 3)), unit, "observations are Box.*FlattenObservation"),
        (box, gym.spaces.Box(-0.05, 0.05, (2,)), "actions are Box.*from -1 to 1.*RescaleAction"),
        (box, gym.spaces.Discrete(3), "actions are Discrete"),
        (box, gym.spaces.MultiBinary(3), "actions are MultiBinary"),
    ]:
        with pytest.raises(common.InputError, match=message):
            common.check_spaces(SimpleNamespace(observation_space=obs, action_space=act))


def test_a_policy_that_breaks_its_contract_is_named_before_it_trains():
    """A chunk without --action-chunk, the environment's units, a loss with details beside it."""

    class Mine(parl.GaussianPolicy):
        def __init__(self, scale=1.0, extra=0, loss=None):
            super().__init__(3, 2, args)
            self.scale, self.extra, self.value = scale, extra, loss

        def sample(self, obs, num_samples, seeds=None):
            return self.scale * torch.rand(len(obs), num_samples, 2 + self.extra).clamp(0.5)

        def loss(self, obs, actions):
            return super().loss(obs, actions) if self.value is None else self.value

    args, obs = parl.Args(width=8, num_samples=4), torch.zeros(2, 3)
    policy, state = Mine(), torch.get_rng_state()
    common.check_policy(policy, obs, 2, args)
    assert torch.equal(state, torch.get_rng_state())  # the run's noise is not touched
    for policy, message in [
        (Mine(extra=6), r"Mine.sample: returned shape \(2, 4, 8\); expected \(2, 4, 2\).*--action-chunk 1"),
        (Mine(scale=2.0), r"Mine.sample: returned \S+; expected actions within \[-1, 1\]"),
        (Mine(loss=(torch.zeros(()), {})), "Mine.loss: returned tuple; expected one number, a tensor"),
        (Mine(loss=torch.zeros(2)), r"Mine.loss: returned shape \(2,\); expected one number"),
    ]:
        with pytest.raises(common.InputError, match=message):
            common.check_policy(policy, obs, 2, args)


def test_a_range_of_values_that_cannot_be():
    """Rewards that were not scaled, in a project without envs/; rewards that are all the same."""
    with pytest.raises(common.InputError, match="--sparse-reward: the data pay 1, scaled; expected"):
        common.value_range(np.array([0.0, 1.0]), parl.Args(sparse_reward=True, reward_bias=-1.0))
    with pytest.raises(common.InputError, match=r"every reward \* scale \+ bias is 0, expected success to pay"):
        common.value_range(np.zeros(3), parl.Args())


def test_what_an_environment_pays_is_checked_in_the_first_evaluation(monkeypatch, tmp_path):
    """Not only in the first online episode, when offline RL is done: each step pays what in the file success does."""
    gym.register("Costly-v0", Careless, max_episode_steps=5)
    last = np.arange(9) == 8
    rows = dict(observations=np.zeros((9, 2)), actions=np.zeros((9, 1)), timeouts=np.zeros(9))
    np.savez(tmp_path / "data.npz", **rows, rewards=last, terminals=last)
    flags = ["--env-id", "Costly-v0", "--dataset-path", tmp_path / "data.npz", "--sparse-reward", "--reward-bias", -1]
    monkeypatch.setattr(Careless, "pays", 1.0)
    expected = "an episode paid 0 at most, and 0 at its end, with success False"
    try:
        with pytest.raises(SystemExit, match=f"error: --sparse-reward: .*{expected}"):
            run_here("parl_gaussian", *SMALL, *flags, "--run-dir", tmp_path / "run")
    finally:
        del gym.registry["Costly-v0"]
    assert {row["phase"] for row in common.read_metrics(tmp_path / "run" / "metrics.csv")} <= {"bc"}


def test_a_reset_that_is_not_finite_asks_no_policy():
    class Blind(Careless):
        def reset(self, *, seed=None, options=None):
            return np.full(2, np.nan, np.float32), {}

    def act(obs, keys):
        raise AssertionError("the policy was asked")

    with pytest.raises(FloatingPointError, match="step 0: observation is not finite"):
        common.run_episodes([Blind()], act, [7])


def test_the_message_names_a_registered_environment():
    gym.register("Careless-v3", lambda: Careless("reward"), max_episode_steps=5)
    try:
        with pytest.raises(FloatingPointError, match="Careless-v3, episode with reset seed 7"):
            common.run_episodes([gym.make("Careless-v3", disable_env_checker=True)], constant(0.5), [7])
    finally:
        del gym.registry["Careless-v3"]


# ---------------------------------------------------------------- returns and failures


def test_a_failure_that_ends_a_sparse_episode_lasts_for_ever():
    """Falling early is paid: -1 and the end, where trying on costs -1 a step."""
    rewards, masks = np.array([-1.0, -1.0, -1.0]), np.array([1.0, 1.0, 0.0])
    assert common.endless_failure(rewards, masks, 0.9) == pytest.approx([-1, -1, -10])
    assert common.mc_returns(rewards, masks, 0.9, sparse=True) == pytest.approx([-10, -10, -10])
    success = np.array([-1.0, -1.0, 0.0])
    assert common.endless_failure(success, masks, 0.9) == pytest.approx(success)
    cut_off = np.array([1.0, 1.0, 1.0])
    assert common.endless_failure(rewards, cut_off, 0.9) == pytest.approx(rewards)


def test_a_failed_online_episode_is_stored_so(tmp_path):
    args = parl.Args(sparse_reward=True, discount=0.9, q_min=-10.0, q_max=0.0, hidden_dims=(8,), width=8)
    dataset = common.ReplayBuffer(2, 1)
    agent = parl.Agent(dataset, 2, 1, args, torch.device("cpu"), np.random.default_rng(0))
    (episode,) = common.run_episodes([Careless("falls")], constant(0.5), [0])
    agent.remember(episode)
    assert agent.online.rewards[:2] == pytest.approx([-1, -10]) and agent.online.masks[:2].tolist() == [1, 0]
    assert agent.online.mc_returns[:2] == pytest.approx([-10, -10])


def test_the_range_of_values_knows_steps_from_endless_failures():
    """A range a hundred times too wide, in which all values share a few bins."""
    buffer = common.ReplayBuffer(1, 1)
    rewards = common.endless_failure(np.array([-1.0, -1.0]), np.array([1.0, 0.0]), 0.99)
    buffer.add_episode(np.zeros((3, 1)), np.zeros((2, 1)), rewards, [1.0, 0.0], [-100, -100])
    args = parl.Args(sparse_reward=True, reward_bias=-1.0)
    assert common.value_range(common.step_rewards(buffer, args), args) == (-100, 0)
    rewards = common.endless_failure(
        np.array([-1.0, -10.0]), np.array([1.0, 0.0]), 0.99
    )  # it ends with what costs more
    buffer.add_episode(np.zeros((3, 1)), np.zeros((2, 1)), rewards, [1.0, 0.0], [-991, -1000])
    assert common.value_range(common.step_rewards(buffer, args), args) == (-1000, 0)


def test_a_failed_episode_of_changing_costs_goes_on_at_its_last():
    """Rows of -1, then of -2, with gamma 0.99: the endless sum, neither -200 throughout nor the truncated sum."""
    returns = common.mc_returns([-1.0, -1.0, -2.0], np.ones(3), 0.99, sparse=True)
    assert returns == pytest.approx([-1 - 0.99 - 0.99**2 * 200, -1 - 0.99 * 200, -200])
    assert common.mc_returns([-1.0] * 4, np.ones(4), 0.99, sparse=True) == pytest.approx([-100] * 4)


# ---------------------------------------------------------------- what is kept


def test_a_running_average_has_the_buffers():
    """policy_ema of a policy with BatchNorm, whose mean stays 0."""
    network = torch.nn.BatchNorm1d(2)
    average = torch.nn.BatchNorm1d(2)
    network(torch.full((4, 2), 5.0))
    with torch.no_grad():
        network.weight.fill_(3.0)
    parl.move_average(average, network, 0.25)
    assert average.running_mean.tolist() == network.running_mean.tolist() == [0.5, 0.5]
    assert average.num_batches_tracked == 1 and average.weight.tolist() == [1.5, 1.5]


def test_weights_that_are_not_finite_are_not_kept(tmp_path):
    args, network = parl.Args(), torch.nn.Linear(2, 2)
    counters = common.Counters(args)
    log = common.Log(tmp_path, args, counters)
    kept = dict(network=network, log=log, counters=counters)
    checkpoint = common.Checkpoint(tmp_path, args, {}, np.random.default_rng(0), **kept)
    network.register_buffer("mask", torch.tensor(-np.inf))  # a causal mask's numbers are none that were learned
    checkpoint.save()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        network.weight[0, 1] = np.inf
    with pytest.raises(FloatingPointError, match=r"network.weight is not finite; the last good checkpoint is"):
        checkpoint.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that ended after offline RL."""
    directory = tmp_path_factory.mktemp("stopped") / "run"
    run_here("parl_gaussian", *SMALL, "--online-steps", 0, "--run-dir", directory)
    return directory


def copy_of(directory, target):
    target.mkdir()
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_rate_given_with_resume_is_the_rate(stopped, tmp_path, monkeypatch):
    """Adam's state brings the old rate back while config.json says the new one."""
    rates, update = [], parl.update_critic

    def spy(critic, target, optimizer, *rest):
        info = update(critic, target, optimizer, *rest)
        rates.append(optimizer.param_groups[0]["lr"])
        return info

    monkeypatch.setattr(parl, "update_critic", spy)
    flags = ["--offline-steps", 25, "--critic-lr", 0.5e-5, "--resume", copy_of(stopped, tmp_path / "run")]
    run_here("parl_gaussian", *flags)
    assert rates == [0.5e-5] * 5


def test_a_folder_has_one_process(stopped, tmp_path):
    """A second --resume of a run that is alive: rows of two processes, one robot moved twice."""
    directory = copy_of(stopped, tmp_path / "run")
    hold = "import common, pathlib, sys; c = common.Checkpoint(pathlib.Path(sys.argv[1]), None, {}, None); c.lock()"
    command = [sys.executable, "-c", hold + "; print('held', flush=True); sys.stdin.read()", str(directory)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(SystemExit, match="another process is running in it"):
        run_here("parl_gaussian", "--resume", directory, "--offline-steps", 25)
    run_here("parl_gaussian", "--resume", directory, "--eval-only")  # reads alone
    holder.kill()  # the lock goes with the process, however it ends
    holder.wait()
    run_here("parl_gaussian", "--resume", directory, "--offline-steps", 25)


def test_two_runs_of_the_same_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.time, "strftime", lambda form: "261125-120000")
    names = [common.run_directory(parl.Args(), "parl_gaussian").name for _ in range(3)]
    name = "pointmaze-umaze-play__parl_gaussian__0__261125-120000"
    assert names == [name, f"{name}-2", f"{name}-3"]


def test_a_run_killed_before_its_first_checkpoint_can_begin_again(stopped, tmp_path):
    """Neither resumed nor begun again, for its config.json and metrics.csv were there."""
    directory = copy_of(stopped, tmp_path / "run")
    (directory / "checkpoint.pt").unlink()
    with pytest.raises(SystemExit, match=r"no checkpoint.pt.*expected --run-dir .* to begin again"):
        run_here("parl_gaussian", "--resume", directory)
    run_here("parl_gaussian", *SMALL, "--online-steps", 0, "--run-dir", directory)
    assert (directory / "checkpoint.pt").is_file()


def test_a_metrics_file_that_is_gone_or_shorter_than_its_checkpoint(stopped, tmp_path):
    directory = copy_of(stopped, tmp_path / "run")
    rows = (directory / "metrics.csv").read_text().splitlines()
    (directory / "metrics.csv").write_text("\n".join(rows[:3]) + "\n")
    with pytest.raises(SystemExit, match=rf"metrics.csv has 2 rows; expected the {len(rows) - 1}"):
        run_here("parl_gaussian", "--resume", directory, "--offline-steps", 25)
    (directory / "metrics.csv").unlink()
    with pytest.raises(SystemExit, match=rf"metrics.csv has 0 rows; expected the {len(rows) - 1}"):
        run_here("parl_gaussian", "--resume", directory, "--offline-steps", 25)


def test_folders_that_cannot_be_written_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=rf"error: --run-dir {tmp_path}/file: .*cannot be written"):
        run_here("parl_gaussian", *SMALL, "--run-dir", tmp_path / "file")

    def full(self, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match=r"checkpoint.pt cannot be written \(No space left on device\)"):
        run_here("parl_gaussian", *SMALL, "--run-dir", tmp_path / "run")


def test_a_dataset_path_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=rf"{tmp_path}/nothing.npz: no such file"):
        run_here("parl_gaussian", *SMALL, "--dataset-path=~/nothing.npz", "--run-dir", tmp_path / "run")


def test_the_seed_is_that_of_global_generators_too(tmp_path):
    """Environments that draw from them differ from run to run; and after a resume from where they were."""
    drawn = []
    for seed in (0, 0, 1):
        common.start(parl.Args(seed=seed))
        drawn.append((np.random.rand(), random.random()))
    assert drawn[0] == drawn[1] and not set(drawn[0]) & set(drawn[2])
    checkpoint = common.Checkpoint(tmp_path, parl.Args(), {}, np.random.default_rng(0))
    states = checkpoint.generators()
    drawn = np.random.rand(), random.random(), torch.rand(1).item(), checkpoint.generator.random()
    checkpoint.set_generators(states)
    assert drawn == (np.random.rand(), random.random(), torch.rand(1).item(), checkpoint.generator.random())
