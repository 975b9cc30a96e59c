"""What TRAIN hands to the pieces of the algorithm: one small run per script, in which every piece writes down what it
was given. The pieces themselves are tested in test_units.py."""

import importlib
import math
from itertools import pairwise
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import run_here
from parallel import PARALLEL

import common
from envs import files

BATCH, SAMPLES, BC, OFFLINE, DISTILL, ONLINE = 8, 4, 40, 12, 5, 25  # rows, K, steps of each phase
POLICY_UTD, CRITIC_UTD, BC_LR, DISTILL_LR, CRITIC_LR = 2, 3, 1e-3, 2e-3, 3e-3
CRITIC_EMA_RATE = 0.02


class Line(gym.Env):
    """A dot that the first action pushes along a line towards 2."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Box(-1, 1, (2,))

    def observe(self):
        return np.array([self.x, self.t / 6, 0.5], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1), 0
        return self.observe(), {}

    def step(self, action):
        self.x, self.t = self.x + 0.3 * float(action[0]), self.t + 1
        return self.observe(), float(self.x > 1), self.x > 1, False, {"success": self.x > 1}


gym.register("Line-v0", entry_point=Line, max_episode_steps=6)


def write_demonstrations(path, num_episodes=5):
    rng, rows = np.random.default_rng(0), []
    env = gym.make("Line-v0")
    for episode in range(num_episodes):
        obs, done = env.reset(seed=episode)[0], False
        while not done:
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, terminated, truncated, following))
            obs, done = following, terminated or truncated
    columns = (np.stack(column) for column in zip(*rows, strict=True))
    np.savez(path, **dict(zip(files.DATASET_KEYS, columns, strict=True)))
    return len(rows)


def recognisable(obs, num_samples):
    """What the spied policy samples: a function of its state. obs (B, O) -> (B, K, A)."""
    return torch.tanh(obs[:, None, :2]).expand(-1, num_samples, -1)


def spied_run(script, directory, *flags):
    """Run `script` once; returns its calls in order: `name`, and what matters of the arguments and the result."""
    module, calls = importlib.import_module(script), []
    (policy_class,) = [value for name, value in vars(module).items() if name.endswith("Policy")]
    update_critic, update_policy, choose = module.update_critic, module.update_policy, module.choose
    optimize, describe, cache_samples = module.optimize_actions, module.optimization_info, module.cache_samples
    sample_both, evaluate = common.sample_both, common.evaluate

    def note(name, **values):
        calls.append(SimpleNamespace(name=name, **values))

    def copies(network):
        return [parameter.detach().clone() for parameter in network.parameters()]

    def spy_sample(self, obs, num_samples, seeds=None):
        note("sample", policy=self, training=self.training, rows=len(obs), num_samples=num_samples, seeds=seeds)
        return recognisable(obs, num_samples)

    def spy_cache(*arguments):
        note("cache")
        return cache_samples(*arguments)

    def spy_both(offline, online, num_offline, num_online, generator, *chunk):
        batch = sample_both(offline, online, num_offline, num_online, generator, *chunk)
        note("batch", offline=offline, online=online, num_offline=num_offline, sizes=(len(offline), len(online)),
             raw={name: value.clone() for name, value in batch.items()})  # fmt: skip
        return batch

    def spy_critic(critic, target, optimizer, batch, samples, args):
        note("critic", critic=critic, target=target, optimizer=optimizer, fresh=not optimizer.state, batch=batch,
             samples=samples, lr=optimizer.param_groups[0]["lr"], before=copies(critic), target_before=copies(target),
             args=args)  # fmt: skip
        return update_critic(critic, target, optimizer, batch, samples, args)

    def spy_policy(policy, average, optimizer, obs, actions, lr, args):
        note("policy", policy=policy, average=average, optimizer=optimizer, fresh=not optimizer.state, obs=obs,
             actions=actions, lr=lr)  # fmt: skip
        return update_policy(policy, average, optimizer, obs, actions, lr, args)

    def spy_choose(actions, q, sample=False, seeds=None):
        chosen = choose(actions, q, sample, seeds)
        note("choose", sample=sample, chosen=chosen)
        return chosen

    def spy_optimize(critic, obs, candidates, args, dataset_actions=None):
        note("optimize", critic=critic, own=dataset_actions)
        return optimize(critic, obs, candidates, args, dataset_actions)

    def spy_describe(critic, obs, candidates, args):
        note("describe", critic=critic, weights=copies(critic), obs=obs, candidates=candidates)
        return describe(critic, obs, candidates, args)

    def spy_evaluate(envs, act, num_episodes, prefix, **callbacks):
        note("evaluate", prefix=prefix)
        return evaluate(envs, act, num_episodes, prefix, **callbacks)

    size = write_demonstrations(directory / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_class, "sample", spy_sample)
        for name, spy in dict(update_critic=spy_critic, update_policy=spy_policy, choose=spy_choose).items():
            patch.setattr(module, name, spy)
        for name, spy in dict(optimize_actions=spy_optimize, optimization_info=spy_describe).items():
            patch.setattr(module, name, spy)
        patch.setattr(module, "cache_samples", spy_cache)
        patch.setattr(common, "sample_both", spy_both)
        patch.setattr(common, "evaluate", spy_evaluate)
        run_here(
            script, "--env-id", "Line-v0", "--dataset-path", directory / "data.npz", "--run-dir", directory / "run",
            "--sparse-reward", "--reward-bias", -1, "--discount", 0.9, "--num-threads", 1, "--batch-size", BATCH,
            "--bc-steps", BC, "--offline-steps", OFFLINE, "--offline-distill-steps", DISTILL, "--online-steps", ONLINE,
            "--policy-utd", POLICY_UTD, "--critic-utd", CRITIC_UTD, "--num-samples", SAMPLES, "--num-keep", 2,
            "--num-gradient-steps", 1, "--hidden-dims", 8, "--ensemble-size", 2, "--num-bins", 11, "--width", 8,
            "--num-layers", 1, "--bc-lr", BC_LR, "--distill-lr", DISTILL_LR, "--critic-lr", CRITIC_LR,
            "--policy-ema-rate", 0.1, "--critic-ema-rate", CRITIC_EMA_RATE, "--num-eval-episodes", 2,
            "--eval-every", 1000, "--log-every", 4, *flags,
        )  # fmt: skip
    return SimpleNamespace(calls=calls, rows=common.read_metrics(directory / "run" / "metrics.csv"), size=size)


@pytest.fixture(scope="module", params=PARALLEL)
def run(request, tmp_path_factory):
    return spied_run(request.param, tmp_path_factory.mktemp(request.param))


def named(run, *names):
    return [call for call in run.calls if call.name in names]


def online_lengths(run):
    return [int(row["train/length"]) for row in run.rows if row["phase"] == "online"]


def distillations(run):
    """For each distillation step its calls: batch, ..., policy."""
    steps = [i for i, call in enumerate(run.calls) if call.name == "policy"][BC:]
    return [run.calls[max(j for j in range(i) if run.calls[j].name == "batch") : i + 1] for i in steps]


def test_every_update_happens_as_often_and_in_the_order_it_should(run):
    """A phase skipped, a utd ignored, or the critic updated before the policy is distilled."""
    lengths = online_lengths(run)
    assert len(lengths) > 3 and sum(lengths) >= ONLINE > sum(lengths[:-1])
    expected = ["policy"] * BC + ["critic"] * OFFLINE + ["policy"] * DISTILL
    for length in lengths:
        expected += ["policy"] * POLICY_UTD * length + ["critic"] * CRITIC_UTD * length
    assert [call.name for call in named(run, "policy", "critic")] == expected
    online = [row for row in run.rows if row["phase"] == "online"]
    assert online[-1]["gradient_step"] == BC + OFFLINE + DISTILL + CRITIC_UTD * sum(lengths)


def test_samples_belong_to_their_states(run):
    """Samples of obs and next_obs exchanged, in the cache or where they are drawn."""
    for call in named(run, "critic"):
        states = torch.cat([call.batch["obs"], call.batch["next_obs"]])
        torch.testing.assert_close(call.samples, recognisable(states, SAMPLES), rtol=0, atol=2e-3)  # float16
    assert len(named(run, "cache")) == 1
    drawn = [call for call in named(run, "sample") if call.rows == 2 * BATCH]
    assert len(drawn) == CRITIC_UTD * sum(online_lengths(run))  # offline all came from the cache
    for call in named(run, "describe"):
        torch.testing.assert_close(call.candidates, recognisable(call.obs, SAMPLES), rtol=0, atol=2e-3)


def test_only_the_average_is_sampled_and_only_the_policy_trained(run):
    """Sampling from the policy itself, or in training mode: for the cache, TD targets, distillation, acting, or any
    evaluation."""
    (policy,), (average,) = ({getattr(c, name) for c in named(run, "policy")} for name in ("policy", "average"))
    assert policy is not average
    for call in named(run, "sample"):
        assert call.policy is average and not call.training
    seen = {(call.rows, call.num_samples, call.seeds is None) for call in named(run, "sample")}
    raw, optimised = (1, 1, False), (1, SAMPLES, False)  # evaluation: seeded
    acting, distillation, critic_update = (1, SAMPLES, True), (BATCH, SAMPLES, True), (2 * BATCH, SAMPLES, True)
    assert {raw, optimised, acting, distillation, critic_update} <= seen


def test_the_raw_policy_is_evaluated_as_raw(run):
    """Columns of the raw and the optimised policy exchanged."""
    for before, after in pairwise(run.calls):
        if before.name == "evaluate":
            assert after.num_samples == {"eval/policy_": 1, "eval/": SAMPLES}[before.prefix]
    raw, optimised = "eval/policy_", "eval/"
    in_order = [raw, optimised, raw, optimised, raw, optimised]  # bc; offline; distill; online
    assert [call.prefix for call in named(run, "evaluate")] == in_order
    cloned, offline = (
        next(r for r in run.rows if r["phase"] == phase and "eval/policy_return" in r) for phase in ("bc", "offline")
    )
    assert {k: v for k, v in offline.items() if k.startswith(raw)} == {
        k: v for k, v in cloned.items() if k.startswith(raw)
    }


@pytest.mark.parametrize(
    "phase, known, evaluated",
    [
        ("offline", True, ["eval/"]),
        ("offline", False, ["eval/policy_", "eval/"]),  # resumed with other flags, or --eval-only
        ("online", True, ["eval/policy_", "eval/"]),
        ("bc", True, ["eval/policy_"]),
        ("warmup", True, ["eval/policy_"]),  # the critic has learned nothing yet
    ],
)
def test_a_frozen_policy_is_evaluated_once(phase, known, evaluated, monkeypatch):
    """Trials of a robot spent on what is known; an old result in the place of a new policy's."""
    prefixes = []

    def fake_evaluate(envs, act, num_episodes, prefix, **callbacks):
        prefixes.append(prefix)
        return {prefix + "success_rate": 0.5}

    monkeypatch.setattr(common, "evaluate", fake_evaluate)
    counters = common.Counters(SimpleNamespace(bc_steps=1, policy_checkpoint="", num_eval_episodes=5))
    counters.phase, counters.raw = phase, {"eval/policy_success_rate": 0.2} if known else {}
    run, args = SimpleNamespace(counters=counters), SimpleNamespace(num_eval_episodes=5, capture_video=False)
    row = common.evaluate_agent([], SimpleNamespace(act_raw=None, act=None), run, args)
    raw = 0.5 if "eval/policy_" in evaluated else 0.2
    assert prefixes == evaluated and row["eval/policy_success_rate"] == raw
    assert counters.raw == counters.state_dict()["raw"] == {"eval/policy_success_rate": raw}


