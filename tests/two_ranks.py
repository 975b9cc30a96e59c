"""What two processes do together: samples at states, a step of LoRA. `python two_ranks.py FOLDER`, once per rank."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import parl_openvla as parl

ARGS = parl.Args(num_samples=3, lora_rank=2)


def make_policy(seed):
    """Of the same frozen weights, as from a file, and LoRA's own by the seed."""
    torch.manual_seed(0)
    policy = parl.OpenVLAPolicy(4, ARGS)
    policy.add_lora(2, 4.0)
    torch.manual_seed(seed)
    for parameter in parl.trained(policy):  # while B is 0, the gradient of A is
        torch.nn.init.normal_(parameter, std=0.1)
    return policy


def work():
    """-> the samples that a store draws at five states, LoRA's gradients of a batch of four, the policy after it."""
    torch.set_num_threads(1)
    policy, rng = make_policy(seed=1), np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 64, 64, 3), np.uint8)

    def observe(rows):
        return {"image": images[rows.numpy()], "instruction": [f"push {row}" for row in rows.tolist()]}

    store = parl.SampleStore(4, ARGS)
    store.grow(5)
    rows, actions = torch.arange(4), torch.from_numpy(rng.uniform(-1, 1, (4, 4)))
    optimizer = torch.optim.SGD(parl.trained(policy))
    loss = parl.update_policy(policy, policy, optimizer, observe(rows), actions, 1e-2, ARGS)
    gradients = {name: value.grad for name, value in policy.named_parameters() if value.requires_grad}
    samples = store.at(policy, torch.tensor([4, 2, 0, 1, 3, 2]), observe)  # by the policy after its step
    return {"samples": samples, "loss": loss, "gradients": gradients, "policy": policy.state_dict()}


if __name__ == "__main__":
    parl.join_ranks(parl.Args(run_dir=sys.argv[1], device="cpu"))
    if parl.ranks()[0] == 0:
        parl.announce(("load", 4))
        torch.save(work(), Path(sys.argv[1], "rank-0.pt"))
        parl.dismiss_ranks()
    else:  # other weights of LoRA, for which it is given rank 0's
        parl.load_policy = lambda *_: make_policy(seed=2)
        parl.serve(ARGS, torch.device("cpu"))
