"""Dataset files: what is refused and how, how episodes are split, what load_dataset makes of them."""

import os
import re
import resource
import zipfile
from types import SimpleNamespace

import gymnasium as gym
import h5py
import numpy as np
import pytest
from countdown import Countdown

import common
import envs
from common import InputError
from envs import files

# ---------------------------------------------------------------- bad input


def write_dataset(path, n=40, **changes):
    rng = np.random.default_rng(0)
    data = dict(
        observations=rng.normal(size=(n, 4)),
        actions=rng.uniform(-1, 1, (n, 2)),
        rewards=(np.arange(n) == n - 1).astype(float),
        terminals=np.arange(n) == n - 1,
        timeouts=np.zeros(n, bool),
    )
    for key, value in changes.items():
        if value is None:
            del data[key]
        else:
            data[key] = value(data[key]) if callable(value) else value
    if path.suffix == ".npz":
        np.savez(path, **data)
    else:
        with h5py.File(path, "w") as file:
            for key, value in data.items():
                file[key] = value
    return path


def poke(index, value):
    def change(array):
        array = array.astype(float)
        array[index] = value
        return array

    return change


BAD_DATA = {
    "missing key": (dict(actions=None), "missing actions"),
    "unequal lengths": (dict(terminals=lambda x: x[:-1]), r"terminals has shape \(39,\); expected \(40,\)"),
    "NaN": (dict(observations=poke(7, np.nan)), r"observations\[7, 0\] = nan"),
    "inf": (dict(rewards=poke(3, np.inf)), r"rewards\[3\] = inf"),
    "beyond float32": (dict(observations=poke((9, 2), 1e39)), r"observations\[9, 2\] = 1e\+39"),
    "actions outside": (
        dict(actions=poke(5, 1.5)),
        r"actions\[5, 0\] = 1.5; expected within .* \[-1.0, -1.0\] to \[1.0, 1.0\]",
    ),
    "wrong rank": (dict(observations=lambda x: x[:, 0]), r"observations has shape \(40,\); expected \(40, 4\)"),
    "a scalar": (dict(rewards=np.float64(1)), r"rewards has shape \(\); expected \(1,\)"),
    "a text": (dict(rewards=np.bytes_(b"one")), "rewards has dtype .*; expected numbers"),
    "wrong dtype": (dict(actions=lambda x: x.astype("S8")), "actions has dtype"),
    "zero rows": (
        dict.fromkeys(("observations", "actions", "rewards", "terminals", "timeouts"), lambda x: x[:0]),
        "0 transitions",
    ),
    "another observation size": (dict(observations=lambda x: x[:, :3]), r"\(40, 3\); expected \(40, 4\)"),
    "another action size": (dict(actions=lambda x: x[:, :1]), r"\(40, 1\); expected \(40, 2\), from rewards and"),
    "rewards in a column": (dict(rewards=lambda x: x[:, None]), r"rewards has shape \(40, 1\); .* one number a row"),
    "windows of actions": (
        dict(actions=lambda x: np.stack([x] * 8, 1)),
        r"actions has shape \(40, 8, 2\); expected \(40, 2\), .*store single steps, and pass --action-chunk 8$",
    ),
    "windows of actions, flat": (
        dict(actions=lambda x: np.concatenate([x] * 3, 1)),
        r"actions has shape \(40, 6\); expected \(40, 2\), .*store single steps, and pass --action-chunk 3$",
    ),
    "twice as many actions": (dict(actions=lambda x: np.concatenate([x, x])), r"\(80, 2\); .*, from rewards and"),
}


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_dataset(case, suffix, tmp_path):
    changes, message = BAD_DATA[case]
    path = write_dataset(tmp_path / f"data{suffix}", **changes)
    with pytest.raises(InputError, match=message) as error:
        envs.load_dataset("pointmaze-umaze-play", path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_dataset_files(tmp_path):
    good = write_dataset(tmp_path / "good.hdf5")
    assert len(envs.load_dataset("pointmaze-umaze-play", good)) == 40
    truncated, text, empty = tmp_path / "truncated.hdf5", tmp_path / "text.npz", tmp_path / "empty.hdf5"
    truncated.write_bytes(good.read_bytes()[:1000])
    text.write_text("hello")
    empty.touch()
    with h5py.File(tmp_path / "group.hdf5", "w") as file:
        file.create_group("actions")
    np.savez(tmp_path / "lost.npz", observations=np.zeros((1, 4)), actions=np.zeros((1, 2)), rewards=np.zeros(1),
             terminals=np.zeros(1), timeouts=np.ones(1))  # fmt: skip
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as file:  # numpy tokenizes what it cannot parse
        file.writestr("observations.npy", b"\x93NUMPY\x01\x00\x10\x00" + b"{'shape': (1,  \n")
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, observations=np.array([{}], dtype=object))
    for path, message in [
        (tmp_path / "none.hdf5", "no such file"),
        (tmp_path, "is a directory"),
        (truncated, "cannot be read as HDF5"),
        (text, "cannot be read as npz"),
        (tmp_path / "header.npz", "cannot be read as npz"),
        (pickled, "cannot be read as npz"),  # nothing is unpickled
        (empty, "cannot be read as HDF5"),
        (tmp_path / "group.hdf5", "missing observations, actions.*; found actions$"),
        (tmp_path / "lost.npz", "no transition has a next observation"),
    ]:
        with pytest.raises(InputError, match=message):
            envs.load_dataset("pointmaze-umaze-play", path)


