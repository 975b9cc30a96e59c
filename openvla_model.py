"""PA-RL in one file: offline RL and online fine-tuning of a policy that is never differentiated through its critic.

Policy-Agnostic RL (Mark et al., 2024, https://arxiv.org/abs/2412.06685) improves any policy that can be sampled and
cloned. The policy here is OpenVLA-7B (Kim et al., 2024, https://arxiv.org/abs/2406.09246): two vision transformers see
the image, a projector turns their patches into words, and Llama 2 reads them with the instruction and writes one token
per action dimension. The whole model is here in plain PyTorch, under the names of the released checkpoint, so that its
files load as they are. This file holds the POLICY section alone.

    shape letters    B  batch of images          P  positions of the prefix: image and prompt, padded
                     K  actions per image        L  any number of positions
                     R  targets per image        W  width of a layer's input
                     A  action dimensions        D  width of an attention head
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.utils.checkpoint import checkpoint

import common
from common import InputError


@dataclass
class Args:
    """What the policy reads; the defaults are the paper's for OpenVLA."""

    checkpoint: str = ""  # a folder, or a name on the Hugging Face hub (openvla/openvla-7b); empty: a tiny new model
    unnorm_key: str = ""  # whose action statistics in the checkpoint to use; needed where it has several
    seed: int = 0  # of everything random
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    num_samples: int = 8  # actions drawn from the policy per state (K)
    # policy
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of a checkpoint's weights; what LoRA adds is float32
    lora_rank: int = 32  # of what is trained beside a checkpoint's weights; 0, or without one: train every weight
    lora_alpha: float = 16.0  # it is scaled by alpha / rank
    gradient_checkpointing: bool = False  # compute each block again in the backward pass: less memory, a third slower
    targets_per_image: int = 1  # actions distilled per image, behind one prefix (R)
    images_per_forward: int = 16  # images sampled from at a time


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
    dino=VisionSizes(64, 3, 4, 256, num_registers=4), siglip=VisionSizes(96, 3, 4, 384),
    image_size=64, patch_size=8, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=344,
    vocab_size=576, space_token=32,
)  # fmt: skip

PROMPT = "In: What action should the robot take to {}?\nOut:"
BOS, EOS, ACTION_BINS = 1, 2, 256
EDGES = np.linspace(-1, 1, ACTION_BINS)  # of the intervals that action tokens stand for
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # SigLIP: 0.5 and 0.5


def draw(probs, uniform):
    """Draws from probs (R, bins), N per row: uniform (R, N) in [0, 1] -> the first indices (R, N) at which the sum of
    probabilities exceeds it."""
    return torch.searchsorted(probs.cumsum(-1), uniform.contiguous(), right=True).clamp(max=probs.shape[-1] - 1)


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


def run_blocks(blocks, h, *inputs, checkpointing):
    """h through the blocks one after the other; with checkpointing, keeping only each one's input for the gradient."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            h = checkpoint(block, h, *inputs, use_reentrant=False)
        else:
            h = block(h, *inputs)
    return h


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
        return run_blocks(self.blocks, h, checkpointing=self.checkpointing)[:, self.num_skipped :]


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

        The last S of them see the keys that mask (B, 1, S, start + L) allows; those before are the prefix, in which
        each sees itself and what is before it. cache (2, B, heads, >= start + L, D): keys and values of the positions
        before `start`, to which those of h are added in place.
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
        mixed = self.attend(q, k, v, mask)
        h = h + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(h)
        return h + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))

    @staticmethod
    def attend(q, k, v, mask):
        num_prefix, parts = q.shape[2] - (0 if mask is None else mask.shape[2]), []
        if num_prefix:
            prefix = (x[:, :, :num_prefix] for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*prefix, is_causal=True))
        if mask is not None:
            parts.append(F.scaled_dot_product_attention(q[:, :, num_prefix:], k, v, attn_mask=mask))
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]


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

    def __init__(self, act_dim, args, sizes=TINY, statistics=None, tokenizer=None):
        super().__init__()
        self.act_dim, self.sizes, self.tokenizer = act_dim, sizes, tokenizer
        self.statistics = statistics or {"q01": [-1] * act_dim, "q99": [1] * act_dim, "mask": [False] * act_dim}
        self.checkpointing, self.images_per_forward = args.gradient_checkpointing, args.images_per_forward
        self.last_action = sizes.vocab_size - sizes.pad_to_multiple_of  # action tokens are the 256 before this one
        width, image = sizes.hidden_size, (sizes.image_size, sizes.patch_size, args.gradient_checkpointing)
        self.vision_backbone = nn.ModuleDict(
            {
                "featurizer": VisionTransformer(sizes.dino, *image),
                "fused_featurizer": VisionTransformer(sizes.siglip, *image),
            }
        )
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
        num_patches = self.vision_backbone["featurizer"].pos_embed.shape[1]
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
        layers = self.language_model["model"]["layers"]
        if caches is None:
            return run_blocks(layers, h, *turn, mask, checkpointing=self.checkpointing)
        for layer, cache in zip(layers, caches, strict=True):
            h = layer(h, *turn, mask, cache, start)
        return h

    @torch.no_grad()
    def sample(self, obs, num_samples, seeds=None):
        """Observations -> actions (B, K, A). With `seeds`, B tuples of integers, row i's noise comes from seeds[i]."""
        shape = (len(obs["instruction"]), num_samples, self.act_dim)
        uniform = torch.special.ndtr(common.seeded_normal(shape, seeds, self.device))
        tokens = []
        for start in range(0, len(uniform), self.images_per_forward):
            rows = slice(start, start + self.images_per_forward)
            tokens.append(self.sample_tokens({name: value[rows] for name, value in obs.items()}, uniform[rows]))
        return self.detokenize(torch.cat(tokens))

    def sample_tokens(self, obs, uniform):
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
        h, tokens = (
            h[torch.arange(B, device=h.device), lengths - 1][:, None],
            [],
        )  # (B, 1, W): what all samples have read
        for d in range(A):
            probs = torch.softmax(F.linear(model["norm"](h), action_rows).float(), -1)  # (B, 1 or K, 256)
            probs = probs.expand(B, K, -1).flatten(0, 1)
            token = draw(probs, uniform[:, :, d].reshape(-1, 1)).view(B, K) + first
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
        h = self.read(h, positions, suffix_mask(lengths, P, R, A))
        first = h[torch.arange(B, device=h.device), lengths - 1][:, None].expand(
            -1, R, -1
        )  # predicts the first token of each target
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
        """Arrays (..., A) in the environment's units -> [-1, 1]: the inverse of `unnormalize`, clipped."""
        low, high = np.array(self.statistics["q01"]), np.array(self.statistics["q99"])
        scaled = 2 * (actions - low) / (high - low + 1e-8) - 1
        return np.where(self.statistics["mask"], scaled, actions).clip(-1, 1)


