"""Tables and plots over seeds from the directories of runs: final values, never the best of a run.

python benchmark/report.py RUN_DIR... [--out NAME]    # prints Markdown; with --out NAME.md, NAME.csv and NAME.png
python benchmark/report.py    # the tables and plots of docs/results.md, from benchmark/results/NAME-SEED.csv

Runs whose config.json is the same, but for the seed and what does not change learning, are a group. A group's name is
the flags in which it differs from the others.
"""

import argparse
import csv
import itertools
import json
import math
import re
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np
from matplotlib.lines import Line2D

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import InputError, read_metrics  # noqa: E402

QUANTITIES = {  # title: (column of metrics.csv, scale)
    "optimised: success %": ("eval/success_rate", 100),
    "optimised: steps to goal": ("eval/steps_to_goal", 1),
    "optimised: return": ("eval/return", 1),
    "optimised: normalised score": ("eval/normalized_score", 1),
    "raw policy: success %": ("eval/policy_success_rate", 100),
    "raw policy: steps to goal": ("eval/policy_steps_to_goal", 1),
    "raw policy: return": ("eval/policy_return", 1),
    "raw policy: normalised score": ("eval/policy_normalized_score", 1),
    "regret": ("train/regret", 1),
}
PHASES = {"start": "start", "bc": "cloning", "offline": "offline RL", "distill": "distillation", "online": "online"}
NOT_LEARNING = {  # in what the runs of a group may differ
    *("seed", "device", "num_threads", "compile", "log_every", "eval_only", "capture_video"),
    *("track", "wandb_project", "wandb_entity", "python", "torch", "numpy", "gymnasium", "commit"),
    *("run_dir", "resume", "command"),
    *("dataset_path", "dataset_note"),  # a dataset is known by its dataset_sha256, wherever it lies
}
TASK = ("env_id", "policy_class")  # families' presets follow from these: other flags name a group within the same ones


# ======================================== STATISTICS ========================================


def iqm(values):
    """Interquartile mean over the last axis: a quarter of the values, rounded down, is cut off at either end
    (Agarwal et al., 2021, as rliable computes it)."""
    cut = values.shape[-1] // 4
    return np.sort(values)[..., cut : values.shape[-1] - cut].mean(-1)


def bootstrap(values, statistic, num_resamples=10_000):
    """95 % interval of statistic(values): its percentiles over resamples of the seeds with replacement."""
    resamples = np.random.default_rng(0).choice(values, (num_resamples, len(values)))
    return np.percentile(statistic(resamples), (2.5, 97.5))


def wilson(rate, num_episodes):
    """95 % interval of a success rate in [0, 1] over so many episodes (Wilson, 1927)."""
    z = 1.959964
    centre = rate + z**2 / (2 * num_episodes)
    half = z * math.sqrt(rate * (1 - rate) / num_episodes + z**2 / (4 * num_episodes**2))
    return np.array([centre - half, centre + half]) / (1 + z**2 / num_episodes)


def describe(values, num_episodes=0):
    """Statistics by name of one value per seed, nan where a seed has none: n, mean; of two seeds or more sd, low, high;
    of five or more iqm, iqm_low, iqm_high. Values that are success rates in percent come with their num_episodes: low
    and high of a single one are Wilson's."""
    values = np.array([value for value in values if not np.isnan(value)])
    stats = {"n": len(values), "mean": values.mean()}
    if len(values) >= 2:
        stats["sd"] = values.std(ddof=1) if np.ptp(values) else 0.0  # not a rounding error
        stats["low"], stats["high"] = bootstrap(values, lambda resamples: resamples.mean(-1))
    elif num_episodes:
        stats["low"], stats["high"] = 100 * wilson(values[0] / 100, num_episodes)
    if len(values) >= 5:
        stats["iqm"] = iqm(values)
        stats["iqm_low"], stats["iqm_high"] = bootstrap(values, iqm)
    return stats


# ======================================== RUNS AND GROUPS ========================================