@pytest.mark.parametrize("kind", ["npz", "compressed npz", "hdf5", "compressed hdf5"])
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    path, rng, refused = write_dataset(tmp_path / f"data.{kind[-4:].strip()}"), np.random.default_rng(0), 0
    if kind == "compressed npz":
        np.savez_compressed(path, **np.load(path))
    elif kind == "compressed hdf5":
        with h5py.File(path, "a") as file:
            arrays = {key: file.pop(key)[()] for key in list(file)}
            for key, array in arrays.items():
                file.create_dataset(key, data=array, compression="gzip")
    good = path.read_bytes()
    for _ in range(150):
        bad = bytearray(good)
        for where in rng.integers(len(bad), size=rng.integers(1, 30)):
            bad[where] ^= int(rng.integers(1, 256))
        path.write_bytes(bad)
        try:
            files.read_dataset(path)
        except InputError:  # any other error is a fault
            refused += 1
    assert refused > 5


def test_scaled_rewards_are_finite(tmp_path):
    path = write_dataset(tmp_path / "data.npz")
    with pytest.raises(InputError, match=r"--reward-scale 1e\+200 .*: reward\[39\] = 1e\+200; expected finite"):
        envs.load_dataset("pointmaze-umaze-play", path, 1e200)


def test_a_home_directory_in_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_dataset(tmp_path / "data.npz")
    assert len(envs.load_dataset("pointmaze-umaze-play", "~/data.npz")) == 40


# ---------------------------------------------------------------- the cache


def test_a_file_that_was_made_here_can_be_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    path = envs.dataset_file("pointmaze-umaze-play")
    path.write_text("half")
    with pytest.raises(InputError, match=rf"dataset {path}: cannot be read.*; delete it, and it is made again$"):
        envs.load_dataset("pointmaze-umaze-play")
    with pytest.raises(InputError, match=rf"dataset {path}: cannot be read[^;]*$"):  # the user's own
        envs.load_dataset("pointmaze-umaze-play", path)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", "/proc/no"):
        monkeypatch.setenv("PARL_CACHE", str(folder))
        with pytest.raises(InputError, match=r"^PARL_CACHE: .*; expected a folder that can be written$") as error:
            envs.dataset_file("pointmaze-umaze-play")
        assert "\n" not in str(error.value)
    monkeypatch.setenv("PARL_CACHE", "")  # is not the working directory
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "parl"


