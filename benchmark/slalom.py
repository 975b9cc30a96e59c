"""A task whose demonstrations are multimodal: past four pillars, left or right of each, both ways equally long.

python benchmark/slalom.py           # writes benchmark/slalom.npz, the demonstrations
python parl_gaussian.py --env-id benchmark.slalom:Slalom-v0 --dataset-path benchmark/slalom.npz ...   # slalom.txt
"""

from pathlib import Path

import gymnasium as gym
import numpy as np

PILLARS = np.array([[0.5, 0.0], [1.5, 0.0], [2.5, 0.0], [3.5, 0.0]])
RADIUS, WALL, STRIDE = 0.25, 0.8, 0.7  # of a pillar; distance of the walls from the middle; longest step per axis


def blocked(start, end):
    """Does the way from start (2,) to end (2,) leave the corridor or touch a pillar?"""
    points = start + np.linspace(0, 1, 20)[:, None] * (end - start)
    return abs(end[1]) > WALL or (np.linalg.norm(points[:, None] - PILLARS, axis=-1) < RADIUS).any()


class Slalom(gym.Env):
    """observation (2,): position; action (2,): the step, in units of STRIDE. Reward 1 and the end of the episode
    past the last pillar, else 0; a step that is blocked ends it too, in failure. Two steps per pillar suffice."""

    observation_space = gym.spaces.Box(-5, 5, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-0.05, 0.05, 2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        start, self.position = self.position, self.position + STRIDE * np.clip(action, -1, 1)
        failure = blocked(start, self.position)
        success = not failure and bool(self.position[0] > 3.9)
        return self.position.astype(np.float32), float(success), failure or success, False, {"success": success}


gym.register("Slalom-v0", entry_point=Slalom, max_episode_steps=12)


def record(env, expert, num_episodes, seed):
    """The arrays of a dataset file (see envs/files.py): episodes of expert(rng), which returns act(obs) for each."""
    rng, rows = np.random.default_rng(seed), []
    for episode in range(num_episodes):
        (obs, _), act = env.reset(seed=seed + episode), expert(rng)
        terminated = truncated = False
        while not (terminated or truncated):
            action = np.clip(act(obs), -1, 1).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, terminated, truncated, following))
            obs = following
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    return {name: np.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def demonstrations(num_episodes, seed=0):
    """Diagonally past a pillar, on a side drawn afresh at each, and back to the middle, with Gaussian noise."""

    def expert(rng):
        def act(obs):
            node = max(round(float(obs[0]) - 0.25), 0)  # before pillar `node`, or beside it
            beside = obs[0] > node + 0.25
            target = np.array([node + 1.0, 0.0] if beside else [node + 0.5, 0.5 * rng.choice([-1, 1])])
            return (target - obs) / STRIDE + 0.07 * rng.standard_normal(2)

        return act

    return record(gym.make("Slalom-v0"), expert, num_episodes, seed)


if __name__ == "__main__":
    data = demonstrations(1500)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **data)
    episodes = (data["terminals"] | data["timeouts"]).sum()
    print(f"{len(data['rewards'])} transitions, {episodes} episodes, {data['rewards'].sum() / episodes:.0%} successful")
