"""Every environment family through a whole run, from cloning to an online episode, on a small file of its layout."""

import csv
import ctypes.util
import itertools
import json
import os
import subprocess
import sys

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import ROOT, run_here

import envs

TINY = [
    *("--bc-steps", 10, "--offline-steps", 10, "--online-episodes", 1, "--batch-size", 8, "--num-eval-episodes", 1),
    *("--hidden-dims", 16, "--ensemble-size", 2, "--num-bins", 16, "--width", 16, "--num-samples", 2, "--num-keep", 1),
    *("--num-gradient-steps", 1, "--eval-every", 100, "--log-every", 5, "--num-threads", 1, "--policy-utd", 0),
    *("--critic-utd", 1),
]


def d4rl_file(path, obs_dim, act_dim, rewards):
    """60 rows in D4RL's layout, an episode each 20, at the rewards given for its end."""
    rng, last = np.random.default_rng(0), np.arange(60) % 20 == 19
    with h5py.File(path, "w") as file:
        file["observations"] = rng.standard_normal((60, obs_dim)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (60, act_dim)).astype(np.float32)
        file["rewards"] = np.where(last, rewards, 0).astype(np.float32)
        file["terminals"], file["timeouts"] = last & (rewards > 1), last & (rewards <= 1)
    return path


def antmaze(folder):
    return ["--dataset-path", d4rl_file(folder / "antmaze.hdf5", 29, 8, 1)]


def kitchen(folder):
    return ["--dataset-path", d4rl_file(folder / "kitchen.hdf5", 60, 9, 4)]


def metaworld(folder):
    family = envs.family_module("metaworld-door-open")
    episodes = list(itertools.islice(family.demonstrations("metaworld-door-open"), 3))
    ends = np.concatenate([np.arange(len(e["actions"])) == len(e["actions"]) - 1 for e in episodes])
    columns = {name: np.concatenate([e[name] for e in episodes]) for name in ("actions", "rewards", "masks")}
    columns["observations"] = np.concatenate([e["observations"][:-1] for e in episodes])
    columns["terminals"] = columns.pop("masks") == 0
    np.savez(folder / "door.npz", **columns, timeouts=ends & ~columns["terminals"])
    return ["--dataset-path", folder / "door.npz"]


def ogbench(folder):
    family = envs.family_module("cube-single-noisy-singletask-task1-v0")
    np.savez(folder / "cube.npz", **family.make_dataset("cube-single-noisy-singletask-task1-v0", 2, 40))
    return ["--dataset-path", folder / "cube.npz"]


def minari(folder):
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    package = pytest.importorskip("minari")
    env, buffers = gym.make("Pendulum-v1", max_episode_steps=20), []
    for seed in range(3):
        columns, observations, steps = ("rewards", "terminations", "truncations"), [env.reset(seed=seed)[0]], []
        actions = np.random.default_rng(seed).uniform(-2, 2, (20, 1)).astype(np.float32)
        for action in actions:
            obs, *step, _ = env.step(action)
            observations.append(obs)
            steps.append(step)
        rest = dict(zip(columns, map(list, zip(*steps, strict=True)), strict=True))
        buffers.append(
            package.data_collector.EpisodeBuffer(seed, observations=observations, actions=list(actions), **rest)
        )
    package.create_dataset_from_buffers("test/pendulum-v0", buffers, env=env, jpeg_encoding=False)
    return []


@pytest.mark.parametrize(
    ("script", "env_id", "make_flags", "value_range"),
    [
        ("parl_gaussian", "antmaze-umaze-v2", antmaze, (-500, 0)),
        ("parl_transformer", "kitchen-mixed-v0", kitchen, (-400, 0)),
        ("parl_diffusion", "metaworld-door-open", metaworld, (-100, 0)),
        ("parl_gaussian", "cube-single-noisy-singletask-task1-v0", ogbench, (-100, 0)),
        ("parl_diffusion", "minari:test/pendulum-v0", minari, None),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is set to None")
def test_a_family_from_cloning_to_online(script, env_id, make_flags, value_range, tmp_path, monkeypatch):
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)  # put back afterwards
    flags = [*make_flags(tmp_path), "--env-id", env_id, "--run-dir", tmp_path / "run"]
    run_here(script, *TINY, *flags)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert value_range is None or (config["q_min"], config["q_max"]) == pytest.approx(value_range)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    last = {row["phase"]: row for row in rows if row["eval/policy_success_rate"]}
    assert list(last) == ["bc", "offline", "online"]
    for row in (last["offline"], last["online"]):
        assert row["eval/success_rate"] and float(row["critic/loss"]) > 0
        assert bool(row["eval/normalized_score"]) == env_id.startswith(("antmaze", "kitchen"))
    assert last["online"]["train/length"] and int(last["online"]["env_step"]) == float(last["online"]["train/length"])


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="needs libegl1")
def test_video_without_a_display(tmp_path):
    """MuJoCo has to be told before it is imported; nobody has to set MUJOCO_GL."""
    flags = ["--env-id", "InvertedPendulum-v5", "--q-min", 0, "--q-max", 100, "--bc-steps", 0, "--offline-ratio", 0]
    flags += ["--capture-video", "--run-dir", tmp_path / "run"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    command = [sys.executable, ROOT / "parl_gaussian.py", *map(str, [*TINY, *flags])]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "Exception" not in result.stderr, result.stderr
    folders = list((tmp_path / "run" / "videos").iterdir())
    assert folders and all(len(list(folder.iterdir())) == 3 for folder in folders)