# ---------------------------------------- the policy's files ----------------------------------------


def load_policy(act_dim, args, device):
    """The policy of --checkpoint on `device`, or a tiny new one. Raises InputError naming the file or tensor."""
    if not args.checkpoint:
        return OpenVLAPolicy(act_dim, args).to(device)
    folder = checkpoint_folder(args.checkpoint)
    sizes, statistics = read_config(folder, args.unnorm_key)
    if len(statistics["q01"]) != act_dim:
        raise InputError(
            f"--unnorm-key {args.unnorm_key}: --checkpoint {folder} was trained on actions of "
            f"{len(statistics['q01'])} dimensions; expected the environment's {act_dim}"
        )
    with torch.device("meta"):  # shapes alone
        policy = OpenVLAPolicy(act_dim, args, sizes, statistics, read_tokenizer(folder))
    num_parameters = sum(parameter.numel() for parameter in policy.parameters())
    if device.type == "cpu" and num_parameters > 1e9:
        raise InputError(
            f"--checkpoint {folder}: {num_parameters / 1e9:.1f}e9 parameters; expected --device cuda with "
            f"{2e-9 * num_parameters:.0f} GB of memory for them in bfloat16, and more for what is computed"
        )
    load_weights(policy, folder, getattr(torch, args.dtype), device)
    if args.lora_rank:
        policy.add_lora(args.lora_rank, args.lora_alpha)
    return policy


def checkpoint_folder(name):
    """The folder `name`, or that of the Hugging Face hub's repository of this name, downloaded on first use."""
    if Path(name).is_dir():
        return Path(name)
    import huggingface_hub  # slow to import, needed here alone

    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"--checkpoint {name}: no such folder, and no download from the hub: {first_line(error)}"
        ) from error
    except huggingface_hub.errors.HFValidationError as error:
        raise InputError(f"--checkpoint {name}: expected a folder, or a hub name such as openvla/openvla-7b") from error


def first_line(error):
    return str(error).strip().split("\n")[0]


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--checkpoint {path.parent}: cannot read {path.name} ({error})") from error


def read_config(folder, unnorm_key):
    """A checkpoint's config.json -> Sizes, and the action statistics of the dataset `unnorm_key`.

    A dataset_statistics.json beside a fine-tuned checkpoint counts instead of the config's.
    """
    config = read_json(folder / "config.json")
    expected = {"vision_backbone_id": "dinosiglip-vit-so-224px", "n_action_bins": ACTION_BINS}
    for name, value in expected.items():
        if config.get(name) != value:
            raise InputError(f"--checkpoint {folder}: config.json has {name} {config.get(name)}; expected {value}")
    known = {field.name for field in dataclasses.fields(Sizes)}
    text_config = {name: value for name, value in config.get("text_config", {}).items() if name in known}
    sizes = dataclasses.replace(OPENVLA_7B, **text_config, pad_to_multiple_of=config.get("pad_to_multiple_of", 64))
    fine_tuned = folder / "dataset_statistics.json"
    statistics = read_json(fine_tuned) if fine_tuned.exists() else config.get("norm_stats") or {}
    if not unnorm_key and len(statistics) == 1:
        (unnorm_key,) = statistics
    if unnorm_key not in statistics:
        raise InputError(f"--unnorm-key {unnorm_key or '(none)'}: expected one of {', '.join(sorted(statistics))}")
    actions = statistics[unnorm_key]["action"]
    return sizes, {"mask": [True] * len(actions["q01"]), **actions}


