"""What a million transitions cost to load and to sample, and what Meta-World's camera and experts give.

python benchmark/scale.py load       # a random file in D4RL's layout: seconds to load, milliseconds for 256 transitions
python benchmark/scale.py camera     # frames/s of metaworld-drawer-close, physics and image
python benchmark/scale.py experts    # share of successful demonstrations in each of the 50 tasks (8 minutes)
"""

import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import envs

torch.set_num_threads(1)


def load(num_transitions=1_000_000):
    rng, rows = np.random.default_rng(0), np.arange(num_transitions)
    with tempfile.TemporaryDirectory() as folder:
        with h5py.File(Path(folder) / "antmaze.hdf5", "w") as file:
            file["observations"] = rng.standard_normal((num_transitions, 29), np.float32)
            file["actions"] = rng.uniform(-1, 1, (num_transitions, 8)).astype(np.float32)
            file["rewards"] = (rows % 1000 == 700).astype(np.float32)
            file["terminals"], file["timeouts"] = np.zeros(num_transitions, bool), rows % 1000 == 999
        start = time.perf_counter()
        buffer = envs.load_dataset("antmaze-large-diverse-v2", Path(folder) / "antmaze.hdf5", 1.0, -1.0, 0.99, True)
        print(f"{len(buffer)} transitions loaded in {time.perf_counter() - start:.1f} s, environment included")
    generator = np.random.default_rng(0)
    times = []
    for _ in range(1000):
        start = time.perf_counter()
        buffer.sample(256, generator)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"256 of them sampled in {1e3 * np.median(times):.2f} ms (median of 1000); peak memory {peak:.1f} GiB")


def camera(num_steps=200):
    for size in (64, 224):
        env = envs.make("metaworld-drawer-close", image_size=size)
        action, start = env.action_space.sample(), None
        env.reset(seed=0)
        for steps in range(-20, num_steps):
            start = time.perf_counter() if steps == 0 else start
            if any(env.step(action)[2:4]):
                env.reset()
        print(f"{size} x {size}: {num_steps / (time.perf_counter() - start):.0f} frames/s")


def experts(num_episodes=60):
    family, shares = envs.family_module("metaworld-drawer-open"), {}
    for env_id in family.IDS:
        successes = [e["success"] for e in itertools.islice(family.demonstrations(env_id), num_episodes)]
        shares[env_id] = np.mean(successes[10:])  # the noise has found its level
        print(f"{env_id} {100 * shares[env_id]:.0f} %", flush=True)
    print(f"mean {100 * np.mean(list(shares.values())):.0f} %, from {min(shares.values())} to {max(shares.values())}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("load", "camera", "experts"):
        sys.exit(__doc__)
    {"load": load, "camera": camera, "experts": experts}[sys.argv[1]]()
