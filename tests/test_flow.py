"""--objective flow of parl_diffusion.py: its loss and its steps against numpy, what it learns, a whole run."""

import copy
import csv
import json

import numpy as np
import pytest
import torch
from conftest import SMALL, run_here

import common
import parl_diffusion as parl


def make_policy(obs_dim=3, act_dim=2, **changes):
    """In evaluation mode; every bias and scale is other than at the start, so that each counts."""
    torch.manual_seed(0)
    args = parl.Args(**dict(objective="flow", width=16, num_layers=2, dropout=0.0, diffusion_steps=4) | changes)
    policy = parl.DiffusionPolicy(obs_dim, act_dim, args).eval()
    for parameter in policy.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    policy.output.weight.data /= 10  # steps that mostly end within [-1, 1]
    return policy


def velocity(policy, obs, actions, times):
    """The network in numpy and float64: obs (B, O), actions (B, A), times (B, 1) -> (B, A)."""
    weights = {name: parameter.detach().numpy().astype(np.float64) for name, parameter in policy.named_parameters()}

    def dense(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    angles = 2 * np.pi * times * weights["fourier"][:, 0]
    features = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    features = dense("time_contract", silu(dense("time_expand", features)))
    h = dense("input", np.concatenate([features, obs, actions], 1))
    for i in range(len(policy.blocks)):
        centered = h - h.mean(1, keepdims=True)
        normed = centered / np.sqrt((centered**2).mean(1, keepdims=True) + 1e-6)
        normed = normed * weights[f"blocks.{i}.norm.weight"] + weights[f"blocks.{i}.norm.bias"]
        h = h + dense(f"blocks.{i}.contract", silu(dense(f"blocks.{i}.expand", normed)))
    return dense("output", silu(h))


def float32(*arrays):
    return [torch.from_numpy(array.astype(np.float32)) for array in arrays]


def test_loss_by_hand(monkeypatch):
    """Noise and action swapped, the sign of the velocity, the time of another path, a mean over dimensions."""
    policy, rng = make_policy(), np.random.default_rng(0)
    obs, actions = rng.standard_normal((6, 3)), rng.uniform(-1, 1, (6, 2))
    times, noise = np.array([[0.0], [0.1], [0.3], [0.6], [0.9], [1.0]]), rng.standard_normal((6, 2))
    errors = []
    for row in range(6):
        t = times[row, 0]
        between = t * actions[row] + (1 - t) * noise[row]  # the noise at t = 0, the action at t = 1
        predicted = velocity(policy, obs[[row]], between[None], times[[row]])[0]
        errors.append(sum((predicted[d] - (actions[row, d] - noise[row, d])) ** 2 for d in range(2)))
    monkeypatch.setattr(torch, "rand", lambda *size, device: float32(times)[0].view(size))
    monkeypatch.setattr(torch, "randn_like", lambda actions: float32(noise)[0].view(actions.shape))
    loss = policy.loss(*float32(obs, actions))
    assert loss.shape == () and loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_euler_steps_by_hand(num_steps, monkeypatch):
    """From 1 to 0, against the velocity, a time one step late, steps of another length; noise of another sample."""
    policy, rng = make_policy(diffusion_steps=num_steps), np.random.default_rng(1)
    obs, noise = rng.standard_normal((5, 3)), rng.uniform(-1, 1, (5, 3, 2))  # K = 3
    monkeypatch.setattr(common, "seeded_normal", lambda shape, seeds, device: float32(noise)[0].reshape(shape))
    samples = policy.sample(*float32(obs), 3)
    expected = noise.copy()
    for k in range(3):
        for step in range(num_steps):
            times = np.full((5, 1), step / num_steps)
            expected[:, k] += velocity(policy, obs, expected[:, k], times) / num_steps
    assert (np.abs(expected) < 1).mean() > 0.3  # where clipping hides nothing
    np.testing.assert_allclose(samples.numpy(), expected.clip(-1, 1), atol=2e-5)


def test_actions_are_clipped_at_the_end_alone(monkeypatch):
    policy, seen = make_policy(), []

    def there_and_back(obs, actions, times):
        seen.append(actions)
        return torch.full_like(actions, 8.0 if times.item() < 0.5 else -8.0)

    monkeypatch.setattr(policy, "predict", there_and_back)
    noise = torch.linspace(-1.5, 1.5, 6).reshape(1, 1, 3, 2)
    actions = policy.integrate(torch.zeros(1, 3), noise)
    torch.testing.assert_close(actions, noise[:, 0].clamp(-1, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[2], noise[:, 0] + 4)


def test_every_row_has_a_time_and_noise_of_its_own(monkeypatch):
    """One time for the whole batch, times of the denoising steps, an end of the path that is never learned."""
    policy, seen = make_policy(), []

    def record(obs, noisy_actions, times):
        seen.append((noisy_actions, times))
        return torch.zeros_like(noisy_actions)

    monkeypatch.setattr(policy, "predict", record)
    loss = policy.loss(torch.zeros(5000, 3), torch.zeros(5000, 2))
    noisy_actions, times = seen[0]
    assert times.shape == (5000, 1)
    uniform = torch.linspace(0, 1, 5000)[:, None]
    assert (times.sort(0).values - uniform).abs().max() < 0.03  # Kolmogorov-Smirnov: 1.36 / sqrt(5000) is 0.019
    noise = noisy_actions / (1 - times)
    torch.testing.assert_close(noise.std(0), torch.ones(2), atol=0.05, rtol=0)
    assert torch.corrcoef(noise.T)[0, 1].abs() < 0.06
    assert float(loss) == pytest.approx(noise.square().sum(1).mean().item(), rel=1e-3)  # velocity: 0 - noise


def test_seeds_and_samples():
    """Noise that a row shares with others, that depends on the batch, that K samples share; a start without noise."""
    policy, obs = make_policy(), torch.randn(5, 3)
    seeds = [(7, i) for i in range(5)]
    samples = policy.sample(obs, 6, seeds)
    assert samples.shape == (5, 6, 2) and samples.abs().max() <= 1 and not samples.requires_grad
    torch.testing.assert_close(policy.sample(obs[[3, 1]], 6, [seeds[3], seeds[1]]), samples[[3, 1]])
    same_state = policy.sample(obs[:1].expand(5, -1), 6, seeds)  # rows that differ in their seed alone
    assert len(same_state.flatten(0, 1).unique(dim=0)) > 20
    assert all(len(row.unique(dim=0)) > 3 for row in samples)
    assert torch.equal(policy.sample(obs, 6, seeds), samples) and not torch.equal(policy.sample(obs, 6), samples)


def test_it_learns_two_modes():
    """As a cloned policy does: left or right in state 0, at other places in state 1, hardly ever between."""
    torch.manual_seed(0)
    args = parl.Args(objective="flow", width=32, num_layers=2, dropout=0.0, diffusion_steps=20, policy_ema_rate=0.01)
    policy = parl.DiffusionPolicy(1, 2, args)
    policy_ema, optimizer = copy.deepcopy(policy).eval(), torch.optim.Adam(policy.parameters())
    for step in range(1000):
        obs, side = torch.randint(2, (128, 1)).float(), 2.0 * torch.randint(2, (128, 1)) - 1
        actions = torch.cat([0.5 * side, obs - 0.5], 1) + 0.05 * torch.randn(128, 2)
        lr = parl.learning_rate(2e-3, step, 1000, args, cosine=True)
        parl.update_policy(policy, policy_ema, optimizer, obs, actions, lr, args)
    samples = policy_ema.sample(torch.tensor([[0.0], [1.0]]), 1000)
    for state, place in enumerate((-0.5, 0.5)):
        left = samples[state, :, 0] < 0
        assert 0.4 < left.float().mean() < 0.6
        assert (samples[state, :, 0].abs() - 0.5).abs().mean() < 0.08
        assert (samples[state, :, 0].abs() < 0.25).float().mean() < 0.07
        torch.testing.assert_close(samples[state, :, 1].mean(), torch.tensor(place), atol=0.04, rtol=0)
        assert 0.02 < samples[state, :, 1].std() < 0.08


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("flow") / "run"
    run_here("parl_diffusion", *SMALL, "--objective", "flow", "--diffusion-steps", 3, "--run-dir", directory)
    return directory


def test_a_whole_run(finished):
    rows = list(csv.DictReader((finished / "metrics.csv").open()))
    assert list(dict.fromkeys(row["phase"] for row in rows)) == ["bc", "offline", "online"]
    assert all(float(row["policy/bc_loss"]) > 0 for row in rows if row["phase"] == "bc" and row["policy/bc_loss"])
    assert float(rows[-1]["policy/distill_loss"]) > 0 and float(rows[-1]["opt/improvement"]) >= 0
    config = json.loads((finished / "config.json").read_text())
    assert (config["objective"], config["diffusion_steps"]) == ("flow", 3)


def test_it_is_evaluated_as_what_it_is(finished, capsys):
    """The objective comes with the run that is resumed: its evaluation is that of its last row."""
    run_here("parl_diffusion", "--resume", finished, "--eval-only")
    printed = capsys.readouterr().out
    again = json.loads(printed[printed.index("{\n") :])
    rows = [row for row in csv.DictReader((finished / "metrics.csv").open()) if row["eval/policy_success_rate"]]
    assert again["eval/policy_return"] == pytest.approx(float(rows[-1]["eval/policy_return"]))


@pytest.fixture(scope="module")
def unlearned(tmp_path_factory):
    """unlearned(objective): a run that took no step."""

    def get(objective):
        directory = tmp_path_factory.mktemp(objective) / "run"
        flags = ["--bc-steps", 0, "--offline-ratio", 0, "--online-steps", 0, "--num-eval-episodes", 1]
        run_here("parl_diffusion", *flags, "--objective", objective, "--run-dir", directory)
        return directory

    return get


@pytest.mark.parametrize(("there", "here"), [("ddpm", "flow"), ("flow", "ddpm")])
def test_a_checkpoint_of_the_other_objective_is_refused(there, here, unlearned, tmp_path):
    """It has the same shapes, and its numbers mean something else."""
    path = unlearned(there) / "checkpoint.pt"
    reason = f"{path}: --objective is '{there}' there and '{here}' here; expected the same"
    with pytest.raises(SystemExit) as stop:
        run_here("parl_diffusion", "--resume", path.parent, "--objective", here)
    assert str(stop.value) == f"error: --resume {reason}"
    with pytest.raises(SystemExit) as stop:
        flags = ["--policy-checkpoint", path, "--objective", here, "--bc-steps", 0, "--num-eval-episodes", 1]
        run_here("parl_diffusion", *flags, "--run-dir", tmp_path / "run")
    assert str(stop.value) == f"error: --policy-checkpoint {reason}" and not (tmp_path / "run").exists()
