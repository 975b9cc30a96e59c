"""How fast OpenVLA draws actions, with its prefix shared by an image's samples and with one prefix per sample, and how
fast LoRA trains. Random weights: OpenVLA-7B in bfloat16 on a GPU, a mid-size model in float32 on a CPU.

python benchmark/openvla_speed.py --device cuda
python benchmark/openvla_speed.py --device cpu
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import parl_openvla as openvla

MID_SIZE = openvla.Sizes(  # as many patches as OpenVLA-7B, its layers narrower and fewer
    dino=openvla.VisionSizes(128, 3, 4, 512, num_registers=4), siglip=openvla.VisionSizes(192, 3, 4, 768),
    hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1024,
    vocab_size=576, space_token=32,
)  # fmt: skip
CEILINGS = {"shared": {8: 170, 32: 120}, "expanded": {8: 23, 32: 5.9}}  # images/s of an H200's arithmetic, by K
LORA_CEILING = 93.8  # images/s, without computing blocks again (--gradient-checkpointing), which is measured here


class Words:
    """Stands in for Llama's tokenizer, so that the prompt has its length: 20 tokens with BOS and the last."""

    ids = tuple(range(300, 318))

    def encode(self, text, add_special_tokens):
        return self


def build(device):
    """A policy of seven action dimensions with random weights."""
    on_gpu = device.type == "cuda"
    args = openvla.Args(images_per_forward=16 if on_gpu else 1, gradient_checkpointing=on_gpu)
    with torch.device("meta"):
        policy = openvla.OpenVLAPolicy(7, args, openvla.OPENVLA_7B if on_gpu else MID_SIZE, None, Words())
    policy = policy.to(torch.bfloat16 if on_gpu else torch.float32).to_empty(device=device)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    return policy


def seconds(function, device, repeats):
    """Of one call: the median of `repeats`, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def observations(num_images, rng):
    images = rng.integers(0, 256, (num_images, 224, 224, 3), np.uint8)
    return {"image": images, "instruction": ["put eggplant in pot"] * num_images}


def peak(device):
    """GPU memory used at most since the last call, as text."""
    if device.type != "cuda":
        return ""
    text = f"  {torch.cuda.max_memory_allocated() / 1e9:6.1f} GB at most"
    torch.cuda.reset_peak_memory_stats()
    return text


def measure_sampling(policy, device, num_images, repeats, rng):
    for num_samples in (8, 32):
        rates = {}
        for name in ("shared", "expanded"):
            images = num_images if name == "shared" else max(1, num_images // 8)  # expanded is slow: fewer will do
            obs, samples = observations(images, rng), num_samples
            if name == "expanded":  # each sample is an image of its own
                obs, samples = {key: np.repeat(value, num_samples, 0) for key, value in obs.items()}, 1
            rates[name] = images / seconds(lambda o=obs, k=samples: policy.sample(o, k), device, repeats)
            share = rates[name] / CEILINGS[name][num_samples]
            ceiling = f"  {share:5.1%} of the ceiling" if device.type == "cuda" else ""
            print(
                f"K {num_samples:2}  {name:8}  {rates[name]:8.2f} images/s  {rates[name] * num_samples:8.1f} samples/s"
                f"{peak(device)}{ceiling}",
                flush=True,
            )
        print(f"K {num_samples:2}  shared / expanded = {rates['shared'] / rates['expanded']:.1f}", flush=True)


def measure_lora(policy, device, batch_sizes, repeats, rng):
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=2e-5)
    for batch_size in batch_sizes:
        obs, actions = observations(batch_size, rng), torch.from_numpy(rng.uniform(-1, 1, (batch_size, 7)))

        def step(obs=obs, actions=actions):
            optimizer.zero_grad()
            policy.loss(obs, actions).backward()
            optimizer.step()

        rate = batch_size / seconds(step, device, repeats)
        ceiling = f"  {rate / LORA_CEILING:5.1%} of the ceiling" if device.type == "cuda" else ""
        print(f"LoRA step, batch {batch_size:2}  {rate:8.2f} images/s{peak(device)}{ceiling}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    on_gpu, rng = device.type == "cuda", np.random.default_rng(0)
    torch.manual_seed(0)
    policy = build(device)
    count = sum(parameter.numel() for parameter in policy.parameters())
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{count / 1e6:.0f}M parameters, {policy.projector.fc1.weight.dtype}, {where}, torch {torch.__version__}")
    measure_sampling(policy, device, 64 if on_gpu else 1, 3, rng)
    policy.add_lora(32, 16.0)
    measure_lora(policy, device, (8, 16, 32) if on_gpu else (2,), 3, rng)
