"""An environment of images for the tests: a dot on a field of 32 x 32 pixels, to be pushed to the middle."""

import gymnasium as gym
import numpy as np


class Dot(gym.Env):
    """observation {"image": (32, 32, 3) uint8}; action (A,) in [-1, 1], of which the first two move the dot. It is
    in the middle from the fourth step on, if it is not at the border."""

    instruction = "push the dot to the middle"

    def __init__(self, act_dim=2):
        image = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
        self.observation_space = gym.spaces.Dict({"image": image, "state": gym.spaces.Box(-1, 1, (2,))})
        self.action_space = gym.spaces.Box(-1, 1, (act_dim,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps = self.np_random.uniform(-1, 1, 2), 0
        return self.observe(), {}

    def step(self, action):
        self.position = (self.position + 0.5 * np.asarray(action[:2])).clip(-1, 1)
        self.steps += 1
        success = bool(self.steps >= 4 and np.abs(self.position).max() < 0.8)
        return self.observe(), 0.0, False, False, {"success": success}  # pays nothing: success alone counts

    def observe(self):
        image = np.zeros((32, 32, 3), np.uint8)
        row, column = (16 + 13 * self.position).astype(int)
        image[row - 2 : row + 2, column - 2 : column + 2] = 255
        return {"image": image, "state": self.position.astype(np.float32)}


class Mute(Dot):
    """Without an instruction."""

    instruction = ""


class Told(Mute):
    """Says what to do when it is reset."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options=options)[0], {"instruction": "push it"}


for name, entry, options in [("Dot", Dot, {}), ("Dot7", Dot, {"act_dim": 7}), ("Mute", Mute, {}), ("Told", Told, {})]:
    gym.register(f"{name}-v0", entry_point=entry, max_episode_steps=8, kwargs=options)
