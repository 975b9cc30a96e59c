"""robomimic's layout of a dataset (Mandlekar et al., 2021, https://arxiv.org/abs/2108.03298): a group for each
demonstration, data/demo_N, with actions (L, A), rewards, dones (L,), obs/KEY (L, ...), and optionally next_obs/KEY.

`dones` mark success, the end of a demonstration, or both, as the file was made. So a done that pays is a terminal; one
that does not, at the end of a demonstration without success, is a time limit.
"""

import math
import re

import gymnasium as gym
import h5py
import numpy as np

from common import InputError
from envs import files


def has_layout(path):
    """Whether `path` is an HDF5 file with data/demo_N."""
    try:
        with h5py.File(path, "r") as file:
            return isinstance(file.get("data"), h5py.Group) and bool(demonstrations(file))
    except files.UNREADABLE:
        return False  # files.read_dataset says what is wrong with it


def demonstrations(file):
    """The groups data/demo_N, in the order of their numbers."""
    demos = [name for name in file["data"] if re.fullmatch(r"demo_\d+", name)]
    names = [name for name in demos if file["data"].get(name, getclass=True) is h5py.Group]
    return [file["data"][name] for name in sorted(names, key=lambda name: int(name[5:]))]


def read_dataset(path, obs_keys):
    """The arrays of envs/files.py. An observation is that of the obs_keys, in their order, flat and end to end; that of
    a single key is left as it is where it is an image. Raises InputError, naming demonstration and key."""
    where = f"dataset {path}"
    try:
        with h5py.File(path, "r") as file:
            demos = demonstrations(file)
            for demo in demos:
                check_keys(demo, where, obs_keys)
            has_next = all(f"next_obs/{key}" in demo for demo in demos for key in obs_keys)
            episodes = [read_demonstration(demo, where, obs_keys, has_next) for demo in demos]
            return {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}
    except InputError:
        raise
    except files.UNREADABLE as error:
        raise InputError(f"{where}: cannot be read as robomimic's ({files.one_line(error)})") from error


def check_keys(demo, where, obs_keys):
    """Raises InputError, with the keys that there are, unless some were asked for and a demonstration has them."""
    there = list(demo.get("obs", ()))
    if there and not hasattr(demo["obs"], "keys"):
        raise InputError(f"{where}: {demo.name}/obs is an array; expected a group of them")
    hint = f"expected some of {', '.join(there) or 'none: it has no obs'}"
    if not obs_keys:
        raise InputError(f"{where} is in robomimic's layout, and --obs-keys is not given; {hint}")
    if missing := [key for key in obs_keys if key not in there]:
        raise InputError(f"--obs-keys {' '.join(obs_keys)}: {where}: {demo.name} has no obs/{missing[0]}; {hint}")


def check_order(space, obs_keys):
    """Raises InputError where an environment's observation space has the obs_keys in another order."""
    if isinstance(space, gym.spaces.Dict) and sorted(space) == sorted(obs_keys) and list(space) != list(obs_keys):
        expected = f"expected {' '.join(space)}, as the environment has them"
        raise InputError(f"--obs-keys {' '.join(obs_keys)}: observations are in another order; {expected}")


def read_demonstration(demo, where, obs_keys, has_next):
    """The arrays of envs/files.py of one demonstration, up to its first terminal."""
    length = len(read_rows(demo, "actions", where))
    columns = {key: read_rows(demo, key, where, length) for key in ("actions", "rewards", "dones")}
    for key in ("rewards", "dones"):
        files.check_numbers(columns[key], f"{where}: {demo.name}: {key}")
        if columns[key].ndim != 1:
            shape = columns[key].shape
            raise InputError(f"{where}: {demo.name}: {key} has shape {shape}; expected ({length},), one number a row")
    names = {"observations": "obs", "next_observations": "next_obs"} if has_next else {"observations": "obs"}
    for name, group in names.items():
        columns[name] = end_to_end([read_rows(demo, f"{group}/{key}", where, length) for key in obs_keys])
    terminals = (columns.pop("dones") != 0) & (columns["rewards"] > 0)
    stop = terminals.argmax() + 1 if terminals.any() else length
    columns |= {"terminals": terminals, "timeouts": np.arange(length) == length - 1}
    return {key: array[:stop] for key, array in columns.items()}


def read_rows(demo, key, where, length=None):
    """The array `key` of a demonstration, of `length` rows where that is known. Raises InputError."""
    array = demo.get(key)
    if not isinstance(array, h5py.Dataset) or not array.shape:
        raise InputError(f"{where}: {demo.name} has no array {key}; expected one with a row for each step")
    if length is not None and len(array) != length:
        raise InputError(f"{where}: {demo.name}: {key} has {len(array)} rows; expected {length}, as actions")
    return array[()]


def end_to_end(parts):
    """Arrays (L, ...) as one, (L, O); a single one of images (L, height, width, 3) as it is."""
    if len(parts) == 1 and parts[0].ndim == 4:
        return parts[0]
    return np.concatenate([part.reshape(len(part), math.prod(part.shape[1:])) for part in parts], 1)
