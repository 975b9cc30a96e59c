import ctypes.util
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel import ROOT

import common

SCRIPTS = sorted(path.stem for path in ROOT.glob("parl_*.py"))
POLICIES = {
    "parl_gaussian": "GaussianPolicy",
    "parl_diffusion": "DiffusionPolicy",
    "parl_transformer": "TransformerPolicy",
    "parl_openvla": "OpenVLAPolicy",
}

torch.set_num_threads(1)
if ctypes.util.find_library("EGL"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # what envs.make(render=True) does, before any test imports MuJoCo


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Embedded datasets are made once per test session, away from the user's cache."""
    os.environ["PARL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["WANDB_SILENT"] = "true"


@pytest.fixture
def golden():
    """golden("1_hl_gauss") -> dict of arrays computed with the released implementation."""
    return lambda name: dict(np.load(ROOT / "tests" / "golden" / f"{name}.npz"))


# The smallest run that goes through all three phases
SMALL = [
    *("--bc-steps", "20", "--offline-steps", "20", "--online-steps", "60", "--batch-size", "16"),
    *("--num-eval-episodes", "2", "--eval-every", "10", "--log-every", "5"),
    *("--hidden-dims", "16", "16", "--num-bins", "16", "--width", "16"),
]


def run_script(script, *flags, cwd=ROOT, check=True, env=None, timeout=300):
    """Run `python script.py flags` to its end; returns the CompletedProcess with its text."""
    command = [sys.executable, str(Path(cwd) / f"{script}.py"), *map(str, flags)]
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}
    )
    if check and result.returncode != 0:
        raise AssertionError(f"{' '.join(command)} exited {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def run_here(script, *flags):
    """`python script.py flags` in this process, which spares the imports. An error is SystemExit with its text."""
    module, argv = importlib.import_module(script), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, flags)]
    try:
        common.main(module.train, module.Args, module.PRESETS, module.__doc__)
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def snippet(marker):
    """The Python code that contains `marker` and that users are shown: in README.md, else in a page of docs/."""
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        blocks = [block.split("```")[0] for block in page.read_text().split("```python\n")[1:]]
        if found := [block for block in blocks if marker in block]:
            (code,) = found
            return code
    raise AssertionError(f"no Python block in README.md or docs/ contains {marker}")