@dataclass
class Run:
    rows: list  # of metrics.csv, see common.read_metrics
    config: dict | None = None  # config.json; a run without one is taken for finished
    directory: str = ""

    def phases(self):
        """{phase: its rows}; "start" is the evaluation of the policy that the run began with."""

        def phase(row):
            return "start" if row["gradient_step"] == 0 and "eval/policy_success_rate" in row else row["phase"]

        return {name: list(rows) for name, rows in itertools.groupby(self.rows, phase)}

    def unfinished(self):
        """The phase in which the run is, or was stopped; None where it has ended the last one that it began."""
        if not self.rows or self.config is None:
            return None
        *before, (phase, rows) = self.phases().items()
        updates = rows[-1]["gradient_step"] - (before[-1][1][-1]["gradient_step"] if before else 0)
        limits = {  # (done, flag) of each limit, of which the first that is reached ends the phase
            "bc": [(updates, "bc_steps")],
            "offline": [(updates, "offline_steps")],
            "distill": [(updates, "offline_distill_steps")],
            "online": [(rows[-1]["env_step"], "online_steps"), (rows[-1]["episode"], "online_episodes")],
        }
        flags = [(done, self.config.get(flag)) for done, flag in limits.get(phase, ())]
        ended = phase == "start" or any(limit is not None and done >= limit for done, limit in flags)
        return None if ended else phase

    def is_stopped_before_online(self):
        """Has it ended the phases that it began, and is to go online still?"""
        is_offline = 0 in (self.config.get("online_steps", 0), self.config.get("online_episodes", 0))
        return bool(self.rows) and not (is_offline or self.unfinished() or "online" in self.phases())

    def finals(self):
        """{phase: its last row, with the columns of its last evaluation} of each phase that the run ended."""
        finals = {}
        for phase, rows in self.phases().items():
            evaluated = [row for row in rows if "eval/policy_success_rate" in row][-1:]
            finals[phase] = (evaluated[0] if evaluated else {}) | rows[-1]
        finals.pop(self.unfinished(), None)
        return finals


@dataclass
class Group:
    flags: dict  # what its runs have in common: see `learning_flags`
    runs: dict  # {seed: Run}
    name: str = ""


def read_run(directory):
    """The Run in a directory. Raises InputError where there is none."""
    config, metrics = Path(directory) / "config.json", Path(directory) / "metrics.csv"
    for path in (config, metrics):
        if not path.is_file():
            raise InputError(f"{directory}: no {path.name} there; expected the directory of a run")
    try:
        run = Run(read_metrics(metrics), json.loads(config.read_text()), str(directory))
    except (ValueError, TypeError) as error:  # TypeError: a line of metrics.csv was cut off
        raise InputError(f"{directory}: these are not the files of a run ({error})") from error
    if missing := {"env_id", "seed", "num_eval_episodes"} - set(run.config):
        raise InputError(
            f"{directory}: config.json has no {', '.join(sorted(missing))}; expected those of a run's flags"
        )
    return run


def runs_in(directories):
    """The Runs of these directories. One that is none, as of a run that failed at its flags, is left out, said on
    stderr. Raises InputError where all are."""
    runs, reasons = [], []
    for directory in dict.fromkeys(map(Path, directories)):
        try:
            runs.append(read_run(directory))
        except InputError as error:
            reasons.append(str(error))
    if not runs:
        raise InputError("; ".join(reasons))
    for reason in reasons:
        print(f"warning: left out: {reason}", file=sys.stderr)
    return runs


def learning_flags(config):
    """What of a config.json may change what is learned, but for the seed."""
    flags = {name: value for name, value in config.items() if name not in NOT_LEARNING}
    if flags.get("policy_checkpoint"):  # a clone for each seed: runs/clone-3/checkpoint.pt
        flags["policy_checkpoint"] = re.sub(r"-\d+(?=/|\.\w+$)", "-SEED", flags["policy_checkpoint"])
    return flags


def group_runs(directories):
    """The Groups of these runs. Raises InputError for two runs of the same flags and seed."""
    groups = {}
    for run in runs_in(directories):
        flags, seed = learning_flags(run.config), run.config["seed"]
        key = frozenset((name, value_text(name, flags)) for name in flags)
        runs = groups.setdefault(key, Group(flags, {})).runs
        if seed in runs:
            both = f"{runs[seed].directory} and {run.directory}"
            raise InputError(f"{both}: the same flags and seed {seed}; expected one of them")
        runs[seed] = run
    groups = list(groups.values())
    names = naming(groups) or TASK
    for group in groups:
        group.name = ", ".join(flag_text(name, group.flags) for name in names)
        group.runs = dict(sorted(group.runs.items()))
    return groups


def differing(groups):
    """The names of the flags that are not the same in all groups."""
    names = dict.fromkeys(name for group in groups for name in group.flags)
    return [name for name in names if len({value_text(name, group.flags) for group in groups}) > 1]


def naming(groups):
    """Those of them that tell the groups apart: the task, and what differs between groups of the same task."""
    pairs = [differing(pair) for pair in itertools.combinations(groups, 2)]
    within_task = {name for names in pairs if not set(names) & set(TASK) for name in names}
    return [name for name in differing(groups) if name in within_task or name in TASK]


def value_text(name, flags):
    value = flags.get(name, "absent")
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)[:8] if name == "dataset_sha256" else str(value) or "none"


