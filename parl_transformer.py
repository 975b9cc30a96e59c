"""PA-RL in one file: offline RL and online fine-tuning of a policy that is never differentiated through its critic.

Policy-Agnostic RL (Mark et al., 2024, https://arxiv.org/abs/2412.06685) improves any policy that can be sampled and
cloned. A critic is learned with Cal-QL (Nakamoto et al., 2023). Wherever an actor-critic method would want a better
action than the policy's, PA-RL makes one:

    1. sample     K actions from the policy
    2. re-rank    keep the M that the critic values most                              (global optimisation)
    3. ascend     move each kept action T steps up the critic's action gradient       (local optimisation)
    4. choose     the best, for the TD target; a draw from softmax(Q), to learn from; to act either (--act-draw)
    5. distil     the policy's own supervised loss on the chosen action: no gradient passes from critic to policy

in three phases: behaviour cloning; offline RL (the critic learns, the policy is frozen); online fine-tuning (collect an
episode with optimised actions, distil, update the critic). The algorithm asks two things of a policy: `sample`, `loss`.

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
    h       action_chunk         environment steps that one decision covers: to the algorithm, one longer action

NOTE(differs) marks departures. "(released: X)": the authors' code does X. "(as in the released code)": it departs from
the paper in the same way. docs/algorithm.md lists them all.

Shapes: B batch of states, O observation dimension, A action dimension, N any number of actions per state, bins of the
value distribution.

The policy here is a causal transformer (GPT-2, Radford et al., 2019) with one of two heads: `tokens` draws the action's
dimensions one after the other, each from `action_bins` values; `continuous` is a mixture of normal distributions.

    python parl_transformer.py    # pointmaze-umaze-play: to 100 % success in minutes on a laptop CPU; see README.md
"""

import atexit
import copy
import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

# Read when torch is loaded: how long its threads wait awake for each other. Its default is slow beside other programs.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn as nn
import torch.nn.functional as F

import common
from common import InputError


@dataclass
class Args(common.RunArgs):
    """The method's flags, beside those of every run (see common.RunArgs). Defaults are the paper's for D4RL."""

    # phases
    bc_steps: int = 3_000_000  # gradient steps of behaviour cloning
    offline_steps: int = 1_000_000  # critic updates of offline RL; 0: none
    online_steps: int | None = None  # environment steps of fine-tuning (the last episode is finished); 0: offline only
    online_episodes: int | None = 1000  # episodes, or online_steps if sooner; either given alone drops the other
    batch_size: int = 256  # transitions per update (B)
    # rewards
    discount: float = 0.99  # gamma, per environment step
    reward_scale: float = 1.0  # what is learned from is reward * scale + bias
    reward_bias: float = 0.0  # see --reward-scale
    sparse_reward: bool = False  # each step costs until success, which pays 0 and ends the episode
    action_chunk: int = 1  # steps that one decision of the policy covers (h); its actions are of h * A dimensions
    # critic
    target_rate: float = 0.005  # share of the critic that enters its target per update
    critic_lr: float = 3e-4  # Adam
    critic_ema_rate: float = 1.0  # share of the critic that enters the average that acts, per update; 1: no averaging
    hidden_dims: tuple[int, ...] = (256, 256)  # widths of the critic's hidden layers
    ensemble_size: int = 10  # critics (E)
    critic_subset: int = 2  # members drawn for the TD target's minimum, and again for CQL
    num_bins: int = 128  # bins of the value distribution (HL-Gauss); 0: scalar values, squared error
    q_min: float | None = None  # lowest value; None: min(r, 0) / (1 - discount) over the data
    q_max: float | None = None  # highest value; None: max(r, 0) / (1 - discount) over the data, 0 for sparse rewards
    cql_weight: float = 0.005  # weight of the CQL term, which values actions that are not the data's lower
    cql_n_actions: int = 10  # uniform actions in it, and how often each policy action counts (n)
    # action optimisation
    num_samples: int = 32  # actions drawn from the policy per state (K)
    num_keep: int = 10  # of which the critic keeps the best (M)
    num_gradient_steps: int = 10  # local optimisation steps (T); 0: re-ranking only
    action_lr: float = 3e-4  # their step size (alpha)
    act_draw: bool = False  # act with a draw from softmax(Q), like the one to learn from, instead of the best
    sample_cache_gb: float = 1.0  # memory for samples of the frozen policy; 0: drawn anew each time, as released
    # online fine-tuning
    policy_utd: int = 1  # distillation steps per environment step ("updates to data")
    critic_utd: int = 1  # critic updates per environment step
    offline_ratio: float = 0.5  # dataset's share of a critic batch (of a distillation batch: by size); 0: of neither
    offline_distill_steps: int = 0  # distillation at the end of offline RL, for a policy that acts without a critic
    distill_argmax: bool = False  # distil the best candidate instead of a draw from softmax(Q)
    normalize_obs: bool = True  # by the dataset's mean and std; --no-normalize-obs: as released
    # policy
    bc_lr: float = 1e-4  # Adam in behaviour cloning, cosine to 0
    distill_lr: float = 1e-4  # Adam in distillation
    policy_warmup_steps: int = 2000  # linear warm-up of either, at most 10 % of the phase
    policy_ema_rate: float = 0.005  # share of the policy that enters its running average per step; 1: no averaging
    width: int = 256  # of the residual stream
    num_layers: int = 4  # transformer blocks
    num_heads: int = 8  # attention heads
    dropout: float = 0.1  # of attention, of what each block adds and of its input, while training
    head: Literal["tokens", "continuous"] = "tokens"  # autoregressive tokens, or a mixture of tanh-normals
    action_bins: int = 128  # values per action dimension of --head tokens
    num_components: int = 5  # of the mixture of --head continuous


