"""parl_openvla.py beyond its model: the critic on images, the store of samples, the loop, several processes, errors."""

import copy
import csv
import difflib
import inspect
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, snippet
from test_runs import assert_same, load, metrics, steps_done
from two_ranks import work

import common
import envs
import parl_openvla as parl
import parl_transformer
from common import InputError
from envs import files

ARGS = parl.Args(
    hidden_dims=(16, 16), encoder_widths=(4, 8), encoding_width=8, critic_image_size=16, ensemble_size=3,
    num_samples=5, num_keep=2, num_gradient_steps=3, action_lr=0.1, q_min=-100.0, q_max=0.0,
)  # fmt: skip

# ---------------------------------------- shared with parl_transformer.py ----------------------------------------

SHARED = ["draw", "hl_gauss", "rerank", "ascend", "optimize_actions", "choose", "optimization_info"]
SHARED += ["critic_loss", "move_average", "learning_rate"]


def first_drift(names, get_ours, get_theirs):
    """'' or the first function of `names` that is not byte-identical, with its first line that differs."""
    for name in names:
        lines = difflib.ndiff(get_theirs(name).splitlines(), get_ours(name).splitlines())
        if changed := [line for line in lines if line[0] in "+-"]:
            return f"{name}: {changed[0]}"
    return ""


def source(module):
    return lambda name: inspect.getsource(getattr(module, name))


def test_these_functions_are_the_transformers():
    assert first_drift(SHARED, source(parl), source(parl_transformer)) == ""


def test_a_function_that_drifts_is_named():
    def broken(name):
        return source(parl)(name).replace("q.argmax(1)", "q.argmin(1)")

    assert first_drift(SHARED, broken, source(parl_transformer)).startswith("choose: -     return actions[torch.arange")


# ---------------------------------------- the critic on images ----------------------------------------


def images(num, size=20, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), np.uint8))


@pytest.fixture
def critic():
    torch.manual_seed(0)
    critic = parl.Critic(8, 2, ARGS)
    for parameter in critic.parameters():  # the last layers start near 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    return critic


def test_critic_scores_actions_of_a_state_as_if_alone(critic):
    obs, actions = critic.encode(images(3)), torch.rand(3, 4, 2) * 2 - 1
    q, logits = critic(obs, actions)
    assert obs.shape == (3, 8) and q.shape == (3, 3, 4) and logits is None
    alone = [critic(obs[b : b + 1], actions[b : b + 1, n : n + 1])[0][:, 0, 0] for b in range(3) for n in range(4)]
    torch.testing.assert_close(q.flatten(1), torch.stack(alone, 1))
    torch.testing.assert_close(critic(obs, actions, torch.tensor([2, 0]))[0], q[[2, 0]])
    binned = parl.Critic(8, 2, parl.Args(**{**vars(ARGS), "num_bins": 5}))
    assert binned(obs, actions)[1].shape == (3, 3, 4, 5)


@pytest.mark.parametrize("layer", [0, 1])
def test_every_layer_reads_the_action(critic, layer):
    """An action that enters at the first layer alone would be lost here."""
    actions = torch.rand(2, 1, 2) * 2 - 1
    for i, weight in enumerate(critic.weights):
        weight.data[:, -2:] *= i == layer
    assert not torch.allclose(critic(torch.zeros(2, 8), actions)[0], critic(torch.zeros(2, 8), -actions)[0])


def test_critic_encodes_at_its_own_size(critic):
    """Each of its pixels is the mean of 4 of twice the size."""
    small = images(2, 16)
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(critic.encode(large), critic.encode(small))
    assert not torch.allclose(critic.encode(small)[0], critic.encode(small)[1])


