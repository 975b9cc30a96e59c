"""PA-RL in one file: offline RL and online fine-tuning of a policy that is never differentiated through its critic.

Policy-Agnostic RL (Mark et al., 2024, https://arxiv.org/abs/2412.06685) improves any policy that can be sampled and
cloned. A critic is learned with Cal-QL (Nakamoto et al., 2023). Wherever an actor-critic method would want a better
action than the policy's, PA-RL makes one:

    1. sample     K actions from the policy
    2. re-rank    keep the M that the critic values most                              (global optimisation)
    3. ascend     move each kept action T steps up the critic's action gradient       (local optimisation)
    4. choose     the best, for the TD target; a draw from softmax(Q), to learn from; to act either (--act-draw)
    5. distil     the policy's own supervised loss on the chosen action: no gradient passes from critic to policy

in three phases: behaviour cloning, or with --warmup-episodes trials of a released policy as it is; offline RL (the
critic learns, the policy is frozen); online fine-tuning (collect an episode with optimised actions, distil, update the
critic). The algorithm asks two things of a policy: `sample`, `loss`.

    symbol  name                 meaning
    Q       critic               value of an action in a state: the mean of an ensemble of networks
    Q'      target_critic        its running average, which values the TD target
            critic_ema           a slower one, with which PA-RL acts and distils
    K       num_samples          actions drawn from the policy per state
    M       num_keep             of which re-ranking keeps the best
    T       num_gradient_steps   local optimisation steps
    alpha   action_lr            their step size
    E       ensemble_size        critics, a batch dimension
    n       cql_n_actions        uniform actions in the CQL term, and the weight of each policy action there
    gamma   discount             per environment step
    R       targets_per_image    actions distilled per image

NOTE(differs) marks departures. "(released: X)": the authors' code does X. "(as in the released code)": it departs from
the paper in the same way. docs/algorithm.md lists them all.

Shapes: B batch of states, O width of the critic's encoding of an image, A action dimensions, N any number of actions
per state, P positions of the prefix (image and prompt, padded), L any number of positions, W width of a layer, D of an
attention head.

The policy here is OpenVLA-7B (Kim et al., 2024, https://arxiv.org/abs/2406.09246): two vision transformers see the
image, a projector turns their patches into words, and Llama 2 reads them with the instruction and writes one token per
action dimension. The whole model is here in plain PyTorch, under the names of the released checkpoint, so that its
files load as they are; LoRA trains it. Against parl_transformer.py, where images, language and 7B parameters force it:

    Args, PRESETS         the checkpoint, LoRA, the critic's encoder; no observation normaliser
    POLICY                OpenVLA, and the files of a checkpoint and of adapters
    CRITIC                an image encoder before the ensemble; the action enters every layer
    ACTION OPTIMISATION   `act` encodes the image, once per state; samples, slow to draw, are kept in a SampleStore
    LOSSES                `update_critic` shifts and encodes images
    TRAIN                 images in a file, an instruction per episode, warm-up trials, several GPUs with torchrun

    python parl_openvla.py    # a tiny model of the same classes closes a drawer: 71 % cloned, 100 % 20 minutes later
    python parl_openvla.py --checkpoint openvla/openvla-7b --env-id my_robot:Reach-v0 --warmup-episodes 50
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

# Read when torch is loaded: how long its threads wait awake for each other. Its default is slow beside other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint

import common
from common import InputError


@dataclass
class Args(common.RunArgs):
    """The method's flags, beside those of every run (see common.RunArgs); the paper's for OpenVLA where it has them."""

    env_id: str = "metaworld-drawer-close"  # any metaworld-*, or gymnasium id whose observations have an "image"
    instruction: str = ""  # what the policy is told; empty: the environment's, at each reset
    # phases
    warmup_episodes: int = 0  # trials of the policy as it is, in place of a dataset and cloning
    bc_steps: int = 10_000  # gradient steps of behaviour cloning
    offline_steps: int = 10_000  # critic updates of offline RL; 0: none
    online_steps: int | None = None  # environment steps of fine-tuning (the last episode is finished); 0: offline only
    online_episodes: int | None = 100  # episodes, or online_steps if sooner; either given alone drops the other
    batch_size: int = 16  # transitions per update (B)
    # rewards
    discount: float = 0.99  # gamma, per environment step
    reward_scale: float = 1.0  # what is learned from is reward * scale + bias
    reward_bias: float = -1.0  # see --reward-scale
    sparse_reward: bool = True  # success ends the episode and alone pays, 1; --no-sparse-reward: the environment's
    action_chunk = 1  # no flag: OpenVLA's tokens are one action, so a decision covers one environment step here
    # critic
    target_rate: float = 0.005  # share of the critic that enters its target per update
    critic_lr: float = 3e-4  # Adam
    critic_ema_rate: float = 1.0  # share of the critic that enters the average that acts, per update; 1: no averaging
    hidden_dims: tuple[int, ...] = (512, 512, 512)  # widths of the critic's hidden layers
    critic_image_size: int = 100  # pixels, as in the released code
    encoder_widths: tuple[int, ...] = (32, 64, 128, 128)  # channels of the critic's encoder, each at half the size
    encoding_width: int = 256  # of an image (O)
    augment_pixels: int = 4  # the critic's training images are moved by up to so many of its pixels; 0: they are not
    ensemble_size: int = 10  # critics (E)
    critic_subset: int = 2  # members drawn for the TD target's minimum, and again for CQL
    num_bins: int = 0  # bins of the value distribution (HL-Gauss); 0: scalar values, squared error
    q_min: float | None = None  # lowest value; None: min(r, 0) / (1 - discount) over the data
    q_max: float | None = None  # highest value; None: max(r, 0) / (1 - discount) over the data, 0 for sparse rewards
    cql_weight: float = 0.01  # weight of the CQL term, which values actions that are not the data's lower
    cql_n_actions: int = 4  # uniform actions in it, and how often each policy action counts (n)
    # action optimisation
    num_samples: int = 8  # actions drawn from the policy per state (K)
    num_keep: int = 4  # of which the critic keeps the best (M)
    num_gradient_steps: int = 10  # local optimisation steps (T); 0: re-ranking only
    action_lr: float = 3e-4  # their step size (alpha)
    act_draw: bool = False  # act with a draw from softmax(Q), like the one to learn from, instead of the best
    refresh_states: int = 1000  # whose samples are drawn again after an episode's distillation, oldest first
    # online fine-tuning
    policy_utd: int = 1  # distillation steps per environment step ("updates to data")
    critic_utd: int = 1  # critic updates per environment step
    offline_ratio: float = 0.5  # dataset's share of a critic batch (of a distillation batch: by size); 0: of neither
    offline_distill_steps: int = 0  # distillation at the end of offline RL, for a policy that acts without a critic
    distill_argmax: bool = False  # distil the best candidate instead of a draw from softmax(Q)
    # policy
    bc_lr: float = 2e-5  # Adam in behaviour cloning, cosine to 0
    distill_lr: float = 2e-5  # Adam in distillation
    policy_warmup_steps: int = 0  # linear warm-up of either, at most 10 % of the phase
    policy_ema_rate: float = 1.0  # share of the policy that enters its running average per step; 1: no averaging
    checkpoint: str = ""  # a folder, or a name on the Hugging Face hub (openvla/openvla-7b); empty: a tiny new model
    unnorm_key: str = ""  # whose action statistics in the checkpoint to use; needed where it has several
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of a checkpoint's weights; what LoRA adds is float32
    lora_rank: int = 32  # of what is trained beside a checkpoint's weights; 0, or without one: train every weight
    lora_alpha: float = 16.0  # it is scaled by alpha / rank
    gradient_checkpointing: bool = False  # compute each block again in the backward pass: less memory, a third slower
    targets_per_image: int = 1  # actions distilled per image, behind one prefix (R)
    images_per_forward: int = 16  # images sampled from at a time
    sample_temperature: float = 1.0  # of the raw policy in evaluations; 0: the likeliest tokens, as in official ones


# What a family of environments changes, here for the tiny model: common.main starts from --preset, else from the one of
# --env-id, and a flag that is given wins.
PRESETS = {
    "metaworld": dict(
        discount=0.95, num_threads=1, eval_every=500, log_every=50, num_eval_episodes=20,
        bc_steps=1200, offline_steps=1200, online_steps=1500, online_episodes=None, batch_size=32,
        hidden_dims=(128, 128), ensemble_size=2, num_bins=64, critic_lr=1e-3, target_rate=0.05, cql_weight=0.3,
        critic_ema_rate=0.02, act_draw=True,
        critic_image_size=32, encoder_widths=(16, 32, 32), encoding_width=32, augment_pixels=2,
        num_keep=3, num_gradient_steps=3, action_lr=0.02, refresh_states=200, critic_utd=2,
        bc_lr=1e-3, distill_lr=3e-4, policy_warmup_steps=100, policy_ema_rate=0.01,
    ),
}  # fmt: skip


# ======================================== POLICY ========================================


@dataclass(frozen=True)
class VisionSizes:
    """A vision transformer. Its `num_blocks` are one fewer than the checkpoint's: the last block is not used."""

    width: int
    num_blocks: int
    num_heads: int
    mlp_width: int
    num_registers: int = 0  # DINOv2: a CLS token and registers before the patches, LayerScale; 0: SigLIP, neither


@dataclass(frozen=True)
class Sizes:
    """The defaults are OpenVLA-7B's. Those of its language model are LlamaConfig's: config.json leaves them out."""

    dino: VisionSizes = VisionSizes(1024, 23, 16, 4096, num_registers=4)
    siglip: VisionSizes = VisionSizes(1152, 26, 16, 4304)
    image_size: int = 224  # pixels
    patch_size: int = 14
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int = 11008
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    vocab_size: int = 32064
    pad_to_multiple_of: int = 64  # so many rows at the end of the vocabulary are padding; the actions come before them
    space_token: int = 29871  # the prompt ends with it


OPENVLA_7B = Sizes()
TINY = Sizes(  # tokens are bytes, then 256 actions, then padding
    dino=VisionSizes(48, 2, 4, 192, num_registers=4), siglip=VisionSizes(48, 2, 4, 192),
    image_size=64, patch_size=16, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=176,
    vocab_size=576, space_token=32,
)  # fmt: skip

PROMPT = "In: What action should the robot take to {}?\nOut:"
BOS, EOS, ACTION_BINS = 1, 2, 256
EDGES = np.linspace(-1, 1, ACTION_BINS)  # of the intervals that action tokens stand for
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # SigLIP: 0.5 and 0.5


