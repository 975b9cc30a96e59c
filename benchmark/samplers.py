"""How well `parl_diffusion.py` clones, and how fast it samples, by objective, steps, schedule and width.

python benchmark/samplers.py         # 30 minutes: samplers.csv, every seed; samplers.md, .png and samplers_modes.png
python benchmark/samplers.py draw    # samplers.md and samplers.png again, from samplers.csv

A policy is cloned with its task's preset (of the slalom: the flags of slalom.txt) on all data but what it is compared
with, and its running average is sampled, as in a run.

    distance    sliced Wasserstein distance (64 directions, order 1) of its actions, one per state, from fresh data's in
                the same states. Slalom: fresh demonstrations, before each pillar. Drawer: every fifth transition (the
                noise of each is its own); there an action stands for its difference from the scripted expert's
    between     share of its actions that are 4 or more standard deviations of the data's noise away from either side
    spread      standard deviation of its actions around the nearer side, or around the expert's, divided by the data's
    success     of 100 episodes of the policy alone
    ms          CPU time to draw the samples for a critic's batch of the preset, K at each of 2 B states

A flow is cloned once for all numbers of steps, which its loss does not know.
"""

import copy
import csv
import itertools
import statistics
import sys
import time
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import envs  # noqa: E402
import parl_diffusion as parl  # noqa: E402
from benchmark import slalom  # noqa: E402

TASKS = {  # --env-id and flags
    "slalom": ("benchmark.slalom:Slalom-v0", parl.LAPTOP | dict(bc_steps=4000, batch_size=128, policy_ema_rate=0.01)),
    "drawer-open": ("metaworld-drawer-open", parl.PRESETS["metaworld"] | dict(bc_steps=6000, policy_ema_rate=0.01)),
}
STEPS, WIDTHS, SEEDS, NUM_EPISODES = (5, 10, 20), (64, 128), (0, 1, 2), 100
STATE = (1.0, 0.0)  # before the second pillar, as in modes.py
SETTING = ["task", "objective", "schedule", "width", "steps"]
COLUMNS = [*SETTING, "seed", "distance", "between", "spread", "success", "ms"]


def vp_betas(num_steps):
    """Noise variances (T,) of a variance-preserving process (Song et al., 2021) in num_steps, as IDQL has it."""
    t = torch.arange(1, num_steps + 1, dtype=torch.float64)
    return (1 - torch.exp(-0.1 / num_steps - 0.5 * 9.9 * (2 * t - 1) / num_steps**2)).float()


SCHEDULES = {"cosine": parl.cosine_betas, "vp": vp_betas, "": parl.cosine_betas}  # a flow has none


class SlalomData:
    """What to clone, and fresh demonstrations before each of the pillars."""

    def __init__(self):
        data, fresh = slalom.demonstrations(1500), slalom.demonstrations(3000, seed=100_000)
        self.obs, self.actions = data["observations"], data["actions"]
        self.success = data["rewards"].sum() / (data["terminals"] | data["timeouts"]).sum()
        self.fresh = [self.before(fresh, pillar) for pillar in range(len(slalom.PILLARS))]
        self.again = [self.before(data, pillar)[1] for pillar in range(len(slalom.PILLARS))]

    def before(self, data, pillar):
        rows = np.abs(data["observations"][:, 0] - pillar) <= 0.25
        return data["observations"][rows], data["actions"][rows]

    def off(self, obs, actions):
        """How far actions (N, 2) are, sideways, from the nearer of the two ways past the pillar: (N,)."""
        sides = (np.array([[-0.5, 0.5]]) - obs[:, 1:]) / slalom.STRIDE  # (N, 2)
        offsets = actions[:, 1:] - sides
        return np.take_along_axis(offsets, np.abs(offsets).argmin(1)[:, None], 1)[:, 0]

    def compare(self, act):
        """distance, between and spread of act(obs (N, O)) -> (N, A)."""
        actions = [act(obs) for obs, _ in self.fresh]
        offsets = np.concatenate([self.off(obs, a) for (obs, _), a in zip(self.fresh, actions, strict=True)])
        near = np.abs(offsets) < 4 * 0.07
        distances = [sliced_wasserstein(a, fresh) for a, (_, fresh) in zip(actions, self.fresh, strict=True)]
        return {"distance": np.mean(distances), "between": 1 - near.mean(), "spread": offsets[near].std() / 0.07}

    def floor(self):
        return np.mean([sliced_wasserstein(a, fresh) for a, (_, fresh) in zip(self.again, self.fresh, strict=True)])


