"""OpenVLA: agreement with the official code's outputs on a tiny model, the shared prefix, LoRA, files.

tests/golden/openvla_tiny.json holds the tiny model's sizes and the names and shapes of its tensors; the values follow
from the names (`weights`). openvla_tiny.npz holds what the official code computes with them.
"""

import copy
import dataclasses
import itertools
import json
import math
import zlib
from fnmatch import fnmatch

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, snippet
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

import common
import parl_openvla as openvla
from common import InputError

GOLDEN_SIZES = openvla.Sizes(
    dino=openvla.VisionSizes(32, 2, 2, 128, num_registers=4), siglip=openvla.VisionSizes(48, 2, 3, 179),
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=88,
)  # fmt: skip
STATISTICS = {
    "q01": [-0.0287, -0.0417, -0.0261, -0.0807, -0.0929, -0.2072, 0.0],
    "q99": [0.0283, 0.0409, 0.0402, 0.0817, 0.0779, 0.2038, 1.0],
    "mask": [True] * 6 + [False],
}
INSTRUCTIONS = ["Put EGGPLANT in pot", "pick up cup"]
FLOAT32 = openvla.Args(dtype="float32", lora_rank=0)


def close(ours, theirs, atol=1e-4, rtol=1e-4):
    np.testing.assert_allclose(ours.detach().numpy() if torch.is_tensor(ours) else ours, theirs, rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def data():
    return dict(np.load(ROOT / "tests" / "golden" / "openvla_tiny.npz"))


@pytest.fixture(scope="module")
def weights():
    """The tiny model's tensors under the released names, the unused ones included."""
    shapes = json.loads((ROOT / "tests" / "golden" / "openvla_tiny.json").read_text())["keys"]
    return {name: torch.from_numpy(golden_tensor(name, shape)) for name, shape in shapes.items()}


def golden_tensor(name, shape):
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight")):
        return 1 + np.float32(0.1) * r
    if name.endswith("scale_factor"):
        return np.float32(0.5) + np.float32(0.1) * r
    if name.endswith("embed_tokens.weight"):
        return np.float32(0.3) * r
    if "pos_embed" in name or "token" in name:
        return np.float32(0.5) * r
    if "self_attn" in name:
        return np.float32(2.5 / math.sqrt(shape[-1])) * r
    if name.endswith("projector.fc3.weight"):
        return np.float32(4 / math.sqrt(shape[-1])) * r
    if name.endswith("lm_head.weight"):
        r[31744:32000] *= 3
        return np.float32(1 / math.sqrt(shape[-1])) * r
    if name.endswith("bias"):
        return np.float32(0.05) * r
    return np.float32(1.5 / math.sqrt(np.prod(shape[1:]) if len(shape) > 1 else shape[0])) * r


def word_tokenizer():
    """A tokenizer of the prompts' few words, with their numbers in Llama's vocabulary."""
    ids = {"In": 512, ":": 29901, "What": 1724, "action": 3158, "should": 881, "the": 278, "robot": 19964, "take": 2125}
    ids |= {"to": 304, "put": 1925, "egg": 19710, "plant": 24389, "in": 297, "pot": 3104, "?": 29973, "\n": 13}
    ids |= {"Out": 3744, "pick": 5839, "up": 701, "cup": 18002}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("egg|[:?\n]"), "isolated")]
    )
    return tokenizer


