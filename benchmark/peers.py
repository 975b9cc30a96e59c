"""Offline RL of another library on the same data, rewards, starts and minutes: d3rlpy's Cal-QL, IQL, TD3+BC, ReBRAC.

pip install -r benchmark/peers_requirements.txt && pip install --no-deps d3rlpy==2.8.1  # apart
python benchmark/peers.py iql --env-id pointmaze-medium-play --minutes 12 --seed 0         # benchmark/peers/NAME.csv

Minutes are those of updates on one thread, evaluations apart. d3rlpy's settings are its defaults; see `SETTINGS`.
"""

import csv
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import d3rlpy
import numpy as np
import structlog
import torch
import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import envs  # noqa: E402
import parl_diffusion  # noqa: E402

ALGORITHMS = {
    "cal_ql": d3rlpy.algos.CalQLConfig,
    "iql": d3rlpy.algos.IQLConfig,
    "td3_bc": d3rlpy.algos.TD3PlusBCConfig,
    "rebrac": d3rlpy.algos.ReBRACConfig,
    "bc": d3rlpy.algos.BCConfig,
}
SETTINGS = {  # beside the defaults: by (method, family), what the method's authors chose for AntMaze
    ("iql", "antmaze"): dict(expectile=0.9, weight_temp=10.0),
}


@dataclass
class Options:
    """See the top of the file."""

    method: tyro.conf.Positional[Literal["cal_ql", "iql", "td3_bc", "rebrac", "bc"]]
    env_id: str
    dataset_path: str | None = None
    preset: str = ""  # whose rewards and discount are taken; default: the family's
    minutes: float = 10.0  # of updates
    eval_minutes: float = 2.0  # of updates between evaluations
    seed: int = 0
    num_eval_episodes: int = 100
    name: str = ""  # default: METHOD-ENV_ID


def as_d3rlpy(dataset, cost, transition_picker):
    """A common.ReplayBuffer as d3rlpy's. There a time limit's last step has no next one and is left out, so an episode
    that ends so gets one more row, of its last state, with its last action and the reward `cost`."""
    observations, actions, rewards, terminals, timeouts = [], [], [], [], []
    ends = np.unique(dataset.last_rows[: len(dataset)])
    for first, last in zip([0, *(ends[:-1] + 1)], ends, strict=True):
        rows, more = np.arange(first, last + 1), int(dataset.masks[last] == 1)
        states = dataset.state_rows[rows]
        observations.append(dataset.states[states[0] : states[-1] + 1 + more])
        actions.append(np.append(dataset.actions[rows], dataset.actions[[last] * more], 0))
        rewards.append(np.append(dataset.rewards[rows], [cost] * more))
        for flags, ended in ((terminals, not more), (timeouts, bool(more))):
            flags.append(np.append(np.zeros(len(rows) + more - 1), ended))
    arrays = (np.concatenate(arrays).astype(np.float32) for arrays in (observations, actions, rewards))
    ends = (np.concatenate(flags) for flags in (terminals, timeouts))
    return d3rlpy.dataset.MDPDataset(*arrays, *ends, transition_picker=transition_picker)


def main(options):
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    torch.set_num_threads(1)
    d3rlpy.seed(options.seed)
    family = common.family(options.env_id)
    preset = common.preset_flags(options.preset or family, parl_diffusion.PRESETS, parl_diffusion.Args)
    args = parl_diffusion.Args(env_id=options.env_id, **preset)
    eval_envs = [envs.make(args.env_id, args.sparse_reward) for _ in range(10)]
    rewards_as = (args.reward_scale, args.reward_bias, args.discount, args.sparse_reward)
    dataset = envs.load_dataset(args.env_id, options.dataset_path, *rewards_as, eval_envs[0])
    picker, cost = d3rlpy.dataset.BasicTransitionPicker(), 0.0
    if args.sparse_reward:  # a failure costs for ever, as in common.ReplayBuffer
        cost = float(common.step_rewards(dataset, args).min())
        picker = d3rlpy.dataset.SparseRewardTransitionPicker(cost / (1 - args.discount), cost)

    settings = {} if options.method == "bc" else dict(gamma=args.discount)
    settings |= SETTINGS.get((options.method, family), {})
    scaler = d3rlpy.preprocessing.StandardObservationScaler()
    learner = ALGORITHMS[options.method](observation_scaler=scaler, **settings).create(device="cpu")

    def act(obs, _keys):
        return learner.predict(obs)

    silent = dict(logger_adapter=d3rlpy.logging.NoopAdapterFactory(), show_progress=False)
    epochs = learner.fitter(as_d3rlpy(dataset, cost, picker), 10**9, n_steps_per_epoch=100, **silent)
    next(epochs)  # which prepares the observations first
    rows, trained, began = [], 0.0, time.perf_counter()
    for epoch, _ in epochs:
        minutes = trained + (time.perf_counter() - began) / 60
        if minutes < min(options.minutes, options.eval_minutes * (len(rows) + 1)):
            continue
        row = common.evaluate(eval_envs, act, options.num_eval_episodes)
        rows.append({"minutes": round(minutes, 2), "updates": 100 * epoch, **row})
        print(rows[-1], flush=True)
        trained, began = minutes, time.perf_counter()
        if minutes >= options.minutes:
            break
    (HERE / "peers").mkdir(exist_ok=True)
    name = options.name or f"{options.method}-{options.env_id}"
    with open(HERE / "peers" / f"{name}-{options.seed}.csv", "w", newline="") as file:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