class FixedPolicy:
    def sample(self, obs, num_samples, seeds=None):
        return torch.rand(len(obs["image"]), num_samples, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1


def count_encoded(monkeypatch):
    encoded, encode = [], parl.Critic.encode
    monkeypatch.setattr(parl.Critic, "encode", lambda self, *x: encoded.append((self, len(x[0]))) or encode(self, *x))
    return encoded


def test_acting_encodes_a_state_once(critic, monkeypatch):
    """Not once per candidate, nor per gradient step."""
    encoded = count_encoded(monkeypatch)
    action = parl.act(FixedPolicy(), critic, {"image": images(4).numpy(), "instruction": [""] * 4}, ARGS)
    assert action.shape == (4, 2) and encoded == [(critic, 4)]


def transitions(num):
    batch = {"obs": images(num, seed=1), "next_obs": images(num, seed=2), "actions": torch.rand(num, 2) * 2 - 1}
    batch |= {"codes": torch.zeros(num, 8)}
    return batch | {"rewards": -torch.ones(num), "masks": torch.ones(num), "mc_returns": -50 * torch.ones(num)}


def test_a_draw_that_acts_follows_from_its_seed(critic):
    """Else an evaluation would not be the same twice. Without seeds it is torch's generator that draws."""
    args = parl.Args(**{**vars(ARGS), "act_draw": True})
    obs = {"image": images(64).numpy(), "instruction": [""] * 64}
    seeds = [(3, step) for step in range(64)]
    torch.manual_seed(0)
    one, two, other = (parl.act(FixedPolicy(), critic, obs, args, given) for given in (seeds, seeds, None))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_critic_update_encodes_a_state_once_and_moves_its_image(critic, monkeypatch):
    encoded, moved, shift = count_encoded(monkeypatch), [], parl.random_shift
    monkeypatch.setattr(parl, "random_shift", lambda x, args: moved.append(x) or shift(x, args))
    target, batch = copy.deepcopy(critic), transitions(6)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
    before = [parameter.clone() for parameter in critic.parameters()]
    info = parl.update_critic(critic, target, optimizer, batch, torch.rand(12, 5, 2) * 2 - 1, ARGS)
    assert sorted(encoded, key=lambda pair: pair[0] is target) == [(critic, 6), (critic, 6), (target, 6)]
    assert len(moved) == 2 and moved[0] is batch["obs"] and moved[1] is batch["next_obs"]
    names = [name for name, _ in critic.named_parameters()]
    same = [name for name, old, new in zip(names, before, critic.parameters(), strict=True) if torch.equal(old, new)]
    assert same == [] and all(torch.isfinite(value) for value in info.values())  # the encoder learns too


def test_critic_learns_from_the_image(critic):
    """Two images of other value: an encoder without gradient, or one that sees nothing, would give the mean."""
    args = parl.Args(**{**vars(ARGS), "cql_weight": 0.0, "augment_pixels": 0, "critic_lr": 1e-2})
    batch = transitions(8) | {"masks": torch.zeros(8), "rewards": torch.tensor([-1.0, -5.0]).repeat(4)}
    batch["obs"] = images(2, seed=3).repeat(4, 1, 1, 1)
    optimizer, target = torch.optim.Adam(critic.parameters(), lr=1e-2), copy.deepcopy(critic)
    for _ in range(60):
        info = parl.update_critic(critic, target, optimizer, batch, torch.rand(16, 5, 2) * 2 - 1, args)
    assert info["critic/td_loss"] < 0.5  # the mean's is 4


def test_random_shift():
    """Images whose pixels say where they were: moved as a whole by up to 4 of the critic's pixels, here 8, each on its
    own, the border repeated."""
    size, args = 40, parl.Args(critic_image_size=20)
    rows, columns = np.mgrid[:size, :size]
    image = torch.from_numpy(np.stack([rows, columns, rows], -1).astype(np.uint8))
    moved = parl.random_shift(image.repeat(200, 1, 1, 1), args)
    assert moved.dtype == torch.uint8 and moved.shape == (200, size, size, 3)
    down, right = (moved[:, 20, 20, :2].long() - 20).unbind(-1)
    for shift in (down, right):
        assert set(shift.tolist()) == set(range(-8, 9))
    assert (down != right).any()
    for i in range(200):
        assert torch.equal(moved[i, :, 0, 0].long(), (torch.arange(size) + down[i]).clamp(0, size - 1))
        assert torch.equal(moved[i, 0, :, 1].long(), (torch.arange(size) + right[i]).clamp(0, size - 1))
    assert torch.equal(parl.random_shift(moved, parl.Args(augment_pixels=0)), moved)


# ---------------------------------------- the store of samples ----------------------------------------


class Echo:
    """A policy whose samples are a number per state, and which remembers what it was asked."""

    device = torch.device("cpu")

    def __init__(self):
        self.asked = []

    def sample(self, obs, num_samples, seeds):
        self.asked.append(seeds)
        return torch.tensor([seed[1] + seed[2] / 8 for seed in seeds])[:, None, None].expand(-1, num_samples, 2)


def rows(*values):
    return torch.tensor(values)


def test_store_draws_a_state_once_from_seed_state_and_version():
    store, policy = parl.SampleStore(2, parl.Args(seed=7, num_samples=3)), Echo()
    store.grow(4)
    samples = store.at(policy, rows(3, 1, 3), lambda rows: rows)
    assert samples.shape == (3, 3, 2) and samples[:, 0, 0].tolist() == [3, 1, 3]
    assert policy.asked == [[(7, 1, 0), (7, 3, 0)]]
    store.version = 2
    store.grow(6)
    assert store.at(policy, rows(1, 5), lambda rows: rows)[:, 0, 0].tolist() == [1, 5.25]
    assert policy.asked[1:] == [[(7, 5, 2)]] and store.versions.tolist() == [-1, 0, -1, 0, -1, 2]


def test_store_refreshes_the_oldest_within_the_budget():
    store, policy = parl.SampleStore(2, parl.Args(num_samples=1)), Echo()
    store.grow(6)
    store.versions, store.version = rows(2, 0, -1, 1, 0, 3), 3
    store.refresh(policy, lambda rows: rows, 3)
    assert store.versions.tolist() == [2, 3, -1, 3, 3, 3]  # 0, 0, 1; never those not drawn yet
    assert [seed[1] for seed in policy.asked[0]] == [1, 4, 3]
    store.refresh(policy, lambda rows: rows, 3)
    assert store.versions.tolist() == [3, 3, -1, 3, 3, 3] and len(policy.asked[1]) == 1
    store.refresh(policy, lambda rows: rows, 3)
    assert len(policy.asked) == 2  # nothing is old


def test_stores_actions_are_the_policys_to_the_token():
    """Half precision moves an action by less than half a token, even at the ends."""
    policy = parl.OpenVLAPolicy(4, parl.Args())
    tokens = policy.last_action - torch.arange(1, 256)
    assert torch.equal(policy.tokenize(policy.detokenize(tokens).half().float()), tokens)


# ---------------------------------------- whole runs ----------------------------------------

SMALL = [
    *("--bc-steps", 4, "--offline-steps", 4, "--online-episodes", 3, "--batch-size", 4, "--num-eval-episodes", 2),
    *("--eval-every", 4, "--log-every", 2, "--hidden-dims", 16, 16, "--encoder-widths", 4, 4, "--encoding-width", 8),
    *("--critic-image-size", 16, "--ensemble-size", 2, "--num-samples", 3, "--num-keep", 2, "--num-gradient-steps", 2),
    *("--refresh-states", 5, "--num-threads", 1, "--env-id", "pixels:Dot-v0"),
]
PATHS = {"PYTHONPATH": str(ROOT / "tests")}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Random pushes of the dot, as a dataset file of 64 x 64 images."""
    env, rng = envs.make("pixels:Dot-v0", True, image_size=64), np.random.default_rng(0)
    data = {name: [] for name in files.DATASET_KEYS[:5]}
    for episode in range(6):
        (obs, _), done = env.reset(seed=episode), False
        while not done:
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            following, _, terminated, truncated, info = env.step(action)
            for values, value in zip(data.values(), (obs, action, info["success"], terminated, truncated), strict=True):
                values.append(value)
            obs, done = following, terminated or truncated
    path = tmp_path_factory.mktemp("data") / "dots.npz"
    np.savez(path, **{name: np.stack(values) for name, values in data.items()})
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, dataset):
    directory = tmp_path_factory.mktemp("openvla") / "run"
    run_script("parl_openvla", *SMALL, "--dataset-path", dataset, "--run-dir", directory, env=PATHS)
    return directory


def test_a_run_goes_through_all_phases(finished):
    table = common.read_metrics(finished / "metrics.csv")
    assert list(dict.fromkeys(row["phase"] for row in table)) == ["bc", "offline", "online"]
    last, checkpoint = table[-1], load(finished)
    filled = ("eval/success_rate", "eval/policy_success_rate", "critic/loss", "policy/distill_loss", "opt/improvement")
    assert all(name in last for name in filled) and last["episode"] == 3
    assert checkpoint["args"]["instruction"] == "push the dot to the middle"
    assert json.loads((finished / "config.json").read_text())["instruction"] == ""  # of each reset, also when resumed
    online = checkpoint["online"]
    assert (finished / "images.bin").stat().st_size == len(online["states"]) * 64 * 64 * 3
    # the environment pays nothing: success is the reward, and the end
    assert set(online["rewards"].tolist()) <= {-1.0, 0.0}
    assert (online["masks"] == 0).any() and torch.equal(online["rewards"] == 0, online["masks"] == 0)
    failed = online["mc_returns"][online["mc_returns"] < -99]
    assert len(failed) in (0, 8, 16)  # r / (1 - discount) throughout an episode of 8 steps that fails
    # three distillations; the states of a batch have samples, by several versions
    assert checkpoint["store"]["version"] == 3
    versions = checkpoint["store"]["versions"]
    assert set(versions.tolist()) <= {-1, 0, 1, 2, 3} and (versions == 3).sum() >= 5


def test_killed_and_resumed_equals_uninterrupted(finished, dataset, tmp_path):
    """Online, where samples of several versions are in use that no policy could draw again."""
    directory = tmp_path / "killed"
    flags = [*map(str, SMALL), "--dataset-path", str(dataset), "--run-dir", str(directory)]
    command = [sys.executable, str(ROOT / "parl_openvla.py"), *flags]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **PATHS}, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.05)
        table = directory / "metrics.csv"
        if table.exists() and "online" in table.read_text() and load(directory)["counters"]["episode"]:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < load(directory)["counters"]["episode"] < 3
    run_script("parl_openvla", "--resume", directory, env=PATHS)
    assert metrics(directory) == metrics(finished)
    assert_same(load(directory), load(finished))


def test_policy_checkpoint_and_eval_only(finished, dataset, tmp_path):
    result = run_script("parl_openvla", "--eval-only", "--resume", finished, env=PATHS)
    row = json.loads(result.stdout[result.stdout.index("{") :])
    last = common.read_metrics(finished / "metrics.csv")[-1]
    assert row == pytest.approx({name: last[name] for name in row}, rel=1e-4)
    result = run_script("parl_openvla", "--resume", finished, "--critic-image-size", 15, env=PATHS, check=False)
    assert "--critic-image-size is 16 there and 15 here; expected the same" in result.stderr  # of the same shapes
    start = ["--policy-checkpoint", finished / "checkpoint.pt", "--online-episodes", 0]
    run_script("parl_openvla", *SMALL, "--dataset-path", dataset, *start, "--run-dir", tmp_path / "run", env=PATHS)
    assert_same(load(tmp_path / "run")["policy"], load(finished)["policy_ema"])


def test_snippet_of_the_docs_loads_and_acts(finished):
    code = snippet("from parl_openvla import Args")
    code = code.replace("runs/X/checkpoint.pt", str(finished / "checkpoint.pt"))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.count("tensor([[") == 2


# ---------------------------------------- several processes ----------------------------------------


def test_two_processes_draw_the_samples_and_gradients_of_one(tmp_path):
    """A rank with other weights or another's states, seeds that depend on the share, summed gradients would differ."""
    processes = []
    for rank in range(2):
        env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=29511)
        env |= {"PYTHONFAULTHANDLER": 1}  # where one dies of a signal, its stacks
        env = {**os.environ, **{name: str(value) for name, value in env.items()}}
        command = [sys.executable, str(ROOT / "tests" / "two_ranks.py"), str(tmp_path)]
        processes.append(subprocess.Popen(command, env=env))
    alone = work()
    assert [process.wait(120) for process in processes] == [0, 0]
    assert max(gradient.abs().max() for gradient in alone["gradients"].values()) > 1e-2
    shared = torch.load(tmp_path / "rank-0.pt", weights_only=True)
    assert torch.equal(shared["samples"], alone["samples"])
    torch.testing.assert_close(shared["loss"], alone["loss"], rtol=1e-5, atol=0)
    for part in ("gradients", "policy"):
        for name, value in alone[part].items():
            torch.testing.assert_close(shared[part][name], value, rtol=1e-4, atol=1e-6)