def golden_images():
    rng, (yy, xx), images = np.random.RandomState(0), np.mgrid[0:256, 0:256], []
    for i in range(2):
        waves = (127 + 120 * np.sin(xx / (9 + 5 * i) + i), 127 + 120 * np.cos(yy / (13 - 3 * i)), (xx * yy) % 255)
        images.append(np.stack(waves, -1) + rng.randint(-20, 20, (256, 256, 3)))
    return np.clip(images, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def obs():
    return {"image": golden_images(), "instruction": INSTRUCTIONS}


@pytest.fixture(scope="module")
def golden_policy(weights):
    policy = openvla.OpenVLAPolicy(7, FLOAT32, GOLDEN_SIZES, STATISTICS, word_tokenizer())
    policy.load_state_dict({name: weights[name] for name in policy.state_dict()})
    return policy


@pytest.fixture
def policy(golden_policy):
    return copy.deepcopy(golden_policy)


# ---------------------------------------- agreement with the official code ----------------------------------------


def test_pixels_are_the_official_processors(data, obs, golden_policy):
    """Another filter than PIL's bicubic, or channels of the two models swapped, differ at once."""
    pixels = golden_policy.pixels(obs["image"])
    assert pixels.shape == (2, 6, 224, 224)
    assert np.array_equal(pixels[:, :, ::37, ::37].numpy(), data["pixel_rows"])


def test_prompt_is_lower_case_and_ends_with_the_space_token(data, golden_policy):
    assert golden_policy.prompt(INSTRUCTIONS[0]) == data["prompt_0"].tolist()
    assert golden_policy.prompt(INSTRUCTIONS[1]) == data["prompt_1"].tolist()


def test_prompt_of_bytes():
    policy = openvla.OpenVLAPolicy(4, FLOAT32)
    assert policy.prompt("Go") == [1, *b"In: What action should the robot take to go?\nOut:", 32]


def test_patches_projection_and_logits(data, obs, golden_policy):
    """A final norm too many, the last block, or registers among the patches would show in the patches; positions or
    the rotation in the logits."""
    pixels, vision = golden_policy.pixels(obs["image"]), golden_policy.vision_backbone
    patches = [vision["featurizer"](pixels[:, :3]), vision["fused_featurizer"](pixels[:, 3:])]
    patches = torch.cat(patches, -1)
    close(patches[:, ::32], data["fused_patches_rows"])
    projected = golden_policy.projector(patches)
    close(projected[:, ::32], data["projected_rows"])
    words = golden_policy.language_model["model"]["embed_tokens"](torch.from_numpy(data["input_ids"]))
    h = torch.cat([words[:, :1], projected, words[:, 1:]], 1)
    h = golden_policy.language_model["model"]["norm"](golden_policy.read(h, torch.arange(284)[None]))
    logits, real = golden_policy.language_model["lm_head"](h), torch.from_numpy(data["multimodal_mask"])
    close(logits.logsumexp(-1)[real], data["logits_lse"][real])
    ours, theirs = logits[:, -12:, 31744:32000], torch.from_numpy(data["logits_action_last12"])
    close(ours[real[:, -12:]], theirs[real[:, -12:]])


def test_loss_and_gradients(data, obs, policy):
    """The second prompt is shorter: attention to padding, or actions at the wrong positions, would show."""
    loss = policy.loss(obs, torch.from_numpy(data["expert_actions"]))
    close(loss, data["loss"], rtol=1e-6)
    loss.backward()
    q_proj = policy.language_model["model"]["layers"][0].self_attn["q_proj"].weight.grad
    scale = policy.vision_backbone["featurizer"].blocks[1].ls1["scale_factor"].grad
    for ours, theirs in ((q_proj, data["grad_q_proj"]), (scale, data["grad_dino_ls"])):
        close(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_action_tokens(data, golden_policy):
    actions = torch.from_numpy(data["expert_actions"])
    tokens = golden_policy.tokenize(actions)
    assert np.array_equal(tokens, data["expert_action_tokens"])
    close(golden_policy.detokenize(tokens), data["expert_decoded"], atol=1e-7)
    # by hand: -1 lies in the first interval, 1 on the last edge; both ends decode to the outer centres, +-254 / 255
    assert golden_policy.tokenize(torch.tensor([-1.0, 1.0, -3.0, 3.0])).tolist() == [31999, 31744, 31999, 31744]
    close(golden_policy.detokenize(torch.tensor([31999, 31745, 31744])), np.array([-254, 254, 254]) / 255, atol=1e-7)


def test_greedy_tokens_and_unnormalised_actions(data, obs, golden_policy, monkeypatch):
    """The cached decoding against the official generation, token by token."""
    steps = []

    def argmax(probs, uniform):
        steps.append(probs.log())
        return probs.argmax(-1, keepdim=True)

    monkeypatch.setattr(openvla, "draw", argmax)
    actions = golden_policy.sample(obs, 1)
    assert np.array_equal(golden_policy.tokenize(actions)[:, 0], data["greedy_tokens"])
    expected = torch.log_softmax(torch.from_numpy(data["greedy_step_logits_action"]), -1)
    close(torch.stack(steps, 1), expected)
    close(golden_policy.unnormalize(actions[:, 0].numpy()), data["greedy_actions_unnorm"], atol=1e-6)


def test_released_sizes_are_the_defaults():
    """config.json of the released checkpoint names four keys of its language model; together with the tensors that
    are not used (last blocks, final norms, SigLIP's pooling) these are 982 tensors and 7,541,237,184 numbers."""
    with torch.device("meta"):
        policy = openvla.OpenVLAPolicy(7, FLOAT32, openvla.OPENVLA_7B)
    used = [parameter.numel() for parameter in policy.state_dict().values()]
    tensors, numbers = len(used), sum(used)
    for vision in policy.vision_backbone.values():  # a last block like the others, a final norm
        block = [parameter.numel() for parameter in vision.blocks[0].parameters()]
        tensors, numbers = tensors + len(block) + 2, numbers + sum(block) + 2 * len(vision.pos_embed.mT[0])
    width, mlp = 1152, 4304  # pooling: latent; q, kv, proj, norm, fc1 and fc2 with biases
    pooling = width + width * (width + 1) + 2 * width * (width + 1) + width * (width + 1) + 2 * width
    pooling += mlp * (width + 1) + width * (mlp + 1)
    assert (tensors + 13, numbers + pooling) == (982, 7_541_237_184)


# ---------------------------------------- sampling ----------------------------------------


def expanded_tokens(policy, obs, uniform):
    """The same draws with nothing shared or kept: every token from the whole sequence of its own sample."""
    (B, K, A), model = uniform.shape, policy.language_model["model"]
    many = {"image": obs["image"].repeat(K, 0), "instruction": [x for x in obs["instruction"] for _ in range(K)]}
    h, lengths = policy.prefix(many)
    tokens = torch.zeros(B * K, A, dtype=torch.long)
    for i, d in itertools.product(range(B * K), range(A)):
        sequence = torch.cat([h[i, : lengths[i]], model["embed_tokens"](tokens[i, :d])])[None]
        last = model["norm"](policy.read(sequence, torch.arange(sequence.shape[1])[None])[:, -1])
        probs = torch.softmax(policy.language_model["lm_head"](last)[:, 31744:32000], -1)
        tokens[i, d] = 31744 + openvla.draw(probs, uniform.flatten(0, 1)[None, i, d, None])
    return tokens.view(B, K, A)


@torch.no_grad()
def test_shared_prefix_draws_the_expanded_tokens(obs, golden_policy, monkeypatch):
    """Samples that see each other, or the padding of the shorter prompt, would differ; a prefix read for each of the
    samples would show in the positions that go through the layers."""
    uniform, read, sizes = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0)), golden_policy.read, []
    with monkeypatch.context() as patch:
        patch.setattr(golden_policy, "read", lambda h, *rest, **more: sizes.append(h.shape) or read(h, *rest, **more))
        shared = golden_policy.sample_tokens(obs, uniform)
    assert [tuple(size) for size in sizes] == [(2, 256 + 20, 32)] + 6 * [(2, 5, 32)]
    assert torch.equal(shared, expanded_tokens(golden_policy, obs, uniform))
    assert len({tuple(row) for row in shared.flatten(0, 1).tolist()}) > 5  # the draws are not all the same


