"""What each part of PA-RL costs, and how far it is from what the machine can do.

python benchmark/speed.py                          # all policies, all settings: benchmark/speed.md and speed.csv
python benchmark/speed.py --settings antmaze --policies diffusion --device cuda --compile
python benchmark/speed.py --beside 2 --name busy   # with two other programs on the cores
python benchmark/speed.py --growth                 # a critic update as K, T, E and the batch double: growth.md, .csv

Times are medians over repeats in one process, the operations taking turns, with the machine's own matrix product
(sgemm: float32, 4096 x 1024 x 1024) among them: `of sgemm` is an operation's GFLOP/s as a share of it. GFLOP counts
matrix products. Memory is the process's highest resident size, or on a GPU what torch allocated at most.
"""

import contextlib
import copy
import csv
import multiprocessing
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import parl_diffusion  # noqa: E402
import parl_gaussian  # noqa: E402
import parl_transformer  # noqa: E402

POLICIES = {
    "gaussian": (parl_gaussian, "GaussianPolicy", {}),
    "diffusion": (parl_diffusion, "DiffusionPolicy", {}),
    "tokens": (parl_transformer, "TransformerPolicy", {"head": "tokens"}),
    "continuous": (parl_transformer, "TransformerPolicy", {"head": "continuous"}),
}
# observation and action dimensions, the preset, and what is changed of it
SETTINGS = {
    "pointmaze": (4, 2, "pointmaze", {}),
    "antmaze": (29, 8, "antmaze_paper", {}),
    "antmaze, E 2": (29, 8, "antmaze_paper", {"ensemble_size": 2}),
    "kitchen": (60, 9, "kitchen", {}),
}
GROWTH = {"num_samples": "K", "num_gradient_steps": "T", "ensemble_size": "E", "batch_size": "batch"}


@dataclass
class Options:
    """See the top of the file."""

    settings: tuple[str, ...] = tuple(SETTINGS)  # which of them
    policies: tuple[str, ...] = tuple(POLICIES)  # which of them
    repeats: int = 7  # timings per operation
    threads: int = 2  # CPU threads of torch
    device: Literal["cpu", "cuda"] = "cpu"  # where to run
    compile: bool = False  # torch.compile the two updates, as the scripts' flag does
    beside: int = 0  # programs that keep a core busy each, meanwhile
    growth: bool = False  # the other table
    name: str = ""  # of the files written, default: speed or growth


def prepare(setting, policy_name, options, **changes):
    """(args, networks, one batch) at a setting; values in the middle of the range."""
    module, class_name, flags = POLICIES[policy_name]
    O, A, preset, other = SETTINGS[setting]
    preset = common.preset_flags(preset, module.PRESETS, module.Args)
    args = module.Args(**{**preset, **other, "q_min": -100.0, "q_max": 0.0, **flags, **changes})
    torch.manual_seed(0)
    policy = getattr(module, class_name)(O, A, args).to(options.device)
    critic = module.Critic(O, A, args).to(options.device)
    batch = {name: torch.randn(args.batch_size, O) for name in ("obs", "next_obs")}
    batch |= {"actions": torch.rand(args.batch_size, A) * 2 - 1, "masks": torch.ones(args.batch_size)}
    batch |= {"rewards": -torch.ones(args.batch_size), "mc_returns": torch.full((args.batch_size,), -50.0)}
    return module, args, policy, critic, {name: value.to(options.device) for name, value in batch.items()}


def operations(module, args, policy, critic, batch, options):
    """{name: a function that does it once}"""
    policy_ema, target_critic = copy.deepcopy(policy).eval(), copy.deepcopy(critic)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=args.bc_lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=args.critic_lr, fused=True)
    compiled = common.compiled if options.compile else lambda function: function
    improve_critic, improve_policy = compiled(module.update_critic), compiled(module.update_policy)
    states = torch.cat([batch["obs"], batch["next_obs"]])  # (2B, O)
    cached = policy_ema.sample(states, args.num_samples)

    def critic_update(samples):
        improve_critic(critic, target_critic, critic_optimizer, batch, samples, args)

    def clone(actions):
        improve_policy(policy, policy_ema, policy_optimizer, batch["obs"], actions, args.bc_lr, args)

    def distill():
        samples = policy_ema.sample(batch["obs"], args.num_samples)
        actions, q = module.optimize_actions(critic, batch["obs"], samples, args, batch["actions"])
        clone(module.choose(actions, q, sample=True))

    def act_alone(state):  # as Agent.explore does
        with common.threads(1):
            module.act(policy_ema, critic, state, args)

    return {
        "critic update, cached samples": lambda: critic_update(cached),
        "critic update, fresh samples": lambda: critic_update(policy_ema.sample(states, args.num_samples)),
        "distillation step": distill,
        "cloning step": lambda: clone(batch["actions"]),
        f"sampling {args.batch_size} x {args.num_samples}": lambda: policy_ema.sample(batch["obs"], args.num_samples),
        "acting on 1 state": lambda: act_alone(states[:1]),
        "acting on 50 states": lambda: module.act(policy_ema, critic, states[:50], args),
    }