class DrawerData:
    """What to clone, and every fifth transition, which is kept back, with the expert's actions there."""

    def __init__(self):
        env_id, _ = TASKS["drawer-open"]
        family, buffer = envs.family_module(env_id), envs.load_dataset(env_id)
        obs, actions = buffer.states[buffer.state_rows[: len(buffer)]], buffer.actions[: len(buffer)]
        self.success = (buffer.masks[: len(buffer)] == 0).sum() / (buffer.num_states - len(buffer))  # of its episodes
        expert = family.ENV_POLICY_MAP[f"{family.task_of(env_id)}-v3"]()
        kept_back = np.arange(len(buffer)) % 5 == 4
        self.obs, self.actions = obs[~kept_back], actions[~kept_back]
        self.fresh_obs = obs[kept_back]
        best = np.stack([family.expert_action(expert, row) for row in obs]).clip(-1, 1)
        self.expert = best[kept_back]
        self.noise, self.again = actions[kept_back] - self.expert, (actions - best)[~kept_back]

    def compare(self, act):
        noise = act(self.fresh_obs) - self.expert
        spread = noise.std(0).mean() / self.noise.std(0).mean()
        return {"distance": sliced_wasserstein(noise, self.noise), "spread": float(spread)}

    def floor(self):
        return sliced_wasserstein(self.again, self.noise)


def sliced_wasserstein(one, two, num_directions=64, num_quantiles=1000):
    """Mean over directions of the distance between the distributions of the projections: (N, A), (M, A) -> float."""
    directions = np.random.default_rng(0).standard_normal((one.shape[1], num_directions))
    directions /= np.linalg.norm(directions, axis=0)
    levels = (np.arange(num_quantiles) + 0.5) / num_quantiles
    return float(np.mean(np.abs(np.quantile(one @ directions, levels, 0) - np.quantile(two @ directions, levels, 0))))


def make_policy(task, data, objective, schedule, steps, width, seed):
    """(args, policy) before it is cloned."""
    _, flags = TASKS[task]
    torch.manual_seed(seed)
    args = parl.Args(**flags | dict(objective=objective, diffusion_steps=steps, width=width, seed=seed))
    policy = parl.DiffusionPolicy(data.obs.shape[1], data.actions.shape[1], args)
    set_schedule(policy, schedule, steps)
    return args, policy


def set_schedule(policy, schedule, steps):
    betas = SCHEDULES[schedule](steps)
    policy.num_steps, policy.betas, policy.alphas = steps, betas, 1 - betas
    policy.alpha_bars = torch.cumprod(1 - betas, 0)


def clone(data, normalizer, args, policy):
    """Phase 1 of `parl_diffusion.train`: the running average of the cloned policy."""
    obs, actions = normalizer(torch.from_numpy(data.obs)), torch.from_numpy(data.actions).clamp(-0.99999, 0.99999)
    policy_ema, generator = copy.deepcopy(policy).eval(), np.random.default_rng(args.seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.bc_lr, fused=True)
    for step in range(args.bc_steps):
        rows = torch.from_numpy(generator.integers(len(obs), size=args.batch_size))
        lr = parl.learning_rate(args.bc_lr, step, args.bc_steps, args, cosine=True)
        parl.update_policy(policy, policy_ema, optimizer, obs[rows], actions[rows], lr, args)
    return policy_ema


def measure(data, normalizer, policy, simulators):
    """The columns of one cloned policy that depend on what it has learned."""

    def act(obs, keys=None):
        return policy.sample(normalizer(torch.from_numpy(obs)), 1, keys)[:, 0].numpy()

    torch.manual_seed(0)
    row = data.compare(act)
    seeds = range(common.EVALUATION_SEED, common.EVALUATION_SEED + NUM_EPISODES)
    return row | {"success": np.mean([episode["success"] for episode in common.run_episodes(simulators, act, seeds)])}