def flag_text(name, flags):
    """As on a command line; of the task its value alone."""
    flag, value = name.replace("_", "-"), value_text(name, flags)
    if isinstance(flags.get(name), bool):
        return f"--{flag}" if flags[name] else f"--no-{flag}"
    return value if name in TASK else f"{name} {value}" if name == "dataset_sha256" else f"--{flag} {value}"


# ======================================== TABLES ========================================


def final_values(runs, quantities=QUANTITIES):
    """{(phase, quantity): {seed: final value}} of {seed: Run}, nan where one has none. What no run has is left out."""
    finals, values = {seed: run.finals() for seed, run in runs.items()}, {}
    for phase, (quantity, (column, scale)) in itertools.product(PHASES, quantities.items()):
        row = {seed: scale * rows.get(phase, {}).get(column, math.nan) for seed, rows in finals.items()}
        if not all(map(math.isnan, row.values())):
            values[phase, quantity] = row
    return values


def summarise(groups):
    """[{group, phase, quantity, values: {seed: final value}, stats: see `describe`}]"""
    summary = []
    for group in groups:
        for (phase, quantity), values in final_values(group.runs).items():
            num_episodes = group.flags["num_eval_episodes"] if quantity.endswith("success %") else 0
            stats = describe(values.values(), num_episodes)
            summary.append(dict(group=group.name, phase=phase, quantity=quantity, values=values, stats=stats))
    return summary


def markdown(header, rows):
    """A table of texts."""
    first, *others = (f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (header, *rows))
    return "\n".join([first, "|---" * len(header) + "|", *others])


def number(value, digits=3):
    """Rounded to so many digits, a larger one to the integer."""
    if math.isnan(value):
        return "-"
    rounded = float(f"{value:.{digits}g}")
    return f"{value:.0f}" if abs(rounded) >= 10**digits else f"{rounded:.{digits}g}"


def group_table(rows):
    """Every seed and their statistics, a line per phase and quantity. rows: one group's of `summarise`."""
    header = ["after", "", *(f"seed {seed}" for seed in rows[0]["values"]), "mean", "sd", "95 %", "IQM", "its 95 %"]
    lines = []
    for row in rows:
        stats = defaultdict(lambda: math.nan, row["stats"])
        cells = [PHASES[row["phase"]], row["quantity"], *map(number, row["values"].values()), number(stats["mean"])]
        cells += [number(stats["sd"], 2), f"{number(stats['low'])} to {number(stats['high'])}"]
        cells += [number(stats["iqm"]), f"{number(stats['iqm_low'])} to {number(stats['iqm_high'])}"]
        lines.append([cell.replace("- to -", "-") for cell in cells])
    num_columns = len(header) if any("iqm" in row["stats"] for row in rows) else len(header) - 2
    return markdown(header[:num_columns], [line[:num_columns] for line in lines])


def headlines(summary):
    """The quantities that tell how good a policy is: success, beside it D4RL's score, or return where it tells nothing,
    for none succeeds or all do."""
    names = {row["quantity"].partition(": ")[2] for row in summary}
    if "normalised score" in names:
        return ["normalised score", "success %"]
    success = {row["stats"]["mean"] for row in summary if row["quantity"].endswith("success %")}
    return ["success %"] if success - {0, 100} else [name for name in ("return", "success %") if name in names]


def phase_table(groups, summary, quantity):
    """A line per group: mean and sd of `quantity` after each phase, from left to right, and of the regret."""
    stats = {(row["group"], row["phase"], row["quantity"]): row["stats"] for row in summary}
    columns = [(phase, f"{policy}: {quantity}") for phase in PHASES for policy in ("raw policy", "optimised")]
    columns = [key for key in (*columns, ("online", "regret")) if key in {key[1:] for key in stats}]

    def cell(group, key):
        if (of_key := stats.get((group.name, *key))) is None:
            return "-"
        spread = f" ± {number(of_key['sd'], 2)}" if "sd" in of_key else ""
        missing = f" ({of_key['n']} of {len(group.runs)})" if of_key["n"] < len(group.runs) else ""
        return number(of_key["mean"]) + spread + missing

    lines = [[group.name, str(len(group.runs)), *(cell(group, key) for key in columns)] for group in groups]
    titles = [f"{PHASES[phase]}, {name.partition(':')[0]}" for phase, name in columns]
    return markdown(["", "seeds", *titles], lines)


EXPLANATION = """
Final values, never the best: the last evaluation of each phase that a run ended. *Raw policy* is the policy alone,
*optimised* the policy with its critic; offline RL freezes the policy. sd, and what follows ±: sample standard deviation
over seeds. 95 %: bootstrap interval of the mean over seeds; of a single run's success Wilson's, over its evaluation
episodes. IQM: interquartile mean, of five seeds or more. Regret: 1 - mean success of the online episodes.
""".strip()


