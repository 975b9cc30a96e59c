"""Minari's datasets (https://minari.farama.org) and the environments they were recorded in: --env-id minari:ID.

Dict observations are flattened in the order of gymnasium's `spaces.flatten`, that of the space's keys, here as in the
environment. Datasets are looked for in $MINARI_DATASETS_PATH (~/.minari/datasets), else downloaded by minari.
"""

import gymnasium as gym
import minari
import numpy as np

from common import InputError
from envs import files

IDS = ()  # Minari has the list


def load(env_id):
    """The MinariDataset of "minari:ID". Raises InputError where there is none, or none to download."""
    try:
        return minari.load_dataset(env_id.removeprefix("minari:"), download=True)
    except Exception as error:  # minari's, h5py's, and those of its clients for download have no class in common
        expected = f"expected a dataset of Minari (present: {', '.join(minari.list_local_datasets()) or 'none'})"
        raise InputError(f"--env-id {env_id}: {error}; {expected}") from error


def make(env_id, render=False):
    """The environment that the dataset was recorded in. Raises InputError where the dataset does not name one."""
    if load(env_id).env_spec is None:
        raise InputError(f"--env-id {env_id}: this dataset names no environment; expected one with an env_spec")
    return load(env_id).recover_environment(**({"render_mode": "rgb_array"} if render else {}))


def dataset_file(env_id):
    """Path of the dataset's HDF5 file. Raises InputError, also for one that is stored as arrow or parquet."""
    path = load(env_id).storage.data_path / "main_data.hdf5"
    if not path.is_file():
        raise InputError(f"--env-id {env_id}: no {path}; expected a dataset that is stored as HDF5")
    return path


def read_dataset(env_id, path):
    """The arrays of envs/files.py; each episode of Minari's is one here. Any other `path` is a plain file."""
    if path != dataset_file(env_id):
        return files.read_dataset(path)
    dataset, episodes = load(env_id), []
    for episode in dataset.iterate_episodes():
        states = flatten(dataset.observation_space, episode.observations).astype(np.float32)  # (L + 1, O)
        last = np.arange(1, len(states)) == len(episode)
        episodes.append((states[:-1], episode.actions, episode.rewards, episode.terminations, last, states[1:]))
    return dict(zip(files.DATASET_KEYS, map(np.concatenate, zip(*episodes, strict=True)), strict=True))


def flatten(space, values):
    """gym.spaces.flatten of L + 1 elements of `space` at once, -> (L + 1, O)."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flatten(part, values[key]) for key, part in space.items()], 1)
    return np.stack([gym.spaces.flatten(space, value) for value in values])
