"""PointMaze: its facts, and its embedded data."""

import numpy as np
import pytest

import envs
from common import InputError
from envs import pointmaze


def test_pointmaze_facts():
    for env_id, (_, _, goal_cell, horizon, _) in pointmaze.POINTMAZES.items():
        env = envs.make(env_id)
        maze = env.unwrapped
        first, again = env.reset(seed=3)[0], env.reset(seed=3)[0]
        np.testing.assert_array_equal(first, again)
        starts = np.stack([env.reset(seed=i)[0] for i in range(40)])
        centre = maze.maze.cell_rowcol_to_xy(np.array(pointmaze.POINTMAZES[env_id][1]))
        assert np.abs(starts[:, :2] - centre).max() <= 0.25 and starts[:, :2].std(0).min() > 0.1
        assert (starts[:, 2:] == 0).all()
        np.testing.assert_array_equal(maze.goal, maze.maze.cell_rowcol_to_xy(np.array(goal_cell)))
        steps = [env.step(np.zeros(2, np.float32)) for _ in range(horizon)]
        assert not any(step[2] for step in steps) and [step[3] for step in steps].index(True) == horizon - 1
        maze.point_env.set_state(maze.goal + np.array([0.44, 0]), np.zeros(2))
        _, reward, terminated, _, info = env.step(np.zeros(2, np.float32))
        assert (reward, terminated, info["success"]) == (1.0, True, True)


def test_unknown_mazes_are_refused_with_near_misses():
    for call in (envs.make, envs.dataset_file):
        with pytest.raises(InputError, match=r"--env-id pointmaze-lage-play: .* did you mean pointmaze-large-play"):
            call("pointmaze-lage-play")
    with pytest.raises(InputError, match="did you mean pointmaze-umaze-play"):  # not of the family's pattern
        envs.make("pointmaze-umaze-ply0")


def test_pointmaze_dynamics_are_12_hz():
    env = envs.make("pointmaze-umaze-play")
    env.reset(seed=0)
    point = env.unwrapped.point_env
    before = point.data.time
    env.step(np.array([1.0, 0.0]))
    assert point.data.time - before == pytest.approx(0.08)


def test_pointmaze_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    envs.make("pointmaze-umaze-play")
    assert not list(tmp_path.iterdir())


def test_shortest_path():
    walls = np.array([[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], bool)
    assert pointmaze.shortest_path(walls, (1, 1), (3, 1)) == [(1, 1), (1, 2), (2, 2), (3, 2), (3, 1)]
    assert pointmaze.shortest_path(walls, (1, 1), (1, 1)) == [(1, 1)]


def test_embedded_data_is_deterministic_and_consistent():
    first, again = (pointmaze.generate_pointmaze("pointmaze-umaze-play", 600, seed=1) for _ in range(2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other = pointmaze.generate_pointmaze("pointmaze-umaze-play", 600, seed=2)
    assert not np.array_equal(first["actions"][:100], other["actions"][:100])
    assert (first["rewards"] == first["terminals"]).all() and first["terminals"].any()
    goal = np.array([-1.0, 1.0])
    reached = np.linalg.norm(first["next_observations"][:, :2] - goal, axis=1) <= 0.45
    assert (reached == first["terminals"]).all()
