"""Demonstrations of a pushing task of gymnasium-robotics, from a short scripted expert that is noisy and misjudges.

python benchmark/fetch_push.py        # writes benchmark/fetch_push.npz, in half a minute
python parl_diffusion.py --preset small --env-id gymnasium_robotics:FetchPush-v4 --dataset-path benchmark/fetch_push.npz
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import envs
from benchmark import slalom

ENV_ID = "gymnasium_robotics:FetchPush-v4"  # 50 steps, each costs 1 while the block is 5 cm or more from the goal
NOISE, MISJUDGED = 0.25, 0.04  # of the actions, standard deviation per step; of the goal per axis, in metres


def expert(obs, misjudged):
    """The action (4,) of a pusher: behind the block, down to the table, straight on. obs (31,): where the block is and
    is to be, then the gripper; misjudged (2,): how far it sees the goal from where it is, in metres."""
    block, goal, gripper = obs[0:3], obs[3:6], obs[6:9]
    way = goal[:2] + misjudged - block[:2]
    distance = np.linalg.norm(way)
    heading = way / max(distance, 1e-6)
    behind = block[:2] - 0.08 * heading
    ahead = (gripper[:2] - block[:2]) @ heading
    aside = gripper[:2] - block[:2] - ahead * heading
    if distance < 0.01:
        target = gripper
    elif ahead < -0.03 and np.linalg.norm(aside) < 0.02 and gripper[2] < block[2] + 0.025:
        target = np.append(gripper[:2] + min(0.03, distance) * heading - 0.5 * aside, block[2])  # push
    elif np.linalg.norm(gripper[:2] - behind) < 0.02:
        target = np.append(behind, block[2])  # down
    elif gripper[2] < block[2] + 0.05:
        target = np.append(gripper[:2], block[2] + 0.08)  # up
    else:
        target = np.append(behind, block[2] + 0.08)  # over
    return np.append(np.clip((target - gripper) / 0.05, -1, 1), 0.0)


def noisy_expert(rng):
    """Of one episode: its misjudgement of the goal stays, its noise sways from step to step."""
    misjudged, sway = MISJUDGED * rng.standard_normal(2), np.zeros(4)

    def act(obs):
        sway[:] = 0.7 * sway + NOISE * rng.standard_normal(4) * (1, 1, 1, 0.3)
        return expert(obs, misjudged) + sway

    return act


if __name__ == "__main__":
    data = slalom.record(envs.make(ENV_ID), noisy_expert, 600, seed=0)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **data)
    successful = (data["rewards"].reshape(-1, 50) == 0).any(1).mean()
    print(f"{len(data['rewards'])} transitions, {successful:.0%} of the episodes reach the goal")