def test_sample_by_seeds_does_not_depend_on_the_batch(obs, golden_policy):
    three = {"image": obs["image"][[0, 1, 0]], "instruction": [INSTRUCTIONS[i] for i in (0, 1, 0)]}
    actions = golden_policy.sample(three, 4, seeds=[(3, 1), (4, 1), (5, 1)])
    assert actions.shape == (3, 4, 7) and not actions.requires_grad and actions.abs().max() <= 1
    alone = golden_policy.sample({"image": obs["image"][1:], "instruction": INSTRUCTIONS[1:]}, 4, seeds=[(4, 1)])
    assert torch.equal(actions[1], alone[0])
    assert not torch.equal(actions[0], actions[2])  # the same image, another seed
    split = copy.copy(golden_policy)
    split.images_per_forward = 2
    assert torch.equal(split.sample(three, 4, seeds=[(3, 1), (4, 1), (5, 1)]), actions)


def test_draw():
    """By hand: sums 0.125, 0.125, 0.625, 1; an empty bin is never drawn, not even at its edge, nor at the end."""
    probs = torch.tensor([[0.125, 0.0, 0.5, 0.375]])
    drawn = openvla.draw(probs, torch.tensor([[0.0, 0.12, 0.125, 0.6, 0.63, 1.0]]))
    assert drawn.tolist() == [[0, 0, 0, 2, 3, 3]]
    assert openvla.draw(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]])).tolist() == [[0]]


