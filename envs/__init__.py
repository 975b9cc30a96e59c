"""Environments and datasets by --env-id: `make` and `load_dataset`, the two calls of a script that need this folder.

Whatever the id, an environment has flat observations (O,) float32, or images (height, width, 3) uint8, actions (A,) in
[-1, 1], and info["success"] at every step; a dataset is a ReplayBuffer of the same observations and actions. A family
of environments is a module here that is imported when one of its ids is asked for; every other id is gymnasium's.
"""

import contextlib
import ctypes.util
import difflib
import hashlib
import importlib
import os
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from PIL import Image

import common
from common import InputError, ReplayBuffer, mc_returns
from envs import files

MODULES = {  # common.family(env_id): module of this folder
    "pointmaze": "pointmaze",
    "antmaze": "d4rl",
    "kitchen": "d4rl",
    "metaworld": "metaworld",
    "ogbench": "ogbench",
    "minari": "minari",
}


# ======================================== ENVIRONMENTS ========================================


def make(env_id, sparse=False, render=False, image_size=0):
    """The environment `env_id`: of a family, or any of gymnasium's (also "module:Id").

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
        else:
            env = make_gymnasium(env_id, render)
    except gym.error.Error as error:
        raise unknown_id(env_id, error, known_ids(), "a name like pointmaze-umaze-play, or a gymnasium id") from error
    except ModuleNotFoundError as error:
        expected = "expected an installed module, or one in a folder of PYTHONPATH"
        raise InputError(f"--env-id {env_id}: {error}; {expected}") from error
    low, high = check_actions(env_id, env.action_space)
    if not env.has_wrapper_attr("_max_episode_steps"):
        print(f"warning: {env_id} has no max_episode_steps: an episode that never ends hangs the run", file=sys.stderr)
    env = ImageObservation(env, env_id, image_size) if image_size else gym.wrappers.FlattenObservation(env)
    env = Success(env, sparse)
    rescaled = (low != -1).any() or (high != 1).any()
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)) if rescaled else env


def make_gymnasium(env_id, render):
    """gym.make(env_id). Raises InputError where `render` finds no render mode rgb_array."""
    # gymnasium-robotics would import the mujoco-py that comes with d4rl, which raises without MuJoCo 2.1
    sys.modules.setdefault("mujoco_py", None)
    env = gym.make(env_id)
    if not render:
        return env
    if "rgb_array" not in (env.metadata.get("render_modes") or []):
        raise InputError(f"--capture-video: {env_id} has no render mode rgb_array; expected it in its metadata")
    env.close()
    return gym.make(env_id, render_mode="rgb_array")


def check_actions(env_id, space):
    """The bounds (low, high) of an action space, each (A,). Raises InputError where they cannot be rescaled."""
    is_vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"
    if not is_vector or not space.is_bounded() or (space.low >= space.high).any():
        expected = "expected a bounded Box of one dimension, of floats, low below high"
        raise InputError(f"--env-id {env_id}: its action space is {space}; {expected}")
    return space.low, space.high


def action_bounds(env):
    """(low, high), each (A,): the units of actions in a dataset file for an environment of `make`."""
    inner = env.env if isinstance(env, gym.wrappers.RescaleAction) else env
    return inner.action_space.low, inner.action_space.high


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


# ======================================== DATASETS ========================================


def load_dataset(env_id, dataset_path=None, reward_scale=1.0, reward_bias=0.0, discount=0.99, sparse=False, env=None):
    """The dataset of `env_id` as a ReplayBuffer of rewards * scale + bias; its `sha256` is the file's.

    sparse: an episode is split where the scaled reward reaches 0, which is success; what follows is another. env: that
    of `make`, else made here; where it observes images, so does the dataset. What a file holds: see envs/files.py.
    Raises InputError naming file, key and bad index.
    """
    env = env or make(env_id)
    shape, (low, high) = env.observation_space.shape, action_bounds(env)
    is_image = len(shape) == 3
    path = dataset_file(env_id, dataset_path, image_size=shape[0] if is_image else 0)
    try:
        module = family_module(env_id)
        data = module.read_dataset(env_id, path) if module else files.read_dataset(path)
        files.check_dataset(data, path, shape, low, high)
    except InputError as error:
        if dataset_path is not None:
            raise
        raise InputError(f"{error}; delete it, and it is made or downloaded again") from error
    data["actions"] = 2 * (data["actions"] - low) / (high - low) - 1
    data["rewards"] = data["rewards"].astype(np.float64) * reward_scale + reward_bias
    files.check_numbers(data["rewards"], f"--reward-scale {reward_scale} --reward-bias {reward_bias}: reward")
    data["terminals"] = find_terminals(data, sparse, path)
    buffer = ReplayBuffer(shape, len(low), np.uint8 if is_image else np.float32)
    buffer.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    add_episodes(buffer, data, discount, sparse)
    if len(buffer) == 0:
        raise InputError(f"dataset {path}: no transition has a next observation; expected at least 1")
    return buffer


def dataset_file(env_id, dataset_path=None, image_size=0):
    """`dataset_path` where given, else the family's: found, downloaded, or made on first use in $PARL_CACHE.

    Raises InputError where there is neither.
    """
    if dataset_path is not None:
        return Path(dataset_path)
    if module := family_module(env_id):
        return module.dataset_file(env_id, image_size=image_size) if image_size else module.dataset_file(env_id)
    raise InputError(
        f"--env-id {env_id} has no embedded dataset: expected --dataset-path FILE (.hdf5 or .npz with "
        f"{', '.join(files.DATASET_KEYS[:5])}), or for none --offline-ratio 0 --bc-steps 0 (OpenVLA: --warmup-episodes)"
    )


def find_terminals(data, sparse, path):
    """The terminals (N,) bool of a dataset with scaled rewards: the file's, and where rewards are sparse each success.
    Warns, on stderr, of what makes little sense to learn from."""
    rewards, terminals = data["rewards"], data["terminals"].astype(bool)
    if sparse:
        if (terminals & (rewards < 0)).any():
            hint = "a failure that ends an episode costs one step, which pays; let it go on to its time limit"
            print(f"warning: {path}: terminals without success, with --sparse-reward: {hint}", file=sys.stderr)
        terminals = terminals | (rewards >= 0)
    if sparse and rewards.max() < 0:
        hint = "no success anywhere: no reward * scale + bias reaches 0; expected success to pay 0"
        print(f"warning: {path}: {hint}", file=sys.stderr)
    elif not terminals.any():
        hint = "no terminal anywhere: every episode counts as one cut short by a time limit"
        print(f"warning: {path}: {hint}", file=sys.stderr)
    return terminals


def add_episodes(buffer, data, discount, sparse):
    """Adds the episodes of a dataset, its actions in [-1, 1] and its rewards scaled, with their returns-to-go."""
    episodes, next_observations = files.split_episodes(data)
    for start, stop in episodes:
        rewards, masks = data["rewards"][start:stop], 1.0 - data["terminals"][start:stop]
        returns = mc_returns(rewards, masks, discount, sparse)
        observations = np.concatenate([data["observations"][start:stop], next_observations[stop - 1 : stop]])
        buffer.add_episode(observations, data["actions"][start:stop], rewards, masks, returns)


# ======================================== FAMILIES ========================================


def family_module(env_id):
    """The module of this folder that makes env_id, imported now; None for a plain gymnasium id. It has

    IDS               the ids it knows
    make(env_id, render) -> gymnasium environment with its time limit and info["success"] at every step
    dataset_file(env_id) -> path of its dataset: found, downloaded or made on first use
    read_dataset(env_id, path) -> the arrays of envs/files.py

    and where it has images, make_images(env_id, image_size) and dataset_file(env_id, image_size).
    Raises InputError naming the package that is missing.
    """
    family = common.family(env_id)
    if not family:
        return None
    try:
        return importlib.import_module(f"envs.{MODULES[family]}")
    except ModuleNotFoundError as error:
        is_ours = error.name.startswith("envs.")
        missing = f"{error.name.replace('.', '/')}.py" if is_ours else f"pip install {error.name}"
        raise InputError(f"--env-id {env_id}: {error}; expected {missing}") from error


def known_ids():
    """Every --env-id by name: those of the families that are installed, and gymnasium's. Takes seconds."""
    ids = []
    for name in dict.fromkeys(MODULES.values()):
        with contextlib.suppress(ModuleNotFoundError, InputError):
            ids += importlib.import_module(f"envs.{name}").IDS
    return ids + list(gym.registry)


def unknown_id(env_id, reason, ids, expected):
    """The InputError for an --env-id that is not among `ids`: with those that are like it, else with `expected`."""
    near = difflib.get_close_matches(env_id, ids, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"expected {expected}"
    return InputError(f"--env-id {env_id}: {reason}; {hint}")


def no_opengl(error):
    """The InputError for what a missing OpenGL library raises."""
    return InputError(
        f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: no OpenGL ({' '.join(str(error).split())}); expected Debian's "
        "libegl1 and libgl1 for egl (the default), or libosmesa6 for osmesa"
    )
