"""Files in robomimic's layout: the order of demonstrations and keys, where episodes end, what is refused."""

import json
import sys
import types

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import run_here, snippet

import envs
from common import InputError


class Arm(gym.Env):
    """observation (4,): pos (3,) and grip; action (2,)."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.standard_normal(4, np.float32), {}

    def step(self, action):
        return self.np_random.standard_normal(4, np.float32), 0.0, False, False, {"success": False}


gym.register("Grip-v0", entry_point=Arm, max_episode_steps=6)
KEYS = ("pos", "grip")


def demonstration(number, length, success):
    """One of `length` steps whose positions are 100 N + step, and grip 0.5 more; success pays at the last step."""
    steps = 100 * number + np.arange(length + 1.0)
    seen = {"pos": np.stack([steps] * 3, 1), "grip": steps + 0.5, "image": np.zeros((length + 1, 5, 5, 3), np.uint8)}
    last = np.arange(length) == length - 1
    columns = dict(actions=np.full((length, 2), number / 10), rewards=1.0 * (last & success), dones=1 * last)
    columns |= {f"obs/{key}": array[:-1] for key, array in seen.items()}
    return columns | {f"next_obs/{key}": array[1:] for key, array in seen.items()}


def write(path, demos, with_next=True):
    """demos: {number: columns}, written in the order given."""
    with h5py.File(path, "w") as file:
        for number, columns in demos.items():
            for key, array in columns.items():
                if with_next or not key.startswith("next_obs"):
                    file[f"data/demo_{number}/{key}"] = array
        file["mask/train"] = np.array([b"demo_2"])
    return path


@pytest.fixture
def demos():
    return {10: demonstration(10, 4, True), 2: demonstration(2, 3, False)}


def load(path, obs_keys=KEYS, sparse=True):
    return envs.load_dataset("Grip-v0", path, 1.0, -1.0, 0.5, sparse, obs_keys=obs_keys)


def test_what_is_no_demonstration(demos, tmp_path):
    """One without steps, and an array of such a name: neither ends the reading of the others."""
    path = write(tmp_path / "a.hdf5", demos | {3: {key: array[:0] for key, array in demos[2].items()}})
    with h5py.File(path, "a") as file:
        file["data/demo_5"] = np.zeros(3)
    assert len(load(path)) == 7


def test_demonstrations_by_number_and_keys_in_the_order_given(demos, tmp_path):
    """demo_10 before demo_2, as names sort; keys as they lie in the file; rewards and actions as they are."""
    buffer = load(write(tmp_path / "a.hdf5", demos))
    expected = np.array([200, 201, 202, 203, 1000, 1001, 1002, 1003, 1004])
    np.testing.assert_array_equal(buffer.states[:9], np.stack([expected] * 3 + [expected + 0.5], 1))
    np.testing.assert_allclose(buffer.actions[:7, 0], [0.1] * 3 + [0.5] * 4)  # 0.2 and 1.0 of 2
    assert len(buffer) == 7 and buffer.num_states == 9
    assert buffer.rewards[:7].tolist() == [-1] * 6 + [0] and buffer.masks[:7].tolist() == [1] * 6 + [0]
    assert buffer.mc_returns[:7].tolist() == [-2, -2, -2, -1.75, -1.5, -1, 0]  # demo_2 never succeeds
    other = load(write(tmp_path / "b.hdf5", demos), KEYS[::-1])
    np.testing.assert_array_equal(other.states[:9], np.stack([expected + 0.5] + [expected] * 3, 1))


def test_another_order_than_the_environments_is_refused(demos, tmp_path, monkeypatch):
    """Of the same size, so that no shape tells."""
    space = gym.spaces.Dict(grip=gym.spaces.Box(-9, 9, (1,)), pos=gym.spaces.Box(-9, 9, (3,)))
    monkeypatch.setattr(Arm, "observation_space", space)
    path = write(tmp_path / "a.hdf5", demos)
    assert len(load(path, ("grip", "pos"))) == 7
    with pytest.raises(InputError, match="--obs-keys pos grip: observations are in another order; expected grip pos"):
        load(path, ("pos", "grip"))


def test_without_next_observations_an_end_that_is_no_success_is_dropped(demos, tmp_path):
    buffer = load(write(tmp_path / "a.hdf5", demos, with_next=False))
    assert buffer.states[: buffer.num_states, 0].tolist() == [200, 201, 202, 1000, 1001, 1002, 1003, 1003]
    assert buffer.masks[: len(buffer)].tolist() == [1, 1, 1, 1, 1, 0]
    del demos[2]["next_obs/pos"]  # in one demonstration: it counts for all
    assert load(write(tmp_path / "b.hdf5", demos)).num_states == 8


def test_a_demonstration_ends_at_its_first_success(demos, tmp_path):
    """Held for two more steps, each of them a success and done; without it, each would be an episode of one step."""
    demos[10]["rewards"][1:], demos[10]["dones"][1:] = 1, 1
    for sparse in (True, False):
        buffer = load(write(tmp_path / "a.hdf5", demos), sparse=sparse)
        assert len(buffer) == 5 and buffer.masks[:5].tolist() == [1, 1, 1, 1, 0]
        assert buffer.states[:7, 0].tolist() == [200, 201, 202, 203, 1000, 1001, 1002]


def test_a_single_image_keeps_its_shape_and_others_are_flattened(demos, tmp_path):
    path = write(tmp_path / "a.hdf5", demos)
    assert envs.read_dataset("Grip-v0", path, ("image",))["observations"].shape == (7, 5, 5, 3)
    assert envs.read_dataset("Grip-v0", path, ("image", "grip"))["observations"].shape == (7, 76)


def change(number, **columns):
    def damage(demos):
        for key, value in columns.items():
            key = key.replace("__", "/")
            demos[number][key] = value(demos[number][key]) if callable(value) else value

    return damage


def remove(number, *keys):
    def damage(demos):
        for key in keys:
            del demos[number][key]

    return damage


def store_as_array(demos):
    remove(2, "obs/pos", "obs/grip", "obs/image")(demos)
    demos[2]["obs"] = np.zeros((3, 3))


BAD = {
    "an array of observations": (store_as_array, "demo_2/obs is an array; expected a group of them"),
    "no such key": (remove(10, "obs/grip"), r"--obs-keys pos grip: .*demo_10 has no obs/grip; .* of image, pos$"),
    "no observations": (remove(2, "obs/pos", "obs/grip", "obs/image"), "demo_2 has no obs/pos; .*it has no obs"),
    "no dones": (remove(2, "dones"), "demo_2 has no array dones"),
    "no actions": (remove(10, "actions"), "demo_10 has no array actions"),
    "a scalar": (change(2, rewards=1.0), "demo_2 has no array rewards; expected one with a row for each step"),
    "a reward too few": (change(2, rewards=lambda x: x[:-1]), "demo_2: rewards has 2 rows; expected 3, as actions"),
    "an observation more": (change(2, obs__pos=np.zeros((4, 3))), "demo_2: obs/pos has 4 rows; expected 3"),
    "rewards in a column": (change(2, rewards=lambda x: x[:, None]), r"demo_2: rewards has shape \(3, 1\); expected"),
    "NaN": (change(2, rewards=lambda x: x * np.nan), r"demo_2: rewards\[0\] = nan"),
    "another width": (change(2, obs__pos=np.zeros((3, 2))), "cannot be read as robomimic's .*dimension"),
    "beyond the bounds": (change(10, actions=lambda x: x + 9), r"actions\[3, 0\] = 10.0; expected within"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, demos, tmp_path):
    damage, message = BAD[case]
    damage(demos)
    path = write(tmp_path / "a.hdf5", demos)
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_flag_belongs_to_the_layout(demos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--obs-keys is not given; expected some of grip, image, pos$"):
        load(write(tmp_path / "a.hdf5", demos), ())
    rows = dict(actions=np.zeros((2, 2)), rewards=np.zeros(2), terminals=np.array([0, 1]), timeouts=np.zeros(2))
    np.savez(tmp_path / "plain.npz", observations=np.zeros((2, 4)), **rows)
    with pytest.raises(InputError, match=r"--obs-keys pos grip: dataset .*plain\.npz .*robomimic's layout$"):
        load(tmp_path / "plain.npz")
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.hdf5")
    with pytest.raises(SystemExit, match="--obs-keys pos grip: expected --dataset-path FILE"):
        run_here("parl_gaussian", "--obs-keys", *KEYS)


def test_damaged_files_are_read_or_refused(demos, tmp_path):
    path, rng, refused = write(tmp_path / "a.hdf5", demos), np.random.default_rng(0), 0
    good = path.read_bytes()
    for _ in range(60):
        bad = bytearray(good)
        for where in rng.integers(len(bad), size=rng.integers(1, 100)):
            bad[where] ^= int(rng.integers(1, 256))
        path.write_bytes(bad)
        try:
            envs.read_dataset("Grip-v0", path, KEYS)
        except InputError:  # any other error is a fault
            refused += 1
    assert refused > 5


# ---------------------------------------------------------------- the environment of docs/environments.md


class Simulator:
    """What the page uses of a robosuite environment."""

    action_spec = np.full(2, -2.0), np.full(2, 2.0)

    def reset(self):
        self.steps = 0
        return self.observe(np.random.uniform(size=3))

    def step(self, action):
        self.steps += 1
        return self.observe(np.zeros(3)), float(self.steps > 2), False, {}

    def observe(self, position):
        keys = {"robot0_eef_pos": position, "robot0_eef_quat": np.ones(4), "robot0_gripper_qpos": np.zeros(2)}
        return {"object-state": np.full(5, self.steps), "image": None} | keys

    def _check_success(self):
        return self.steps > 2


def test_the_environment_of_the_docs_observes_what_the_file_holds(tmp_path, monkeypatch):
    """In the order of the flag, through a whole run."""
    monkeypatch.chdir(tmp_path)
    made = []
    make = lambda name, **kwargs: made.append((name, kwargs)) or Simulator()  # noqa: E731
    monkeypatch.setitem(sys.modules, "robosuite", types.SimpleNamespace(make=make))
    names = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object"]
    rng, demos = np.random.default_rng(0), {}
    for number in range(3):
        columns = demonstration(number, 5, True)
        demos[number] = {key: columns[key] for key in ("actions", "rewards", "dones")}
        for key, size in zip(names, (3, 4, 2, 5), strict=True):
            demos[number][f"obs/{key}"] = rng.standard_normal((5, size))
    with h5py.File(write("low_dim.hdf5", demos), "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"robots": ["Panda"]}})
    exec(snippet("class Robosuite"), vars(module := types.ModuleType("my_robosuite")))
    monkeypatch.setitem(sys.modules, "my_robosuite", module)
    try:
        env = envs.make("my_robosuite:Lift-v0")
        first, again = (env.reset(seed=1)[0] for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert first[3:].tolist() == [1] * 4 + [0] * 2 + [0] * 5 and first[:3].min() > 0
        assert made == [("Lift", {"robots": ["Panda"], "ignore_done": True})]
        flags = ["--env-id", "my_robosuite:Lift-v0", "--dataset-path", "low_dim.hdf5", "--obs-keys", *names]
        flags += ["--sparse-reward", "--reward-bias", -1, "--bc-steps", 3, "--offline-steps", 3, "--online-episodes", 1]
        flags += ["--batch-size", 4, "--num-eval-episodes", 1, "--hidden-dims", 8, "--num-bins", 8, "--width", 8]
        run_here("parl_gaussian", *flags, "--num-samples", 2, "--num-keep", 1, "--run-dir", "run")
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["obs_keys"] == names and config["obs_dim"] == 14
        run_here("parl_gaussian", "--resume", "run", "--eval-only")
        for flag, path in (("--resume", "run"), ("--policy-checkpoint", "run/checkpoint.pt")):  # as wide in this order
            with pytest.raises(SystemExit, match=r"--obs-keys is \(.* there and \(.* here; expected the same"):
                run_here(
                    "parl_gaussian", *flags, "--num-samples", 2, "--num-keep", 1, flag, path, "--obs-keys", *names[::-1]
                )
    finally:
        gym.registry.pop("Lift-v0", None)