def test_suffix_mask():
    """By hand: a prefix of 2 and of 1 + padding; two suffixes of two steps, laid out a0 b0 a1 b1."""
    mask = openvla.suffix_mask(torch.tensor([2, 1]), 2, 2, 2).int()
    own = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert mask[0, 0].tolist() == [[1, 1, *row] for row in own]
    assert mask[1, 0].tolist() == [[1, 0, *row] for row in own]


# ---------------------------------------- loss ----------------------------------------


def test_targets_behind_one_prefix_count_as_apart(data, obs, golden_policy):
    """Targets that see each other, or a mean that weighs them unequally, would differ."""
    actions = torch.from_numpy(data["expert_actions"])
    two = torch.stack([actions, -actions.flip(0)], 1)  # (B, R, A)
    together = golden_policy.loss(obs, two)
    apart = (golden_policy.loss(obs, two[:, 0]) + golden_policy.loss(obs, two[:, 1])) / 2
    close(together, apart.detach(), rtol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(data, obs, golden_policy):
    gradients = []
    for checkpointing in (False, True):
        policy = openvla.OpenVLAPolicy(
            7, dataclasses.replace(FLOAT32, gradient_checkpointing=checkpointing), GOLDEN_SIZES, None, word_tokenizer()
        )
        policy.load_state_dict(golden_policy.state_dict())
        policy.loss(obs, torch.from_numpy(data["expert_actions"])).backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        close(checkpointed, plain, atol=1e-6)


def test_tiny_model_learns_two_images():
    """The embedded default reads image and instruction: it can tell apart two images, and two instructions."""
    torch.manual_seed(0)
    policy = openvla.load_policy(4, FLOAT32, torch.device("cpu"))
    assert sum(parameter.numel() for parameter in policy.parameters()) < 3e6
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)[[0, 1, 0]]
    obs = {"image": images, "instruction": ["push the button", "push the button", "open the door"]}
    actions = torch.tensor([[0.5, -0.5, 0.0, 1.0], [-0.5, 0.9, 0.3, -1.0], [0.1, 0.1, -0.9, -0.2]])
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(80):
        loss = policy.loss(obs, actions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    close(policy.sample(obs, 3), actions[:, None].expand(-1, 3, -1), atol=0.01)


# ---------------------------------------- LoRA ----------------------------------------


def test_lora_is_on_these_layers_alone(policy, obs):
    before = policy.sample(obs, 2, seeds=[0, 1])
    policy.add_lora(4, 16.0)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    blocks = [f"vision_backbone.{tower}.blocks.{i}" for tower in ("featurizer", "fused_featurizer") for i in range(2)]
    layers = [f"{block}.{layer}" for block in blocks for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    layers += [f"projector.fc{i}" for i in (1, 2, 3)]
    linears = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    layers += [f"language_model.model.layers.{i}.{layer}" for i in range(2) for layer in linears]
    assert trained == {f"{layer}.lora_{x}" for layer in layers for x in "ab"}
    assert torch.equal(policy.sample(obs, 2, seeds=[0, 1]), before)  # B is 0


def test_lora_layer():
    """By hand, of rank 2: W x + (alpha / 2) B (A x)."""
    torch.manual_seed(0)
    layer = openvla.Linear(300, 3)
    layer.add_lora(2, 3.0)
    assert layer.lora_a.std().item() == pytest.approx(0.5, rel=0.1) and not layer.lora_b.any()
    layer.lora_b.data.normal_()
    x = torch.randn(4, 300)
    close(layer(x), (x @ (layer.weight + 1.5 * layer.lora_b @ layer.lora_a).T + layer.bias).detach(), atol=1e-5)


def test_lora_over_bfloat16_is_float32(policy, obs, data):
    policy.to(torch.bfloat16).add_lora(4, 16.0)
    policy.loss(obs, torch.from_numpy(data["expert_actions"])).backward()
    for name, parameter in policy.named_parameters():
        lora = "lora_" in name
        assert parameter.dtype == (torch.float32 if lora else torch.bfloat16), name
        assert (parameter.grad is not None) == lora, name
        if name.endswith("lora_b"):  # the gradient of A is 0 while B is
            assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0, name
    assert policy.sample(obs, 2).dtype == torch.float32


# ---------------------------------------- files ----------------------------------------


@pytest.fixture
def folder(tmp_path, weights, monkeypatch):
    """A checkpoint in the released layout: three shards, an index, a text_config of four keys; and the sizes that
    OpenVLA-7B's are here."""
    monkeypatch.setattr(openvla, "OPENVLA_7B", GOLDEN_SIZES)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    names, weight_map = sorted(weights), {}
    for i in range(3):
        shard = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({name: weights[name].clone() for name in names[i::3]}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::3], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_config(folder)
    word_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_config(folder, **changes):
    config = {
        "architectures": ["OpenVLAForActionPrediction"],
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
        "norm_stats": {"bridge": {"action": STATISTICS}, "other": {"action": {**STATISTICS, "q01": [-1.0] * 7}}},
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def load(folder, act_dim=7, **flags):
    args = dataclasses.replace(FLOAT32, checkpoint=str(folder), **{"unnorm_key": "bridge", **flags})
    return openvla.load_policy(act_dim, args, torch.device("cpu"))


def test_checkpoint_in_the_released_layout(folder, golden_policy, data, obs):
    policy = load(folder)
    for name, tensor in golden_policy.state_dict().items():
        assert torch.equal(policy.state_dict()[name], tensor), name
    close(policy.loss(obs, torch.from_numpy(data["expert_actions"])), data["loss"], rtol=1e-6)
    assert policy.prompt(INSTRUCTIONS[0]) == data["prompt_0"].tolist()
    close(policy.unnormalize(np.zeros(7))[[0, 6]], [-0.0002, 0], atol=1e-9)
    assert {tensor.dtype for tensor in load(folder, dtype="bfloat16").state_dict().values()} == {torch.bfloat16}


def test_single_file_checkpoint(folder, weights, golden_policy):
    for path in folder.glob("model*"):
        path.unlink()
    save_file({name: value.clone() for name, value in weights.items()}, folder / "model.safetensors")
    policy = load(folder)
    assert all(torch.equal(policy.state_dict()[name], value) for name, value in golden_policy.state_dict().items())


def test_text_config_wins_over_llamas_defaults(folder):
    text_config = {"model_type": "llama", "vocab_size": 32064, "rope_theta": 500.0, "num_hidden_layers": 1}
    write_config(folder, text_config=text_config)
    policy = load(folder)
    assert policy.sizes.rope_theta == 500.0 and len(policy.language_model["model"]["layers"]) == 1


def test_statistics(folder):
    assert load(folder, unnorm_key="other").statistics["q01"] == [-1.0] * 7
    tuned = {"tuned": {"action": {"q01": [0.0, 2.0], "q99": [1.0, 4.0]}}}  # no mask: all are normalised
    (folder / "dataset_statistics.json").write_text(json.dumps(tuned))
    policy = load(folder, act_dim=2, unnorm_key="")  # the only one
    close(policy.unnormalize(np.array([[-1.0, 0.5]])), [[0.0, 3.5]], atol=1e-9)
    close(policy.normalize(np.array([[0.25, 9.0]])), [[-0.5, 1.0]], atol=1e-6)
    with pytest.raises(InputError, match="--unnorm-key bridge: expected one of tuned"):
        load(folder)


def test_bad_checkpoints(folder, weights, tmp_path):
    with pytest.raises(InputError, match=r"--unnorm-key \(none\): expected one of bridge, other"):
        load(folder, unnorm_key="")
    with pytest.raises(InputError, match=r"7 dimensions there .*; expected the environment's 4"):
        load(folder, act_dim=4)
    with pytest.raises(InputError, match=r"prompt has \d+ tokens; expected up to 1785"):
        load(folder).prompt("up " * 2000)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    save_file({**tensors, name: torch.zeros(88, 31)}, shard)
    with pytest.raises(InputError, match=rf"{name} has shape \[88, 31\]; expected \[88, 32\]"):
        load(folder)
    save_file({key: value for key, value in tensors.items() if key != name}, shard)
    with pytest.raises(InputError, match=f"{name} is missing, though the index"):
        load(folder)
    shard.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match=f"{shard.name}: cannot be read as safetensors"):
        load(folder)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name}: cannot be read as safetensors"):
        load(folder)
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"tensor {name} is missing"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index\.json: has no weight_map"):
        load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        load(folder)
    write_config(folder, vision_backbone_id="siglip-vit-so400m")
    with pytest.raises(InputError, match="vision_backbone_id siglip-vit-so400m; expected dinosiglip-vit-so-224px"):
        load(folder)
    for changes, message in [
        ({"text_config": {"rope_scaling": {"factor": 2.0}}}, "text_config rope_scaling {'factor': 2.0}; expected None"),
        ({"text_config": {"hidden_act": "gelu"}}, "text_config hidden_act gelu; expected silu"),
        ({"norm_stats": {}}, "expected one of the norm_stats of config.json, and .* has none"),
        ({"norm_stats": {"bridge": {}}}, "its action has nothing; expected q01, q99 and mask"),
        ({"norm_stats": {"bridge": {"action": {**STATISTICS, "mask": [True]}}}}, "expected q01, q99 and mask of one"),
    ]:
        write_config(folder, **changes)
        with pytest.raises(InputError, match=message):
            load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"cannot read config\.json"):
        load(folder)
    with pytest.raises(InputError, match="expected a folder, or a hub name"):
        load(tmp_path / "nowhere")


