"""Values, orders and choices that a run does not fail on when they are wrong: each test kills a mutant that lived."""

import importlib
import json
import math
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_here
from parallel import PARALLEL

import common
import parl_diffusion
import parl_gaussian
import parl_openvla
import parl_transformer

PAPER = dict(
    num_samples=32, num_keep=10, num_gradient_steps=10, action_lr=3e-4, discount=0.99, target_rate=0.005,
    batch_size=256, ensemble_size=10, critic_subset=2, cql_weight=0.005, cql_n_actions=10, critic_lr=3e-4, num_bins=128,
    policy_utd=1, critic_utd=1, offline_ratio=0.5, bc_steps=3_000_000, offline_steps=1_000_000, online_episodes=1000,
    action_chunk=1, critic_ema_rate=1.0, hidden_dims=(256, 256), policy_warmup_steps=2000, normalize_obs=True,
)  # fmt: skip
OF_POLICY = {
    "parl_gaussian": dict(bc_lr=3e-4, distill_lr=5e-5, policy_ema_rate=1.0),
    "parl_diffusion": dict(
        bc_lr=3e-4, distill_lr=5e-5, policy_ema_rate=0.002, diffusion_steps=5, width=256, num_layers=3
    ),
    "parl_transformer": dict(
        bc_lr=1e-4, distill_lr=1e-4, policy_ema_rate=0.005, num_layers=4, num_heads=8, action_bins=128
    ),
}
LAPTOP = dict(
    num_threads=1, eval_every=2000, log_every=250,
    bc_steps=10_000, offline_steps=4000, online_steps=4000, online_episodes=None, batch_size=64,
    target_rate=0.05, critic_lr=1e-3, critic_ema_rate=0.005, hidden_dims=(128, 128), ensemble_size=2, cql_weight=0.1,
    num_samples=8, num_keep=3, num_gradient_steps=1, action_lr=5e-3, act_draw=True,
    bc_lr=1e-3, distill_lr=1e-4, policy_ema_rate=0.003, width=64, num_layers=2, objective="flow",
)  # fmt: skip
ANTMAZE = LAPTOP | dict(
    sparse_reward=True, reward_bias=-1.0, discount=0.998, action_chunk=5, eval_every=5000, log_every=500,
    bc_steps=20_000, offline_steps=15_000, online_steps=6000,
    critic_ema_rate=0.002, hidden_dims=(256, 256), cql_weight=0.02, width=128,
)  # fmt: skip

PRESETS = {
    "small": LAPTOP | dict(offline_steps=10_000, hidden_dims=(256, 256)),
    "pointmaze": LAPTOP | dict(
        sparse_reward=True, reward_bias=-1.0, discount=0.98, eval_every=500, log_every=100,
        bc_steps=8000, offline_steps=2000, online_steps=500, batch_size=128, target_rate=0.02, critic_ema_rate=0.01,
        distill_lr=3e-4, policy_ema_rate=0.01,
    ),
    "pointmaze_large": LAPTOP | dict(
        sparse_reward=True, reward_bias=-1.0, discount=0.98, eval_every=1000, log_every=100,
        bc_steps=8000, offline_steps=4000, online_steps=1500, batch_size=128, target_rate=0.01, hidden_dims=(256, 256),
    ),
    "metaworld": LAPTOP | dict(sparse_reward=True, reward_bias=-1.0),
    "ogbench": LAPTOP | dict(
        sparse_reward=True, bc_steps=20_000, offline_steps=10_000, hidden_dims=(256, 256), cql_weight=0.3, width=128,
    ),
    "antmaze": ANTMAZE,
    "minari_maze": ANTMAZE,
    "paper": {},
    "antmaze_paper": dict(sparse_reward=True, reward_bias=-1.0, hidden_dims=(256, 256, 256, 256)),
    "kitchen": dict(reward_bias=-4.0, q_min=-400.0, q_max=0.0),
}  # fmt: skip


@pytest.mark.parametrize("script", PARALLEL)
def test_defaults_are_the_papers_and_presets_are_what_was_measured(script):
    """A changed number: every table in docs/results.md would be of something else."""
    module = importlib.import_module(script)
    args = vars(module.Args())
    for name, value in (PAPER | OF_POLICY[script]).items():
        assert args[name] == value, name
    assert module.PRESETS == PRESETS


def parsed(script, *command):
    module = importlib.import_module(script)
    return common.parse([*map(str, command)], module.Args, module.PRESETS, "")