def document(groups, summary):
    """The Markdown of a report."""
    flags, num_runs, first = differing(groups), sum(len(group.runs) for group in groups), groups[0].flags
    shared = [value_text(name, first) for name in TASK if name not in flags]
    shared += [f"{first['num_eval_episodes']} episodes per evaluation"] * ("num_eval_episodes" not in flags)
    parts = [f"# {num_runs} run{'s' * (num_runs > 1)}, {len(groups)} group{'s' * (len(groups) > 1)}"]
    parts += ["Written by `python benchmark/report.py`." + f" All: {', '.join(shared)}." * bool(shared), EXPLANATION]
    for quantity in headlines(summary):
        parts += [f"## {quantity[0].upper()}{quantity[1:]} after each phase", phase_table(groups, summary, quantity)]
    if others := [name for name in flags if name not in naming(groups)]:
        rows = [[group.name, *(value_text(name, group.flags) for name in others)] for group in groups]
        parts += ["## In what they differ beside their names", markdown(["", *(f"`{name}`" for name in others)], rows)]
    for group in groups:
        parts += [f"## {group.name}"]
        notes = {run.config.get("dataset_note") for run in group.runs.values()}
        parts += [f"Note: {note}." for note in notes if note]
        if rows := [row for row in summary if row["group"] == group.name]:
            parts += [group_table(rows)]
        for run in group.runs.values():
            if not run.rows:
                parts += [f"{run.directory} has no rows yet."]
            if phase := run.unfinished():
                parts += [f"{run.directory} has not ended {PHASES.get(phase, phase)}, which is left out."]
            elif run.is_stopped_before_online():
                parts += [f"{run.directory} has not begun online fine-tuning."]
        commits = sorted({run.config.get("commit") or "unknown" for run in group.runs.values()})
        if len(commits) > 1:
            parts += [f"These runs are of different commits: {', '.join(commits)}."]
    return "\n\n".join(parts) + "\n"


def write_csv(path, groups, summary):
    """A line per group, phase and quantity: the flags in which groups differ, statistics, the value of each seed."""
    flags, seeds = differing(groups), sorted({seed for group in groups for seed in group.runs})
    columns = ["group", *flags, "phase", "quantity", "n", "mean", "sd", "low", "high"]
    columns += ["iqm", "iqm_low", "iqm_high", *(f"seed_{seed}" for seed in seeds)]
    flags = {group.name: {name: value_text(name, group.flags) for name in flags} for group in groups}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in summary:
            values = {f"seed_{seed}": value for seed, value in row["values"].items() if not math.isnan(value)}
            numbers = {name: f"{value:.6g}" for name, value in (row["stats"] | values).items()}
            texts = {name: row[name] for name in ("group", "phase", "quantity")}
            writer.writerow(texts | flags[row["group"]] | numbers)


# ======================================== PLOTS ========================================

POLICIES = {"optimised": ("optimised policy", "tab:blue"), "raw policy": ("raw policy", "tab:orange")}
FINALS = {  # (phase, policy): its name and colour
    ("start", "raw policy"): ("start, raw", "0.7"),
    ("bc", "raw policy"): ("cloned, raw", "0.4"),
    ("offline", "optimised"): ("offline RL, optimised", "tab:green"),
    ("distill", "raw policy"): ("distilled, raw", "tab:olive"),
    ("online", "optimised"): ("online, optimised", "tab:blue"),
    ("online", "raw policy"): ("online, raw", "tab:orange"),
}


def draw_curves(axis, runs, quantity="success %", scale=1):
    """`quantity` over updates: a thin line per seed, a thick one for the mean as far as all go, phases marked."""
    for policy, (label, colour) in POLICIES.items():
        column, _ = QUANTITIES[f"{policy}: {quantity}"]
        curves = [[(r["gradient_step"], scale * r[column]) for r in run.rows if column in r] for run in runs.values()]
        curves = [points for points in curves if points]
        for points in curves:
            axis.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=1)
        label += f" (mean of {len(curves)} seeds)" if len(curves) > 1 else ""
        if curves:
            means = np.mean(list(zip(*curves, strict=False)), 1).T
            axis.plot(*means, color=colour, marker=".", linewidth=2, label=label)
    begun = 0
    for phase, rows in max((run.phases() for run in runs.values()), key=len).items():
        if rows[-1]["gradient_step"] > begun:
            axis.axvline(begun, color="0.6", linestyle=":")
            axis.annotate(PHASES.get(phase, phase), (begun, 1.02), xycoords=("data", "axes fraction"))
            begun = rows[-1]["gradient_step"]
    axis.set_xlabel("updates (cloning, then critic)")
    axis.grid(alpha=0.3)


