"""A policy as another library ships it: its own names, units, normaliser and loop. It knows nothing of PA-RL."""

from collections import deque

import numpy as np
import torch
import torch.nn as nn


class ChunkPolicy(nn.Module):
    """Flow matching over the next `horizon` actions given the last `n_obs_steps` observations, the older first.

    What goes in and comes out is in the robot's units; its own normaliser, of its own dataset, is in its state dict.
    """

    def __init__(
        self, obs_dim, action_dim, n_obs_steps=2, horizon=8, n_action_steps=4, width=64, num_inference_steps=6
    ):
        super().__init__()
        self.n_obs_steps, self.horizon, self.n_action_steps = n_obs_steps, horizon, n_action_steps
        self.action_dim, self.num_inference_steps = action_dim, num_inference_steps
        self.encoder = nn.Sequential(
            *(nn.Linear(n_obs_steps * obs_dim, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
        )
        self.velocity = nn.Sequential(
            *(nn.Linear(width + horizon * action_dim + 1, 2 * width), nn.SiLU()),
            *(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, horizon * action_dim)),
        )
        for name, size in (("obs_mean", obs_dim), ("action_min", action_dim)):
            self.register_buffer(name, torch.zeros(size))
        for name, size in (("obs_std", obs_dim), ("action_max", action_dim)):
            self.register_buffer(name, torch.ones(size))

    def set_normalizer(self, obs, action):
        """obs (N, O), action (N, A) of the dataset: observations to mean 0 and std 1, actions to [-1, 1]."""
        values = dict(obs_mean=obs.mean(0), obs_std=obs.std(0), action_min=action.min(0), action_max=action.max(0))
        for name, value in values.items():
            getattr(self, name).copy_(torch.from_numpy(value))

    def forward(self, features, x, time):
        return self.velocity(torch.cat([features, x, time], -1))

    def encode(self, obs):  # (B, 2, O) -> (B, W)
        return self.encoder(((obs - self.obs_mean) / self.obs_std).flatten(1))

    def predict_action(self, obs_dict):
        """{"obs": (B, 2, O)} -> {"action": (B, 4, A), "action_pred": (B, 8, A)}."""
        features = self.encode(obs_dict["obs"])
        x = torch.randn(len(features), self.horizon * self.action_dim, device=features.device)
        for step in range(self.num_inference_steps):
            time = torch.full((len(x), 1), step / self.num_inference_steps, device=x.device)
            x = x + self(features, x, time) / self.num_inference_steps
        x = x.clamp(-1, 1).unflatten(-1, (self.horizon, self.action_dim))
        action = self.action_min + (x + 1) / 2 * (self.action_max - self.action_min)
        return {"action": action[:, : self.n_action_steps], "action_pred": action}

    def compute_loss(self, batch):
        """{"obs": (B, 2, O), "action": (B, 8, A)} -> scalar."""
        features, action = self.encode(batch["obs"]), batch["action"]
        x = (2 * (action - self.action_min) / (self.action_max - self.action_min) - 1).flatten(1)
        noise, time = torch.randn_like(x), torch.rand(len(x), 1, device=x.device)
        return (self(features, (1 - time) * noise + time * x, time) - (x - noise)).square().mean()


def train(policy, episodes, num_steps, batch_size=128, lr=2e-3):
    """Clone `episodes`, [(obs (L, O), action (L, A))]. An episode's first observation and last action are repeated."""
    policy.set_normalizer(*(np.concatenate(arrays) for arrays in zip(*episodes, strict=True)))
    obs, action = [], []
    for episode_obs, episode_action in episodes:
        steps, last = np.arange(len(episode_obs))[:, None], len(episode_obs) - 1
        obs.append(episode_obs[np.maximum(steps + np.arange(1 - policy.n_obs_steps, 1), 0)])
        action.append(episode_action[np.minimum(steps + np.arange(policy.horizon), last)])
    obs, action = torch.from_numpy(np.concatenate(obs)), torch.from_numpy(np.concatenate(action))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / num_steps)
        rows = torch.randint(len(obs), (batch_size,))
        optimizer.zero_grad()
        policy.compute_loss({"obs": obs[rows], "action": action[rows]}).backward()
        optimizer.step()
    policy.eval()


@torch.no_grad()
def evaluate(policy, env, seed):
    """One episode of its own loop: (success, observations (L + 1, O)). Each decision's noise has a seed of its own."""
    obs, observations, done = env.reset(seed=seed)[0], [], False
    history = deque([obs] * policy.n_obs_steps, policy.n_obs_steps)
    observations.append(obs)
    while not done:
        torch.manual_seed(hash((seed, len(observations) - 1)))
        chunk = policy.predict_action({"obs": torch.from_numpy(np.stack(history))[None]})["action"][0].numpy()
        for action in chunk:
            obs, _, terminated, truncated, info = env.step(action)
            history.append(obs)
            observations.append(obs)
            if done := terminated or truncated:
                break
    return info["success"], np.stack(observations)
