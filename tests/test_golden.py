"""Agreement with the released implementation, number by number (tests/golden holds its outputs)."""

import copy
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

import common
import parl_diffusion as parl
import parl_transformer as transformer
from envs import d4rl, files


def tensor(array):
    return torch.from_numpy(np.asarray(array))


def close(ours, theirs, atol=2e-5):
    np.testing.assert_allclose(ours.detach().numpy() if torch.is_tensor(ours) else ours, theirs, rtol=2e-5, atol=atol)


def critic_args(**changes):
    args = parl.Args(hidden_dims=(32, 32), ensemble_size=3, num_bins=16, q_min=-10.0, q_max=0.0, cql_n_actions=4)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


CRITIC_NAMES = {
    "head_weight": "Dense_0/kernel",
    "head_bias": "Dense_0/bias",
    **{f"weights.{i}": f"network/Dense_{i}/kernel" for i in range(2)},
    **{f"biases.{i}": f"network/Dense_{i}/bias" for i in range(2)},
    **{f"norm_scales.{i}": f"network/LayerNorm_{i}/scale" for i in range(2)},
    **{f"norm_biases.{i}": f"network/LayerNorm_{i}/bias" for i in range(2)},
}


def load_critic(data, prefix, args):
    critic = parl.Critic(5, 3, args)
    assert {name for name, _ in critic.named_parameters()} == set(CRITIC_NAMES)
    for name, parameter in critic.named_parameters():
        parameter.data = tensor(data[f"{prefix}/{CRITIC_NAMES[name]}"]).reshape(parameter.shape)
    return critic


@pytest.mark.parametrize("case", ["a", "b"])
def test_hl_gauss_probabilities_and_cross_entropy(golden, case):
    data = golden("1_hl_gauss")
    args = SimpleNamespace(
        q_min=float(data[f"{case}_min"]), q_max=float(data[f"{case}_max"]), num_bins=int(data[f"{case}_num_bins"])
    )
    probs = parl.hl_gauss(tensor(data[f"{case}_targets"]), args)
    close(probs, data[f"{case}_probs"], atol=5e-6)
    cross_entropy = -(probs * torch.log_softmax(tensor(data[f"{case}_ce_logits"]), -1)).sum(-1)
    close(cross_entropy, data[f"{case}_ce"])


def test_critic_forward(golden):
    data = golden("2_critic_forward")
    critic = load_critic(data, "critic", critic_args())
    q, logits = critic(tensor(data["obs"]), tensor(data["act"])[:, None])
    close(q[..., 0], data["q"])
    close(logits[:, :, 0], data["logits"])
    # N actions of a state are scored as they are alone, and members can be picked in any order
    many = critic(tensor(data["obs"]), tensor(data["act"])[:, None].repeat(1, 4, 1), torch.tensor([2, 0, 2]))[0]
    close(many, np.repeat(data["q"][[2, 0, 2]][..., None], 4, -1))


@pytest.mark.parametrize("name", ["3_critic_loss_default", "3_critic_loss_alpha1_sub2_repeated_idx"])
def test_critic_loss_and_gradients(golden, name):
    data = golden(name)
    args = critic_args(cql_weight=float(data["cql_alpha"]), discount=float(data["discount"]))
    critic, target = load_critic(data, "critic", args), load_critic(data, "target_critic", args)
    batch = {key: tensor(data[key]) for key in ("obs", "next_obs", "actions", "rewards", "masks", "mc_returns")}
    batch["policy_actions"] = tensor(data["policy_actions_obs"])
    batch["next_policy_actions"] = tensor(data["policy_actions_next_obs"])
    loss, info = parl.critic_loss(
        critic,
        target,
        batch,
        args,
        random_actions=tensor(data["cql_random_actions"]),
        td_members=tensor(data["td_subsample_idx"]).long(),
        cql_members=tensor(data["cql_subsample_idx"]).long(),
    )
    loss.backward()
    close(loss, data["total_loss"])
    close(info["critic/td_loss"], data["td_loss"])
    close(info["critic/cql_loss"], data["cql_loss"])
    close(info["critic/calibration_rate"], data["calql_bound_rate"])
    close(info["critic/q_data"], data["info_predicted_qs"])
    close(info["critic/q_minus_mc"], data["info_predicted_qs_-_mc_returns"])
    for name, parameter in critic.named_parameters():
        close(parameter.grad, data[f"grad/{CRITIC_NAMES[name]}"].reshape(parameter.shape))
    assert all(parameter.grad is None for parameter in target.parameters())


