"""Environments and datasets by --env-id: `make` and `load_dataset`, the two calls of a script that need this folder.

Whatever the id, an environment has flat observations (O,) float32, or images (height, width, 3) uint8, actions (A,) in
[-1, 1], and info["success"] at every step; a dataset is a ReplayBuffer of the same observations and actions. A family
of environments is a module here that is imported when one of its ids is asked for; every other id is gymnasium's.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib
import io
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from PIL import Image

import common
from common import InputError, ReplayBuffer
from envs import files, opengl, robomimic
from envs.files import one_line

MODULES = {  # common.family(env_id): module of this folder
    "pointmaze": "pointmaze",
    "pointmaze_large": "pointmaze",
    "antmaze": "d4rl",
    "kitchen": "d4rl",
    "metaworld": "metaworld",
    "ogbench": "ogbench",
    "minari": "minari",
    "minari_maze": "minari",
}


# ======================================== ENVIRONMENTS ========================================


def make(env_id, sparse=False, render=False, image_size=0):
    """The environment `env_id`: of a family, or any of gymnasium's (also "module:Id").

    Its observations are flat (O,), dicts in the order of their space's keys, or with an image_size camera images
    (image_size, image_size, 3) uint8; its actions (A,) are rescaled to [-1, 1]; it is wrapped in Success, and where
    rewards are sparse ends at the first one. Raises InputError for an unknown id, with near misses, for an action space
    that is not a bounded Box of floats, for observations that are images where no image_size asks for them, and for
    images that it does not have or that cannot be drawn.
    """
    if render or image_size:
        opengl.choose()
    try:
        if module := family_module(env_id):
            draws = image_size and hasattr(module, "make_images")
            env = module.make_images(env_id, image_size) if draws else module.make(env_id, render)
        else:
            env = make_gymnasium(functools.partial(gym.make, env_id), render)
    except (gym.error.Error, ImportError) as error:
        raise not_made(env_id, error) from error
    low, high = check_actions(env_id, env.action_space)
    if not env.has_wrapper_attr("_max_episode_steps"):
        print(f"warning: {env_id} has no max_episode_steps: an episode that never ends hangs the run", file=sys.stderr)
    if image_size:
        env = ImageObservation(env, env_id, image_size)
    else:
        check_observations(env_id, env.observation_space)
        env = gym.wrappers.FlattenObservation(env)
    env = Success(env, sparse)
    rescaled = (low != -1).any() or (high != 1).any()
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)) if rescaled else env


def make_gymnasium(make, render):
    """make(), or with `render` make(render_mode="rgb_array"). Raises InputError where that cannot be drawn."""
    # gymnasium-robotics would import the mujoco-py that comes with d4rl, which raises without MuJoCo 2.1
    sys.modules.setdefault("mujoco_py", None)
    with opengl.optional():
        env = make()
    if not render:
        return env
    if "rgb_array" not in (env.metadata.get("render_modes") or []):
        raise InputError(f"--capture-video: {env.spec.id} has no render mode rgb_array; expected it in its metadata")
    env.close()
    package = type(env.unwrapped).__module__.partition(".")[0]
    if hasattr(env.unwrapped, "mujoco_renderer") or package == "gymnasium_robotics":
        opengl.context()
    env = make(render_mode="rgb_array")
    if package in ("gymnasium", "gymnasium_robotics"):  # simulators, no robot: draw one now, for what may be missing
        env.reset(seed=0)
        env.render()
    return env


def check_observations(env_id, space):
    """Raises InputError unless observations flatten to a vector of numbers that are no image's."""
    if not space.is_np_flattenable:
        raise InputError(f"--env-id {env_id}: observations {one_line(space)}; expected a fixed number of numbers")
    if has_image(space):
        expected = "expected vectors of numbers; what reads images is parl_openvla.py"
        raise InputError(f"--env-id {env_id}: observations with images, {one_line(space)}; {expected}")


def has_image(space):
    """Whether there is an image, or a stack of them, in an observation space."""
    if isinstance(space, gym.spaces.Dict):
        return any(map(has_image, space.spaces.values()))
    if isinstance(space, gym.spaces.Tuple):
        return any(map(has_image, space.spaces))
    is_array = isinstance(space, gym.spaces.Box) and len(space.shape) >= 2
    return is_array and (space.dtype == np.uint8 or (len(space.shape) >= 3 and math.prod(space.shape) > 1000))


