"""parl_diffusion.py, noting in every evaluation the value that the critic gives each start and the return that follows.

python benchmark/start_value.py --run-dir runs/antmaze-0 ...     # flags of parl_diffusion.py; see antmaze.txt

Appends `evaluation, episode, value, discounted_return` to benchmark/results/start_value/RUN.csv: the ensemble's mean
value of an episode's first state and the action taken there; what its (scaled) rewards add up to, as in `mc_returns`.
"""

import csv
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import parl_diffusion as parl  # noqa: E402

act, run_episodes = parl.act, common.run_episodes
values = {}  # seed of an episode in the evaluation that is running -> value of its start


def act_and_note(policy, critic, obs, args, seeds=None):
    actions = act(policy, critic, obs, args, seeds)
    if any(step == 0 for _, step in seeds or ()):
        with torch.no_grad():
            q = critic(obs, actions[:, None])[0].mean(0)[:, 0].tolist()  # (B,)
        values.update({seed: value for (seed, step), value in zip(seeds, q, strict=True) if step == 0})
    return actions


def run_and_note(args, envs, act, seeds, *how, **options):
    episodes = run_episodes(envs, act, seeds, *how, **options)
    if values:  # the optimised policy was evaluated
        path = HERE / "results" / "start_value" / f"{Path(args.run_dir).name}.csv"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("evaluation,episode,value,discounted_return\n")
        number = len({line.split(",")[0] for line in path.read_text().splitlines()[1:]})
        with path.open("a", newline="") as file:
            for seed, episode in zip(seeds, episodes, strict=True):
                rewards = episode["rewards"] * args.reward_scale + args.reward_bias
                returns = common.mc_returns(rewards, episode["masks"], args.discount, args.sparse_reward)
                csv.writer(file).writerow([number, seed, round(values[seed], 3), round(float(returns[0]), 3)])
        values.clear()
    return episodes


def train(args):
    common.run_episodes = lambda *positional, **options: run_and_note(args, *positional, **options)
    parl.act = act_and_note
    return parl.train(args)


if __name__ == "__main__":
    common.main(train, parl.Args, parl.PRESETS, __doc__)