def read_tokenizer(folder):
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"--checkpoint {folder}: no tokenizer.json there; expected the one of OpenVLA")
    return Tokenizer.from_file(str(path))


def shards(folder):
    """The safetensors files of a checkpoint: {name of tensor: path}."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / shard for name, shard in read_json(index)["weight_map"].items()}
    path = folder / "model.safetensors"
    with open_safetensors(path, "cpu") as file:
        return dict.fromkeys(file.keys(), path)


def open_safetensors(path, device):
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (OSError, SafetensorError) as error:
        raise InputError(f"--checkpoint {path}: cannot be read as safetensors ({first_line(error)})") from error


def load_weights(policy, folder, dtype, device):
    """Read a checkpoint's tensors into the policy, one file after the other, straight to the device. Tensors that the
    model does not use are skipped. Raises InputError for one that is missing or of another shape."""
    where, expected, tensors = shards(folder), policy.state_dict(), {}
    if missing := [name for name in expected if name not in where]:
        raise InputError(f"--checkpoint {folder}: tensor {missing[0]} is missing, one of {len(missing)}")
    for path in sorted({where[name] for name in expected}):
        with open_safetensors(path, device) as file:
            held = set(file.keys())
            for name in (name for name in expected if where[name] == path):
                if name not in held:
                    raise InputError(f"--checkpoint {path}: tensor {name} is missing, though the index has it there")
                shape = file.get_slice(name).get_shape()
                if shape != list(expected[name].shape):
                    raise InputError(
                        f"--checkpoint {path}: tensor {name} has shape {shape}; expected {list(expected[name].shape)}"
                    )
                tensors[name] = file.get_tensor(name).to(dtype)
    policy.load_state_dict(tensors, assign=True)


def save_adapters(policy, path):
    """Write what LoRA adds, and nothing else, to a safetensors file."""
    adapters = {name: value.detach().cpu() for name, value in policy.named_parameters() if "lora_" in name}
    scale = policy.projector.fc1.lora_scale
    partial = Path(path).with_suffix(".partial")
    save_file(adapters, partial, metadata={"scale": repr(scale)})
    partial.replace(path)


def read_adapters(path):
    """(tensors by name, alpha / rank) of a file by save_adapters. Raises InputError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            names, scale = file.keys(), float(file.metadata()["scale"])
            return {name: file.get_tensor(name) for name in names}, scale
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise InputError(f"adapters {path}: expected a file by save_adapters ({first_line(error)})") from error


def load_adapters(policy, path):
    """Read a file by save_adapters into a policy with LoRA of the same rank and alpha. Raises InputError."""
    adapters, scale = read_adapters(path)
    own = {name: value for name, value in policy.named_parameters() if "lora_" in name}
    for name in sorted(own.keys() | adapters.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else None for tensors in (adapters, own)]
        if shapes[0] != shapes[1]:
            raise InputError(f"adapters {path}: tensor {name} has shape {shapes[0]}; expected {shapes[1]}")
    if own and scale != policy.projector.fc1.lora_scale:
        raise InputError(
            f"adapters {path}: alpha / rank is {scale}; expected {policy.projector.fc1.lora_scale} (--lora-alpha)"
        )
    policy.load_state_dict(adapters, strict=False)


def merge_adapters(checkpoint_path, adapters_path, target):
    """Write the checkpoint in a folder with a file of adapters added to its weights, in the released layout: the same
    files, shards, names and types, to the new folder `target`. One shard at a time is in memory. Raises InputError."""
    folder, target, (adapters, scale) = Path(checkpoint_path), Path(target), read_adapters(adapters_path)
    if target.exists():
        raise InputError(f"{target}: exists; expected a new folder for the merged checkpoint")
    where = shards(folder)
    layers = {name.removesuffix(".lora_a") for name in adapters if name.endswith(".lora_a")}
    if strangers := [layer for layer in sorted(layers) if f"{layer}.weight" not in where]:
        raise InputError(f"adapters {adapters_path}: {folder} has no {strangers[0]}.weight; expected its adapters")
    partial = target.with_name(f"{os.getpid()}-{target.name}")
    partial.mkdir(parents=True)
    for path in sorted(set(where.values())):
        tensors = load_file(path)
        for layer in layers & {name.removesuffix(".weight") for name in tensors}:
            weight = tensors[f"{layer}.weight"]
            added = scale * adapters[f"{layer}.lora_b"] @ adapters[f"{layer}.lora_a"]
            tensors[f"{layer}.weight"] = (weight.float() + added).to(weight.dtype)
        save_file(tensors, partial / path.name, metadata={"format": "pt"})
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, partial)
    partial.rename(target)