def test_small_files_are_downloaded_and_checked_first(folder, monkeypatch):
    """An error costs no download of 15 GB; the official loader's own files come along, for a merged checkpoint."""
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match="--unnorm-key mars"):
        load("openvla/openvla-7b", unnorm_key="mars")
    assert len(asked) == 1 and not any(fnmatch("model-00001-of-00003.safetensors", pattern) for pattern in asked[0])
    load("openvla/openvla-7b")
    for name in ("model-00001-of-00003.safetensors", "modeling_prismatic.py", "tokenizer.model", "tokenizer.json"):
        assert any(fnmatch(name, pattern) for pattern in asked[-1])


def test_7b_on_a_cpu_says_what_it_needs(folder, monkeypatch):
    monkeypatch.setattr(openvla, "OPENVLA_7B", openvla.Sizes())
    with pytest.raises(InputError, match=r"7\.5e9 parameters; expected --device cuda with 15 GB"):
        load(folder)


def train_a_little(policy, obs, data):
    torch.manual_seed(0)
    policy.loss(obs, torch.from_numpy(data["expert_actions"])).backward()
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def test_adapters_alone_load_and_merge(folder, data, obs, tmp_path):
    policy = load(folder, lora_rank=4)
    train_a_little(policy, obs, data)
    path, merged = tmp_path / "adapters.safetensors", tmp_path / "new" / "merged"
    openvla.save_adapters(policy, path)
    assert [file.name for file in tmp_path.glob("*adapters*")] == [path.name]
    assert all("lora_" in name for name in load_file(path))

    again, (adapters, scale, base) = load(folder, lora_rank=4), openvla.read_adapters(path)
    again.load_state_dict(adapters)
    assert scale == 4.0 and base["checkpoint"] == str(folder)
    expected = policy.loss(obs, torch.from_numpy(data["expert_actions"])).detach()
    assert torch.equal(again.loss(obs, torch.from_numpy(data["expert_actions"])), expected)
    assert abs(expected.item() - data["loss"]) > 0.1  # the adapters do something

    openvla.merge_adapters(folder, path, merged)
    close(load(merged).loss(obs, torch.from_numpy(data["expert_actions"])), expected, rtol=1e-5)
    assert sorted(file.name for file in merged.iterdir()) == sorted(file.name for file in folder.iterdir())
    assert [file.name for file in merged.parent.iterdir()] == ["merged"]
    for shard in folder.glob("*.safetensors"):
        before, after = load_file(shard), load_file(merged / shard.name)
        assert {name: x.shape for name, x in before.items()} == {name: x.shape for name, x in after.items()}
        for name in before:
            layer = name.removesuffix(".weight")
            assert torch.equal(before[name], after[name]) == (f"{layer}.lora_a" not in load_file(path)), name