@pytest.mark.parametrize("error", [None, OSError("the generator's own")])
def test_a_full_cache(error, tmp_path, monkeypatch):
    """The disk is full when the data have been made: one line, and nothing half-written stays there. What fails while
    they are made is no matter of the cache."""

    def generate():
        if error:
            raise error
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return {"observations": np.random.default_rng(0).random(10_000)}

    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises((InputError, OSError), match="own" if error else "with room for data.npz$") as raised:
            files.cached_file("data.npz", generate)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(raised.value, InputError) == (error is None) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_of_one_id_write_files_of_their_own(tmp_path, monkeypatch):
    """In two containers that share a cache. The second begins, and ends, while the first is at work."""
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "getpid", lambda: 7)
    seen = []

    def generate():
        seen.append({path.name for path in tmp_path.iterdir()})
        if len(seen) == 1:
            files.cached_file("data.npz", generate)
        return {"rewards": np.arange(3)}

    path = files.cached_file("data.npz", generate)
    assert [len(names) for names in seen] == [1, 2] and [file.name for file in tmp_path.iterdir()] == ["data.npz"]
    assert np.load(path)["rewards"].tolist() == [0, 1, 2]


# ---------------------------------------------------------------- sparse rewards


@pytest.mark.parametrize(
    ("rewards", "scale", "bias", "needed"),
    [
        ((-1, 0), 10.0, 5.0, "--reward-scale 10.0 --reward-bias 0.0"),
        ((0, 1), 1.0, 0.0, "--reward-scale 1.0 --reward-bias -1.0"),
        ((0, 1), 2.0, -1.0, "--reward-scale 2.0 --reward-bias -2.0"),
        ((1, 0), -1.0, 3.0, "--reward-scale -1.0 --reward-bias 0.0"),  # a cost
        ((0, np.float32(0.3)), 1.0, 0.3, "--reward-scale 1.0 --reward-bias -0.3"),
        ((0.1, 0.3), 3.0, 5.0, "--reward-scale 3.0 --reward-bias -0.9"),
    ],
)
def test_sparse_success_pays_nothing(rewards, scale, bias, needed, tmp_path):
    """More was squeezed into values of at most 0. The two flags that are named do load it."""
    array = np.full(40, rewards[0], np.result_type(rewards[1]))
    array[39] = rewards[1]
    path = write_dataset(tmp_path / "data.npz", rewards=array)
    given = f"--reward-scale {scale} --reward-bias {bias}"
    with pytest.raises(InputError, match=rf"{path}: --sparse-reward with {given}: reward\[39\] = .*") as error:
        envs.load_dataset("pointmaze-umaze-play", path, scale, bias, sparse=True)
    assert str(error.value).endswith(f"; expected success to pay 0: {needed}")
    envs.load_dataset("pointmaze-umaze-play", path, scale, bias)
    scale, bias = map(float, re.findall(r"--reward-\w+ (\S+)", needed))
    buffer = envs.load_dataset("pointmaze-umaze-play", path, scale, bias, sparse=True)
    assert buffer.rewards[39] == 0 and buffer.masks[39] == 0 and buffer.rewards[:39].max() < 0


@pytest.mark.parametrize("scale, bias", [(0.3, -0.9), (0.1, -0.3)])
def test_success_is_0_also_where_it_is_a_rounding_error_beside_it(scale, bias, tmp_path, capsys):
    """3 * 0.3 - 0.9 is -1.1e-16, no success; 3 * 0.1 - 0.3 is 5.6e-17, refused as more than 0."""
    path = write_dataset(tmp_path / "data.npz", rewards=np.where(np.arange(40) == 39, 3.0, 0.0))
    buffer = envs.load_dataset("pointmaze-umaze-play", path, scale, bias, sparse=True)
    assert buffer.rewards[39] == 0 and buffer.masks[39] == 0 and "no success" not in capsys.readouterr().err


