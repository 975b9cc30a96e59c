"""What envs.make does with any environment: its observations, its actions, its end, and what it refuses."""

import sys

import countdown  # noqa: F401  registers Countdown-v0
import gymnasium as gym
import numpy as np
import pytest

import common
import envs
from common import InputError

ONE_OF_EACH = ["pointmaze-large-play", "antmaze-umaze-v2", "kitchen-mixed-v0", "metaworld-door-open"]
ONE_OF_EACH += ["cube-single-noisy-singletask-task1-v0", "minari:test/pendulum-v0"]


def test_any_environment_is_flattened_and_rescaled():
    env = envs.make("Countdown-v0")
    obs, _ = env.reset(seed=0)
    assert env.observation_space.shape == (3,) and env.action_space.shape == (2,) and obs.dtype == np.float32
    assert obs[0] == 7  # a space made from a dict has its keys sorted
    env.step(np.array([-1.0, 1.0]))
    np.testing.assert_allclose(env.unwrapped.taken, [0, 4])
    env.step(np.array([0.5, 0.0]))
    np.testing.assert_allclose(env.unwrapped.taken, [7.5, 0])


def test_a_sparse_episode_ends_at_its_first_success():
    class Reach(gym.Env):
        observation_space, action_space = gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            self.t = 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            return np.zeros(1, np.float32), 0.0, False, self.t == 9, {"is_success": self.t == 4}

    gym.register("Reach-v0", entry_point=Reach)
    for sparse, length in ((True, 4), (False, 9)):
        env = envs.make("Reach-v0", sparse)
        (episode,) = common.run_episodes([env], lambda obs, keys: np.zeros((1, 1), np.float32), [0])
        assert len(episode["rewards"]) == length and episode["success"]
        assert episode["masks"].tolist() == [1.0] * (length - 1) + [0.0 if sparse else 1.0]


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(0, 10, (2,), np.int32),
        gym.spaces.Box(np.float32([-1, 0.5]), np.float32([1, 0.5])),
        gym.spaces.Box(-1, np.inf, (2,)),
        gym.spaces.Box(-1, 1, (2, 2)),
        gym.spaces.Discrete(3),
    ],
)
def test_action_spaces_that_cannot_be_rescaled(space, monkeypatch):
    monkeypatch.setitem(gym.registry, "Odd-v0", gym.envs.registration.EnvSpec("Odd-v0", entry_point=lambda: env))
    env = gym.Env()
    env.action_space, env.observation_space = space, gym.spaces.Box(-1, 1, (3,))
    with pytest.raises(InputError, match=r"--env-id Odd-v0: its action space is .*; expected a bounded Box"):
        envs.make("Odd-v0")


def test_gymnasium_robotics_does_without_mujoco_py():
    env = envs.make("gymnasium_robotics:FetchReach-v4", sparse=True)
    assert env.observation_space.shape == (16,) and env.reset(seed=0)[0].shape == (16,)
    assert env.step(np.zeros(4, np.float32))[4]["success"] is False


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "envs.minari", raising=False)
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(InputError, match=r"^--env-id minari:reach: .*; expected pip install minari$"):
        envs.make("minari:reach")
    assert "pointmaze-umaze-play" in envs.known_ids()
    monkeypatch.setitem(envs.MODULES, "minari", "absent")
    with pytest.raises(InputError, match=r"^--env-id minari:reach: .*; expected envs/absent\.py$"):
        envs.make("minari:reach")


def test_every_family_has_a_module():
    families = {common.family(env_id): env_id for env_id in ONE_OF_EACH}
    assert set(families) == set(common.FAMILIES.values()) == set(envs.MODULES)
    for env_id in ONE_OF_EACH:
        module = envs.family_module(env_id)
        assert all(hasattr(module, name) for name in ("IDS", "make", "dataset_file", "read_dataset"))
        assert env_id in module.IDS or env_id.startswith("minari:")
    assert envs.family_module("Pendulum-v1") is None