def test_recipe_of_the_docs_merges_adapters(folder, tmp_path):
    code = snippet("merge_adapters")
    assert len(code.strip().splitlines()) <= 10
    openvla.save_adapters(load(folder, lora_rank=2), tmp_path / "adapters.safetensors")
    for name, path in [
        ("openvla/openvla-7b", folder),
        ("runs/X/adapters.safetensors", tmp_path / "adapters.safetensors"),
        ("openvla-7b-improved", tmp_path / "merged"),
    ]:
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', f'"{path}"')
    exec(code, {})
    assert load(tmp_path / "merged").statistics["q01"] == STATISTICS["q01"]


AUTONOMOUS = [
    *("--bc-steps", 9, "--offline-steps", 2, "--online-episodes", 1, "--batch-size", 2, "--num-eval-episodes", 1),
    *("--eval-every", 4, "--log-every", 1, "--hidden-dims", 8, "--encoder-widths", 4, "--critic-image-size", 16),
    *("--ensemble-size", 1, "--num-samples", 2, "--num-keep", 2, "--num-gradient-steps", 1, "--num-threads", 1),
    *("--unnorm-key", "bridge", "--dtype", "float32", "--lora-rank", 2, "--distill-lr", 1e-2, "--bc-lr", 1e-2),
]