def test_a_discount_that_is_advised_is_one_that_runs(tmp_path, capsys):
    """1 for a success 5000 steps away, which --discount does not take."""
    rows = np.arange(5000)
    arrays = dict(observations=np.zeros((5000, 4)), actions=np.zeros((5000, 2)), rewards=rows == 4999)
    arrays |= dict(terminals=rows == 4999, timeouts=np.zeros(5000))
    np.savez(tmp_path / "data.npz", **{name: array.astype(np.float32) for name, array in arrays.items()})
    envs.load_dataset("pointmaze-umaze-play", tmp_path / "data.npz", 1.0, -1.0, 0.99, True)
    assert "expected about 0.9991" in capsys.readouterr().err


def test_dense_rewards_are_as_small_as_they_are(tmp_path):
    """Rounded to 6 digits, which is for success alone."""
    path = write_dataset(tmp_path / "data.npz", rewards=np.full(40, 0.4))
    buffer = envs.load_dataset("pointmaze-umaze-play", path, 1e-6, 0.0)
    assert buffer.rewards[:40] == pytest.approx(4e-7)
    args = SimpleNamespace(reward_scale=1e-6, reward_bias=0.0, sparse_reward=False)
    assert common.scaled_rewards({"rewards": [0.4], "success": False}, args) == pytest.approx(4e-7)


def test_of_two_costs_the_lower_is_success(tmp_path, capsys):
    path = write_dataset(tmp_path / "data.npz", rewards=np.where(np.arange(40) == 39, 0.0, 1.0))
    envs.load_dataset("pointmaze-umaze-play", path, -1.0, 0.0)
    assert "where 0 is success, pass --sparse-reward --reward-bias 0\n" in capsys.readouterr().out


def test_a_single_row(tmp_path):
    path = write_dataset(tmp_path / "data.npz", 1, next_observations=np.ones((1, 4)))
    assert len(envs.load_dataset("pointmaze-umaze-play", path)) == 1


def test_sparse_steps_cost(tmp_path):
    """Rewards of 0 alone: each step would be a success, and an episode."""
    path = write_dataset(tmp_path / "data.npz", rewards=np.zeros(40))
    with pytest.raises(InputError, match=r"= 0.0, as every other; expected .* to cost: .* --reward-bias -1.0$"):
        envs.load_dataset("pointmaze-umaze-play", path, sparse=True)


@pytest.mark.parametrize(
    "high, flags", [(1.0, "--reward-bias -1"), (0.0, "--reward-bias 0"), (10.0, "--reward-bias -10")]
)
def test_two_rewards_may_be_success_and_its_absence(high, flags, tmp_path, capsys):
    rewards = np.full(40, high - 1.0)
    rewards[39] = high
    path = write_dataset(tmp_path / "data.npz", rewards=rewards)
    envs.load_dataset("pointmaze-umaze-play", path)
    hint = f"two rewards, {high - 1:g} and {high:g}; where {high:g} is success, pass --sparse-reward {flags}\n"
    assert hint in capsys.readouterr().out
    envs.load_dataset("pointmaze-umaze-play", path, 2.0)  # a scale makes the bias another
    assert f"--reward-bias {0 - 2 * high:g}\n" in capsys.readouterr().out
    envs.load_dataset("pointmaze-umaze-play", path, 1.0, -high, sparse=True)
    assert "two rewards" not in capsys.readouterr().out


def test_what_a_file_has_instead_is_named(tmp_path):
    np.savez(tmp_path / "data.npz", obs=np.zeros((3, 2)), action=np.zeros((3, 1)), rewards=np.zeros(3))
    with pytest.raises(InputError, match="missing observations, actions, terminals, timeouts; found obs, action, rew"):
        files.read_dataset(tmp_path / "data.npz")


