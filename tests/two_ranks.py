"""What two processes share: samples at states, and one step of LoRA. `python two_ranks.py FOLDER`, once per rank."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import parl_openvla as parl


def work():
    """-> the samples that a store draws at five states, LoRA's gradients of a batch of four, the policy after it."""
    torch.set_num_threads(1)
    args = parl.Args(num_samples=3, lora_rank=2)
    rank, num_ranks = parl.ranks()
    torch.manual_seed(0)
    policy = parl.OpenVLAPolicy(4, args)
    policy.add_lora(2, 4.0)
    for parameter in policy.parameters():  # while B is 0, the gradient of A is
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 64, 64, 3), np.uint8)

    def observe(rows):
        return {"image": images[rows.numpy()], "instruction": ["push"] * len(rows)}

    store = parl.SampleStore(4, args)
    store.grow(5)
    samples = store.at(policy, torch.tensor([4, 2, 0, 1, 3, 2]), observe)
    mine, actions = torch.arange(4)[rank::num_ranks], torch.from_numpy(rng.uniform(-1, 1, (4, 4)))
    optimizer = torch.optim.SGD([parameter for parameter in policy.parameters() if parameter.requires_grad])
    parl.update_policy(policy, policy, optimizer, observe(mine), actions[mine], 1e-2, args)
    gradients = {name: value.grad for name, value in policy.named_parameters() if value.requires_grad}
    return {"samples": samples, "gradients": gradients, "policy": policy.state_dict()}


if __name__ == "__main__":
    parl.join_ranks(parl.Args(run_dir=sys.argv[1], device="cpu"))
    torch.save(work(), Path(sys.argv[1], f"rank-{parl.ranks()[0]}.pt"))