LAPTOP = dict(  # for a laptop's CPU
    num_threads=1, eval_every=2000, log_every=250,
    bc_steps=10_000, offline_steps=4000, online_steps=4000, online_episodes=None, batch_size=64,
    target_rate=0.05, critic_lr=1e-3, critic_ema_rate=0.005, hidden_dims=(128, 128), ensemble_size=2, cql_weight=0.1,
    num_samples=8, num_keep=3, num_gradient_steps=1, action_lr=5e-3, act_draw=True,
    bc_lr=1e-3, distill_lr=1e-4, policy_ema_rate=0.003, width=64, num_layers=2, objective="flow",
)  # fmt: skip
ANTMAZE = LAPTOP | dict(
    sparse_reward=True, reward_bias=-1.0, discount=0.998, action_chunk=5, eval_every=5000, log_every=500,
    bc_steps=20_000, offline_steps=15_000, online_steps=6000,
    critic_ema_rate=0.002, hidden_dims=(256, 256), cql_weight=0.02, width=128,
)  # fmt: skip

# common.main starts from --preset, else from that of the family of --env-id; a flag that is given wins.
PRESETS = {
    "small": LAPTOP | dict(offline_steps=10_000, hidden_dims=(256, 256)),  # for tasks that no other preset knows
    "pointmaze": LAPTOP | dict(
        sparse_reward=True, reward_bias=-1.0, discount=0.98, eval_every=500, log_every=100,
        bc_steps=8000, offline_steps=2000, online_steps=500, batch_size=128, target_rate=0.02, critic_ema_rate=0.01,
        distill_lr=3e-4, policy_ema_rate=0.01,
    ),
    "pointmaze_large": LAPTOP | dict(  # medium and large
        sparse_reward=True, reward_bias=-1.0, discount=0.98, eval_every=1000, log_every=100,
        bc_steps=8000, offline_steps=4000, online_steps=1500, batch_size=128, target_rate=0.01, hidden_dims=(256, 256),
    ),
    "metaworld": LAPTOP | dict(sparse_reward=True, reward_bias=-1.0),
    "ogbench": LAPTOP | dict(
        sparse_reward=True, bc_steps=20_000, offline_steps=10_000, hidden_dims=(256, 256), cql_weight=0.3, width=128,
    ),
    "antmaze": ANTMAZE,
    "minari_maze": ANTMAZE,
    "paper": {},  # the defaults of Args alone, where a family has a preset; what its rewards need is to be given
    "antmaze_paper": dict(sparse_reward=True, reward_bias=-1.0, hidden_dims=(256, 256, 256, 256)),
    # NOTE(differs): kitchen's values reach down to -400, what its rewards can add up to (released: -100).
    "kitchen": dict(reward_bias=-4.0, q_min=-400.0, q_max=0.0),  # pays 0 to 4 per step; the paper's sizes
}  # fmt: skip