class FlopCounter(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products. (torch's FlopCounterMode refuses autograd.grad.)"""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def milliseconds(function, device):
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def measure(setting, policy_name, options, only=None, **changes):
    """Rows (dicts) of one setting and policy, in this process."""
    torch.set_num_threads(options.threads)
    common.keep_freed_memory()
    prepared = prepare(setting, policy_name, options, **changes)
    functions = operations(*prepared, options)
    functions = {name: function for name, function in functions.items() if only in (None, name)}
    gigaflops = {"sgemm": 2e-9 * 4096 * 1024 * 1024}
    for name, function in functions.items():
        function()  # compiles, warms up
        if options.compile:  # count what eager does: a compiled function hides its products
            eager = operations(*prepared, replace(options, compile=False))[name]
        with FlopCounter() as counter:
            (eager if options.compile else function)()
        gigaflops[name] = counter.total / 1e9
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    left, right = (torch.randn(n, 1024, device=options.device) for n in (4096, 1024))
    functions["sgemm"] = lambda: left @ right
    times = {name: [] for name in functions}
    for _ in range(options.repeats):
        for name, function in functions.items():
            times[name].append(milliseconds(function, options.device))
    sgemm = gigaflops["sgemm"] / statistics.median(times.pop("sgemm")) * 1000
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if options.device == "cuda":
        gigabytes = torch.cuda.max_memory_allocated() / 1e9
    rows = []
    for name, values in times.items():
        rate = gigaflops[name] / statistics.median(values) * 1000
        row = {"setting": setting, "policy": policy_name, "operation": name, "ms": statistics.median(values)}
        row |= {"fastest ms": min(values), "GFLOP": gigaflops[name], "GFLOP/s": rate, "sgemm GFLOP/s": sgemm}
        rows.append(row | {"of sgemm %": 100 * rate / sgemm, "peak GB": gigabytes})
    return rows


def in_own_process(function, *arguments, **keywords):
    """function(...) in a fresh process, so that its peak memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments, keywords)


@contextlib.contextmanager
def competing(number):
    """So many processes that multiply matrices on one thread each, until this one ends."""
    busy = "import os, torch; torch.set_num_threads(1); a = torch.randn(512, 512)\n"
    busy += f"while os.getppid() == {os.getpid()}: a @ a"
    programs = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(number)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def digits(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def write(rows, name, title):
    """name.csv and name.md in this folder."""
    with open(HERE / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    cells = [[digits(value) if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    (HERE / f"{name}.md").write_text(f"{title}\n\n{table}\n")
    print(table)


def main(options):
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    title = f"`python benchmark/speed.py {shlex.join(sys.argv[1:])}`, torch {torch.__version__}, {where}"
    rows = []
    if options.growth:
        only = "critic update, cached samples"
        base = vars(parl_diffusion.Args(**parl_diffusion.PRESETS["antmaze_paper"], ensemble_size=2))
        cases = [{field: base[field] * factor} for field in GROWTH for factor in (1, 2, 4)]
        for case in cases:
            (field, value), *_ = case.items()
            (row,) = in_own_process(measure, "antmaze, E 2", "diffusion", options, only, **case)
            rows.append({"doubled": GROWTH[field], "value": value, **row})
    else:
        for setting in options.settings:
            for policy_name in options.policies:
                rows += in_own_process(measure, setting, policy_name, options)
    write(rows, options.name or ("growth" if options.growth else "speed"), title)


if __name__ == "__main__":
    try:
        options = tyro.cli(Options, description=__doc__)
        with competing(options.beside):
            main(options)
    except common.InputError as error:
        sys.exit(f"error: {error}")
