"""Minari: a dataset recorded here by the minari package, with nested dict observations, read back and compared."""

import importlib
import json
import sys
import types

import gymnasium as gym
import h5py
import numpy as np
import pytest
from parallel import PARALLEL

import common
import envs
from common import InputError

minari = pytest.importorskip("minari")
EpisodeBuffer = minari.data_collector.EpisodeBuffer
pytestmark = pytest.mark.filterwarnings("ignore:.*is set to None")


class Reach(gym.Env):
    """A point on a line moves by its action and terminates within 0.1 of a goal; observed under keys out of order."""

    action_space = gym.spaces.Box(-0.5, 0.5, (1,), np.float32)
    line = gym.spaces.Box(-9, 9, (1,), np.float64)
    observation_space = gym.spaces.Dict(
        {"z": gym.spaces.Box(-9, 9, (2, 1)), "a": gym.spaces.Dict({"y": line, "b": gym.spaces.Discrete(3)})}
    )

    def observe(self):
        half = int(np.sign(self.x) + 1)
        return {"a": {"b": half, "y": np.array([self.x])}, "z": np.array([[self.goal], [10 * self.x]], np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.goal = self.np_random.uniform(-0.5, 0.5), 0.75
        return self.observe(), {}

    def step(self, action):
        self.x += float(action[0])
        done = abs(self.x - self.goal) < 0.1
        return self.observe(), float(done), done, False, {}


gym.register("TestReach-v0", entry_point=f"{__name__}:Reach", max_episode_steps=4)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The id of a dataset in a folder of its own; and what was recorded: per episode states (L + 1, 6), actions."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env, rng, episodes, buffers = gym.make("TestReach-v0"), np.random.default_rng(0), [], []
    for seed in range(6):
        observations, steps, over = [env.reset(seed=seed)[0]], [], False
        while not over:
            action = 0.75 - observations[-1]["a"]["y"] if seed % 2 else rng.uniform(-0.5, 0.5, 1)
            action = np.clip(action, -0.5, 0.5).astype(np.float32)
            obs, reward, terminated, truncated, _ = env.step(action)
            observations.append(obs)
            steps.append((action, reward, terminated, truncated))
            over = terminated or truncated
        columns = dict(
            zip(("actions", "rewards", "terminations", "truncations"), zip(*steps, strict=True), strict=True)
        )
        inner = {key: [obs["a"][key] for obs in observations] for key in ("y", "b")}
        stored = {"z": [obs["z"] for obs in observations], "a": inner}
        buffers.append(EpisodeBuffer(id=seed, observations=stored, **{k: list(v) for k, v in columns.items()}))
        states = np.array([gym.spaces.flatten(Reach.observation_space, obs) for obs in observations])
        episodes.append((states, np.array(columns["actions"]), terminated))
    minari.create_dataset_from_buffers("test/reach-v0", buffers, env=env, jpeg_encoding=False)
    return "minari:test/reach-v0", episodes


def test_flattened_as_gymnasium_does(recorded):
    """Catches another order of keys (a before z, b before y), or a row that is not its own episode's."""
    env_id, episodes = recorded
    env = envs.make(env_id)
    assert env.observation_space.shape == (6,) and env.unwrapped.spec.id == "TestReach-v0"
    obs, _ = env.reset(seed=5)
    np.testing.assert_allclose(obs, episodes[5][0][0], rtol=1e-6)
    assert obs[3] == pytest.approx(env.unwrapped.x) and obs[5] == pytest.approx(10 * env.unwrapped.x)  # b b b y z z
    data = envs.family_module(env_id).read_dataset(env_id, envs.dataset_file(env_id))
    np.testing.assert_allclose(data["observations"], np.concatenate([s[:-1] for s, _, _ in episodes]), rtol=1e-6)
    np.testing.assert_allclose(data["next_observations"], np.concatenate([s[1:] for s, _, _ in episodes]), rtol=1e-6)
    last = np.cumsum([len(actions) for _, actions, _ in episodes]) - 1
    succeeded = np.array([terminated for _, _, terminated in episodes])
    assert succeeded.any() and not succeeded.all()
    assert np.flatnonzero(data["terminals"]).tolist() == last[succeeded].tolist()
    assert np.flatnonzero(data["timeouts"]).tolist() == last.tolist()


def test_loaded_for_training(recorded):
    """Every transition is kept, the last of a truncated episode too; actions are rescaled from [-0.5, 0.5]."""
    env_id, episodes = recorded
    buffer = envs.load_dataset(env_id, reward_bias=-1.0, sparse=True)
    actions = np.concatenate([actions for _, actions, _ in episodes])
    assert len(buffer) == len(actions) and buffer.num_states == len(buffer) + len(episodes)
    np.testing.assert_allclose(buffer.actions[: len(buffer)], np.clip(2 * actions, -0.99999, 0.99999), rtol=1e-6)
    failed = next(i for i, (_, _, terminated) in enumerate(episodes) if not terminated)
    start = sum(len(actions) for _, actions, _ in episodes[:failed])
    assert buffer.mc_returns[start] == pytest.approx(-100)


def test_another_file_wins(recorded, tmp_path):
    env_id, _ = recorded
    rows = dict(actions=np.zeros((2, 1)), rewards=np.zeros(2), terminals=np.array([0, 1]), timeouts=np.zeros(2))
    np.savez(tmp_path / "mine.npz", observations=np.zeros((2, 6)), **rows)
    assert len(envs.load_dataset(env_id, str(tmp_path / "mine.npz"))) == 2


def test_other_storage_is_refused(recorded, monkeypatch, tmp_path):
    """Minari's arrow and parquet have no such file."""
    module = envs.family_module(recorded[0])
    storage = types.SimpleNamespace(data_path=tmp_path / "arrow")
    monkeypatch.setattr(module, "load", lambda env_id: types.SimpleNamespace(storage=storage))
    with pytest.raises(InputError, match=r"minari:test/reach-v0: no .*arrow/main_data\.hdf5; expected .* HDF5"):
        envs.dataset_file(recorded[0])


def test_unknown_dataset(recorded):
    with pytest.raises(InputError, match=r"--env-id minari:reach.*present: test/reach-v0"):
        envs.make("minari:reach")  # no version: refused before any download


# ---------------------------------------------------------------- what is wrong with a file


@pytest.fixture
def file(recorded, tmp_path):
    """The HDF5 file of the dataset that was recorded here, which nobody can give back."""
    return tmp_path / "test" / "reach-v0" / "data" / "main_data.hdf5"


def truncate(path):
    path.write_bytes(path.read_bytes()[:3000])


def delete(key):
    def damage(path):
        with h5py.File(path, "a") as file:
            del file[key]

    return damage


def change(key, value):
    """Replaces an array of the file by value(array)."""

    def damage(path):
        with h5py.File(path, "a") as file:
            array = file[key][()]
            del file[key]
            file[key] = value(array)

    return damage


def poke(index, value):
    def change(array):
        array = array.astype(float)
        array[index] = value
        return array

    return change


DAMAGE = {
    "truncated": (truncate, r"episode 0: cannot be read \(OSError: .*truncated"),
    "empty": (lambda path: path.write_bytes(b""), r"episode 0: cannot be read \(OSError: "),
    "an episode is missing": (delete("episode_2"), r"episode 2: .*'episode_2' doesn't exist"),
    "no rewards": (delete("episode_1/rewards"), r"episode 1: cannot be read \(KeyError: .*'rewards' doesn't exist"),
    "no key of the observations": (
        delete("episode_3/observations/a/y"),
        r"episode 3: cannot be read \(KeyError: 'y'\); expected .*observations of Dict\('a': Dict\('b': .*",
    ),
    "NaN observation": (
        change("episode_1/observations/a/y", poke((1, 0), np.nan)),
        r"episode 1: observations\[1, 3\] = nan; expected finite",
    ),
    "infinite reward": (change("episode_4/rewards", poke(1, np.inf)), r"episode 4: rewards\[1\] = inf; expected"),
    "action outside": (
        change("episode_2/actions", poke((3, 0), 0.7)),
        r"episode 2: actions\[3, 0\] = 0.7; expected within .* \[-0.5\] to \[0.5\]",
    ),
    "rewards of shape (1,)": (
        change("episode_0/rewards", lambda rewards: rewards[:, None]),
        r"episode 0: rewards has shape \(4, 1\); expected \(4,\), one number a row",
    ),
    "an action too few": (
        change("episode_0/actions", lambda actions: actions[:-1]),
        r"episode 0: actions has shape \(3, 1\); expected \(4, 1\)",
    ),
    "an observation too few": (
        change("episode_0/observations/z", lambda values: values[:-1]),
        r"episode 0: cannot be read \(ValueError: ",
    ),
    "no such class": (
        change("episode_2/observations/a/b", lambda values: values + 9),
        r"episode 2: cannot be read \(IndexError: ",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_bad_file_names_episode_and_step(case, recorded, file):
    """And no way to get it again: it was recorded here."""
    damage, message = DAMAGE[case]
    damage(file)
    with pytest.raises(InputError, match=rf"^dataset {file}: {message}") as error:
        envs.load_dataset(recorded[0])
    assert "\n" not in str(error.value) and not any(word in str(error.value) for word in ("delete", "again"))


@pytest.mark.parametrize("package", ["no_such_package:Reach", "gymnasium.envs.box2d.car_racing:CarRacing"])
def test_an_environment_that_cannot_be_made(package, recorded, file, monkeypatch):
    monkeypatch.setitem(sys.modules, "Box2D", None)
    metadata = json.loads((file.parent / "metadata.json").read_text())
    spec = json.loads(metadata["env_spec"]) | {"entry_point": package, "kwargs": {}}
    (file.parent / "metadata.json").write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))
    with pytest.raises(InputError, match=r"^--env-id minari:test/reach-v0: its environment TestReach-v0: ") as error:
        envs.make(recorded[0])
    assert str(error.value).endswith("; expected the package that has it, installed") and "\n" not in str(error.value)


class Pair(gym.Env):
    """Observes a tuple in a dict."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gym.spaces.Dict(t=gym.spaces.Tuple((gym.spaces.Discrete(3), gym.spaces.Box(-9, 9, (2,)))))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self):
        return {"t": (self.t % 3, np.array([self.t, -self.t], np.float32))}

    def step(self, action):
        self.t += 1
        return self.observe(), 0.0, False, False, {}


gym.register("TestPair-v0", entry_point=f"{__name__}:Pair", max_episode_steps=4)


def test_tuples_are_flattened_as_gymnasium_does(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gym.make("TestPair-v0")
    seen = [env.reset(seed=0)[0]["t"], *(env.step(np.zeros(1, np.float32))[0]["t"] for _ in range(4))]
    ends = dict(terminations=[False] * 4, truncations=[False] * 3 + [True])
    actions = [np.zeros(1, np.float32)] * 4
    stored = {"t": tuple(map(list, zip(*seen, strict=True)))}
    buffer = EpisodeBuffer(id=0, observations=stored, actions=actions, rewards=[0.0] * 4, **ends)
    minari.create_dataset_from_buffers("test/pair-v0", [buffer], env=env, jpeg_encoding=False)
    loaded = envs.load_dataset("minari:test/pair-v0")
    expected = [[float(t % 3 == i) for i in range(3)] + [t, -t] for t in range(5)]
    np.testing.assert_array_equal(loaded.states[:5], expected)
    np.testing.assert_array_equal(envs.make("minari:test/pair-v0").reset(seed=0)[0], expected[0])


class Unsorted(Pair):
    """Its keys in an order of their own, which Minari does not keep."""

    observation_space = gym.spaces.Dict(z=gym.spaces.Box(-99, 99, (1,)), a=gym.spaces.Box(-99, 99, (1,)))

    def observe(self):
        return {"z": np.array([self.t], np.float32), "a": np.array([10 * self.t], np.float32)}


gym.register("TestUnsorted-v0", entry_point=f"{__name__}:Unsorted", max_episode_steps=4)


def test_keys_stand_as_in_the_environment(tmp_path, monkeypatch):
    """Columns of the dataset exchanged, without a word."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gym.make("TestUnsorted-v0")
    seen = [env.reset(seed=0)[0], *(env.step(np.zeros(1, np.float32))[0] for _ in range(4))]
    ends = dict(terminations=[False] * 4, truncations=[False] * 3 + [True])
    stored = {key: [obs[key] for obs in seen] for key in ("z", "a")}
    buffer = EpisodeBuffer(id=0, observations=stored, actions=[np.zeros(1, np.float32)] * 4, rewards=[0.0] * 4, **ends)
    minari.create_dataset_from_buffers("test/unsorted-v0", [buffer], env=env, jpeg_encoding=False)
    expected = [[t, 10 * t] for t in range(5)]
    np.testing.assert_array_equal(envs.load_dataset("minari:test/unsorted-v0").states[:5], expected)
    own = envs.make("minari:test/unsorted-v0")
    own.reset(seed=0)
    np.testing.assert_array_equal(own.step(np.zeros(1, np.float32))[0], expected[1])


MAZE_IDS = {
    "minari:D4RL/antmaze/umaze-v1": True,
    "minari:D4RL/antmaze/large-diverse-v1": True,
    "minari:D4RL/pointmaze/medium-v2": True,
    "minari:D4RL/pointmaze/medium-dense-v2": False,
    "minari:D4RL/door/human-v2": False,
    "minari:mine/maze-v0": False,
}


@pytest.mark.parametrize("env_id", MAZE_IDS)
@pytest.mark.parametrize("script", PARALLEL)
def test_mazes_are_sparse_where_the_id_tells(script, env_id):
    """A maze learned from as rewards of 0 and 1 without an end, or a dense one as sparse."""
    module = importlib.import_module(script)
    args = common.parse(["--env-id", env_id], module.Args, module.PRESETS, "")
    expected = (True, -1.0, 0.998) if MAZE_IDS[env_id] else (False, 0.0, 0.99)
    assert (args.sparse_reward, args.reward_bias, args.discount) == expected
    assert envs.family_module(env_id).__name__ == "envs.minari"
    kept = common.parse(["--env-id", env_id, "--reward-bias", "-3"], module.Args, module.PRESETS, "")
    assert kept.reward_bias == -3 and kept.sparse_reward == args.sparse_reward