def inside(actions):
    """Rows strictly inside the golden file's action bounds, which are tighter than our [-1, 1] in two dimensions."""
    return ((actions > np.array([-1, -1, -0.8]) + 1e-4) & (actions < np.array([1, 0.9, 1]) - 1e-4)).all(-1)


@pytest.mark.parametrize("tag", ["s3e-4", "s0.05", "s1.0", "s0.05_target", "s0.05_n0"])
def test_local_optimization(golden, tag):
    data = golden("4a_local_optimization")
    trajectory, values = data[f"{tag}/trajectory"], data[f"{tag}/values"]
    args = critic_args(action_lr=float(data[f"{tag}/step_size"]), num_gradient_steps=1)
    critic = load_critic(data, "target_critic" if data[f"{tag}/use_target"] else "critic", args)
    obs = tensor(data["obs"])
    for t in range(len(trajectory) - 1):  # one step from each point: the value, and the move where it stays inside
        step = parl.ascend(critic, obs, tensor(trajectory[t])[:, None], args)
        close(critic(obs, tensor(trajectory[t])[:, None])[0].mean(0)[:, 0], values[t])
        up = inside(trajectory[t + 1]) & (values[t + 1] > values[t] + 1e-6)
        close(step[0][:, 0][up], trajectory[t + 1][up])
    whole = inside(trajectory).all(0)  # rows that never met a bound: the best of all points
    args.num_gradient_steps = len(trajectory) - 1
    best_actions, best_q = parl.ascend(critic, obs, tensor(data["actions"])[:, None], args)
    close(best_q[:, 0][whole], values.max(0)[whole], atol=3e-4 if tag == "s1.0" else 2e-5)
    if tag != "s1.0":  # free-running it agrees in value only
        assert whole.any()
        close(best_actions[:, 0][whole], data[f"{tag}/best_actions"][whole])


def test_optimize_and_choose_policy_actions(golden):
    data = golden("3_critic_loss_default")
    args = critic_args(num_samples=32, num_keep=10, num_gradient_steps=10, action_lr=float(data["step_size"]))
    critic = load_critic(data, "critic", args)
    compared = 0
    for obs, samples, chosen in [
        ("obs", "base_policy_actions", "policy_actions_obs"),
        ("next_obs", "next_base_policy_actions", "policy_actions_next_obs"),
    ]:
        actions, q = parl.optimize_actions(critic, tensor(data[obs]), tensor(data[samples]), args)
        ours, theirs = parl.choose(actions, q), data[chosen]
        rows = inside(theirs) & inside(ours.numpy())
        close(ours[rows], theirs[rows], atol=1e-4)
        compared += rows.sum()
    assert compared >= 4


@pytest.mark.parametrize("num_steps", [5, 20])
def test_cosine_schedule(golden, num_steps):
    data = golden("5a_schedules")
    close(parl.cosine_betas(num_steps), data[f"T{num_steps}_betas"], atol=1e-6)
    close(torch.cumprod(1 - parl.cosine_betas(num_steps), 0), data[f"T{num_steps}_alpha_hats"], atol=1e-6)


DIFFUSION_NAMES = {
    "fourier": "time_preprocess/kernel",
    "time_expand": "cond_encoder/Dense_0",
    "time_contract": "cond_encoder/Dense_1",
    "input": "reverse_network/Dense_0",
    "output": "reverse_network/Dense_1",
    **{f"blocks.{i}.norm": f"reverse_network/MLPResNetBlock_{i}/LayerNorm_0" for i in range(3)},
    **{f"blocks.{i}.expand": f"reverse_network/MLPResNetBlock_{i}/Dense_0" for i in range(3)},
    **{f"blocks.{i}.contract": f"reverse_network/MLPResNetBlock_{i}/Dense_1" for i in range(3)},
}


def golden_name(name):
    if name == "fourier":
        return DIFFUSION_NAMES[name]
    layer, kind = name.rsplit(".", 1)
    return f"{DIFFUSION_NAMES[layer]}/{'bias' if kind == 'bias' else 'scale' if '.norm' in layer else 'kernel'}"


def oriented(array, name):
    """Dense kernels are (in, out), torch's weights (out, in); the Fourier kernel is used as it is."""
    return array.T if array.ndim == 2 and name != "fourier" else array


def load_policy(data, prefix):
    policy = parl.DiffusionPolicy(5, 3, parl.Args(width=32, num_layers=3, dropout=0.0))
    for name, parameter in policy.named_parameters():
        parameter.data = tensor(oriented(data[f"{prefix}/{golden_name(name)}"], name).copy())
    return policy


