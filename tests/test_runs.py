"""Whole runs of every script, as a user starts them."""

import copy
import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import POLICIES, ROOT, SMALL, run_here, run_script, snippet
from parallel import PARALLEL

import common
import envs


@pytest.fixture(params=PARALLEL)
def script(request):
    return request.param


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished(script): the directory of a small run that went to its end, made once per script."""
    directories = {}

    def get(script):
        if script not in directories:
            directory = tmp_path_factory.mktemp(script) / "run"
            result = run_script(script, *SMALL, "--run-dir", directory)
            (directory / "stdout.txt").write_text(result.stdout)
            directories[script] = directory
        return directories[script]

    return get


def metrics(directory):
    """metrics.csv without what depends on the clock."""
    with open(directory / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)]


def assert_same(first, second, path=""):
    """Bit for bit, through dicts, lists and tensors; `seconds` are the clock's."""
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            if key not in ("seconds", "args", "wandb_id") and not str(key).startswith("time/"):
                assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for i, (one, two) in enumerate(zip(first, second, strict=True)):
            assert_same(one, two, f"{path}/{i}")
    elif torch.is_tensor(first):
        assert torch.equal(first, second), path
    else:
        assert first == second, path


def load(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def test_a_run_leaves_its_files(script, finished):
    directory = finished(script)
    rows = common.read_metrics(directory / "metrics.csv")
    phases = [row["phase"] for row in rows]
    assert list(dict.fromkeys(phases)) == ["bc", "offline", "online"]
    assert [row["gradient_step"] for row in rows if row["phase"] == "bc"] == [5, 10, 15, 20]
    assert all("eval/policy_success_rate" in row for row in rows if row["gradient_step"] in (10, 20, 30, 40))
    assert not any("eval/success_rate" in row for row in rows if row["phase"] == "bc")  # there is no critic yet
    last = rows[-1]
    assert last["env_step"] >= 60 and last["episode"] >= 1
    filled = {
        "eval/success_rate",
        "train/return",
        "train/regret",
        "critic/loss",
        "policy/distill_loss",
        "opt/improvement",
    }
    assert filled <= set(last) and last["opt/improvement"] >= 0
    for before, after in pairwise([row for row in rows if row["phase"] == "online"]):
        assert after["env_step"] - before["env_step"] == after["train/length"]
        assert after["gradient_step"] - before["gradient_step"] == after["train/length"]
    config = json.loads((directory / "config.json").read_text())
    assert config["bc_steps"] == 20 and config["q_min"] == pytest.approx(-50) and len(config["dataset_sha256"]) == 64
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(directory.glob(".*.partial"))
    stdout = (directory / "stdout.txt").read_text()
    assert "--num-samples=8" in stdout and stdout.index("steps to goal") > 0
    with pytest.raises(SystemExit, match="holds a run; --seed is 0 there and 1 here"):
        run_here(script, *SMALL, "--seed", 1, "--run-dir", directory)
    with open(directory / "metrics.csv") as file:  # no column of a name that is spelt wrong
        assert file.readline().strip().split(",") == common.COLUMNS
    checkpoint = load(directory)
    assert checkpoint["policy_class"] == POLICIES[script] and checkpoint["counters"]["env_step"] == last["env_step"]


def steps_done(directory, phase):
    """How many steps of `phase` the checkpoint counts; of the environment in phase "online"."""
    return load(directory)["counters"]["done"].get(phase, 0)


def within(directory, phase):
    """Is the checkpoint of a SMALL run inside `phase`, neither at its start nor at its end?"""
    return 0 < steps_done(directory, phase) < {"bc": 20, "offline": 20, "online": 60}[phase]


def interrupt(script, directory, phase, number):
    """Start a run, send it signal `number` once its checkpoint is within `phase`, return its exit status and output."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *SMALL, "--run-dir", str(directory)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None:
        time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)  # so that it does not go on while it is looked at
        if (directory / "checkpoint.pt").exists() and within(directory, phase):
            break
        process.send_signal(signal.SIGCONT)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


@pytest.mark.parametrize("phase", ["bc", "offline", "online"])
def test_killed_and_resumed_equals_uninterrupted(phase, finished, tmp_path):
    check_kill("parl_diffusion", phase, finished, tmp_path)


@pytest.mark.parametrize("other", [name for name in PARALLEL if name != "parl_diffusion"])
def test_killed_and_resumed_others(other, finished, tmp_path):
    check_kill(other, "offline", finished, tmp_path)


def check_kill(script, phase, finished, tmp_path):
    directory = tmp_path / "killed"
    code, _ = interrupt(script, directory, phase, signal.SIGKILL)
    assert code == -signal.SIGKILL and within(directory, phase)
    with open(directory / "metrics.csv", "a") as file:
        file.write("offline,9999,0,0\noff")  # rows past the checkpoint, the last one half-written
    run_here(script, "--resume", directory)
    assert metrics(directory) == metrics(finished(script))
    assert_same(load(directory), load(finished(script)))


def test_killed_before_anything_happened(finished, tmp_path):
    """The first checkpoint is written before the first update."""
    directory = tmp_path / "early"
    command = [sys.executable, str(ROOT / "parl_diffusion.py"), *SMALL, "--run-dir", str(directory)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        time.sleep(0.002)
        process.send_signal(signal.SIGSTOP)  # so that it does not go on while it is looked at
        if (directory / "checkpoint.pt").exists():
            break
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    assert load(directory)["counters"]["gradient_step"] == 0
    run_here("parl_diffusion", "--resume", directory)
    assert metrics(directory) == metrics(finished("parl_diffusion"))
    assert_same(load(directory), load(finished("parl_diffusion")))


PHASES_AND_SIGNALS = [("bc", signal.SIGTERM), ("offline", signal.SIGINT), ("online", signal.SIGTERM)]


@pytest.mark.parametrize("phase, number", PHASES_AND_SIGNALS)
def test_signals_save_and_exit_cleanly(phase, number, finished, tmp_path):
    directory = tmp_path / "stopped"
    code, output = interrupt("parl_diffusion", directory, phase, number)
    assert code == 128 + number and "Traceback" not in output
    assert "to go on: the same command, or --resume" in output
    run_here("parl_diffusion", "--resume", directory)
    assert metrics(directory) == metrics(finished("parl_diffusion"))
    assert_same(load(directory), load(finished("parl_diffusion")))


@pytest.mark.parametrize("other, number", [("parl_gaussian", signal.SIGTERM), ("parl_transformer", signal.SIGINT)])
def test_signals_save_and_exit_cleanly_others(other, number, finished, monkeypatch, tmp_path, capfd):
    """In this process, the signal in the middle of an update: offline for one, online for the other."""
    directory, module, updates = tmp_path / "stopped", importlib.import_module(other), []
    update_critic, last = module.update_critic, 7 if number == signal.SIGTERM else 25

    def interrupted(*arguments):
        updates.append(1)
        if len(updates) == last:
            os.kill(os.getpid(), number)
        return update_critic(*arguments)

    monkeypatch.setattr(module, "update_critic", interrupted)
    with pytest.raises(SystemExit) as stop:
        run_here(other, *SMALL, "--run-dir", directory)
    assert stop.value.code == 128 + number
    going_on = f"stopped by {number.name}; to go on: the same command, or --resume {directory}"
    assert going_on in capfd.readouterr().out
    if last == 7:
        assert steps_done(directory, "offline") == 7
    else:
        counters = load(directory)["counters"]
        assert (counters["episode"], counters["updated"]["critic"]) == (0, 5) and counters["collected"]
    monkeypatch.undo()
    run_here(other, "--resume", directory)
    assert metrics(directory) == metrics(finished(other))
    assert_same(load(directory), load(finished(other)))


def test_stopped_in_an_evaluation(finished, monkeypatch, tmp_path, capfd):
    """Of the optimised policy: no step follows. The run that goes on evaluates, and equals one that was not stopped."""
    module, acting = importlib.import_module("parl_gaussian"), []
    act = module.Agent.act

    def interrupted(*arguments):
        acting.append(1)
        if len(acting) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return act(*arguments)

    monkeypatch.setattr(module.Agent, "act", interrupted)
    with pytest.raises(SystemExit, match="143"):
        run_here("parl_gaussian", *SMALL, "--run-dir", tmp_path / "stopped")
    assert len(acting) == 3 and "; the episode in progress is dropped; to go on" in capfd.readouterr().out
    monkeypatch.undo()
    run_here("parl_gaussian", "--resume", tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == metrics(finished("parl_gaussian"))
    assert_same(load(tmp_path / "stopped"), load(finished("parl_gaussian")))


def test_stopped_between_two_evaluations_of_a_frozen_policy(monkeypatch, tmp_path):
    """Whose second one is not run, nor in the run that goes on: its episodes may draw from a global generator. With
    other flags it is."""
    module, flags, evaluated = importlib.import_module("parl_gaussian"), [*SMALL, "--online-steps", 0], []
    run_episodes = common.run_episodes

    def noted(envs, act, seeds, *how, **options):
        np.random.random()
        evaluated.append(act.__name__)
        return run_episodes(envs, act, seeds, *how, **options)

    monkeypatch.setattr(common, "run_episodes", noted)
    run_here("parl_gaussian", *flags, "--run-dir", tmp_path / "whole")
    whole, last = list(evaluated), 7
    update_critic, updates = module.update_critic, []

    def interrupted(*arguments):
        updates.append(1)
        if len(updates) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return update_critic(*arguments)

    monkeypatch.setattr(module, "update_critic", interrupted)
    evaluated.clear()
    with pytest.raises(SystemExit, match="143"):
        run_here("parl_gaussian", *flags, "--run-dir", tmp_path / "stopped")
    shutil.copytree(tmp_path / "stopped", tmp_path / "other")
    before = list(evaluated)
    run_here("parl_gaussian", "--resume", tmp_path / "stopped")
    assert evaluated == whole and "act" in evaluated[len(before) :] and "act_raw" not in evaluated[len(before) :]
    assert_same(load(tmp_path / "stopped"), load(tmp_path / "whole"))
    evaluated.clear()
    run_here("parl_gaussian", "--resume", tmp_path / "other", "--num-eval-episodes", 3)
    assert "act_raw" in evaluated


def test_stopped_in_the_distillation_after_offline_rl(monkeypatch, tmp_path):
    """Resumed there, its optimiser goes on where it was: it starts afresh at the phase's first step alone."""
    module, flags = importlib.import_module("parl_diffusion"), ["--offline-distill-steps", 10, "--online-steps", 0]
    run_here("parl_diffusion", *SMALL, *flags, "--run-dir", tmp_path / "whole")
    update_policy, updates = module.update_policy, []

    def interrupted(*arguments):
        updates.append(1)
        if len(updates) == 20 + 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update_policy(*arguments)

    monkeypatch.setattr(module, "update_policy", interrupted)
    with pytest.raises(SystemExit, match="143"):
        run_here("parl_diffusion", *SMALL, *flags, "--run-dir", tmp_path / "stopped")
    assert steps_done(tmp_path / "stopped", "distill") == 4
    monkeypatch.undo()
    run_here("parl_diffusion", "--resume", tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert_same(load(tmp_path / "stopped"), load(tmp_path / "whole"))


def test_stopped_while_the_cache_is_drawn(monkeypatch, tmp_path):
    """It may take long. The samples are left, and drawn anew by the run that goes on."""
    module, flags, calls = importlib.import_module("parl_diffusion"), [*SMALL, "--online-steps", 0], []
    flags += ["--batch-size", 600, "--num-eval-episodes", 0]  # which touches as many states as there are
    run_here("parl_diffusion", *flags, "--run-dir", tmp_path / "whole")
    sample = module.DiffusionPolicy.sample

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:  # once the policy was tried
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*arguments)

    monkeypatch.setattr(module.DiffusionPolicy, "sample", interrupted)
    with pytest.raises(SystemExit, match="143"):
        run_here("parl_diffusion", *flags, "--run-dir", tmp_path / "stopped")
    assert len(calls) == 2 and steps_done(tmp_path / "stopped", "offline") == 0
    monkeypatch.undo()
    run_here("parl_diffusion", "--resume", tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert_same(load(tmp_path / "stopped"), load(tmp_path / "whole"))


def test_a_second_signal_does_not_wait(monkeypatch, tmp_path):
    module = importlib.import_module("parl_gaussian")

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(module, "update_policy", interrupted)
    with pytest.raises(SystemExit) as stop:
        run_here("parl_gaussian", *SMALL, "--run-dir", tmp_path / "run")
    assert stop.value.code == 130 and steps_done(tmp_path / "run", "bc") == 0


def test_eval_only_repeats_the_last_evaluation_and_writes_nothing(script, finished, capsys):
    directory = finished(script)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    run_here(script, "--eval-only", "--resume", directory)
    stdout = capsys.readouterr().out
    row = json.loads(stdout[stdout.index("{") :])
    last = common.read_metrics(directory / "metrics.csv")[-1]
    assert row == pytest.approx({name: last[name] for name in row}, rel=1e-4)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_modes(script, finished, tmp_path):
    """Offline only, pure online from a checkpoint without data in the batches, a policy that learns at the end."""
    small = [*SMALL, "--eval-every", 1000]  # evaluated at the ends of phases alone
    run_here(script, *small, "--online-steps", 0, "--offline-distill-steps", 10, "--run-dir", tmp_path / "offline")
    rows = common.read_metrics(tmp_path / "offline" / "metrics.csv")
    assert [row["phase"] for row in rows][-1] == "distill" and rows[-1]["policy/distill_loss"] > 0
    start = finished(script) / "checkpoint.pt"
    flags = ["--policy-checkpoint", start, "--offline-steps", 0, "--offline-ratio", 0]
    run_here(script, *small, *flags, "--run-dir", tmp_path / "pure")
    rows = common.read_metrics(tmp_path / "pure" / "metrics.csv")
    assert [row["phase"] for row in rows[:2]] == ["bc", "online"] and {row["phase"] for row in rows[1:]} == {"online"}
    assert rows[0]["gradient_step"] == 0 and "eval/policy_success_rate" in rows[0]  # of the policy that it starts from
    flags = ["--offline-steps", 0, "--policy-utd", 2, "--critic-utd", 3, "--online-episodes", 1]
    run_here(script, *small, *flags, "--run-dir", tmp_path / "mixed")
    last = common.read_metrics(tmp_path / "mixed" / "metrics.csv")[-1]
    assert last["gradient_step"] == 20 + 3 * last["env_step"] and last["episode"] == 1
    flags = ["--bc-steps", 0, "--offline-ratio", 0, "--online-episodes", 2, "--online-steps", 1000, "--num-bins", 0]
    flags += ["--no-normalize-obs", "--distill-argmax", "--sample-cache-gb", 0]
    run_here(script, *small, *flags, "--run-dir", tmp_path / "nothing")
    rows = common.read_metrics(tmp_path / "nothing" / "metrics.csv")
    config = json.loads((tmp_path / "nothing" / "config.json").read_text())
    assert len(rows) == 1 + 2 and config["dataset_sha256"] is None


def test_the_transformers_other_head(tmp_path, capsys):
    run_here("parl_transformer", *SMALL, "--head", "continuous", "--run-dir", tmp_path / "run")
    rows = common.read_metrics(tmp_path / "run" / "metrics.csv")
    assert rows[-1]["phase"] == "online" and np.isfinite(rows[-1]["policy/distill_loss"])
    capsys.readouterr()
    run_here("parl_transformer", "--eval-only", "--resume", tmp_path / "run")
    stdout = capsys.readouterr().out
    assert json.loads(stdout[stdout.index("{") :])["eval/length"] == pytest.approx(rows[-1]["eval/length"])


def test_policy_checkpoint_is_the_policy_that_starts(script, finished, tmp_path):
    """Before any update of its own it is the one that it was taken from, with the observations' scales it learned."""
    start = finished(script)
    flags = ["--policy-checkpoint", start / "checkpoint.pt", "--offline-steps", 1, "--online-steps", 0]
    run_here(script, *SMALL, *flags, "--run-dir", tmp_path / "run")
    for name in ("policy", "policy_ema"):
        assert_same(load(tmp_path / "run")[name], load(start)["policy_ema"])
    assert_same(load(tmp_path / "run")["normalizer"], load(start)["normalizer"])
    flags = ["--policy-checkpoint", start / "checkpoint.pt", "--env-id", "pointmaze-medium-play", "--bc-steps", 0]
    with pytest.raises(SystemExit, match="env_id is pointmaze-umaze-play there; expected pointmaze-medium-play"):
        run_here(script, *flags, "--offline-ratio", 0, "--num-eval-episodes", 1, "--run-dir", tmp_path / "other")


def test_track_offline_and_a_failing_wandb(tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--track", "--offline-steps", 0, "--online-steps", 0, "--bc-steps", 5]
    result = run_script("parl_diffusion", *flags, "--run-dir", tmp_path / "on", env={"WANDB_MODE": "offline"})
    assert list((tmp_path / "on" / "wandb").glob("offline-run-*/*.wandb")), result.stderr

    class Broken:
        @staticmethod
        def init(**kwargs):
            raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", Broken)
    run_here("parl_diffusion", *flags, "--run-dir", tmp_path / "off")
    assert "wandb failed (no network)" in capsys.readouterr().err and (tmp_path / "off" / "curves.png").exists()


def test_capture_video(tmp_path):
    flags = ["--capture-video", "--offline-steps", 0, "--online-steps", 0, "--bc-steps", 5]
    run_here("parl_diffusion", *SMALL, *flags, "--run-dir", tmp_path / "run")
    videos = sorted((tmp_path / "run" / "videos" / "bc-5").iterdir())
    assert [video.name for video in videos] == [f"episode-100000{i}.mp4" for i in range(3)]
    assert all(video.stat().st_size > 1000 for video in videos)


def test_another_environment_and_dataset(script, tmp_path):
    """Any gymnasium id with a file: here Pendulum, whose bounds are +-2 and whose values come from the data."""
    env, rng, rows = gym.make("Pendulum-v1"), np.random.default_rng(0), []
    for episode in range(2):
        obs, _ = env.reset(seed=episode)
        for t in range(200):
            action = rng.uniform(-2, 2, 1).astype(np.float32)
            following, reward, terminated, _, _ = env.step(action)
            rows.append((obs, action, reward, terminated, t == 199, following))
            obs = following
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    np.savez(tmp_path / "data.npz", **{n: np.stack(v) for n, v in zip(names, zip(*rows, strict=True), strict=True)})
    flags = ["--env-id", "Pendulum-v1", "--dataset-path", tmp_path / "data.npz", "--num-threads", 1]
    run_here(script, *SMALL, *flags, "--online-steps", 0, "--run-dir", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["q_min"] < -500 and config["q_max"] == 0 and config["discount"] == 0.99


def test_one_file_copied_elsewhere_runs_with_common_and_envs(script, tmp_path):
    for name in (f"{script}.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "envs", tmp_path / "envs")
    run_script(script, *SMALL, "--bc-steps", 5, "--offline-steps", 5, "--online-steps", 0, cwd=tmp_path)
    (directory,) = (tmp_path / "runs").iterdir()
    assert directory.name.startswith(f"pointmaze-umaze-play__{script}__0__")


OWN_PROJECT = """
import gymnasium as gym
import numpy as np


class Line(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1), 0
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x, self.t = self.x + 0.3 * float(action[0]), self.t + 1
        success = bool(self.x > 1)
        return np.array([self.x], np.float32), float(success), success, self.t == 8, {"success": success}


def my_data(args):
    env, rng, buffer = Line(), np.random.default_rng(0), common.ReplayBuffer(1, 1)
    for seed in range(5):
        (episode,) = common.run_episodes([env], lambda obs, keys: rng.uniform(-1, 1, (len(obs), 1)), [seed])
        rewards = episode["rewards"] - 1
        returns = common.mc_returns(rewards, episode["masks"], args.discount, sparse=True)
        buffer.add_episode(episode["observations"], episode["actions"], rewards, episode["masks"], returns)
    return buffer

"""


def replaced(source, pattern, line):
    """`source` with the one line that matches `pattern` replaced by another, its indentation kept."""
    found = re.findall(rf"^( *){pattern}$", source, re.M)
    assert len(found) == 1, (pattern, found)
    return re.sub(rf"^( *){pattern}$", lambda match: match[1] + line, source, flags=re.M)


def test_one_file_copied_into_a_project_without_envs_runs_with_common_alone(script, tmp_path):
    """What needs envs/ beyond the three lines that a project of one's own replaces would fail here."""
    shutil.copy(ROOT / "common.py", tmp_path)
    source = (ROOT / f"{script}.py").read_text()
    source = replaced(source, r"import envs", "# no envs")
    source = replaced(source, r"eval_envs = \[envs\.make\(.*", "eval_envs = [Line()]")
    source = replaced(source, r"dataset = envs\.load_dataset\(.*", "dataset = my_data(args)")
    assert "envs." not in source.replace("eval_envs.", "")
    (tmp_path / f"{script}.py").write_text(source.replace("\n\n@dataclass\n", f"{OWN_PROJECT}\n@dataclass\n", 1))
    flags = ["--env-id", "Line", "--sparse-reward", "--reward-bias", -1, "--num-samples", 4, "--num-keep", 2]
    flags += ["--num-threads", 1, "--ensemble-size", 2, "--online-episodes", 3, "--offline-distill-steps", 5]
    run_script(script, *SMALL, *flags, "--run-dir", "run", cwd=tmp_path)
    rows = common.read_metrics(tmp_path / "run" / "metrics.csv")
    assert list(dict.fromkeys(row["phase"] for row in rows)) == ["bc", "offline", "distill", "online"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["obs_dim"], config["act_dim"], config["dataset_sha256"]) == (1, 1, None)
    assert rows[-1]["episode"] == 3 and "eval/success_rate" in rows[-1]


def test_a_renamed_script_goes_on_with_the_originals_checkpoints(finished, tmp_path):
    """They are its policy class's, not its file's: to resume, and to start from."""
    directory, whole = tmp_path / "run", finished("parl_gaussian")
    run_here("parl_gaussian", *SMALL, "--online-steps", 0, "--run-dir", directory)
    shutil.copy(ROOT / "parl_gaussian.py", tmp_path / "my_policy.py")
    shutil.copy(ROOT / "common.py", tmp_path)
    shutil.copytree(ROOT / "envs", tmp_path / "envs")
    run_script("my_policy", "--resume", directory, "--online-steps", 60, cwd=tmp_path)
    assert metrics(directory) == metrics(whole)
    assert_same(load(directory), load(whole))
    flags = [*SMALL, "--policy-checkpoint", directory / "checkpoint.pt", "--offline-steps", 1, "--online-steps", 0]
    run_script("my_policy", *flags, "--run-dir", tmp_path / "new", cwd=tmp_path)
    assert_same(load(tmp_path / "new")["policy"], load(whole)["policy_ema"])

    source = (tmp_path / "my_policy.py").read_text()  # another class, whose numbers may mean something else
    (tmp_path / "my_policy.py").write_text(source.replace("GaussianPolicy", "MyPolicy"))
    reason = f"{directory / 'checkpoint.pt'}: policy_class is GaussianPolicy there; expected MyPolicy"
    for given in (["--resume", directory], [*flags, "--run-dir", tmp_path / "newer"]):
        result = run_script("my_policy", *given, cwd=tmp_path, check=False)
        assert result.returncode == 1 and "Traceback" not in result.stderr and reason in result.stderr


def test_a_metric_of_ones_own(monkeypatch, tmp_path):
    """Logged from the middle of a run on: killed between two rows and resumed, it is the uninterrupted run's."""
    module, updates = importlib.import_module("parl_gaussian"), []
    update_critic = module.update_critic

    def with_metric(*arguments, kill_at=None):
        updates.append(1)
        if len(updates) == kill_at:
            os.kill(os.getpid(), signal.SIGTERM)
        info = update_critic(*arguments)
        return info | {"mine/x": info["critic/q_data"] * 2} if len(updates) > 5 else info

    monkeypatch.setattr(module, "update_critic", with_metric)
    run_here("parl_gaussian", *SMALL, "--run-dir", tmp_path / "whole")
    rows = common.read_metrics(tmp_path / "whole" / "metrics.csv")
    having = [row["gradient_step"] for row in rows if "mine/x" in row]
    assert having == [row["gradient_step"] for row in rows if row["gradient_step"] > 25]
    assert all(row["mine/x"] == pytest.approx(2 * row["critic/q_data"], rel=1e-3) for row in rows if "mine/x" in row)
    lines = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    assert lines[0].split(",") == [*common.COLUMNS, "mine/x"]
    assert {line.count(",") for line in lines} == {len(common.COLUMNS)}
    for kill_at in (4, 8, 13):  # before it is first logged, before it is first written, between two of its rows
        updates.clear()
        monkeypatch.setattr(module, "update_critic", lambda *all, last=kill_at: with_metric(*all, kill_at=last))
        directory = tmp_path / f"killed at {kill_at}"
        with pytest.raises(SystemExit, match="143"):
            run_here("parl_gaussian", *SMALL, "--run-dir", directory)
        assert steps_done(directory, "offline") == kill_at
        if kill_at == 13:  # as a SIGKILL after a row that no checkpoint knows
            with open(directory / "metrics.csv", "a") as file:
                file.write("offline,9999,0,0\noff")
        run_here("parl_gaussian", "--resume", directory)
        assert metrics(directory) == metrics(tmp_path / "whole")
        assert_same(load(directory), load(tmp_path / "whole"))


def test_snippet_of_the_docs_loads_and_acts(finished):
    code = snippet("from parl_diffusion import Args")
    assert "runs/X/checkpoint.pt" in code and len(code.strip().splitlines()) <= 12
    code = code.replace("runs/X/checkpoint.pt", str(finished("parl_diffusion") / "checkpoint.pt"))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.count("tensor([[") == 2


def test_robot_of_the_docs_is_an_environment(monkeypatch):
    code = snippet("class Reach")
    assert len([line for line in code.splitlines() if line.strip()]) <= 24
    monkeypatch.delitem(gym.registry, "Reach-v0", raising=False)
    exec(compile(code, "my_robot.py", "exec"), {"__name__": "my_robot"})
    env = envs.make("Reach-v0", sparse=True)
    obs, _ = env.reset(seed=0)
    for _ in range(20):  # straight to the target, in units of the largest motion
        obs, reward, terminated, _, info = env.step(np.clip((obs[3:] - obs[:3]) / 0.05, -1, 1))
        if terminated:
            break
    assert terminated and reward == 1 and info["success"]


def test_a_checkpoint_comes_with_every_row(monkeypatch, tmp_path):
    """Not with evaluations alone, which may be far apart."""
    saved = []
    monkeypatch.setattr(common.Checkpoint, "save", lambda kept: saved.append(kept.kept["counters"].done["bc"]))
    flags = ["--bc-steps", 7, "--log-every", 3, "--eval-every", 100, "--offline-steps", 0, "--online-steps", 0]
    run_here("parl_diffusion", *SMALL, *flags, "--run-dir", tmp_path / "run")
    assert saved == [0, 3, 6, 7, 7]  # begin, two rows, the end of the phase before and after its evaluation


def test_a_loss_that_explodes_stops_the_run_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match="is not finite"):
        run_here("parl_diffusion", *SMALL, "--critic-lr", "1e30", "--run-dir", tmp_path / "run")
    assert steps_done(tmp_path / "run", "bc") == 20
    assert all(torch.isfinite(value).all() for value in load(tmp_path / "run")["critic"].values())


def test_help_shows_what_will_run(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        run_here(script, "--help")
    text = capsys.readouterr().out
    assert "pointmaze-umaze-play" in text and "--num-gradient-steps" in text and "(default: 3)" in text
    with pytest.raises(SystemExit, match="0"):
        run_here(script, "--env-id", "Pendulum-v1", "--help")
    assert "(default: 3000000)" in capsys.readouterr().out


def test_compile_says_which_torch_it_needs(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "config", object())
    with pytest.raises(common.InputError, match=r"^--compile: torch .*; expected 2\.13 or later"):
        common.compiled(print)


def test_traced_updates_agree_with_eager():
    """What --compile traces, without the code generation, which on a CPU needs a C++ compiler and a minute."""
    import parl_diffusion as parl

    torch.manual_seed(0)
    args = parl.Args(hidden_dims=(16,), ensemble_size=2, num_bins=11, q_min=-10.0, q_max=0.0, num_samples=4, num_keep=2)
    args.num_gradient_steps, args.width, args.dropout = 2, 16, 0.0
    batch = {name: torch.randn(8, 3) for name in ("obs", "next_obs")} | {"actions": torch.rand(8, 2) * 2 - 1}
    batch |= {"rewards": -torch.ones(8), "masks": torch.ones(8), "mc_returns": -torch.ones(8)}
    samples = torch.rand(16, 4, 2) * 2 - 1
    critic, policy = parl.Critic(3, 2, args), parl.DiffusionPolicy(3, 2, args)

    def losses(update_critic, update_policy):
        networks = copy.deepcopy((critic, critic, policy, policy))
        adams = [torch.optim.Adam(networks[i].parameters(), lr=1e-3, fused=True) for i in (0, 2)]
        torch.manual_seed(1)
        for lr in (1e-3, 2e-3):
            info = update_critic(*networks[:2], adams[0], batch, samples, args)
            loss = update_policy(*networks[2:], adams[1], batch["obs"], batch["actions"], lr, args)
        return info["critic/loss"], loss

    traced = [common.compiled(f, backend="aot_eager") for f in (parl.update_critic, parl.update_policy)]
    for first, second in zip(losses(parl.update_critic, parl.update_policy), losses(*traced), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    explained = torch._dynamo.explain(parl.update_critic)(
        critic, copy.deepcopy(critic), torch.optim.Adam(critic.parameters(), fused=True), batch, samples, args
    )
    assert explained.graph_count == 2  # all up to the gradients; Adam and the target's average


@pytest.mark.parametrize("name", ["gaussian", "transformer"])
def test_traced_policy_updates_agree_with_eager(name):
    """As above, the update of the other policies."""
    parl = importlib.import_module(f"parl_{name}")
    torch.manual_seed(0)
    args = parl.Args(width=16, num_layers=1, **({} if name == "gaussian" else {"dropout": 0.0}))
    policy = getattr(parl, f"{name.title()}Policy")(3, 2, args)
    obs, actions = torch.randn(8, 3), torch.rand(8, 2) * 2 - 1

    def losses(update_policy):
        trained, average = copy.deepcopy(policy), copy.deepcopy(policy)
        adam = torch.optim.Adam(trained.parameters())
        return [update_policy(trained, average, adam, obs, actions, lr, args) for lr in (1e-3, 2e-3)]

    traced = common.compiled(parl.update_policy, backend="aot_eager")
    torch.testing.assert_close(losses(traced), losses(parl.update_policy), rtol=1e-4, atol=1e-5)


def test_the_value_of_the_starts_is_noted(tmp_path):
    """benchmark/start_value.py takes the places of act() and run_episodes(), with arguments that may change."""
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    shutil.copy(ROOT / "benchmark" / "start_value.py", tmp_path / "benchmark")
    for name in ("common.py", "parl_diffusion.py", "envs"):
        (tmp_path / name).symlink_to(ROOT / name)
    flags = [*SMALL, "--eval-every", 1000, "--online-steps", 0, "--run-dir", tmp_path / "run"]
    run_script("benchmark/start_value", *flags, cwd=tmp_path)
    header, *rows = (tmp_path / "benchmark" / "results" / "start_value" / "run.csv").read_text().splitlines()
    assert header == "evaluation,episode,value,discounted_return" and len(rows) == 2
    assert all(-100 <= float(number) <= 0 for row in rows for number in row.split(",")[2:])
