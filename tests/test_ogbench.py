"""OGBench: its environments as they are asked for here, its datasets as OGBench relabels them, and data made here."""

import ctypes.util
import importlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run_here

import envs
from common import InputError
from envs import files

ogbench = pytest.importorskip("ogbench")
family = envs.family_module("cube-single-play-singletask-task1-v0")

CUBE, SINGLE = "cube-double-play-singletask-task2-v0", "cube-single-noisy-singletask-task1-v0"
MAZE, ANT = "pointmaze-medium-navigate-singletask-task1-v0", "antmaze-large-stitch-singletask-task2-v0"
sys.path.append(str(ROOT / "benchmark"))
report = importlib.import_module("report")


@pytest.fixture(autouse=True)
def no_files(monkeypatch, tmp_path):
    """Neither on the disk nor to download."""
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(family, "DATASET_URL", "http://127.0.0.1:9/ogbench")


@pytest.fixture(scope="module")
def cubes():
    return envs.make(CUBE, sparse=True)


def test_ids():
    for env_id in (CUBE, MAZE, "antmaze-large-explore-singletask-v0", "puzzle-4x4-noisy-singletask-task5-v0"):
        assert env_id in family.IDS
    assert not any("visual" in env_id for env_id in family.IDS)
    assert all(envs.family_module(env_id) is family for env_id in family.IDS)
    with pytest.raises(InputError, match=r"did you mean cube-single-play-singletask-task\d-v0"):
        envs.make("cube-single-play-singletask-task9-v0")


@pytest.mark.parametrize("env_id", [SINGLE, MAZE, "pointmaze-teleport-navigate-singletask-task1-v0"])
def test_seeded_reset(env_id):
    """Catches draws from numpy's global generator, or from an unseeded action space, that a seed does not reach."""
    env = envs.make(env_id)
    limits = {"cube": 200, "poin": 1000}
    assert env.get_wrapper_attr("_max_episode_steps") == limits[env_id[:4]]

    def episode(seed):
        obs = [env.reset(seed=seed)[0]]
        return np.array(obs + [env.step(np.full(env.action_space.shape, 0.5))[0] for _ in range(8)])

    first, other = episode(1), episode(2)
    np.random.seed(0)
    expected = np.random.RandomState(0).uniform(size=3)
    np.testing.assert_array_equal(episode(1), first)
    np.testing.assert_array_equal(np.random.uniform(size=3), expected)
    assert np.abs(first[0] - other[0]).max() > 0.01


def place(env, *xyzs):
    """Put the cubes at these positions, at rest."""
    inner = env.unwrapped
    for i, xyz in enumerate(xyzs):
        inner._data.joint(f"object_joint_{i}").qpos[:3] = xyz
        inner._data.joint(f"object_joint_{i}").qvel[:] = 0
    inner.post_step()


def test_cubes_pay_for_each_unsolved(cubes):
    """Task 2: (0.35, -0.1) to (0.35, 0.1) and (0.5, -0.1) to (0.5, 0.1). Catches swapped cubes and -1 / 0 rewards."""
    goals, action = [(0.35, 0.1, 0.02), (0.5, 0.1, 0.02)], np.zeros(5)
    cubes.reset(seed=0)
    _, reward, terminated, _, info = cubes.step(action)
    assert (reward, terminated, info["success"]) == (-2, False, False)
    place(cubes, goals[0])
    assert cubes.step(action)[1:3] == (-1, False)
    place(cubes, goals[1], goals[0])
    assert cubes.step(action)[1:3] == (-2, False)
    place(cubes, *goals)
    _, reward, terminated, truncated, info = cubes.step(action)
    assert (reward, terminated, truncated, info["success"]) == (0, True, False, True)


def test_maze_pays_per_step():
    """The reward is that of the state acted in: the step into the goal (20, 20) still costs, the next one ends."""
    env = envs.make(MAZE, sparse=True)
    env.reset(seed=0)
    env.unwrapped.set_xy(np.array([18.9, 20.0]))  # 1.1 m from the goal, whose radius is 1
    _, reward, terminated, _, info = env.step(np.array([1.0, 0.0]))  # by 0.2 m
    assert (reward, terminated, info["success"]) == (-1, False, False)
    _, reward, terminated, _, info = env.step(np.array([1.0, 0.0]))
    assert (reward, terminated, info["success"]) == (0, True, True) and info["success"] is True


