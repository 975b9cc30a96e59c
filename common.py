"""What the PA-RL scripts share and is not the algorithm: data, environments, evaluation, the files of a run.

Read a `parl_*.py` first and come here for details. The buffer holds raw observations and scaled rewards (the scripts
normalise observations); actions are in [-1, 1] everywhere.
"""

import argparse
import contextlib
import csv
import ctypes
import ctypes.util
import dataclasses
import difflib
import hashlib
import importlib
import importlib.metadata
import io
import json
import math
import os
import pickle
import re
import signal
import sys
import textwrap
import time
import tokenize
import uuid
import zipfile
import zlib
from collections import deque
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import h5py
import imageio
import matplotlib.figure
import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm


class InputError(ValueError):
    """The user asked for what cannot be done; the message names the flag or file and says what was expected."""


def start(args):
    """Seed torch and set its threads. Returns (device, a seeded numpy generator). Raises InputError without a GPU."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; expected cpu or auto")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    keep_freed_memory()
    if args.dataset_path == "":
        raise InputError("--dataset-path: empty; expected a file, .hdf5 or .npz")
    if args.dataset_path is not None:
        args.dataset_path = str(Path(args.dataset_path).resolve())  # so that --resume works from any folder
    use_gpu = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
    return device, np.random.default_rng(args.seed)


def compiled(function, **options):
    """torch.compile(function, **options) that captures the gradients taken inside of it as well."""
    torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function, **options)


def keep_freed_memory():
    """Have glibc keep what is freed for the next allocation: given back to the system, as it is by default from some
    megabytes on, every 4 kB of it costs a page fault when it is used again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes, its maximum


