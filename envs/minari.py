"""Minari's datasets (https://minari.farama.org) and the environments they were recorded in: --env-id minari:ID.

Dict and Tuple observations are flattened in gymnasium's order, that of `spaces.flatten`, here as in the environment.
Datasets are looked for in $MINARI_DATASETS_PATH (~/.minari/datasets), else downloaded by minari.
"""

import gymnasium as gym
import minari
import numpy as np

from common import InputError
from envs import files, make_gymnasium

IDS = ()  # Minari has the list


def load(env_id):
    """The MinariDataset of "minari:ID". Raises InputError where there is none, or none to download."""
    try:
        return minari.load_dataset(env_id.removeprefix("minari:"), download=True)
    except Exception as error:  # minari's, h5py's, and those of its clients for download have no class in common
        expected = f"expected a dataset of Minari (present: {', '.join(minari.list_local_datasets()) or 'none'})"
        raise InputError(f"--env-id {env_id}: {files.one_line(error)}; {expected}") from error


def make(env_id, render=False):
    """The environment that the dataset was recorded in. Raises InputError where the dataset names none, and where that
    cannot be made."""
    dataset = load(env_id)
    if dataset.env_spec is None:
        raise InputError(f"--env-id {env_id}: this dataset names no environment; expected one with an env_spec")
    try:
        return make_gymnasium(dataset.recover_environment, render)
    except (gym.error.Error, ImportError) as error:
        reason = f"its environment {dataset.env_spec.id}: {files.one_line(error)}"
        raise InputError(f"--env-id {env_id}: {reason}; expected the package that has it, installed") from error


def dataset_file(env_id):
    """Path of the dataset's HDF5 file. Raises InputError, also for one that is stored as arrow or parquet."""
    path = load(env_id).storage.data_path / "main_data.hdf5"
    if not path.is_file():
        raise InputError(f"--env-id {env_id}: no {path}; expected a dataset that is stored as HDF5")
    return path


def read_dataset(env_id, path):
    """The arrays of envs/files.py; each episode of Minari's is one here. Any other `path` is a plain file.

    Raises InputError naming episode, key and step.
    """
    if path != dataset_file(env_id):
        return files.read_dataset(path)
    dataset = load(env_id)
    env = make(env_id)
    space, bounds = in_order(dataset.observation_space, env.observation_space), dataset.action_space
    env.close()
    stored, episodes = dataset.iterate_episodes(), []
    for index in dataset.episode_indices:
        where = f"{path}: episode {index}"
        try:
            episodes.append(arrays(space, next(stored)))
        except (*files.UNREADABLE, AssertionError, IndexError) as error:
            reason = f"cannot be read ({type(error).__name__}: {files.one_line(error)})"
            expected = f"actions, rewards, terminations, truncations and observations of {files.one_line(space)}"
            raise InputError(f"dataset {where}: {reason}; expected {expected}") from error
        files.check_dataset(episodes[-1], where, (gym.spaces.flatdim(space),), bounds.low, bounds.high)
    return {key: np.concatenate([episode[key] for episode in episodes]) for key in files.DATASET_KEYS}


def arrays(space, episode):
    """The arrays of envs/files.py of one episode of Minari's."""
    states = flatten(space, episode.observations).astype(np.float32)  # (L + 1, O)
    last = np.arange(1, len(states)) == len(episode)
    columns = (states[:-1], episode.actions, episode.rewards, episode.terminations, last, states[1:])
    return dict(zip(files.DATASET_KEYS, columns, strict=True))


def in_order(space, like):
    """`space` with the keys of its Dicts in the order of `like`, the environment's: Minari reads them back sorted."""
    if isinstance(space, gym.spaces.Dict) and isinstance(like, gym.spaces.Dict) and set(space) == set(like):
        return gym.spaces.Dict([(key, in_order(space[key], like[key])) for key in like])
    if isinstance(space, gym.spaces.Tuple) and isinstance(like, gym.spaces.Tuple) and len(space) == len(like):
        return gym.spaces.Tuple([in_order(*pair) for pair in zip(space, like, strict=True)])
    return space


def flatten(space, values):
    """gym.spaces.flatten of L + 1 elements of `space` at once, -> (L + 1, O)."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten(part, values[key]) for key, part in space.items()], 1)
    if isinstance(space, gym.spaces.Tuple):
        return np.concatenate([flatten(part, value) for part, value in zip(space, values, strict=True)], 1)
    return np.stack([gym.spaces.flatten(space, value) for value in values])
