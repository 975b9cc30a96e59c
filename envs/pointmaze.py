"""PointMaze, the default: pointmaze-{umaze,medium,large}-play, and play data that is made here on first use."""

import contextlib
import io
import os
from collections import deque

import gymnasium as gym
import numpy as np

from common import bar
from envs import files, opengl

# name: (gymnasium-robotics map, start cell, goal cell, steps to the time limit, transitions of the dataset)
POINTMAZES = {
    "pointmaze-umaze-play": ("U_MAZE", (3, 1), (1, 1), 50, 20_000),
    "pointmaze-medium-play": ("MEDIUM_MAZE", (1, 1), (6, 6), 120, 60_000),
    "pointmaze-large-play": ("LARGE_MAZE", (1, 1), (7, 10), 180, 120_000),
}
IDS = tuple(POINTMAZES)


# ======================================== ENVIRONMENT ========================================


def make(env_id, render=False):
    """One of IDS with its time limit; it can always draw itself, render or not."""
    return gym.wrappers.TimeLimit(PointMaze(env_id), POINTMAZES[env_id][3])


class PointMaze(gym.Wrapper):
    """gymnasium-robotics' PointMaze at 12 Hz: a force-driven ball rolls from a start cell to a goal cell.

    observation (4,): position in m and velocity in m/s; action (2,): force in [-1, 1]. Reward 1 and the end of the
    episode within 0.45 m of the goal, else 0. The start is uniform within 0.25 m (per axis) of the centre of the start
    cell, or of options["cell"]; the goal is the centre of its cell, so it need not be observed.
    """

    def __init__(self, env_id):
        with opengl.optional(), contextlib.redirect_stderr(io.StringIO()):  # it prints a notice on other environments
            from gymnasium_robotics.envs.maze import maps, point_maze

        layout, self.start_cell, self.goal_cell, _, _ = POINTMAZES[env_id]
        env = point_maze.PointMazeEnv(getattr(maps, layout), continuing_task=False)
        os.remove(env.tmp_xml_file_path)  # the base class leaves it behind
        env.position_noise_range = 0.0
        env.point_env.frame_skip = 8  # physics steps of 0.01 s per action
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.walls = np.array([[cell == 1 for cell in row] for row in getattr(maps, layout)])

    def centre(self, cell):
        """The centre (2,) of cell (row, column), in metres."""
        return self.env.maze.cell_rowcol_to_xy(np.array(cell))

    def reset(self, *, seed=None, options=None):
        cell = (options or {}).get("cell", self.start_cell)
        self.env.reset(seed=seed, options={"goal_cell": np.array(self.goal_cell), "reset_cell": np.array(cell)})
        start = self.centre(cell) + self.env.np_random.uniform(-0.25, 0.25, 2)
        self.env.point_env.set_state(start, np.zeros(2))
        self.trail = [start]
        return np.concatenate([start, np.zeros(2)]).astype(np.float32), {"success": False}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.trail.append(obs["achieved_goal"])
        return obs["observation"].astype(np.float32), float(reward), terminated, truncated, info

    def render(self):
        """The maze from above with the ball's trail, (H, W, 3) uint8 at 32 pixels per metre. Needs no OpenGL."""
        image = np.kron(np.where(self.walls, 90, 245)[..., None], np.ones((32, 32, 3))).astype(np.uint8)
        rows, columns = np.mgrid[: image.shape[0], : image.shape[1]] / 32
        x, y = columns - self.env.maze.x_map_center, self.env.maze.y_map_center - rows
        discs = [(self.centre(self.goal_cell), 0.45, (170, 225, 170))]
        discs += [(point, 0.06, (150, 170, 220)) for point in self.trail] + [(self.trail[-1], 0.15, (200, 60, 40))]
        for (px, py), radius, colour in discs:
            image[(x - px) ** 2 + (y - py) ** 2 < radius**2] = colour
        return image


# ======================================== DATASET ========================================


def dataset_file(env_id):
    """The play data of env_id in $PARL_CACHE (~/.cache/parl), made on first use, in about a minute for the largest."""
    num_transitions = POINTMAZES[env_id][4]
    return files.cached_file(f"{env_id}-{num_transitions}-v1.npz", lambda: generate_pointmaze(env_id, num_transitions))


def generate_pointmaze(env_id, num_transitions, seed=0):
    """Play data: a proportional-derivative controller drives between random cells along shortest paths with Gaussian
    action noise, its scale drawn per episode. An episode lasts 200 steps or ends where it happens to meet the goal.

    Returns the arrays of a dataset file (see envs/files.py), the same for the same seed.
    """
    env, rng = PointMaze(env_id), np.random.default_rng(seed)
    cells = [tuple(cell) for cell in np.argwhere(~env.walls)]
    rows = []
    with bar(f"making {env_id} data", "steps", num_transitions) as progress:
        while len(rows) < num_transitions:
            cell, noise = cells[rng.integers(len(cells))], rng.uniform(0.3, 2.0)
            obs, _ = env.reset(seed=int(rng.integers(2**31)), options={"cell": cell})
            path, terminated, length = [cell], False, 0
            while not terminated and length < 200:
                if np.linalg.norm(env.centre(path[0]) - obs[:2]) < 0.3:
                    cell = path.pop(0)
                if not path:
                    path = shortest_path(env.walls, cell, cells[rng.integers(len(cells))])
                force = 4.0 * (env.centre(path[0]) - obs[:2]) - obs[2:] + noise * rng.standard_normal(2)
                action = np.clip(force, -1, 1).astype(np.float32)
                next_obs, reward, terminated, _, _ = env.step(action)
                length += 1
                rows.append((obs, action, np.float32(reward), terminated, not terminated and length == 200, next_obs))
                obs = next_obs
            progress.update(length)
    columns = zip(files.DATASET_KEYS, zip(*rows, strict=True), strict=True)
    return {name: np.stack(values) for name, values in columns}


def shortest_path(walls, start, goal):
    """Cells from start to goal, both included, by breadth-first search."""
    paths, seen = deque([[start]]), {start}
    while paths[0][-1] != goal:
        path = paths.popleft()
        row, column = path[-1]
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if not walls[cell] and cell not in seen:
                seen.add(cell)
                paths.append([*path, cell])
    return paths[0]
