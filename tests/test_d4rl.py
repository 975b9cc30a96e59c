"""D4RL's environments behind our interface: the facts of its tasks, its files, and what is done with them."""

import contextlib
import http.server
import os
import subprocess
import sys
import threading

import h5py
import matplotlib
import numpy as np
import pytest
from conftest import ROOT

import common
import envs
import parl_diffusion as parl
from common import InputError
from envs import d4rl, files

GOALS = {"umaze": (0, 8), "medium": (20, 20), "large": (32, 24)}
KITCHEN_GOALS = {  # task: (rows of qpos, their values when it is done)
    "microwave": ([22], [-0.75]),
    "kettle": (range(23, 30), [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
    "light switch": ([17, 18], [-0.69, -0.05]),
    "slide cabinet": ([19], [0.37]),
    "bottom burner": ([11, 12], [-0.88, -0.01]),
}


@pytest.fixture(scope="module")
def umaze():
    return envs.make("antmaze-umaze-v2", sparse=True)


@pytest.fixture(scope="module")
def kitchen():
    return envs.make("kitchen-complete-v0")


def put(env, position, velocity=(0.0, 0.0)):
    """The ant, upright and else at rest, at `position` with `velocity`, in m and m/s."""
    env.reset(seed=0)
    inner = env.unwrapped.inner
    inner.set_state(np.r_[position, inner.init_qpos[2:]], np.r_[velocity, np.zeros(12)])
    return inner


# ---------------------------------------------------------------- antmaze


def test_ids_and_horizons():
    mazes = [f"antmaze-{maze}-v2" for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse")]
    mazes += ["antmaze-large-play-v2", "antmaze-large-diverse-v2"]
    assert sorted(d4rl.IDS) == sorted([*mazes, *(f"kitchen-{kind}-v0" for kind in ("complete", "partial", "mixed"))])
    for env_id in d4rl.IDS:
        horizon = 280 if "kitchen" in env_id else 700 if "umaze" in env_id else 1000
        assert d4rl.make(env_id).get_wrapper_attr("_max_episode_steps") == horizon, env_id
        assert envs.family_module(env_id) is d4rl and common.family(env_id) == env_id.split("-")[0]


@pytest.mark.parametrize("env_id", ["antmaze-hugo-play-v2", "kitchen-compleat-v0"])
def test_an_unknown_id_is_refused_with_near_misses(env_id):
    near = {"a": "antmaze-large-play-v2", "k": "kitchen-complete-v0"}[env_id[0]]
    for call in (envs.make, envs.dataset_file):
        with pytest.raises(InputError, match=f"--env-id {env_id}: .*{near}"):
            call(env_id)


def test_antmaze_spaces_and_observation(umaze):
    obs, info = umaze.reset(seed=0)
    inner = umaze.unwrapped.inner
    assert inner.dt == pytest.approx(0.1) and info == {"success": False}
    assert umaze.action_space.shape == (8,) and (umaze.action_space.low == -1).all() and umaze.action_space.high[0] == 1
    for _ in range(5):
        np.testing.assert_array_equal(obs, np.r_[inner.data.qpos[:15], inner.data.qvel[:14]].astype(np.float32))
        assert obs.dtype == np.float32 and obs.shape == umaze.observation_space.shape == (29,)
        obs, reward, terminated, truncated, info = umaze.step(np.ones(8, np.float32))
        assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
    assert set(inner.data.ctrl) == {30.0}  # [-1, 1] spans the motors' range


@pytest.mark.parametrize("maze", GOALS)
def test_antmaze_spawn_and_goals(maze):
    """Spawn (0, 0) +- 0.1; the goal cell's centre plus U(0, 1) + U(0, 0.5) per axis, anew at each reset."""
    env = envs.make(f"antmaze-{maze}-diverse-v2" if maze != "umaze" else "antmaze-umaze-diverse-v2")
    starts, goals = [], []
    for seed in range(400):
        starts.append(env.reset(seed=seed)[0][:2])
        goals.append(env.unwrapped.inner.target_goal)
    assert np.abs(starts).max() <= 0.1 and (np.ptp(starts, axis=0) > 0.19).all()
    noise = np.array(goals) - GOALS[maze]
    assert (noise >= 0).all() and (noise < 1.5).all()
    assert (noise.min(0) < 0.15).all() and (noise.max(0) > 1.35).all()
    assert np.abs(noise.mean(0) - 0.75).max() < 0.07 and abs(np.corrcoef(noise.T)[0, 1]) < 0.2


def test_antmaze_ends_with_reward_1_within_half_a_metre(umaze):
    outcomes = set()
    for angle in np.linspace(0, 2 * np.pi, 8):
        for distance in (0.3, 0.44, 0.49, 0.51, 0.56, 0.7):
            goal = put(umaze, (0, 0)).target_goal
            inner = put(umaze, goal + distance * np.array([np.cos(angle), np.sin(angle)]))
            np.testing.assert_array_equal(inner.target_goal, goal)
            obs, reward, terminated, truncated, info = umaze.step(np.zeros(8))
            near = np.linalg.norm(obs[:2] - goal) <= 0.5
            assert (reward, terminated, truncated, info["success"]) == (float(near), near, False, near)
            outcomes.add((distance, near))
    assert {(0.3, True), (0.44, True), (0.56, False), (0.7, False)} <= outcomes
    assert all(near == (distance < 0.5) for distance, near in outcomes if distance not in (0.49, 0.51))


def test_antmaze_is_truncated_at_its_horizon(umaze):
    umaze.reset(seed=0)
    ends = [umaze.step(np.zeros(8))[2:4] for _ in range(700)]
    assert ends[:-1] == [(False, False)] * 699 and ends[-1] == (False, True)


@pytest.mark.parametrize("direction", [(-1, 0), (0, -1), (0, 1), (1, 0)])
def test_walls_stop_the_ant(umaze, direction):
    """From the spawn cell of the u-maze, 4 m wide, there is a way out to +x alone."""
    put(umaze, (0, 0), 8 * np.array(direction))
    travelled = max(float(umaze.step(np.zeros(8))[0][:2] @ direction) for _ in range(15))
    assert travelled > 3 if direction == (1, 0) else 0.5 < travelled < 2


# ---------------------------------------------------------------- kitchen


def test_kitchen_spaces(kitchen):
    obs, _ = kitchen.reset(seed=0)
    inner = kitchen.unwrapped.inner
    assert inner.dt == pytest.approx(0.08) and kitchen.observation_space.shape == obs.shape == (60,)
    assert kitchen.action_space.shape == (9,) and (kitchen.action_space.low == -1).all()
    qpos = inner.sim.data.qpos
    assert np.abs(obs[:30] - qpos).max() < 0.05 and np.abs(obs[:30] - qpos).max() > 0  # D4RL's observation noise
    goal = np.zeros(30)
    for task in ("microwave", "kettle", "light switch", "slide cabinet"):
        goal[list(KITCHEN_GOALS[task][0])] = KITCHEN_GOALS[task][1]
    np.testing.assert_allclose(obs[30:], goal, atol=1e-6)


@pytest.mark.parametrize(
    ("env_id", "tasks"),
    [
        ("kitchen-complete-v0", ("microwave", "kettle", "light switch", "slide cabinet")),
        ("kitchen-mixed-v0", ("light switch", "bottom burner", "kettle", "microwave")),
    ],
)
def test_kitchen_pays_the_running_count_and_ends_at_4(env_id, tasks):
    """Not 1 where a task completes, as D4RL's class does; and a task that is undone stays counted."""
    env = envs.make(env_id)
    env.reset(seed=0)
    qpos = env.unwrapped.inner.sim.data.qpos
    before, steps = qpos.copy(), [env.step(np.zeros(9))]
    for task in tasks:
        rows, values = KITCHEN_GOALS[task]
        qpos[list(rows)] = values
        steps.append(env.step(np.zeros(9)))
        if task == tasks[1]:
            qpos[list(rows)] = before[list(rows)]
            steps.append(env.step(np.zeros(9)))
    rewards = [step[1] for step in steps]
    assert rewards == [0, 1, 2, 2, 3, 4]
    assert [step[2] for step in steps] == [step[4]["success"] for step in steps] == [False] * 5 + [True]
    score = env.get_wrapper_attr("normalized_score")
    assert score(np.array(rewards)) == 100 and score(np.array(rewards[:4])) == 50 and score(np.array(rewards[:1])) == 0
    env.reset(seed=0)
    assert env.step(np.zeros(9))[1] == 0


# ---------------------------------------------------------------- seeds, silence, evaluation


def trace(env, seed, steps=3):
    """Everything that is random in an episode: observations and the goal."""
    observations, rng = [env.reset(seed=seed)[0]], np.random.default_rng(0)
    goal = getattr(env.unwrapped.inner, "target_goal", ())
    for _ in range(steps):
        observations.append(env.step(rng.uniform(-1, 1, env.action_space.shape))[0])
    return np.r_[np.ravel(observations), goal]


@pytest.mark.parametrize("env_id", ["antmaze-umaze-v2", "kitchen-complete-v0"])
def test_resets_are_reproducible_and_leave_numpys_generator_alone(env_id):
    np.random.seed(1)
    expected = np.random.RandomState(1).uniform(size=6)
    env, other = envs.make(env_id), envs.make(env_id)
    first = trace(env, 7)
    drawn = [np.random.uniform()]
    unseeded = [trace(env, None), trace(env, None)]
    if "antmaze" in env_id:
        assert (unseeded[0][-2:] != unseeded[1][-2:]).all()  # a new goal
    drawn.append(np.random.uniform())
    assert not np.array_equal(trace(env, 8), first)  # a history of its own, and of the other's
    trace(other, 9)
    np.testing.assert_array_equal(trace(other, 7), first)
    trace(env, 1)
    np.testing.assert_array_equal(trace(other, None), unseeded[0])
    drawn += [np.random.uniform() for _ in range(4)]
    np.testing.assert_array_equal(drawn, expected)
    assert not np.array_equal(unseeded[0], first)
    assert not np.array_equal(trace(envs.make(env_id), None), trace(envs.make(env_id), None))


def test_nothing_is_printed_and_no_file_is_left(tmp_path):
    """In a fresh interpreter, with every place that D4RL writes to under tmp_path; and it is not the worse for it."""
    code = """
import os, sys
from envs import d4rl
for env_id in ("antmaze-umaze-v2", "kitchen-complete-v0"):
    env = d4rl.make(env_id)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()
assert os.environ.get("D4RL_DATASET_DIR") is None
assert not {"mujoco_py", "pybullet", "gym_notices"} & set(sys.modules)
import pybullet_data, collections
assert not hasattr(collections, "Mapping")
"""
    places = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "MPLCONFIGDIR": matplotlib.get_cachedir()}
    environment = {name: value for name, value in os.environ.items() if name != "D4RL_DATASET_DIR"}
    command = [sys.executable, "-W", "default", "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment | places, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not (tmp_path / ".d4rl").exists() and [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_evaluation_reports_the_normalised_score():
    """One of two ants is put at its goal: 50 %."""
    env = envs.make("antmaze-umaze-v2", sparse=True)
    starts, reset = iter([(0, 0), None]), env.reset

    def reset_at(**kwargs):
        obs, info = reset(**kwargs)
        inner = env.unwrapped.inner
        if next(starts) is None:
            inner.set_state(np.r_[inner.target_goal, inner.init_qpos[2:]], np.zeros(14))
        return obs, info

    env.reset = reset_at
    means = common.evaluate([env], lambda obs, keys: np.zeros((len(obs), 8)), 2)
    assert means["eval/normalized_score"] == 50 and means["eval/success_rate"] == 0.5
    assert means["eval/steps_to_goal"] == 1 and means["eval/length"] == (700 + 1) / 2


def test_render(kitchen):
    try:
        images = []
        for env_id in ("antmaze-umaze-v2", "kitchen-complete-v0"):
            env = envs.make(env_id, render=True)
            env.reset(seed=0)
            images.append(env.render())
            env.close()
    except InputError as error:
        pytest.skip(str(error))
    assert all(image.shape == (480, 480, 3) and image.dtype == np.uint8 for image in images)
    # the goal, at the end of the u, is above the start: y points up, x to the right; walls close the left
    green = np.argwhere((images[0] @ [-1, 2, -1]) > 200)
    assert len(green) > 300 and 90 < green[:, 0].mean() < 180 and 100 < green[:, 1].mean() < 200
    assert images[1].std() > 20


# ---------------------------------------------------------------- datasets


def test_stand_ins_give_back_what_was_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybullet", "the user's")
    monkeypatch.delitem(sys.modules, "mujoco_py", raising=False)
    monkeypatch.setenv("D4RL_DATASET_DIR", "/the/user's")
    with d4rl.stand_ins():
        assert sys.modules["pybullet"] is None and sys.modules["mujoco_py"].get_version() == "2.1"
    assert sys.modules["pybullet"] == "the user's" and "mujoco_py" not in sys.modules
    assert os.environ["D4RL_DATASET_DIR"] == "/the/user's"


def write_file(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip" if np.ndim(array) else None)
        file.create_group("infos")["goal"] = np.zeros((arrays["rewards"].size, 2))
    return path


def antmaze_file(path):
    """Two drives of 5 and 4 rows, each cut by a timeout; the first passes the goal in its third row."""
    observations = np.arange(9 * 29, dtype=np.float32).reshape(9, 29)
    actions = np.linspace(-1, 1, 9 * 8, dtype=np.float32).reshape(9, 8)
    rewards, timeouts = np.zeros(9, np.float32), np.zeros(9, bool)
    rewards[2], timeouts[[4, 8]] = 1, True
    data = dict(observations=observations, actions=actions, rewards=rewards)
    return write_file(path, **data, terminals=np.zeros(9, bool), timeouts=timeouts)


def kitchen_file(path, **changes):
    """Three demonstrations. Rows 0-5 complete all tasks at 3 and lose one at 4; 6-8 complete two; 9-10 end at 4."""
    rewards = np.array([0, 2, 3, 4, 3, 4, 1, 2, 2, 3, 4], np.float32)
    data = dict(observations=np.arange(11 * 60, dtype=np.float32).reshape(11, 60), actions=np.zeros((11, 9)))
    data |= dict(rewards=rewards, terminals=np.isin(np.arange(11), [5, 8, 10]).astype(np.float32)) | changes
    return write_file(path, **data)


def load(env_id, path=None):
    args = parl.Args(**parl.PRESETS["antmaze_paper" if env_id.startswith("antmaze") else "kitchen"])
    settings = (args.reward_scale, args.reward_bias, args.discount, args.sparse_reward)
    return envs.load_dataset(env_id, path, *settings), args


def test_antmaze_dataset_by_hand(tmp_path):
    """Cut at the success; the row at a timeout, whose next observation is not known, is dropped."""
    buffer, args = load("antmaze-umaze-v2", antmaze_file(tmp_path / "antmaze.hdf5"))
    np.testing.assert_array_equal(buffer.rewards[: len(buffer)], [-1, -1, 0, -1, -1, -1, -1])
    np.testing.assert_array_equal(buffer.masks[: len(buffer)], [1, 1, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(buffer.mc_returns[: len(buffer)], [-1.99, -1, 0, -100, -100, -100, -100], rtol=1e-6)
    rows = buffer.state_rows[: len(buffer)]
    np.testing.assert_array_equal(buffer.states[rows, 0] / 29, [0, 1, 2, 3, 5, 6, 7])
    np.testing.assert_array_equal(buffer.states[rows + 1, 0] / 29, [1, 2, 2, 4, 6, 7, 8])
    np.testing.assert_allclose(buffer.actions[4], np.linspace(-1, 1, 72)[40:48], atol=1e-6)
    assert common.value_range(buffer.rewards[: len(buffer)], args) == (-100, 0) and args.hidden_dims == (256,) * 4
    assert (args.discount, args.online_episodes) == (0.99, 1000)


FOLLOWING = np.arange(1, 12, dtype=np.float32)[:, None] * np.ones(60, np.float32)


@pytest.mark.parametrize("changes", [{}, {"timeouts": np.zeros(11, bool)}, {"next_observations": FOLLOWING}])
def test_kitchen_dataset_by_hand(changes, tmp_path):
    """A demonstration ends at its first 4, with what follows dropped, also where the count falls and rises again. Its
    end below 4 is no terminal state, whatever the file says, and its last row is dropped."""
    buffer, args = load("kitchen-complete-v0", kitchen_file(tmp_path / "kitchen.hdf5", **changes))
    np.testing.assert_array_equal(buffer.rewards[: len(buffer)], [-4, -2, -1, 0, -3, -2, -1, 0])
    np.testing.assert_array_equal(buffer.masks[: len(buffer)], [1, 1, 1, 0, 1, 1, 1, 0])
    rows = buffer.state_rows[: len(buffer)]
    np.testing.assert_array_equal(buffer.states[rows, 0] / 60, [0, 1, 2, 3, 6, 7, 9, 10])
    np.testing.assert_array_equal(buffer.states[rows + 1, 0] / 60, [1, 2, 3, 3, 7, 8, 10, 10])
    expected = [-4 - 0.99 * 2 - 0.99**2, -2 - 0.99, -1, 0, -3 - 0.99 * 2, -2, -1, 0]
    np.testing.assert_allclose(buffer.mc_returns[: len(buffer)], expected, rtol=1e-6)
    assert common.value_range(buffer.rewards[: len(buffer)], args) == (-400, 0) and not args.sparse_reward


def test_kitchen_ends_of_a_file_with_timeouts():
    """Terminal at the first 4 of each demonstration alone, also of one that a timeout ends or that starts at 4."""
    rewards, terminals = np.array([4, 4, 0, 4, 4, 1]), np.zeros(6)
    timeouts = np.array([0, 1, 0, 0, 1, 0])
    terminal, timeout = d4rl.kitchen_ends(rewards, terminals, timeouts)
    np.testing.assert_array_equal(terminal, [1, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(timeout, [0, 1, 0, 0, 1, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rewards=np.zeros(10)), r"observations has shape \(11, 60\); expected \(10, 60\)"),
        (dict(terminals=np.zeros(10)), r"terminals has shape \(10,\); expected \(11,\)"),
        (dict(rewards=np.full(11, np.nan)), r"rewards\[0\] = nan"),
        (dict(actions=np.full((11, 9), 1.1)), r"actions\[0, 0\] = 1.1; expected within"),
        (dict(observations=np.zeros((11, 30))), r"\(11, 30\); expected \(11, 60\)"),
        (dict(terminals=np.full(11, np.nan)), r"terminals\[0\] = nan"),
        (dict(rewards=np.full(11, b"four")), "rewards has dtype"),
        (dict(rewards=np.float64(4)), r"rewards has shape \(\); expected \(1,\)"),
        (dict(rewards=np.zeros((11, 2))), r"rewards has shape \(11, 2\); expected \(22,\)"),
        (dict(rewards=np.zeros(0), terminals=np.zeros(0)), "holds 0 transitions"),
    ],
)
def test_bad_kitchen_files(changes, message, tmp_path):
    path = kitchen_file(tmp_path / "bad.hdf5", **changes)
    with pytest.raises(InputError, match=message) as error:
        load("kitchen-complete-v0", path)
    assert str(path) in str(error.value)


def test_a_missing_key_is_named(tmp_path):
    path = kitchen_file(tmp_path / "kitchen.hdf5")
    with pytest.raises(InputError, match="missing timeouts"):  # D4RL's mazes have them
        d4rl.read_dataset("antmaze-umaze-v2", path)
    with h5py.File(path, "a") as file:
        del file["terminals"]
    with pytest.raises(InputError, match="missing terminals"):
        d4rl.read_dataset("kitchen-complete-v0", path)


# ---------------------------------------------------------------- downloads

NAMES = {
    "antmaze-umaze-v2": "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
    "antmaze-medium-play-v2": "Ant_maze_big-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
    "antmaze-large-diverse-v2": "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
    "kitchen-complete-v0": "mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
    "kitchen-partial-v0": "kitchen_microwave_kettle_light_slider-v0.hdf5",
    "kitchen-mixed-v0": "kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """$D4RL_DATASET_DIR, which does not exist yet, and ~/.d4rl/datasets."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "d4rl", tmp_path / "home" / ".d4rl" / "datasets"


@contextlib.contextmanager
def serve(reply):
    """The address of a server on this machine that answers a request by reply(handler)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            reply(self)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def answer(body, status=200, length=None):
    def reply(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(length or len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


@pytest.mark.parametrize("env_id", NAMES)
def test_files_are_found_by_d4rls_names(env_id, folders):
    first, second = folders
    for folder in (second, first):  # the first wins
        folder.mkdir(parents=True)
        (folder / NAMES[env_id]).touch()
        assert envs.dataset_file(env_id) == folder / NAMES[env_id]


@pytest.mark.parametrize(("env_id", "write"), [("antmaze-umaze-v2", antmaze_file), ("kitchen-mixed-v0", kitchen_file)])
def test_download(env_id, write, folders, tmp_path, monkeypatch):
    body = write(tmp_path / "source.hdf5").read_bytes()
    asked = []
    with serve(lambda handler: asked.append(handler.path) or answer(body)(handler)) as address:
        path = d4rl.d4rl.infos.DATASET_URLS[env_id].replace("http://rail.eecs.berkeley.edu", "")
        monkeypatch.setitem(d4rl.d4rl.infos.DATASET_URLS, env_id, address + path)
        for _ in range(2):  # the second time from the disk
            buffer, _ = load(env_id)
            assert len(buffer) in (7, 8)
    (folders[0] / NAMES[env_id]).write_bytes(body[:1000])
    with pytest.raises(InputError, match=r"cannot be read as HDF5 .*; delete it, and it is downloaded again$"):
        load(env_id)
    (folders[0] / NAMES[env_id]).write_bytes(body)
    assert len(asked) == 1 and asked[0].startswith("/datasets/offline_rl/") and asked[0].endswith(NAMES[env_id])
    assert [file.name for file in folders[0].iterdir()] == [NAMES[env_id]]
    assert (folders[0] / NAMES[env_id]).read_bytes() == body


def test_two_downloads_of_one_process_id_do_not_meet(folders, tmp_path, monkeypatch):
    """In two containers that share a folder: the second begins, and ends, while the first is under way."""
    body, asked = antmaze_file(tmp_path / "source.hdf5").read_bytes(), []
    monkeypatch.setattr(os, "getpid", lambda: 7)

    def reply(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:1000])
        handler.wfile.flush()
        asked.append(handler.path)
        if len(asked) == 1:
            files.download(f"{address}/second", folders[0] / "maze.hdf5")
        handler.wfile.write(body[1000:])

    with serve(reply) as address:
        files.download(f"{address}/first", folders[0] / "maze.hdf5")
    assert asked == ["/first", "/second"] and [path.name for path in folders[0].iterdir()] == ["maze.hdf5"]
    assert (folders[0] / "maze.hdf5").read_bytes() == body


def failures():
    yield "the server is down", None, "refused"
    yield "no such file", answer(b"sorry", 404), "404"
    yield "a cut connection", answer(b"\x89HDF\r\n\x1a\n" + bytes(100), length=10_000), "ended after 108 of 10000 bytes"
    yield "a log-in page", answer(b"<html>log in</html>"), "not HDF5"


@pytest.mark.parametrize(("reply", "message"), [case[1:] for case in failures()], ids=[case[0] for case in failures()])
def test_a_failing_download_says_what_to_put_where(reply, message, folders, monkeypatch):
    with serve(reply) if reply else contextlib.nullcontext("http://127.0.0.1:9") as address:
        url = f"{address}/{NAMES['kitchen-complete-v0']}"
        monkeypatch.setitem(d4rl.d4rl.infos.DATASET_URLS, "kitchen-complete-v0", url)
        with pytest.raises(InputError, match=message) as error:
            envs.dataset_file("kitchen-complete-v0")
    text = str(error.value)
    assert url in text and str(folders[0] / NAMES["kitchen-complete-v0"]) in text and "\n" not in text
    assert text.startswith("--env-id kitchen-complete-v0: ") and list(folders[0].iterdir()) == []