def start(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["parl_openvla", *map(str, [*AUTONOMOUS, *flags])])
    common.main(openvla.train, openvla.Args, openvla.PRESETS, openvla.__doc__)


def test_a_checkpoint_improves_from_its_own_trials(folder, tmp_path, monkeypatch):
    """The autonomous recipe: no dataset, no cloning; trials of the policy as it is, offline RL on them, online."""
    flags = ["--checkpoint", folder, "--env-id", "pixels:Dot7-v0", "--run-dir", tmp_path / "run"]
    start(monkeypatch, *flags, "--warmup-episodes", 2)
    rows = common.read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["phase"] for row in rows] == ["bc", "warmup", "warmup", "offline", "offline", "online"]
    assert "eval/policy_success_rate" in rows[0] and rows[0]["gradient_step"] == 0  # of the released policy
    assert all("train/length" in row and "critic/loss" not in row for row in rows[1:3])
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert len(saved["online"]["actions"]) == sum(row.get("train/length", 0) for row in rows)
    assert saved["online"]["actions"].abs().max() > 0.5  # in the tokens' units, not the environment's of 0.04
    assert (tmp_path / "run" / "images.bin").stat().st_size == len(saved["online"]["states"]) * 224 * 224 * 3
    assert all("lora_" in name for name in saved["policy"])  # the 7B weights stay in their own files
    adapters = load_file(tmp_path / "run" / "adapters.safetensors")
    assert adapters.keys() == saved["policy_ema"].keys()
    for name, value in saved["policy_ema"].items():
        assert torch.equal(adapters[name], value), name
    assert any(value.any() for name, value in saved["policy_ema"].items() if name.endswith("lora_b"))
    with pytest.raises(SystemExit, match="holds a run; --warmup-episodes is 2 there and 3 here"):
        start(monkeypatch, *flags, "--warmup-episodes", 3)