def seeded_normal(shape, seeds=None, device="cpu"):
    """Standard normals of `shape` (B, ...), from torch's generator; with `seeds` (B tuples of integers >= 0), row i is
    drawn from seeds[i] alone: it depends neither on other rows nor on how rows are batched."""
    if seeds is None:
        return torch.randn(shape, device=device)
    rows = [np.random.default_rng(seed).standard_normal(shape[1:], np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).to(device)


def cache_sized(rows, *tensors):
    """Tuples of the tensors' rows, in equal parts of at most `rows` (and at least 1): on a CPU an operation is faster
    while the result of the one before is in the cache. All rows at once on a GPU and while compiling."""
    if tensors[0].is_cuda or torch.compiler.is_compiling():
        return [tensors]
    num_parts = max(1, math.ceil(len(tensors[0]) / max(1, rows)))
    return list(zip(*(tensor.chunk(num_parts) for tensor in tensors), strict=True))


class Normalizer(torch.nn.Module):
    """obs (..., O) -> (obs - mean) / std of `states` (S, O), with std at least 1e-3; the identity for no states."""

    def __init__(self, obs_dim, states=()):
        super().__init__()
        states = states if len(states) else np.array([[-1.0], [1.0]]) * np.ones(obs_dim)
        self.register_buffer("mean", torch.tensor(states.mean(0, dtype=np.float64), dtype=torch.float32))
        self.register_buffer("std", torch.tensor(states.std(0, dtype=np.float64).clip(1e-3), dtype=torch.float32))

    def forward(self, obs):
        return (obs - self.mean) / self.std


# ======================================== TRANSITIONS ========================================


def mc_returns(rewards, masks, discount, sparse=False):
    """Return-to-go of one episode, G_t = r_t + discount * mask_t * G_{t+1}, with nothing after its last step.

    rewards, masks (L,), scaled as they are learned from -> (L,) float32. sparse: each step costs until success, which
    costs nothing; an episode of negative rewards alone never succeeded and is worth r / (1 - discount) throughout.
    NOTE(differs): an online episode that fails is worth r / (1 - discount) too (released: its truncated sum).
    """
    rewards = np.asarray(rewards, np.float64)
    if sparse and rewards.max() < 0:
        return np.full(len(rewards), rewards[-1] / (1 - discount), np.float32)
    returns = np.zeros(len(rewards) + 1)
    for t in reversed(range(len(rewards))):
        returns[t] = rewards[t] + discount * masks[t] * returns[t + 1]
    return returns[:-1].astype(np.float32)


class ReplayBuffer:
    """Episodes end to end. One of L steps adds L transitions and L + 1 states; a transition's next state is the row
    after its own, so that obs and next_obs are stored once. Arrays double when full.

    obs_dim: O; or the shape of images, (height, width, 3), with dtype np.uint8. What follows says (O,) for either.
    """

    def __init__(self, obs_dim, act_dim, dtype=np.float32):
        self.num_states, self.num_transitions, self.sha256 = 0, 0, None
        self.states = np.zeros((1024, *np.atleast_1d(obs_dim)), dtype)
        self.actions = np.zeros((1024, act_dim), np.float32)
        self.rewards, self.masks, self.mc_returns = (np.zeros(1024, np.float32) for _ in range(3))
        self.state_rows = np.zeros(1024, np.int64)

    def __len__(self):
        return self.num_transitions

    def add_episode(self, observations, actions, rewards, masks, mc_returns):
        """observations (L + 1, O), the last next one included; actions (L, A); rewards, masks, mc_returns (L,).

        mask = 1 - terminated: 0 at success or failure, 1 elsewhere and at a time limit. Actions are clipped to
        +-0.99999, where a tanh policy can reach them.
        """
        if not len(observations) - 1 == len(actions) == len(rewards) == len(masks) == len(mc_returns):
            raise ValueError("an episode of L actions has L + 1 observations and L rewards, masks and mc_returns")
        self.state_rows = append(self.state_rows, self.num_transitions, self.num_states + np.arange(len(actions)))
        self.states = append(self.states, self.num_states, observations)
        self.actions = append(self.actions, self.num_transitions, np.clip(actions, -0.99999, 0.99999))
        for name, values in (("rewards", rewards), ("masks", masks), ("mc_returns", mc_returns)):
            setattr(self, name, append(getattr(self, name), self.num_transitions, values))
        self.num_states, self.num_transitions = self.num_states + len(observations), self.num_transitions + len(actions)

    def sample(self, batch_size, generator):
        """Transitions, uniform with replacement: obs, next_obs (B, O), actions (B, A), rewards, masks, mc_returns (B,),
        and state_rows (B,), the row of obs among `states`.

        NOTE(differs): batches are drawn by a seeded generator, with replacement (released: 34 ms each from 1M rows).
        """
        rows = generator.integers(self.num_transitions, size=batch_size)
        states = self.state_rows[rows]
        batch = {name: getattr(self, name)[rows] for name in ("actions", "rewards", "masks", "mc_returns")}
        batch |= {"obs": self.states[states], "next_obs": self.states[states + 1], "state_rows": states}
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def state_dict(self):
        arrays = {name: getattr(self, name) for name in ("actions", "rewards", "masks", "mc_returns", "state_rows")}
        arrays = {name: array[: self.num_transitions] for name, array in arrays.items()}
        return {
            name: torch.tensor(array) for name, array in (arrays | {"states": self.states[: self.num_states]}).items()
        }

    def load_state_dict(self, state):
        for name, tensor in state.items():
            setattr(self, name, tensor.numpy().copy())
        self.num_states, self.num_transitions = len(self.states), len(self.actions)


def append(array, size, rows):
    """`array`, of which `size` rows are in use, with `rows` after them; longer where they do not fit."""
    if size + len(rows) > len(array):
        array = np.concatenate([array[:size], np.zeros((size + len(rows), *array.shape[1:]), array.dtype)])
    array[size : size + len(rows)] = rows
    return array


def sample_both(offline, online, num_offline, num_online, generator):
    """num_offline transitions of one buffer, and below them num_online of the other."""
    parts = [buffer.sample(n, generator) for buffer, n in ((offline, num_offline), (online, num_online)) if n]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ======================================== POINTMAZE ========================================

# name: (gymnasium-robotics map, start cell, goal cell, steps to the time limit, transitions of the embedded dataset)
POINTMAZES = {
    "pointmaze-umaze-play": ("U_MAZE", (3, 1), (1, 1), 50, 20_000),
    "pointmaze-medium-play": ("MEDIUM_MAZE", (1, 1), (6, 6), 120, 60_000),
    "pointmaze-large-play": ("LARGE_MAZE", (1, 1), (7, 10), 180, 120_000),
}


class PointMaze(gym.Wrapper):
    """gymnasium-robotics' PointMaze at 12 Hz: a force-driven ball rolls from a start cell to a goal cell.

    observation (4,): position in m and velocity in m/s; action (2,): force in [-1, 1]. Reward 1 and the end of the
    episode within 0.45 m of the goal, else 0. The start is uniform within 0.25 m (per axis) of the centre of the start
    cell, or of options["cell"]; the goal is the centre of its cell, so it need not be observed.
    """

    def __init__(self, env_id):
        with contextlib.redirect_stderr(io.StringIO()):  # importing it prints a notice on other environments
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


def generate_pointmaze(env_id, num_transitions, seed=0):
    """Play data: a proportional-derivative controller drives between random cells along shortest paths with Gaussian
    action noise, its scale drawn per episode. An episode lasts 200 steps or ends where it happens to meet the goal.

    Returns the arrays of a dataset file (see `load_dataset`), the same for the same seed.
    """
    env, rng = PointMaze(env_id), np.random.default_rng(seed)
    cells = [tuple(cell) for cell in np.argwhere(~env.walls)]
    rows = []
    with tqdm(total=num_transitions, desc=f"making {env_id} data", unit="step", disable=None) as bar:
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
            bar.update(length)
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    return {name: np.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


# ======================================== ENVIRONMENTS AND DATASETS ========================================


FAMILIES = {  # pattern of --env-id: (key in the scripts' PRESETS, module in envs/)
    r"pointmaze-\w+-play": ("pointmaze", None),
    r"antmaze-[\w-]+-v2": ("antmaze", "d4rl"),
    r"kitchen-\w+-v0": ("kitchen", "d4rl"),
    r"metaworld-[\w-]+": ("metaworld", "metaworld"),
    r"[\w-]+-singletask(-[\w-]+)?": ("ogbench", "ogbench"),
    r"minari:.+": ("minari", "minari"),
}


def family(env_id):
    """(key in PRESETS, module in envs/ or None) of env_id; ("", None) for a plain gymnasium id."""
    return next((names for pattern, names in FAMILIES.items() if re.fullmatch(pattern, env_id)), ("", None))


def family_module(env_id):
    """The module in envs/ that makes env_id, imported now; None where gymnasium or this file makes it. It has

    IDS               the ids it knows
    make(env_id, render) -> gymnasium environment with its time limit and info["success"] at every step
    dataset_file(env_id) -> path of its dataset: found, downloaded or made on first use
    read_dataset(env_id, path) -> the arrays of `load_dataset`

    Raises InputError naming the package that is missing.
    """
    _, name = family(env_id)
    if name is None:
        return None
    try:
        return importlib.import_module(f"envs.{name}")
    except ModuleNotFoundError as error:
        missing = "the folder envs/ beside common.py" if error.name.startswith("envs") else f"pip install {error.name}"
        raise InputError(f"--env-id {env_id}: {error}; expected {missing}") from error


def known_ids():
    """Every --env-id by name: POINTMAZES, those of the families that are installed, gymnasium's. Takes seconds."""
    ids = list(POINTMAZES)
    for name in sorted({name for _, name in FAMILIES.values() if name}):
        with contextlib.suppress(ModuleNotFoundError, InputError):
            ids += importlib.import_module(f"envs.{name}").IDS
    return ids + list(gym.registry)


def no_opengl(error):
    """The InputError for what a missing OpenGL library raises."""
    return InputError(
        f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: no OpenGL ({' '.join(str(error).split())}); expected Debian's "
        "libegl1 and libgl1 for egl (the default), or libosmesa6 for osmesa"
    )


class Success(gym.Wrapper):
    """Puts info["success"] into every step: the environment's own, or its info["is_success"], or where it reports
    neither, an end with a positive reward. With `ends`, the first success ends the episode."""

    def __init__(self, env, ends):
        super().__init__(env)
        self.ends = ends

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        success = bool(info.get("success", info.get("is_success", terminated and reward > 0)))
        return obs, float(reward), bool(terminated or (success and self.ends)), truncated, {**info, "success": success}


class ImageObservation(gym.Wrapper):
    """The "image" of a dict observation alone, uint8, resized to (size, size, 3) by PIL's bicubic filter.

    Raises InputError where observations are no Dict with such an image.
    """

    def __init__(self, env, env_id, size):
        super().__init__(env)
        space = env.observation_space
        image = space.spaces.get("image") if isinstance(space, gym.spaces.Dict) else None
        if image is None or image.dtype != np.uint8 or len(image.shape) != 3 or image.shape[2] != 3:
            raise InputError(
                f'--env-id {env_id}: observations {space}; expected a Dict with "image", uint8 (height, width, 3)'
            )
        self.size, self.observation_space = size, gym.spaces.Box(0, 255, (size, size, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.resize(obs["image"]), info

    def step(self, action):
        obs, *others = self.env.step(action)
        return self.resize(obs["image"]), *others

    def resize(self, image):
        size = (self.size, self.size)
        return image if image.shape[:2] == size else np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))


def make_env(env_id, sparse=False, render=False, image_size=0):
    """The environment `env_id`: one of POINTMAZES, of a family in envs/, or any gymnasium id (also "module:Id").

    Its observations are flat (O,), dicts in the order of their space's keys, or with an image_size camera images
    (image_size, image_size, 3) uint8; its actions (A,) are rescaled to [-1, 1]; it is wrapped in Success, and where
    rewards are sparse ends at the first one. Raises InputError for an unknown id, with near misses, for an action space
    that is not a bounded Box of floats, and for images that it does not have.
    """
    if render and "DISPLAY" not in os.environ and ctypes.util.find_library("EGL"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo draws without a display; read when it is first imported
    try:
        if module := family_module(env_id):
            draws = image_size and hasattr(module, "make_images")
            env = module.make_images(env_id, image_size) if draws else module.make(env_id, render)
        elif env_id in POINTMAZES:
            env = gym.wrappers.TimeLimit(PointMaze(env_id), POINTMAZES[env_id][3])
        else:
            # gymnasium-robotics would import the mujoco-py that comes with d4rl, which raises without MuJoCo 2.1
            sys.modules.setdefault("mujoco_py", None)
            env = gym.make(env_id)
            if render and "rgb_array" not in (env.metadata.get("render_modes") or []):
                raise InputError(f"--capture-video: {env_id} has no render mode rgb_array; expected it in its metadata")
            if render:
                env.close()
                env = gym.make(env_id, render_mode="rgb_array")
    except (gym.error.Error, ModuleNotFoundError) as error:
        hint = "expected an installed module, or one in a folder of PYTHONPATH"
        if not isinstance(error, ModuleNotFoundError):
            near = difflib.get_close_matches(env_id, known_ids(), n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"expected {', '.join(POINTMAZES)} or a gymnasium id"
        raise InputError(f"--env-id {env_id}: {error}; {hint}") from error
    space = env.action_space
    is_vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"
    if not is_vector or not space.is_bounded() or (space.low >= space.high).any():
        expected = "expected a bounded Box of one dimension, of floats, low below high"
        raise InputError(f"--env-id {env_id}: its action space is {space}; {expected}")
    if not env.has_wrapper_attr("_max_episode_steps"):
        print(f"warning: {env_id} has no max_episode_steps: an episode that never ends hangs the run", file=sys.stderr)
    env = ImageObservation(env, env_id, image_size) if image_size else gym.wrappers.FlattenObservation(env)
    env = Success(env, sparse)
    rescaled = (space.low != -1).any() or (space.high != 1).any()
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)) if rescaled else env


def action_bounds(env):
    """(low, high), each (A,): the units of actions in a dataset file for an environment of `make_env`."""
    inner = env.env if isinstance(env, gym.wrappers.RescaleAction) else env
    return inner.action_space.low, inner.action_space.high


# the last one is optional
DATASET_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


def dataset_file(env_id, dataset_path=None, image_size=0):
    """`dataset_path` where given, else the family's: found, downloaded, or made on first use in $PARL_CACHE."""
    if dataset_path is not None:
        return Path(dataset_path)
    if module := family_module(env_id):
        return module.dataset_file(env_id, image_size) if image_size else module.dataset_file(env_id)
    if env_id not in POINTMAZES:
        raise InputError(
            f"--env-id {env_id} has no embedded dataset: expected --dataset-path FILE (.hdf5 or .npz with "
            f"{', '.join(DATASET_KEYS[:5])}), or for none --offline-ratio 0 --bc-steps 0 (OpenVLA: --warmup-episodes)"
        )
    num_transitions = POINTMAZES[env_id][4]
    return cached_file(f"{env_id}-{num_transitions}-v1.npz", lambda: generate_pointmaze(env_id, num_transitions))


def cached_file(name, generate):
    """The npz file `name` in $PARL_CACHE (~/.cache/parl), written with the arrays of generate() where it is missing.

    Raises InputError where that folder cannot be written.
    """
    path = Path(os.environ.get("PARL_CACHE", "~/.cache/parl")).expanduser() / name
    if not path.exists():
        partial = path.with_name(f"{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()  # before generate() works for minutes
            partial.unlink()
        except OSError as error:
            raise InputError(f"PARL_CACHE: {error}; expected a folder that can be written") from error
        np.savez_compressed(partial, **generate())
        partial.replace(path)
    return path


# what numpy and h5py raise for a damaged file
UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError)
UNREADABLE += (zipfile.BadZipFile, zlib.error, tokenize.TokenError)


def read_dataset(path, optional=("next_observations",)):
    """The arrays of an HDF5 or npz file as a dict. Raises InputError naming the file and what is wrong with it."""
    where = f"dataset {path}"
    if not path.is_file():
        raise InputError(f"{where}: {'is a directory' if path.is_dir() else 'no such file'}; expected .hdf5 or .npz")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                data = {key: file[key] for key in DATASET_KEYS if key in file}
        else:
            with h5py.File(path, "r") as file:
                arrays = {key: file.get(key) for key in DATASET_KEYS}
                data = {key: np.asarray(array[()]) for key, array in arrays.items() if isinstance(array, h5py.Dataset)}
    except UNREADABLE as error:
        kind = "npz" if path.suffix == ".npz" else "HDF5"
        raise InputError(f"{where}: cannot be read as {kind} ({error})") from error
    if missing := [key for key in DATASET_KEYS if key not in data and key not in optional]:
        raise InputError(f"{where}: missing {', '.join(missing)}; found {', '.join(data) or 'none of the keys'}")
    return data


def check_dataset(data, path, env):
    """Raises InputError with file, key and first bad index unless the arrays fit each other and the environment."""
    low, high = action_bounds(env)
    rows = {"observations": env.observation_space.shape, "actions": low.shape}
    rows["next_observations"], length = rows["observations"], data["rewards"].size
    if length == 0:
        raise InputError(f"dataset {path}: holds 0 transitions; expected at least 1")
    for key in sorted(data, key=lambda key: key != "rewards"):  # what gives the length comes first
        array, where, shape = data[key], f"dataset {path}: {key}", (length, *rows.get(key, ()))
        check_numbers(array, where)
        if key in ("observations", "next_observations") and len(shape) > 2 and array.dtype != np.uint8:
            raise InputError(f"{where} has dtype {array.dtype}; expected images, uint8")
        if array.shape != shape:
            source = "rewards and the policy's image size" if len(shape) > 2 else "rewards and the environment"
            raise InputError(f"{where} has shape {array.shape}; expected {shape}, from {source}")
    actions, slack = data["actions"], 1e-3 * (high - low)
    bounds = " to ".join(f"[{', '.join(map(str, bound))}]" for bound in (low, high))
    bounds = f"expected within the environment's bounds {bounds}"
    refuse_rows(f"dataset {path}: actions", actions, (actions < low - slack) | (actions > high + slack), bounds)


def check_numbers(array, where):
    """Raises InputError, which begins with `where`, unless `array` holds numbers that are finite, in float32 too."""
    if array.dtype.kind not in "fiub":
        raise InputError(f"{where} has dtype {array.dtype}; expected numbers")
    if array.dtype.kind == "f":
        refuse_rows(where, array, ~(np.abs(array) <= np.finfo(np.float32).max), "expected finite float32 numbers")


def refuse_rows(where, array, bad, expected):
    """Raises InputError with the index and the value of the first element of `array` where `bad` is true, if any is."""
    if bad.any():
        index = tuple(np.argwhere(bad)[0].tolist())
        raise InputError(f"{where}{list(index)} = {array[index]}; {expected}")


def split_episodes(data):
    """(start, stop) of every episode in the arrays of a dataset file, and next_observations (N, O).

    An episode ends where terminal, at a timeout, and where the next row's observation is not this row's next one.
    Without next_observations in the file they are the following rows, at a terminal the row itself (no value follows);
    at a timeout, and at the end of the file, none is known and the transition is dropped.
    NOTE(differs): the last transition is kept when its next observation is known (released: always dropped).
    """
    observations, terminals = data["observations"], data["terminals"].astype(bool)
    ends = terminals | data["timeouts"].astype(bool)
    ends[-1] = True
    if "next_observations" in data:
        next_observations, known = data["next_observations"], np.ones(len(ends), bool)
        following, expected = (stacked(rows) for rows in (observations[1:], next_observations[:-1]))  # of one precision
        ends[:-1] |= np.linalg.norm((following - expected).reshape(len(ends) - 1, -1), axis=1) > 1e-6
    else:
        following, known = np.concatenate([observations[1:], observations[-1:]]), terminals | ~ends
        next_observations = np.where(terminals.reshape(-1, *[1] * (observations.ndim - 1)), observations, following)
    stops = np.flatnonzero(ends) + 1
    starts, stops = np.concatenate([[0], stops[:-1]]), np.where(known[stops - 1], stops, stops - 1)
    return [(start, stop) for start, stop in zip(starts, stops, strict=True) if stop > start], next_observations


def load_dataset(
    env_id, dataset_path=None, reward_scale=1.0, reward_bias=0.0, discount=0.99, sparse=False, image_size=0, env=None
):
    """The dataset of `env_id` as a ReplayBuffer of rewards * scale + bias; its `sha256` is the file's.

    The file (HDF5 or npz) has observations (N, O), actions (N, A) in the environment's own units, rewards, terminals,
    timeouts (N,), and optionally next_observations (N, O). sparse: an episode is split where the scaled
    reward reaches 0, which is success; what follows is another. image_size: observations are images, (N, image_size,
    image_size, 3) uint8. env: that of `make_env`, else made here. Raises InputError naming file, key and bad index.
    """
    path, module = dataset_file(env_id, dataset_path, image_size), family_module(env_id)
    env = env or make_env(env_id, image_size=image_size)
    try:
        data = module.read_dataset(env_id, path) if module else read_dataset(path)
        check_dataset(data, path, env)
    except InputError as error:
        if dataset_path is not None:
            raise
        raise InputError(f"{error}; delete it, and it is made or downloaded again") from error
    low, high = action_bounds(env)
    actions = 2 * (data["actions"] - low) / (high - low) - 1
    rewards = data["rewards"].astype(np.float64) * reward_scale + reward_bias
    check_numbers(rewards, f"--reward-scale {reward_scale} --reward-bias {reward_bias}: reward")
    data["terminals"] = data["terminals"].astype(bool)
    if sparse:
        if (data["terminals"] & (rewards < 0)).any():
            hint = "a failure that ends an episode costs one step, which pays; let it go on to its time limit"
            print(f"warning: {path}: terminals without success, with --sparse-reward: {hint}", file=sys.stderr)
        data["terminals"] |= rewards >= 0
    if sparse and rewards.max() < 0:
        hint = "no success anywhere: no reward * scale + bias reaches 0; expected success to pay 0"
        print(f"warning: {path}: {hint}", file=sys.stderr)
    elif not np.any(data["terminals"]):
        hint = "no terminal anywhere: every episode counts as one cut short by a time limit"
        print(f"warning: {path}: {hint}", file=sys.stderr)
    shape = env.observation_space.shape
    buffer = ReplayBuffer(shape, env.action_space.shape[0], np.uint8 if image_size else np.float32)
    buffer.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    episodes, next_observations = split_episodes(data)
    if not episodes:
        raise InputError(f"dataset {path}: no transition has a next observation; expected at least 1")
    for start, stop in episodes:
        masks = 1.0 - data["terminals"][start:stop]
        returns = mc_returns(rewards[start:stop], masks, discount, sparse)
        observations = np.concatenate([data["observations"][start:stop], next_observations[stop - 1 : stop]])
        buffer.add_episode(observations, actions[start:stop], rewards[start:stop], masks, returns)
    return buffer


# ======================================== EVALUATION ========================================

EVALUATION_SEED = 1_000_000  # evaluation episodes are reset with this and the integers after it


def run_episodes(envs, act, seeds, batch_size=0, video_dir=None):
    """One episode per seed, each run to its end; the result does not depend on how many `envs` there are.

    act(obs (N, O), keys) -> actions (N, A) in [-1, 1]; keys[i] = (episode seed, step) seeds what is random in row i.
    Returns, in the order of `seeds`, dicts of observations (L + 1, O), actions (L, A), raw rewards (L,), masks (L,) and
    success (at any step). Observations are float32, or images as they are.
    batch_size: fill up obs to so many rows, for an act() whose rounding depends on their number.
    """
    episodes = [{"observations": [], "steps": [], "success": False, "frames": []} for _ in seeds]
    waiting = [deque(range(i, len(seeds), len(envs))) for i in range(len(envs))]  # who runs what is settled beforehand
    running = {}  # environment -> episode
    while any(waiting) or running:
        for i, env in enumerate(envs):
            if i not in running and waiting[i]:
                running[i] = waiting[i].popleft()
                episodes[running[i]]["observations"].append(env.reset(seed=int(seeds[running[i]]))[0])
        obs = stacked([episodes[j]["observations"][-1] for j in running.values()])
        keys = [(int(seeds[j]), len(episodes[j]["steps"])) for j in running.values()]
        padding = max(0, batch_size - len(obs))
        actions = act(np.concatenate([obs, obs[:1].repeat(padding, 0)]), keys + keys[:1] * padding)[: len(obs)]
        for (i, j), action in zip(list(running.items()), actions, strict=True):
            obs, reward, terminated, truncated, info = envs[i].step(action)
            episodes[j]["observations"].append(obs)
            episodes[j]["steps"].append((action, float(reward), 1.0 - terminated))
            episodes[j]["success"] |= info["success"]
            if video_dir:
                episodes[j]["frames"].append(envs[i].render())
            if terminated or truncated:
                del running[i]
    for seed, episode in zip(seeds, episodes, strict=True):
        frames = episode.pop("frames")
        if video_dir:
            Path(video_dir).mkdir(parents=True, exist_ok=True)
            imageio.mimwrite(Path(video_dir) / f"episode-{seed}.mp4", frames, fps=12)
        steps = zip(*episode.pop("steps"), strict=True)
        episode["observations"] = stacked(episode["observations"])
        episode |= {name: np.stack(values) for name, values in zip(("actions", "rewards", "masks"), steps, strict=True)}
    return episodes


def stacked(observations):
    """Observations as one array, float32, or uint8 where they are images."""
    array = np.asarray(observations)
    return array if array.dtype == np.uint8 else array.astype(np.float32, copy=False)


def evaluate(envs, act, num_episodes, prefix="eval/"):
    """Means over `num_episodes` fixed seeds: {prefix + success_rate, return, length, steps_to_goal}, the last over
    successful episodes only and absent where there are none; {} for 0 episodes. envs, act: see `run_episodes`."""
    if num_episodes == 0:
        return {}
    batch_size = 10 if len(envs) > 1 else 1  # one robot does not wait for ten states' actions
    episodes = run_episodes(envs, act, EVALUATION_SEED + np.arange(num_episodes), batch_size=batch_size)
    lengths = {success: [len(e["rewards"]) for e in episodes if e["success"] == success] for success in (True, False)}
    means = {"success_rate": len(lengths[True]) / num_episodes, "length": np.mean(lengths[True] + lengths[False])}
    means |= {"return": np.mean([e["rewards"].sum() for e in episodes])}
    means |= {"steps_to_goal": np.mean(lengths[True])} if lengths[True] else {}
    if prefix == "eval/" and envs[0].has_wrapper_attr("normalized_score"):
        score = envs[0].get_wrapper_attr("normalized_score")  # D4RL's, in percent, of an episode's rewards
        means |= {"normalized_score": np.mean([score(e["rewards"]) for e in episodes])}
    return {prefix + name: float(value) for name, value in means.items()}


def max_env_steps(env, args):
    """Environment steps of the online phase: --online-steps, and no more than --online-episodes can take."""
    steps, episodes = (math.inf if n is None else n for n in (args.online_steps, args.online_episodes))
    limit = env.get_wrapper_attr("_max_episode_steps") if env.has_wrapper_attr("_max_episode_steps") else 1000
    return min(steps, episodes * limit)


# ======================================== THE FILES OF A RUN ========================================

COLUMNS = """
    phase gradient_step env_step episode
    eval/success_rate eval/return eval/length eval/steps_to_goal eval/normalized_score
    eval/policy_success_rate eval/policy_return eval/policy_length eval/policy_steps_to_goal
    train/return train/success train/length train/regret
    critic/loss critic/td_loss critic/cql_loss critic/q_data critic/q_policy critic/q_minus_mc critic/calibration_rate
    policy/bc_loss policy/distill_loss
    opt/q_before opt/q_after opt/improvement opt/candidate_entropy opt/grad_norm opt/l1_move opt/tokens_changed
    time/steps_per_second time/critic_ms time/distill_ms time/act_ms
""".split()  # noqa: SIM905


MAY_CHANGE = {"dropout", "gradient_checkpointing", "images_per_forward", "targets_per_image"}  # how a policy is trained


def fixed_flags(args, flag):
    """What a checkpoint's numbers mean without a shape that says so: flags that loading it by `flag` must not change.

    The policy's own stand last in Args, after the four on learning that every policy has.
    """
    names = [field.name for field in dataclasses.fields(args)]
    fixed = ["normalize_obs", *names[names.index("policy_ema_rate") + 1 :]]
    if flag == "--resume":
        fixed += ["policy_checkpoint", "discount", "reward_scale", "reward_bias", "sparse_reward"]
        fixed += ["num_bins", "q_min", "q_max", "critic_image_size"]
    return [name for name in fixed if name in names and name not in MAY_CHANGE]


class Run:
    """The directory of one run, and all that must survive its being killed: `counters` and what `keep` was told.

    config.json, checkpoint.pt and curves.png are written under another name, fsynced and renamed; a row of metrics.csv
    is one write, and rows past the checkpoint are dropped on resume. Ctrl-C and SIGTERM set a flag that is read where a
    checkpoint may be taken: after an update, online at the end of an episode and its updates.

    silent: of several processes that do the same, one that reads a checkpoint but writes and prints nothing.
    agree(value): the value of the process that is not silent, on all of them, so that they stop together.
    """

    def __init__(self, args, script, obs_dim, act_dim, generator, silent=False, agree=lambda value: value):
        name = f"{args.env_id}__{script}__{args.seed}__{time.strftime('%y%m%d-%H%M%S')}"
        name = name.translate(str.maketrans("/:", "--"))
        self.directory = Path(args.resume or args.run_dir or f"runs/{name}")
        self.identity = dict(script=script, env_id=args.env_id, obs_dim=obs_dim, act_dim=act_dim)
        self.args, self.generator, self.kept, self.silent, self.agree = args, generator, {}, silent, agree
        self.rows, self.stop_signal, self.wandb = 0, None, None
        self.counters = dict.fromkeys("bc warmup offline distill env_step episode successes gradient_step".split(), 0)  # noqa: SIM905
        self.counters |= {"phase": "bc", "seconds": {}}
        self.wandb_id = uuid.uuid4().hex
        self.sums, self.counts, self.lap_start, self.lap_step = {}, {}, time.perf_counter(), 0

    def keep(self, **objects):
        """Objects with state_dict and load_state_dict, for checkpoints to hold under their names."""
        self.kept |= objects

    def load(self, path, flag, **objects):
        """Load `objects` from a checkpoint and return it. Raises InputError for another script, task, shape or flag."""
        if not Path(path).is_file():
            raise InputError(f"{flag} {path}: no such file; expected the checkpoint.pt of a run")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise InputError(f"{flag} {path}: not a checkpoint ({str(error).splitlines()[0]})") from error
        if not isinstance(checkpoint, dict):
            raise InputError(f"{flag} {path}: holds a {type(checkpoint).__name__}; expected the checkpoint.pt of a run")
        for name, expected in self.identity.items():
            if checkpoint.get(name) != expected:
                raise InputError(f"{flag} {path}: {name} is {checkpoint.get(name)} there; expected {expected}")
        for name in fixed_flags(self.args, flag):
            there, here = checkpoint["args"].get(name), getattr(self.args, name)
            if there != here:
                flag_there = f"--{name.replace('_', '-')} is {there!r} there and {here!r} here"
                raise InputError(f"{flag} {path}: {flag_there}; expected the same")
        for name, item in objects.items():
            try:
                item.load_state_dict(checkpoint[name])
            except (RuntimeError, ValueError, KeyError) as error:
                reason = f"{name} differs in shape, {str(error).splitlines()[-1].strip()}"
                raise InputError(f"{flag} {path}: {reason}; expected the flags in its run's config.json") from error
        return checkpoint

    def begin(self, dataset_sha256=None):
        """Make the directory, or with --resume go on from its checkpoint. Returns the counters."""
        if not self.args.eval_only:  # which needs no data
            self.identity["dataset_sha256"] = dataset_sha256
        header = [",".join(COLUMNS)]
        if self.args.resume:
            checkpoint = self.load(self.directory / "checkpoint.pt", "--resume", **self.kept)
            self.counters, self.sums, self.counts = (checkpoint[name] for name in ("counters", "sums", "counts"))
            self.check_phases(checkpoint["args"])
            self.rows, self.wandb_id = checkpoint["rows"], checkpoint["wandb_id"]
            self.lap_step = self.counters["gradient_step"]
            self.generator.bit_generator.state = json.loads(checkpoint["numpy_rng"])
            torch.set_rng_state(checkpoint["torch_rng"])
            if torch.cuda.is_available() and len(checkpoint["cuda_rng"]):
                torch.cuda.set_rng_state(checkpoint["cuda_rng"])
            header = (self.directory / "metrics.csv").read_text().splitlines()[: self.rows + 1]
        if self.args.eval_only:
            return self.counters
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        if self.silent:
            return self.counters
        if not self.args.resume and (self.directory / "metrics.csv").exists():
            raise InputError(f"--run-dir {self.directory}: holds a run; expected a new folder, or --resume to go on")
        self.directory.mkdir(parents=True, exist_ok=True)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium")}
        self.config = {**vars(self.args), **self.identity, "python": sys.version.split()[0], **versions}
        self.replace("config.json", lambda file: file.write(json.dumps(self.config, indent=2).encode()))
        self.replace("metrics.csv", lambda file: file.write("".join(line + "\n" for line in header).encode()))
        flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in vars(self.args).items())
        print(textwrap.fill(flags, 118, break_on_hyphens=False), flush=True)
        if self.args.track:
            self.try_wandb(self.start_wandb)
        if self.args.resume:
            print(f"resumed in phase {self.counters['phase']} after {self.lap_step} updates")
        self.save()
        return self.counters

    def check_phases(self, saved):
        """Raises InputError where a flag asks for more steps of a phase that the run has left behind."""
        for phase, name in (("bc", "bc_steps"), ("offline", "offline_steps"), ("distill", "offline_distill_steps")):
            if self.counters["phase"] == phase:
                break
            if getattr(self.args, name) > saved[name]:
                flag = f"--{name.replace('_', '-')} {getattr(self.args, name)}"
                reason = f"expected at most its {saved[name]}; it is in {self.counters['phase']}"
                raise InputError(f"{flag} with --resume {self.directory}: {reason}")

    def save(self):
        """Write checkpoint.pt: tensors, numbers and strings alone, for torch.load(weights_only=True)."""
        self.check_finite()
        if self.silent:
            return
        cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0)
        checkpoint = {name: item.state_dict() for name, item in self.kept.items()} | self.identity
        checkpoint |= dict(
            args=vars(self.args), counters=self.counters, sums=self.sums, counts=self.counts, rows=self.rows
        )
        checkpoint |= dict(numpy_rng=json.dumps(self.generator.bit_generator.state), torch_rng=torch.get_rng_state())
        checkpoint |= dict(cuda_rng=cuda_rng, wandb_id=self.wandb_id)
        self.replace("checkpoint.pt", lambda file: torch.save(checkpoint, file))

    def replace(self, name, write):
        with open(self.directory / f".{name}.partial", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(self.directory / name)

    def on_signal(self, number, frame):
        if self.stop_signal:  # the second one does not wait
            raise KeyboardInterrupt
        self.stop_signal = signal.Signals(number).name
        if not self.silent:
            after = "the update or evaluation in progress; again: at once"
            print(f"{self.stop_signal}: stopping after {after}", file=sys.stderr)

    def average(self, info):
        """Add named scalars to the means in the next row. Tensors stay on their device until then."""
        for name, value in info.items():
            self.sums[name], self.counts[name] = self.sums.get(name, 0.0) + value, self.counts.get(name, 0) + 1

    @contextlib.contextmanager
    def timed(self, name):
        """Average the milliseconds that the block takes, as column `name`."""
        began = time.perf_counter()
        yield
        self.average({name: 1000 * (time.perf_counter() - began)})

    def check_finite(self):
        for name, value in self.sums.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is not finite; the last good checkpoint is in {self.directory}")

    def log(self, info):
        """One row of metrics.csv: where the run is, the means since the last row, and `info`."""
        done, seconds = self.counters, time.perf_counter() - self.lap_start
        done["seconds"][done["phase"]] = done["seconds"].get(done["phase"], 0.0) + seconds
        row = {name: done[name] for name in COLUMNS[:4]}
        row |= {"time/steps_per_second": (done["gradient_step"] - self.lap_step) / seconds}
        row |= {name: float(self.sums[name]) / self.counts[name] for name in self.sums}
        row |= {name: float(value) for name, value in info.items()}
        if unknown := set(row) - set(COLUMNS):
            raise KeyError(f"not columns of metrics.csv: {sorted(unknown)}")
        cells = [f"{row[name]:.6g}" if isinstance(row.get(name), float) else str(row.get(name, "")) for name in COLUMNS]
        if not self.silent:
            with open(self.directory / "metrics.csv", "a") as file:
                file.write(",".join(cells) + "\n")
        rates = {"optimised": row.get("eval/success_rate"), "raw policy": row.get("eval/policy_success_rate")}
        if evaluated := [f"{name} {rate:.0%}" for name, rate in rates.items() if rate is not None]:
            tqdm.write(f"{row['phase']}, update {row['gradient_step']}: success of {', '.join(evaluated)}")
        self.rows, self.sums, self.counts = self.rows + 1, {}, {}
        self.lap_start, self.lap_step = time.perf_counter(), done["gradient_step"]
        if self.wandb:
            self.try_wandb(lambda: self.wandb.log(row))

    def steps(self, phase, num_steps, evaluate, info=dict):
        """The steps of a phase that are left. After the body of each: count it; log, evaluate, save, stop where due.

        evaluate() and info() return more columns: the one every --eval-every steps, the other for every row.
        """
        done = self.counters
        if done[phase] < num_steps:
            done["phase"] = phase
        with tqdm(total=num_steps, initial=done[phase], desc=phase, disable=self.silent or None) as bar:
            while done[phase] < num_steps:
                yield done[phase]
                done[phase], done["gradient_step"] = done[phase] + 1, done["gradient_step"] + 1
                bar.update()
                due = done[phase] % self.args.eval_every == 0 or done[phase] == num_steps
                if logged := due or done[phase] % self.args.log_every == 0:
                    self.check_finite()
                    self.log({**info(), **(evaluate() if due else {})})
                self.save_if(logged)

    def episodes(self, evaluate, info):
        """The online episodes that are left, as seeds for their resets. The body calls `record`; else as `steps`."""
        done, args = self.counters, self.args
        max_steps, max_episodes = (math.inf if n is None else n for n in (args.online_steps, args.online_episodes))
        hide = self.silent or None
        with tqdm(total=args.online_steps, initial=done["env_step"], desc="online", disable=hide) as bar:
            while done["env_step"] < max_steps and done["episode"] < max_episodes:
                done["phase"] = "online"
                yield reset_seed(args.seed, 3, done["episode"])
                before, length = done["env_step"], self.episode["train/length"]
                done["env_step"], done["episode"] = before + length, done["episode"] + 1
                done["successes"] += int(self.episode["train/success"])
                bar.update(length)
                due = before // args.eval_every < done["env_step"] // args.eval_every
                due |= done["env_step"] >= max_steps or done["episode"] >= max_episodes
                self.episode["train/regret"] = 1 - done["successes"] / done["episode"]
                self.check_finite()
                self.log({**self.episode, **info(), **(evaluate() if due else {})})
                self.save_if(True)

    def warmups(self, num_episodes):
        """The episodes before offline RL that are left, as seeds for their resets. The body calls `record`."""
        done = self.counters
        for index in tqdm(range(done["warmup"], num_episodes), "warmup", disable=self.silent or None):
            done["phase"] = "warmup"
            yield reset_seed(self.args.seed, 2, index)
            done["warmup"] += 1
            self.log(self.episode)
            self.save_if(True)

    def save_if(self, due):
        stop_signal = self.agree(self.stop_signal)
        if due or stop_signal:
            self.save()
        if stop_signal:
            self.finish()
            if not self.silent:
                print(f"stopped by {stop_signal}; to go on: --resume {self.directory}")
            sys.exit(0)

    def record(self, episode, num_updates):
        """What an online episode was, and how many critic updates followed it."""
        self.counters["gradient_step"] += num_updates
        self.episode = {"train/length": len(episode["rewards"]), "train/return": episode["rewards"].sum()}
        self.episode["train/success"] = episode["success"]

    def start_wandb(self):
        import wandb

        name = dict(name=self.directory.name, id=self.wandb_id, dir=self.directory, resume="allow")
        self.wandb = wandb.init(
            project=self.args.wandb_project, entity=self.args.wandb_entity, config=self.config, **name
        )

    def try_wandb(self, call):
        try:
            call()
        except Exception as error:  # whatever wandb raises: a failing tracker never stops a run
            print(f"warning: --track: wandb failed ({error}); the run goes on without it", file=sys.stderr)
            self.wandb = None

    def finish(self):
        """Draw curves.png, print the phases, close wandb."""
        if self.silent:
            return
        rows = read_metrics(self.directory / "metrics.csv")
        self.replace("curves.png", lambda file: plot_curves(rows).savefig(file, dpi=120))
        print(f"{'phase':<10}{'policy':<12}{'success':>8}{'steps to goal':>15}{'minutes':>9}")
        for phase, row in {row["phase"]: row for row in rows if "eval/policy_success_rate" in row}.items():
            for name, prefix in (("raw", "eval/policy_"), ("optimised", "eval/")):
                if prefix + "success_rate" in row:
                    steps, minutes = row.get(prefix + "steps_to_goal", math.nan), self.counters["seconds"][phase] / 60
                    print(f"{phase:<10}{name:<12}{row[prefix + 'success_rate']:>8.0%}{steps:>15.1f}{minutes:>9.1f}")
        print(f"in {self.directory}")
        if self.wandb:
            self.try_wandb(self.wandb.finish)


def reset_seed(seed, phase, index):
    """Of an episode's environment, from the run's seed, the phase's number and the episode's index in it."""
    return int(np.random.SeedSequence([seed, phase, index]).generate_state(1)[0])


def read_metrics(path):
    """metrics.csv as a list of dicts: numbers as float, empty cells absent, the phase as text."""
    with open(path, newline="") as file:
        return [{k: v if k == "phase" else float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def plot_curves(rows):
    """A matplotlib figure of success rate, steps to goal and values over the run's updates, the phases marked."""
    panels = {
        "success rate": {
            "eval/success_rate": "optimised policy",
            "eval/policy_success_rate": "raw policy",
            "train/success": "online episodes",
        },
        "steps to goal": {"eval/steps_to_goal": "optimised policy", "eval/policy_steps_to_goal": "raw policy"},
        "value Q(s, a)": {"opt/q_after": "optimised", "opt/q_before": "policy's samples", "critic/q_data": "data's"},
    }
    figure = matplotlib.figure.Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for axis, (label, columns) in zip(axes, panels.items(), strict=True):
        for column, name in columns.items():
            points = [(row["gradient_step"], row[column]) for row in rows if column in row]
            line = "" if column == "train/success" else "-"
            axis.plot([x for x, _ in points], [y for _, y in points], marker=".", linestyle=line, label=name)
        for before, row in pairwise([{"phase": "", "gradient_step": 0}, *rows]):
            if row["phase"] != before["phase"]:
                axis.axvline(before["gradient_step"], color="0.6", linestyle=":")
                axes[0].annotate(row["phase"], (before["gradient_step"], 1.03), xycoords=("data", "axes fraction"))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes[0].set_ylim(-0.03, 1.03)
    axes[-1].set_xlabel("updates (cloning, then critic)")
    return figure


def main(train, args_class, presets, description):
    """Parse the command line and train. A flag given wins over the run's that is resumed, or the family's preset."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id", default=args_class.env_id)
    first.add_argument("--resume", default="")
    first.add_argument("--online-steps", "--online_steps")
    first.add_argument("--online-episodes", "--online_episodes")
    given, _ = first.parse_known_args()
    defaults = {"env_id": given.env_id, **presets.get(family(given.env_id)[0], {})}
    try:
        if given.resume:
            config = Path(given.resume) / "config.json"
            if not config.is_file():
                raise InputError(f"--resume {given.resume}: no config.json there; expected the directory of a run")
            try:
                saved = json.loads(config.read_text())
                defaults = {field.name: saved[field.name] for field in dataclasses.fields(args_class)}
            except (ValueError, KeyError) as error:
                raise InputError(
                    f"--resume {given.resume}: config.json is not one of this script's ({error})"
                ) from error
            defaults = {name: tuple(x) if isinstance(x, list) else x for name, x in defaults.items()}
        if given.online_steps or given.online_episodes:  # the one that is given counts alone
            defaults |= {"online_steps": None, "online_episodes": None}
        train(tyro.cli(args_class, default=args_class(**defaults), description=description))
    except (InputError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
