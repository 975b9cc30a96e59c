"""Values worked out by hand. Each test names the fault it would catch."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

import common
import envs
import parl_diffusion as parl
import parl_gaussian
import parl_transformer


class QuadraticCritic(torch.nn.Module):
    """Q(s, a) = -|a - s[:A]|^2 for every member but a constant offset per member: the optimum is known."""

    def __init__(self, members=2):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.linspace(-1, 1, members))

    def forward(self, obs, actions, members=None):
        q = -(actions - obs[:, None, : actions.shape[-1]]).square().sum(-1)
        return q[None] + self.offset[:, None, None], None


def make_args(**changes):
    args = parl.Args(hidden_dims=(16, 16), ensemble_size=3, num_bins=11, q_min=-10.0, q_max=0.0, width=16, num_layers=1)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def batch_of(size=6, obs_dim=4, act_dim=2):
    torch.manual_seed(0)
    batch = {name: torch.randn(size, obs_dim) for name in ("obs", "next_obs")}
    batch |= {name: torch.rand(size, act_dim) * 2 - 1 for name in ("actions", "policy_actions", "next_policy_actions")}
    return batch | {"rewards": -torch.ones(size), "masks": torch.ones(size), "mc_returns": -5 * torch.ones(size)}


# ---------------------------------------------------------------- action optimisation


def test_gradient_steps_climb_to_the_known_optimum():
    """A wrong sign of the gradient, or candidates that mix, would end elsewhere."""
    obs = torch.tensor([[0.5, -0.25], [-0.5, 0.75]])
    args = make_args(num_keep=3, num_gradient_steps=200, action_lr=0.05)
    actions, q = parl.optimize_actions(QuadraticCritic(), obs, torch.rand(2, 5, 2) * 2 - 1, args)
    torch.testing.assert_close(actions, obs[:, None].expand(2, 3, 2), atol=1e-4, rtol=0)
    torch.testing.assert_close(q, torch.zeros(2, 3), atol=1e-4, rtol=0)


def test_one_gradient_step_by_hand():
    """a = 0, optimum 0.5: dQ/da = -2 (0 - 0.5) = 1, so one step of 0.1 goes to 0.1; a sum over the batch or a mean over
    members in place of either would change the length."""
    args = make_args(num_keep=1, num_samples=1, num_gradient_steps=1, action_lr=0.1)
    actions, q = parl.optimize_actions(QuadraticCritic(), torch.tensor([[0.5], [0.5]]), torch.zeros(2, 1, 1), args)
    torch.testing.assert_close(actions, torch.full((2, 1, 1), 0.1))
    torch.testing.assert_close(q, torch.full((2, 1), -0.16))


def test_keep_best_never_lowers_q():
    """Returning the last point instead of the best fails where a huge step overshoots."""
    obs, candidates = torch.zeros(4, 2), torch.rand(4, 6, 2) * 2 - 1
    args = make_args(num_keep=6, num_gradient_steps=3, action_lr=5.0)
    critic = QuadraticCritic()
    actions, q = parl.optimize_actions(critic, obs, candidates, args)
    before = critic(obs, candidates)[0].mean(0).sort(descending=True).values
    assert (q.sort(descending=True).values >= before - 1e-6).all()
    torch.testing.assert_close(q, critic(obs, actions)[0].mean(0))


def test_reranking_keeps_the_best_in_order():
    """A sort along the wrong axis or in the wrong direction changes the order."""
    obs = torch.zeros(2, 1)
    candidates = torch.tensor([[0.9, 0.1, -0.5, 0.3], [-0.2, 0.8, 0.4, -0.1]])[..., None]
    kept = parl.rerank(QuadraticCritic(), obs, candidates, make_args(num_keep=3))
    torch.testing.assert_close(kept[..., 0], torch.tensor([[0.1, 0.3, -0.5], [-0.1, -0.2, 0.4]]))
    kept = parl.rerank(QuadraticCritic(), obs, candidates, make_args(num_keep=4))
    torch.testing.assert_close(kept[..., 0], torch.tensor([[0.1, 0.3, -0.5, 0.9], [-0.1, -0.2, 0.4, 0.8]]))


def test_the_batchs_action_replaces_the_worst_kept_one_unless_there_is_only_one():
    obs, candidates, own = torch.zeros(1, 1), torch.tensor([[[0.9], [0.1], [-0.5]]]), torch.tensor([[0.7]])
    kept = parl.rerank(QuadraticCritic(), obs, candidates, make_args(num_keep=2), own)
    torch.testing.assert_close(kept[0, :, 0], torch.tensor([0.1, 0.7]))
    kept = parl.rerank(QuadraticCritic(), obs, candidates, make_args(num_keep=1), own)
    torch.testing.assert_close(kept[0, :, 0], torch.tensor([0.1]))


def test_states_in_parts_are_the_states_at_once():
    """At the paper's sizes a batch is optimised in parts: each with its own states, candidates and batch actions."""
    args = make_args(num_keep=10, ensemble_size=10, hidden_dims=(256,), num_gradient_steps=2, action_lr=0.05)
    critic = QuadraticCritic(10)
    obs, candidates, own = torch.randn(45, 3), torch.rand(45, 12, 2) * 2 - 1, torch.rand(45, 2) * 2 - 1
    assert 2**19 // (10 * 10 * 256) < 45
    for extra in (None, own):
        actions, q = parl.optimize_actions(critic, obs, candidates, args, extra)
        expected = parl.ascend(critic, obs, parl.rerank(critic, obs, candidates, args, extra), args)
        torch.testing.assert_close(actions, expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(q, expected[1], rtol=0, atol=1e-4)
    with pytest.raises((ValueError, RuntimeError)):
        parl.optimize_actions(critic, obs, candidates, args, own[:40])


def test_parts_are_equal_and_fit():
    numbers = torch.arange(45)
    for rows, sizes in ((20, [15, 15, 15]), (45, [45]), (1000, [45]), (44, [23, 22]), (0, 45 * [1])):
        parts = common.cache_sized(rows, numbers, 2 * numbers)
        assert [len(part) for part, _ in parts] == sizes
        assert all(torch.equal(2 * part, double) for part, double in parts)
        assert torch.equal(torch.cat([part for part, _ in parts]), numbers)
    assert [len(part) for (part,) in common.cache_sized(20, numbers[:0])] == [0]


def test_no_gradient_is_left_behind():
    """A backward() in place of autograd.grad would fill parameters' .grad; a missing detach would keep a graph."""
    args = make_args()
    critic = parl.Critic(4, 2, args)
    for parameter in critic.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    actions, q = parl.optimize_actions(critic, torch.randn(3, 4), torch.rand(3, 32, 2), args)
    assert not actions.requires_grad and not q.requires_grad
    assert all((parameter.grad == 7.0).all() for parameter in critic.parameters())
    parl.optimization_info(critic, torch.randn(3, 4), torch.rand(3, 32, 2), args)
    assert all((parameter.grad == 7.0).all() for parameter in critic.parameters())


def test_actions_stay_in_bounds():
    obs = torch.full((2, 2), 5.0)  # the optimum is outside
    actions, _ = parl.optimize_actions(
        QuadraticCritic(), obs, torch.rand(2, 8, 2), make_args(num_samples=8, num_keep=4, action_lr=1.0)
    )
    assert actions.max() == 1.0 and actions.min() >= -1.0


def test_choose_takes_the_best_and_draws_from_softmax():
    """Draws of probabilities 1/6, 2/6, 3/6, with seeds and with torch's generator; noise of the wrong sign would draw
    others. A state's draw follows from its seed alone, and is not that of the samples."""
    num = 20_000
    actions = torch.tensor([[[1.0], [2.0], [3.0]]]).expand(num, 3, 1)
    q = torch.tensor([1.0, 2.0, 3.0]).log().expand(num, 3)
    seeds = [(7, step) for step in range(num)]
    assert (parl.choose(actions, q) == 3.0).all() and (parl.choose(actions, q, False, seeds) == 3.0).all()
    torch.manual_seed(0)
    for given in (seeds, None):
        drawn = parl.choose(actions, q, True, given)
        for value, probability in ((1.0, 1 / 6), (2.0, 2 / 6), (3.0, 3 / 6)):
            assert abs((drawn == value).float().mean() - probability) < 0.015
    some = parl.choose(actions[:9], q[:9], True, seeds[:9])
    assert torch.equal(some, parl.choose(actions, q, True, seeds)[:9])
    level = torch.zeros(1000, 3)  # noise that the samples were made of would be taken again
    first = torch.stack([common.seeded_normal((1, 3), [seed])[0].argmax() for seed in seeds[:1000]])
    drawn = parl.choose(actions[:1000], level, True, seeds[:1000])[:, 0] - 1
    assert abs((drawn == first).float().mean() - 1 / 3) < 0.06


@pytest.mark.parametrize("act_draw", [False, True])
def test_what_acts_is_the_best_or_a_draw(act_draw, monkeypatch):
    """By --act-draw, and by the seeds. It is no matter of the TD target's and the CQL actions."""
    calls = []

    def choose(actions, q, *how):
        calls.append((actions.shape, *how))
        return actions[:, 1]

    monkeypatch.setattr(parl, "choose", choose)
    args = make_args(act_draw=act_draw, num_samples=4, num_keep=3)
    policy, critic = parl.DiffusionPolicy(4, 2, args).eval(), parl.Critic(4, 2, args)
    obs = torch.randn(5, 4)
    seeds = [(index,) for index in range(5)]
    actions, _ = parl.optimize_actions(critic, obs, policy.sample(obs, 4, seeds), args)
    assert torch.equal(parl.act(policy, critic, obs, args, seeds), actions[:, 1])
    assert calls == [((5, 3, 2), act_draw, seeds)]
    batch = batch_of(5)
    optimizer = torch.optim.Adam(critic.parameters())
    parl.update_critic(critic, copy.deepcopy(critic), optimizer, batch, torch.zeros(10, 4, 2), args)
    assert calls[1:] == [((10, 3, 2),)]  # the best


def test_optimization_info_by_hand():
    obs, samples = torch.zeros(1, 1), torch.tensor([[[0.4], [0.2], [-1.0]]])
    args = make_args(num_samples=3, num_keep=2, num_gradient_steps=1, action_lr=0.25)
    info = parl.optimization_info(QuadraticCritic(), obs, samples, args)  # a <- a - 0.25 * 2a = a / 2
    expected = {"opt/q_before": -0.4, "opt/q_after": -0.01, "opt/improvement": 0.39, "opt/l1_move": 0.15}
    expected |= {"opt/grad_norm": 0.6, "opt/tokens_changed": 1.0}
    first, second = 1 / (1 + math.exp(-0.03)), 1 / (1 + math.exp(0.03))  # softmax of -0.01 and -0.04
    expected |= {"opt/candidate_entropy": -first * math.log(first) - second * math.log(second)}
    for name, value in expected.items():
        assert float(info[name]) == pytest.approx(value, abs=1e-6), name


# ---------------------------------------------------------------- losses


def test_calibration_raises_policy_actions_only():
    """Return 0 is above every value: only policy actions may rise to it. By hand, for a critic that is -5 everywhere:
    log(n e^-5 + 2n e^0 + e^-5) - log(3n + 1) + 5."""
    args = make_args(cql_n_actions=4)
    critic = parl.Critic(4, 2, args)
    for parameter in critic.parameters():
        parameter.data.zero_()  # uniform over the bins: the mean of [-10, 0]
    batch = {**batch_of(), "mc_returns": torch.zeros(6)}
    _, info = parl.critic_loss(critic, critic, batch, args)
    expected = math.log(4 * math.exp(-5) + 8 * math.exp(0) + math.exp(-5)) - math.log(13) + 5
    assert float(info["critic/cql_loss"]) == pytest.approx(expected, abs=1e-4)
    assert float(info["critic/calibration_rate"]) == 1.0
    _, info = parl.critic_loss(critic, critic, {**batch, "mc_returns": torch.full((6,), -9.0)}, args)
    assert float(info["critic/cql_loss"]) == pytest.approx(0.0, abs=1e-4)
    assert float(info["critic/calibration_rate"]) == 0.0


def test_td_target_stops_at_terminals_and_has_no_gradient():
    """mask 0: the target is the reward alone, whatever the next state is worth."""
    args = make_args(num_bins=0, cql_weight=0.0, discount=0.9)
    critic = parl.Critic(4, 2, args)
    critic.head_weight.data.zero_()
    critic.head_bias.data.fill_(-4.0)
    batch = {**batch_of(2), "masks": torch.tensor([0.0, 1.0]), "rewards": torch.tensor([0.0, -1.0])}
    loss, info = parl.critic_loss(critic, critic, batch, args)
    expected = ((-4 - 0) ** 2 + (-4 - (-1 + 0.9 * -4)) ** 2) / 2
    assert float(info["critic/td_loss"]) == pytest.approx(expected, rel=1e-5)
    loss.backward()  # residual of the semi-gradient: 2 * mean(q - y), had the target leaked it would be smaller
    assert float(critic.head_bias.grad) == pytest.approx(2 * (-4 + 0.6) / 2, rel=1e-5)


def test_what_the_critic_loss_draws():
    """Members drawn once for TD and CQL together, or without replacement; random actions in [0, 1], or not uniform."""
    args = make_args(num_bins=0, ensemble_size=3, critic_subset=2, cql_n_actions=4)
    seen = {"td": [], "cql": [], "random": []}

    class Recording(QuadraticCritic):
        def forward(self, obs, actions, members=None):
            if members is not None:
                seen["td" if actions.shape[1] == 1 else "cql"].append(tuple(members.tolist()))
            if actions.shape[1] == 4 + 2:
                seen["random"].append(actions[:, :4])
            q, _ = super().forward(obs, actions)
            return (q if members is None else q[members]), None

    critic, batch = Recording(3), batch_of()
    for _ in range(100):
        parl.critic_loss(critic, critic, batch, args)
    assert {len(members) for members in seen["td"] + seen["cql"]} == {2}
    for members in (seen["td"], seen["cql"]):  # all nine pairs, a member beside itself included
        assert len(set(members)) == 9
    agree = sum(first == second for first, second in zip(seen["td"], seen["cql"], strict=True))
    assert agree < 30  # 1 in 9 by chance
    random = torch.cat(seen["random"]).flatten()
    assert len(random) == 100 * 6 * 4 * 2 and random.abs().max() <= 1
    quarters = torch.histc(random, 4, -1, 1) / len(random)
    torch.testing.assert_close(quarters, torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_critic_learns_with_scalar_values_too():
    args = make_args(num_bins=0)
    q, logits = parl.Critic(4, 2, args)(torch.randn(3, 4), torch.rand(3, 5, 2))
    assert q.shape == (3, 3, 5) and logits is None


def test_members_are_independent_but_for_the_head():
    args = make_args()
    critic = parl.Critic(4, 2, args)
    q, logits = critic(torch.randn(3, 4), torch.rand(3, 5, 2))
    assert q.shape == (3, 3, 5) and logits.shape == (3, 3, 5, 11)
    (gradient,) = torch.autograd.grad(q[1].sum(), critic.weights[0])
    assert gradient[1].abs().sum() > 0 and gradient[[0, 2]].abs().sum() == 0


def test_update_critic_learns_from_optimised_actions_at_their_own_states():
    """Policy actions at obs and next_obs swapped, gradients left from the step before, the optimiser's own learning
    rate (of before a resume), a target that stands still or that does not give the TD target."""
    args = make_args(num_samples=4, num_keep=2, num_gradient_steps=1, action_lr=0.1, critic_subset=1, ensemble_size=1)
    args.critic_lr = 0.1
    critic, batch = parl.Critic(4, 2, args), batch_of()
    for parameter in critic.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    samples, target = torch.rand(12, 4, 2) * 2 - 1, copy.deepcopy(critic)
    for parameter in target.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    target_before = copy.deepcopy(target)
    at_obs, at_next = (
        parl.choose(*parl.optimize_actions(critic, obs, part, args))
        for obs, part in ((batch["obs"], samples[:6]), (batch["next_obs"], samples[6:]))
    )
    batch = {name: batch[name] for name in ("obs", "next_obs", "actions", "rewards", "masks", "mc_returns")}
    reference = copy.deepcopy(critic)
    torch.manual_seed(1)
    loss, _ = parl.critic_loss(
        reference, target, {**batch, "policy_actions": at_obs, "next_policy_actions": at_next}, args
    )
    loss.backward()
    for parameter in critic.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    before, optimizer = copy.deepcopy(critic), torch.optim.SGD(critic.parameters(), lr=9.0)
    torch.manual_seed(1)
    parl.update_critic(critic, target, optimizer, batch, samples, args)
    networks = (critic, before, reference, target, target_before)
    for new, old, expected, average, average_before in zip(*(n.parameters() for n in networks), strict=True):
        torch.testing.assert_close(new, old - 0.1 * expected.grad)
        torch.testing.assert_close(average, average_before + args.target_rate * (new - average_before))


def test_normalizer():
    states = np.array([[0.0, 5.0], [4.0, 5.0]], np.float32)
    normalizer = common.Normalizer(2, states)
    torch.testing.assert_close(normalizer(torch.tensor([[4.0, 5.001]])), torch.tensor([[1.0, 1.0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(common.Normalizer(2)(torch.tensor([[4.0, 5.0]])), torch.tensor([[4.0, 5.0]]))
    many = common.Normalizer(2, np.full((1_000_000, 2), 20.3, np.float32))  # float32 sums would be 0.7 % off
    assert many.mean.tolist() == pytest.approx([20.3, 20.3], rel=1e-6)
    assert many.std.tolist() == pytest.approx([1e-3, 1e-3], rel=1e-3)


def test_learning_rate_schedule():
    args = make_args(policy_warmup_steps=2000)
    assert parl.learning_rate(1.0, 0, 100, args) == 0  # the first update has none, as released
    assert parl.learning_rate(1.0, 5, 100, args) == pytest.approx(0.5)  # warm-up is capped at 10 of 100
    assert parl.learning_rate(1.0, 50, 100, args) == 1
    assert parl.learning_rate(1.0, 50, 100, args, cosine=True) == pytest.approx(0.5)
    assert parl.learning_rate(1.0, 100_000, 10**6, args) == 1
    assert parl.learning_rate(1.0, 1000, 10**6, args) == pytest.approx(0.5)


def test_value_range():
    args = make_args(q_min=None, q_max=None, discount=0.99)
    assert common.value_range(np.array([-2.0, 3.0]), args) == pytest.approx((-200, 300))
    args.sparse_reward, args.reward_bias = True, -1.0
    assert common.value_range(np.array([-1.0, 0.0]), args) == pytest.approx((-100, 0))
    assert common.value_range(np.array([]), args) == pytest.approx((-100, 0))
    assert common.value_range(np.array([0.0]), args) == pytest.approx((-100, 0))  # no step that costs in the data
    args.reward_bias = -10.0  # of rewards of 9 a step and 10 at success, scaled -1 and 0
    assert common.value_range(np.array([-1.0, 0.0]), args) == pytest.approx((-100, 0))
    args.q_min = -7.0
    assert common.value_range(np.array([-1.0]), args) == (-7.0, 0)
    with pytest.raises(common.InputError, match="--q-min"):
        common.value_range(np.array([]), make_args(q_min=None, q_max=None))


# ---------------------------------------------------------------- policy and cache


def transformer_args(head):
    args = parl_transformer.Args(width=16, num_layers=1, num_heads=2, head=head, dropout=0.0, policy_ema_rate=0.05)
    args.hidden_dims, args.ensemble_size = (16, 16), 3
    return args


POLICIES = {
    "diffusion": lambda O, A: parl.DiffusionPolicy(O, A, make_args(dropout=0.0)),
    "gaussian": lambda O, A: parl_gaussian.GaussianPolicy(O, A, make_args()),
    "tokens": lambda O, A: parl_transformer.TransformerPolicy(O, A, transformer_args("tokens")),
    "continuous": lambda O, A: parl_transformer.TransformerPolicy(O, A, transformer_args("continuous")),
}


@pytest.fixture(params=POLICIES)
def make_policy(request):
    torch.manual_seed(0)
    return POLICIES[request.param]


@pytest.mark.parametrize("act_dim", [1, 3])
def test_policy_interface(make_policy, act_dim):
    policy = make_policy(4, act_dim).eval()
    obs = torch.randn(5, 4)
    actions = policy.sample(obs, 3)
    assert actions.shape == (5, 3, act_dim) and actions.abs().max() <= 1 and not actions.requires_grad
    loss = policy.loss(obs, actions[:, 0])
    assert loss.shape == () and loss.requires_grad
    assert all(len(samples.unique(dim=0)) > 1 for samples in actions)  # each sample has noise of its own
    # seeds: a row depends on its seed alone, wherever it stands
    seeds = [(1, i) for i in range(5)]
    torch.testing.assert_close(policy.sample(obs, 3, seeds)[[2]], policy.sample(obs[[2]], 3, seeds[2:3]))
    assert not torch.equal(policy.sample(obs, 3, seeds), policy.sample(obs, 3, [(2, i) for i in range(5)]))


def test_update_policy_by_hand(make_policy):
    """Gradients left from the step before, the optimiser's own learning rate, another rate of averaging, a policy that
    is not in training mode."""
    args = make_args(policy_ema_rate=0.25)
    policy = make_policy(4, 2).eval()
    reference, average, before = (copy.deepcopy(policy) for _ in range(3))
    obs, actions = torch.randn(6, 4), torch.rand(6, 2) - 0.5
    torch.manual_seed(1)
    expected = reference.train().loss(obs, actions)
    expected.backward()
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    torch.manual_seed(1)
    loss = parl.update_policy(policy, average, torch.optim.SGD(policy.parameters(), lr=9.0), obs, actions, 0.1, args)
    assert policy.training and not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    for new, old, like, mean in zip(*(n.parameters() for n in (policy, before, reference, average)), strict=True):
        torch.testing.assert_close(new, old - 0.1 * (0.0 if like.grad is None else like.grad))
        torch.testing.assert_close(mean, old + 0.25 * (new - old))


def test_policy_learns_a_constant_action(make_policy):
    """The loss's minimum is the data: a wrong sign or a wrong schedule would sample elsewhere."""
    args = make_args(policy_ema_rate=0.05)
    policy = make_policy(3, 2)
    average = copy.deepcopy(policy).eval()
    optimizer = torch.optim.Adam(policy.parameters())
    target = torch.tensor([0.5, -0.25])
    for _ in range(400):
        obs = torch.randn(64, 3)
        parl.update_policy(policy, average, optimizer, obs, target.expand(64, 2), 3e-3, args)
    samples = average.sample(torch.randn(64, 3), 4)
    assert (samples - target).abs().mean() < 0.1


def test_policy_learns_which_state_asks_for_which_action(make_policy):
    """a = (s_1, -s_1): dimensions that were swapped, or states mixed up in the batch of samples, would not fit."""
    args = make_args(policy_ema_rate=0.02)
    policy = make_policy(2, 2)
    average = copy.deepcopy(policy).eval()
    optimizer = torch.optim.Adam(policy.parameters())
    for step in range(600):
        obs = torch.rand(64, 2) * 1.6 - 0.8
        actions = torch.stack([obs[:, 0], -obs[:, 0]], 1)
        parl.update_policy(policy, average, optimizer, obs, actions, 5e-3 * (1 - step / 600), args)
    obs = torch.rand(64, 2) * 1.6 - 0.8
    error = average.sample(obs, 4) - torch.stack([obs[:, 0], -obs[:, 0]], 1)[:, None]
    assert error.abs().mean() < 0.12


def test_policies_but_the_gaussian_learn_two_modes(make_policy):
    """Both dimensions +0.7 or both -0.7: a joint distribution, which a single Gaussian cannot hold."""
    policy = make_policy(1, 2)
    average = copy.deepcopy(policy).eval()
    optimizer = torch.optim.Adam(policy.parameters())
    for step in range(1000):
        sign = torch.randint(2, (128, 1)) * 2.0 - 1
        args, lr = make_args(policy_ema_rate=0.02), 2e-3 * (1 - step / 1000)
        parl.update_policy(policy, average, optimizer, torch.zeros(128, 1), (0.7 * sign).expand(128, 2), lr, args)
    samples = average.sample(torch.zeros(1, 1), 1000)[0]
    near = ((samples.abs() - 0.7).abs().max(1).values < 0.2) & (samples[:, 0].sign() == samples[:, 1].sign())
    if isinstance(policy, parl_gaussian.GaussianPolicy):
        assert near.float().mean() < 0.5
    else:
        assert near.float().mean() > 0.8 and 0.3 < (samples[near, 0] > 0).float().mean() < 0.7


def test_gaussian_log_likelihood_by_torch_distributions():
    policy = POLICIES["gaussian"](4, 3)
    policy.output.weight.data.normal_(0, 0.5)
    obs, actions = torch.randn(8, 4), torch.rand(8, 3) * 1.8 - 0.9
    mean, log_std = policy(obs)
    normal = torch.distributions.Normal(mean.double(), log_std.double().exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    expected = -squashed.log_prob(actions.double()).sum(-1).mean()
    torch.testing.assert_close(policy.loss(obs, actions).double(), expected, rtol=1e-5, atol=1e-5)


def test_mixture_log_likelihood_by_torch_distributions():
    policy = POLICIES["continuous"](4, 3)
    policy.output[2].weight.data.normal_(0, 1.0)
    obs, actions = torch.randn(8, 4), torch.rand(8, 3) * 1.8 - 0.9
    log_weights, means, log_stds = policy.mixture(obs)
    torch.testing.assert_close(log_weights.exp().sum(-1), torch.ones(8))
    assert log_weights.std() > 0.1
    normal = torch.distributions.Normal(means.mT.double(), log_stds.mT.double().exp())  # (B, C, A)
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    log_probs = log_weights + squashed.log_prob(actions.double()[:, None]).sum(-1)  # (B, C)
    expected = -torch.logsumexp(log_probs, -1).mean()
    torch.testing.assert_close(policy.loss(obs, actions).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian", "continuous"])
def test_standard_deviations_depend_on_the_state_within_limits(name):
    """One deviation for all states; limits that a runaway deviation passes or that ordinary ones run into."""
    policy = POLICIES[name](4, 2)
    layer = policy.output if name == "gaussian" else policy.output[2]
    layer.weight.data.normal_(0, 0.1)
    log_stds = policy(torch.randn(8, 4))[1] if name == "gaussian" else policy.mixture(torch.randn(8, 4))[2]
    assert log_stds.flatten(1).std(0).min() > 1e-4
    for bias, limit in ((-100.0, -5.0), (100.0, 2.0)):
        layer.bias.data.fill_(bias)
        log_stds = policy(torch.randn(8, 4))[1] if name == "gaussian" else policy.mixture(torch.randn(8, 4))[2]
        assert (log_stds == limit).all()


@pytest.mark.parametrize("name", ["gaussian", "continuous"])
def test_log_likelihood_and_gradient_at_the_bounds(name):
    """Actions of exactly +-1, which gradient steps produce: finite, and the mean is drawn towards them."""
    policy = POLICIES[name](4, 2)
    loss = policy.loss(torch.randn(8, 4), torch.tensor([[1.0, -1.0]]).expand(8, 2))
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)
    bias = policy.output.bias.grad if name == "gaussian" else None
    if bias is not None:
        assert bias[0] < 0 < bias[1]  # a descent step raises the first mean and lowers the second


@pytest.mark.parametrize("name", ["gaussian", "continuous"])
def test_samples_follow_the_density_that_the_loss_gives(name):
    policy = POLICIES[name](1, 1)
    (policy.output if name == "gaussian" else policy.output[2]).weight.data.normal_(0, 1.5)
    grid = torch.linspace(-0.9, 0.9, 3601)[:, None]  # short of the bounds, where a tanh may pile up
    density = torch.stack([-policy.loss(torch.zeros(1, 1), action[None]) for action in grid]).exp().detach()
    samples = policy.sample(torch.zeros(1, 1), 40_000)[0, :, 0]
    for low, high in ((-0.9, -0.5), (-0.5, 0.0), (0.0, 0.4), (0.4, 0.9), (-0.9, 0.9)):
        mass = float(density[(grid[:, 0] > low) & (grid[:, 0] < high)].sum() * 0.0005)
        assert float(((samples > low) & (samples < high)).float().mean()) == pytest.approx(mass, abs=0.015)


def test_mixture_samples_by_hand(monkeypatch):
    """The noise that picks a component reused for the action, a component's mean with another's deviation, dimensions
    exchanged, a weight that counts one position's vote alone."""
    policy = POLICIES["continuous"](1, 2)
    votes = torch.tensor([[3.0, 1.0], [0.5, 1.0]]).log()  # per position; the sum: 1.5 to 1
    means, stds = torch.tensor([[-1.0, 0.8], [-0.6, 1.2]]), torch.tensor([[0.1, 0.2], [0.3, 0.15]])
    monkeypatch.setattr(policy, "forward", lambda obs: torch.cat([votes, means, stds.log()], -1)[None])
    x = torch.atanh(policy.sample(torch.zeros(1, 1), 20_000)[0].double()).float()  # (K, A)
    first = x[:, 0] < 0
    assert float(first.float().mean()) == pytest.approx(0.6, abs=0.015)
    for component, drawn in enumerate((x[first], x[~first])):
        torch.testing.assert_close(drawn.mean(0), means[:, component], atol=0.02, rtol=0)
        torch.testing.assert_close(drawn.std(0), stds[:, component], atol=0.01, rtol=0)
        assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.05


def test_cached_keys_and_values_give_the_full_computation(monkeypatch):
    """The distributions that tokens are drawn from, one position at a time with K samples behind one observation, are
    those of the whole sequence at once."""
    policy, drawn_from = POLICIES["tokens"](4, 3).eval(), []
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    draw = parl_transformer.draw
    monkeypatch.setattr(
        parl_transformer, "draw", lambda probs, uniform: drawn_from.append(probs) or draw(probs, uniform)
    )
    obs = torch.randn(5, 4)
    tokens = policy.tokenize(policy.sample(obs, 7)).flatten(0, 1)
    expected = torch.softmax(policy(obs.repeat_interleave(7, 0), tokens), -1)
    torch.testing.assert_close(torch.stack(drawn_from, 1), expected, rtol=1e-4, atol=1e-7)


def test_token_gradients_are_the_same_every_time_on_two_threads():
    """A parallel sum in an order of its own would break `killed and resumed = uninterrupted` at the paper's sizes."""
    args = parl_transformer.Args(num_layers=1, dropout=0.0)
    policy = parl_transformer.TransformerPolicy(29, 8, args)
    obs, actions = torch.randn(256, 29), (torch.rand(256, 8) * 2 - 1) / 8  # many states share a token
    torch.set_num_threads(2)
    try:
        gradients = [torch.autograd.grad(policy.loss(obs, actions), policy.embed_tokens)[0] for _ in range(6)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_a_token_position_sees_no_later_dimension():
    policy = POLICIES["tokens"](4, 3).eval()
    obs, tokens = torch.randn(2, 4), torch.tensor([[3, 50, 9], [3, 90, 100]])
    first, second = policy(obs, tokens), policy(obs, torch.tensor([[3, 51, 9], [3, 90, 7]]))
    assert torch.equal(first[1], second[1])  # the last dimension's token is not read
    assert torch.equal(first[0, :2], second[0, :2]) and not torch.equal(first[0, 2], second[0, 2])


def test_draw_inverts_the_cumulative_sum():
    probs = torch.tensor([[0.25, 0.0, 0.75], [1.0, 0.0, 0.0]])
    uniform = torch.tensor([[0.0, 0.24, 0.26, 1.0], [0.0, 0.5, 0.999, 1.0]])
    assert parl_transformer.draw(probs, uniform).tolist() == [[0, 0, 2, 2], [0, 0, 0, 0]]
    sums_to_less = torch.tensor([[0.5, 0.4999, 0.0]])  # as float32 sums do; what has no probability is never drawn
    assert parl_transformer.draw(sums_to_less, torch.tensor([[0.4, 0.9999999, 1.0]])).tolist() == [[0, 1, 1]]


def test_diffusion_draws_a_step_of_its_own_for_every_row(monkeypatch):
    """One step for the whole batch, the first or the last never learned, noise of another scale."""
    policy, seen = parl.DiffusionPolicy(4, 2, make_args(diffusion_steps=5)), []

    def record(obs, noisy_actions, steps):
        seen.append((noisy_actions, steps))
        return torch.zeros_like(noisy_actions)

    monkeypatch.setattr(policy, "predict", record)
    loss = policy.loss(torch.zeros(5000, 4), torch.zeros(5000, 2))
    noisy_actions, steps = seen[0]
    frequencies = torch.bincount(steps[:, 0], minlength=5) / 5000
    torch.testing.assert_close(frequencies, torch.full((5,), 0.2), atol=0.03, rtol=0)
    assert float(loss) == pytest.approx(2.0, abs=0.15)  # of standard normals, summed over two dimensions
    spread = (noisy_actions / (1 - policy.alpha_bars[steps]).sqrt()).std(0)
    torch.testing.assert_close(spread, torch.ones(2), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["diffusion", "transformer"])
def test_dropout_is_on_while_training_alone(name, monkeypatch):
    """And its mask is another one in every update."""
    torch.manual_seed(0)
    args = (parl if name == "diffusion" else parl_transformer).Args(width=16, num_layers=1, dropout=0.5)
    policy = (parl.DiffusionPolicy if name == "diffusion" else parl_transformer.TransformerPolicy)(4, 2, args)
    obs, actions = torch.randn(3, 4), torch.zeros(3, 2)
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.ones(size, dtype=torch.long))
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    assert torch.equal(policy.eval().loss(obs, actions), policy.loss(obs, actions))
    assert not torch.equal(policy.train().loss(obs, actions), policy.loss(obs, actions))
    seeds = [(0, i) for i in range(3)]
    assert torch.equal(policy.eval().sample(obs, 2, seeds), policy.sample(obs, 2, seeds))


def test_a_transformer_drops_input_attention_and_what_blocks_add(monkeypatch):
    """Dropout missing at one of its places. Where all is dropped nothing but the output layer's bias is left."""
    policy, rates = parl_transformer.TransformerPolicy(4, 3, transformer_args("tokens")).train(), []
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda *qkv, dropout_p, is_causal: rates.append(dropout_p) or attend(*qkv, is_causal=is_causal),
    )  # fmt: skip
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 1.0
    logits = policy(torch.randn(5, 4), torch.randint(128, (5, 3)))
    nothing = policy.output(policy.norm(torch.zeros(16)))
    torch.testing.assert_close(logits, nothing.expand(5, 3, -1))
    policy.eval()(torch.randn(5, 4), torch.randint(128, (5, 3)))
    assert rates == [1.0, 0.0]


def test_cached_samples_come_from_the_seed_and_leave_the_generator_alone():
    args = make_args(num_samples=4, batch_size=8, offline_steps=100)
    policy, states = parl.DiffusionPolicy(4, 2, args).eval(), torch.randn(30, 4)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (parl.cache_samples(policy, states, 2, args) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert first.shape == (30, 4, 2) and torch.equal(first, second)
    args.seed = 1
    assert not torch.equal(parl.cache_samples(policy, states, 2, args), first)


def test_a_cache_pays_where_it_fits_and_is_read_often():
    args = make_args(num_samples=4, batch_size=8, offline_steps=100)
    assert parl.cache_pays(30, 2, args)
    args.sample_cache_gb = 0.0
    assert not parl.cache_pays(30, 2, args)  # 0: drawn every time
    args.sample_cache_gb, args.offline_steps = 1.0, 1
    assert parl.cache_pays(16, 2, args) and not parl.cache_pays(17, 2, args)  # 16 touches


def test_the_cache_gives_a_batch_its_own_samples(monkeypatch):
    """Those of other rows, of obs in the place of next_obs, of half the batch; with and without memory for them."""
    states = torch.randn(30, 4)
    rows, following = torch.tensor([3, 0, 28]), torch.tensor([4, 1, 29])
    policy = parl.DiffusionPolicy(4, 2, make_args())
    monkeypatch.setattr(policy, "sample", lambda obs, K, seeds=None: torch.tanh(obs[:, None, :2]).expand(-1, K, -1))
    batch = {"obs": states[rows], "next_obs": states[following], "state_rows": rows, "next_state_rows": following}
    expected = torch.tanh(torch.cat([states[rows], states[following]])[:, None, :2]).expand(6, 4, 2)
    cache = parl.cache_samples(policy, states, 2, make_args(num_samples=4))
    for source, tolerance in ((cache, 1e-3), (None, 0)):  # float16, and as drawn
        samples = parl.draw_samples(policy, batch, 4, source)
        assert samples.dtype == torch.float32
        torch.testing.assert_close(samples, expected, atol=tolerance, rtol=0)


# ---------------------------------------------------------------- returns, buffer, evaluation


def test_returns_by_hand():
    close = pytest.approx
    assert common.mc_returns([-1, -1, 0], [1, 1, 0], 0.5) == close([-1.5, -1, 0])
    assert common.mc_returns([1, 2], [1, 1], 0.5) == close([2, 2])  # a time limit: nothing is bootstrapped
    assert common.mc_returns([-1, -1], [1, 1], 0.98, sparse=True) == close([-50, -50])  # failed: costs for ever
    assert common.mc_returns([-1, -1], [1, 0], 0.98, sparse=True) == close([-50, -50])  # also if it ended in failure
    assert common.mc_returns([-1, 0], [1, 0], 0.98, sparse=True) == close([-1, 0])


def test_buffer_pairs_states_with_their_successors():
    buffer = common.ReplayBuffer(1, 1)
    for start in (0, 100):
        observations = np.arange(start, start + 4, dtype=np.float32)[:, None]
        buffer.add_episode(observations, np.full((3, 1), 1.0), np.arange(3), [1, 1, 0], np.zeros(3))
    assert len(buffer) == 6 and buffer.num_states == 8
    batch = buffer.sample(1000, np.random.default_rng(0))
    assert torch.equal(batch["next_obs"], batch["obs"] + 1)
    assert set(batch["obs"][:, 0].tolist()) == {0, 1, 2, 100, 101, 102}
    assert torch.equal(batch["masks"], (batch["rewards"] < 2).float())
    assert batch["actions"].max() == pytest.approx(0.99999)
    assert torch.equal(torch.from_numpy(buffer.states)[batch["state_rows"]], batch["obs"])
    copied = common.ReplayBuffer(1, 1)
    copied.load_state_dict(buffer.state_dict())
    again = copied.sample(1000, np.random.default_rng(0))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with pytest.raises(ValueError, match="L \\+ 1"):
        buffer.add_episode(np.zeros((3, 1)), np.zeros((3, 1)), np.zeros(3), np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match=r"actions up to 2; expected \[-1, 1\]"):  # in an environment's units
        buffer.add_episode(np.zeros((2, 1)), np.full((1, 1), -2.0), [0], [1], [0])
    with pytest.raises(ValueError, match="not finite"):
        buffer.add_episode(np.array([[0.0], [np.nan]]), np.zeros((1, 1)), [0], [1], [0])
    assert len(buffer) == 6


def test_buffer_grows():
    buffer = common.ReplayBuffer(2, 1)
    for i in range(50):
        buffer.add_episode(np.full((101, 2), i), np.zeros((100, 1)), np.full(100, i), np.ones(100), np.zeros(100))
    assert len(buffer) == 5000 and buffer.num_states == 5050
    assert (buffer.rewards[:5000] == np.repeat(np.arange(50), 100)).all()
    assert (buffer.states[buffer.state_rows[:5000], 0] == np.repeat(np.arange(50), 100)).all()


def test_evaluation_is_the_same_with_1_and_8_environments():
    """Episode lengths differ, so an order of finishing that leaked into the result would show."""

    def act(obs, keys):
        return np.stack([np.random.default_rng(key).uniform(-1, 1, 2) for key in keys])

    seeds, ended = np.arange(100, 121), []
    one = common.run_episodes([envs.make("countdown:Countdown-v0")], act, seeds, on_end=lambda episode: ended.append(1))
    eight = common.run_episodes([envs.make("countdown:Countdown-v0") for _ in range(8)], act, seeds)
    assert len(ended) == len(seeds)  # of which a progress bar tells
    for first, second in zip(one, eight, strict=True):
        assert all(np.array_equal(first[name], second[name]) for name in first)
    assert len({len(episode["rewards"]) for episode in one}) > 5
    assert 0 < sum(episode["success"] for episode in one) < len(seeds)


def test_evaluation_of_a_policy_is_the_same_with_1_and_8_environments(make_policy):
    """Bit for bit, actions included: noise comes from keys, and rounding does not depend on who acts beside whom."""
    args = make_args(num_samples=8, num_keep=3, num_gradient_steps=2, num_bins=128, hidden_dims=(128, 128))
    policy, critic = make_policy(4, 2).eval(), parl.Critic(4, 2, args)

    def act(obs, keys):
        return parl.act(policy, critic, torch.from_numpy(obs), args, keys).numpy()

    def run(num_envs):
        made = [envs.make("pointmaze-umaze-play") for _ in range(num_envs)]
        return common.run_episodes(made, act, np.arange(8), batch_size=10)

    one, eight = run(1), run(8)
    for first, second in zip(one, eight, strict=True):
        assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(one[0]["actions"], one[1]["actions"])


def test_means_over_episodes():
    class Fixed(gym.Env):
        action_space = gym.spaces.Box(-1, 1, (1,))

        def reset(self, seed=None, options=None):
            self.seed, self.t = seed - common.EVALUATION_SEED, 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.t += 1
            done = self.t == 2 + self.seed
            return np.zeros(1, np.float32), 1.0, done, False, {"success": bool(done and self.seed % 2 == 0)}

    seen = []
    means = common.evaluate([Fixed()], lambda obs, keys: seen.append(len(obs)) or np.zeros((len(obs), 1)), 4, "x/")
    assert set(seen) == {1}  # one robot does not wait for ten actions
    common.evaluate([Fixed(), Fixed()], lambda obs, keys: seen.append(len(obs)) or np.zeros((len(obs), 1)), 4)
    assert set(seen) == {1, 10}
    assert means == {"x/success_rate": 0.5, "x/return": 3.5, "x/length": 3.5, "x/steps_to_goal": 3.0}
