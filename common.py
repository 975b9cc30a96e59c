"""What the PA-RL scripts share and is not the algorithm: data, evaluation, the files of a run, the command line.

Read a `parl_*.py` first and come here for details. The buffer holds raw observations and scaled rewards (the scripts
normalise observations); actions are in [-1, 1] everywhere. Environments and datasets come from envs/.
"""

import argparse
import collections
import contextlib
import csv
import ctypes
import dataclasses
import fcntl
import fnmatch
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch


class InputError(ValueError):
    """The user asked for what cannot be done; the message names the flag or file and says what was expected."""


MADE = "made"  # as --dataset-path: data that are made here, in place of another project's


# ======================================== THE PROCESS ========================================


def start(args):
    """Seed torch and set its threads. Returns (device, a seeded numpy generator). Raises InputError without a GPU.

    numpy's and Python's global generators are seeded too, for environments that draw from them.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; expected cpu or auto")
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    random.seed(args.seed)
    keep_freed_memory()
    use_gpu = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
    return device, np.random.default_rng(args.seed)


@contextlib.contextmanager
def threads(number):
    """Within the block torch has so many threads, after it as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiled(function, **options):
    """torch.compile(function, **options) that captures the gradients taken inside of it as well. Raises InputError."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise InputError(f"--compile: torch {torch.__version__} cannot capture an update; expected 2.13 or later")
    torch._dynamo.config.trace_autograd_ops = True
    return torch.compile(function, **options)


def keep_freed_memory():
    """Have glibc keep what is freed for the next allocation: given back to the system, as it is by default from some
    megabytes on, every 4 kB of it costs a page fault when it is used again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, bytes, its maximum


