"""Dataset files, HDF5 or npz: reading one, checking it against an environment, splitting it into episodes.

A file has, for its N transitions, observations (N, O), actions (N, A) in the environment's own units, rewards,
terminals, timeouts (N,), and optionally next_observations (N, O). Where observations are images, (height, width, 3)
uint8 stands in place of O. What is wrong with a file is an InputError that names it, the key and the first bad index.
"""

import os
import tokenize
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np

from common import InputError, stacked

# the last one is optional
DATASET_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")

# what numpy and h5py raise for a damaged file
UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError)
UNREADABLE += (zipfile.BadZipFile, zlib.error, tokenize.TokenError)


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


# ======================================== READING ========================================


def read_dataset(path, optional=("next_observations",)):
    """The arrays of an HDF5 or npz file, those of DATASET_KEYS that it has, as a dict.

    Raises InputError for a file that cannot be read, and for one that lacks a key which is not `optional`.
    """
    where = f"dataset {path}"
    if not path.is_file():
        raise InputError(f"{where}: {'is a directory' if path.is_dir() else 'no such file'}; expected .hdf5 or .npz")
    try:
        data = read_npz(path) if path.suffix == ".npz" else read_hdf5(path)
    except UNREADABLE as error:
        kind = "npz" if path.suffix == ".npz" else "HDF5"
        raise InputError(f"{where}: cannot be read as {kind} ({error})") from error
    if missing := [key for key in DATASET_KEYS if key not in data and key not in optional]:
        raise InputError(f"{where}: missing {', '.join(missing)}; found {', '.join(data) or 'none of the keys'}")
    return data


def read_npz(path):
    """The arrays of an npz file. Nothing in it is unpickled. Raises one of UNREADABLE for a damaged file."""
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in DATASET_KEYS if key in file}


def read_hdf5(path):
    """The arrays at the top of an HDF5 file; groups are left out. Raises one of UNREADABLE for a damaged file."""
    with h5py.File(path, "r") as file:
        arrays = {key: file.get(key) for key in DATASET_KEYS}
        return {key: np.asarray(array[()]) for key, array in arrays.items() if isinstance(array, h5py.Dataset)}


# ======================================== CHECKING ========================================


def check_dataset(data, path, obs_shape, low, high):
    """Raises InputError unless the arrays of `path` fit each other and an environment: its observations have obs_shape,
    (O,) or that of an image, and its actions lie from low to high, each (A,)."""
    length = data["rewards"].size
    row_shapes = {"observations": obs_shape, "next_observations": obs_shape, "actions": low.shape}
    if length == 0:
        raise InputError(f"dataset {path}: holds 0 transitions; expected at least 1")
    for key in sorted(data, key=lambda key: key != "rewards"):  # what gives the length comes first
        array, where, shape = data[key], f"dataset {path}: {key}", (length, *row_shapes.get(key, ()))
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


# ======================================== SPLITTING ========================================


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