@pytest.mark.parametrize("script", PARALLEL)
def test_a_preset_by_name(script):
    """Of another family, for an environment that has none; a flag that is given wins, in any order."""
    plain, named = (
        parsed(script, "--env-id", "Pendulum-v1"),
        parsed(script, "--env-id", "Pendulum-v1", "--preset=small"),
    )
    assert (plain.preset, plain.num_samples, plain.hidden_dims) == ("", 32, (256, 256))
    assert named.env_id == "Pendulum-v1" and named.preset == "small"
    for name, value in PRESETS["small"].items():
        assert getattr(named, name, value) == value
    assert parsed(script, "--num-keep", 2, "--preset", "small").num_keep == 2
    maze = parsed(script, "--env-id", "pointmaze-medium-play")
    assert (maze.preset, maze.discount, maze.sparse_reward) == ("pointmaze_large", 0.98, True)
    other = parsed(script, "--env-id", "pointmaze-medium-play", "--preset", "metaworld")  # replaces the family's
    assert (other.preset, other.discount) == ("metaworld", 0.99)
    paper = parsed(script, "--env-id", "cube-single-play-singletask-task1-v0", "--preset", "paper")
    assert (paper.preset, paper.num_samples, paper.sparse_reward) == ("paper", 32, False)


def test_a_preset_that_is_not_there():
    with pytest.raises(common.InputError, match=r"^--preset large: expected one of small, pointmaze, .*kitchen$"):
        parsed("parl_gaussian", "--preset", "large")
    with pytest.raises(
        common.InputError, match=r"^--preset \(empty\): expected one of small"
    ):  # was the family's, unsaid
        parsed("parl_gaussian", "--preset", "")
    with pytest.raises(common.InputError, match=r"^--preset minari: expected one of small"):  # a family without one
        parsed("parl_gaussian", "--preset", "minari")
    for presets, there in (({}, "none"), (parl_openvla.PRESETS, "metaworld")):
        with pytest.raises(common.InputError, match=rf"^--preset pointmaze: expected one of {there}$"):
            common.parse(["--preset", "pointmaze"], parl_openvla.Args, presets, "")


def test_a_preset_gives_a_policy_what_it_has():
    """A flag of another policy is left out; one that no script has is a mistake that test_interface finds."""
    presets = {"both": dict(num_keep=2, diffusion_steps=7)}
    assert common.preset_flags("both", presets, parl_gaussian.Args) == dict(preset="both", num_keep=2)
    assert common.preset_flags("both", presets, parl_diffusion.Args)["diffusion_steps"] == 7


def test_a_run_goes_on_with_its_own_flags_not_a_presets(tmp_path):
    args = dict(vars(parl_gaussian.Args(env_id="Pendulum-v1", num_keep=2)))
    (tmp_path / "config.json").write_text(json.dumps(args))
    assert parsed("parl_gaussian", "--resume", tmp_path).num_keep == 2
    with pytest.raises(common.InputError, match=r"^--preset small with --resume: expected none"):
        parsed("parl_gaussian", "--resume", tmp_path, "--preset", "small")


def test_the_same_command_goes_on_with_the_runs_flags(tmp_path, monkeypatch):
    """A preset that has changed since the run began would change what the run learns, and say nothing."""
    command = ["--run-dir", str(tmp_path), "--num-samples", "9"]
    begun = parl_gaussian.Args(preset="pointmaze", num_keep=7, num_samples=9, run_dir=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(vars(begun) | {"command": command}))
    (tmp_path / "checkpoint.pt").touch()
    monkeypatch.setattr(sys, "argv", ["parl_gaussian.py", *command])
    trained = []
    common.main(trained.append, parl_gaussian.Args, parl_gaussian.PRESETS, "")
    assert vars(trained[0]) == vars(begun) | {"resume": str(tmp_path)}


def little(**changes):
    args = parl_gaussian.Args(num_keep=1, num_gradient_steps=0, ensemble_size=3, hidden_dims=(64, 32, 16), q_min=-9.0)
    args.q_max, args.num_bins = 0.0, 11
    for name, value in changes.items():
        setattr(args, name, value)
    return args


class Table:
    """A critic whose member e gives action a the value table[e][round(a)]."""

    def __init__(self, table):
        self.table = torch.tensor(table)

    def __call__(self, obs, actions, members=None):
        table = self.table if members is None else self.table[members]
        return table[:, actions[..., 0].round().long()], None  # (E, B, N)