def check_actions(env_id, space):
    """The bounds (low, high) of an action space, each (A,). Raises InputError where they cannot be rescaled."""
    is_vector = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"
    with np.errstate(over="ignore"):
        is_bounded = is_vector and space.is_bounded() and np.isfinite(space.high - space.low).all()
    if not is_bounded or (space.low >= space.high).any():
        expected = "expected a bounded Box of one dimension, of floats, low below high"
        raise InputError(f"--env-id {env_id}: its action space is {one_line(space)}; {expected}")
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
        space = self.env.action_space  # RescaleAction can miss a bound by a rounding error
        obs, reward, terminated, truncated, info = self.env.step(np.clip(action, space.low, space.high))
        if np.size(reward) != 1:
            raise InputError(f"--env-id {self.spec.id}: its reward is {one_line(reward)}; expected one number")
        reward = float(np.asarray(reward).item())  # of shape (1,) as well
        if (terminated or truncated) and not {"success", "is_success"} & info.keys():
            reports = "its info has neither success nor is_success; an end that pays counts as success"
            common.warn_once(f"--env-id {self.spec.id}: {reports}")
        success = bool(info.get("success", info.get("is_success", terminated and reward > 0)))
        return obs, reward, bool(terminated or (success and self.ends)), truncated, {**info, "success": success}


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
                f"--env-id {env_id}: observations {one_line(space)}; "
                'expected a Dict with "image", uint8 (height, width, 3)'
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
        image = image if image.shape[:2] == size else Image.fromarray(image).resize(size, Image.BICUBIC)
        return np.array(image)  # of its own: an environment may fill one buffer again and again


# ======================================== DATASETS ========================================


def load_dataset(
    env_id, dataset_path=None, reward_scale=1.0, reward_bias=0.0, discount=0.99, sparse=False, env=None, obs_keys=()
):
    """The dataset of `env_id` as a ReplayBuffer of rewards * scale + bias; its `sha256` is the file's.

    dataset_path: a file, or "made", see `dataset_file`. sparse: an episode is split where the scaled reward reaches 0,
    which is success; what follows is another. env: that of `make`, else made here; where it observes images, so does
    the dataset. What a file holds: see envs/files.py, or with obs_keys envs/robomimic.py.
    Prints what was loaded. Raises InputError naming file, key and bad index.
    """
    env = env or make(env_id)
    shape, (low, high) = env.observation_space.shape, action_bounds(env)
    is_image = len(shape) == 3
    path = dataset_file(env_id, dataset_path, image_size=shape[0] if is_image else 0)
    module, made = family_module(env_id), path.parent == files.cache_folder()
    try:
        data = read_dataset(env_id, path, obs_keys)
        robomimic.check_order(env.unwrapped.observation_space, obs_keys)
        files.check_dataset(data, path, shape, low, high)
    except InputError as error:
        hint = "delete it, and it is made again" if made else getattr(module, "HOW_TO_REPLACE", "")
        is_own = dataset_path not in (None, common.MADE)
        raise InputError(f"{error}; {hint}" if hint and not is_own else str(error)) from error
    data["actions"] = 2 * (data["actions"] - low) / (high - low) - 1
    raw_rewards = data["rewards"].astype(np.float64)
    data["rewards"] = raw_rewards * reward_scale + reward_bias
    data["rewards"] = data["rewards"].round(6) if sparse else data["rewards"]  # as in common.scaled_rewards
    files.check_numbers(data["rewards"], f"--reward-scale {reward_scale} --reward-bias {reward_bias}: reward")
    if sparse:
        files.check_sparse(data["rewards"], reward_scale, reward_bias, path)
    data["terminals"] = files.find_terminals(data, sparse, path)
    buffer = ReplayBuffer(shape, len(low), np.uint8 if is_image else np.float32)
    buffer.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    buffer.note = getattr(module, "NOTE_ON_MADE", "") if made else ""
    episodes = files.add_episodes(buffer, data, discount, sparse)
    if not episodes:
        raise InputError(f"dataset {path}: no transition has a next observation; expected at least 1")
    files.describe(data, episodes, raw_rewards, discount, sparse, path)
    if not module and env.has_wrapper_attr("_max_episode_steps"):
        files.warn_of_length(episodes, env.get_wrapper_attr("_max_episode_steps"), path)
    if buffer.note:
        print(f"note: {buffer.note}", file=sys.stderr)
    return buffer


def read_dataset(env_id, path, obs_keys):
    """The arrays of envs/files.py from a file in robomimic's layout, else in the family's or a plain one's. Raises
    InputError."""
    if robomimic.has_layout(path):
        return robomimic.read_dataset(path, obs_keys)
    module = family_module(env_id)
    data = module.read_dataset(env_id, path) if hasattr(module, "read_dataset") else files.read_dataset(path)
    if obs_keys:
        expected = "expected it only with data/demo_N/obs/KEY in an HDF5 file, robomimic's layout"
        raise InputError(f"--obs-keys {' '.join(obs_keys)}: dataset {path} has observations in one array; {expected}")
    return data