def draw_finals(axis, groups, summary, quantity):
    """Final values of `quantity`: for each group and phase a dot per seed, a bar at the mean, the 95 % interval."""
    rows = {(row["group"], row["phase"], row["quantity"]): row for row in summary}
    kinds = [kind for kind in FINALS if any((g.name, kind[0], f"{kind[1]}: {quantity}") in rows for g in groups)]
    for (i, (phase, policy)), (y, group) in itertools.product(enumerate(kinds), enumerate(groups)):
        if row := rows.get((group.name, phase, f"{policy}: {quantity}")):
            colour, values, stats = FINALS[phase, policy][1], [*row["values"].values()], row["stats"]
            height = y + 0.7 * ((i + 0.5) / len(kinds) - 0.5)
            axis.scatter(values, np.full(len(values), height), s=20, color=colour, alpha=0.6, linewidth=0)
            axis.plot([stats["mean"]], [height], "|", color=colour, markersize=10, markeredgewidth=2)
            if "low" in stats:
                axis.plot([stats["low"], stats["high"]], [height, height], color=colour, linewidth=1.5, alpha=0.8)
    lines = [Line2D([], [], color=FINALS[kind][1], marker="o", markersize=4, label=FINALS[kind][0]) for kind in kinds]
    axis.legend(handles=lines, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    names = [textwrap.fill(group.name, 40, break_on_hyphens=False) for group in groups]
    axis.set(yticks=range(len(groups)), yticklabels=names, ylim=(len(groups) - 0.5, -0.5))
    axis.set(xlabel=f"{quantity}: seeds, mean, 95 %", title="final values")
    if quantity == "success %":
        axis.set_xlim(-3, 103)
    axis.grid(alpha=0.3, axis="x")


def plot_groups(groups, summary, path):
    """Final values of all groups, and below them the curves of each."""
    quantity, num_columns = [*headlines(summary), "success %"][0], min(2, len(groups))
    num_rows = math.ceil(len(groups) / num_columns)
    heights = 1.2 + 0.6 * len(groups), 0.4 + 3 * num_rows
    figure = matplotlib.figure.Figure(figsize=(10, sum(heights)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    draw_finals(above.subplots(), groups, summary, quantity)
    axes = below.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, group in zip(axes, groups, strict=False):
        draw_curves(axis, group.runs, quantity, QUANTITIES[f"optimised: {quantity}"][1])
        axis.set_title(textwrap.fill(group.name, 110 // num_columns, break_on_hyphens=False), pad=18, fontsize="medium")
        axis.set_ylabel(quantity)
        if quantity == "success %":
            axis.set_ylim(-3, 103)
    for axis in axes[len(groups) :]:
        axis.remove()
    lines = [Line2D([], [], color=colour, marker=".", label=label) for label, colour in POLICIES.values()]
    below.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def report(directories, out=None):
    """Print the Markdown of these runs; with `out` write it, a CSV and a plot. Raises InputError."""
    groups = group_runs(directories)
    summary = summarise(groups)
    text = document(groups, summary)
    print(text, end="")
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{out}.md").write_text(text)
        write_csv(f"{out}.csv", groups, summary)
        plot_groups(groups, summary, f"{out}.png")


# ======================================== docs/results.md ========================================

POINTMAZE = {
    "full": "default: `python parl_diffusion.py`",
    "bc2": "cloning only, twice the steps: `--bc-steps 16000 --offline-steps 0 --online-steps 0`",
    "rerank": "re-ranking only: `--num-gradient-steps 0`",
    "gradient": "gradient steps only: `--num-samples 1 --num-keep 1`",
    "nocache": "samples drawn at every touch: `--sample-cache-gb 0`",
    "flipped": "the critic's sign flipped where actions are ranked, moved and chosen: `python benchmark/flipped.py`",
    "lowcql": "a tenth of the CQL weight, offline only: `--cql-weight 0.01 --offline-steps 3000 --online-steps 0`",
    "gaussian": "`python parl_gaussian.py`",
    "tokens": "`python parl_transformer.py --head tokens`",
    "continuous": "`python parl_transformer.py --head continuous`",
    "slalom_gaussian": "slalom (multimodal demonstrations): `parl_gaussian.py`, flags in slalom.txt",
    "slalom_diffusion": "slalom: `parl_diffusion.py`",
    "slalom_flow": "slalom: `parl_diffusion.py --objective flow`",
    "slalom_tokens": "slalom: `parl_transformer.py --head tokens`",
    "slalom_continuous": "slalom: `parl_transformer.py --head continuous`",
    "medium": "pointmaze-medium-play: `--env-id pointmaze-medium-play --batch-size 256 --online-steps 700`",
    "large": "pointmaze-large-play: `--env-id pointmaze-large-play --batch-size 256 --offline-steps 5000 "
    "--online-steps 1000 --eval-every 1000`",
}
MANIPULATION = {
    task + name: f"{env_id}: {method}"
    for task, env_id in (
        ("drawer_open", "metaworld-drawer-open"),
        ("door_open", "metaworld-door-open"),
        ("cube", "cube-single-noisy-singletask-task1-v0"),
    )
    for name, method in (
        ("", "`parl_diffusion.py`"),
        ("_rerank", "`parl_diffusion.py --num-gradient-steps 0`, re-ranking only"),
        ("_gaussian", "`parl_gaussian.py`"),
    )
} | {"pick_place": "metaworld-pick-place: `parl_diffusion.py`"}
CHUNKS = {
    f"chunk{steps}_{task}": f"{env_id}: `--action-chunk {steps}`, cloning and offline RL alone"
    for task, env_id in (
        ("drawer", "metaworld-drawer-open"),
        ("cube", "cube-single-noisy-singletask-task1-v0, data made here"),
        ("antmaze", "antmaze-medium-diverse-v2, made data"),
    )
    for steps in (1, 3, 5, 10)
}
ANTMAZE = {"antmaze": "antmaze-medium-diverse-v2, made data, `parl_diffusion.py`"}
OPENVLA = {
    "openvla": "`python parl_openvla.py`: a tiny OpenVLA closes a drawer (Meta-World) from camera images",
    "openvla_cloned": "the same, cloning alone",
    "openvla_bc2": "cloning alone, twice the steps",
}
STEADY = {
    "default": "pointmaze-umaze-play",
    "steady_drawer": "metaworld-drawer-open",
    "steady_door": "metaworld-door-open",
    "steady_push": "metaworld-push",
    "steady_fetch": "FetchPush-v4, `--preset small`",
    "steady_cube": "cube-single-noisy, task 1, data made here",
    "steady_medium": "pointmaze-medium-play",
    "steady_large": "pointmaze-large-play",
    "steady_antmaze": "antmaze-medium-diverse-v2, made data",
    "calibration_before": "metaworld-push, the settings of before",
    "calibration_after": "metaworld-push, noting the value of the starts",
}
DOCS = {
    "steady.md": ("does a policy end better than it began? The presets as they are, `parl_diffusion.py`", STEADY),
    "pointmaze.md": ("PointMaze, slalom", POINTMAZE),
    "manipulation.md": ("Meta-World, OGBench's cube", MANIPULATION),
    "chunks.md": ("how many steps a decision covers", CHUNKS),
    "antmaze.md": ("AntMaze from made data", ANTMAZE),
    "openvla.md": ("the tiny OpenVLA", OPENVLA),
}
CLASSES = {
    "gaussian": ("Gaussian", "tab:green"),
    "full": ("diffusion", "tab:blue"),
    "tokens": ("transformer, tokens", "tab:orange"),
    "continuous": ("transformer, mixture", "tab:red"),
}


def load_results():
    """{experiment: {seed: Run}} of benchmark/results/NAME-SEED.csv"""
    runs = defaultdict(dict)
    for path in sorted((HERE / "results").glob("*.csv")):
        if match := re.fullmatch(r"(.+)-(\d+)", path.stem):
            runs[match[1]][int(match[2])] = Run(read_metrics(path))
    return runs


def docs_table(runs):
    """Every seed, mean, sample standard deviation and 95 % interval of success and steps to the goal."""
    quantities = {name: column for name, column in QUANTITIES.items() if re.search("success|steps", name)}
    lines = []
    for (phase, quantity), values in final_values(runs, quantities).items():
        stats = describe(list(values.values()))
        interval = f"{number(stats['low'])} to {number(stats['high'])}" if "low" in stats else ""
        spread = [number(stats["mean"]), number(stats["sd"], 2) if "sd" in stats else "", interval]
        lines.append([PHASES[phase], quantity, *map(number, values.values()), *spread])
    return markdown(["after", "", *(f"seed {seed}" for seed in runs), "mean", "sd", "95 %"], lines)


def plot(runs, title, path):
    """Success rate over updates."""
    figure = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    draw_curves(axis, runs)
    axis.set(ylim=(-0.03, 1.03), ylabel="success rate")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(textwrap.fill(title, 90, break_on_hyphens=False), fontsize="medium")
    figure.savefig(path, dpi=120)


def plot_ablations(runs, path):
    """Final success of the optimised and the raw policy per experiment, a dot per seed."""
    names = [name for name in ("full", "rerank", "gradient", "nocache") if name in runs]
    figure = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained")
    for axis, (column, title) in zip(
        figure.subplots(1, 2),
        (("eval/success_rate", "optimised"), ("eval/policy_success_rate", "raw policy")),
        strict=True,
    ):
        for phase, colour, shift in (("offline", "tab:green", -0.12), ("online", "tab:blue", 0.12)):
            for x, name in enumerate(names):
                values = [run.finals()[phase][column] for run in runs[name].values()]
                axis.scatter(
                    np.full(len(values), x + shift),
                    values,
                    color=colour,
                    alpha=0.6,
                    label=PHASES[phase] if x == 0 else None,
                )
        axis.set(
            ylim=(-0.03, 1.03),
            xticks=range(len(names)),
            xticklabels=names,
            title=title,
            ylabel="success rate, 100 episodes",
        )
        axis.grid(alpha=0.3, axis="y")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def draw_dots(axis, groups):
    """Final success of groups {label: {seed: Run}}: a dot per seed, a line at the mean, for each of four finals."""
    finals = (
        ("cloned, raw", "bc", "eval/policy_success_rate", "0.4"),
        ("offline RL, optimised", "offline", "eval/success_rate", "tab:green"),
        ("online, optimised", "online", "eval/success_rate", "tab:blue"),
        ("online, raw", "online", "eval/policy_success_rate", "tab:orange"),
    )
    for x, runs in enumerate(groups.values()):
        for i, (label, phase, column, colour) in enumerate(finals):
            values = [run.finals()[phase][column] for run in runs.values()]
            where = x + 0.2 * (i - 1.5) + 0.03 * (np.arange(len(values)) - (len(values) - 1) / 2)
            axis.scatter(where, values, s=20, color=colour, alpha=0.7, label=label if x == 0 else None)
            axis.hlines(np.mean(values), where[0] - 0.04, where[-1] + 0.04, color=colour)
    axis.set(ylim=(-0.03, 1.03), xticks=range(len(groups)), xticklabels=groups)
    axis.grid(alpha=0.3, axis="y")


def plot_manipulation(runs, path):
    """Final success per task and method: cloned, after offline RL, after online fine-tuning, a dot per seed."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    tasks = {"drawer_open": "metaworld-drawer-open", "door_open": "metaworld-door-open", "cube": "cube-single, task 1"}
    methods = {"": "diffusion", "_rerank": "diffusion,\nre-ranking only", "_gaussian": "Gaussian"}
    for axis, (task, title) in zip(figure.subplots(1, 3, sharey=True), tasks.items(), strict=True):
        draw_dots(axis, {label: runs[task + method] for method, label in methods.items()})
        axis.set(title=title)
    figure.axes[0].set_ylabel("success rate, 40 episodes")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def plot_steady(runs, path):
    """Final success per task of `STEADY`, as in plot_manipulation."""
    names = [name for name in STEADY if name in runs and not name.startswith("calibration")]
    groups = {name.removeprefix("steady_"): runs[name] for name in names}
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    draw_dots(axis, groups)
    axis.set(ylabel="success rate, 100 episodes")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def plot_learning(runs, path):
    """Success over the environment steps of fine-tuning, a panel per task of `STEADY`, a colour per seed: of the last
    ten online episodes; dots: of the optimised policy, evaluated before and after; circles: of the clone."""
    names = [name for name in STEADY if name in runs and not name.startswith("calibration")]
    num_rows = math.ceil(len(names) / 3)
    figure = matplotlib.figure.Figure(figsize=(10, 0.6 + 2.4 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, 3, sharey=True, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        for seed, run in runs[name].items():
            online = [row for row in run.rows if row["phase"] == "online"]
            success = np.array([row["train/success"] for row in online])
            recent = [success[max(0, i - 9) : i + 1].mean() for i in range(len(success))]
            axis.plot([row["env_step"] for row in online], recent, color=f"C{seed}", linewidth=1, label=f"seed {seed}")
            evaluated = [(row["env_step"], row["eval/success_rate"]) for row in run.rows if "eval/success_rate" in row]
            before = [point for point in evaluated if point[0] == 0][-1:]
            points = before + [point for point in evaluated if point[0] > 0]
            axis.plot(*zip(*points, strict=True), "o", color=f"C{seed}", markersize=5, alpha=0.7)
            axis.plot(0, run.finals()["bc"]["eval/policy_success_rate"], "o", color=f"C{seed}", fillstyle="none")
        axis.set_title(textwrap.fill(STEADY[name].replace("`", ""), 36, break_on_hyphens=False), fontsize="medium")
        axis.set(ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.remove()
    figure.supxlabel("environment steps of fine-tuning", fontsize="medium")
    figure.supylabel("success rate", fontsize="medium")
    legend = max((axis.get_legend_handles_labels() for axis in axes[: len(names)]), key=lambda found: len(found[1]))
    figure.legend(*legend, loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=120)


def plot_classes(runs, path):
    """Steps to goal of the online episodes, and the raw policy's success before and after, over environment steps."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = np.arange(0, 500, 10)
    for i, (name, (title, colour)) in enumerate(CLASSES.items()):
        curves, points = [], []
        for run in runs[name].values():
            online = [row for row in run.rows if row["phase"] == "online"]
            steps, lengths = ([row[column] for row in online] for column in ("env_step", "train/length"))
            left.plot(steps, lengths, color=colour, alpha=0.25, linewidth=1)
            curves.append(np.interp(grid, steps, lengths))
            finals = [row for phase, row in run.finals().items() if phase != "bc"]
            points.append([(row["env_step"], row["eval/policy_success_rate"]) for row in finals])
            right.plot(*np.add(points[-1], [(8 * i, 0)]).T, color=colour, alpha=0.5, marker="o", linewidth=1)
        left.plot(grid, np.mean(curves, 0), color=colour, linewidth=2, label=f"{title} (mean of {len(curves)} seeds)")
    left.set(xlabel="environment steps of fine-tuning", ylabel="length of the online episodes, steps", ylim=(0, None))
    right.set(
        xlabel="environment steps of fine-tuning (classes shifted a little)",
        ylabel="raw policy: success rate",
        ylim=(-0.03, 1.03),
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def plot_start_value(experiments, path):
    """The critic's value of the evaluation's starts and the discounted return that follows, over updates, for
    experiments {name: {seed: Run}}."""
    figure = matplotlib.figure.Figure(figsize=(4 + 4 * len(experiments), 4), layout="constrained")
    axes = figure.subplots(1, len(experiments), sharey=True, squeeze=False)[0]
    for axis, (name, runs) in zip(axes, experiments.items(), strict=True):
        for seed, run in runs.items():
            noted = np.genfromtxt(HERE / "results" / "start_value" / f"{name}-{seed}.csv", delimiter=",", names=True)
            updates = [row["gradient_step"] for row in run.rows if "eval/success_rate" in row]
            evaluations = [noted[noted["evaluation"] == number] for number in range(len(updates))]
            for column, label, colour in (
                ("value", "critic's value", "tab:blue"),
                ("discounted_return", "return", "tab:orange"),
            ):
                values = np.stack([evaluation[column] for evaluation in evaluations])  # (evaluations, episodes)
                axis.plot(updates, values.mean(1), color=colour, marker=".", linewidth=2, label=f"{label}, seed {seed}")
                axis.fill_between(updates, *np.percentile(values, (10, 90), axis=1), color=colour, alpha=0.15)
        axis.set(xlabel="updates (cloning, then critic)", title=name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("at the start: mean, 10 to 90 % of episodes")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def docs_tables(runs):
    """{file: Markdown}"""
    tables = {}
    for file, (heading, titles) in DOCS.items():
        if known := [name for name in titles if name in runs]:
            parts = [f"# Results: {heading}"]
            parts += ["Written by `python benchmark/report.py`; see README.md in this folder for what, where and when."]
            parts += [f"## {titles[name]}\n\n{docs_table(runs[name])}" for name in known]
            tables[file] = "\n\n".join(parts) + "\n"
    return tables


def write_docs(folder):
    """All tables and plots of docs/results.md, into `folder`."""
    runs = load_results()
    for file, text in docs_tables(runs).items():
        (folder / file).write_text(text)
    titles = {name: title for _, titles in DOCS.values() for name, title in titles.items()}
    for name in {"full", "medium", "large", "antmaze", "openvla"} & set(runs):
        plot(runs[name], titles[name].replace("`", ""), folder / f"{name}.png")
    if set(CLASSES) <= set(runs):
        plot_classes(runs, folder / "classes.png")
    if {"rerank", "gradient"} <= set(runs):
        plot_ablations(runs, folder / "ablations.png")
    if set(MANIPULATION) <= set(runs):
        plot_manipulation(runs, folder / "manipulation.png")
    if set(STEADY) & set(runs):
        plot_steady(runs, folder / "steady.png")
        plot_learning(runs, folder / "steady_online.png")
    names = ("calibration_before", "calibration_after")
    if set(names) <= set(runs):
        plot_start_value({name: runs[name] for name in names}, folder / "calibration.png")
    if "antmaze" in runs:
        plot_start_value({"antmaze": runs["antmaze"]}, folder / "antmaze_start_value.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="of any runs; none: the tables of docs/results.md")
    parser.add_argument("--out", metavar="NAME", help="write NAME.md, NAME.csv and NAME.png as well")
    args = parser.parse_args()
    try:
        if args.runs:
            report(args.runs, args.out)
        else:
            write_docs(HERE)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