def test_ddpm_network_sampling_chain_and_loss(golden, monkeypatch):
    data = golden("5b_ddpm")
    policy, target = load_policy(data, "params"), load_policy(data, "target_params").eval()
    for network, expected in ((policy, "eps_out_params"), (target, "eps_out_target_params")):
        steps = tensor(data["eps_in_t"]).reshape(-1, 1)
        close(network.predict(tensor(data["obs"]), tensor(data["eps_in_x"]), steps), data[expected])

    # noise (B, diffusion_steps, K, A): the start at index 0, what is added after denoising step t at index t
    added = data["sample_noise_steps"][::-1]  # t = 0 .. 4
    noise = np.stack([data["sample_noise_init"], *added[1:]]).reshape(5, 4, 3, 3).transpose(1, 0, 2, 3)
    monkeypatch.setattr(common, "seeded_normal", lambda shape, seeds, device: tensor(noise).reshape(shape))
    close(target.sample(tensor(data["obs"]), 3), data["samples"])

    steps, noise = tensor(data["loss_t"]).reshape(-1, 1).long(), tensor(data["loss_noise"])
    monkeypatch.setattr(torch, "randint", lambda high, size, device: steps.view(size))
    monkeypatch.setattr(torch, "randn_like", lambda actions: noise.view(actions.shape))
    loss = policy.loss(tensor(data["loss_obs"]), tensor(data["loss_actions"]))
    loss.backward()
    close(loss, data["loss_mean"])
    for name, parameter in policy.named_parameters():
        close(parameter.grad, oriented(data[f"loss_grad/{golden_name(name)}"], name))


@pytest.mark.parametrize("tag", ["antmaze", "antmaze_term_mid", "antmaze_scale10", "kitchen", "kitchen_bias0"])
def test_offline_returns(golden, tag):
    data = {name.split("/")[1]: array for name, array in golden("6a_mc_offline").items() if name.startswith(f"{tag}/")}
    sparse = tag.startswith("antmaze")
    kept = slice(0, -1)  # the released code drops the very last transition; ours keeps it, so the test drops it
    arrays = {name: data[f"in_{name}"][kept] for name in ("observations", "next_observations", "rewards", "terminals")}
    arrays["terminals"] = arrays["terminals"] | (False if sparse else arrays["rewards"] == 4)
    arrays["timeouts"] = np.zeros(len(arrays["rewards"]), bool)
    rewards = arrays["rewards"] * data["reward_scale"] + data["reward_bias"]
    episodes, _ = files.split_episodes(arrays)
    returns = [
        common.mc_returns(rewards[a:b], 1 - arrays["terminals"][a:b].astype(float), 0.99, sparse) for a, b in episodes
    ]
    close(rewards, data["out_rewards"])
    close(np.concatenate(returns), data["out_mc_returns"])
    close(1.0 - arrays["terminals"], data["out_masks"])


def test_kitchen_file_returns(golden, tmp_path):
    """The same through the loader of D4RL's files, where what follows the first reward of 4 is dropped (tagged)."""
    data = {name.split("/")[1]: array[:15] for name, array in golden("6a_mc_offline").items()
            if name.startswith("kitchen/") and array.ndim}  # fmt: skip
    states, following, rewards = (data[f"in_{name}"] for name in ("observations", "next_observations", "rewards"))
    ends = np.flatnonzero([*(np.abs(states[1:] - following[:-1]).max(1) > 1e-6), True])
    with h5py.File(tmp_path / "kitchen.hdf5", "w") as file:  # its last state is a row too, which is dropped
        file["observations"] = np.insert(states, ends + 1, following[ends], axis=0)
        file["rewards"], file["actions"] = np.insert(rewards, ends + 1, 0), np.zeros((len(rewards) + len(ends), 2))
        file["terminals"] = np.insert(np.zeros(len(rewards)), ends + 1, 1)
    arrays = d4rl.read_dataset("kitchen-mixed-v0", tmp_path / "kitchen.hdf5")
    episodes, _ = files.split_episodes(arrays)
    returns = [
        common.mc_returns(arrays["rewards"][a:b] - 4.0, 1.0 - arrays["terminals"][a:b], 0.99) for a, b in episodes
    ]
    kept = np.ones(len(rewards), bool)
    kept[[10, 11]] = False  # 4 again
    assert rewards[9:12].tolist() == [4, 4, 4] and kept.sum() == sum(map(len, returns))
    close(np.concatenate(returns), data["out_mc_returns"][kept])