@pytest.fixture
def cube_file(tmp_path):
    """Two episodes of 5 transitions in OGBench's layout. The cubes are at their goals in rows 2 and 3 of the first, one
    of them in row 1; and in no row of the second but its last, which has no action. Returns the file's path."""
    rng = np.random.default_rng(0)
    qpos = np.zeros((12, 14 + 2 * 7))
    qpos[[1, 2, 3, 11], 14:17] = (0.35, 0.1, 0.02)
    qpos[[2, 3, 11], 21:24] = (0.5, 0.1 + 0.039, 0.02)  # within 4 cm
    qpos[4, 14:17], qpos[4, 21:24] = (0.35, 0.1 + 0.041, 0.02), (0.5, 0.1, 0.02)
    terminals = np.zeros(12)
    terminals[[5, 11]] = 1
    arrays = dict(observations=rng.standard_normal((12, 37)), actions=rng.uniform(-1, 1, (12, 5)))
    arrays |= dict(terminals=terminals, qpos=qpos, qvel=np.zeros_like(qpos))
    for name in ("cube-double-play-v0.npz", "cube-double-play-v0-val.npz"):
        np.savez(tmp_path / name, **arrays)
    return tmp_path / "cube-double-play-v0.npz"


def test_relabelled_as_ogbench_does(cube_file):
    """The same rows as ogbench.make_env_and_datasets; and by hand, what they should be."""
    assert envs.dataset_file(CUBE) == cube_file
    data = family.read_dataset(CUBE, cube_file)
    _, theirs, _ = ogbench.make_env_and_datasets(CUBE, dataset_path=str(cube_file))
    for key in ("observations", "actions", "rewards", "next_observations"):
        np.testing.assert_array_equal(data[key], theirs[key])
    np.testing.assert_array_equal(1 - data["terminals"], theirs["masks"])
    ends = (theirs["masks"] == 0) | (theirs["terminals"] > 0)
    np.testing.assert_array_equal(data["terminals"] | data["timeouts"], ends)
    assert data["rewards"].tolist() == [-2, -1, 0, 0, -1, -2, -2, -2, -2, -2]
    assert np.flatnonzero(data["terminals"]).tolist() == [2, 3]
    assert np.flatnonzero(data["timeouts"]).tolist() == [4, 9]


def test_episodes_end_at_success(cube_file):
    """Cut by the masks: episodes of 3, 1, 1 and 5 transitions, the last of each trajectory kept; returns by hand."""
    buffer = envs.load_dataset(CUBE, discount=0.5, sparse=True)
    assert len(buffer) == 10 and buffer.num_states == 14
    assert buffer.masks[:10].tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    assert buffer.mc_returns[:10].tolist() == [-2.5, -1, 0, 0, -2, -4, -4, -4, -4, -4]
    file = np.load(cube_file)["observations"].astype(np.float32)
    np.testing.assert_array_equal(buffer.states[-1 + 14], file[11])
    np.testing.assert_array_equal(buffer.states[[3, 5, 7]], file[[3, 4, 5]])  # the next states at the cuts


def test_maze_relabelled(tmp_path):
    """Catches x and y swapped: the goal of task 2 is row 1, column 6 of the maze, (20, 0) in metres."""
    qpos = np.array([[20.0, 0.9], [0.0, 20.0], [18.9, 0.0], [20.0, 0.0]])
    terminals = np.array([0, 0, 0, 1])
    np.savez(tmp_path / "m.npz", observations=qpos, actions=np.zeros((4, 2)), terminals=terminals, qpos=qpos)
    data = family.read_dataset("pointmaze-medium-navigate-singletask-task2-v0", tmp_path / "m.npz")
    assert data["rewards"].tolist() == [0, -1, -1] and data["terminals"].tolist() == [True, False, False]
    assert data["timeouts"].tolist() == [False, False, True]


