"""The method drawn exactly: PointMaze's actions have two dimensions, so the critic's Q over all of them is an image.

For one state: Q of the run's critic, the K samples of its policy, the M that re-ranking keeps, their T steps up the
gradient and the chosen action; after offline RL and, beside it, after online fine-tuning of the same run.

    python parl_diffusion.py --online-steps 0 --run-dir runs/figure_offline
    cp -r runs/figure_offline runs/figure_online
    python parl_diffusion.py --resume runs/figure_online --online-steps 500
    python benchmark/figure.py runs/figure_offline runs/figure_online      # writes benchmark/figure.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import envs.pointmaze  # noqa: E402
import parl_diffusion  # noqa: E402

STATE = (0.0, 1.0, 0.5, 0.0)  # x, y, and velocity in x, y: one cell to the right of the goal's, rolling away from it
PAPER = dict(num_samples=32, num_keep=10, num_gradient_steps=10)  # K, M, T; the default run's are 8, 3, 1
MARKS = {  # how each step is drawn
    "samples": dict(marker="o", markersize=6, color="white", markeredgecolor="black", linestyle=""),
    "kept": dict(marker="o", markersize=6.5, color="tab:red", markeredgecolor="white", linestyle=""),
    "paths": dict(color="tab:red", linewidth=2.4),
    "chosen": dict(marker="*", markersize=17, color="gold", markeredgecolor="black", linestyle=""),
}


def load(run):
    """policy, critic, normalizer and args of the run's checkpoint; K, M and T are the paper's."""
    checkpoint = torch.load(Path(run) / "checkpoint.pt", weights_only=True)
    args = parl_diffusion.Args(**checkpoint["args"] | PAPER)
    dims = checkpoint["obs_dim"], checkpoint["act_dim"]
    policy, critic = parl_diffusion.DiffusionPolicy(*dims, args).eval(), parl_diffusion.Critic(*dims, args)
    normalizer = common.Normalizer(checkpoint["obs_dim"])
    for name, module in {"policy_ema": policy, "critic_ema": critic, "normalizer": normalizer}.items():
        module.load_state_dict(checkpoint[name])
    return policy, critic, normalizer, args


def ascent(critic, obs, kept, args):
    """All T + 1 points of the way up from each of kept (1, M, A): (M, T + 1, A). `ascend` returns the best of them."""
    points = [kept]
    for _ in range(args.num_gradient_steps):
        actions = points[-1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(obs, actions)[0].mean(0).sum(), actions)
        points.append((actions + args.action_lr * gradient).clamp(-1, 1).detach())
    return torch.cat(points).transpose(0, 1)


def optimise(run):
    """What action optimisation does at STATE, and Q (201, 201) over the square of actions, as arrays by name."""
    policy, critic, normalizer, args = load(run)
    obs = normalizer(torch.tensor([STATE]))
    torch.manual_seed(0)
    samples = policy.sample(obs, args.num_samples)
    kept = parl_diffusion.rerank(critic, obs, samples, args)
    best, q = parl_diffusion.ascend(critic, obs, kept, args)
    chosen = parl_diffusion.choose(best, q)[0]
    paths = ascent(critic, obs, kept, args)
    assert all((path == end).all(-1).any() for path, end in zip(paths, best[0], strict=True)), "not ascend's points"
    line = torch.linspace(-1, 1, 201)
    square = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)  # (y, x, 2)
    with torch.no_grad():
        values, q_samples, q_kept = (
            critic(obs, actions)[0].mean(0)[0] for actions in (square.reshape(1, -1, 2), samples, kept)
        )
    lengths = paths.diff(dim=1).norm(dim=-1).sum(1)
    print(
        f"{run}: Q {q_samples.mean():.2f} of the samples, {q_kept.mean():.2f} of those kept, {q.mean():.2f} after the "
        f"gradient steps ({lengths.min():.2f} to {lengths.max():.2f} long), {q.max():.2f} of the chosen action"
    )
    arrays = dict(samples=samples[0], kept=kept[0], paths=paths, chosen=chosen, q=values.reshape(201, 201))
    arrays |= dict(q_samples=q_samples.mean(), q_chosen=q.max())
    return {name: array.numpy() for name, array in arrays.items()}


def draw_maze(axis, env_id):
    """The maze from above: the ball, its velocity and the goal."""
    maze = envs.pointmaze.PointMaze(env_id)
    for cell in np.argwhere(maze.walls):
        axis.add_patch(Rectangle(maze.centre(cell) - 0.5, 1, 1, color="0.45", linewidth=0))
    goal, ball = maze.centre(maze.goal_cell), np.array(STATE[:2])
    axis.add_patch(Circle(goal, 0.45, color="tab:green", alpha=0.35, linewidth=0))
    axis.text(*goal, "goal", ha="center", va="center")
    axis.add_patch(Circle(ball, 0.12, color="tab:blue"))
    tip = ball + np.array(STATE[2:]) * 1.4
    axis.add_patch(FancyArrowPatch(ball, tip, arrowstyle="-|>", mutation_scale=15, linewidth=2.5, color="tab:blue"))
    axis.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), aspect="equal", xticks=[], yticks=[])
    axis.set(title="One state: the ball\nrolls away from the goal", xlabel="An action is a force on the ball")


def draw_actions(axis, drawn, levels, title):
    """The square of actions: Q as colour, and on it the steps of action optimisation. Returns the image."""
    line = np.linspace(-1, 1, len(drawn["q"]))
    image = axis.contourf(line, line, drawn["q"], levels)
    axis.contour(line, line, drawn["q"], levels[::4], colors="white", linewidths=0.6, alpha=0.5, linestyles="solid")
    for name in ("samples", "kept"):
        axis.plot(*drawn[name].T, **MARKS[name], clip_on=False)
    for path in drawn["paths"]:
        axis.plot(*path.T, **MARKS["paths"], clip_on=False)
    axis.plot(*drawn["chosen"], **MARKS["chosen"], clip_on=False, zorder=5)
    axis.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    gain = f"samples: mean Q {drawn['q_samples']:.1f}; chosen: Q {drawn['q_chosen']:.1f}"
    axis.set(xlabel=f"force in x\n{gain}", title=title)
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("offline", help="directory of a run that ended with offline RL")
    parser.add_argument("online", help="directory of the same run after online fine-tuning")
    runs = parser.parse_args()
    before, after = optimise(runs.offline), optimise(runs.online)
    values = np.stack([before["q"], after["q"]])
    levels = np.arange(np.floor(values.min()), np.ceil(values.max()) + 0.125, 0.25)

    matplotlib.rcParams.update({"font.size": 11, "axes.titlesize": 12})
    figure = matplotlib.figure.Figure(figsize=(11, 4.35), layout="constrained")
    axes = figure.subplot_mosaic("mba;lba", width_ratios=(0.72, 1, 1), height_ratios=(1.7, 1))
    draw_maze(axes["m"], load(runs.offline)[-1].env_id)
    draw_actions(axes["b"], before, levels, "After offline RL: a trained critic,\nthe policy still a clone")
    image = draw_actions(axes["a"], after, levels, "After online fine-tuning: the policy\nhas imitated chosen actions")
    axes["b"].set_ylabel("force in y", labelpad=-6)
    figure.colorbar(image, ax=axes["a"], label="Q: -1 per step until the goal", ticks=levels[::4], pad=0.03, shrink=0.9)
    steps = {
        "samples": f"1  sample K = {PAPER['num_samples']} from the policy",
        "kept": f"2  re-rank: keep the M = {PAPER['num_keep']} best",
        "paths": f"3  ascend: T = {PAPER['num_gradient_steps']} gradient steps",
        "chosen": "4  choose the best, and act",
    }
    axes["l"].axis("off")
    handles = [Line2D([], [], **MARKS[name], label=text) for name, text in steps.items()]
    axes["l"].legend(handles=handles, loc="center", frameon=False, labelspacing=0.9, handletextpad=0.6)
    figure.savefig(HERE / "figure.png", dpi=140)


if __name__ == "__main__":
    main()