def dataset_file(env_id, dataset_path=None, image_size=0):
    """`dataset_path` where given, else the family's: found, downloaded, or made on first use in $PARL_CACHE.

    A dataset_path "made" is data that are made here in place of the family's. Raises InputError where there is neither.
    """
    module = family_module(env_id)
    if dataset_path == common.MADE:
        if not hasattr(module, "made_file"):
            expected = "expected it for OGBench's cubes and point mazes alone, or ./made for a file of that name"
            raise InputError(f"--dataset-path made: no data are made here in place of those of {env_id}; {expected}")
        return module.made_file(env_id)
    if dataset_path is not None:
        return Path(dataset_path).expanduser()
    if module:
        return module.dataset_file(env_id, image_size=image_size) if image_size else module.dataset_file(env_id)
    raise InputError(
        f"--env-id {env_id} has no dataset of its own: expected --dataset-path FILE (.hdf5 or .npz with "
        f"{', '.join(files.DATASET_KEYS[:5])}), or for none --offline-ratio 0 --bc-steps 0 (OpenVLA: --warmup-episodes)"
    )


# ======================================== FAMILIES ========================================


def family_module(env_id):
    """The module of this folder that makes env_id, imported now; None for a plain gymnasium id. It has

    IDS               the ids it knows
    make(env_id, render) -> gymnasium environment with its time limit and info["success"] at every step
    dataset_file(env_id) -> path of its dataset: found, downloaded or made on first use

    where its files have a layout of their own, read_dataset(env_id, path) -> the arrays of envs/files.py; where it has
    images, make_images(env_id, image_size) and dataset_file(env_id, image_size); where a file that is bad was not made
    here, HOW_TO_REPLACE it; and where others can be made in place of its own, made_file(env_id) and NOTE_ON_MADE, for
    whoever reads the results.
    Raises InputError naming the package that is missing, and for an id that is none of IDS, with near misses.
    """
    family = common.family(env_id)
    if not family:
        return None
    try:
        with opengl.optional():
            module = importlib.import_module(f"envs.{MODULES[family]}")
    except ModuleNotFoundError as error:
        is_ours = error.name.startswith("envs.")
        missing = f"{error.name.replace('.', '/')}.py" if is_ours else f"pip install {error.name}"
        if MODULES[family] in ("d4rl", "ogbench") and not is_ours:
            missing = "Python 3.11, or on a later one the line in docs/environments.md#python-versions"
        raise InputError(f"--env-id {env_id}: {error}; expected {missing}") from error
    if module.IDS and env_id not in module.IDS:  # Minari has a list of its own
        raise unknown_id(env_id, f"none of {MODULES[family]}'s ids", module.IDS, f"an id like {module.IDS[0]}")
    return module


def known_ids():
    """Every --env-id by name: those of the families that are installed, and gymnasium's. Takes seconds."""
    ids = []
    for name in dict.fromkeys(MODULES.values()):
        with opengl.optional(), contextlib.suppress(ModuleNotFoundError):
            ids += importlib.import_module(f"envs.{name}").IDS
    return ids + list(latest_versions().values())


def latest_versions():
    """{(namespace, name): --env-id} of gymnasium's registry, and of gymnasium-robotics'."""
    with opengl.optional(), contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):
        import gymnasium_robotics  # noqa: F401  registers its ids, and prints a notice
    latest = {}
    for spec in sorted(gym.registry.values(), key=lambda spec: spec.version or 0):
        module = "gymnasium_robotics:" if str(spec.entry_point).startswith("gymnasium_robotics.") else ""
        latest[spec.namespace, spec.name] = module + spec.id
    return latest


def not_made(env_id, error):
    """The InputError for what gymnasium raises: the id that is meant, or the package that is missing."""
    if isinstance(error, ImportError | gym.error.DependencyNotInstalled):
        spec, expected = gym.registry.get(env_id.rpartition(":")[2]), "expected that package"
        latest = latest_versions()[spec.namespace, spec.name] if spec else ""
        if spec and not latest.endswith(spec.id):
            expected = f"expected its current version, {latest}"
        elif isinstance(error, ModuleNotFoundError):
            expected = "expected an installed module, or one in a folder of PYTHONPATH"
        reason = one_line(" ".join(map(str, error.args))).rstrip(".")
        return InputError(f"--env-id {env_id}: {reason}; {expected}")
    return unknown_id(env_id, one_line(error), known_ids(), "a name like pointmaze-umaze-play, or a gymnasium id")


def unknown_id(env_id, reason, ids, expected):
    """The InputError for an --env-id that is not among `ids`: with those that are like it, else with `expected`."""
    names = {known.rpartition(":")[2]: known for known in ids}
    near = difflib.get_close_matches(env_id.rpartition(":")[2], names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(names[name] for name in near)}?" if near else f"expected {expected}"
    return InputError(f"--env-id {env_id}: {reason.rstrip('.')}; {hint}")


@contextlib.contextmanager
def drawing_from(generator):
    """Within the block numpy's global generator goes on as `generator`, a RandomState; after it, as it was before."""
    outer = np.random.get_state()
    np.random.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(np.random.get_state())
        np.random.set_state(outer)