def draw(probs, uniform):
    """Draws from probs (R, bins), N per row: uniform (R, N) in [0, 1] -> the first indices (R, N) at which the sum of
    probabilities reaches it. The sum ends a rounding error beside 1, so it is the sum that uniform is a share of."""
    sums = probs.cumsum(-1)
    return torch.searchsorted(sums, uniform * sums[:, -1:])


class Linear(nn.Linear):
    """W x + b and, once `add_lora` was called, (alpha / r) B A x of rank r (LoRA; Hu et al., 2021)."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__(inputs, outputs, bias)
        self.lora_a = self.lora_b = None

    def add_lora(self, rank, alpha):
        """A (r, inputs) is normal with standard deviation 1 / r, B (outputs, r) is 0: nothing changes yet."""
        self.lora_scale = alpha / rank
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features, device=self.weight.device) / rank)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))

    def forward(self, x):
        y = super().forward(x)
        if self.lora_a is None:
            return y
        low = F.linear(x, self.lora_a.to(x.dtype))  # (..., r)
        return y + self.lora_scale * F.linear(low, self.lora_b.to(x.dtype))


def run_block(block, *inputs, checkpointing):
    """block(*inputs); with checkpointing, its inputs alone are kept for the gradient."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class VisionBlock(nn.Module):
    """A pre-LayerNorm transformer block (ViT; Dosovitskiy et al., 2021), with LayerScale in DINOv2."""

    def __init__(self, sizes):
        super().__init__()
        width, self.num_heads = sizes.width, sizes.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": Linear(width, 3 * width), "proj": Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": Linear(width, sizes.mlp_width), "fc2": Linear(sizes.mlp_width, width)})
        if sizes.num_registers:
            self.ls1 = nn.ParameterDict({"scale_factor": torch.ones(width)})
            self.ls2 = nn.ParameterDict({"scale_factor": torch.ones(width)})

    def forward(self, h):  # (B, L, W) -> (B, L, W)
        qkv = self.attn["qkv"](self.norm1(h)).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, heads, D)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # (B, heads, L, D)
        mixed = self.attn["proj"](mixed.transpose(1, 2).flatten(2))  # (B, L, W)
        h = h + (mixed * self.ls1["scale_factor"] if hasattr(self, "ls1") else mixed)
        mixed = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(h))))
        return h + (mixed * self.ls2["scale_factor"] if hasattr(self, "ls2") else mixed)


class VisionTransformer(nn.Module):
    """DINOv2 with registers (Oquab et al., 2023; Darcet et al., 2023) or SigLIP (Zhai et al., 2023), up to the block
    before the last, without the final norm: pixels (B, 3, size, size) -> patches (B, patches, W)."""

    def __init__(self, sizes, image_size, patch_size, checkpointing):
        super().__init__()
        self.checkpointing, self.num_skipped = checkpointing, 0
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, sizes.width, patch_size, patch_size)})
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image_size // patch_size) ** 2, sizes.width))
        if sizes.num_registers:
            self.num_skipped = 1 + sizes.num_registers
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, sizes.width))
            self.reg_token = nn.Parameter(0.02 * torch.randn(1, sizes.num_registers, sizes.width))
        self.blocks = nn.ModuleList(VisionBlock(sizes) for _ in range(sizes.num_blocks))

    def forward(self, pixels):
        h = self.patch_embed["proj"](pixels).flatten(2).mT + self.pos_embed  # (B, patches, W)
        if self.num_skipped:  # CLS and registers have no position
            h = torch.cat([x.expand(len(h), -1, -1) for x in (self.cls_token, self.reg_token)] + [h], 1)
        for block in self.blocks:
            h = run_block(block, h, checkpointing=self.checkpointing)
        return h[:, self.num_skipped :]


class Projector(nn.Module):
    """The patches of both vision transformers, side by side, as words: (B, patches, inputs) -> (B, patches, W)."""

    def __init__(self, inputs, width):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = Linear(inputs, 4 * inputs), Linear(4 * inputs, width), Linear(width, width)

    def forward(self, patches):
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(patches)))))