@pytest.mark.parametrize(("at", "warns"), [(31, True), (30, False)])
def test_episodes_that_were_joined_are_a_warning(at, warns, tmp_path, capsys):
    """Longer than the time limit: a failure's end and the reset after it count as a step."""
    gym.register("Counted-v0", entry_point=Countdown, max_episode_steps=30)
    rows = dict(observations=np.zeros((60, 3)), actions=np.full((60, 2), 0.5), rewards=np.zeros(60))
    timeouts = np.isin(np.arange(60), [at])
    np.savez(tmp_path / "data.npz", **rows, terminals=np.arange(60) == 59, timeouts=timeouts)
    try:
        envs.load_dataset("Counted-v0", tmp_path / "data.npz")
    finally:
        del gym.registry["Counted-v0"]
    text = capsys.readouterr().err  # the row of a timeout is dropped
    assert ("the environment's time limit is 30; expected timeouts where an episode was cut short" in text) == warns


def test_no_success_and_no_terminal_anywhere_are_warnings(tmp_path, capsys):
    path = write_dataset(tmp_path / "data.npz", rewards=np.zeros(40), terminals=np.zeros(40, bool))
    envs.load_dataset("pointmaze-umaze-play", path, 1.0, -1.0, 0.99, sparse=True)
    assert "no success anywhere" in capsys.readouterr().err
    envs.load_dataset("pointmaze-umaze-play", path)
    assert "no terminal anywhere" in capsys.readouterr().err
    envs.load_dataset("pointmaze-umaze-play", write_dataset(tmp_path / "good.npz"), 1.0, -1.0, 0.99, sparse=True)
    assert capsys.readouterr().err == ""
    failing = write_dataset(tmp_path / "failing.npz", terminals=np.arange(40) % 20 == 19)
    envs.load_dataset("pointmaze-umaze-play", failing, 1.0, -1.0, 0.99, sparse=True)
    assert "terminals without success" in capsys.readouterr().err


# ---------------------------------------------------------------- splitting


def arrays(n, **changes):
    data = dict(
        observations=np.arange(n, dtype=np.float32)[:, None], actions=np.zeros((n, 1)), rewards=np.zeros(n),
        terminals=np.zeros(n, bool), timeouts=np.zeros(n, bool),
    )  # fmt: skip
    return data | changes


def test_split_without_next_observations_drops_what_is_not_known():
    ends = np.array([0, 0, 1, 0, 0, 0], bool)
    assert files.split_episodes(arrays(6, terminals=ends))[0] == [(0, 3), (3, 5)]  # the end of the file
    assert files.split_episodes(arrays(6, timeouts=ends))[0] == [(0, 2), (3, 5)]  # the row at a timeout


def test_split_with_next_observations_keeps_all_and_sees_jumps():
    following = np.array([1, 2, 50, 4, 5, 6], np.float32)[:, None]
    unknown = files.split_episodes(arrays(3, terminals=np.array([0, 1, 1], bool)))[1]
    assert unknown[:, 0].tolist() == [1, 1, 2]  # at a terminal the row itself, not another episode's start
    episodes, next_observations = files.split_episodes(arrays(6, next_observations=following))
    assert episodes == [(0, 3), (3, 6)]
    assert next_observations[2, 0] == 50


def test_float64_and_float32_are_the_same_observation(tmp_path):
    """Rounded differently, each row would be an episode of its own."""
    states = 100 * np.cumsum(np.random.default_rng(0).standard_normal((41, 4)), axis=0)
    path = write_dataset(
        tmp_path / "data.npz", observations=states[:-1], next_observations=states[1:].astype(np.float32)
    )
    assert envs.load_dataset("pointmaze-umaze-play", path).num_states == 41


@pytest.mark.parametrize(("distance", "episodes"), [(0.9e-6, [(0, 6)]), (1.1e-6, [(0, 3), (3, 6)])])
def test_an_episode_ends_beyond_a_millionth(distance, episodes):
    data = arrays(6, observations=np.zeros((6, 1), np.float32), next_observations=np.zeros((6, 1), np.float32))
    data["observations"][3:] = data["next_observations"][3:] = distance
    assert files.split_episodes(data)[0] == episodes