@pytest.mark.parametrize("case", ["fail", "succ", "succ_mask1_last", "mid", "mid_mask1"])
def test_return_to_go(golden, case):
    data = golden("6b_return_to_go")
    rewards, masks = data[f"{case}/rewards"], data[f"{case}/masks"]
    close(common.mc_returns(rewards, masks, 0.99, sparse=True), data[f"{case}/offline_antmaze"])
    close(common.mc_returns(rewards, masks, 0.99), data[f"{case}/online_push_False"])


def test_target_average(golden):
    data = golden("3_critic_loss_default")
    critic, target = (load_critic(data, name, critic_args()) for name in ("critic", "target_critic"))
    before = copy.deepcopy(target)
    parl.move_average(target, critic, 0.005)
    for new, old, online in zip(target.parameters(), before.parameters(), critic.parameters(), strict=True):
        close(new, (0.005 * online + 0.995 * old).detach().numpy(), atol=1e-6)


def load_transformer(data, args):
    policy = transformer.TransformerPolicy(5, 3, args).eval()
    names = {"positions": "bt/wpe/embedding", "norm.weight": "bt/ln_f/scale", "norm.bias": "bt/ln_f/bias"}
    for layer, their in (
        ("embed_obs.0", "bt/o_mlp/Dense_0"), ("embed_obs.2", "bt/o_mlp/Dense_1"),
        ("output.0", "action_tokens_func/params/Dense_0"), ("output.2", "action_tokens_func/params/Dense_1"),
    ):  # fmt: skip
        names |= {f"{layer}.weight": f"{their}/kernel", f"{layer}.bias": f"{their}/bias"}
    for i in range(2):
        for ours, their in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            names |= {f"blocks.{i}.{ours}.weight": f"bt/h/{i}/{their}/scale"}
            names |= {f"blocks.{i}.{ours}.bias": f"bt/h/{i}/{their}/bias"}
        for ours, their in (
            ("qkv", "attn/c_attn"), ("project", "attn/c_proj"), ("expand", "mlp/c_fc"), ("contract", "mlp/c_proj"),
        ):  # fmt: skip
            names |= {f"blocks.{i}.{ours}.{kind}": f"bt/h/{i}/{their}/{theirs}" for kind, theirs in KINDS.items()}
    for name, parameter in policy.named_parameters():
        if name == "embed_tokens":  # theirs has a table for the last dimension too, whose token nothing reads
            parameter.data = torch.stack([tensor(data[f"params/bt/a_embeddings/embeds_{d}/embedding"]) for d in (0, 1)])
            continue
        array = tensor(data[f"params/{names[name]}"])
        if name == "positions":
            array = array[:3]
        elif name.endswith("weight") and array.ndim == 2 and "blocks" not in name:  # Dense kernels are (in, out)
            array = array.T
        assert array.shape == parameter.shape, name
        parameter.data = array
    return policy


KINDS = {"weight": "kernel", "bias": "bias"}


def transformer_args():
    return transformer.Args(width=32, num_layers=2, num_heads=4, action_bins=16)


def test_transformer_tokens_logits_and_loss(golden):
    data = golden("7_transformer")
    policy = load_transformer(data, transformer_args())
    obs, actions, tokens = (tensor(data[name]) for name in ("obs", "actions", "tokens"))
    assert torch.equal(policy.tokenize(actions), tokens.long())
    close(policy.values[tokens.long()], data["detokenised"])
    logits = policy(obs, tokens.long())
    close(logits, data["logits"][:, :3])  # theirs goes on after the last dimension; nothing uses it
    log_probs = torch.log_softmax(logits, -1).gather(-1, tokens.long()[..., None])[..., 0]
    close(log_probs, data["token_log_probs"])
    close(policy.loss(obs, actions), data["loss"])


def test_transformer_draws_from_the_released_distribution(golden):
    """Frequencies of the first dimension, and of the second where the first is the released example's."""
    data = golden("7_transformer")
    policy = load_transformer(data, transformer_args())
    torch.manual_seed(0)
    tokens = policy.tokenize(policy.sample(tensor(data["obs"]), 40_000))  # (6, K, 3)
    expected = torch.softmax(tensor(data["logits"]), -1)
    for state, example in enumerate(tensor(data["tokens"]).long()):
        same = tokens[state][tokens[state, :, 0] == example[0]]
        for drawn, probs in ((tokens[state, :, 0], expected[state, 0]), (same[:, 1], expected[state, 1])):
            spread = (probs * (1 - probs) / len(drawn)).sqrt()
            frequencies = torch.bincount(drawn, minlength=16) / len(drawn)
            assert ((frequencies - probs).abs() < 4.5 * spread + 1e-4).all()