# ======================================== POLICY ========================================


def draw(probs, uniform):
    """Draws from probs (R, bins), N per row: uniform (R, N) in [0, 1] -> the first indices (R, N) at which the sum of
    probabilities reaches it. The sum ends a rounding error beside 1, so it is the sum that uniform is a share of."""
    sums = probs.cumsum(-1)
    return torch.searchsorted(sums, uniform * sums[:, -1:])


class Block(nn.Module):
    """A pre-LayerNorm transformer block (GPT-2): causal self-attention, then a four times as wide layer, each added."""

    def __init__(self, args):
        super().__init__()
        self.num_heads, self.dropout = args.num_heads, nn.Dropout(args.dropout)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(args.width), nn.LayerNorm(args.width)
        self.qkv, self.project = nn.Linear(args.width, 3 * args.width), nn.Linear(args.width, args.width)
        self.expand, self.contract = nn.Linear(args.width, 4 * args.width), nn.Linear(4 * args.width, args.width)
        for layer in (self.qkv, self.project, self.expand, self.contract):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, h, cache=None):
        """h (R, L, W) of R sequences -> h (R, L, W), and the keys and values of all positions so far, for the next
        call's `cache`: with one, h is the single position that follows."""
        qkv = self.qkv(self.attention_norm(h)).unflatten(-1, (3, self.num_heads, -1))  # (R, L, 3, heads, W / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (R, heads, L, W / heads)
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        dropped = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=cache is None)
        h = h + self.dropout(self.project(mixed.transpose(1, 2).flatten(2)))  # (R, L, W)
        h = h + self.dropout(self.contract(F.gelu(self.expand(self.mlp_norm(h)), approximate="tanh")))
        return h, (k, v)


