"""Tables and plots of benchmark/results/*.csv: every seed, mean and standard deviation, final values.

python benchmark/report.py     # writes benchmark/{pointmaze,manipulation,antmaze,openvla}.md and benchmark/*.png
"""

import re
import sys
import textwrap
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import matplotlib.figure
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import read_metrics  # noqa: E402

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
ANTMAZE = {"antmaze": "antmaze-medium-diverse-v2, made data, `parl_diffusion.py`"}
OPENVLA = {
    "openvla": "`python parl_openvla.py`: a tiny OpenVLA closes a drawer (Meta-World) from camera images",
    "openvla_cloned": "the same, cloning alone",
    "openvla_bc2": "cloning alone, twice the steps",
}
CLASSES = {
    "gaussian": ("Gaussian", "tab:green"),
    "full": ("diffusion", "tab:blue"),
    "tokens": ("transformer, tokens", "tab:orange"),
    "continuous": ("transformer, mixture", "tab:red"),
}
QUANTITIES = {
    "optimised: success %": ("eval/success_rate", 100),
    "optimised: steps to goal": ("eval/steps_to_goal", 1),
    "raw policy: success %": ("eval/policy_success_rate", 100),
    "raw policy: steps to goal": ("eval/policy_steps_to_goal", 1),
}
PHASES = {"bc": "cloning", "offline": "offline RL", "online": "online"}


def load():
    """{experiment: {seed: rows of metrics.csv}}"""
    runs = defaultdict(dict)
    for path in sorted((HERE / "results").glob("*.csv")):
        name, seed = re.fullmatch(r"(.+)-(\d+)", path.stem).groups()
        runs[name][int(seed)] = read_metrics(path)
    return runs


def table(seeds):
    """Markdown: one line per phase and quantity, the last evaluation of each phase."""
    lines = [
        "| after | | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | std |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    for phase, title in PHASES.items():
        for quantity, (column, scale) in QUANTITIES.items():
            finals = [
                [row for row in rows if row["phase"] == phase and "eval/policy_success_rate" in row]
                for rows in seeds.values()
            ]
            if not all(finals) or not any(column in final[-1] for final in finals):
                continue
            values = [scale * final[-1].get(column, np.nan) for final in finals]
            cells = " | ".join("-" if np.isnan(value) else f"{value:.3g}" for value in values)
            lines.append(f"| {title} | {quantity} | {cells} | {np.nanmean(values):.3g} | {np.nanstd(values):.2g} |")
    return "\n".join(lines)


def plot(seeds, title, path):
    """Success rate over updates: a thin line per seed, a thick one for the mean, phases marked."""
    figure = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for column, label, colour in (
        ("eval/success_rate", "optimised policy", "tab:blue"),
        ("eval/policy_success_rate", "raw policy", "tab:orange"),
    ):
        curves = []
        for rows in seeds.values():
            points = [(row["gradient_step"], row[column]) for row in rows if column in row]
            curves.append(points)
            axis.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=1)
        if len({len(points) for points in curves}) == 1:
            axis.plot(
                *np.mean(curves, 0).T,
                color=colour,
                marker=".",
                linewidth=2,
                label=f"{label} (mean of {len(curves)} seeds)" if len(curves) > 1 else label,
            )
    for before, row in pairwise([{"phase": "", "gradient_step": 0}, *next(iter(seeds.values()))]):
        if row["phase"] != before["phase"]:
            axis.axvline(before["gradient_step"], color="0.6", linestyle=":")
            axis.annotate(PHASES[row["phase"]], (before["gradient_step"], 1.02), xycoords=("data", "axes fraction"))
    axis.set(ylim=(-0.03, 1.03), xlabel="updates (cloning, then critic)", ylabel="success rate")
    axis.grid(alpha=0.3)
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
                values = [
                    [row[column] for row in rows if row["phase"] == phase and column in row][-1]
                    for rows in runs[name].values()
                ]
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