def test_reranking_is_by_the_mean_of_the_members():
    """The minimum of the ensemble, its first member, its maximum."""
    critic = Table([[0.0, -1.0, 3.0], [0.0, 3.0, -2.0], [0.0, 1.0, -0.5]])  # means 0, 1, 1/6; minima 0, -1, -2
    candidates = torch.tensor([[[0.0], [1.0], [2.0]]])
    assert parl_gaussian.rerank(critic, torch.zeros(1, 1), candidates, little(num_keep=2)).flatten().tolist() == [1, 2]


def test_q_policy_is_of_the_action_at_this_state():
    """That of the next state's action, in the same tensor."""
    args = little(cql_n_actions=2, num_bins=0, ensemble_size=2)
    batch = {name: torch.zeros(3, 1) for name in ("obs", "next_obs", "actions")}
    batch |= {"policy_actions": torch.ones(3, 1), "next_policy_actions": torch.full((3, 1), 2.0)}
    batch |= {"rewards": torch.zeros(3), "masks": torch.ones(3), "mc_returns": torch.full((3,), -9.0)}
    critic = Table([[0.0, -1.0, -5.0]] * 2)
    _, info = parl_gaussian.critic_loss(critic, critic, batch, args, random_actions=torch.zeros(3, 2, 1))
    assert info["critic/q_policy"] == -1 and info["critic/calibration_rate"] == 0