@pytest.mark.parametrize("known", [True, False])
def test_a_row_both_terminal_and_timeout_is_a_terminal(known):
    ends = np.array([0, 0, 1, 0], bool)
    changes = {"next_observations": np.arange(1, 5, dtype=np.float32)[:, None]} if known else {}
    episodes, next_observations = files.split_episodes(arrays(4, terminals=ends, timeouts=ends, **changes))
    assert episodes == ([(0, 3), (3, 4)] if known else [(0, 3)])
    assert next_observations[2, 0] == (3 if known else 2)  # the file's, else its own: no value follows


# ---------------------------------------------------------------- what was loaded


def drives(**changes):
    """Six episodes of ten steps; three of them end terminal, paid 1.3, the others at their time limit, paid nothing."""
    rng, ends = np.random.default_rng(0), np.arange(60) % 10 == 9
    states = np.cumsum(rng.standard_normal((6, 11, 4)), axis=1)
    observations, following = (states[:, part].reshape(60, 4) for part in (slice(10), slice(1, 11)))
    success = ends & (np.arange(60) < 30)
    data = dict(actions=np.zeros((60, 2)), rewards=1.3 * success, terminals=success, timeouts=ends & ~success)
    return data | dict(observations=observations, next_observations=following) | changes


def load_drives(tmp_path, data, *rewards_as, sparse=False):
    np.savez(tmp_path / "data.npz", **data)
    return envs.load_dataset("pointmaze-umaze-play", tmp_path / "data.npz", *rewards_as, sparse=sparse)


def test_what_was_loaded_is_one_line(tmp_path, capsys):
    load_drives(tmp_path, drives())
    line = "60 transitions of 60 rows; 6 episodes of 10.0 steps, 50% successful, mean return 0.65"
    out, err = capsys.readouterr()
    assert (out.splitlines()[0], err) == (f"dataset {tmp_path / 'data.npz'}: {line}", "")
    load_drives(tmp_path, drives(), 1.0, -1.3, sparse=True)
    assert capsys.readouterr().out.endswith(f": {line}\n")  # rewards as they are in the file
    data = drives()
    del data["next_observations"]
    load_drives(tmp_path, data)
    line = "57 transitions of 60 rows; 6 episodes of 9.5 steps, 50% successful, mean return 0.65"
    assert f": {line}\n" in capsys.readouterr().out


BREAKS = {
    "rounded": lambda following: following.round(3),
    "of noise added twice": lambda following: following + np.random.default_rng(1).normal(scale=0.01, size=(60, 4)),
    "normalised": lambda following: (following - following.mean(0)) / following.std(0),
    "shuffled": lambda following: np.random.default_rng(1).permutation(following),
    "of windows": lambda following: following[(np.arange(60) + 3).clip(max=59)],  # four steps later
}


@pytest.mark.parametrize("case", BREAKS)
def test_rows_that_break_off_are_a_warning(case, tmp_path, capsys):
    """Each row is an episode: what the check was, and by how much they fail it."""
    data = drives()
    data["next_observations"] = BREAKS[case](data["next_observations"])
    load_drives(tmp_path, data)
    inside = np.linalg.norm(data["observations"][1:] - data["next_observations"][:-1], axis=1)
    inside = inside[inside > 1e-6]
    out, err = capsys.readouterr()
    assert "60 transitions of 60 rows; 60 episodes of 1.0 steps, 5% successful, mean return 0.065" in out
    far = f"distance {np.median(inside):.3g} in the median, {inside.max():.3g} at most; expected up to 1e-06"
    warning = f"warning: dataset {tmp_path / 'data.npz'}: most transitions end an episode: in {len(inside)} rows "
    assert err.startswith(f"{warning}next_observations are not what the next row observes ({far}): leave them out, or")
    assert "for windows of h actions, store steps and pass --action-chunk h" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "sparse", "cause"),
    [
        (dict(terminals=np.arange(60) % 10 != 5), False, "in 54 rows terminals are set"),
        (dict(timeouts=np.arange(60) % 10 != 5), False, "in 54 rows timeouts are set"),
        (dict(rewards=np.arange(60) % 10 != 5), True, r"in 54 rows reward \* scale \+ bias is 0, success"),
    ],
)
def test_rows_that_end_by_a_flag_are_a_warning(changes, sparse, cause, tmp_path, capsys):
    load_drives(tmp_path, drives(**changes), 1.0, -1.0, sparse=sparse)
    assert re.search(f"most transitions end an episode: {cause}; expected", capsys.readouterr().err)


