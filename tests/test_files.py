"""Dataset files: what is refused and how, how episodes are split, what load_dataset makes of them."""

import zipfile

import gymnasium as gym
import h5py
import numpy as np
import pytest
from countdown import Countdown

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
    "another action size": (dict(actions=lambda x: x[:, :1]), r"\(40, 1\); expected \(40, 2\)"),
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
        (tmp_path / "group.hdf5", "missing observations, actions"),
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


def test_a_file_that_was_made_here_can_be_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("PARL_CACHE", str(tmp_path))
    path = envs.dataset_file("pointmaze-umaze-play")
    path.write_text("half")
    with pytest.raises(InputError, match=rf"dataset {path}: cannot be read.*; delete it, and it is made"):
        envs.load_dataset("pointmaze-umaze-play")
    monkeypatch.setenv("PARL_CACHE", str(path))  # a file
    with pytest.raises(InputError, match=r"PARL_CACHE: .*; expected a folder that can be written"):
        envs.dataset_file("pointmaze-umaze-play")


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