def test_torchrun_gives_the_run_of_one_process(finished, dataset, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29512"]
    flags = [*map(str, SMALL), "--dataset-path", str(dataset), "--run-dir", str(tmp_path / "run")]
    env = {**os.environ, **PATHS, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*torchrun, "parl_openvla.py", *flags], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with open(finished / "metrics.csv") as one, open(tmp_path / "run" / "metrics.csv") as two:
        for alone, shared in zip(csv.DictReader(one), csv.DictReader(two), strict=True):
            for name in ("phase", "env_step", "critic/loss", "eval/policy_length"):
                assert shared[name] == (alone[name] if name in ("phase", "env_step") else pytest.approx(alone[name]))
    for name in ("policy_ema", "critic"):
        for key, value in load(finished)[name].items():
            torch.testing.assert_close(load(tmp_path / "run")[name][key], value, rtol=1e-3, atol=1e-4)


def test_torchrun_goes_on_after_a_killed_process(finished, dataset, tmp_path):
    """It starts all of them again, from the checkpoint: the run ends as it would have."""
    directory = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29513"]
    flags = [*map(str, SMALL), "--dataset-path", str(dataset), "--run-dir", str(directory)]
    process = subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "parl_openvla.py", *flags],
        cwd=ROOT, env={**os.environ, **PATHS, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None:
        time.sleep(0.05)
        table = directory / "metrics.csv"
        if table.exists() and "online" in table.read_text() and load(directory)["counters"]["episode"]:
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and output.count("resumed in phase online") == 1
    assert output.count("holds a run of this command, which goes on") == 1  # rank 0's alone
    table, expected = (common.read_metrics(run / "metrics.csv") for run in (directory, finished))
    assert [(row["phase"], row["env_step"]) for row in table] == [(row["phase"], row["env_step"]) for row in expected]
    for key, value in load(finished)["policy_ema"].items():
        torch.testing.assert_close(load(directory)["policy_ema"][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "--run-dir: expected a folder"),
        ({"run_dir": "x", "batch_size": 15}, "--batch-size 15: expected a multiple"),
    ],
)
def test_what_ranks_cannot_share(flags, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=message):
        parl.join_ranks(parl.Args(**flags))


