"""Minari: a dataset recorded here by the minari package, with nested dict observations, read back and compared."""

import types

import gymnasium as gym
import numpy as np
import pytest

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