def milliseconds(task, data, repeats=10):
    """{(objective, steps, width): median CPU time of sampling}, taking turns."""
    times = {setting: [] for setting in itertools.product(("ddpm", "flow"), STEPS, WIDTHS)}
    for _ in range(repeats):
        for (objective, steps, width), values in times.items():
            args, policy = make_policy(task, data, objective, "", steps, width, 0)
            states = torch.randn(2 * args.batch_size, data.obs.shape[1])
            began = time.process_time()
            policy.eval().sample(states, args.num_samples)
            values.append(1000 * (time.process_time() - began))
    return {setting: statistics.median(values) for setting, values in times.items()}


def plan(task):
    """Per cloning: objective, schedule, width, seed, and the numbers of steps that it serves and samplers.csv lacks.

    vp: seed 0 of the smaller width alone.
    """
    done = {(*setting, row.get("seed")) for setting, rows in read().items() for row in rows}
    for width, seed in itertools.product(WIDTHS, SEEDS):
        clonings = [("flow", "", STEPS), *(("ddpm", "cosine", (steps,)) for steps in STEPS)]
        clonings += [("ddpm", "vp", (steps,)) for steps in STEPS if (width, seed) == (WIDTHS[0], SEEDS[0])]
        for objective, schedule, all_steps in clonings:
            missing = [n for n in all_steps if (task, objective, schedule, str(width), str(n), seed) not in done]
            if missing:
                yield objective, schedule, width, seed, missing


def run():
    """Append a row per task, setting and seed to samplers.csv as they come: stopped, it goes on where it was."""
    torch.set_num_threads(1)
    common.keep_freed_memory()
    for task, make_data in {"slalom": SlalomData, "drawer-open": DrawerData}.items():
        if not (clonings := list(plan(task))):
            continue
        data, (env_id, flags) = make_data(), TASKS[task]
        simulators = [envs.make(env_id, flags.get("sparse_reward", False)) for _ in range(10)]
        normalizer, ms, pictures = common.Normalizer(data.obs.shape[1], data.obs), milliseconds(task, data), {}
        if (task, "data", "", "", "") not in read():
            write({"task": task, "objective": "data", "distance": data.floor(), "spread": 1, "success": data.success})
        for objective, schedule, width, seed, all_steps in clonings:
            args, policy = make_policy(task, data, objective, schedule, all_steps[0], width, seed)
            policy = clone(data, normalizer, args, policy)
            for steps in all_steps:
                set_schedule(policy, schedule, steps)
                row = dict(task=task, objective=objective, schedule=schedule, width=width, steps=steps, seed=seed)
                write(row | {"ms": ms[objective, steps, width]} | measure(data, normalizer, policy, simulators))
                if task == "slalom" and (seed, width) == (0, WIDTHS[0]) and schedule != "vp":
                    pictures[objective, steps] = policy.sample(normalizer(torch.tensor([STATE])), 400)[0]
        if pictures:
            draw_modes(pictures, data)


def write(row):
    """Append a row to samplers.csv."""
    print(row, flush=True)
    path = HERE / "samplers.csv"
    is_new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        numbers = {name: f"{value:.4g}" for name, value in row.items() if name not in (*SETTING, "seed")}
        writer.writerow(row | numbers)


# ======================================== TABLE AND PLOTS ========================================


LINES = {  # objective, schedule, width: how it is drawn
    ("ddpm", "cosine", "64"): ("tab:blue", "-"),
    ("ddpm", "cosine", "128"): ("tab:blue", "--"),
    ("ddpm", "vp", "64"): ("tab:green", "-"),
    ("flow", "", "64"): ("tab:orange", "-"),
    ("flow", "", "128"): ("tab:orange", "--"),
}
HEADER = """\
`python benchmark/samplers.py`, seeds 0 to 2, each in brackets (vp: seed 0); commit 87e01bb with this script; torch
2.13.0+cpu, one thread of a shared AMD EPYC, no GPU, 2026-11-25, 32 minutes of CPU time, stopped twice and gone on with.
The first lines of the script say what the columns are; samplers.csv has every seed. The slalom is cloned in 4000 steps
of 128 transitions, drawer-open in 6000 of 64; "data" are the demonstrations themselves.

"""