def plot_manipulation(runs, path):
    """Final success per task and method: cloned, after offline RL, after online fine-tuning, a dot per seed."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    tasks = {"drawer_open": "metaworld-drawer-open", "door_open": "metaworld-door-open", "cube": "cube-single, task 1"}
    methods = {"": "diffusion", "_rerank": "diffusion,\nre-ranking only", "_gaussian": "Gaussian"}
    finals = (
        ("cloned, raw", "bc", "eval/policy_success_rate", "0.4"),
        ("offline RL, optimised", "offline", "eval/success_rate", "tab:green"),
        ("online, optimised", "online", "eval/success_rate", "tab:blue"),
        ("online, raw", "online", "eval/policy_success_rate", "tab:orange"),
    )
    for axis, (task, title) in zip(figure.subplots(1, 3, sharey=True), tasks.items(), strict=True):
        for x, method in enumerate(methods):
            for i, (label, phase, column, colour) in enumerate(finals):
                values = [
                    [row[column] for row in rows if row["phase"] == phase and column in row][-1]
                    for rows in runs[task + method].values()
                ]
                where = x + 0.2 * (i - 1.5) + 0.04 * (np.arange(len(values)) - (len(values) - 1) / 2)
                axis.scatter(where, values, s=20, color=colour, alpha=0.7, label=label if x == 0 else None)
                axis.hlines(np.mean(values), where[0] - 0.04, where[-1] + 0.04, color=colour)
        axis.set(ylim=(-0.03, 1.03), xticks=range(len(methods)), xticklabels=methods.values(), title=title)
        axis.grid(alpha=0.3, axis="y")
    figure.axes[0].set_ylabel("success rate, 40 episodes")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def plot_classes(runs, path):
    """Steps to goal of the online episodes, and the raw policy's success before and after, over environment steps."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = np.arange(0, 500, 10)
    for i, (name, (title, colour)) in enumerate(CLASSES.items()):
        curves, points = [], []
        for rows in runs[name].values():
            online = [row for row in rows if row["phase"] == "online"]
            steps, lengths = ([row[column] for row in online] for column in ("env_step", "train/length"))
            left.plot(steps, lengths, color=colour, alpha=0.25, linewidth=1)
            curves.append(np.interp(grid, steps, lengths))
            evaluated = [row for row in rows if row["phase"] != "bc" and "eval/policy_success_rate" in row]
            before = [row for row in evaluated if row["phase"] == "offline"][-1:]
            points.append([(row["env_step"], row["eval/policy_success_rate"]) for row in [*before, evaluated[-1]]])
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


def plot_start_value(runs, path):
    """The critic's value of the evaluation's starts and the discounted return that follows, over updates."""
    figure = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for seed, rows in runs.items():
        noted = np.genfromtxt(HERE / "results" / "start_value" / f"antmaze-{seed}.csv", delimiter=",", names=True)
        updates = [row["gradient_step"] for row in rows if "eval/success_rate" in row]
        evaluations = [noted[noted["evaluation"] == number] for number in range(len(updates))]
        for column, label, colour in (
            ("value", "critic's value", "tab:blue"),
            ("discounted_return", "return", "tab:orange"),
        ):
            values = np.stack([evaluation[column] for evaluation in evaluations])  # (evaluations, episodes)
            axis.plot(updates, values.mean(1), color=colour, marker=".", linewidth=2, label=f"{label}, seed {seed}")
            axis.fill_between(updates, *np.percentile(values, (10, 90), axis=1), color=colour, alpha=0.15)
    axis.set(xlabel="updates (cloning, then critic)", ylabel="at the start: mean, 10 to 90 % of episodes")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def main():
    runs = load()
    for file, heading, titles in (
        ("pointmaze.md", "PointMaze, slalom", POINTMAZE),
        ("manipulation.md", "Meta-World, OGBench's cube", MANIPULATION),
        ("antmaze.md", "AntMaze from made data", ANTMAZE),
        ("openvla.md", "the tiny OpenVLA", OPENVLA),
    ):
        parts = [f"# Results: {heading}"]
        parts += ["Written by `python benchmark/report.py`; see README.md in this folder for what, where and when."]
        for name, title in titles.items():
            if name in runs:
                parts += [f"## {title}", table(runs[name])]
        if len(parts) > 2:
            (HERE / file).write_text("\n\n".join(parts) + "\n")
        for name in {"full", "medium", "large", "antmaze", "openvla"} & set(titles) & set(runs):
            plot(runs[name], titles[name].replace("`", ""), HERE / f"{name}.png")
    if set(CLASSES) <= set(runs):
        plot_classes(runs, HERE / "classes.png")
    if {"rerank", "gradient"} <= set(runs):
        plot_ablations(runs, HERE / "ablations.png")
    if set(MANIPULATION) <= set(runs):
        plot_manipulation(runs, HERE / "manipulation.png")
    if "antmaze" in runs:
        plot_start_value(runs["antmaze"], HERE / "antmaze_start_value.png")


if __name__ == "__main__":
    main()