class Walk(gym.Env):
    """observation (1,); action (1,); ends after 4 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 0.0, False, self.steps == 4, {"success": False}


def test_evaluation_draws_noise_of_its_own_for_every_step_of_every_episode():
    """The same noise at every step, or in every episode: an average over fewer draws than it looks."""
    seen, drawn = [], []

    def act(obs, keys):
        seen.extend(keys[: len(obs)])
        noise = common.seeded_normal((len(obs), 1), keys).numpy()
        drawn.extend(noise[:, 0].tolist())
        return np.clip(noise, -1, 1)

    common.run_episodes([Walk(), Walk()], act, [5, 6, 7])
    assert sorted(seen) == [(seed, step) for seed in (5, 6, 7) for step in range(4)]
    assert len(set(drawn)) == 12


def test_no_normalize_obs_leaves_observations_as_they_are():
    dataset = common.ReplayBuffer(2, 1)
    dataset.add_episode(np.arange(8.0).reshape(4, 2), np.zeros((3, 1)), np.zeros(3), np.ones(3), np.zeros(3))
    for normalize, expected in ((True, [0.0, 0.0]), (False, [3.0, 4.0])):
        args = little(normalize_obs=normalize, width=8)
        agent = parl_gaussian.Agent(dataset, 2, 1, args, torch.device("cpu"), np.random.default_rng(0))
        assert agent.normalized(np.array([[3.0, 4.0]], np.float32))[0].tolist() == pytest.approx(expected)


def test_a_policy_checkpoint_brings_its_scales_of_observations(tmp_path, monkeypatch):
    """The new dataset's scales in place of those that the policy learned with."""
    monkeypatch.chdir(tmp_path)

    def kept(mean, args):
        dataset = common.ReplayBuffer(1, 1)
        states = mean + np.array([[-1.0], [1.0]])
        dataset.add_episode(states, np.zeros((1, 1)), np.zeros(1), np.ones(1), np.zeros(1))
        agent = parl_gaussian.Agent(dataset, 1, 1, args, torch.device("cpu"), np.random.default_rng(0))
        return dataset, agent

    args = little(width=8)
    args.hidden_dims, args.run_dir = (8,), str(tmp_path / "first")
    dataset, agent = kept(5.0, args)
    common.begin(common.open_run(args, "parl_gaussian", np.random.default_rng(0), dataset, agent.kept()), args)
    args.policy_checkpoint, args.run_dir = str(tmp_path / "first" / "checkpoint.pt"), str(tmp_path / "second")
    dataset, other = kept(-70.0, args)
    assert other.normalizer.mean.item() == -70
    common.open_run(args, "parl_gaussian", np.random.default_rng(0), dataset, other.kept())
    assert other.normalizer.mean.item() == 5
    for one, two in zip(agent.policy_ema.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_offline_share_is_rounded_down(tmp_path, monkeypatch):
    """floor(B * share), in critic and distillation batches; a dataset so small that rounding up shows."""
    shares, sample_both = [], common.sample_both

    def spy(offline, online, num_offline, num_online, *rest):
        shares.append((num_offline, num_online, len(offline), len(online)))
        return sample_both(offline, online, num_offline, num_online, *rest)

    monkeypatch.setattr(common, "sample_both", spy)
    flags = ["--bc-steps", 1, "--offline-steps", 1, "--online-steps", 50, "--batch-size", 5, "--num-eval-episodes", 0]
    flags += ["--hidden-dims", 8, "--num-bins", 8, "--width", 8, "--num-samples", 2, "--num-keep", 1]
    run_here("parl_gaussian", *flags, "--run-dir", tmp_path / "run")
    online = [share for share in shares if share[1]]
    critic = [share[:2] for share in online if share[0] < 4]
    assert set(critic) == {(2, 3)}
    distillation = [share for share in online if share[0] >= 4]
    assert distillation and all(n == math.floor(5 * off / (off + on)) for n, _, off, on in distillation)


def test_the_online_phase_ends_at_the_smaller_limit():
    """A learning rate's warm-up over a number of steps that will never be reached."""
    env = gym.wrappers.TimeLimit(Walk(), 50)
    for steps, episodes, expected in [(100, None, 100), (None, 3, 150), (100, 3, 100), (1000, 3, 150)]:
        assert common.max_env_steps(env, little(online_steps=steps, online_episodes=episodes)) == expected
    assert common.max_env_steps(Walk(), little(online_steps=None, online_episodes=2)) == 2000


# ---------------------------------------------------------------- networks as they begin


def gains(weight):
    """Its singular values, all the same where it is orthogonal."""
    return torch.linalg.svdvals(weight.detach()).tolist()


def test_the_critic_begins_as_it_should():
    """Gains exchanged, the last layer's forgotten, all members alike."""
    torch.manual_seed(0)
    critic = parl_gaussian.Critic(6, 4, little())
    for i, weight in enumerate(critic.weights):
        gain = 1e-2 if i == 2 else math.sqrt(2)
        for member in weight:
            assert gains(member) == pytest.approx([gain] * min(member.shape), rel=1e-4)
        assert not torch.allclose(weight[0], weight[1])
    assert gains(critic.head_weight) == pytest.approx([1e-2] * 11, rel=1e-4)


def test_a_residual_block_drops_before_it_normalises():
    block = parl_diffusion.ResidualBlock(4, dropout=0.5)
    block.dropout.p = 1.0  # nothing is left
    with torch.no_grad():
        block.norm.bias.fill_(1.0)
    h = torch.randn(3, 4)
    expected = h + block.contract(F.silu(block.expand(torch.ones(3, 4))))  # what LayerNorm makes of zeros is its bias
    torch.testing.assert_close(block(h), expected)


def test_the_gaussian_begins_as_it_should():
    """Another activation, a last layer as large as the others: standard deviations far from 1 at the start."""
    torch.manual_seed(0)
    policy = parl_gaussian.GaussianPolicy(6, 3, parl_gaussian.Args(width=8, num_layers=2))
    for layer in policy.hidden:
        assert gains(layer.weight) == pytest.approx([math.sqrt(2)] * min(layer.weight.shape), rel=1e-4)
        assert (layer.bias == 0).all()
    assert gains(policy.output.weight) == pytest.approx([1e-2] * 6, rel=1e-4)
    obs = torch.randn(5, 6)
    first, second = policy.hidden
    mean, log_std = policy.output(F.silu(second(F.silu(first(obs))))).chunk(2, -1)
    torch.testing.assert_close(policy(obs), (mean, log_std))


def test_the_transformer_begins_as_it_should():
    torch.manual_seed(0)
    policy = parl_transformer.TransformerPolicy(6, 4, parl_transformer.Args(width=64, num_layers=2, num_heads=4))
    for block in policy.blocks:
        for layer in (block.qkv, block.project, block.expand, block.contract):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and (layer.bias == 0).all()
    assert policy.positions.std().item() == pytest.approx(0.02, rel=0.2)
    assert policy.embed_tokens.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_run_knows_its_commit(tmp_path, monkeypatch):
    """Of the folder of common.py, also where there are tags; marked where files are changed; else empty."""
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert common.commit() == ""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / "common.py").write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "x"], ["tag", "v1"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    head = subprocess.run(["git", "-C", tmp_path, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert common.commit() == head[:12]
    (tmp_path / "common.py").write_text("2")
    assert common.commit() == head[:12] + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert common.commit() == ""