def seeded_normal(shape, seeds=None, device="cpu"):
    """Standard normals of `shape` (B, ...), from torch's generator; with `seeds` (B tuples of integers >= 0), row i is
    drawn from seeds[i] alone: it depends neither on other rows nor on how rows are batched."""
    if seeds is None:
        return torch.randn(shape, device=device)
    rows = [np.random.default_rng(seed).standard_normal(shape[1:], np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).to(device)


def cache_sized(rows, *tensors):
    """Tuples of the tensors' rows, in equal parts of at most `rows` (and at least 1): on a CPU an operation is faster
    while the result of the one before is in the cache. All rows at once on a GPU and while compiling."""
    if tensors[0].is_cuda or torch.compiler.is_compiling():
        return [tensors]
    num_parts = max(1, math.ceil(len(tensors[0]) / max(1, rows)))
    return list(zip(*(tensor.chunk(num_parts) for tensor in tensors), strict=True))


# ======================================== TRANSITIONS ========================================


class Normalizer(torch.nn.Module):
    """obs (..., O) -> (obs - mean) / std of `states` (S, O), with std at least 1e-3; the identity for no states."""

    fixed_flags = ("normalize_obs",)

    def __init__(self, obs_dim, states=()):
        super().__init__()
        states = states if len(states) else np.array([[-1.0], [1.0]]) * np.ones(obs_dim)
        self.register_buffer("mean", torch.tensor(states.mean(0, dtype=np.float64), dtype=torch.float32))
        self.register_buffer("std", torch.tensor(states.std(0, dtype=np.float64).clip(1e-3), dtype=torch.float32))

    def forward(self, obs):
        return (obs - self.mean) / self.std


def mc_returns(rewards, masks, discount, sparse=False):
    """Return-to-go of one episode, G_t = r_t + discount * mask_t * G_{t+1}, with nothing after its last step.

    rewards, masks (L,), scaled as they are learned from -> (L,) float32. sparse: each step costs until success, which
    costs nothing; an episode of negative rewards alone never succeeded and goes on for ever at its last cost.
    NOTE(differs): an online episode that fails goes on for ever too (released: its sum so far, but for a robot).
    """
    rewards = np.asarray(rewards, np.float64)
    returns = np.zeros(len(rewards) + 1)
    if sparse and rewards.max() < 0:
        returns[-1], masks = rewards[-1] / (1 - discount), np.ones(len(rewards))
    for t in reversed(range(len(rewards))):
        returns[t] = rewards[t] + discount * masks[t] * returns[t + 1]
    return returns[:-1].astype(np.float32)


def endless_failure(rewards, masks, discount):
    """The rewards (L,) of a sparse episode: where a failure terminates it (a mask of 0, no success), its last cost is
    paid for ever, r / (1 - discount). One step's cost would make failing early worth more than trying.

    NOTE(differs): a failure that ends a sparse episode costs for ever (released: it costs one step).
    """
    rewards = np.array(rewards, np.float64)
    if masks[-1] == 0 and rewards.max() < 0:
        rewards[-1] /= 1 - discount
    return rewards


def scaled_rewards(episode, args):
    """reward * scale + bias (L,) of an episode with raw rewards (L,) and success. Raises InputError where
    --sparse-reward and not success alone, which ends the episode, pays 0."""
    rewards = np.asarray(episode["rewards"]) * args.reward_scale + args.reward_bias
    rewards = rewards.round(6) if args.sparse_reward else rewards  # success pays 0, not a rounding error
    is_sparse = rewards[:-1].max(initial=-1) < 0 and rewards[-1] <= 0 and (rewards[-1] == 0) == episode["success"]
    if args.sparse_reward and not is_sparse:
        most, last = rewards[:-1].max(initial=rewards[-1]), rewards[-1]
        paid = f"with --reward-scale and --reward-bias an episode paid {most:g} at most, and {last:g} at its end"
        expected = "expected 0 for success, info['success'], which ends it, and less for other steps"
        raise InputError(f"--sparse-reward: {paid}, with success {bool(episode['success'])}; {expected}")
    return rewards


def learned_from(episode, args):
    """The rewards (L,) that an online episode is learned from, scaled, and its returns-to-go (L,). Raises InputError
    as `scaled_rewards` does."""
    rewards, masks = scaled_rewards(episode, args), episode["masks"]
    returns = mc_returns(rewards, masks, args.discount, args.sparse_reward)
    if args.sparse_reward and masks[-1] == 0 and rewards.max() < 0:
        warn_once("--sparse-reward: an episode ended in a failure, which counts as its last cost for ever")
        rewards = endless_failure(rewards, masks, args.discount)
    return rewards, returns


@functools.cache
def warn_once(message):
    print(f"warning: {message}", file=sys.stderr)


def step_rewards(buffer, args):
    """The rewards (N,) that a step can pay, from which the range of values follows: of an `endless_failure` what one
    step costs."""
    rewards, masks = buffer.rewards[: len(buffer)], buffer.masks[: len(buffer)]
    if not args.sparse_reward:
        return rewards
    once = (rewards.astype(np.float64) * (1 - args.discount)).round(6)
    return np.where((masks > 0) | (rewards >= 0), rewards, once)


def value_range(rewards, args):
    """(q_min, q_max): --q-min and --q-max where given. Else q_min is what the lowest reward, or 0 if that is lower,
    adds up to for ever, r / (1 - discount), and q_max the same with the highest. rewards (N,): the dataset's, scaled.
    Raises InputError."""
    if args.sparse_reward and not len(rewards) and args.q_min is None and args.reward_bias >= 0:
        raise InputError("--q-min: expected one; there is no dataset to take what a step costs from")
    if args.sparse_reward and rewards.max(initial=0) > 0:
        raise InputError(f"--sparse-reward: the data pay {rewards.max():g}, scaled; expected success to pay most, 0")
    if args.sparse_reward:  # success pays 0, also where the data have none; a step costs the bias where they have none
        rewards = np.minimum(rewards if (rewards < 0).any() else np.append(rewards, args.reward_bias), 0.0)
    if len(rewards) == 0 and None in (args.q_min, args.q_max):
        raise InputError("--q-min --q-max: expected both; there is no dataset to take the range of values from")
    low, high = (round(float(bound(rewards, initial=0.0)) / (1 - args.discount), 6) for bound in (np.min, np.max))
    low, high = low if args.q_min is None else args.q_min, high if args.q_max is None else args.q_max
    if args.sparse_reward and low == 0:
        raise InputError("--sparse-reward: no reward * scale + bias is below 0; for rewards 0 and 1, --reward-bias -1")
    if not low < high:
        hint = "; every reward * scale + bias is 0, expected success to pay" if low == high == 0 else ""
        raise InputError(f"--q-min {low}: expected less than --q-max {high}{hint}")
    return low, high


class ReplayBuffer:
    """Episodes end to end. One of L steps adds L transitions and L + 1 states; a transition's next state is the row
    after its own, so that obs and next_obs are stored once. Arrays double when full.

    obs_dim: O; or the shape of images, (height, width, 3), with dtype np.uint8. What follows says (O,) for either.
    `sha256`: of the file that the episodes are from, None where they are from none. `note`: what whoever reads results
    has to know of it.
    """

    def __init__(self, obs_dim, act_dim, dtype=np.float32):
        self.num_states, self.num_transitions, self.sha256, self.note = 0, 0, None, ""
        self.states = np.zeros((1024, *np.atleast_1d(obs_dim)), dtype)
        self.actions = np.zeros((1024, act_dim), np.float32)
        self.rewards, self.masks, self.mc_returns = (np.zeros(1024, np.float32) for _ in range(3))
        self.state_rows = np.zeros(1024, np.int64)
        self.last_rows = np.zeros(1024, np.int64)  # for each transition that of its episode's last one
        self.starts_of = self.starts = None  # of `chunk_starts`: its answer, and to which (chunk, transitions)

    def __len__(self):
        return self.num_transitions

    def add_episode(self, observations, actions, rewards, masks, mc_returns):
        """observations (L + 1, O), the last next one included; actions (L, A); rewards, masks, mc_returns (L,).

        mask = 1 - terminated: 0 at success or failure, 1 elsewhere and at a time limit. Actions are clipped to
        +-0.99999, where a tanh policy can reach them. Raises ValueError for other lengths, actions beyond [-1, 1], and
        numbers that are not finite.
        """
        if not len(observations) - 1 == len(actions) == len(rewards) == len(masks) == len(mc_returns):
            raise ValueError("an episode of L actions has L + 1 observations and L rewards, masks and mc_returns")
        if not all(np.isfinite(values).all() for values in (observations, actions, rewards, masks, mc_returns)):
            raise ValueError("an episode has a number that is not finite")
        if np.abs(actions).max() > 1.01:
            raise ValueError(f"an episode has actions up to {np.abs(actions).max():g}; expected [-1, 1]")
        self.state_rows = append(self.state_rows, self.num_transitions, self.num_states + np.arange(len(actions)))
        self.states = append(self.states, self.num_states, observations)
        self.actions = append(self.actions, self.num_transitions, np.clip(actions, -0.99999, 0.99999))
        last_rows = np.full(len(actions), self.num_transitions + len(actions) - 1)
        per_step = dict(rewards=rewards, masks=masks, mc_returns=mc_returns, last_rows=last_rows)
        for name, values in per_step.items():
            setattr(self, name, append(getattr(self, name), self.num_transitions, values))
        self.num_states, self.num_transitions = self.num_states + len(observations), self.num_transitions + len(actions)

    def sample(self, batch_size, generator, chunk=1, discount=1.0):
        """Transitions, uniform with replacement: obs, next_obs (B, O), actions (B, A), rewards, masks, mc_returns (B,),
        and state_rows, next_state_rows (B,), the rows of obs and next_obs among `states`.

        chunk: h steps as one, with actions (B, h * A) one after the other, rewards sum_i discount^i r_{t+i}, and obs h
        steps on as next_obs. Any step begins one that has h steps left in its episode, or fewer to a terminal, after
        which the last action is repeated and costs nothing.
        NOTE(differs): batches are drawn by a seeded generator, with replacement (released: 34 ms each from 1M rows).
        """
        starts = self.chunk_starts(chunk)
        if not len(starts):
            raise InputError(f"--action-chunk {chunk}: no episode has so many steps; expected fewer")
        rows = starts[generator.integers(len(starts), size=batch_size)]
        steps = np.arange(chunk)
        inside = np.minimum(rows[:, None] + steps, self.last_rows[rows, None])  # (B, h): beyond the end, the last step
        weights = discount**steps * (rows[:, None] + steps == inside)
        states, next_states = self.state_rows[rows], self.state_rows[inside[:, -1]] + 1
        batch = {"actions": self.actions[inside].reshape(batch_size, -1), "masks": self.masks[inside[:, -1]]}
        batch |= {"rewards": (weights * self.rewards[inside]).sum(1, dtype=np.float32)}
        batch |= {"mc_returns": self.mc_returns[rows], "state_rows": states, "next_state_rows": next_states}
        batch |= {"obs": self.states[states], "next_obs": self.states[next_states]}
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def chunk_starts(self, chunk):
        """The rows at which a chunk can begin, see `sample`."""
        if self.starts_of != (chunk, self.num_transitions):
            rows, last_rows = np.arange(self.num_transitions), self.last_rows[: self.num_transitions]
            self.starts = np.flatnonzero((rows + chunk - 1 <= last_rows) | (self.masks[last_rows] == 0))
            self.starts_of = chunk, self.num_transitions
        return self.starts

    def state_dict(self):
        names = ("actions", "rewards", "masks", "mc_returns", "state_rows", "last_rows")
        arrays = {name: getattr(self, name)[: self.num_transitions] for name in names}
        arrays["states"] = self.states[: self.num_states]
        return {name: torch.tensor(array) for name, array in arrays.items()}

    def load_state_dict(self, state):
        for name, tensor in state.items():
            setattr(self, name, tensor.numpy().copy())
        self.num_states, self.num_transitions = len(self.states), len(self.actions)


def append(array, size, rows):
    """`array`, of which `size` rows are in use, with `rows` after them; longer where they do not fit."""
    if size + len(rows) > len(array):
        array = np.concatenate([array[:size], np.zeros((size + len(rows), *array.shape[1:]), array.dtype)])
    array[size : size + len(rows)] = rows
    return array


def sample_both(offline, online, num_offline, num_online, generator, chunk=1, discount=1.0):
    """num_offline transitions of one buffer, and below them num_online of the other."""
    sizes = ((offline, num_offline), (online, num_online))
    parts = [buffer.sample(size, generator, chunk, discount) for buffer, size in sizes if size]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ======================================== EVALUATION ========================================

EVALUATION_SEED = 1_000_000  # evaluation episodes are reset with this and the integers after it
MOST_ACTION = 1 + 1e-3  # of a policy: 1, but for rounding


def run_episodes(envs, act, seeds, batch_size=0, video_dir=None, on_end=lambda episode: None, before_step=lambda: None):
    """One episode per seed, each run to its end; the result does not depend on how many `envs` there are.

    act(obs (N, O), keys) -> actions (N, A) in [-1, 1], or chunks of them (N, h * A) that are carried out one step after
    the other before act is asked again; keys[i] = (episode seed, step) seeds what is random in row i.
    Returns, in the order of `seeds`, dicts of observations (L + 1, O), actions (L, A), raw rewards (L,), masks (L,) and
    success (at any step). Observations are float32, or images as they are.
    batch_size: fill up obs to so many rows, for an act() whose rounding depends on their number. on_end(episode):
    called with each Episode as it ends. before_step(): called before an action is chosen and before it is sent.
    Raises FloatingPointError for an observation, reward or action that is not finite, and InputError for an action
    beyond [-1, 1], before one is sent, and for a step without info["success"].
    """
    episodes = [Episode(envs[k % len(envs)], int(seed)) for k, seed in enumerate(seeds)]
    waiting = [deque(episodes[i :: len(envs)]) for i in range(len(envs))]  # who runs what is settled beforehand
    running = {}  # environment's index -> episode
    while any(waiting) or running:
        for i in range(len(envs)):
            if i not in running and waiting[i]:
                running[i] = waiting[i].popleft()
                running[i].reset()
        before_step()
        if deciding := [episode for episode in running.values() if not episode.plan]:
            obs = stacked([episode.observations[-1] for episode in deciding])
            keys = [(episode.seed, len(episode.actions)) for episode in deciding]
            padding = max(0, batch_size - len(obs))
            actions = act(np.concatenate([obs, obs[:1].repeat(padding, 0)]), keys + keys[:1] * padding)
            for episode, chunk in zip(deciding, actions, strict=False):  # those of the padding are not needed
                episode.plan.extend(chunk.reshape(-1, *episode.env.action_space.shape))  # (h, A)
        for i, episode in list(running.items()):
            before_step()
            if episode.step(render=bool(video_dir)):
                del running[i]
                on_end(episode)
    if video_dir:
        for episode in episodes:
            write_video(Path(video_dir) / f"episode-{episode.seed}.mp4", episode.frames)
    return [episode.arrays() for episode in episodes]


class Episode:
    """One episode while it runs. It keeps copies: an environment may change the action it is given, and return the same
    array at every step."""

    def __init__(self, env, seed):
        self.env, self.seed, self.success, self.plan = env, seed, False, deque()
        self.observations, self.actions, self.rewards, self.masks, self.frames = [], [], [], [], []

    def reset(self):
        self.see(self.env.reset(seed=self.seed)[0])

    def see(self, obs):
        self.check("observation", obs)
        self.observations.append(np.array(obs))

    def step(self, render):
        """Carry out the next action of the plan. Returns whether the episode is over."""
        action = self.plan.popleft()
        self.check("action", action)
        if np.abs(action).max() > MOST_ACTION:
            raise InputError(f"{self.where()}: action {action}; expected from the policy's sample within [-1, 1]")
        obs, reward, terminated, truncated, info = self.env.step(np.array(action))
        self.check("reward", reward)
        if "success" not in info:
            raise InputError(f'{self.where()}: info has no "success"; expected it at every step')
        self.actions.append(action)
        self.rewards.append(float(reward))
        self.masks.append(1.0 - terminated)
        self.success |= bool(info["success"])
        self.see(obs)
        if render:
            self.frames.append(np.array(self.env.render()))
        return terminated or truncated

    def check(self, name, value):
        with np.errstate(over="ignore"):
            is_finite = np.isfinite(np.asarray(value, np.float32)).all()
        if not is_finite:
            raise FloatingPointError(f"{self.where()}: {name} is not finite, {value}; no further action was sent")

    def where(self):
        name = self.env.spec.id if self.env.spec else type(self.env.unwrapped).__name__
        return f"{name}, episode with reset seed {self.seed}, step {len(self.actions)}"

    def arrays(self):
        names = ("actions", "rewards", "masks")
        arrays = {name: np.stack(getattr(self, name)) for name in names}
        return {"observations": stacked(self.observations), "success": self.success} | arrays


def stacked(observations):
    """Observations as one array, float32, or uint8 where they are images."""
    array = np.asarray(observations)
    return array if array.dtype == np.uint8 else array.astype(np.float32, copy=False)


def write_video(path, frames):
    import imageio

    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.mimwrite(path, frames, fps=12)


def check_spaces(env):
    """Raises InputError unless an environment has observations (O,), and actions (A,) from -1 to 1, as envs.make's."""
    observes, acts = env.observation_space, env.action_space
    if len(observes.shape or ()) != 1:
        expected = "expected a Box of one dimension (gymnasium's FlattenObservation)"
        raise InputError(f"the environment's observations are {observes}; {expected}")
    is_vector = hasattr(acts, "low") and len(acts.shape) == 1
    if not is_vector or not ((acts.low == -1) & (acts.high == 1)).all():
        expected = "expected a Box of one dimension from -1 to 1 (gymnasium's RescaleAction)"
        raise InputError(f"the environment's actions are {acts}; {expected}")


def check_policy(policy, obs, act_dim, args):
    """Raises InputError where a policy's methods do not give what they have to (docs/your-own-policy.md), tried at obs
    (B, O): now, not after hours of training. The run's own noise is untouched."""
    name, expected = type(policy).__name__, (len(obs), args.num_samples, act_dim)
    with torch.no_grad(), torch.random.fork_rng():
        actions = policy.sample(obs, args.num_samples)
        if actions.shape != expected:
            what = f"{expected}: states, --num-samples, the dimensions of --action-chunk {args.action_chunk} actions"
            raise InputError(f"{name}.sample: returned shape {tuple(actions.shape)}; expected {what}")
        if not actions.abs().max() <= MOST_ACTION:
            raise InputError(f"{name}.sample: returned {actions.abs().max():g}; expected actions within [-1, 1]")
        loss = policy.loss(obs, actions[:, 0])
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        returned = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise InputError(f"{name}.loss: returned {returned}; expected one number, a tensor")


def num_envs(args):
    """How many evaluation episodes run side by side: up to ten of the simulators in envs/; whatever else --env-id names
    may be a robot, of which there is one."""
    return max(1, min(10, args.num_eval_episodes)) if family(args.env_id) else 1


def evaluate(envs, act, num_episodes, prefix="eval/", **callbacks):
    """Means over `num_episodes` fixed seeds: {prefix + success_rate, return, length, steps_to_goal}, the last over
    successful episodes only and absent where there are none; {} for 0 episodes. The rest is `run_episodes`'s."""
    if num_episodes == 0:
        return {}
    batch_size = 10 if len(envs) > 1 else 1  # one robot does not wait for ten states' actions
    episodes = run_episodes(envs, act, EVALUATION_SEED + np.arange(num_episodes), batch_size, **callbacks)
    lengths = {success: [len(e["rewards"]) for e in episodes if e["success"] == success] for success in (True, False)}
    means = {"success_rate": len(lengths[True]) / num_episodes, "length": np.mean(lengths[True] + lengths[False])}
    means |= {"return": np.mean([e["rewards"].sum() for e in episodes])}
    means |= {"steps_to_goal": np.mean(lengths[True])} if lengths[True] else {}
    if envs[0].has_wrapper_attr("normalized_score"):
        score = envs[0].get_wrapper_attr("normalized_score")  # D4RL's, in percent, of an episode's rewards
        means |= {"normalized_score": np.mean([score(e["rewards"]) for e in episodes])}
    return {prefix + name: float(value) for name, value in means.items()}


def evaluate_agent(envs, agent, run, args, before_step=lambda: None, check=lambda episode, args: None):
    """The eval columns of a row: of the raw policy and, once there is a critic, of the optimised one. In offline RL the
    policy is frozen, and its last evaluation counts.

    agent: has act_raw and act. These and before_step: see `run_episodes`. check(episode, args): what raises an error
    where the rewards and success of an episode do not fit. With --capture-video three episodes are left in the run's
    folder, of the optimised policy once there is one.
    """
    counters, number = run.counters, args.num_eval_episodes
    has_critic = counters.phase not in ("bc", "warmup")
    row = dict(counters.raw) if counters.phase == "offline" else {}
    actors = {} if row else {"eval/policy_": agent.act_raw}
    actors |= {"eval/": agent.act} if has_critic else {}

    def on_end(episode):
        progress.update()
        check(dict(rewards=episode.rewards, success=episode.success), args)

    with bar("evaluation", "episodes", number * len(actors), leave=False, delay=2) as progress:
        for prefix, act in actors.items():
            row |= evaluate(envs, act, number, prefix, on_end=on_end, before_step=before_step)
    counters.raw = {name: value for name, value in row.items() if name.startswith("eval/policy_")}
    if args.capture_video and number:
        folder = run.directory / "videos" / f"{counters.phase}-{counters.gradient_step}"
        actor = agent.act if has_critic else agent.act_raw
        run_episodes(envs[:3], actor, EVALUATION_SEED + np.arange(3), video_dir=folder, before_step=before_step)
    return row


def max_env_steps(env, args):
    """Environment steps of the online phase: --online-steps, and no more than --online-episodes can take."""
    steps, episodes = (math.inf if n is None else n for n in (args.online_steps, args.online_episodes))
    limit = env.get_wrapper_attr("_max_episode_steps") if env.has_wrapper_attr("_max_episode_steps") else 1000
    return min(steps, episodes * limit)


def reset_seed(seed, phase, index):
    """Of an episode's environment, from the run's seed, the phase's number and the episode's index in it."""
    return int(np.random.SeedSequence([seed, phase, index]).generate_state(1)[0])


# ======================================== THE FILES OF A RUN ========================================


class Counters:
    """Where a run is. `done`: steps of each phase; the others are columns of metrics.csv.

    A step counts as done from when it begins, for nothing is logged or saved before it ends.
    """

    def __init__(self, args):
        self.args = args
        self.phase, self.done, self.seconds = "bc", collections.Counter(), collections.Counter()
        self.gradient_step = self.env_step = self.episode = self.successes = 0
        self.before, self.is_last = 0, True  # the phase's steps before this one; is it the phase's last?
        self.collected = {}  # the columns of an online episode whose updates are not all done
        self.updated = {}  # and how many of them are
        self.raw = {}  # what the policy's last evaluation found
        self.progress = None  # of the online phase
        clones = args.bc_steps and not args.policy_checkpoint
        self.owes_evaluation = bool(args.num_eval_episodes and not clones)  # of the policy that it starts from

    def steps(self, phase, num_steps, then=lambda seconds: ""):
        """The indices of the gradient steps of `phase` that are left, with a progress bar; then: see `Progress`."""
        with Progress(phase, "updates", self.done[phase], num_steps, then) as progress:
            while self.done[phase] < num_steps:
                self.phase, self.before = phase, self.done[phase]
                self.done[phase], self.gradient_step = self.before + 1, self.gradient_step + 1
                self.is_last = self.done[phase] == num_steps
                yield self.before
                progress.reach(self.done[phase])

    def episodes(self):
        """The online episodes that are left, as seeds for their resets. The loop's body collects one, unless it was
        `collected` before the run was stopped, and ends with `end_episode`."""
        in_episodes = self.args.online_steps is None
        limit = ("episodes", self.episode, self.args.online_episodes)
        limit = limit if in_episodes else ("environment steps", self.env_step, self.args.online_steps)
        with Progress("online", *limit) as self.progress:
            while self.collected or not self.is_enough():
                self.phase, self.before = "online", self.done["online"]
                yield reset_seed(self.args.seed, 3, self.episode)
                self.progress.reach(self.episode if in_episodes else self.env_step)

    def then_offline(self, seconds, update_seconds):
        """What cloning tells of later phases: seconds of offline RL and, from those of a critic update, of online."""
        offline = f"; then offline about {in_words(seconds)}" if self.args.offline_steps else ""
        return offline + self.then_online(update_seconds)

    def then_online(self, seconds):
        """What the seconds of an offline update tell of the online phase: there the critic's take no less, for samples
        are drawn anew, and it acts and distils besides."""
        steps = self.args.online_steps
        if steps == 0 or self.args.online_episodes == 0:
            return ""
        number = "each 1000" if steps is None else steps
        minutes = in_words(seconds * self.args.critic_utd * (1000 if steps is None else steps))
        return f"; then online at least {minutes} for {number} environment steps"

    def is_enough(self):
        limits = ((self.env_step, self.args.online_steps), (self.episode, self.args.online_episodes))
        return any(limit is not None and number >= limit for number, limit in limits)

    def updates(self, name, number):
        """The indices of the updates after an episode that are left; before each, a checkpoint can be taken."""
        first, began = self.updated.get(name, 0), time.perf_counter()
        title = f"episode {self.episode + 1}, {name}"
        with bar(title, "updates", number, initial=first, leave=False, delay=2) as progress:
            for index in range(first, number):
                yield index
                self.updated[name] = index + 1
                progress.update()
                if name == "critic" and index == 19 and not first:  # tells what is left, in the first long episode
                    seconds = began - self.progress.began + (time.perf_counter() - began) / 20 * number
                    steps = 1 if self.args.online_steps is None else self.collected["train/length"]
                    self.progress.estimate(seconds / steps)

    def end_episode(self, num_updates):
        """Count the episode that was collected and the critic updates that followed. Returns its columns."""
        columns, self.collected, self.updated = self.collected, {}, {}
        self.gradient_step, self.episode = self.gradient_step + num_updates, self.episode + 1
        self.env_step = self.done["online"] = self.env_step + int(columns["train/length"])
        self.successes += int(columns["train/success"])
        self.is_last = self.is_enough()
        return columns | {"train/regret": 1 - self.successes / self.episode}

    def due(self, every):
        """Has the phase gone past a multiple of `every` steps (online: of the environment), or ended?"""
        return self.is_last or self.before // every < self.done[self.phase] // every

    def state_dict(self):
        state = {name: value for name, value in vars(self).items() if name not in ("args", "progress")}
        return state | {"done": dict(self.done), "seconds": dict(self.seconds)}

    def load_state_dict(self, state):
        vars(self).update(state)
        self.done, self.seconds = collections.Counter(self.done), collections.Counter(self.seconds)


class Progress:
    """A progress bar that soon says how long the rest will take: after 20 updates, of which the first, which may
    compile, is not timed; online after 20 critic updates of the first episode, or after that episode.

    then(seconds): what one of its steps, of so many seconds, tells of what comes after.
    """

    def __init__(self, name, unit, initial, total, then=lambda seconds: ""):
        self.bar = bar(name, unit, total, initial=initial)
        self.name, self.unit, self.number, self.total, self.then = name, unit, initial, total, then
        self.initial, self.has_estimate = initial, False
        self.began = None if unit == "updates" else time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def reach(self, number):
        self.bar.update(number - self.number)
        self.number = number
        if self.began is None:
            self.began, self.initial = time.perf_counter(), number
        elif self.unit != "updates" or number - self.initial >= 19:
            self.estimate((time.perf_counter() - self.began) / (number - self.initial))

    def estimate(self, seconds):
        """Say once, where it is more than a minute, what is left at so many seconds a step."""
        left = self.total - self.number
        if not self.has_estimate and seconds * left > 60:
            rest = f"about {in_words(seconds * left)} for {left} more {self.unit}{self.then(seconds)}"
            print_past_bars(f"{self.name}: {rest}; without evaluations")
        self.has_estimate = True


def in_words(seconds):
    """A duration in minutes, or from two hours on in hours."""
    number, unit = (seconds / 60, "minutes") if seconds < 7200 else (seconds / 3600, "hours")
    return f"{number:.{int(number < 10)}f} {unit}"


def episode_columns(episode):
    columns = {"length": len(episode["rewards"]), "return": episode["rewards"].sum(), "success": episode["success"]}
    return {f"train/{name}": float(value) for name, value in columns.items()}


COLUMNS = """
    phase gradient_step env_step episode
    eval/success_rate eval/return eval/length eval/steps_to_goal eval/normalized_score
    eval/policy_success_rate eval/policy_return eval/policy_length eval/policy_steps_to_goal
    eval/policy_normalized_score
    train/return train/success train/length train/regret
    critic/loss critic/td_loss critic/cql_loss critic/q_data critic/q_policy critic/q_minus_mc critic/calibration_rate
    policy/bc_loss policy/distill_loss
    opt/q_before opt/q_after opt/improvement opt/candidate_entropy opt/grad_norm opt/l1_move opt/tokens_changed
    opt/sample_age
    time/steps_per_second time/critic_ms time/distill_ms time/act_ms
""".split()  # noqa: SIM905


class Log:
    """metrics.csv of a run, with --track Weights & Biases as well, and the pictures and tables made from it.

    note: of the dataset, see ReplayBuffer; above the last table.
    `add` collects named numbers, `write` makes a row of their means. A name that is not in COLUMNS gets a column.
    """

    def __init__(self, directory, args, counters, note=""):
        self.directory, self.args, self.counters, self.note = directory, args, counters, note
        self.columns, self.num_rows, self.wandb, self.wandb_id = list(COLUMNS), 0, None, uuid.uuid4().hex
        self.sums, self.counts = {}, {}
        self.begin_lap()

    def begin_lap(self):
        self.lap_start, self.lap_step = time.perf_counter(), self.counters.gradient_step

    def add(self, info):
        """Add named scalars to the means in the next row. Tensors stay on their device until then."""
        for name, value in info.items():
            self.sums[name], self.counts[name] = self.sums.get(name, 0.0) + value, self.counts.get(name, 0) + 1

    @contextlib.contextmanager
    def timed(self, name):
        """Add the milliseconds that the block takes, as column `name`."""
        began = time.perf_counter()
        yield
        self.add({name: 1000 * (time.perf_counter() - began)})

    def check_finite(self):
        for name, value in self.sums.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is not finite; the last good checkpoint is in {self.directory}")

    def write(self, info):
        """One row: where the run is, the means since the last row, and `info`."""
        self.check_finite()
        counters, seconds = self.counters, time.perf_counter() - self.lap_start
        counters.seconds[counters.phase] += seconds
        row = {name: getattr(counters, name) for name in COLUMNS[:4]}
        row |= {"time/steps_per_second": (counters.gradient_step - self.lap_step) / seconds}
        row |= {name: float(self.sums[name]) / self.counts[name] for name in self.sums}
        row |= {name: float(value) for name, value in info.items()}
        self.append(row)
        rates = {"optimised": row.get("eval/success_rate"), "raw policy": row.get("eval/policy_success_rate")}
        if evaluated := [f"{name} {rate:.0%}" for name, rate in rates.items() if rate is not None]:
            print_past_bars(f"{row['phase']}, update {row['gradient_step']}: success of {', '.join(evaluated)}")
        self.sums, self.counts = {}, {}
        self.begin_lap()
        if self.wandb:
            self.try_wandb(lambda: self.wandb.log(row))

    def append(self, row):
        path = self.directory / "metrics.csv"
        if new := [name for name in row if name not in self.columns]:  # rows so far get empty cells
            _, *rows = path.read_text().splitlines()
            self.columns += new
            replace_file(path, "\n".join([",".join(self.columns), *(line + "," * len(new) for line in rows), ""]))
        values = [row.get(name, "") for name in self.columns]
        with writing(path), open(path, "r+") as file:  # which is there, with its header
            file.seek(0, os.SEEK_END)
            file.write(",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in values) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that counts it
        self.num_rows += 1

    def open(self, config):
        """Begin metrics.csv; a run that is resumed loses the rows past its checkpoint. With --track, tell wandb."""
        path, rows = self.directory / "metrics.csv", []
        if self.num_rows:
            lines = path.read_text().splitlines() if path.is_file() else []
            if len(lines) <= self.num_rows:
                there = f"has {max(len(lines) - 1, 0)} rows; expected the {self.num_rows} up to its checkpoint"
                raise InputError(f"--resume {self.directory}: metrics.csv {there}")
            self.columns, rows = lines[0].split(","), lines[1 : self.num_rows + 1]
        replace_file(path, "\n".join([",".join(self.columns), *rows, ""]))
        if self.args.track:
            self.try_wandb(lambda: self.start_wandb(config))

    def start_wandb(self, config):
        import wandb

        where = dict(project=self.args.wandb_project, entity=self.args.wandb_entity, dir=self.directory)
        self.wandb = wandb.init(name=self.directory.name, id=self.wandb_id, resume="allow", config=config, **where)

    def try_wandb(self, call):
        try:
            call()
        except Exception as error:  # whatever wandb raises: a failing tracker never stops a run
            print(f"warning: --track: wandb failed ({error}); the run goes on without it", file=sys.stderr)
            self.wandb = None

    def finish(self):
        """Draw curves.png, print the phases, close wandb."""
        rows = read_metrics(self.directory / "metrics.csv")
        replace_file(self.directory / "curves.png", lambda file: plot_curves(rows).savefig(file, dpi=120))
        if self.note:
            print(self.note)
        print(f"{'phase':<10}{'policy':<12}{'success':>8}{'steps to goal':>15}{'minutes':>9}")
        for phase, row in {row["phase"]: row for row in rows if "eval/policy_success_rate" in row}.items():
            for name, prefix in (("raw", "eval/policy_"), ("optimised", "eval/")):
                if prefix + "success_rate" in row:
                    steps, minutes = row.get(prefix + "steps_to_goal", math.nan), self.counters.seconds[phase] / 60
                    print(f"{phase:<10}{name:<12}{row[prefix + 'success_rate']:>8.0%}{steps:>15.1f}{minutes:>9.1f}")
        collected = [row["train/success"] for row in rows if row["phase"] == "online" and "train/success" in row]
        if collected and not self.args.num_eval_episodes:
            first, last = (f"{np.mean(part):.0%}" for part in (collected[:10], collected[-10:]))
            print(f"online    success of the first ten episodes collected {first}, of the last ten {last}")
        print(f"in {self.directory}")
        if self.wandb:
            self.try_wandb(self.wandb.finish)

    def state_dict(self):
        return {name: getattr(self, name) for name in ("num_rows", "wandb_id", "sums", "counts")}

    def load_state_dict(self, state):
        vars(self).update(state)
        self.begin_lap()


def print_past_bars(text):
    from tqdm import tqdm

    tqdm.write(text) if sys.stderr.isatty() else print(text, flush=True)


def bar(name, unit, total, **options):
    """tqdm's progress bar; where there is no terminal, a line every three minutes."""
    from tqdm import tqdm

    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt} of {total_fmt} {unit}, about {remaining} left\n"
        options |= dict(mininterval=180, miniters=1, delay=180, position=0, bar_format=line, leave=False)
    return tqdm(desc=name, unit=unit, total=total, **options)


def read_metrics(path):
    """metrics.csv as a list of dicts: numbers as float, empty cells absent, the phase as text."""
    with open(path, newline="") as file:
        return [{k: v if k == "phase" else float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def plot_curves(rows):
    """A matplotlib figure of success rate, steps to goal and values over the run's updates, the phases marked."""
    import matplotlib.figure

    panels = {
        "success rate": {
            "eval/success_rate": "optimised policy",
            "eval/policy_success_rate": "raw policy",
            "train/success": "online episodes",
        },
        "steps to goal": {"eval/steps_to_goal": "optimised policy", "eval/policy_steps_to_goal": "raw policy"},
        "value Q(s, a)": {"opt/q_after": "optimised", "opt/q_before": "policy's samples", "critic/q_data": "data's"},
    }
    figure = matplotlib.figure.Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for axis, (label, columns) in zip(axes, panels.items(), strict=True):
        for column, name in columns.items():
            points = [(row["gradient_step"], row[column]) for row in rows if column in row]
            line = "" if column == "train/success" else "-"
            axis.plot([x for x, _ in points], [y for _, y in points], marker=".", linestyle=line, label=name)
        for before, row in pairwise([{"phase": "", "gradient_step": 0}, *rows]):
            if row["phase"] != before["phase"]:
                axis.axvline(before["gradient_step"], color="0.6", linestyle=":")
                axes[0].annotate(row["phase"], (before["gradient_step"], 1.03), xycoords=("data", "axes fraction"))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes[0].set_ylim(-0.03, 1.03)
    axes[-1].set_xlabel("updates (cloning, then critic)")
    return figure


class Checkpoint:
    """checkpoint.pt of a run: all that must survive its being killed. Tensors, numbers and text alone.

    identity: what the numbers belong to, which loading must not change. kept: objects with state_dict and
    load_state_dict, by name. generator: the run's numpy generator; torch's own are kept as well.
    """

    def __init__(self, directory, args, identity, generator, **kept):
        self.path, self.args, self.identity = directory / "checkpoint.pt", args, identity
        self.generator, self.kept = generator, kept

    def save(self):
        """Write it under another name, then rename: what is there is whole, also after a crash.

        Raises FloatingPointError, and leaves the last one, where a loss or a weight is not finite.
        """
        self.kept["log"].check_finite()
        state = {name: item.state_dict() for name, item in self.kept.items()}
        for name, item in self.kept.items():
            weights = item.named_parameters() if isinstance(item, torch.nn.Module) else ()
            if isinstance(item, torch.optim.Optimizer):
                weights = ((part, x) for values in item.state.values() for part, x in values.items())
            if bad := [part for part, value in weights if not torch.isfinite(value).all()]:
                raise FloatingPointError(f"{name}.{bad[0]} is not finite; the last good checkpoint is {self.path}")
        state |= self.identity | dict(args=vars(self.args), generators=self.generators())
        replace_file(self.path, lambda file: torch.save(state, file))

    def generators(self):
        """The states of all random generators: the run's, torch's, and the global ones of numpy and Python."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0)
        numpy_name, numpy_keys, *numpy_rest = np.random.get_state()
        global_ones = [numpy_name, numpy_keys.tolist(), *numpy_rest], random.getstate()
        others = json.dumps([self.generator.bit_generator.state, *global_ones])
        return dict(torch=torch.get_rng_state(), cuda=cuda, others=others)

    def set_generators(self, states):
        torch.set_rng_state(states["torch"])
        if torch.cuda.is_available() and len(states["cuda"]):
            torch.cuda.set_rng_state(states["cuda"])
        self.generator.bit_generator.state, of_numpy, (version, keys, gauss) = json.loads(states["others"])
        np.random.set_state(tuple(of_numpy))
        random.setstate((version, tuple(keys), gauss))

    def resume(self):
        """Load what was kept. Raises InputError where it is another run's, or flags ask for more of a past phase."""
        if not self.path.is_file():
            expected = f"it was stopped before its first one; expected --run-dir {self.path.parent} to begin again"
            raise InputError(f"--resume {self.path.parent}: no checkpoint.pt; {expected}")
        if not (self.args.eval_only and family(self.args.env_id)):  # what is no simulator may be a robot
            self.lock()
        fixed = ("policy_checkpoint", "obs_keys", "discount", "reward_scale", "reward_bias", "sparse_reward")
        state = load_checkpoint(self.path, "--resume", self.args, self.identity, fixed, **self.kept)
        same = dict(resume="", run_dir="")
        if vars(self.args) | same != state["args"] | same:  # what other flags found does not count with these
            self.kept["counters"].raw = {}
        self.check_phases(state["args"], self.kept["counters"])
        self.set_generators(state["generators"])

    def lock(self):
        """Keep other processes out of the folder until this one ends, however it ends. Raises InputError."""
        with writing(self.path.with_name(".lock")):
            self.lock_file = open(self.path.with_name(".lock"), "w")  # noqa: SIM115
            try:
                fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise InputError(f"--run-dir {self.path.parent}: another process is running in it") from error
            except OSError as error:
                print(
                    f"warning: {self.path.parent} cannot be locked ({error}): start no other run in it", file=sys.stderr
                )

    def check_phases(self, saved, counters):
        phases = dict(bc="bc_steps", warmup="warmup_episodes", offline="offline_steps", distill="offline_distill_steps")
        for phase, name in phases.items():
            if counters.phase == phase:
                break
            if getattr(self.args, name, 0) > saved.get(name, 0):
                flag = f"--{name.replace('_', '-')} {getattr(self.args, name)}"
                reason = f"expected at most its {saved[name]}; it is in {counters.phase}"
                raise InputError(f"{flag} with --resume {self.path.parent}: {reason}")


def load_checkpoint(path, flag, args, identity, fixed=(), **objects):
    """Load `objects` from a checkpoint and return it. Raises InputError, naming `flag`, for another identity or shape.

    fixed: flags that must be the same there and here, beside the `fixed_flags` that an object may have: with others its
    numbers would mean something else.
    """
    if not Path(path).is_file():
        raise InputError(f"{flag} {path}: no such file; expected the checkpoint.pt of a run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{flag} {path}: not a checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{flag} {path}: holds a {type(checkpoint).__name__}; expected the checkpoint.pt of a run")
    for name, expected in identity.items():
        if checkpoint.get(name) != expected:
            raise InputError(f"{flag} {path}: {name} is {checkpoint.get(name)} there; expected {expected}")
    for name in (*fixed, *(flag for item in objects.values() for flag in getattr(item, "fixed_flags", ()))):
        there, here = checkpoint["args"].get(name), getattr(args, name)
        if there != here:
            flag_there = f"--{name.replace('_', '-')} is {there!r} there and {here!r} here"
            raise InputError(f"{flag} {path}: {flag_there}; expected the same")
    for name, item in objects.items():
        try:
            item.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = f"{name} differs in shape, {str(error).splitlines()[-1].strip()}"
            raise InputError(f"{flag} {path}: {reason}; expected the flags in its run's config.json") from error
    return checkpoint


def replace_file(path, content):
    """Write text, or what content(file) writes, to another name, fsync, rename: never a half-written file."""
    with writing(path), open(path.with_name(f".{path.name}.partial"), "wb") as file:
        content(file) if callable(content) else file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


@contextlib.contextmanager
def writing(path):
    """Turns what the operating system has against writing `path` (a full disk, say) into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--run-dir {path.parent}: {path.name} cannot be written ({error.strerror or error})"
        ) from error


class StopSignal:
    """Ctrl-C and SIGTERM ask the run to stop: after the update in progress, before the next command of an evaluation or
    of an online episode, which is then dropped. A second one does not wait.

    `asked`: the signal's name, or None.
    """

    def __init__(self, log):
        self.log, self.asked = log, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if self.asked:
            sys.exit(128 + number)
        self.asked = signal.Signals(number).name
        print(f"{self.asked}: stopping after the update in progress; again: at once", file=sys.stderr)

    def check(self):
        """Leave, in the middle of an episode, where it was asked to: see `run_episodes`, before_step."""
        if self.asked:
            self.leave("; the episode in progress is dropped")

    def leave(self, dropped=""):
        """Exit with the status of a process that the signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
        self.log.finish()
        same = "the same command, or " if self.log.args.run_dir else ""
        print(f"stopped by {self.asked}{dropped}; to go on: {same}--resume {self.log.directory}")
        sys.exit(128 + signal.Signals[self.asked])


@dataclass
class Run:
    """The folder of a run, where it is, what it logs and what it keeps."""

    directory: Path
    counters: Counters
    log: Log
    checkpoint: Checkpoint


def open_run(args, script, generator, dataset, kept):
    """The Run; with --policy-checkpoint or --resume what is `kept` is loaded. Its folder may be there, empty.

    kept: see `Checkpoint`, the policy and its average among it. Raises InputError.
    """
    shape = dict(obs_dim=dataset.states.shape[1], act_dim=args.action_chunk * dataset.actions.shape[1])
    identity = dict(policy_class=type(kept["policy"]).__name__, env_id=args.env_id) | shape
    if args.policy_checkpoint and not args.resume:
        # NOTE(differs): --policy-checkpoint starts from the policy's running average (released: from its weights).
        loaded = {name: kept[name] for name in ("policy_ema", "normalizer") if name in kept}
        load_checkpoint(args.policy_checkpoint, "--policy-checkpoint", args, identity, ("obs_keys",), **loaded)
        kept["policy"].load_state_dict(kept["policy_ema"].state_dict())
    if not args.eval_only:  # which needs no data
        identity["dataset_sha256"] = dataset.sha256
    directory, counters = run_directory(args, script), Counters(args)
    note = read_config(directory).get("dataset_note", "") if args.eval_only else dataset.note
    if args.eval_only and note:  # with the data, it is said where they are loaded
        print(f"note: {note}", file=sys.stderr)
    log = Log(directory, args, counters, note)
    checkpoint = Checkpoint(directory, args, identity, generator, counters=counters, log=log, **kept)
    if args.resume:
        checkpoint.resume()
    return Run(directory, counters, log, checkpoint)


def run_directory(args, script):
    """--resume, --run-dir, or a new folder in runs/ that no other run has. Raises InputError."""
    if args.resume or args.run_dir:
        return Path(args.resume or args.run_dir)
    name = f"{args.env_id}__{script}__{args.seed}__{time.strftime('%y%m%d-%H%M%S')}"
    name = name.translate(str.maketrans("/:", "--"))
    for number in itertools.count(1):
        directory = Path("runs", name if number == 1 else f"{name}-{number}")
        with writing(directory), contextlib.suppress(FileExistsError):
            directory.mkdir(parents=True)
            return directory


def commit():
    """The git commit of this file, marked where files are changed; "" where there is none."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def begin(run, args):
    """Make the run's folder with config.json, metrics.csv and a checkpoint, or go on in it; print the flags."""
    directory, checkpoint, command = run.directory, run.checkpoint, sys.argv[1:]
    with writing(directory / "config.json"):
        directory.mkdir(parents=True, exist_ok=True)
    if args.resume:
        command = read_config(directory).get("command", command)  # that of its start
    else:
        checkpoint.lock()
        if checkpoint.path.exists():
            raise InputError(f"--run-dir {directory}: holds a run; expected a new folder, or --resume to go on")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium")}
    versions |= {"python": sys.version.split()[0], "commit": commit()}
    config = {**vars(args), **checkpoint.identity, **versions, "command": command}
    config |= {"dataset_note": run.log.note} if run.log.note else {}
    flags = " ".join(f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items())
    print(textwrap.fill(flags, 118, break_on_hyphens=False), flush=True)
    if args.resume:
        print(f"resumed in phase {run.counters.phase} after {run.counters.gradient_step} updates")
    run.log.open(config)
    replace_file(directory / "config.json", json.dumps(config, indent=2))
    checkpoint.save()


# ======================================== THE COMMAND LINE ========================================


@dataclass
class RunArgs:
    """The flags that every run has; a script's `Args` adds those of the method and of its policy."""

    env_id: str = "pointmaze-umaze-play"  # also antmaze-*-v2, kitchen-*-v0, metaworld-*, minari:*, any gymnasium id
    preset: str = ""  # flags to start from, of PRESETS; default: those of the family of --env-id
    dataset_path: str | None = None  # .hdf5 or .npz, see docs/environments.md; made: for some OGBench ids, made here
    obs_keys: tuple[str, ...] = ()  # of a --dataset-path in robomimic's layout: which obs, end to end in this order
    policy_checkpoint: str = ""  # start from the policy in this checkpoint.pt instead of cloning one
    seed: int = 0  # of everything random but data made here; numpy's and Python's global generators get it too
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    num_threads: int = 0  # CPU threads of torch; 0: all cores. Small networks are fastest with 1
    compile: bool = False  # torch.compile the critic's and the policy's update
    num_eval_episodes: int = 50  # per evaluation and policy, on fixed seeds; 0: no evaluation
    eval_every: int = 50_000  # gradient steps (online: environment steps) between evaluations
    log_every: int = 1000  # gradient steps between rows of metrics.csv; online: every episode
    run_dir: str = ""  # default: runs/{env_id}__{script}__{seed}__{time}
    resume: str = ""  # continue the run in this directory, with its flags
    eval_only: bool = False  # with --resume: evaluate and stop
    track: bool = False  # log to Weights & Biases as well
    wandb_project: str = "parl"  # see --track
    wandb_entity: str | None = None  # see --track
    capture_video: bool = False  # write three episodes of each evaluation to videos/


FAMILIES = {  # --env-id: the key of its family in a script's PRESETS
    "pointmaze-umaze-play": "pointmaze",
    "pointmaze-*-play": "pointmaze_large",
    "antmaze-*-v2": "antmaze",
    "kitchen-*-v0": "kitchen",
    "metaworld-*": "metaworld",
    "*-singletask*": "ogbench",
    "minari:D4RL/*maze/*-dense-*": "minari",
    "minari:D4RL/*maze/*": "minari_maze",
    "minari:*": "minari",
}


def family(env_id):
    """The family of env_id, "" for a plain gymnasium id."""
    return next((name for pattern, name in FAMILIES.items() if fnmatch.fnmatchcase(env_id, pattern)), "")


# Flags that are numbers are at least 0, but for these; a policy checks its own.
AT_LEAST_1 = {"batch_size", "ensemble_size", "critic_subset", "cql_n_actions", "num_samples", "num_keep", "critic_utd"}
AT_LEAST_1 |= {"eval_every", "log_every", "action_chunk"}
AT_MOST = {
    "seed": 2**32 - 1,
    "target_rate": 1,
    "critic_ema_rate": 1,
    "policy_ema_rate": 1,
    "offline_ratio": 1,
    "discount": 1 - 1e-6,
}
ANY_SIGN = {"reward_scale", "reward_bias", "q_min", "q_max"}


def check_flags(args):
    """Raises InputError, naming the flag, for what cannot run."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and name not in ANY_SIGN:
            most = args.num_samples if name == "num_keep" else AT_MOST.get(name, math.inf)
            check_flag(args, name, int(name in AT_LEAST_1), most)
    if not args.hidden_dims or min(args.hidden_dims) < 1:
        raise InputError(f"--hidden-dims {args.hidden_dims}: expected one or more widths of at least 1")
    if args.num_bins == 1:
        raise InputError("--num-bins 1: expected at least 2, or 0 for scalar values")
    if args.online_steps is None and args.online_episodes is None:
        raise InputError("--online-steps None and --online-episodes None: expected a number for one of them")
    if args.eval_only and not args.resume:
        raise InputError("--eval-only: expected --resume RUN, the run to evaluate")
    if args.dataset_path == "":
        raise InputError("--dataset-path: empty; expected a file, .hdf5 or .npz")
    if args.obs_keys and args.dataset_path is None:
        raise InputError(f"--obs-keys {' '.join(args.obs_keys)}: expected --dataset-path FILE, in robomimic's layout")


def check_flag(args, name, least, most=math.inf):
    """Raises InputError unless the number of flag `name` is between `least` and `most`."""
    if not least <= getattr(args, name) <= most:
        expected = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")


def main(train, args_class, presets, description):
    """Parse the command line and train. A flag given wins over the run's that is resumed, or the preset's.

    The same command again, with the --run-dir of a run that was stopped, goes on with it.
    """
    try:
        args = parse(sys.argv[1:], args_class, presets, description)
        if args.run_dir and not args.resume and Path(args.run_dir, "checkpoint.pt").exists():
            command = read_config(args.run_dir).get("command", [])
            check_same_flags(args, parse(command, args_class, presets, description))
            print(f"--run-dir {args.run_dir}: holds a run of this command, which goes on")
            args = parse([*sys.argv[1:], "--resume", args.run_dir], args_class, presets, description)  # with its flags
        train(args)
    except (InputError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def parse(command, args_class, presets, description):
    """A command line as an args_class."""
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id", default=args_class.env_id)
    first.add_argument("--preset")
    first.add_argument("--resume", default="")
    first.add_argument("--online-steps", "--online_steps")
    first.add_argument("--online-episodes", "--online_episodes")
    given, _ = first.parse_known_args(command)
    if given.resume:
        defaults = resumed_flags(given.resume, args_class)
    else:
        defaults = {"env_id": given.env_id}
        name = family(given.env_id) if given.preset is None else given.preset
        if given.preset is not None or name in presets:
            defaults |= preset_flags(name, presets, args_class)
    if given.online_steps or given.online_episodes:  # one that is given replaces the preset's other
        defaults |= {"online_steps": None, "online_episodes": None}
    args = tyro.cli(args_class, args=command, default=args_class(**defaults), description=description)
    if given.resume and args.preset != defaults["preset"]:
        raise InputError(f"--preset {args.preset} with --resume: expected none; a run goes on with its own flags")
    if args.dataset_path and args.dataset_path != MADE:
        args.dataset_path = str(Path(args.dataset_path).expanduser().resolve())  # so that --resume works anywhere
    return args


def preset_flags(name, presets, args_class):
    """Of the preset `name` what args_class has: presets name flags of several policies. Raises InputError."""
    if name not in presets:
        raise InputError(f"--preset {name or '(empty)'}: expected one of {', '.join(presets) or 'none'}")
    names = {field.name for field in dataclasses.fields(args_class)}
    return {"preset": name} | {flag: value for flag, value in presets[name].items() if flag in names}


def check_same_flags(args, before):
    """Raises InputError, naming the first flag in which a command differs from that of the run in its --run-dir."""
    for name, value in vars(before).items():
        if value != getattr(args, name) and name not in ("num_threads", "device"):  # where it runs may change
            flag = f"--{name.replace('_', '-')} is {value!r} there and {getattr(args, name)!r} here"
            expected = (
                f"expected the same flags to go on with it, a new folder, or --resume {args.run_dir} to change some"
            )
            raise InputError(f"--run-dir {args.run_dir}: holds a run; {flag}; {expected}")


def read_config(directory):
    """A run's config.json. Raises InputError where it has none."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise InputError(f"--resume {directory}: no config.json there; expected the directory of a run")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"--resume {directory}: config.json cannot be read ({error})") from error


def resumed_flags(directory, args_class):
    """The flags in a run's config.json, as a dict. Raises InputError where it is none of args_class's."""
    saved = read_config(directory)
    try:
        flags = {field.name: saved[field.name] for field in dataclasses.fields(args_class)}
    except (TypeError, KeyError) as error:
        raise InputError(
            f"--resume {directory}: config.json is not one of this script's, or of an earlier version ({error})"
        ) from error
    return {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