def read():
    """{(task, objective, schedule, width, steps): rows of samplers.csv, one per seed}, numbers where they are some."""
    settings = {}
    if not (HERE / "samplers.csv").exists():
        return settings
    with open(HERE / "samplers.csv", newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: float(row[name]) for name in COLUMNS if name not in SETTING and row[name]}
            settings.setdefault(tuple(row[name] for name in SETTING), []).append(numbers)
    return settings


def write_table(settings):
    lines = ["| task | objective | schedule | width | steps | distance | between | spread | success | ms |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    order = [("data", "", ""), *LINES]
    for setting in sorted(settings, key=lambda setting: (list(TASKS).index(setting[0]), order.index(setting[1:4]))):
        rows, cells = settings[setting], []
        for name, form in (("distance", "{:.3f}"), ("between", "{:.1%}"), ("spread", "{:.2f}"), ("success", "{:.0%}")):
            values = [row[name] for row in rows if name in row]
            each = f" ({', '.join(form.format(value) for value in values)})" if len(values) > 1 else ""
            cells.append(form.format(statistics.mean(values)) + each if values else "")
        cells.append(f"{rows[0]['ms']:.1f}" if "ms" in rows[0] else "")
        lines.append(f"| {' | '.join((*setting, *cells))} |")
    (HERE / "samplers.md").write_text(HEADER + "\n".join(lines) + "\n")


def draw_modes(pictures, data):
    """{(objective, steps): actions (400, 2) at STATE} over the demonstrations' there."""
    near = np.linalg.norm(data.obs - STATE, axis=1) < 0.1
    figure = matplotlib.figure.Figure(figsize=(8.5, 6.2), layout="constrained")
    axes = figure.subplots(2, len(STEPS), sharex=True, sharey=True)
    for row, objective in enumerate(("ddpm", "flow")):
        for axis, steps in zip(axes[row], STEPS, strict=True):
            axis.scatter(*data.actions[near][:400].T, s=4, color="0.8", label="demonstrations")
            axis.scatter(*pictures[objective, steps].T, s=4, color="tab:blue", label="samples")
            axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", title=f"{objective}, {steps} steps")
    for axis in axes[1]:
        axis.set_xlabel("action, forwards")
    for axis in axes[:, 0]:
        axis.set_ylabel("action, sideways")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(HERE / "samplers_modes.png", dpi=120)


def draw(settings):
    """Every seed a dot, hollow where the line is dashed, and a line through the means."""
    figure = matplotlib.figure.Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, len(TASKS), sharex=True)
    for column, task in enumerate(TASKS):
        for name, axis in zip(("distance", "success"), axes[:, column], strict=True):
            data = settings[task, "data", "", "", ""][0][name]
            axis.axhline(data, color="0.3", linestyle=":", label="the demonstrations themselves")
            for (objective, schedule, width), (color, style) in LINES.items():
                values = [[row[name] for row in settings[task, objective, schedule, width, str(n)]] for n in STEPS]
                label = f"{objective}{schedule and ' '}{schedule}, width {width}"
                axis.plot(STEPS, [statistics.mean(some) for some in values], style, color=color, label=label)
                points = [(n, value) for n, some in zip(STEPS, values, strict=True) for value in some]
                fill = "none" if style == "--" else "full"
                axis.plot(*zip(*points, strict=True), "o", color=color, fillstyle=fill, markersize=4, alpha=0.6)
            axis.grid(alpha=0.3)
        axes[0, column].set(title=task, ylim=(0, None))
        axes[1, column].set(xlabel="sampling steps", xticks=STEPS, ylim=(0, 1.03))
    axes[0, 0].set_ylabel("distance to fresh data")
    axes[1, 0].set_ylabel("success of the clone")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(HERE / "samplers.png", dpi=120)


if __name__ == "__main__":
    if sys.argv[1:] == []:
        run()
    write_table(read())
    draw(read())