@pytest.mark.parametrize("damage", ["missing", "folder", "not npz", "truncated", "no qpos", "another scene"])
def test_bad_file(damage, cube_file, tmp_path):
    path, arrays = tmp_path / "bad.npz", dict(np.load(cube_file))
    if damage == "folder":
        path.mkdir()
    elif damage == "not npz":
        path.write_text("observations")
    elif damage == "truncated":
        path.write_bytes(cube_file.read_bytes()[:2000])
    elif damage != "missing":
        arrays = {
            "no qpos": {key: value for key, value in arrays.items() if key != "qpos"},
            "another scene": arrays | {"qpos": arrays["qpos"][:, :21]},
        }[damage]
        np.savez(path, **arrays)
    with pytest.raises(InputError, match=r"dataset .*bad\.npz: cannot be read as OGBench's.*expected"):
        family.read_dataset(CUBE, path)


@pytest.mark.parametrize(
    ("key", "index", "value", "message"),
    [
        ("observations", (8, 3), np.nan, r"observations\[8, 3\] = nan"),  # the row in the file
        ("actions", (9, 1), 1.5, r"actions\[9, 1\] = 1.5; expected within \[-1, 1\]"),
        ("qpos", (10, 0), np.inf, r"qpos\[10, 0\] = inf"),
        ("terminals", slice(None), 0, "terminals does not end with a 1"),
        ("terminals", 2, np.nan, r"terminals\[2\] = nan"),
    ],
)
def test_bad_rows(key, index, value, message, cube_file):
    arrays = dict(np.load(cube_file))
    arrays[key] = arrays[key].astype(np.float32)
    arrays[key][index] = value
    np.savez(cube_file, **arrays)
    with pytest.raises(InputError, match=rf"^dataset .*: {message}"):
        family.read_dataset(CUBE, cube_file)


def test_where_a_bad_file_can_be_had(cube_file, monkeypatch):
    """OGBench's own is downloaded again; what was made here is made again; somebody's own is neither."""
    arrays = dict(np.load(cube_file))
    arrays["actions"][9, 1] = 1.5
    np.savez(cube_file, **arrays)
    with pytest.raises(InputError, match=r"actions\[9, 1\] = 1.5.*; delete it, and it is downloaded again$"):
        envs.load_dataset(CUBE)
    with pytest.raises(InputError, match=r"actions\[9, 1\] = 1.5; expected within \[-1, 1\]$"):  # somebody's own
        envs.load_dataset(CUBE, cube_file)
    made = files.cached_file(f"{CUBE}-made-200-v1.npz", lambda: arrays)
    cube_file.unlink()
    with pytest.raises(InputError, match=rf"^dataset {made}: actions\[9, 1\] .*; delete it, and it is made again$"):
        envs.load_dataset(CUBE, "made")
    made.unlink()


def test_unequal_lengths(cube_file):
    arrays = dict(np.load(cube_file))
    np.savez(cube_file, **arrays | {"actions": arrays["actions"][:7]})
    with pytest.raises(InputError, match=r"actions has shape \(7, 5\); expected a row for each of observations"):
        family.read_dataset(CUBE, cube_file)


@pytest.mark.skipif(not ctypes.util.find_library("EGL"), reason="needs libegl1")
@pytest.mark.parametrize("env_id", [SINGLE, MAZE])
def test_render(env_id):
    """In a process of its own, where nobody sets MUJOCO_GL, and which ends without a word about OpenGL."""
    code = f"import envs; env = envs.make('{env_id}', render=True); env.reset(seed=0); image = env.render()"
    code += "; assert image.shape == (224, 224, 3) and image.dtype == 'uint8' and image.std() > 20"
    environment = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "Exception" not in result.stderr, result.stderr


def downloads(monkeypatch, body):
    """What urlopen would fetch is `body`, whatever the address. Returns the list of addresses that were asked for."""
    asked = []

    class Response(io.BytesIO):
        length = len(body)

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: asked.append(url) or Response(body))
    return asked


def test_a_missing_file_is_downloaded_once(cube_file, tmp_path, monkeypatch):
    body = cube_file.read_bytes()
    cube_file.unlink()
    asked = downloads(monkeypatch, body)
    for _ in range(2):  # the second time from the disk
        assert envs.dataset_file(CUBE) == cube_file and cube_file.read_bytes() == body
    assert asked == ["http://127.0.0.1:9/ogbench/cube-double-play-v0.npz"]
    buffer = envs.load_dataset(CUBE, sparse=True)
    assert len(buffer) == 10 and buffer.note == ""
    cube_file.unlink()
    downloads(monkeypatch, b"<html>log in</html>")
    with pytest.raises(InputError, match="what is there is not npz"):
        envs.dataset_file(CUBE)
    assert not list(tmp_path.glob("*cube-double-play-v0.npz"))


