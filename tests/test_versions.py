"""What else people have: another Python, another project's packages."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT
from packaging.markers import Marker

REQUIREMENT = re.compile(r"([\w-]+)(?:\[\w+\])?==(\d[\w.]*)(?:; (.+))?")

# Learns a little with the script argv[1] of this folder. Of what is installed, only torch, numpy, gymnasium and what
# these require can be imported.
BARE = """
import importlib.metadata, re, sys

def normal(name):
    return re.sub("[-_.]+", "-", name).lower()

def add_required(name, found):
    try:
        requirements = importlib.metadata.requires(name) or ()
    except importlib.metadata.PackageNotFoundError:
        return  # of another platform
    found.add(normal(name))
    for text in requirements:
        needed = re.match("[A-Za-z0-9._-]+", text)[0]
        if "extra ==" not in text and normal(needed) not in found:
            add_required(needed, found)

found = set()
for name in ("torch", "numpy", "gymnasium"):
    add_required(name, found)
owners = importlib.metadata.packages_distributions()
missing = {module for module, names in owners.items() if not found & set(map(normal, names))}

finders = list(sys.meta_path)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in missing:
            return next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)

sys.meta_path[:] = [Finder()]
import gymnasium as gym
import numpy as np
import torch

try:
    import tqdm
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("nothing is missing")

import common
script = importlib.import_module(sys.argv[1])
folders = {module.__file__.rpartition("/")[0] for module in (common, script)}
assert len(folders) == 1 and not folders & {path for path in sys.path if path}, folders

class Line(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,))
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.standard_normal(3, np.float32), {}
    def step(self, action):
        return self.np_random.standard_normal(3, np.float32), 0.0, False, False, {"success": False}

args = script.Args(hidden_dims=(8, 8), num_bins=8, num_samples=4, num_keep=2, num_gradient_steps=1, batch_size=4,
                   q_min=-1.0, q_max=1.0, width=8)
env = gym.wrappers.TimeLimit(Line(), 10)
random = np.random.default_rng(0)
(episode,) = common.run_episodes([env], lambda obs, keys: random.uniform(-1, 1, (len(obs), 2)), [0])
data = common.ReplayBuffer(3, 2)
data.add_episode(*(episode[key] for key in ("observations", "actions", "rewards", "masks", "rewards")))
agent = script.Agent(data, 3, 2, args, torch.device("cpu"), random)
agent.clone(1e-3)
agent.improve_critic(0, 4)
agent.distill(4, 1e-3)
assert common.evaluate([env], agent.act, 2, "") == {"success_rate": 0.0, "length": 10.0, "return": 0.0}
"""


@pytest.mark.parametrize("script", ["parl_gaussian", "parl_diffusion", "parl_transformer"])
def test_a_copied_script_needs_torch_numpy_and_gymnasium_alone(script, tmp_path):
    for name in (script, "common"):
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    command = [sys.executable, "-c", BARE, script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def requirements():
    """{package: (version, marker or None)} of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    matches = {line: REQUIREMENT.fullmatch(line) for line in lines}
    assert all(matches.values()), f"not pinned: {[line for line, match in matches.items() if not match]}"
    return {match[1]: match.groups()[1:] for match in matches.values()}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_requirements_are_pinned_and_whole_on_every_python(python):
    """D4RL installs on 3.11 alone, dm_control and with it OGBench up to 3.12; whatever else is everywhere."""
    absent = {
        name
        for name, (_, marker) in requirements().items()
        if marker and not Marker(marker).evaluate({"python_version": python})
    }
    assert absent == {"3.11": set(), "3.12": {"d4rl"}, "3.13": {"d4rl", "dm_control", "ogbench"}}[python]


def test_what_requirements_leave_out_is_in_the_documented_line():
    text = (ROOT / "docs" / "environments.md").read_text()
    (line,) = re.findall(r"^pip install --no-deps (.+)$", text, re.M)
    documented = dict(re.fullmatch(r"([\w-]+)==(\S+)", word).groups() for word in line.split())
    left_out = {name: version for name, (version, marker) in requirements().items() if marker}
    assert left_out.items() <= documented.items()
