"""A picture of what each policy class samples where demonstrations go left or right: cloned, and after PA-RL.

python benchmark/modes.py      # after benchmark/slalom.txt was run: writes benchmark/modes.png
"""

import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import common  # noqa: E402
import parl_diffusion  # noqa: E402
import parl_gaussian  # noqa: E402
import parl_transformer  # noqa: E402

CLASSES = {
    "gaussian": (parl_gaussian, "GaussianPolicy"),
    "diffusion": (parl_diffusion, "DiffusionPolicy"),
    "flow": (parl_diffusion, "DiffusionPolicy"),
    "tokens": (parl_transformer, "TransformerPolicy"),
    "continuous": (parl_transformer, "TransformerPolicy"),
}
STATE = (1.0, 0.0)  # before the second pillar


def samples(run, module, class_name, num_samples=400):
    """Actions (num_samples, 2) that the policy in runs/`run` draws at STATE."""
    checkpoint = torch.load(HERE.parent / "runs" / run / "checkpoint.pt", weights_only=True)
    policy = getattr(module, class_name)(2, 2, module.Args(**checkpoint["args"])).eval()
    policy.load_state_dict(checkpoint["policy_ema"])
    normalizer = common.Normalizer(2)
    normalizer.load_state_dict(checkpoint["normalizer"])
    torch.manual_seed(0)
    return policy.sample(normalizer(torch.tensor([STATE])), num_samples)[0].numpy()


def main():
    data = np.load(HERE / "slalom.npz")
    near = np.linalg.norm(data["observations"] - STATE, axis=1) < 0.1
    figure = matplotlib.figure.Figure(figsize=(13, 4.8), layout="constrained")
    axes = figure.subplots(2, len(CLASSES), sharex=True, sharey=True)
    for row, (prefix, title) in enumerate({"slalom_cloned_": "cloned", "slalom_": "after PA-RL"}.items()):
        for axis, (name, (module, class_name)) in zip(axes[row], CLASSES.items(), strict=True):
            axis.scatter(*data["actions"][near][:400].T, s=4, color="0.8", label="demonstrations")
            axis.scatter(*samples(f"{prefix}{name}-0", module, class_name).T, s=4, color="tab:blue", label="samples")
            axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal", title=f"{name}, {title}")
    for axis in axes[1]:
        axis.set_xlabel("action, forwards")
    for axis in axes[:, 0]:
        axis.set_ylabel("action, sideways")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(HERE / "modes.png", dpi=120)


if __name__ == "__main__":
    main()
