"""Where the time of a whole run goes: how much of it is the algorithm's own tensor work, and what the rest is.

python benchmark/profile_run.py parl_diffusion                  # its default run
python benchmark/profile_run.py parl_diffusion --antmaze 40     # 40 offline updates at the AntMaze sizes

The second needs no AntMaze: made-up data in D4RL's format, an environment of its observation and action size that does
nothing. Each function below is timed without the others that it calls, but for three that are timed whole, so that the
rows add up; imports come before. On a CPU only: a GPU works on after the call returns. Writes
benchmark/profile_{script}.md, with --antmaze profile_{script}_antmaze.md.
"""

import importlib
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import envs  # noqa: E402

ALGORITHM = ("sampling", "optimising actions", "critic's loss and step", "policy's loss and step")
# what a long run does once, or once in thousands of updates
RARE = ("filling the sample cache", "evaluation", "opt/ columns of the log", "making environments", "reading data")
RARE += ("writing metrics", "writing checkpoints", "drawing curves")


@dataclass
class Options:
    """See the top of the file."""

    script: tyro.conf.Positional[Literal["parl_gaussian", "parl_diffusion", "parl_transformer"]]  # which
    antmaze: int = 0  # offline updates at the AntMaze sizes, in place of the default run
    threads: int = 0  # CPU threads of torch; 0: the preset's
    ensemble_size: int = 10  # with --antmaze
    fraction: float = 1.0  # of the default run's steps


class Stopwatch:
    """seconds[name]: time inside functions of that name, less what they spend in others that are timed."""

    def __init__(self):
        self.seconds, self.inside, self.calls, self.whole = {}, [0.0], {}, 0

    def time(self, owner, attribute, name, whole=False):
        """Has the function `attribute` of a module or class timed; whole: with all that it calls."""
        function = getattr(owner, attribute)

        def timed(*args, **kwargs):
            if self.whole:
                return function(*args, **kwargs)
            self.whole = int(whole)
            began = time.perf_counter()
            self.inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self.whole = 0
                elapsed = time.perf_counter() - began
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self.inside.pop()
                self.calls[name] = self.calls.get(name, 0) + 1
                self.inside[-1] += elapsed

        setattr(owner, attribute, timed)


class Nothing(gym.Env):
    """AntMaze's observation and action size, and nothing else."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (8,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(29, np.float32), {}

    def step(self, action):
        return np.zeros(29, np.float32), 0.0, False, False, {}


def antmaze_args(module, options, folder):
    """The antmaze preset, offline alone, on made-up data: 20 episodes of 100 steps, of which half succeed at last."""
    gym.register("Nothing-v0", lambda: Nothing(), max_episode_steps=10)
    rng, last = np.random.default_rng(0), np.arange(2000) % 100 == 99
    success = last & (np.arange(2000) % 200 == 199)
    data = dict(observations=rng.standard_normal((2000, 29)), actions=rng.uniform(-1, 1, (2000, 8)))
    np.savez(folder / "data.npz", **data, rewards=success * 1.0, terminals=success, timeouts=last & ~success)
    flags = dict(env_id="Nothing-v0", dataset_path=str(folder / "data.npz"), ensemble_size=options.ensemble_size)
    flags |= dict(bc_steps=0, offline_steps=options.antmaze, online_steps=0, num_eval_episodes=1)
    return module.Args(**module.PRESETS["antmaze_paper"] | flags)


def default_args(module, options):
    args = module.Args(**common.preset_flags("pointmaze", module.PRESETS, module.Args))
    for name in ("bc_steps", "offline_steps", "online_steps"):
        setattr(args, name, round(options.fraction * getattr(args, name)))
    return args


def main(options):
    module, watch = importlib.import_module(options.script), Stopwatch()
    watch.time(getattr(module, f"{options.script.removeprefix('parl_').title()}Policy"), "sample", "sampling")
    for name in ("optimize_actions", "choose"):
        watch.time(module, name, "optimising actions")
    watch.time(module, "cache_samples", "filling the sample cache", whole=True)
    watch.time(module, "optimization_info", "opt/ columns of the log", whole=True)
    watch.time(common, "evaluate", "evaluation", whole=True)
    watch.time(module, "update_critic", "critic's loss and step")
    watch.time(module, "update_policy", "policy's loss and step")
    watch.time(common, "run_episodes", "environment")
    watch.time(envs, "make", "making environments")
    watch.time(envs, "load_dataset", "reading data")
    watch.time(common, "sample_both", "drawing batches")
    watch.time(common.Normalizer, "forward", "normalising")
    watch.time(common.Log, "add", "adding up metrics")
    watch.time(common.Log, "write", "writing metrics")
    watch.time(common.Checkpoint, "save", "writing checkpoints")
    watch.time(common.Log, "finish", "drawing curves")
    with tempfile.TemporaryDirectory() as folder:
        args = antmaze_args(module, options, Path(folder)) if options.antmaze else default_args(module, options)
        args.run_dir, args.device, args.num_threads = f"{folder}/run", "cpu", options.threads or args.num_threads
        began = time.perf_counter()
        module.train(args)
    total, threads = time.perf_counter() - began, torch.get_num_threads()
    watch.seconds["all else"] = total - sum(watch.seconds.values())
    rows = sorted(watch.seconds.items(), key=lambda row: -row[1])
    algorithm, rare = (sum(watch.seconds.get(name, 0.0) for name in names) for names in (ALGORITHM, RARE))
    lines = [
        f"`python benchmark/profile_run.py {shlex.join(sys.argv[1:])}`, torch {torch.__version__}, {threads} threads",
        "",
    ]
    lines += ["| | seconds | share | calls |", "|---|---|---|---|"]
    lines += [f"| {name} | {s:.2f} | {s / total:.1%} | {watch.calls.get(name, '')} |" for name, s in rows]
    lines += [
        "",
        f"The algorithm's own tensor work ({', '.join(ALGORITHM)}): {algorithm / total:.1%} of {total:.1f} s.",
    ]
    lines += [f"Of the time without what a long run does rarely ({', '.join(RARE)}): {algorithm / (total - rare):.1%}."]
    path = HERE / f"profile_{options.script}{'_antmaze' if options.antmaze else ''}.md"
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except common.InputError as error:
        sys.exit(f"error: {error}")