def test_the_critic_learns_towards_its_target(run):
    """The online critic in the target's place, a target that does not start as a copy, another learning rate."""
    calls = named(run, "critic")
    assert {id(call.critic) for call in calls} == {id(calls[0].critic)}
    assert {id(call.target) for call in calls} == {id(calls[0].target)} != {id(calls[0].critic)}
    assert all(map(torch.equal, calls[0].before, calls[0].target_before))
    moved = [0.995 * old + 0.005 * new for old, new in zip(calls[0].target_before, calls[1].before, strict=True)]
    for expected, target in zip(moved, calls[1].target_before, strict=True):
        torch.testing.assert_close(target, expected)
    for call in calls:
        assert call.lr == CRITIC_LR
        assert set(call.optimizer.param_groups[0]["params"]) == set(call.critic.parameters())
    first = named(run, "policy")[0]
    assert set(first.optimizer.param_groups[0]["params"]) == set(first.policy.parameters())


def test_the_average_of_critics_acts_and_distils_and_the_latest_learns(run):
    """Either in the other's place; an average that begins with untrained critics, that starts again online, or that is
    the target's."""
    calls, (average,) = named(run, "critic"), {call.critic for call in named(run, "describe")}
    assert average is not calls[0].critic and average is not calls[0].target
    optimised = [(before.name, call.critic) for before, call in pairwise(run.calls) if call.name == "optimize"]
    assert [critic for before, critic in optimised if before == "critic"] == [calls[0].critic] * len(calls)
    others = [critic for before, critic in optimised if before != "critic"]
    assert set(others) == {average} and len(others) > len(distillations(run))
    weights, expected = calls[0].before, []  # expected[n]: after n + 1 updates; the last update's result is not seen
    for number, call in enumerate(calls[1:]):
        rate = max(CRITIC_EMA_RATE, 1 / (number + 1))
        weights = [old + rate * (new - old) for old, new in zip(weights, call.before, strict=True)]
        expected.append(weights)
    num_done = [sum(call.name == "critic" for call in run.calls[:i])
                for i, call in enumerate(run.calls) if call.name == "describe"]  # fmt: skip
    assert num_done[0] < OFFLINE and num_done[-2] > 1 / CRITIC_EMA_RATE and num_done[-1] == len(calls)
    for number, call in zip(num_done[:-1], named(run, "describe"), strict=False):
        for ours, theirs in zip(call.weights, expected[number - 1], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_optimisers_start_afresh_where_a_phase_says_so(run):
    """Going online without a reset, or a reset at every episode."""
    policy_fresh = [i for i, call in enumerate(named(run, "policy")) if call.fresh]
    critic_fresh = [i for i, call in enumerate(named(run, "critic")) if call.fresh]
    assert policy_fresh == [0, BC, BC + DISTILL] and critic_fresh == [0, OFFLINE]


def test_learning_rates(run):
    """Cloning that does not decay, a warm-up that starts again at every episode or uses another phase's rate."""
    rates = [call.lr for call in named(run, "policy")]
    cloning = [BC_LR * min(1, t / 4) * (1 + math.cos(math.pi * t / BC)) / 2 for t in range(BC)]
    assert rates[:BC] == pytest.approx(cloning) and rates[BC - 1] < 0.002 * BC_LR
    assert rates[BC : BC + DISTILL] == pytest.approx([DISTILL_LR] * DISTILL)  # a tenth of 5 steps is none
    warmup = POLICY_UTD * ONLINE // 10
    online = [DISTILL_LR * min(1, t / warmup) for t in range(len(rates) - BC - DISTILL)]
    assert warmup == 5 and rates[BC + DISTILL :] == pytest.approx(online)


def test_batches_mix_both_buffers_as_the_flags_say(run):
    """The online share in place of the offline one, either ratio in the other's place, offline data before there is
    any online."""
    kinds = [(call, after) for call, after in pairwise(run.calls) if call.name == "batch"]
    assert len(kinds) == len(named(run, "policy", "critic"))
    before_online = [call.num_offline for call, _ in kinds[: BC + OFFLINE + DISTILL]]
    assert before_online == [BATCH] * (BC + OFFLINE + DISTILL)
    shares = set()
    for calls in distillations(run)[DISTILL:]:
        offline, online = calls[0].sizes
        assert offline == run.size and calls[0].num_offline == math.floor(BATCH * offline / (offline + online))
        shares.add(calls[0].num_offline)
    assert len(shares) > 2  # the buffer grows
    critic_steps = [i for i, call in enumerate(run.calls) if call.name == "critic"][OFFLINE:]
    for i in critic_steps:
        batch = next(run.calls[j] for j in reversed(range(i)) if run.calls[j].name == "batch")
        assert batch.num_offline == BATCH // 2


def test_networks_see_normalised_observations(run):
    """Raw observations, or next_obs left raw."""
    dataset = named(run, "batch")[0].offline
    states = torch.from_numpy(dataset.states[: dataset.num_states])
    mean, std = states.mean(0), states.std(0, correction=0).clamp(min=1e-3)
    raw = None
    for call in named(run, "batch", "policy", "critic"):
        if call.name == "batch":
            raw = call.raw
            continue
        seen = {"obs": call.obs} if call.name == "policy" else call.batch
        for name in {"obs", "next_obs"} & set(seen):
            torch.testing.assert_close(seen[name], (raw[name] - mean) / std, rtol=1e-4, atol=1e-4)


def test_distillation_learns_chosen_actions_with_the_batchs_own_among_the_candidates(run):
    """Learning from the batch's action, the best one, or without the batch's own; cloning from anything but data."""
    batches = [call for call in named(run, "batch", "policy")]
    for batch, update in zip(batches[0 : 2 * BC : 2], batches[1 : 2 * BC : 2], strict=True):
        assert torch.equal(update.actions, batch.raw["actions"])
    steps = distillations(run)
    for batch, sample, optimize, choose, update in steps:
        assert (sample.rows, sample.num_samples) == (BATCH, SAMPLES)
        assert torch.equal(optimize.own, batch.raw["actions"])
        assert choose.sample and torch.equal(update.actions, choose.chosen)
    assert sum(call.sample for call in named(run, "choose")) == len(steps)  # all else takes the best
    assert sum(call.own is not None for call in named(run, "optimize")) == len(steps)


def test_the_online_buffer_holds_scaled_rewards_and_the_returns_of_sparse_tasks(run):
    """Raw rewards, a truncated sum for a failed episode, masks of 0 at a time limit."""
    online = named(run, "batch")[-1].online
    rewards, masks, returns = online.rewards[: len(online)], online.masks[: len(online)], online.mc_returns
    assert set(rewards) == {-1.0, 0.0} and ((masks == 0) == (rewards == 0)).all()
    starts = np.cumsum([0, *online_lengths(run)])
    for start, stop in pairwise(starts):
        failed = rewards[stop - 1] < 0
        expected = -10 if failed else -(1 - 0.9 ** (stop - start - 1)) / (1 - 0.9)
        assert returns[start] == pytest.approx(expected, rel=1e-5)
    assert {rewards[stop - 1] for stop in starts[1:]} == {-1.0, 0.0}  # both kinds were seen


def test_distill_argmax_and_no_cache_and_no_dataset_online(tmp_path):
    """Flags that the run above leaves at their defaults: inverted or unread."""
    flags = ("--distill-argmax", "--sample-cache-gb", 0, "--offline-ratio", 0)
    run = spied_run("parl_gaussian", tmp_path, *flags)
    assert not any(call.sample for call in named(run, "choose"))
    drawn = [call for call in named(run, "sample") if call.rows == 2 * BATCH]
    assert len(drawn) == OFFLINE + CRITIC_UTD * sum(online_lengths(run))
    for call in named(run, "critic"):
        states = torch.cat([call.batch["obs"], call.batch["next_obs"]])
        torch.testing.assert_close(call.samples, recognisable(states, SAMPLES))
    assert {call.num_offline for call in named(run, "batch")[BC + OFFLINE + DISTILL :]} == {0}


def test_a_dataset_for_offline_rl_alone(tmp_path):
    """Neither cloned from nor in online batches, but learned from in between, not dropped in silence."""
    run = spied_run("parl_gaussian", tmp_path, "--bc-steps", 0, "--offline-ratio", 0, "--offline-distill-steps", 0)
    batches = named(run, "batch")
    assert [call.num_offline for call in batches[:OFFLINE]] == [BATCH] * OFFLINE
    assert len(batches) > OFFLINE and {call.num_offline for call in batches[OFFLINE:]} == {0}
    assert [row["phase"] for row in run.rows if row["phase"] != "online"][-1] == "offline"