def test_a_restart_of_torchrun_meets_anew(monkeypatch, tmp_path):
    """The agent's store outlives a restart, with the addresses of the processes before."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    agents_store, stores = parl.dist.HashStore(), []
    monkeypatch.setattr(parl.dist, "rendezvous", lambda url: iter([(agents_store, 0, 2)]))
    monkeypatch.setattr(parl.dist, "init_process_group", lambda *all, store, **named: stores.append(store))
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        parl.join_ranks(parl.Args(run_dir=str(tmp_path), device="cpu"))
    stores[0].set("address", "of a process that was killed")
    assert not stores[1].check(["address"])


def test_torchrun_stops_all_processes_together(dataset, tmp_path):
    """The signal reaches them at different updates; the checkpoint is whole."""
    directory = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29514"]
    flags = [*map(str, SMALL), "--dataset-path", str(dataset), "--run-dir", str(directory), "--bc-steps", "100000"]
    process = subprocess.Popen(
        [*torchrun, "parl_openvla.py", *flags],
        cwd=ROOT, env={**os.environ, **PATHS, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (directory / "metrics.csv").exists() or len((directory / "metrics.csv").read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert output.count("stopped by SIGTERM; to go on: the same command, or --resume") == 1
    assert steps_done(directory, "bc") >= 4 and (directory / "curves.png").exists()


# ---------------------------------------- environments and errors ----------------------------------------


def test_instruction_comes_from_flag_attribute_or_reset():
    for name, flag, expected in [
        ("Dot", "", "push the dot to the middle"),
        ("Told", "", "push it"),
        ("Mute", "Go", "Go"),
        ("Dot", "Go", "Go"),
    ]:
        env = envs.make(f"pixels:{name}-v0", True, image_size=64)
        assert parl.instruction_of(env, parl.Args(instruction=flag)) == expected
    assert parl.instruction_of(env, parl.Args(), {"instruction": "of this reset"}) == "of this reset"


def test_actions_are_in_the_checkpoints_units():
    """By hand: -1 and 1 stand for q01 and q99, cut to the environment's bounds; the gripper keeps its own."""

    statistics = {"q01": [-0.02, -3.0, 0.0], "q99": [0.04, 3.0, 1.0], "mask": [True, True, False]}
    policy = parl.OpenVLAPolicy(3, parl.Args(), statistics=statistics)
    env = gym.make("pixels:Dot-v0", act_dim=3)
    env.unwrapped.action_space = gym.spaces.Box(np.float32([-0.1, -1, 0]), np.float32([0.1, 1, 1]))
    env = gym.wrappers.RescaleAction(env.unwrapped, np.float32(-1), np.float32(1))
    units = parl.PolicyEnv(env, policy, {}, parl.Args())
    assert units.action(np.array([1.0, -0.1, 0.75])) == pytest.approx([0.04, -0.3, 0.75])
    assert units.action(np.array([-1.0, -1.0, 0.0])) == pytest.approx([-0.02, -1.0, 0.0])
    dataset = np.array([[0.25, -0.3, 0.5], [-0.05, 0.9, -0.5]])  # in [-1, 1] of the bounds
    assert units.reverse_action(dataset) == pytest.approx(np.array([[0.5, -0.1, 0.75], [-0.5, 0.3, 0.25]]))