def test_the_average_of_a_released_policy_shares_its_weights(folder):
    policy = load(folder, lora_rank=2)
    twin = copy.deepcopy(policy, {id(weight): weight for weight in policy.frozen().values()})
    assert twin.projector.fc1.weight is policy.projector.fc1.weight
    assert twin.projector.fc1.lora_a is not policy.projector.fc1.lora_a
    policy.projector.fc1.lora_b.data.fill_(1.0)
    twin.load_state_dict(policy.state_dict())
    assert twin.projector.fc1.lora_b.min() == 1 and policy.state_dict().keys() == twin.state_dict().keys()


def test_a_datasets_actions_are_cloned_in_the_tokens_units(folder, tmp_path, monkeypatch):
    data = {"observations": np.zeros((6, 224, 224, 3), np.uint8), "actions": np.full((6, 7), 0.02)}
    data |= {"rewards": np.arange(6) == 5, "terminals": np.arange(6) == 5, "timeouts": np.zeros(6, bool)}
    np.savez(tmp_path / "data.npz", **data)
    cloned, update = [], openvla.update_policy
    monkeypatch.setattr(openvla, "update_policy", lambda *all: cloned.append(all[4]) or update(*all))
    flags = ["--checkpoint", folder, "--env-id", "pixels:Dot7-v0", "--dataset-path", tmp_path / "data.npz"]
    start(
        monkeypatch, *flags, "--bc-steps", 1, "--offline-steps", 0, "--online-episodes", 0, "--run-dir", tmp_path / "r"
    )
    low, high = np.array(STATISTICS["q01"]), np.array(STATISTICS["q99"])
    expected = np.where(STATISTICS["mask"], 2 * (0.02 - low) / (high - low) - 1, 0.02)
    close(cloned[0], np.tile(expected, (2, 1)), atol=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--env-id", "pixels:Dot-v0"], "7 dimensions there .*; expected the environment's 2"),
        (["--policy-checkpoint", "base.pt"], "--checkpoint is .* there and .* here; expected the same"),
        (["--unnorm-key", "mars"], "--unnorm-key mars: expected one of bridge, other"),
        (["--instruction", "up " * 2000], "--instruction 'up .*: the prompt has"),
    ],
)
def test_bad_input_with_a_checkpoint(folder, flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    identity = {"policy_class": "OpenVLAPolicy", "env_id": "pixels:Dot7-v0", "obs_dim": 224, "act_dim": 7}
    torch.save(identity | {"args": {**vars(openvla.Args()), "checkpoint": "another/base"}}, "base.pt")
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        start(monkeypatch, "--checkpoint", folder, "--env-id", "pixels:Dot7-v0", "--warmup-episodes", 1, *flags)


def test_bad_adapters(folder, tmp_path):
    path = tmp_path / "adapters.safetensors"
    openvla.save_adapters(load(folder, lora_rank=4), path)
    with pytest.raises(InputError, match="exists; expected a new folder"):
        openvla.merge_adapters(folder, path, tmp_path)
    with pytest.raises(InputError, match="expected a file by save_adapters"):
        openvla.merge_adapters(folder, folder / "model-00001-of-00003.safetensors", tmp_path / "new")