class TransformerPolicy(nn.Module):
    """A causal transformer whose position d, of A, predicts action dimension d; position 0 holds the observation.

    --head tokens: each dimension is one of `action_bins` values, and position d > 0 holds the one before.
    --head continuous: a mixture of `num_components` tanh-normals over the whole action: each component has a mean and
    a standard deviation per dimension, and its weight is the sum of the positions' votes.
    """

    # must be a checkpoint's own: its weights mean nothing with others
    fixed_flags = ("width", "num_layers", "num_heads", "head", "action_bins", "num_components")

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        for name in ("width", "num_layers", "num_heads", "num_components"):
            common.check_flag(args, name, 1)
        common.check_flag(args, "action_bins", 2)
        common.check_flag(args, "dropout", 0, 1)
        if args.width % args.num_heads:
            raise InputError(f"--width {args.width}: expected a multiple of --num-heads {args.num_heads}")
        self.act_dim, self.tokens = act_dim, args.head == "tokens"
        self.embed_obs = nn.Sequential(
            nn.Linear(obs_dim, 4 * args.width), nn.ELU(), nn.Linear(4 * args.width, args.width)
        )
        self.positions = nn.Parameter(0.02 * torch.randn(act_dim, args.width))
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.num_layers))
        self.norm = nn.LayerNorm(args.width)
        outputs = args.action_bins if self.tokens else 3 * args.num_components
        self.output = nn.Sequential(nn.Linear(args.width, args.width), nn.ELU(), nn.Linear(args.width, outputs))
        if self.tokens:  # a table for each dimension but the last, which nothing follows
            self.embed_tokens = nn.Parameter(0.02 * torch.randn(act_dim - 1, args.action_bins, args.width))
            self.register_buffer("values", torch.linspace(-1, 1, args.action_bins), persistent=False)

    def forward(self, obs, tokens=None):
        """What position d says of action dimension d: obs (B, O) -> (B, A, outputs). --head tokens: of (B, A) tokens,
        each position sees those of the dimensions before it."""
        h = self.embed_obs(obs)[:, None]  # (B, 1, W)
        if self.tokens:
            first = len(self.values) * torch.arange(self.act_dim - 1, device=obs.device)  # row of a dimension's table
            h = torch.cat([h, F.embedding(tokens[:, :-1] + first, self.embed_tokens.flatten(0, 1))], 1)  # (B, A, W)
        else:
            h = F.pad(h, (0, 0, 0, self.act_dim - 1))  # (B, A, W): position d > 0 holds nothing but its place
        h = self.dropout(h + self.positions)
        for block in self.blocks:
            h, _ = block(h)
        return self.output(self.norm(h))

    def mixture(self, obs):
        """--head continuous, with C components: obs (B, O) -> log weights (B, C), means and log stds (B, A, C)."""
        votes, means, log_stds = self(obs).chunk(3, -1)
        return torch.log_softmax(votes.sum(1), -1), means, log_stds.clamp(-5, 2)

    @torch.no_grad()
    def sample(self, obs, num_samples, seeds=None):
        """obs (B, O) -> actions (B, K, A). With `seeds`, B tuples of integers, row i's noise comes from seeds[i].

        NOTE(differs): a transformer is sampled with dropout off and from its running average (released: neither).
        """
        if self.tokens:
            noise = common.seeded_normal((len(obs), num_samples, self.act_dim), seeds, obs.device)
            states = 2**20 // (num_samples * self.blocks[0].expand.out_features)  # a hidden layer of 4 MB
            parts = common.cache_sized(states, obs, torch.special.ndtr(noise))
            return torch.cat([self.sample_tokens(*part) for part in parts])
        noise = common.seeded_normal((len(obs), num_samples, self.act_dim + 1), seeds, obs.device)
        log_weights, means, log_stds = self.mixture(obs)
        component = draw(log_weights.exp(), torch.special.ndtr(noise[..., 0]))  # (B, K)
        pick = component[:, None].expand(-1, self.act_dim, -1)  # (B, A, K)
        mean, log_std = means.gather(2, pick).mT, log_stds.gather(2, pick).mT  # (B, K, A)
        return torch.tanh(mean + log_std.exp() * noise[..., 1:])

    def sample_tokens(self, obs, uniform):
        """One dimension after the other; uniform (B, K, A) in [0, 1] decides. The observation is read once per state:
        its keys and values serve all K samples. obs (B, O) -> actions (B, K, A).

        NOTE(differs): each dimension has its own noise and each position is computed once (released: neither).
        """
        rows, K = uniform.flatten(0, 1), uniform.shape[1]  # (B * K, A)
        h, caches, actions = self.embed_obs(obs)[:, None], [None] * len(self.blocks), []
        for d in range(self.act_dim):
            h = h + self.positions[d]  # (B, 1, W) for d = 0, then (B * K, 1, W)
            for i, block in enumerate(self.blocks):
                h, caches[i] = block(h, caches[i])
            probs = torch.softmax(self.output(self.norm(h[:, 0])), -1)
            if d == 0:
                probs = probs.repeat_interleave(K, 0)  # (B * K, bins)
                caches = [[x.repeat_interleave(K, 0) for x in cache] for cache in caches]
            token = draw(probs, rows[:, d, None])[:, 0]  # (B * K,)
            actions.append(self.values[token])
            if d < self.act_dim - 1:
                h = self.embed_tokens[d, token][:, None]
        return torch.stack(actions, -1).unflatten(0, (-1, K))

    def tokenize(self, actions):
        """The nearest of the `action_bins` values: actions (..., A) in [-1, 1] -> integers (..., A)."""
        return ((actions + 1) / 2 * (len(self.values) - 1)).round().long()

    def loss(self, obs, actions):
        """Negative log-likelihood, summed over A and averaged over B: obs (B, O), actions (B, A) -> scalar.

        Tokens: cross-entropy. Continuous: p(a) = sum_c w_c prod_d N(x_d; mean_dc, std_dc) / (1 - a_d^2), x = atanh(a);
        actions are first clipped to where x is finite, and 1 - tanh(x)^2 is 4 e^-2x / (1 + e^-2x)^2, exact near 0.
        NOTE(differs): a transformer's dropout mask changes between updates (released: it does not).
        """
        if self.tokens:
            tokens = self.tokenize(actions)
            log_probs = torch.log_softmax(self(obs, tokens), -1)  # (B, A, bins)
            return -log_probs.gather(-1, tokens[..., None]).sum((1, 2)).mean()
        log_weights, means, log_stds = self.mixture(obs)
        x = torch.atanh(actions.clamp(-0.99999, 0.99999))[..., None]  # (B, A, 1)
        log_normal = -0.5 * ((x - means) / log_stds.exp()).square() - log_stds - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - x - F.softplus(-2 * x))
        return -torch.logsumexp(log_weights + (log_normal - log_slope).sum(1), -1).mean()


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