def error(monkeypatch, *flags):
    """What `python parl_openvla.py flags` ends with; one line."""
    monkeypatch.setattr("sys.argv", ["parl_openvla", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        common.main(parl.train, parl.Args, parl.PRESETS, parl.__doc__)
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    return str(stop.value)


BAD = {
    "--env-id Pendulum-v1": r'--env-id Pendulum-v1: observations .*; expected a Dict with "image", uint8',
    "--env-id pointmaze-umaze-play": r'--env-id pointmaze-umaze-play: observations .*; expected a Dict with "image"',
    "--env-id pixels:Mute-v0": r"--env-id pixels:Mute-v0: has no instruction.*; expected --instruction",
    "--env-id pixels:Dot-v0": "--env-id pixels:Dot-v0 has no dataset of its own: expected --dataset-path FILE",
    "--env-id pixels:Dot-v0 --instruction "
    + 2100 * "x": r"--instruction '.*: the prompt has \d+ tokens; expected up to",
    "--warmup-episodes 2 --dataset-path x.npz": "--warmup-episodes: .*; expected no --dataset-path",
    "--reward-scale 0.1": r"--reward-scale 0.1 --reward-bias -1: with --sparse-reward .*; expected a bias",
    "--warmup-episodes 2": "--warmup-episodes: .*; expected --checkpoint or --policy-checkpoint",
    "--warmup-episodes -1": "--warmup-episodes -1: expected at least 0",
    "--encoder-widths 0": r"--encoder-widths \(0,\): expected one or more widths",
    "--targets-per-image 0": "--targets-per-image 0: expected at least 1",
    "--unnorm-key bridge": "--unnorm-key bridge: names statistics of a checkpoint; expected --checkpoint",
    "--checkpoint x --lora-rank 0": "--lora-rank 0: .*; expected --dtype float32",
    "--num-keep 9": "--num-keep 9: expected between 1 and 8",
}


def test_presets_are_for_the_tiny_model(monkeypatch):
    for flags, expected in (([], parl.PRESETS), (["--checkpoint=x"], {}), (["--checkpoint", "x"], {})):
        given = []
        monkeypatch.setattr(common, "main", lambda train, args, presets, doc, given=given: given.append(presets))
        monkeypatch.setattr("sys.argv", ["parl_openvla.py", *flags])
        runpy.run_path(str(ROOT / "parl_openvla.py"), run_name="__main__")
        assert given == [expected]


@pytest.mark.parametrize("flags", BAD, ids=lambda flags: flags[:60])
def test_bad_input(flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert re.search(BAD[flags], error(monkeypatch, *flags.split()))
    assert not (tmp_path / "runs").exists()


def test_datasets_of_other_images(dataset, tmp_path, monkeypatch):
    data = dict(np.load(dataset))
    for change, message in [
        (lambda x: x[:, ::2, ::2], r"observations has shape \(\d+, 32, 32, 3\); expected \(\d+, 64, 64, 3\)"),
        (lambda x: x / 255, "observations has dtype float64; expected images, uint8"),
    ]:
        np.savez(tmp_path / "data.npz", **{**data, "observations": change(data["observations"])})
        assert re.search(
            message, error(monkeypatch, "--env-id", "pixels:Dot-v0", "--dataset-path", tmp_path / "data.npz")
        )


def test_image_datasets_keep_their_episodes(dataset):
    """Without next_observations: a success keeps its last transition, a time limit drops it."""
    data = dict(np.load(dataset))
    env = envs.make("pixels:Dot-v0", True, image_size=64)
    buffer = envs.load_dataset("pixels:Dot-v0", dataset, 1.0, -1.0, 0.99, True, env)
    assert buffer.states.dtype == np.uint8 and len(buffer) == len(data["rewards"]) - data["timeouts"].sum()
    last = buffer.state_rows[np.flatnonzero(buffer.masks[: len(buffer)] == 0)]
    assert len(last) and np.array_equal(buffer.states[last + 1], buffer.states[last])  # no value follows a success
    batch = buffer.sample(50, np.random.default_rng(0))
    assert batch["obs"].dtype == torch.uint8 and batch["obs"].shape == (50, 64, 64, 3)
    row = int(batch["state_rows"][0])
    assert np.array_equal(batch["next_obs"][0], buffer.states[row + 1])


def test_missing_opengl_names_the_package():
    flags = ["--env-id", "metaworld-handle-press", "--bc-steps", 1]
    result = run_script("parl_openvla", *flags, check=False, env={"MUJOCO_GL": "nonsense"})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search("error: MUJOCO_GL=nonsense: .*libegl1 and libgl1", result.stderr)