def rotation(positions, head_width, theta):
    """Rotary embedding (Su et al., 2021): positions (B, L) -> cos, sin, each (B, 1, L, D), of the angles by which the
    halves of queries and keys turn into each other."""
    frequencies = theta ** -(torch.arange(0, head_width, 2, device=positions.device).float() / head_width)  # (D / 2,)
    angles = (positions[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)  # (B, 1, L, D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):  # (B, heads, L, D) -> (B, heads, L, D)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class LlamaLayer(nn.Module):
    """Llama's block (Touvron et al., 2023): rotary self-attention, then a gated MLP, each behind an RMSNorm."""

    def __init__(self, sizes):
        super().__init__()
        width, inner, self.num_heads = sizes.hidden_size, sizes.intermediate_size, sizes.num_attention_heads
        names = [f"{letter}_proj" for letter in "qkvo"]
        self.self_attn = nn.ModuleDict({name: Linear(width, width, bias=False) for name in names})
        self.mlp = nn.ModuleDict({name: Linear(width, inner, bias=False) for name in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = Linear(inner, width, bias=False)
        self.input_layernorm = nn.RMSNorm(width, eps=sizes.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=sizes.rms_norm_eps)

    def forward(self, h, cos, sin, mask=None, cache=None, start=0):
        """h (B, L, W), the positions from `start` -> h (B, L, W).

        Each sees what mask (B, 1, L, start + L) allows, or without one itself and what is before it. cache (2, B,
        heads, >= start + L, D): keys and values of what is before `start`, to which those of h are added in place.
        """
        x = self.input_layernorm(h)
        q, k, v = (
            self.self_attn[f"{name}_proj"](x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for name in "qkv"
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, heads, L, D)
        if cache is not None:
            stop = start + h.shape[1]
            cache[0, :, :, start:stop], cache[1, :, :, start:stop] = k, v
            k, v = cache[:, :, :, :stop]
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)  # (B, heads, L, D)
        h = h + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(h)
        return h + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))


def suffix_mask(lengths, prefix_length, num_suffixes, num_steps):
    """What R suffixes of T steps behind one prefix see: all of the prefix but its padding, and of their own suffix
    themselves and what is before. Suffixes lie step by step: step t of suffix r is position P + t R + r.

    lengths (B,), of the prefix without padding -> (B, 1, T R, P + T R), True where seen.
    """
    positions = torch.arange(num_steps * num_suffixes, device=lengths.device)
    step, suffix = positions // num_suffixes, positions % num_suffixes
    own = (suffix[:, None] == suffix) & (step[:, None] >= step)  # (T R, T R)
    prefix = torch.arange(prefix_length, device=lengths.device) < lengths[:, None]  # (B, P)
    prefix = prefix[:, None, None].expand(-1, 1, len(positions), -1)
    return torch.cat([prefix, own.expand(len(lengths), 1, -1, -1)], -1)


class OpenVLAPolicy(nn.Module):
    """OpenVLA. An observation is {"image": uint8 (B, height, width, 3), "instruction": B strings}.

    Actions are in [-1, 1], the units of the tokens; `unnormalize` turns them into the environment's.
    act_dim: A. sizes: the model's. statistics: {"q01": (A,), "q99": (A,), "mask": (A,)} of the environment's actions,
    None where they are in [-1, 1] already. tokenizer: of the `tokenizers` package; None: a token is a byte.
    """

    # must be a checkpoint's own: its weights mean nothing with others
    fixed_flags = ("checkpoint", "unnorm_key", "dtype", "lora_rank", "lora_alpha")

    def __init__(self, act_dim, args, sizes=TINY, statistics=None, tokenizer=None):
        super().__init__()
        self.act_dim, self.sizes, self.tokenizer = act_dim, sizes, tokenizer
        self.statistics = statistics or {"q01": [-1] * act_dim, "q99": [1] * act_dim, "mask": [False] * act_dim}
        self.checkpointing, self.images_per_forward = args.gradient_checkpointing, args.images_per_forward
        self.last_action = sizes.vocab_size - sizes.pad_to_multiple_of  # action tokens are the 256 before this one
        width, image = sizes.hidden_size, (sizes.image_size, sizes.patch_size, args.gradient_checkpointing)
        dino, siglip = VisionTransformer(sizes.dino, *image), VisionTransformer(sizes.siglip, *image)
        self.vision_backbone = nn.ModuleDict({"featurizer": dino, "fused_featurizer": siglip})
        self.projector = Projector(sizes.dino.width + sizes.siglip.width, width)
        model = {
            "embed_tokens": nn.Embedding(sizes.vocab_size, width),
            "layers": nn.ModuleList(LlamaLayer(sizes) for _ in range(sizes.num_hidden_layers)),
            "norm": nn.RMSNorm(width, eps=sizes.rms_norm_eps),
        }
        nn.init.normal_(model["embed_tokens"].weight, std=0.02)
        head = nn.Linear(width, sizes.vocab_size, bias=False)
        self.language_model = nn.ModuleDict({"model": nn.ModuleDict(model), "lm_head": head})

    @property
    def device(self):
        return self.projector.fc1.weight.device

    def add_lora(self, rank, alpha):
        """Freeze every weight and train LoRA on the linear layers: of vision, projector and Llama, not its head."""
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Linear):
                module.add_lora(rank, alpha)

    def frozen(self):
        return {name: value for name, value in self.named_parameters() if not value.requires_grad}

    def state_dict(self):
        """What is trained: with LoRA that alone, the frozen weights being in the checkpoint's own files."""
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    def load_state_dict(self, state, **options):
        return super().load_state_dict({**self.frozen(), **state}, **options)

    def pixels(self, images):
        """images (B, height, width, 3) uint8 -> (B, 6, size, size) as both vision transformers were trained on.

        PIL's bicubic filter straight to the square size is the official processor's; torch's differs.
        """
        size, images = self.sizes.image_size, torch.as_tensor(images)
        if images.shape[1:3] != (size, size):
            resized = (Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC) for x in images.cpu().numpy())
            images = torch.from_numpy(np.stack([np.asarray(x) for x in resized]))
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 255  # (B, 3, size, size)
        mean, std = (torch.tensor(value, device=x.device)[:, None, None] for value in (DINO_MEAN, DINO_STD))
        return torch.cat([(x - mean) / std, (x - 0.5) / 0.5], 1).to(self.projector.fc1.weight.dtype)

    def prompt(self, instruction):
        """The prompt's tokens, a list. Raises InputError where they and an action do not fit the model."""
        text = PROMPT.format(instruction.lower())
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids if self.tokenizer else list(text.encode())
        ids = [BOS, *ids, self.sizes.space_token]
        num_patches = (self.sizes.image_size // self.sizes.patch_size) ** 2
        limit = self.sizes.max_position_embeddings - num_patches - self.act_dim
        if len(ids) > limit:
            raise InputError(
                f"--instruction {instruction[:30]!r}...: the prompt has {len(ids)} tokens; expected up to {limit}"
            )
        return ids

    def prefix(self, obs):
        """BOS, the image's patches, the rest of the prompt, padding to the batch's longest: observations ->
        embeddings (B, P, W), lengths (B,) without the padding."""
        prompts = [self.prompt(instruction) for instruction in obs["instruction"]]
        lengths = torch.tensor([len(ids) for ids in prompts], device=self.device)
        ids = torch.full((len(prompts), max(map(len, prompts))), self.last_action)  # the first padding row
        for row, tokens in zip(ids, prompts, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        pixels, vision = self.pixels(obs["image"]), self.vision_backbone
        patches = [vision["featurizer"](pixels[:, :3]), vision["fused_featurizer"](pixels[:, 3:])]
        patches = self.projector(torch.cat(patches, -1))  # (B, patches, W)
        words = self.language_model["model"]["embed_tokens"](ids.to(self.device))
        return torch.cat([words[:, :1], patches, words[:, 1:]], 1), lengths + patches.shape[1]

    def read(self, h, positions, mask=None, caches=None, start=0):
        """Llama's layers: h (B, L, W), positions (B or 1, L) -> h (B, L, W). See LlamaLayer."""
        head_width = self.sizes.hidden_size // self.sizes.num_attention_heads
        turn = [x.to(h.dtype) for x in rotation(positions, head_width, self.sizes.rope_theta)]
        for i, layer in enumerate(self.language_model["model"]["layers"]):
            cache = caches[i] if caches else None
            h = run_block(layer, h, *turn, mask, cache, start, checkpointing=self.checkpointing)
        return h

    @torch.no_grad()
    def sample(self, obs, num_samples, seeds=None, temperature=1.0):
        """Observations -> actions (B, K, A). With `seeds`, B tuples of integers, row i's noise comes from seeds[i].

        temperature: of each token's distribution; 0 takes its likeliest.
        """
        shape = (len(obs["instruction"]), num_samples, self.act_dim)
        uniform = torch.special.ndtr(common.seeded_normal(shape, seeds, self.device))
        tokens = []
        for start in range(0, len(uniform), self.images_per_forward):
            rows = slice(start, start + self.images_per_forward)
            some = {name: value[rows] for name, value in obs.items()}
            tokens.append(self.sample_tokens(some, uniform[rows], temperature))
        return self.detokenize(torch.cat(tokens))

    def sample_tokens(self, obs, uniform, temperature=1.0):
        """One dimension after the other; uniform (B, K, A) in [0, 1] decides -> tokens (B, K, A).

        The image and the prompt are read once: the K samples are K queries against the prefix's one set of keys and
        values, and each against its own few.
        NOTE(differs): OpenVLA draws among the 256 action tokens (released: among all tokens).
        """
        (B, K, A), sizes = uniform.shape, self.sizes
        first, model = self.last_action - ACTION_BINS, self.language_model["model"]
        action_rows = self.language_model["lm_head"].weight[first : self.last_action]  # (256, W)
        h, lengths = self.prefix(obs)
        P, head_width = h.shape[1], sizes.hidden_size // sizes.num_attention_heads
        cache_shape = (2, B, sizes.num_attention_heads, P + K * (A - 1), head_width)
        caches = [h.new_empty(cache_shape) for _ in model["layers"]]
        mask = suffix_mask(lengths, P, K, A - 1)
        h = self.read(h, torch.arange(P, device=h.device)[None], caches=caches)
        h = h[torch.arange(B, device=h.device), lengths - 1][:, None]  # (B, 1, W): what all samples have read
        tokens = []
        for d in range(A):
            logits = F.linear(model["norm"](h), action_rows).float().expand(B, K, -1)  # (B, K, 256)
            if temperature:
                probs = torch.softmax(logits / temperature, -1).flatten(0, 1)
                token = draw(probs, uniform[:, :, d].reshape(-1, 1)).view(B, K) + first
            else:
                token = logits.argmax(-1) + first
            tokens.append(token)
            if d < A - 1:
                start, stop = d * K, (d + 1) * K
                positions = (lengths + d)[:, None].expand(B, K)
                seen = mask[:, :, start:stop, : P + stop]
                h = self.read(model["embed_tokens"](token), positions, seen, caches, P + start)  # (B, K, W)
        return torch.stack(tokens, -1)

    def loss(self, obs, actions):
        """Cross-entropy of the action's tokens and the end of the sentence, a mean over all: observations, actions
        (B, A), or (B, R, A) for R targets per image behind one prefix -> scalar."""
        tokens = self.tokenize(actions).view(len(actions), -1, self.act_dim).to(self.device)  # (B, R, A)
        model, (B, R, A) = self.language_model["model"], tokens.shape
        h, lengths = self.prefix(obs)
        P = h.shape[1]
        h = torch.cat([h, model["embed_tokens"](tokens.mT.flatten(1))], 1)  # (B, P + A R, W), step by step
        steps = torch.arange(A, device=h.device).repeat_interleave(R)
        positions = torch.cat([torch.arange(P, device=h.device).expand(B, P), lengths[:, None] + steps], 1)
        causal = torch.ones(P, h.shape[1], dtype=torch.bool, device=h.device).tril()  # in the prefix
        mask = torch.cat([causal.expand(B, 1, -1, -1), suffix_mask(lengths, P, R, A)], 2)  # (B, 1, P + A R, P + A R)
        h = self.read(h, positions, mask)
        first = h[torch.arange(B, device=h.device), lengths - 1][:, None]  # predicts the first token of each target
        first = first.expand(-1, R, -1)
        logits = self.language_model["lm_head"](model["norm"](torch.cat([first, h[:, P:]], 1)))  # (B, (A + 1) R, vocab)
        targets = F.pad(tokens, (0, 1), value=EOS).mT.flatten(1)  # (B, (A + 1) R)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def tokenize(self, actions):
        """actions (..., A) in [-1, 1] -> tokens (..., A): the higher the action, the lower its token."""
        edges = torch.from_numpy(EDGES).to(actions.device)
        return self.last_action - torch.bucketize(actions.double().clamp(-1, 1), edges, right=True)

    def detokenize(self, tokens):
        """tokens (..., A) -> actions (..., A): the centres of 255 intervals; the lowest token shares the next one's."""
        centres = torch.tensor((EDGES[:-1] + EDGES[1:]) / 2, dtype=torch.float32, device=tokens.device)
        return centres[(self.last_action - tokens - 1).clamp(0, len(centres) - 1)]

    def unnormalize(self, actions):
        """Arrays (..., A) in [-1, 1] -> the environment's units: [q01, q99], or as they are where mask is False."""
        low, high = np.array(self.statistics["q01"]), np.array(self.statistics["q99"])
        return np.where(self.statistics["mask"], 0.5 * (actions + 1) * (high - low) + low, actions)

    def normalize(self, actions):
        """Arrays (..., A) in the environment's units -> [-1, 1]: the inverse of `unnormalize`, clipped. A dimension
        that was constant in the checkpoint's data, q01 = q99, is 0, as the official code trained it."""
        low, high = np.array(self.statistics["q01"]), np.array(self.statistics["q99"])
        scaled = np.where(low == high, 0.0, 2 * (actions - low) / (high - low + 1e-8) - 1)
        return np.where(self.statistics["mask"], scaled, actions).clip(-1, 1)


# ---------------------------------------- the policy's files ----------------------------------------


def load_policy(act_dim, args, device):
    """The policy of --checkpoint on `device`, or a tiny new one. Raises InputError naming the file or tensor."""
    if not args.checkpoint:
        return OpenVLAPolicy(act_dim, args).to(device)
    if Path(args.checkpoint).is_dir():
        args.checkpoint = str(Path(args.checkpoint).resolve())  # so that --resume works from any folder
    folder = checkpoint_folder(args.checkpoint, CONFIGS)  # errors before 15 GB are downloaded
    check_kind(folder)
    sizes, statistics = read_sizes(folder, args.unnorm_key)
    if len(statistics["q01"]) != act_dim:
        there = f"actions have {len(statistics['q01'])} dimensions there (--unnorm-key)"
        raise InputError(f"--checkpoint {folder}: {there}; expected the environment's {act_dim}")
    with torch.device("meta"):  # shapes alone
        policy = OpenVLAPolicy(act_dim, args, sizes, statistics, read_tokenizer(folder))
    billions = sum(parameter.numel() for parameter in policy.parameters()) / 1e9
    if device.type == "cpu" and billions > 1:
        expected = f"expected --device cuda with {2 * billions:.0f} GB for them in bfloat16, and more to compute"
        raise InputError(f"--checkpoint {folder}: {billions:.1f}e9 parameters; {expected}")
    folder = checkpoint_folder(args.checkpoint)
    load_weights(policy, folder, getattr(torch, args.dtype), device)
    policy.base = {"checkpoint": args.checkpoint, "sha256": fingerprint(folder)}
    if args.lora_rank:
        policy.add_lora(args.lora_rank, args.lora_alpha)
    return policy


CONFIGS = ("*.json", "*.py", "*.txt", "tokenizer.model")  # the official loader wants the last three; they are not run


def checkpoint_folder(name, patterns=(*CONFIGS, "*.safetensors")):
    """The folder `name`, or that of the Hugging Face hub's repository of this name, its files downloaded on first use.
    Raises InputError."""
    if Path(name).is_dir():
        return Path(name)
    import huggingface_hub  # slow to import, needed here alone

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # no connection or repository; no name of one
        expected = "expected a folder, or a hub name such as openvla/openvla-7b"
        raise InputError(f"--checkpoint {name}: {expected} ({first_line(error)})") from error


def first_line(error):
    return str(error).strip().split("\n")[0]


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--checkpoint {path.parent}: cannot read {path.name} ({error})") from error


# What config.json and preprocessor_config.json say, where they do, of OpenVLA's own
SETTINGS = {
    "vision_backbone_id": "dinosiglip-vit-so-224px", "n_action_bins": ACTION_BINS, "quantization_config": None,
    "image_resize_strategy": "resize-naive", "text_config model_type": "llama", "text_config hidden_act": "silu",
    "text_config rope_scaling": None,
}  # fmt: skip
# Names of files, flags and tensors of OpenVLA-OFT's fine-tunes
OFT = "action_head|proprio_projector|action_projector|actions?_chunk|l1_regression|use_diffusion|use_film|backbone--"


def check_kind(folder):
    """Raises InputError, naming what was found, for another kind of checkpoint than OpenVLA's own: with adapters apart,
    pickled weights alone, OFT's chunks, other settings (quantised weights, images resized in another way)."""
    names = sorted(path.name for path in folder.iterdir())
    if apart := [name for name in names if re.fullmatch(r"adapter(_model|_config|s)\.(safetensors|bin|json)", name)]:
        how = "ours with merge_adapters, peft's with PeftModel.from_pretrained(BASE, FOLDER).merge_and_unload()"
        raise InputError(f"--checkpoint {folder}: has {apart[0]}, LoRA's adapters; merge them first, {how}")
    pickled = [name for name in names if re.fullmatch(r"pytorch_model.*\.(bin|json)|.*\.pth?", name)]
    if pickled and not any(name.startswith("model") and ".safetensors" in name for name in names):
        how = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        raise InputError(f"--checkpoint {folder}: has {pickled[0]} and no safetensors; convert it first: {how}")
    config, official = read_json(folder / "config.json"), folder / "modeling_prismatic.py"
    options = [name for name, value in config.items() if value not in (None, False, 0, 1)]
    found = [name for name in names + options if re.search(OFT, name)]
    if official.is_file() and "NUM_ACTIONS_CHUNK" in official.read_text(errors="replace"):
        found.append("NUM_ACTIONS_CHUNK in modeling_prismatic.py")
    if found:
        raise InputError(f"--checkpoint {folder}: has {found[0]}, as of OpenVLA-OFT; expected one action, in tokens")
    for file in [name for name in names if name in ("config.json", "preprocessor_config.json")]:
        config = read_json(folder / file)
        config |= {f"text_config {name}": value for name, value in (config.get("text_config") or {}).items()}
        for name, expected in SETTINGS.items():
            if config.get(name, expected) != expected:
                raise InputError(f"--checkpoint {folder}: {file} has {name} {config[name]}; expected {expected}")


def read_sizes(folder, unnorm_key):
    """A checkpoint's config.json -> Sizes, and the action statistics of the dataset `unnorm_key`.

    A dataset_statistics.json beside a fine-tuned checkpoint counts instead of the config's.
    """
    path, known = folder / "config.json", {field.name for field in dataclasses.fields(Sizes)}
    config = read_json(path)
    text_sizes = {name: value for name, value in (config.get("text_config") or {}).items() if name in known}
    sizes = dataclasses.replace(OPENVLA_7B, **text_sizes, pad_to_multiple_of=config.get("pad_to_multiple_of", 64))
    statistics = config.get("norm_stats") or {}
    if (folder / "dataset_statistics.json").exists():
        path = folder / "dataset_statistics.json"
        statistics = read_json(path)
    if not unnorm_key and len(statistics) == 1:
        (unnorm_key,) = statistics
    if unnorm_key not in statistics and f"{unnorm_key}_no_noops" in statistics:  # as the official evaluation does
        unnorm_key += "_no_noops"
    if unnorm_key not in statistics:
        keys = ", ".join(sorted(statistics)) or f"the norm_stats of config.json, and {folder} has none"
        raise InputError(f"--unnorm-key {unnorm_key or '(none)'}: expected one of {keys}")
    return sizes, action_statistics(statistics[unnorm_key], f"--unnorm-key {unnorm_key}: in {path} its action")


def action_statistics(entry, where):
    """{"q01", "q99", "mask"}, lists of one length, of a dataset's entry. Raises InputError, beginning with `where`."""
    actions = entry.get("action") if isinstance(entry, dict) else None
    actions = actions if isinstance(actions, dict) else {}
    found = {"mask": [True] * len(np.atleast_1d(actions.get("q01", ())))} | actions
    found = {name: found[name] for name in ("q01", "q99", "mask") if isinstance(found.get(name), list)}
    if len(found) < 3 or len(set(map(len, found.values()))) > 1:
        raise InputError(f"{where} has {', '.join(actions) or 'nothing'}; expected q01, q99 and mask of one length")
    for i, (low, high, is_normalized) in enumerate(zip(*found.values(), strict=True)):
        for name, value in (("q01", low), ("q99", high)):
            if type(value) not in (int, float) or not math.isfinite(value):
                raise InputError(f"{where} has {name}[{i}] = {value!r}; expected a finite number")
        if low > high:
            raise InputError(f"{where} has q01[{i}] = {low}, more than q99[{i}] = {high}; expected at most that")
        if not isinstance(is_normalized, bool):
            raise InputError(f"{where} has mask[{i}] = {is_normalized!r}; expected true or false")
    return found


def read_tokenizer(folder):
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower one
        raise InputError(f"--checkpoint {path}: cannot be read as a tokenizer ({first_line(error)})") from error


def shards(folder):
    """The safetensors files of a checkpoint: {name of tensor: path}."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        if not (weight_map := read_json(index).get("weight_map")):
            raise InputError(f"--checkpoint {index}: has no weight_map; expected the file of each tensor")
        return {name: folder / shard for name, shard in weight_map.items()}
    path = folder / "model.safetensors"
    with open_safetensors(path, "cpu") as file:
        return dict.fromkeys(file.keys(), path)


def open_safetensors(path, device):
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (OSError, SafetensorError) as error:
        raise InputError(f"--checkpoint {path}: cannot be read as safetensors ({first_line(error)})") from error


def load_weights(policy, folder, dtype, device):
    """Read a checkpoint's tensors into the policy, one after the other, straight to the device. Tensors that the model
    does not use are skipped. Raises InputError for one that is missing, no float (quantised) or of another shape."""
    where, expected, tensors = shards(folder), policy.state_dict(), {}
    if strange := [name for name in where if re.search(OFT, name)]:
        raise InputError(f"--checkpoint {folder}: has tensor {strange[0]}; expected OpenVLA's own, not OFT's")
    if missing := [name for name in expected if name not in where]:
        raise InputError(f"--checkpoint {folder}: tensor {missing[0]} is missing, one of {len(missing)}")
    for name, parameter in expected.items():
        tensor = f"--checkpoint {where[name]}: tensor {name}"
        with open_safetensors(where[name], device) as file:
            if name not in file.keys():  # noqa: SIM118
                raise InputError(f"{tensor} is missing, though the index has it there")
            shape, kind = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
            if kind not in ("BF16", "F16", "F32", "F64"):
                raise InputError(f"{tensor} has type {kind}; expected BF16, F16 or F32")
            if shape != list(parameter.shape):
                raise InputError(f"{tensor} has shape {shape}; expected {list(parameter.shape)}")
            tensors[name] = file.get_tensor(name).to(dtype)
    policy.load_state_dict(tensors, assign=True)


def fingerprint(folder):
    """The sha256 of a tensor of a checkpoint that every fine-tune changes. Raises InputError where it has none."""
    where, name = shards(folder), "projector.fc1.weight"
    if name not in where:
        raise InputError(f"--checkpoint {folder}: tensor {name} is missing")
    with open_safetensors(where[name], "cpu") as file:
        return hashlib.sha256(file.get_tensor(name).view(torch.uint8).numpy().tobytes()).hexdigest()


def save_adapters(policy, path):
    """Write what LoRA adds, and nothing else, to a safetensors file; it names the checkpoint that they belong to."""
    adapters = {name: value.cpu() for name, value in policy.state_dict().items()}
    content = safetensors.torch.save(adapters, {"scale": repr(policy.projector.fc1.lora_scale), **policy.base})
    common.replace_file(path, lambda file: file.write(content))


def read_adapters(path):
    """(tensors by name, alpha / rank, what it names) of a file by save_adapters. Raises InputError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            base = file.metadata()
            return {name: file.get_tensor(name) for name in file.keys()}, float(base["scale"]), base  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"adapters {path}: expected a file by save_adapters ({first_line(error)})") from error


def merge_adapters(checkpoint_path, adapters_path, target):
    """Write the checkpoint in a folder with a file of adapters added to its weights, in the released layout: the same
    files, shards, names and types, to the new folder `target`. Files are copied and the weights changed in the copies,
    so that one tensor at a time is in memory. Raises InputError."""
    folder, target, (adapters, scale, base) = Path(checkpoint_path), Path(target), read_adapters(adapters_path)
    if target.exists():
        raise InputError(f"{target}: exists; expected a new folder for the merged checkpoint")
    where = shards(folder)
    layers = sorted(name.removesuffix(".lora_a") for name in adapters if name.endswith(".lora_a"))
    strangers = [layer for layer in layers if f"{layer}.weight" not in where]
    if strangers or base["sha256"] != fingerprint(folder):
        reason = f"no {strangers[0]}.weight" if strangers else "other weights"
        raise InputError(f"adapters {adapters_path}: {folder} has {reason}; expected their base, {base['checkpoint']}")
    partial = target.with_name(f"{os.getpid()}-{target.name}")
    partial.mkdir(parents=True)
    for path in filter(Path.is_file, folder.iterdir()):
        shutil.copy(path, partial)
    for layer in layers:
        name = f"{layer}.weight"
        with open_safetensors(where[name], "cpu") as file:
            weight = file.get_tensor(name)
        merged = weight.float() + scale * adapters[f"{layer}.lora_b"] @ adapters[f"{layer}.lora_a"]
        with open(partial / where[name].name, "r+b") as file:  # its header's length, 8 bytes; the header; the tensors
            length = int.from_bytes(file.read(8), "little")
            file.seek(8 + length + json.loads(file.read(length))[name]["data_offsets"][0])
            file.write(merged.to(weight.dtype).view(torch.uint8).numpy().tobytes())
    partial.rename(target)


# ======================================== CRITIC ========================================


def hl_gauss(target, args):
    """The value target (...,) as a distribution (..., bins): a normal around it, cut to [q_min, q_max].

    HL-Gauss (Farebrother et al., 2024, eq. 3.2): differences of normal CDFs over the bins' edges, renormalised.
    NOTE(differs): targets beyond the range are renormalised onto border bins, not clipped (as in the released code).
    NOTE(differs): the standard deviation is sqrt(2) * 0.75 bins, not 0.75 (as in the released code).
    """
    edges = torch.linspace(args.q_min, args.q_max, args.num_bins + 1, device=target.device)
    z = (edges - target[..., None]) / (math.sqrt(2) * 0.75 * (args.q_max - args.q_min) / args.num_bins)
    low, high = z[..., :-1], z[..., 1:]  # (..., bins), of each bin's edges
    # Far to the right a CDF rounds to 1, and a bin's share to 0; far to the left its logarithm is exact. So bins on the
    # right are mirrored to the left, and a target far outside lands on the border bin, not on 0 / 0.
    low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    log_probs = log_high + torch.log1p(-torch.exp(log_low - log_high))  # log(exp(log_high) - exp(log_low))
    return torch.softmax(log_probs, -1)  # renormalised


class Residual(nn.Module):
    """x plus two convolutions of it (He et al., 2016)."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):  # (B, W, height, width) -> the same
        return x + self.second(F.silu(self.first(F.silu(x))))


@functools.cache
def signs(text, number):
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest(), "little")
    return np.random.default_rng(seed).choice(np.float32([-1, 1]), number)


class Critic(nn.Module):
    """E value functions Q_e(s, a), a batch dimension of the weights, behind one image encoder that they share.

    `encode` turns images into obs (B, O), once per state; everything else takes those. The encoder: per width a
    convolution of stride 2 and a residual block, then dense, LayerNorm, tanh. The E networks: dense layers that each
    read the action too, LayerNorm, SiLU; then a head for the value, a scalar, or with --num-bins a distribution.

    obs_dim: O, the width of an encoding.
    NOTE(differs): the critic knows instructions by fixed random signs on an encoding (released: one instruction a run).
    NOTE(differs): an image's encoding keeps where things are (released: ResNet-18, averaged over the image).
    NOTE(differs): the critic's images are averaged down to its size (released: resized by a cubic filter).
    NOTE(differs): all members of the ensemble share one output head (as in the released code).
    """

    # must be a checkpoint's own: its weights mean nothing with others
    fixed_flags = ("num_bins", "q_min", "q_max", "critic_image_size", "instruction")

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        layers, channels, size = [], 3, args.critic_image_size
        self.image_size, self.obs_dim, self.instruction = size, obs_dim, args.instruction
        for width in args.encoder_widths:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), Residual(width)]
            channels, size = width, (size + 1) // 2
        dense = [nn.Flatten(), nn.Linear(channels * size**2, obs_dim), nn.LayerNorm(obs_dim), nn.Tanh()]
        self.encoder = nn.Sequential(*layers, nn.SiLU(), *dense)
        widths, E, outputs = [obs_dim, *args.hidden_dims], args.ensemble_size, max(args.num_bins, 1)
        self.weights = nn.ParameterList(torch.empty(E, i + act_dim, o) for i, o in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(E, 1, width) for width in args.hidden_dims)
        self.norm_scales = nn.ParameterList(torch.ones(E, 1, width) for width in args.hidden_dims)
        self.norm_biases = nn.ParameterList(torch.zeros(E, 1, width) for width in args.hidden_dims)
        head_weight = nn.init.orthogonal_(torch.empty(widths[-1], outputs), 1e-2)  # small, as the last layer below
        self.head_weight = nn.Parameter(head_weight)  # (H, bins)
        self.head_bias = nn.Parameter(torch.zeros(outputs))
        for i, weight in enumerate(self.weights):
            is_last = i == len(self.weights) - 1
            for member in weight.data:  # the gain of 1e-2: at first all actions are worth the same
                nn.init.orthogonal_(member, 1e-2 if is_last else math.sqrt(2))
        edges = torch.linspace(args.q_min, args.q_max, args.num_bins + 1)
        self.register_buffer("centers", (edges[:-1] + edges[1:]) / 2, persistent=False)  # (bins,)

    def encode(self, images, codes=0.0):
        """images (B, height, width, 3) uint8, the instructions' codes (B, O) -> obs (B, O)."""
        x = images.to(self.head_bias.device).permute(0, 3, 1, 2).float() / 255 - 0.5  # (B, 3, height, width)
        return self.encoder(F.interpolate(x, (self.image_size, self.image_size), mode="area")) + codes

    def codes(self, instructions):
        """B strings -> (B, O): random signs that follow from the text; 0 for the run's own instruction."""
        rows = [signs(text, self.obs_dim) * (text != self.instruction) for text in instructions]
        return torch.from_numpy(np.stack(rows)).to(self.head_bias.device)

    def forward(self, obs, actions, members=None):
        """obs (B, O), actions (B, N, A) -> q (E, B, N), logits (E, B, N, bins) or None for a scalar critic.

        members (E',): evaluate these members only, in this order.
        """
        B, N, A = actions.shape
        pick = (lambda parameter: parameter) if members is None else (lambda parameter: parameter[members])
        flat = actions.reshape(B * N, A)
        for i in range(len(self.weights)):
            weight, act_weight = pick(self.weights[i]).split([self.weights[i].shape[1] - A, A], dim=1)
            if i == 0:  # obs' part is computed once per state and shared by its N actions
                h = (obs @ weight + pick(self.biases[i])).repeat_interleave(N, 1)  # (E, B * N, H)
            else:
                h = torch.baddbmm(pick(self.biases[i]), h, weight)
            h = h + flat @ act_weight
            h = F.layer_norm(h, h.shape[-1:], eps=1e-6)
            h = F.silu(torch.addcmul(pick(self.norm_biases[i]), h, pick(self.norm_scales[i])))
        outputs = (h @ self.head_weight + self.head_bias).unflatten(1, (B, N))  # (E, B, N, bins)
        if not len(self.centers):
            return outputs[..., 0], None
        return torch.softmax(outputs, -1) @ self.centers, outputs


# ======================================== ACTION OPTIMISATION ========================================


def rerank(critic, obs, candidates, args, dataset_actions=None):
    """Global optimisation (Alg. 1): the M of candidates (B, K, A) with the highest ensemble-mean value, best first.

    dataset_actions (B, A): the batch's own action takes the place of the worst kept one (not when M = 1).
    NOTE(differs): the batch's own action joins before the gradient steps (as in the released code).
    NOTE(differs): M = K is sorted too, and with M = 1 the batch's own action stays out (released: neither).
    """
    with torch.no_grad():
        q = critic(obs, candidates)[0].mean(0)  # (B, K)
    best = q.topk(args.num_keep, dim=1).indices  # (B, M)
    kept = candidates.take_along_dim(best[..., None], 1)  # (B, M, A)
    if dataset_actions is not None and args.num_keep > 1:
        kept = torch.cat([kept[:, :-1], dataset_actions[:, None]], 1)
    return kept


def ascend(critic, obs, actions, args):
    """Local optimisation (Alg. 1): T times a <- clip(a + alpha * grad_a Q(s, a)), each of actions (B, M, A) on its own.

    Returns the best of each one's T + 1 points (B, M, A) and its value (B, M).
    NOTE(differs): a candidate keeps the best of its points, not the last (as in the released code).
    """
    best_actions, best_q = actions, actions.new_full(actions.shape[:2], -torch.inf)
    for step in range(args.num_gradient_steps + 1):
        moves = step < args.num_gradient_steps  # the last of the T + 1 points is only valued
        actions = actions.detach().requires_grad_(moves)
        with torch.set_grad_enabled(moves):
            q = critic(obs, actions)[0].mean(0)  # (B, M)
            gradient = torch.autograd.grad(q.sum(), actions)[0] if moves else 0.0  # touches no parameter's .grad
        better = (q >= best_q).detach()
        best_actions = torch.where(better[..., None], actions, best_actions).detach()
        best_q = torch.where(better, q, best_q).detach()
        actions = (actions + args.action_lr * gradient).clamp(-1, 1)
    return best_actions, best_q


def optimize_actions(critic, obs, candidates, args, dataset_actions=None):
    """The optimised actions of the paper: obs (B, O), candidates (B, K, A) -> actions (B, M, A) and their q (B, M).

    NOTE(differs): the flags reach every use of optimised actions (released: acting and TD targets ignore them).
    """
    # at once, whose hidden layer for the M is 2 MB and stays in the cache
    states = 2**19 // (args.num_keep * args.ensemble_size * max(args.hidden_dims))
    own = () if dataset_actions is None else (dataset_actions,)
    results = [
        ascend(critic, part, rerank(critic, part, some, args, *own_part), args)
        for part, some, *own_part in common.cache_sized(states, obs, candidates, *own)
    ]
    actions, q = (torch.cat(values) for values in zip(*results, strict=True))
    return actions, q


def choose(actions, q, sample=False, seeds=None):
    """One of M actions: the best, or a draw from softmax(q), row i's by seeds[i].

    actions (B, M, A), q (B, M) -> (B, A).
    NOTE(differs): distillation draws at temperature 1, all else takes the best (as in the released code).
    """
    if sample:
        noise = common.seeded_normal(q.shape, seeds and [(*seed, 1) for seed in seeds], q.device)
        q = q - torch.log(-torch.special.log_ndtr(noise))  # plus Gumbel noise: its argmax is a draw from softmax(q)
    return actions[torch.arange(len(q), device=q.device), q.argmax(1)]


@torch.no_grad()
def act(policy, critic, obs, args, seeds=None):
    """The action PA-RL takes, an optimised one: observations -> (B, A). Without a critic: policy.sample(obs, 1).

    NOTE(differs): with --act-draw a draw from softmax(Q) acts (released: the best).
    """
    candidates = policy.sample(obs, args.num_samples, seeds)
    encoded = critic.encode(torch.as_tensor(obs["image"]), critic.codes(obs["instruction"]))
    return choose(*optimize_actions(critic, encoded, candidates, args), args.act_draw, seeds)


@torch.no_grad()
def optimization_info(critic, obs, candidates, args):
    """What the optimisation did to candidates (B, K, A), for the log; docs/metrics.md has the equations."""
    kept = rerank(critic, obs, candidates, args)
    actions, q = ascend(critic, obs, kept, args)
    moved = (actions - kept).abs()  # (B, M, A)
    q_before, q_after = critic(obs, candidates)[0].mean(), q.max(1).values.mean()
    with torch.enable_grad():
        kept.requires_grad_()
        (gradient,) = torch.autograd.grad(critic(obs, kept)[0].mean(0).sum(), kept)
    return {
        "opt/q_before": q_before,
        "opt/q_after": q_after,
        "opt/improvement": q_after - q_before,
        "opt/candidate_entropy": -(torch.softmax(q, 1) * torch.log_softmax(q, 1)).sum(1).mean(),
        "opt/grad_norm": gradient.norm(dim=-1).mean(),
        "opt/l1_move": moved.sum(-1).mean(),
        "opt/tokens_changed": (moved > 1 / 127).float().mean(),  # by more than half of a 128th
    }


class SampleStore:
    """What each of S states was told and the policy's K samples there: the dataset's states and, after them, the online
    buffer's.

    actions (S, K, A) in float16, and the version of the policy that drew them, -1 where none were; a state first met
    while the policy is distilled has the version from before. The noise follows from (seed, state, version) alone.
    `observe(rows)` looks at states.

    NOTE(differs): samples are kept beside their state with a version (released: worker processes, by the mean pixel).
    """

    def __init__(self, act_dim, args):
        self.seed, self.version = args.seed, 0  # the policy's version: how often it was distilled
        self.actions = torch.zeros(0, args.num_samples, act_dim, dtype=torch.float16)
        self.versions, self.instructions = torch.zeros(0, dtype=torch.long), []

    def grow(self, num_states, instruction=""):
        """Make room for num_states states in all; the new ones were told `instruction`."""
        new = num_states - len(self.versions)
        self.instructions += new * [instruction]
        self.actions = torch.cat([self.actions, self.actions.new_zeros(new, *self.actions.shape[1:])])
        self.versions = torch.cat([self.versions, self.versions.new_full((new,), -1)])

    def draw(self, policy, rows, observe):
        """Draw samples of the policy as it is at the states `rows` (N,)."""
        seeds = [(self.seed, row, self.version) for row in rows.tolist()]
        drawn = together(sample_share, policy, observe(rows), self.actions.shape[1], seeds)
        self.actions[rows], self.versions[rows] = drawn.half().cpu(), self.version

    def at(self, policy, rows, observe):
        """The samples at the states rows (N,), drawn now where there are none -> (N, K, A)."""
        missing = rows[self.versions[rows] < 0].unique()
        if len(missing):
            self.draw(policy, missing, observe)
        return self.actions[rows].float()

    def age(self, rows):
        """By how many versions, on average, the samples at the states `rows` are older than the policy."""
        return (self.version - self.versions[rows]).float().mean()

    def refresh(self, policy, observe, budget):
        """Draw again, by the policy as it is now, at up to `budget` states: those with the oldest samples."""
        old = ((self.versions >= 0) & (self.versions < self.version)).nonzero()[:, 0]
        oldest = old[self.versions[old].argsort(stable=True)[:budget]]
        if len(oldest):
            self.draw(policy, oldest, observe)

    def state_dict(self):
        return {name: value for name, value in vars(self).items() if name != "seed"}

    def load_state_dict(self, state):
        vars(self).update(state)


# ======================================== LOSSES ========================================


def critic_loss(critic, target_critic, batch, args, random_actions=None, td_members=None, cql_members=None):
    """Cal-QL (Nakamoto et al., 2023): TD + cql_weight * CQL, calibrated by Monte-Carlo returns -> loss, info.

    batch: obs, next_obs (B, O); actions, policy_actions, next_policy_actions (B, A), the last two optimised at obs and
    next_obs; rewards, masks, mc_returns (B,). random_actions (B, n, A) and members (critic_subset,) inject the draws.
    NOTE(differs): members are drawn with replacement, once a batch, apart for TD and CQL (as in the released code).
    NOTE(differs): the cross-entropy is over all members, not those drawn (as in the released code).
    """
    obs, actions, n = batch["obs"], batch["actions"], args.cql_n_actions
    if random_actions is None:
        random_actions = torch.rand(len(obs), n, actions.shape[-1], device=obs.device) * 2 - 1
    if td_members is None:
        td_members = torch.randint(args.ensemble_size, (args.critic_subset,), device=obs.device)
    if cql_members is None:
        cql_members = torch.randint(args.ensemble_size, (args.critic_subset,), device=obs.device)

    # TD: the target critic values the action that the critic chose; all members learn it
    with torch.no_grad():
        next_q, _ = target_critic(batch["next_obs"], batch["next_policy_actions"][:, None], td_members)  # (2, B, 1)
        discount = args.discount**args.action_chunk
        target = batch["rewards"] + discount * batch["masks"] * next_q[..., 0].min(0).values  # (B,)
    q_data, logits = critic(obs, actions[:, None])  # (E, B, 1), (E, B, 1, bins)
    q_data = q_data[..., 0]  # (E, B)
    if logits is None:
        td_loss = (q_data - target).square().mean()
    else:
        td_loss = -(hl_gauss(target, args) * torch.log_softmax(logits[:, :, 0], -1)).sum(-1).mean()

    # CQL: push down a soft maximum over random and policy actions at s, push up the data's. The action optimised for s'
    # is valued at s as well: s is a step away, so it is a likely action there too. Each policy action stands for n
    # equal ones, scored once. Cal-QL: a policy action is never pushed below the return that the data reached from here.
    proposals = torch.cat([random_actions, batch["policy_actions"][:, None], batch["next_policy_actions"][:, None]], 1)
    q_proposals, _ = critic(obs, proposals, cql_members)  # (2, B, n + 2)
    q_random, q_policy = q_proposals.split([n, 2], dim=-1)
    mc_returns = batch["mc_returns"][:, None]  # (B, 1)
    calibrated = torch.maximum(q_policy, mc_returns) + math.log(n)
    q_all = torch.cat([q_random, calibrated, q_data[cql_members][..., None]], -1)  # (2, B, n + 3)
    cql_loss = (torch.logsumexp(q_all, -1) - math.log(3 * n + 1) - q_data[cql_members]).mean()

    loss = td_loss + args.cql_weight * cql_loss
    info = {
        "critic/loss": loss,
        "critic/td_loss": td_loss,
        "critic/cql_loss": cql_loss,
        "critic/q_data": q_data.mean(),
        "critic/q_policy": q_policy[..., 0].mean(),
        "critic/q_minus_mc": (q_data - batch["mc_returns"]).mean(),
        "critic/calibration_rate": (q_policy < mc_returns).float().mean(),
    }
    return loss, {name: value.detach() for name, value in info.items()}


@torch.no_grad()
def move_average(average, network, rate):
    """average <- (1 - rate) * average + rate * network, in place; buffers (a BatchNorm's means) as they are."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), rate)
    for own, new in zip(average.buffers(), network.buffers(), strict=True):
        own.copy_(new)


def random_shift(images, args):
    """Each of images (B, height, width, 3) moved by up to augment_pixels of the critic's pixels along both axes, its
    border repeated (DrQ; Kostrikov et al., 2021).

    NOTE(differs): the images of obs and next_obs are shifted apart (released: both by the same).
    """
    (B, height, width, _), device = images.shape, images.device
    most = round(args.augment_pixels * height / args.critic_image_size)
    down, right = torch.randint(-most, most + 1, (2, B, 1), device=device)
    rows = (torch.arange(height, device=device) + down).clamp(0, height - 1)  # (B, height)
    columns = (torch.arange(width, device=device) + right).clamp(0, width - 1)  # (B, width)
    return images[torch.arange(B, device=device)[:, None, None], rows[:, :, None], columns[:, None]]


def update_critic(critic, target_critic, optimizer, batch, samples, args):
    """One critic update on a batch and the policy's samples (2B, K, A) at its obs and next_obs, images -> info.

    NOTE(differs): this critic ranks, moves and picks, the target critic only evaluates (as in the released code).
    NOTE(differs): no warm-up of the learning rate, and the target moves after the step (as in the released code).
    """
    for group in optimizer.param_groups:
        group["lr"] = args.critic_lr
    images, next_images = random_shift(batch["obs"], args), random_shift(batch["next_obs"], args)
    obs = critic.encode(images, batch["codes"])  # (B, O); the encoder learns from the losses at obs
    with torch.no_grad():
        next_obs, target_next_obs = (part.encode(next_images, batch["codes"]) for part in (critic, target_critic))
    actions, q = optimize_actions(critic, torch.cat([obs.detach(), next_obs]), samples, args)
    policy_actions, next_policy_actions = choose(actions, q).chunk(2)
    batch = {**batch, "policy_actions": policy_actions, "next_policy_actions": next_policy_actions}
    batch |= {"obs": obs, "next_obs": target_next_obs}
    loss, info = critic_loss(critic, target_critic, batch, args)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    move_average(target_critic, critic, args.target_rate)
    return info


def update_policy(policy, policy_ema, optimizer, obs, actions, lr, args):
    """One step of the policy's own supervised loss on observations, actions (B, A) or (B, R, A): cloning and
    distillation alike."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    policy.train()
    loss = together(loss_share, policy, obs, actions)
    optimizer.step()
    move_average(policy_ema, policy, args.policy_ema_rate)
    return loss


def learning_rate(base, step, num_steps, args, cosine=False):
    """Linear warm-up over policy_warmup_steps (at most 10 % of num_steps), then constant, or cosine to 0.

    NOTE(differs): cloning's cosine begins with its warm-up (released: after it; for the transformer there is none).
    NOTE(differs): a warm-up takes at most a tenth of its phase (released: 2000 steps in any).
    """
    warmup = min(args.policy_warmup_steps, num_steps // 10)
    decay = (1 + math.cos(math.pi * step / num_steps)) / 2 if cosine else 1.0
    ramp = min(1.0, step / warmup) if warmup else 1.0
    return base * ramp * decay


# ======================================== TRAIN ========================================


def train(args: Args) -> Path:
    """Behaviour cloning or warm-up trials, offline RL, online fine-tuning. Returns the run's directory.

    With torchrun rank 0 does this, and the others their share of the policy's work. Raises InputError.
    """
    common.check_flags(args)
    check(args)
    join_ranks(args)
    device, generator = common.start(args)  # torch's own generator draws noise, this one batches
    if ranks()[0] > 0:
        return serve(args, device)
    try:
        with contextlib.ExitStack() as at_end:  # also after an error or a stop: a robot is let go
            directory = learn(args, at_end, device, generator)
    except (InputError, FloatingPointError, SystemExit):
        dismiss_ranks()
        raise
    dismiss_ranks()
    return directory


def learn(args, at_end, device, generator):
    """The phases of `train`. What is to be done at the end is added to the contextlib.ExitStack at_end."""
    # Environment, policy, data
    import envs

    image_size = (OPENVLA_7B if args.checkpoint else TINY).image_size
    env_args = (args.env_id, args.sparse_reward, args.capture_video, image_size)
    eval_envs = [envs.make(*env_args) for _ in range(common.num_envs(args))]
    for env in eval_envs:
        at_end.callback(env.close)
    env, act_dim, given = eval_envs[0], eval_envs[0].action_space.shape[0], args
    args = dataclasses.replace(args, instruction=instruction_of(env, given))
    policy = load_policy(act_dim, args, device)
    announce(("load", act_dim))
    if not args.checkpoint:  # -1 and 1 are the environment's bounds
        low, high = envs.action_bounds(env)
        policy.statistics = {"q01": low, "q99": high, "mask": (low != -1) | (high != 1)}
    policy.prompt(args.instruction)  # raises an error where it is too long
    if args.warmup_episodes:
        args = dataclasses.replace(args, bc_steps=0, offline_ratio=0.0)
    dataset = common.ReplayBuffer((image_size, image_size, 3), act_dim, np.uint8)
    if (args.bc_steps or args.offline_ratio or args.dataset_path) and not args.eval_only:
        rewards_as = (args.reward_scale, args.reward_bias, args.discount, args.sparse_reward)
        dataset = envs.load_dataset(args.env_id, args.dataset_path, *rewards_as, env, args.obs_keys)
    elif not args.warmup_episodes:
        args = dataclasses.replace(args, offline_steps=0, offline_distill_steps=0)  # nothing to learn from yet
    q_min, q_max = common.value_range(common.step_rewards(dataset, args), args)
    args = dataclasses.replace(args, q_min=q_min, q_max=q_max)

    # What learns; where the run is, what it logs, what it keeps
    agent = Agent(dataset, policy, act_dim, args, device, generator)
    eval_envs = [PolicyEnv(one, policy, agent.told, given) for one in eval_envs]
    env = eval_envs[0]
    if args.checkpoint:
        dataset.actions = env.reverse_action(dataset.actions)
    run = common.open_run(args, Path(__file__).stem, generator, dataset, agent.kept())
    counters, log, checkpoint = run.counters, run.log, run.checkpoint
    if args.eval_only:
        print(json.dumps(common.evaluate_agent(eval_envs, agent, run, args), indent=2))
        return run.directory
    stop = common.StopSignal(log)
    common.begin(run, dataclasses.replace(args, instruction=given.instruction))  # resumed, it is told as now
    agent.online.open(run.directory / "images.bin")

    def save():
        checkpoint.save()
        if policy.frozen():
            save_adapters(agent.policy_ema, run.directory / "adapters.safetensors")

    def end_update(describe=None):
        """What ends each update of phases 1 and 2, and each episode: log, evaluate, save, stop if asked."""
        is_due = counters.due(args.eval_every) and counters.phase != "warmup"
        evaluates = counters.owes_evaluation or is_due
        if evaluates or counters.due(args.log_every) or counters.phase in ("warmup", "online"):
            log.add(describe() if describe else {})
            row = {}
            if evaluates:
                counters.owes_evaluation = True
                save()  # it can take long, and a run that is stopped in it goes on from here
                row = common.evaluate_agent(eval_envs, agent, run, args, before_step=stop.check)
                counters.owes_evaluation = False
            log.write(row)
            save()
        stop_if_asked()

    def stop_if_asked():
        if stop.asked:
            save()
            stop.leave()

    if counters.owes_evaluation:  # of a policy that is not cloned here, or one in which the run was stopped
        end_update()

    # Phase 1: behaviour cloning, or trials of the policy as it is
    for step in counters.steps("bc", 0 if args.policy_checkpoint else args.bc_steps):
        log.add(agent.clone(learning_rate(args.bc_lr, step, args.bc_steps, args, cosine=True)))
        end_update()
    explore_raw = log.timed("time/act_ms")(agent.explore_raw)
    for index in range(counters.done["warmup"], args.warmup_episodes):
        counters.phase = "warmup"
        episode = agent.collect(env, explore_raw, common.reset_seed(args.seed, 2, index), stop.check)
        counters.done["warmup"] += 1
        log.add(common.episode_columns(episode))
        end_update()

    # Phase 2: offline RL. The policy is frozen; it may learn from the critic at the end
    num_offline = 0 if args.warmup_episodes else args.batch_size
    for step in counters.steps("offline", args.offline_steps, counters.then_online):
        with log.timed("time/critic_ms"):
            log.add(agent.improve_critic(step, num_offline))
        end_update(agent.describe)
    if args.offline_distill_steps and not counters.done["distill"]:
        agent.policy_optimizer.state.clear()
    for step in counters.steps("distill", args.offline_distill_steps):
        with log.timed("time/distill_ms"):
            lr = learning_rate(args.distill_lr, step, args.offline_distill_steps, args)
            log.add(agent.distill(num_offline, lr))
        end_update()

    # Phase 3: online fine-tuning: collect an episode, distil, draw samples of the new policy, update the critic
    # NOTE(differs): going online both optimisers start afresh, networks and target go on (as in the released code).
    if counters.phase != "online":
        agent.policy_optimizer.state.clear()
        agent.critic_optimizer.state.clear()
        agent.store.version = int(args.offline_distill_steps > 0)
    num_distill_steps = args.policy_utd * common.max_env_steps(env, args)
    explore = log.timed("time/act_ms")(agent.explore)
    for seed in counters.episodes():
        if not counters.collected:  # else the run was stopped in this episode's updates
            counters.collected = common.episode_columns(agent.collect(env, explore, seed, stop.check))
            save()  # a robot's episode is dearer than what it costs to keep
        length = int(counters.collected["train/length"])
        share = len(dataset) / (len(dataset) + len(agent.online)) if args.offline_ratio else 0.0
        first = args.policy_utd * counters.env_step
        for step in counters.updates("distillation", args.policy_utd * length):
            stop_if_asked()
            with log.timed("time/distill_ms"):
                lr = learning_rate(args.distill_lr, first + step, num_distill_steps, args)
                log.add(agent.distill(math.floor(args.batch_size * share), lr))
        for _ in counters.updates("samples", 1):
            agent.refresh_samples()
        first = counters.done["offline"] + args.critic_utd * counters.env_step
        for step in counters.updates("critic", args.critic_utd * length):
            stop_if_asked()
            with log.timed("time/critic_ms"):
                log.add(agent.improve_critic(first + step, math.floor(args.batch_size * args.offline_ratio)))
        log.add(counters.end_episode(args.critic_utd * length))
        end_update(agent.describe)
    log.finish()
    return run.directory


class Agent:
    """What learns and what it learns from: policy, critic, their averages and optimisers, samples, both buffers."""

    def __init__(self, dataset, policy, act_dim, args, device, generator):
        self.dataset, self.online = dataset, ImageBuffer(dataset.states.shape[1:], act_dim)
        self.args, self.device, self.generator = args, device, generator
        self.latest = None  # what the last critic update was made from
        self.told = {}  # the instruction of each episode, by the seed of its reset
        self.policy = self.policy_ema = policy  # one, where nothing is averaged
        if args.policy_ema_rate < 1:
            self.policy_ema = copy.deepcopy(policy, {id(weight): weight for weight in policy.frozen().values()}).eval()
        self.critic = Critic(args.encoding_width, act_dim, args).to(device)
        self.target_critic = copy.deepcopy(self.critic)
        self.critic_ema = self.critic if args.critic_ema_rate == 1 else copy.deepcopy(self.critic)
        self.policy_optimizer = torch.optim.Adam(trained(policy), lr=args.bc_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.critic_lr, fused=True)
        self.update_critic = common.compiled(update_critic) if args.compile else update_critic
        self.store = SampleStore(act_dim, args)
        self.store.grow(dataset.num_states, args.instruction)

    def kept(self):
        """What a checkpoint holds, by name."""
        names = ("policy", "policy_ema", "critic", "target_critic", "critic_ema", "online", "store")
        return {name: getattr(self, name) for name in (*names, "policy_optimizer", "critic_optimizer")}

    def observe(self, rows):
        """States of the dataset and, numbered after them, of the online buffer, as the policy takes them."""
        first = self.dataset.num_states
        own = [self.dataset.states[row] if row < first else self.online.images[row - first] for row in rows.tolist()]
        return {"image": np.stack(own), "instruction": self.told_at(rows)}

    def told_at(self, rows):
        return [self.store.instructions[row] for row in rows.tolist()]

    def samples_at(self, rows):  # (N,) -> (N, K, A)
        return self.store.at(self.policy_ema, rows, self.observe).to(self.device)

    def refresh_samples(self):
        """After distillation: the policy has a new version, and its samples are drawn again where they are oldest."""
        self.store.version += 1
        self.store.refresh(self.policy_ema, self.observe, self.args.refresh_states)

    def draw_batch(self, num_offline):
        """num_offline transitions of the dataset and others collected online, --batch-size in all."""
        num_online = self.args.batch_size - num_offline
        batch = common.sample_both(self.dataset, self.online, num_offline, num_online, self.generator)
        for rows in (batch["state_rows"], batch["next_state_rows"]):
            rows[num_offline:] += self.dataset.num_states
        batch["codes"] = self.critic.codes(self.told_at(batch["state_rows"]))
        return {name: value if name.endswith("_rows") else value.to(self.device) for name, value in batch.items()}

    def clone(self, lr):
        """One step of the policy towards the dataset's actions."""
        batch = self.draw_batch(self.args.batch_size)
        return {"policy/bc_loss": self.improve_policy(batch["state_rows"], batch["actions"], lr)}

    def distill(self, num_offline, lr):
        """One step of the policy towards optimised actions, the batch's own among the candidates."""
        batch = self.draw_batch(num_offline)
        samples = self.samples_at(batch["state_rows"])
        with torch.no_grad():
            obs = self.critic_ema.encode(batch["obs"], batch["codes"])
        actions, q = optimize_actions(self.critic_ema, obs, samples, self.args, batch["actions"])
        draws = [choose(actions, q, sample=not self.args.distill_argmax) for _ in range(self.args.targets_per_image)]
        actions = torch.stack(draws, 1)  # (B, R, A)
        return {"policy/distill_loss": self.improve_policy(batch["state_rows"], actions, lr)}

    def improve_policy(self, rows, actions, lr):
        networks, obs = (self.policy, self.policy_ema), self.observe(rows)
        return update_policy(*networks, self.policy_optimizer, obs, actions.cpu(), lr, self.args)

    def improve_critic(self, num_before, num_offline):
        """One critic update, after num_before others, on samples from the store.

        NOTE(differs): with --critic-ema-rate below 1 an average of critics acts and distils (released: the latest).
        """
        batch = self.draw_batch(num_offline)
        samples = self.samples_at(torch.cat([batch["state_rows"], batch["next_state_rows"]]))
        self.latest = batch["obs"], batch["codes"], samples[: self.args.batch_size]
        info = self.update_critic(self.critic, self.target_critic, self.critic_optimizer, batch, samples, self.args)
        rate = max(self.args.critic_ema_rate, 1 / (num_before + 1))  # at first the mean of all so far
        move_average(self.critic_ema, self.critic, rate)
        return info | {"opt/sample_age": self.store.age(batch["state_rows"])}

    def describe(self):
        """The opt columns of a row: what action optimisation does to samples of the latest batch."""
        images, codes, samples = self.latest
        with torch.no_grad():
            obs = self.critic_ema.encode(images, codes)
        return optimization_info(self.critic_ema, obs, samples, self.args)

    def as_obs(self, images, keys):  # (N, height, width, 3), the keys of common.run_episodes -> what the policy takes
        return {"image": images, "instruction": [self.told[seed] for seed, _ in keys]}

    def act_raw(self, images, keys):  # (N, height, width, 3) -> (N, A); keys seed the noise, see common.run_episodes
        obs = self.as_obs(images, keys)
        return self.policy_ema.sample(obs, 1, keys, self.args.sample_temperature)[:, 0].cpu().numpy()

    def act(self, images, keys):
        return act(self.policy_ema, self.critic_ema, self.as_obs(images, keys), self.args, keys).cpu().numpy()

    def explore(self, images, keys):  # noise from the run's own generator
        return act(self.policy_ema, self.critic_ema, self.as_obs(images, keys), self.args).cpu().numpy()

    def explore_raw(self, images, keys):
        return self.policy_ema.sample(self.as_obs(images, keys), 1)[:, 0].cpu().numpy()

    def collect(self, env, act, seed, before_step=lambda: None):
        """An episode, which is added to the online buffer. act, before_step: see common.run_episodes."""
        (episode,) = common.run_episodes([env], act, [seed], before_step=before_step)
        paid = episode["rewards"]
        if self.args.sparse_reward:  # success, at the end of the episode, is the only reward
            paid = np.zeros(len(episode["rewards"]), np.float32)
            paid[-1] = episode["success"]
        rewards, returns = common.learned_from(episode | {"rewards": paid}, self.args)
        self.online.add_episode(episode["observations"], episode["actions"], rewards, episode["masks"], returns)
        self.store.grow(self.dataset.num_states + self.online.num_states, self.told[seed])
        return episode


class ImageBuffer(common.ReplayBuffer):
    """The episodes of a run. Their images (S, height, width, 3) are in a file, to which each episode is appended once;
    the system keeps of it in memory what fits and is used. A checkpoint has the rest.
    """

    def __init__(self, shape, act_dim):
        super().__init__((), act_dim, np.uint8)  # its own `states` stay empty numbers
        self.shape, self.path, self.images = shape, None, None

    def open(self, path):
        """Keep images in `path`; what it has beyond those of the checkpoint is of an episode that was cut off."""
        self.path = path
        with common.writing(path), open(path, "ab") as file:
            size = file.tell()
            if size < self.num_states * math.prod(self.shape):
                there = f"{path.name} has {size // math.prod(self.shape)} images"
                raise InputError(f"--resume {path.parent}: {there}; expected its checkpoint's {self.num_states}")
            file.truncate(self.num_states * math.prod(self.shape))
        self.map()

    def map(self):
        shape = (self.num_states, *self.shape)
        self.images = np.memmap(self.path, np.uint8, "r", shape=shape) if self.num_states else np.zeros(shape, np.uint8)

    def add_episode(self, images, *per_step):
        with common.writing(self.path), open(self.path, "ab") as file:
            file.write(images.tobytes())
            file.flush()
            os.fsync(file.fileno())
        super().add_episode(np.zeros(len(images), np.uint8), *per_step)
        self.map()

    def sample(self, *how):
        batch = super().sample(*how)
        for name, rows in (("obs", batch["state_rows"]), ("next_obs", batch["next_state_rows"])):
            batch[name] = torch.from_numpy(np.array(self.images[rows.numpy()]))
        return batch


# ---------------------------------------- several processes ----------------------------------------


def ranks():
    """(rank, number) of this process among those of torchrun; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_ranks(args):
    """Meet the other processes of torchrun, where there are any. Raises InputError for what they cannot share."""
    number = int(os.environ.get("WORLD_SIZE", 1))
    if number == 1:
        return
    if not (args.run_dir or args.resume):
        raise InputError("--run-dir: expected a folder; with torchrun a restart goes on from the checkpoint in it")
    if args.batch_size % number:
        raise InputError(f"--batch-size {args.batch_size}: expected a multiple of the {number} processes")
    threading.Thread(target=stop_with_parent, args=(os.getppid(),), daemon=True).start()
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = datetime.timedelta(days=1)  # the others wait while rank 0 evaluates or a robot moves
    store, rank, _ = next(dist.rendezvous("env://"))
    # the store outlives a restart, with the addresses of those before
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=number, timeout=timeout)


def stop_with_parent(parent, grace=30):
    """Once `parent`, torchrun's process, is gone: stop as for SIGTERM, and what still waits then after `grace` seconds.
    Ranks that outlive it would move the robot of those that take their place."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os._exit(143)


def serve(args, device):
    """What ranks above 0 do, with neither environment, data nor critic: their share of each task of rank 0."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 stops, and says when all is done
    policy = None
    while announced := announce(None):
        task, *inputs = announced
        if task == "load":
            policy = load_policy(*inputs, args, device)
        else:
            send_weights(policy)
            task(policy, *inputs)
    leave_ranks()
    return Path(args.run_dir or args.resume)


def announce(value):
    """Rank 0's object, on every rank."""
    values = [value]
    if ranks()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def dismiss_ranks():
    """Rank 0, where the others wait for a task: end their `serve`."""
    announce(None)
    leave_ranks()


def leave_ranks():
    """End the process group. All are there once more: then the threads of none hold what was sent before, which they
    could not let go of while Python shuts down."""
    if ranks()[1] > 1:
        dist.barrier()
        dist.destroy_process_group()


def together(task, policy, *inputs):
    """Rank 0: task(policy, *inputs), of which each rank does its share, with this policy's weights."""
    if ranks()[1] > 1:
        announce((task, *inputs))
        send_weights(policy)
    return task(policy, *inputs)


def send_weights(policy):
    """Give every rank's policy the trained weights of rank 0's."""
    for parameter in trained(policy):
        dist.broadcast(parameter.detach(), 0)


def trained(policy):
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def own_rows(obs):
    """This rank's rows of observations."""
    rank, num_ranks = ranks()
    return {name: value[rank::num_ranks] for name, value in obs.items()}


def sample_share(policy, obs, num_samples, seeds):
    """policy.sample with seeds, each rank at its share of the rows -> (B, K, A)."""
    rank, num_ranks = ranks()
    if num_ranks == 1:
        return policy.sample(obs, num_samples, seeds)
    drawn = torch.zeros(len(seeds), num_samples, policy.act_dim, device=policy.device)
    if mine := seeds[rank::num_ranks]:
        drawn[rank::num_ranks] = policy.sample(own_rows(obs), num_samples, mine)
    dist.all_reduce(drawn)  # the sum: each row is one rank's
    return drawn


def loss_share(policy, obs, actions):
    """The policy's loss, its gradient in .grad: each rank's on its share of the rows, then the mean over ranks."""
    rank, num_ranks = ranks()
    policy.zero_grad()
    loss = policy.loss(own_rows(obs), actions[rank::num_ranks]) / num_ranks
    loss.backward()
    loss = loss.detach()
    if num_ranks > 1:
        for part in (loss, *(parameter.grad for parameter in trained(policy))):
            dist.all_reduce(part)  # the sum
    return loss


# ---------------------------------------- the environment ----------------------------------------


class PolicyEnv(gym.ActionWrapper):
    """An environment of envs.make that takes actions as the policy means them, in [-1, 1]: what they stand for in the
    environment's units, cut to its bounds, is what is sent. What each episode is told, as args say, is kept in the dict
    `told`, by the seed of its reset.

    NOTE(differs): actions are optimised in the units of the policy's tokens (released: of the action's std).
    """

    def __init__(self, env, policy, told, args):
        super().__init__(env.env if isinstance(env, gym.wrappers.RescaleAction) else env)
        space = self.env.action_space
        self.policy, self.low, self.high, self.action_space = policy, space.low, space.high, env.action_space
        self.told, self.args = told, args

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        self.told[seed] = instruction_of(self.env, self.args, info)
        self.policy.prompt(self.told[seed])  # raises an error where it is too long
        return obs, info

    def action(self, action):
        return self.policy.unnormalize(np.float64(action)).clip(self.low, self.high).astype(self.low.dtype)

    def reverse_action(self, actions):
        """A dataset's actions (N, A), which envs.load_dataset has rescaled to [-1, 1], in the policy's units."""
        units = self.low + (actions + 1) / 2 * (self.high - self.low)
        return self.policy.normalize(units).astype(np.float32)


def instruction_of(env, args, info=None):
    """--instruction, or what the environment says, in the info of a reset or as its attribute; without info it is reset
    if need be. Raises InputError where it says nothing."""
    own = env.get_wrapper_attr("instruction") if env.has_wrapper_attr("instruction") else ""
    if info is None:
        info = {} if args.instruction or own else env.reset(seed=args.seed)[1]
    told = args.instruction or info.get("instruction") or own
    if not told:
        raise InputError(
            f"--env-id {args.env_id}: has no instruction, as an attribute or in a reset's info; expected --instruction"
        )
    return told


def check(args):
    """Raises InputError, naming the flag, for what cannot run here."""
    for name in ("targets_per_image", "images_per_forward", "critic_image_size", "encoding_width"):
        common.check_flag(args, name, 1)
    if not args.encoder_widths or min(args.encoder_widths) < 1:
        raise InputError(f"--encoder-widths {args.encoder_widths}: expected one or more widths of at least 1")
    if args.sparse_reward and not (args.reward_bias < 0 and round(args.reward_scale + args.reward_bias, 6) == 0):
        given = f"--reward-scale {args.reward_scale:g} --reward-bias {args.reward_bias:g}"
        expected = "expected a bias below 0 of minus the scale, and data that pay 1 at success"
        raise InputError(f"{given}: with --sparse-reward success pays 1 and all else 0; {expected}")
    if args.unnorm_key and not args.checkpoint:
        raise InputError(f"--unnorm-key {args.unnorm_key}: names statistics of a checkpoint; expected --checkpoint")
    if args.checkpoint and not args.lora_rank and args.dtype != "float32":
        raise InputError("--lora-rank 0: small steps are lost in bfloat16 weights; expected --dtype float32 with it")
    if args.warmup_episodes and args.dataset_path is not None:
        raise InputError("--warmup-episodes: takes the place of a dataset; expected no --dataset-path beside it")
    if args.warmup_episodes and not (args.checkpoint or args.policy_checkpoint):
        raise InputError("--warmup-episodes: trials of a policy as it is; expected --checkpoint or --policy-checkpoint")


if __name__ == "__main__":
    if int(os.environ.get("RANK", 0)):  # of torchrun's processes the first speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    own_checkpoint = any(flag.startswith("--checkpoint") for flag in sys.argv)  # the presets are for the tiny model
    common.main(train, Args, {} if own_checkpoint else PRESETS, __doc__)