class Critic(nn.Module):
    """E value functions Q_e(s, a), a batch dimension of the weights: dense, LayerNorm, SiLU; then a head whose
    distribution over `num_bins` bins has the value as its mean.

    NOTE(differs): all members of the ensemble share one output head (as in the released code).
    """

    fixed_flags = ("num_bins", "q_min", "q_max")  # must be a checkpoint's own: its weights mean nothing with others

    def __init__(self, obs_dim, act_dim, args):
        super().__init__()
        widths, E, outputs = [obs_dim + act_dim, *args.hidden_dims], args.ensemble_size, max(args.num_bins, 1)
        self.weights = nn.ParameterList(torch.empty(E, *shape) for shape in pairwise(widths))
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

    def forward(self, obs, actions, members=None):
        """obs (B, O), actions (B, N, A) -> q (E, B, N), logits (E, B, N, bins) or None for a scalar critic.

        members (E',): evaluate these members only, in this order.
        """
        B, N, A = actions.shape
        pick = (lambda parameter: parameter) if members is None else (lambda parameter: parameter[members])
        # first layer: W [obs, action] = W_obs obs + W_act action, of which a state's N actions share the first
        obs_weight, act_weight = pick(self.weights[0]).split([obs.shape[-1], A], dim=1)
        from_obs = obs @ obs_weight + pick(self.biases[0])  # (E, B, H)
        h = from_obs[:, :, None] + (actions.reshape(B * N, A) @ act_weight).unflatten(1, (B, N))
        h = h.flatten(1, 2)  # (E, B * N, H)
        for i in range(len(self.weights)):
            if i > 0:
                h = torch.baddbmm(pick(self.biases[i]), h, pick(self.weights[i]))
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


def act(policy, critic, obs, args, seeds=None):
    """The action PA-RL takes, an optimised one: obs (B, O) -> (B, A). Without a critic: policy.sample(obs, 1).

    NOTE(differs): with --act-draw a draw from softmax(Q) acts (released: the best).
    """
    candidates = policy.sample(obs, args.num_samples, seeds)
    return choose(*optimize_actions(critic, obs, candidates, args), args.act_draw, seeds)


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


def cache_pays(num_states, act_dim, args):
    """Do a frozen policy's samples fit into --sample-cache-gb, and are they fewer than the phase would draw?"""
    gigabytes = 2e-9 * num_states * args.num_samples * act_dim
    return gigabytes <= args.sample_cache_gb and num_states <= 2 * args.batch_size * args.offline_steps