def test_images_break_off_by_what_they_differ():
    """Numbers of one byte would wrap around: 1 less is 255 more."""
    images = np.full((4, 8, 8, 3), 100, np.uint8)
    assert files.jumps({"observations": images, "next_observations": images + 1}) == pytest.approx(np.sqrt(192))


# ---------------------------------------------------------------- loading


def test_load_dataset_cuts_at_success_and_scales(tmp_path):
    path = tmp_path / "data.npz"
    n = 8
    data = arrays(n, observations=np.zeros((n, 4)), actions=np.zeros((n, 2)))
    data["rewards"] = np.array([0, 0, 1, 0, 0, 0, 0, 0.0])
    data["timeouts"] = np.arange(n) == n - 1
    np.savez(path, **data, next_observations=np.zeros((n, 4)))
    buffer = envs.load_dataset("pointmaze-umaze-play", path, 1.0, -1.0, 0.9, sparse=True)
    assert buffer.masks[:8].tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert buffer.rewards[:8].tolist() == [-1, -1, 0, -1, -1, -1, -1, -1]
    assert buffer.mc_returns[:8] == pytest.approx([-1.9, -1, 0, *[-10] * 5], rel=1e-5)


def test_terminals_of_any_number_are_flags(tmp_path):
    data = arrays(4, observations=np.zeros((4, 4)), actions=np.zeros((4, 2)), terminals=np.array([0, 255, 0, 255]))
    np.savez(tmp_path / "data.npz", **data)
    assert envs.load_dataset("pointmaze-umaze-play", tmp_path / "data.npz").masks[:4].tolist() == [1, 0, 1, 0]


def test_actions_of_a_file_are_in_the_units_that_envs_make_was_given(tmp_path):
    """An environment whose own wrapper rescales: its outermost bounds count, not those of what is inside."""
    wrapped = lambda: gym.wrappers.RescaleAction(Countdown(), np.float32(-2), np.float32(2))  # noqa: E731
    gym.register("Wrapped-v0", entry_point=wrapped)
    data = arrays(4, observations=np.zeros((4, 3)), actions=np.full((4, 2), 1.0), timeouts=np.arange(4) == 3)
    np.savez(tmp_path / "data.npz", **data, next_observations=np.zeros((4, 3)))
    buffer = envs.load_dataset("Wrapped-v0", tmp_path / "data.npz")
    assert buffer.actions[:4] == pytest.approx(0.5)


def test_a_failure_that_ends_a_sparse_episode_counts_for_ever(tmp_path, capsys):
    """A failure that costs one step, which pays better than trying on."""
    ends = np.arange(40) == 39
    path = write_dataset(tmp_path / "data.npz", rewards=np.zeros(40), terminals=ends)
    buffer = envs.load_dataset("pointmaze-umaze-play", path, 1.0, -1.0, 0.9, True)
    assert buffer.rewards[38:40] == pytest.approx([-1, -10]) and buffer.masks[39] == 0
    assert buffer.mc_returns[[0, 39]] == pytest.approx([-10, -10])
    assert "terminals without success, with --sparse-reward: a failure that ends" in capsys.readouterr().err


@pytest.mark.parametrize("discount, warned", [(0.99, False), (0.88, True)])
def test_a_discount_too_small_for_the_way_to_success(discount, warned, tmp_path, capsys):
    """0.88^40 is 0.006: all of the way looks alike to the critic."""
    path = write_dataset(tmp_path / "data.npz")
    envs.load_dataset("pointmaze-umaze-play", path, 1.0, -1.0, discount, True)
    stderr = capsys.readouterr().err
    assert ("--discount 0.88: success 40 steps away" in stderr and "expected about 0.8913" in stderr) == warned
