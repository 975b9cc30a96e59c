"""Dataset files, HDF5 or npz: reading one, checking it against an environment, splitting it into episodes.

A file has, for its N transitions, observations (N, O), actions (N, A) in the environment's own units, rewards,
terminals, timeouts (N,), and optionally next_observations (N, O). Where observations are images, (height, width, 3)
uint8 stands in place of O. What is wrong with a file is an InputError that names it, the key and the first bad index.
"""

import http.client
import math
import os
import sys
import tokenize
import urllib.request
import uuid
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np

from common import InputError, bar, endless_failure, mc_returns

# the last one is optional
DATASET_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")

# what numpy and h5py raise for a damaged file
UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError)
UNREADABLE += (zipfile.BadZipFile, zlib.error, tokenize.TokenError)


def one_line(text):
    """`text`, of an error or of a space, without its line breaks."""
    return " ".join(str(text).split())


def cache_folder():
    """$PARL_CACHE, or ~/.cache/parl: the datasets that were made here."""
    return Path(os.environ.get("PARL_CACHE") or "~/.cache/parl").expanduser()


def partial_name(path):
    """Where to write the file `path` before it is whole. No other process, on no other machine, has the same."""
    return path.with_name(f"{uuid.uuid4().hex}-{path.name}")


def cached_file(name, generate):
    """The npz file `name` in cache_folder(), written with the arrays of generate() where it is missing.

    Raises InputError where that folder cannot be written, or is full.
    """
    try:
        path = cache_folder() / name
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_name(path)
        partial.touch()  # before generate() works for minutes
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise InputError(f"PARL_CACHE: {error}; expected a folder that can be written") from error
    try:
        arrays = generate()
        try:
            np.savez_compressed(partial, **arrays)
            partial.replace(path)
        except OSError as error:
            raise InputError(f"PARL_CACHE: {error}; expected a folder with room for {name}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def find_or_download(env_id, url, folders, otherwise=""):
    """The file at `url` as it lies in one of `folders`, else downloaded to the first of them.

    Raises InputError where the download fails, saying which file to put where; `otherwise`: what else can be done.
    """
    paths = [Path(folder).expanduser() / url.rpartition("/")[2] for folder in folders]
    if path := next(filter(Path.is_file, paths), None):
        return path
    try:
        download(url, paths[0])
    except (OSError, http.client.HTTPException) as error:
        message = f"--env-id {env_id}: {url} cannot be downloaded ({error}); expected that file"
        raise InputError(f"{message} at {paths[0]}, or elsewhere with --dataset-path{otherwise}") from error
    return paths[0]


def download(url, path):
    """Write the HDF5 or npz file at `url` to `path`, which stays missing unless it is complete. Raises OSError."""
    is_right, kind = (zipfile.is_zipfile, "npz") if path.suffix == ".npz" else (h5py.is_hdf5, "HDF5")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(path)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(partial, "wb") as file:
            size = response.length
            with bar(path.name, "B", size, unit_scale=True) as progress:
                while block := response.read(1 << 20):
                    progress.update(file.write(block))
        if size not in (None, partial.stat().st_size):
            raise OSError(f"the connection ended after {partial.stat().st_size} of {size} bytes")
        if not is_right(partial):
            raise OSError(f"what is there is not {kind}")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ======================================== READING ========================================


def read_dataset(path, optional=("next_observations",)):
    """The arrays of an HDF5 or npz file, those of DATASET_KEYS that it has, as a dict.

    Raises InputError for a file that cannot be read, and for one that lacks a key which is not `optional`.
    """
    where, is_npz = f"dataset {path}", path.suffix == ".npz"
    if not path.is_file():
        raise InputError(f"{where}: {'is a directory' if path.is_dir() else 'no such file'}; expected .hdf5 or .npz")
    try:
        with np.load(path, allow_pickle=False) if is_npz else h5py.File(path, "r") as file:
            found, arrays = list(file), {key: file.get(key) for key in DATASET_KEYS}
            is_array = (np.ndarray, h5py.Dataset)  # groups at the top are left out
            data = {key: np.asarray(array[()]) for key, array in arrays.items() if isinstance(array, is_array)}
    except UNREADABLE as error:
        raise InputError(f"{where}: cannot be read as {'npz' if is_npz else 'HDF5'} ({one_line(error)})") from error
    if missing := [key for key in DATASET_KEYS if key not in data and key not in optional]:
        raise InputError(f"{where}: missing {', '.join(missing)}; found {', '.join(map(str, found)) or 'nothing'}")
    return data


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
            raise InputError(f"{where} has shape {array.shape}; expected {shape}, {shape_from(key, array, shape)}")
    actions, slack = data["actions"], 1e-3 * (high - low)
    bounds = " to ".join(f"[{', '.join(map(str, bound))}]" for bound in (low, high))
    bounds = f"expected within the environment's bounds {bounds}"
    refuse_rows(f"dataset {path}: actions", actions, (actions < low - slack) | (actions > high + slack), bounds)


def shape_from(key, array, shape):
    """Where the shape that was expected of a key's array is from; or what an array of another shape seems to hold."""
    if len(shape) == 1:
        return "one number a row"
    if len(shape) > 2:
        return "from rewards and the policy's image size"
    window, rest = divmod(array.size, shape[0] * shape[1])
    if key == "actions" and len(array) == shape[0] and window > 1 and not rest:
        return f"not windows of {window} actions: store single steps, and pass --action-chunk {window}"
    return "from rewards and the environment"


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


def check_sparse(rewards, scale, bias, path):
    """Raises InputError unless success, which pays most, pays 0 and other steps cost. rewards (N,): scaled."""
    flags, most = f"--reward-scale {float(scale)} --reward-bias", float(rewards.max())
    paid = f"dataset {path}: --sparse-reward with {flags} {float(bias)}: reward[{rewards.argmax()}] = {most}"
    if most > 0:
        raise InputError(f"{paid}; expected success to pay 0: {flags} {round(bias - most, 6) + 0.0}")
    if rewards.min() == 0:
        raise InputError(f"{paid}, as every other; expected each step before success to cost: {flags} {bias - 1.0}")


def find_terminals(data, sparse, path):
    """The terminals (N,) bool of a dataset with scaled rewards: the file's, and where rewards are sparse each success.
    Warns, on stderr, of what makes little sense to learn from."""
    rewards, terminals = data["rewards"], data["terminals"].astype(bool)
    if sparse:
        if (terminals & (rewards < 0)).any():
            hint = "a failure that ends an episode counts as its last cost for ever"
            print(f"warning: {path}: terminals without success, with --sparse-reward: {hint}", file=sys.stderr)
        terminals = terminals | (rewards >= 0)
    if sparse and rewards.max() < 0:
        hint = f"no success anywhere: reward * scale + bias is {rewards.max():.3g} at most; expected success to pay 0"
        print(f"warning: {path}: {hint}", file=sys.stderr)
    elif not terminals.any():
        hint = "no terminal anywhere: every episode counts as one cut short by a time limit"
        print(f"warning: {path}: {hint}", file=sys.stderr)
    return terminals


# ======================================== SPLITTING ========================================

JUMP = 1e-6  # more than this between a row's next observation and the next row's, and an episode has ended


def split_episodes(data):
    """(start, stop) of every episode in the arrays of a dataset file, and next_observations (N, O).

    An episode ends where terminal, at a timeout, and where the next row's observation is not this row's next one.
    Without next_observations in the file they are the following rows, at a terminal the row itself (no value follows);
    at a timeout, and at the end of the file, none is known and the transition is dropped.
    NOTE(differs): the last transition is kept when its next observation is known (released: always dropped).
    NOTE(differs): a terminal row's next observation is, if not in the file, its own (released: the next episode's).
    NOTE(differs): a row both terminal and timeout is a terminal (released: dropped).
    """
    observations, terminals = data["observations"], data["terminals"].astype(bool)
    ends = terminals | data["timeouts"].astype(bool)
    ends[-1] = True
    if "next_observations" in data:
        next_observations, known = data["next_observations"], np.ones(len(ends), bool)
        ends[:-1] |= jumps(data) > JUMP
    else:
        following, known = np.concatenate([observations[1:], observations[-1:]]), terminals | ~ends
        next_observations = np.where(terminals.reshape(-1, *[1] * (observations.ndim - 1)), observations, following)
    stops = np.flatnonzero(ends) + 1
    starts, stops = np.concatenate([[0], stops[:-1]]), np.where(known[stops - 1], stops, stops - 1)
    return [(start, stop) for start, stop in zip(starts, stops, strict=True) if stop > start], next_observations


def jumps(data):
    """(N - 1,) how far each row's observation is from the next one of the row before it."""
    rows = (data["observations"][1:], data["next_observations"][:-1])
    following, expected = (part.astype(np.float32, copy=False) for part in rows)  # of one precision
    return np.linalg.norm((following - expected).reshape(len(following), math.prod(following.shape[1:])), axis=1)


def add_episodes(buffer, data, discount, sparse):
    """Adds the episodes of a dataset, its actions in [-1, 1] and its rewards scaled, with their returns-to-go. Returns
    their (start, stop)."""
    episodes, next_observations = split_episodes(data)
    for start, stop in episodes:
        rewards, masks = data["rewards"][start:stop], 1.0 - data["terminals"][start:stop]
        returns = mc_returns(rewards, masks, discount, sparse)
        if sparse:
            rewards = endless_failure(rewards, masks, discount)
        observations = np.concatenate([data["observations"][start:stop], next_observations[stop - 1 : stop]])
        buffer.add_episode(observations, data["actions"][start:stop], rewards, masks, returns)
    return episodes


def describe(data, episodes, raw_rewards, discount, sparse, path):
    """Prints what was loaded, raw_rewards (N,) being the file's. Success is the end where the scaled reward is 0 if
    rewards are sparse, else an end that pays. Warns where most transitions are episodes of their own, and where success
    is too far off to be told from failure."""
    starts, stops = np.array(episodes).T
    num_steps, ends = (stops - starts).sum(), stops - 1
    pays = data["rewards"][ends] >= 0 if sparse else raw_rewards[ends] > 0
    success = data["terminals"][ends] & pays
    mean_return = np.mean([raw_rewards[start:stop].sum() for start, stop in episodes])
    print(
        f"dataset {path}: {num_steps} transitions of {len(raw_rewards)} rows; {len(episodes)} episodes of "
        f"{num_steps / len(episodes):.1f} steps, {success.mean():.0%} successful, mean return "
        f"{mean_return:.4g}"
    )
    low, *others = np.unique(raw_rewards)
    if not sparse and len(others) == 1 and np.ptp(data["rewards"]):
        best, worst = raw_rewards[data["rewards"].argmax()], raw_rewards[data["rewards"].argmin()]
        flags = f"--sparse-reward --reward-bias {0 - best * np.ptp(data['rewards']) / (best - worst):g}"
        print(f"dataset {path}: two rewards, {low:g} and {others[0]:g}; where {best:g} is success, pass {flags}")
    if 2 * len(episodes) > num_steps:
        warn_of_breaks(data, sparse, path)
    length = np.median((stops - starts)[success]) if success.any() else 0
    if sparse and discount**length < 0.01:
        enough = math.ceil(10_000 * 0.01 ** (1 / length)) / 10_000
        print(
            f"warning: --discount {discount:g}: success {length:.0f} steps away, the median here, is worth "
            f"{discount**length:.2g} of what it is at the end; expected about {enough:g}",
            file=sys.stderr,
        )


def warn_of_length(episodes, limit, path):
    """Says on stderr where an episode is longer than the environment's: two of them may be joined, a reset between."""
    longest = max(stop - start for start, stop in episodes)
    if longest > limit:
        what = f"an episode has {longest} steps, the environment's time limit is {limit}"
        print(f"warning: dataset {path}: {what}; expected timeouts where an episode was cut short", file=sys.stderr)


def warn_of_breaks(data, sparse, path):
    """Says on stderr why most transitions end an episode: the check that most rows fail, and by how much."""
    broken = jumps(data) if "next_observations" in data else np.zeros(0)
    broken = broken[broken > JUMP]
    far = f"{np.median(broken):.3g} in the median, {broken.max():.3g} at most" if len(broken) else ""
    jump = f"next_observations are not what the next row observes (distance {far}; expected up to {JUMP:g}): leave "
    jump += "them out, or write what the action led to; for windows of h actions, store steps and pass --action-chunk h"
    causes = [(len(broken), jump), (np.count_nonzero(data["timeouts"]), "timeouts are set; expected at time limits")]
    if sparse:
        success = "reward * scale + bias is 0, success; expected each step before it to cost"
        causes.append((np.count_nonzero(data["rewards"] >= 0), success))
    causes.append((np.count_nonzero(data["terminals"]), "terminals are set; expected where an episode ended"))
    count, cause = max(causes, key=lambda pair: pair[0])
    print(f"warning: dataset {path}: most transitions end an episode: in {count} rows {cause}", file=sys.stderr)