def cache_samples(policy, states, act_dim, args, stop=None):
    """A frozen policy's K samples at each of `states` (S, O), drawn from the seed alone -> (S, K, A), in float16.

    NOTE(differs): a frozen policy's samples are drawn once per state (released: at every touch, but for its OpenVLA).
    """
    cache = torch.zeros(len(states), args.num_samples, act_dim, dtype=torch.float16, device=states.device)
    size = max(1, 8192 // args.num_samples)  # states at once
    with torch.random.fork_rng(), common.Progress("samples", "states", 0, len(states)) as progress:
        torch.manual_seed(args.seed)
        for start in range(0, len(states), size):
            if stop and stop.asked:
                break  # the run ends before they are used
            rows = slice(start, start + size)
            cache[rows] = policy.sample(states[rows], args.num_samples)
            progress.reach(min(start + size, len(states)))
    return cache


def draw_samples(policy, batch, num_samples, cache=None):
    """The policy's samples (2B, K, A) at the batch's obs and next_obs, from the cache or drawn now.

    NOTE(differs): obs and next_obs get different noise (released: the same seed).
    """
    if cache is not None:
        return cache[torch.cat([batch["state_rows"], batch["next_state_rows"]])].float()
    return policy.sample(torch.cat([batch["obs"], batch["next_obs"]]), num_samples)


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


def update_critic(critic, target_critic, optimizer, batch, samples, args):
    """One critic update on a batch and the policy's samples (2B, K, A) at its obs and next_obs -> info.

    NOTE(differs): this critic ranks, moves and picks, the target critic only evaluates (as in the released code).
    NOTE(differs): no warm-up of the learning rate, and the target moves after the step (as in the released code).
    """
    for group in optimizer.param_groups:
        group["lr"] = args.critic_lr
    optimizer.zero_grad()
    actions, q = optimize_actions(critic, torch.cat([batch["obs"], batch["next_obs"]]), samples, args)
    policy_actions, next_policy_actions = choose(actions, q).chunk(2)
    batch = {**batch, "policy_actions": policy_actions, "next_policy_actions": next_policy_actions}
    loss, info = critic_loss(critic, target_critic, batch, args)
    loss.backward()
    optimizer.step()
    move_average(target_critic, critic, args.target_rate)
    return info


def update_policy(policy, policy_ema, optimizer, obs, actions, lr, args):
    """One step of the policy's own supervised loss on obs (B, O), actions (B, A): cloning and distillation alike."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    policy.train()
    optimizer.zero_grad()
    loss = policy.loss(obs, actions)
    loss.backward()
    optimizer.step()
    move_average(policy_ema, policy, args.policy_ema_rate)
    return loss.detach()


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
    """Behaviour cloning, offline RL, online fine-tuning. Returns the run's directory. Raises InputError."""
    args, env, eval_envs, agent, run = set_up(args)
    counters, log, checkpoint = run.counters, run.log, run.checkpoint
    if args.eval_only:
        print(json.dumps(common.evaluate_agent(eval_envs, agent, run, args), indent=2))
        return run.directory
    stop = common.StopSignal(log)
    common.begin(run, args)

    def end_update(describe=None):
        """What ends each update of phases 1 and 2, and each online episode: log, evaluate, save, stop if asked."""
        evaluates = counters.owes_evaluation or counters.due(args.eval_every)
        if evaluates or counters.due(args.log_every) or counters.phase == "online":
            log.add(describe() if describe else {})
            row = {}
            if evaluates:
                counters.owes_evaluation = True
                checkpoint.save()  # it can take long, and a run that is stopped in it goes on from here
                row = common.evaluate_agent(eval_envs, agent, run, args, stop.check, common.scaled_rewards)
                counters.owes_evaluation = False
            log.write(row)
            checkpoint.save()
        stop_if_asked()

    def stop_if_asked():
        if stop.asked:
            checkpoint.save()
            stop.leave()

    if counters.owes_evaluation:  # of a policy that is not cloned here, or one in which the run was stopped
        end_update()

    # Phase 1: behaviour cloning
    num_steps = 0 if args.policy_checkpoint else args.bc_steps
    for step in counters.steps("bc", num_steps, lambda _: counters.then_offline(*agent.time_later())):
        log.add(agent.clone(learning_rate(args.bc_lr, step, args.bc_steps, args, cosine=True)))
        end_update()

    # Phase 2: offline RL. The policy is frozen; it may learn from the critic at the end
    cache = agent.cache_samples(stop) if counters.done["offline"] < args.offline_steps else None
    stop_if_asked()
    for step in counters.steps("offline", args.offline_steps, counters.then_online):
        with log.timed("time/critic_ms"):
            log.add(agent.improve_critic(step, args.batch_size, cache))
        end_update(agent.describe)
    if args.offline_distill_steps and not counters.done["distill"]:
        agent.policy_optimizer.state.clear()
    for step in counters.steps("distill", args.offline_distill_steps):
        with log.timed("time/distill_ms"):
            lr = learning_rate(args.distill_lr, step, args.offline_distill_steps, args)
            log.add(agent.distill(args.batch_size, lr))
        end_update()

    # Phase 3: online fine-tuning: collect an episode, distil, update the critic
    # NOTE(differs): going online both optimisers start afresh, networks and target go on (as in the released code).
    if counters.phase != "online":
        agent.policy_optimizer.state.clear()
        agent.critic_optimizer.state.clear()
    num_distill_steps = args.policy_utd * common.max_env_steps(env, args)
    explore = log.timed("time/act_ms")(agent.explore)
    for seed in counters.episodes():
        if not counters.collected:  # else the run was stopped in this episode's updates
            (episode,) = common.run_episodes([env], explore, [seed], before_step=stop.check)
            agent.remember(episode)
            counters.collected = common.episode_columns(episode)
        length = int(counters.collected["train/length"])
        if not len(agent.online.chunk_starts(args.action_chunk)):
            length = 0  # no episode so far is as long as a chunk: nothing to learn from yet
        share = len(agent.dataset) / (len(agent.dataset) + len(agent.online)) if args.offline_ratio else 0.0
        first = args.policy_utd * counters.env_step
        for step in counters.updates("distillation", args.policy_utd * length):
            stop_if_asked()
            with log.timed("time/distill_ms"):
                lr = learning_rate(args.distill_lr, first + step, num_distill_steps, args)
                log.add(agent.distill(math.floor(args.batch_size * share), lr))
        first = counters.done["offline"] + args.critic_utd * counters.env_step
        for step in counters.updates("critic", args.critic_utd * length):
            stop_if_asked()
            with log.timed("time/critic_ms"):
                log.add(agent.improve_critic(first + step, math.floor(args.batch_size * args.offline_ratio)))
        log.add(counters.end_episode(args.critic_utd * length))
        end_update(agent.describe)
    log.finish()
    return run.directory


def set_up(args):
    """args with what follows from the data, the environments, the Agent and the Run of a training."""
    common.check_flags(args)
    device, generator = common.start(args)  # torch's own generator draws noise, this one batches

    # Environment and data. In a project without envs/: your gymnasium environment, your common.ReplayBuffer
    import envs

    eval_envs = [envs.make(args.env_id, args.sparse_reward, args.capture_video) for _ in range(common.num_envs(args))]
    env = eval_envs[0]
    common.check_spaces(env)
    (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
    if (args.bc_steps or args.offline_ratio or args.dataset_path) and not args.eval_only:
        rewards_as = (args.reward_scale, args.reward_bias, args.discount, args.sparse_reward)
        dataset = envs.load_dataset(args.env_id, args.dataset_path, *rewards_as, env, args.obs_keys)
    else:
        dataset = common.ReplayBuffer(obs_dim, act_dim)
        args = dataclasses.replace(args, offline_steps=0, offline_distill_steps=0)  # no data, no offline RL
    q_min, q_max = common.value_range(common.step_rewards(dataset, args), args)
    args = dataclasses.replace(args, q_min=q_min, q_max=q_max)  # which the critic's bins span
    if not common.family(args.env_id):
        atexit.register(env.close)  # a robot is let go, however the run ends

    # What learns; where the run is, what it logs, what it keeps
    agent = Agent(dataset, obs_dim, args.action_chunk * act_dim, args, device, generator)
    run = common.open_run(args, Path(__file__).stem, generator, dataset, agent.kept())
    return args, env, eval_envs, agent, run


class Agent:
    """What learns and what it learns from: policy, critic, their averages and optimisers, normaliser, both buffers."""

    def __init__(self, dataset, obs_dim, act_dim, args, device, generator):
        self.dataset, self.online = dataset, common.ReplayBuffer(obs_dim, act_dim // args.action_chunk)
        self.act_dim, self.args, self.device, self.generator = act_dim, args, device, generator
        self.latest = None  # obs and samples of the last critic update
        states = dataset.states[: dataset.num_states if args.normalize_obs else 0]
        # NOTE(differs): observations are normalised by the dataset's mean and standard deviation (released: not).
        self.normalizer = common.Normalizer(obs_dim, states).to(device)
        self.policy = TransformerPolicy(obs_dim, act_dim, args).to(device)
        self.policy_ema = copy.deepcopy(self.policy).eval()
        common.check_policy(self.policy_ema, self.normalized(dataset.states[:2]), act_dim, args)
        self.critic = Critic(obs_dim, act_dim, args).to(device)
        self.target_critic, self.critic_ema = copy.deepcopy(self.critic), copy.deepcopy(self.critic)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=args.bc_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.critic_lr, fused=True)
        compiled = common.compiled if args.compile else lambda function: function
        self.update_critic, self.update_policy = compiled(update_critic), compiled(update_policy)

    def kept(self):
        """What a checkpoint holds, by name."""
        names = ("policy", "policy_ema", "critic", "target_critic", "critic_ema", "online", "normalizer")
        return {name: getattr(self, name) for name in (*names, "policy_optimizer", "critic_optimizer")}

    def draw_batch(self, num_offline):
        """num_offline transitions of the dataset and others collected online, --batch-size in all; obs normalised."""
        sizes, chunk = (num_offline, self.args.batch_size - num_offline), (self.args.action_chunk, self.args.discount)
        batch = common.sample_both(self.dataset, self.online, *sizes, self.generator, *chunk)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        return {**batch, "obs": self.normalizer(batch["obs"]), "next_obs": self.normalizer(batch["next_obs"])}

    def clone(self, lr):
        """One step of the policy towards the dataset's actions."""
        batch = self.draw_batch(self.args.batch_size)
        return {"policy/bc_loss": self.improve_policy(batch["obs"], batch["actions"], lr)}

    def distill(self, num_offline, lr):
        """One step of the policy towards optimised actions, the batch's own among the candidates."""
        batch = self.draw_batch(num_offline)
        samples = self.policy_ema.sample(batch["obs"], self.args.num_samples)
        actions, q = optimize_actions(self.critic_ema, batch["obs"], samples, self.args, batch["actions"])
        chosen = choose(actions, q, sample=not self.args.distill_argmax)
        return {"policy/distill_loss": self.improve_policy(batch["obs"], chosen, lr)}

    def improve_policy(self, obs, actions, lr):
        return self.update_policy(self.policy, self.policy_ema, self.policy_optimizer, obs, actions, lr, self.args)

    def improve_critic(self, num_before, num_offline, cache=None):
        """One critic update, after num_before others, on samples from the cache of a frozen policy, or drawn now.

        NOTE(differs): with --critic-ema-rate below 1 an average of critics acts and distils (released: the latest).
        """
        batch = self.draw_batch(num_offline)
        samples = draw_samples(self.policy_ema, batch, self.args.num_samples, cache)
        self.latest = batch["obs"], samples[: self.args.batch_size]
        info = self.update_critic(self.critic, self.target_critic, self.critic_optimizer, batch, samples, self.args)
        rate = max(self.args.critic_ema_rate, 1 / (num_before + 1))  # at first the mean of all so far
        move_average(self.critic_ema, self.critic, rate)
        return info

    def cache_samples(self, stop=None):
        """For offline RL: see the function of this name. None where a cache does not pay."""
        if not cache_pays(self.dataset.num_states, self.act_dim, self.args):
            return None
        states = self.normalized(self.dataset.states[: self.dataset.num_states])
        return cache_samples(self.policy_ema, states, self.act_dim, self.args, stop)

    def describe(self):
        """The opt columns of a row: what action optimisation does to samples of the latest batch."""
        return optimization_info(self.critic_ema, *self.latest, self.args)

    def normalized(self, obs):  # (N, O) raw observations, numpy -> (N, O)
        return self.normalizer(torch.from_numpy(obs).to(self.device))

    def act_raw(self, obs, keys):  # raw observations -> (N, A); keys seed the noise, see common.run_episodes
        return self.policy_ema.sample(self.normalized(obs), 1, keys)[:, 0].cpu().numpy()

    def act(self, obs, keys):
        return act(self.policy_ema, self.critic_ema, self.normalized(obs), self.args, keys).cpu().numpy()

    def explore(self, obs, _keys):  # noise from the run's own generator; one state is not shared out among threads
        with common.threads(1):
            return self.act(obs, None)

    def remember(self, episode):
        """Add an episode of common.run_episodes to the online buffer."""
        rewards, returns = common.learned_from(episode, self.args)
        self.online.add_episode(episode["observations"], episode["actions"], rewards, episode["masks"], returns)

    def time_later(self):
        """For a line of progress: about how many seconds offline RL will take, and a critic update online. It is tried
        on copies, so that the run's own networks and draws are untouched."""
        args, states = self.args, self.dataset.num_states
        twin, names = copy.copy(self), ("critic", "target_critic", "critic_ema", "critic_optimizer", "generator")
        vars(twin).update(copy.deepcopy({name: getattr(self, name) for name in names}), update_critic=update_critic)
        with torch.random.fork_rng():
            for _ in range(2):  # the first takes longer; reading a number (.item) waits for a GPU
                began = time.perf_counter()
                draw_samples(self.policy_ema, twin.draw_batch(args.batch_size), args.num_samples).sum().item()
                drawn = time.perf_counter() - began
                twin.improve_critic(0, args.batch_size)["critic/loss"].item()
                both = time.perf_counter() - began - drawn
        draws = states / (2 * args.batch_size) if cache_pays(states, self.act_dim, args) else args.offline_steps
        return (both - drawn) * args.offline_steps + drawn * draws, both


if __name__ == "__main__":
    common.main(train, Args, PRESETS, __doc__)
