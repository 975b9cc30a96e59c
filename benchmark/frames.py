"""One episode before and one after PA-RL, from the same start, as two strips of frames: benchmark/openvla_frames.png.

python benchmark/frames.py runs/openvla_cloned-0 runs/openvla-0     # cloned alone, and the whole run of the same seed
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import envs  # noqa: E402
import parl_openvla  # noqa: E402


@dataclass
class Options:
    """See the top of the file."""

    cloned: tyro.conf.Positional[str]  # a run that ended after cloning: its raw policy acts
    improved: tyro.conf.Positional[str]  # a whole run: its optimised policy acts
    start: int = 0  # which of the evaluation's starts
    num_frames: int = 8  # in a strip, evenly over the episode


def episode(run, start, optimised):
    """Frames of an episode of the run's policy from an evaluation's start, and whether it succeeded."""
    checkpoint = torch.load(Path(run) / "checkpoint.pt", weights_only=True)
    args = parl_openvla.Args(**checkpoint["args"])
    env = envs.make(args.env_id, args.sparse_reward, render=True, image_size=parl_openvla.TINY.image_size)
    act_dim = env.action_space.shape[0]
    policy = parl_openvla.OpenVLAPolicy(act_dim, args).eval()
    policy.load_state_dict(checkpoint["policy_ema"])
    critic = parl_openvla.Critic(args.encoding_width, act_dim, args)
    critic.load_state_dict(checkpoint["critic_ema"])
    seed, frames, steps, done = int(common.EVALUATION_SEED + start), [], 0, False
    image, info = env.reset(seed=seed)
    while not done:
        frames.append(env.render())
        obs = {"image": image[None], "instruction": [args.instruction]}
        keys = [(seed, steps)]  # as in an evaluation
        if optimised:
            action = parl_openvla.act(policy, critic, obs, args, keys)
        else:
            action = policy.sample(obs, 1, keys, args.sample_temperature)[:, 0]
        image, _, terminated, truncated, info = env.step(action[0].numpy())
        steps, done = steps + 1, terminated or truncated
    return [*frames, env.render()], info["success"]


def main(options):
    figure = matplotlib.figure.Figure(figsize=(1.4 * options.num_frames, 3.6), layout="constrained")
    strips = figure.subplots(2, options.num_frames)
    for axes, run, optimised in zip(strips, (options.cloned, options.improved), (False, True), strict=True):
        frames, success = episode(run, options.start, optimised)
        times = np.unique(np.linspace(0, len(frames) - 1, options.num_frames).round().astype(int))
        for axis in axes[len(times) :]:
            axis.set_axis_off()
        for axis, time in zip(axes, times, strict=False):  # a short episode has fewer frames
            axis.imshow(frames[time])
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"action {time}", fontsize="small")
        title = "after PA-RL" if optimised else "cloned"
        axes[0].set_title(f"{title}: {'success' if success else 'failure'}", loc="left", fontsize="medium")
    figure.savefig(HERE / "openvla_frames.png", dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
