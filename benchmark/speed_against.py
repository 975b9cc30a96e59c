"""How much faster than an earlier commit: the same operations in both, taking turns.

python benchmark/speed_against.py 3bcd1ff                           # the commit before any work on speed
python benchmark/speed_against.py 867a3fd --script parl_transformer --ensemble-size 2

One process per commit, each with its own files and memory; one works while the other waits, and who is first changes
every turn. At the AntMaze sizes, eager, on a CPU. Adds a table to benchmark/speed_against.md.
"""

import copy
import importlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

HERE = Path(__file__).parent
O, A = 29, 8  # AntMaze's observation and action dimensions
OPERATIONS = ("critic update", "distillation step", "cloning step", "sampling", "acting on 1 state")


@dataclass
class Options:
    """See the top of the file."""

    commit: tyro.conf.Positional[str]  # the earlier one
    script: Literal["parl_gaussian", "parl_diffusion", "parl_transformer"] = "parl_diffusion"  # which
    operations: tuple[str, ...] = OPERATIONS  # which of them
    ensemble_size: int = 10  # critics (E)
    batch_size: int = 256  # states (B)
    repeats: int = 7  # turns of each
    threads: int = 2  # CPU threads of torch
    folder: str = ""  # of the files to run: set by this script for its own processes


def operations(options):
    """{name: a function that does it once} of the scripts in options.folder, whatever their age."""
    sys.path.insert(0, options.folder)
    common, module = importlib.import_module("common"), importlib.import_module(options.script)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    if hasattr(common, "keep_freed_memory"):
        common.keep_freed_memory()
    sizes = dict(hidden_dims=(256,) * 4, ensemble_size=options.ensemble_size, batch_size=options.batch_size)
    sizes |= dict(q_min=-100.0, q_max=0.0)
    args = module.Args(**sizes)
    policy_class = getattr(module, f"{options.script.removeprefix('parl_').title()}Policy")
    policy, critic = policy_class(O, A, args), module.Critic(O, A, args)
    policy_ema, target_critic = (copy.deepcopy(network) for network in (policy, critic))
    policy_ema.eval()
    fused = {"fused": True} if "fused=True" in Path(module.__file__).read_text() else {}
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=args.bc_lr, **fused)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_lr, **fused)
    B, K = args.batch_size, args.num_samples
    batch = dict(obs=torch.randn(B, O), next_obs=torch.randn(B, O), actions=torch.rand(B, A) * 2 - 1)
    batch |= dict(rewards=-torch.ones(B), masks=torch.ones(B), mc_returns=torch.full((B,), -50.0))
    cached = policy_ema.sample(torch.cat([batch["obs"], batch["next_obs"]]), K)

    def clone(actions):
        module.update_policy(policy, policy_ema, policy_optimizer, batch["obs"], actions, args.bc_lr, args)

    def distill():
        samples = policy_ema.sample(batch["obs"], K)
        actions, q = module.optimize_actions(critic, batch["obs"], samples, args, batch["actions"])
        clone(module.choose(actions, q, sample=True))

    return {
        "critic update": lambda: module.update_critic(critic, target_critic, critic_optimizer, batch, cached, args),
        "distillation step": distill,
        "cloning step": lambda: clone(batch["actions"]),
        "sampling": lambda: policy_ema.sample(batch["obs"], K),
        "acting on 1 state": lambda: module.act(policy_ema, critic, batch["obs"][:1], args),
    }


def work(options):
    """Do the operation that each line of standard input names, write its milliseconds to standard output."""
    functions = operations(options)
    for line in sys.stdin:
        began = time.perf_counter()
        functions[line.strip()]()
        print(1000 * (time.perf_counter() - began), flush=True)


class Worker:
    """A process that runs the scripts of a folder."""

    def __init__(self, options, folder):
        command = [sys.executable, __file__, options.commit, "--folder", str(folder), "--script", options.script]
        for name in ("ensemble_size", "batch_size", "threads"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def milliseconds(self, operation):
        print(operation, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def main(options):
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", options.commit], cwd=HERE.parent, stdout=subprocess.PIPE, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        workers = {"before": Worker(options, folder), "now": Worker(options, HERE.parent)}
        times = {(operation, name): [] for operation in options.operations for name in workers}
        for turn in range(-1, options.repeats):
            for operation in options.operations:
                for name in sorted(workers, reverse=turn % 2 == 0):
                    elapsed = workers[name].milliseconds(operation)
                    if turn >= 0:  # the turn before the first warms up
                        times[operation, name].append(elapsed)
    lines = [f"`python benchmark/speed_against.py {shlex.join(sys.argv[1:])}`, torch {torch.__version__}", ""]
    lines += ["| | before, ms | now, ms | before / now | of each turn |", "|---|---|---|---|---|"]
    for operation in options.operations:
        before, now = (times[operation, name] for name in ("before", "now"))
        ratios = ", ".join(f"{b / n:.2f}" for b, n in zip(before, now, strict=True))
        medians = statistics.median(before), statistics.median(now)
        cells = [operation, *(f"{x:.3g}" for x in medians), f"{medians[0] / medians[1]:.2f}", ratios]
        lines.append(f"| {' | '.join(cells)} |")
    with open(HERE / "speed_against.md", "a") as file:
        file.write("\n".join(lines) + "\n\n")
    print("\n".join(lines))


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    work(chosen) if chosen.folder else main(chosen)