@pytest.mark.parametrize(("env_id", "can_be_made"), [(CUBE, True), (MAZE, True), (ANT, False)])
def test_a_failing_download_says_what_to_put_where(env_id, can_be_made, tmp_path):
    """And never are other data made in its place; that there are some is said where there are."""
    file = env_id.partition("-singletask")[0] + "-v0.npz"
    message = (
        rf"^--env-id {env_id}: http://\S+/{file} cannot be downloaded \(.*\); expected that file at {tmp_path}/{file}"
    )
    with pytest.raises(InputError, match=message) as error:
        envs.load_dataset(env_id)
    assert ("--dataset-path made" in str(error.value)) == can_be_made and "\n" not in str(error.value)


@pytest.mark.parametrize("env_id", [ANT, "pointmaze-umaze-play"])
def test_data_that_cannot_be_made_in_place_of_others(env_id):
    with pytest.raises(InputError, match=rf"^--dataset-path made: no data .* {env_id}; expected"):
        envs.dataset_file(env_id, "made")


def test_made_data_are_said_to_be_no_ogbenchs(tmp_path, monkeypatch, capsys):
    """Where they are loaded, above the last table, in config.json and in a report; nothing of it with a file."""
    monkeypatch.setattr(family, "EPISODE_STEPS", 40)
    monkeypatch.setattr(family, "MADE_EPISODES", {"cube-single.*": 2})
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    note = family.NOTE_ON_MADE
    flags = ["--env-id", SINGLE, "--bc-steps", 3, "--offline-steps", 3, "--online-steps", 0, "--num-eval-episodes", 1]
    flags += ["--batch-size", 4, "--hidden-dims", 8, "--num-bins", 8, "--width", 8]
    run_here("parl_gaussian", *flags, "--dataset-path", "made", "--run-dir", tmp_path / "run")
    output = capsys.readouterr()
    table = output.out.index("phase     policy")
    assert output.out[:table].endswith(f"{note}\n") and f"note: {note}" in output.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["dataset_note"] == note and config["dataset_path"] == "made"
    run_here("parl_gaussian", "--resume", tmp_path / "run", "--eval-only")
    assert f"note: {note}" in capsys.readouterr().err
    groups = report.group_runs([tmp_path / "run"])
    assert f"Note: {note}." in report.document(groups, report.summarise(groups))
    (made,) = tmp_path.glob("*-made-*.npz")
    capsys.readouterr()
    run_here(
        "parl_gaussian",
        *flags,
        "--dataset-path",
        made.rename(tmp_path / "run" / "mine.npz"),
        "--run-dir",
        tmp_path / "2",
    )
    assert "OGBench's" not in "".join(capsys.readouterr())
    assert "dataset_note" not in json.loads((tmp_path / "2" / "config.json").read_text())


@pytest.mark.parametrize("env_id", [SINGLE, MAZE])
def test_made_data_is_the_same_for_the_same_seed(env_id):
    np.random.seed(0)
    expected = np.random.RandomState(0).uniform(size=3)
    first, again, other = (family.make_dataset(env_id, 1, 25, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(np.random.uniform(size=3), expected)
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    assert not np.array_equal(first["actions"], other["actions"])
    assert first["terminals"].tolist() == [0] * 25 + [1] and np.abs(first["actions"]).max() <= 1
    for key in ("observations", "actions", "qpos"):  # each row is its own, not one array that OGBench writes to
        assert len(np.unique(first[key], axis=0)) == 26


def test_made_data_solves_tasks(monkeypatch):
    """The oracles do what they are for: the cube comes to the task's goal, a maze's goal is reached."""
    monkeypatch.setattr(family, "TASK_SHARE", 1.0)
    monkeypatch.setattr(family, "EPISODE_STEPS", 120)
    monkeypatch.setattr(family, "MADE_EPISODES", {"cube.*": 3, "pointmaze.*": 12})
    for env_id in ("cube-single-play-singletask-task1-v0", MAZE):
        path = envs.dataset_file(env_id, "made")
        assert str(path).startswith(os.environ["PARL_CACHE"]) and "-made-" in path.name
        data = family.read_dataset(env_id, path)
        assert data["terminals"].any() and (data["rewards"] == -1).any()
