"""An environment of images for the tests: a dot on a field of 32 x 32 pixels, to be pushed to the middle."""

import os
import signal

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


class Opposite(Mute):
    """The same image always; what is wanted of the first action's sign is said at each reset, one then the other."""

    asks, told = 0, 0

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.position, self.steps, self.told = np.zeros(2), 0, 1 - 2 * (self.asks % 2)
        self.asks += 1
        return self.observe(), {"instruction": "go left" if self.told < 0 else "go right"}

    def step(self, action):
        return self.observe(), 0.0, False, False, {"success": bool(self.told * action[0] > 0.3)}


class Arm(Dot):
    """A robot that notes what it is asked in the file $ARM_LOG: made, reset, step, outside (its bounds), close. At its
    step number $ARM_AT it gets the signal $ARM_SIGNAL, or pays NaN without one."""

    def __init__(self):
        super().__init__()
        self.action_space = gym.spaces.Box(np.float32([-0.0287, -0.3]), np.float32([0.0283, 0.7]))
        self.num_steps = 0
        self.note("made")

    def note(self, what):
        with open(os.environ["ARM_LOG"], "a") as file:
            file.write(what + "\n")

    def reset(self, *, seed=None, options=None):
        self.note("reset")
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.note("step" if self.action_space.contains(action) else "outside")
        self.num_steps += 1
        obs, reward, *rest = super().step(action)
        if self.num_steps == int(os.environ.get("ARM_AT", 0)):
            if not (number := int(os.environ.get("ARM_SIGNAL", 0))):
                return obs, float("nan"), *rest
            os.kill(os.getpid(), signal.Signals(number))
        return obs, reward, *rest

    def close(self):
        self.note("close")


for name, entry, options, steps in [
    ("Dot", Dot, {}, 8),
    ("Dot7", Dot, {"act_dim": 7}, 8),
    ("Mute", Mute, {}, 8),
    ("Told", Told, {}, 8),
    ("Opposite", Opposite, {}, 3),
    ("Arm", Arm, {}, 8),
]:
    gym.register(f"{name}-v0", entry_point=entry, max_episode_steps=steps, kwargs=options)
