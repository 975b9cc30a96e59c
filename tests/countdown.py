"""An environment for the tests, of dict observations and other bounds than [-1, 1]: "Countdown-v0" once imported."""

import gymnasium as gym
import numpy as np


class Countdown(gym.Env):
    """Ends after a number of steps drawn at reset; the action's first number is the reward. Bounds are not [-1, 1]."""

    observation_space = gym.spaces.Dict({"b": gym.spaces.Box(-99, 99, (2,)), "a": gym.spaces.Box(-99, 99, (1,))})
    action_space = gym.spaces.Box(np.array([0, -4], np.float32), np.array([10, 4], np.float32))

    def obs(self):
        return {"b": np.array([self.left, 0], np.float32), "a": np.array([7], np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 30))
        return self.obs(), {}

    def step(self, action):
        self.left -= 1
        self.taken = action
        return self.obs(), float(action[0]), self.left == 0, False, {"is_success": self.left == 0 and action[0] > 5}


gym.register("Countdown-v0", entry_point=Countdown)
