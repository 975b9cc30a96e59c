"""OpenVLA on a robot: checkpoints that are something else, what is kept, commands, instructions, processes."""

# ruff: noqa: F811  test_openvla's fixtures are imported, and named again where they are used

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, run_here, snippet
from safetensors.torch import load_file, save_file
from test_openvla import STATISTICS, data, folder, golden_policy, load, obs, weights, write_config  # noqa: F401
from test_parl_openvla import SMALL

import common
import envs
import parl_openvla as parl
from common import InputError

# ---------------------------------------- checkpoints that are something else ----------------------------------------


def with_statistics(folder, **changes):
    write_config(folder, norm_stats={"bridge": {"action": {**STATISTICS, **changes}}})


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("q01", 2, float("nan"), r"q01\[2\] = nan; expected a finite number"),
        ("q99", 0, float("inf"), r"q99\[0\] = inf; expected a finite number"),
        ("q99", 1, "0.04", r"q99\[1\] = '0.04'; expected a finite number"),
        ("q01", 3, None, r"q01\[3\] = None; expected a finite number"),
        ("q01", 4, 0.5, r"q01\[4\] = 0.5, more than q99\[4\] = 0.0779"),
        ("mask", 5, "yes", r"mask\[5\] = 'yes'; expected true or false"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "dataset_statistics.json"])
def test_bad_statistics_name_file_and_key(folder, file, name, index, value, message):
    values = list(STATISTICS[name])
    values[index] = value
    with_statistics(folder, **{name: values})
    if file != "config.json":
        entry = json.loads((folder / "config.json").read_text())["norm_stats"]
        (folder / file).write_text(json.dumps(entry))
        write_config(folder)
    with pytest.raises(InputError, match=rf"--unnorm-key bridge: in \S+/{file} its action has {message}"):
        load(folder)


def test_libero_keys_with_and_without_their_suffix(folder):
    write_config(folder, norm_stats={"libero_spatial_no_noops": {"action": STATISTICS}, "other": {}})
    for key in ("libero_spatial", "libero_spatial_no_noops"):
        assert load(folder, unnorm_key=key).statistics["q01"] == STATISTICS["q01"]


@pytest.mark.parametrize("entry", [[], {"action": []}, {"action": {"q01": 1.0, "q99": 2.0}}])
def test_statistics_of_another_form(folder, entry):
    write_config(folder, norm_stats={"bridge": entry})
    with pytest.raises(InputError, match="expected q01, q99 and mask of one length"):
        load(folder)


def test_a_constant_dimension_is_zero(folder):
    """The official code trains 0 for it, and any action un-normalises to the constant; unmasked it is left alone."""
    q99 = [STATISTICS["q01"][0], *STATISTICS["q99"][1:5], 0.5, 0.0]
    with_statistics(folder, q01=[*STATISTICS["q01"][:5], 0.5, 0.0], q99=q99)
    policy = load(folder)
    actions = np.array([[-0.0287, 0.0, 0.0, 0.0, 0.0, 0.5, 1.0], [0.3, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0]])
    normalized = policy.normalize(actions)
    assert normalized[:, [0, 5, 6]].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert policy.unnormalize(normalized)[:, [0, 5]] == pytest.approx(np.array([[-0.0287, 0.5]] * 2))


def rewrite(folder, change):
    """Apply change(name, tensor) -> {name: tensor} to every tensor of a checkpoint, in one file."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            tensors |= change(name, tensor)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors")


def is_linear(name):
    return name.endswith("self_attn.q_proj.weight")


def int8(name, tensor):
    if not is_linear(name):
        return {name: tensor}
    scale = tensor.abs().amax(1)
    return {name: (tensor / scale[:, None] * 127).to(torch.int8), name.replace("weight", "SCB"): scale}


def nf4(name, tensor):
    if not is_linear(name):
        return {name: tensor}
    extra = {f"{name}.absmax": torch.ones(4), f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(9).byte()}
    return {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)} | extra


def integers_alone(name, tensor):
    return {name: tensor.mul(100).to(torch.int8) if is_linear(name) else tensor}


def with_head(name, tensor):
    return {name: tensor, "action_head.model.fc1.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (int8, r"tensor \S+q_proj\.weight has type I8; expected BF16, F16 or F32"),
        (nf4, r"tensor \S+q_proj\.weight has type U8; expected BF16, F16 or F32"),
        (integers_alone, r"tensor \S+q_proj\.weight has type I8; expected BF16, F16 or F32"),
        (with_head, r"has tensor action_head\S+; expected OpenVLA's own"),
    ],
)
def test_quantised_and_other_tensors(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        load(folder)


def touch(name, text=""):
    return lambda folder: (folder / name).write_text(text)


def config(**changes):
    return lambda folder: write_config(folder, **changes)


def only(name):
    """A folder in which `name` takes the place of the weights."""

    def change(folder):
        for path in folder.glob("model*"):
            path.unlink()
        (folder / name).write_text("")

    return change


def adapters_alone(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("")


OFT = "as of OpenVLA-OFT; expected one action, in tokens"
KINDS = {
    "8 bit": (config(quantization_config={"load_in_8bit": True}), r"quantization_config \{'load_in_8bit': True\}"),
    "OFT": (touch("action_head--150000_checkpoint.pt"), f"has action_head--150000_checkpoint.pt, {OFT}"),
    "OFT's state": (touch("proprio_projector--1_checkpoint.pt"), f"has proprio_projector--1_checkpoint.pt, {OFT}"),
    "OFT's FiLM": (touch("vision_backbone--1_checkpoint.pt"), f"has vision_backbone--1_checkpoint.pt, {OFT}"),
    "OFT's code": (touch("modeling_prismatic.py", "import NUM_ACTIONS_CHUNK"), f"NUM_ACTIONS_CHUNK .*, {OFT}"),
    "chunks": (config(num_actions_chunk=8), f"has num_actions_chunk, {OFT}"),
    "letterbox": (
        config(image_resize_strategy="letterbox"),
        "config.json has image_resize_strategy letterbox; expected",
    ),
    "crop": (
        touch("preprocessor_config.json", '{"image_resize_strategy": "resize-crop"}'),
        "preprocessor_config.json has image_resize_strategy resize-crop; expected resize-naive",
    ),
    "pickled": (
        only("pytorch_model.bin"),
        r"has pytorch_model.bin and no safetensors; convert it first: \S+save_file\(",
    ),
    "pickled shards": (only("pytorch_model.bin.index.json"), "has pytorch_model.bin.index.json and .*; convert"),
    "adapters": (adapters_alone, "has adapter_config.json, LoRA's adapters; merge them first, .*merge_and_unload"),
    "adapters beside": (touch("adapter_model.safetensors"), "has adapter_model.safetensors, LoRA's adapters; merge"),
    "ours": (touch("adapters.safetensors"), "has adapters.safetensors, LoRA's adapters; merge .* with merge_adapters"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_checkpoint(folder, kind):
    change, message = KINDS[kind]
    change(folder)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_pickled_weights_are_converted_as_the_docs_say(folder, weights):
    for path in folder.glob("model*"):
        path.unlink()
    names = sorted(weights)
    for i in range(2):
        torch.save({name: weights[name] for name in names[i::2]}, folder / f"pytorch_model-0000{i + 1}-of-00002.bin")
    code = snippet("pytorch_model*.bin")
    assert '"openvla-7b-mine"' in code
    exec(code.replace("openvla-7b-mine", str(folder)), {})
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load(folder).state_dict().items())


def test_what_the_official_scripts_leave_beside_a_checkpoint(folder):
    """Files of a fine-tune that is OpenVLA's own: it loads."""
    write_config(folder, image_resize_strategy="resize-naive", use_film=False, num_actions_chunk=1)
    touch("preprocessor_config.json", '{"image_resize_strategy": "resize-naive"}')(folder)
    touch("modeling_prismatic.py", "class OpenVLAForActionPrediction: ...")(folder)
    touch("added_tokens.json", "{}")(folder)
    assert load(folder).statistics["q01"] == STATISTICS["q01"]


# ---------------------------------------- processes ----------------------------------------

ORPHAN = """
import os, signal, sys, threading, time
sys.path.insert(0, {root!r})
import parl_openvla as parl
if {deaf}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=parl.stop_with_parent, args=(os.getppid(), 1), daemon=True).start()
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("deaf", [False, True])
def test_a_process_stops_with_its_parent(deaf):
    """Also one that hears no SIGTERM, as in a collective operation that waits for another."""
    code = ORPHAN.format(root=str(ROOT), deaf=deaf)
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_watch_their_parent(tmp_path):
    """join_ranks begins to, before it waits for the others."""
    code = "import parl_openvla as parl, sys; parl.join_ranks(parl.Args(run_dir=sys.argv[1], device='cpu'))"
    env = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29521")
    parent = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", parent, sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)
    child, deadline = int(process.stdout.readline()), time.monotonic() + 120
    while not accepts(29521):  # the others would meet it there
        assert is_alive(child) and time.monotonic() < deadline
        time.sleep(0.2)
    process.kill()
    process.wait()
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def accepts(port):
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


# ---------------------------------------- the robot ----------------------------------------

# Straight to its own trials, with a policy that is new
ONLINE = [*SMALL, "--bc-steps", 0, "--offline-ratio", 0, "--q-min", -100, "--q-max", 0, "--num-eval-episodes", 0]
ONLINE += ["--env-id", "pixels:Arm-v0"]


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setenv("ARM_LOG", str(tmp_path / "arm.txt"))
    return lambda: (tmp_path / "arm.txt").read_text().split()


def saved(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def num_episodes(online):
    """Of the buffer in a checkpoint."""
    return len(online["last_rows"].unique())


def test_one_robot_is_made_closed_and_kept_within_its_bounds(log, tmp_path):
    """Evaluation and training share it; its bounds are no numbers of float32's that rescaling twice would give."""
    run_here("parl_openvla", *ONLINE, "--num-eval-episodes", 2, "--run-dir", tmp_path / "run")
    assert log()[0] == "made" and log()[-1] == "close" and log().count("made") == log().count("close") == 1
    assert "outside" not in log()
    assert log().count("step") > len(saved(tmp_path / "run")["online"]["actions"])


@pytest.mark.parametrize("number", [0, signal.SIGINT, signal.SIGTERM], ids=["error", "SIGINT", "SIGTERM"])
def test_a_robot_stops_at_once_and_is_closed(number, log, tmp_path, monkeypatch, capsys):
    """On an error and a signal in its second episode or a later one: no command follows, those before are kept."""
    monkeypatch.setenv("ARM_AT", "11")  # an episode has 8 steps at most
    monkeypatch.setenv("ARM_SIGNAL", str(int(number)))
    with pytest.raises(SystemExit) as stop:
        run_here("parl_openvla", *ONLINE, "--run-dir", tmp_path / "run")
    assert log().count("step") == 11 and log()[-2:] == ["step", "close"]
    episodes = log().count("reset") - 1
    kept = saved(tmp_path / "run")
    assert num_episodes(kept["online"]) == kept["counters"]["episode"] == episodes >= 1
    if number:
        assert stop.value.code == 128 + number
        assert f"stopped by {number.name}; the episode in progress is dropped; to go on:" in capsys.readouterr().out
        monkeypatch.delenv("ARM_AT")
        run_here("parl_openvla", *ONLINE, "--run-dir", tmp_path / "run")
        assert saved(tmp_path / "run")["counters"]["episode"] == 3


def test_a_stop_in_warm_up_trials(log, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ARM_AT", "11")
    monkeypatch.setenv("ARM_SIGNAL", str(int(signal.SIGINT)))
    write_config(folder, norm_stats={"arm": {"action": {"q01": [-1.0, -1.0], "q99": [1.0, 1.0]}}})
    flags = ["--checkpoint", folder, "--dtype", "float32", "--lora-rank", 2, "--warmup-episodes", 5]
    with pytest.raises(SystemExit):
        run_here("parl_openvla", *ONLINE, *flags, "--run-dir", tmp_path / "run")
    assert "the episode in progress is dropped" in capsys.readouterr().out
    assert log().count("step") == 11 and log()[-1] == "close" and "outside" not in log()
    assert saved(tmp_path / "run")["counters"]["done"]["warmup"] == log().count("reset") - 1


def test_commands_never_leave_the_bounds():
    """Bounds, statistics and actions at random, to the last bit; the ends of what a bound cuts are the bound."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, high = np.sort(rng.normal(0, 10.0 ** rng.integers(-3, 3), (2, 3)), 0).astype(np.float32)
        q01, q99 = low - rng.choice([0, 0.1], 3), high + rng.choice([0, 1e-9, 0.1], 3)
        policy = parl.OpenVLAPolicy(3, parl.Args(), statistics={"q01": q01, "q99": q99, "mask": [True] * 3})
        env = gym.make("pixels:Dot-v0", act_dim=3).unwrapped
        env.action_space = gym.spaces.Box(low, high)
        made = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        units = parl.PolicyEnv(made, policy, {}, parl.Args())
        assert units.env is env  # nothing is rescaled to be rescaled back
        for action in [*rng.uniform(-1, 1, (20, 3)).astype(np.float32), np.float32([-1] * 3), np.float32([1] * 3)]:
            sent = units.action(action)
            assert sent.dtype == np.float32 and env.action_space.contains(sent)
        assert np.array_equal(units.action(np.float32([-1] * 3)), low)
        assert np.array_equal(units.action(np.float32([1] * 3)), high)


# ---------------------------------------- what is kept ----------------------------------------


class OutOfMemory(Exception):
    pass


@pytest.mark.parametrize("update", ["distill", "improve_critic"])
def test_an_episode_that_was_collected_is_never_lost(update, log, tmp_path, monkeypatch):
    """Killed in the updates of the second episode: it goes on with them, and the robot repeats nothing."""
    original, calls = getattr(parl.Agent, update), []

    def fails(agent, *inputs):
        if num_episodes(agent.online.state_dict()) == 2 and not calls:
            calls.append(agent.online.num_states)
            raise OutOfMemory
        return original(agent, *inputs)

    monkeypatch.setattr(parl.Agent, update, fails)
    with pytest.raises(OutOfMemory):
        run_here("parl_openvla", *ONLINE, "--run-dir", tmp_path / "run")
    kept = saved(tmp_path / "run")
    assert kept["counters"]["episode"] == 1 and kept["counters"]["collected"]
    assert num_episodes(kept["online"]) == 2 and len(kept["online"]["states"]) == calls[0]
    images = (tmp_path / "run" / "images.bin").read_bytes()
    run_here("parl_openvla", *ONLINE, "--run-dir", tmp_path / "run")
    kept = saved(tmp_path / "run")
    assert log().count("reset") == 3 == kept["counters"]["episode"] and log()[-1] == "close"
    assert (tmp_path / "run" / "images.bin").read_bytes().startswith(images)  # appended to


def episode(rng, length):
    images = rng.integers(0, 256, (length + 1, 4, 4, 3), np.uint8)
    return images, (rng.uniform(-1, 1, (length, 2)), -np.ones(length), np.ones(length), -np.ones(length))


def test_images_are_appended_to_a_file(tmp_path):
    rng, buffer = np.random.default_rng(0), parl.ImageBuffer((4, 4, 3), 2)
    buffer.open(tmp_path / "images.bin")
    (first, rows), (second, others) = episode(rng, 3), episode(rng, 5)
    buffer.add_episode(first, *rows)
    state = buffer.state_dict()
    assert sum(value.nbytes for value in state.values() if torch.is_tensor(value)) < 200  # a transition's numbers alone
    buffer.add_episode(second, *others)
    expected = np.concatenate([first, second])
    assert (tmp_path / "images.bin").read_bytes() == expected.tobytes()
    assert isinstance(buffer.images, np.memmap)  # not a copy in memory
    batch = buffer.sample(50, np.random.default_rng(0))
    for name, states in (("obs", batch["state_rows"]), ("next_obs", batch["next_state_rows"])):
        assert np.array_equal(batch[name], expected[states]) and batch[name].dtype == torch.uint8

    again = parl.ImageBuffer((4, 4, 3), 2)  # of the checkpoint before the second episode, which is cut off
    again.load_state_dict(state)
    again.open(tmp_path / "images.bin")
    assert np.array_equal(again.images, first) and (tmp_path / "images.bin").stat().st_size == first.nbytes
    again.add_episode(second, *others)
    assert np.array_equal(again.images, expected)
    os.truncate(tmp_path / "images.bin", 100)
    with pytest.raises(InputError, match=r"images.bin has 2 images; expected its checkpoint's 10"):
        again.open(tmp_path / "images.bin")


def test_what_is_not_averaged_is_stored_once(log, tmp_path):
    sizes = {}
    for rate in (1, 0.5):
        run = tmp_path / str(rate)
        flags = ["--policy-ema-rate", rate, "--critic-ema-rate", rate, "--online-episodes", 1]
        run_here("parl_openvla", *ONLINE, *flags, "--run-dir", run)
        sizes[rate] = (run / "checkpoint.pt").stat().st_size
        kept = saved(run)
        for one, two in (("policy", "policy_ema"), ("critic", "critic_ema")):
            assert all(torch.equal(kept[one][name], kept[two][name]) for name in kept[one]) == (rate == 1)
    policy = parl.load_policy(2, parl.Args(), torch.device("cpu"))
    assert sizes[0.5] - sizes[1] > 4 * sum(parameter.numel() for parameter in policy.parameters())


def test_adapters_name_their_base(folder, tmp_path):
    """They are merged with it alone, and other bytes than their layers' do not change."""
    policy, path = load(folder, lora_rank=2), tmp_path / "adapters.safetensors"
    policy.projector.fc1.lora_b.data.fill_(0.5)
    parl.save_adapters(policy, path)
    _, scale, base = parl.read_adapters(path)
    assert base["checkpoint"] == str(folder) and len(base["sha256"]) == 64 and scale == 8.0
    parl.merge_adapters(folder, path, tmp_path / "merged")
    merged = load(tmp_path / "merged").projector.fc1.weight
    lora = policy.projector.fc1
    torch.testing.assert_close(merged, (lora.weight + 8 * lora.lora_b @ lora.lora_a).detach())
    stranger = {"head.lora_a": torch.zeros(2, 2), "head.lora_b": torch.zeros(2, 2)}
    save_file(stranger, tmp_path / "other", {"scale": "8.0", **base})
    with pytest.raises(InputError, match=r"has no head\.weight; expected their base, \S+checkpoint"):
        parl.merge_adapters(folder, tmp_path / "other", tmp_path / "again")
    # a fine-tune: tensors of the same names and shapes, here in one file
    rewrite(folder, lambda name, tensor: {name: tensor + 0.01 * name.endswith("projector.fc1.weight")})
    with pytest.raises(InputError, match=r"has other weights; expected their base, \S+checkpoint"):
        parl.merge_adapters(folder, path, tmp_path / "again")
    parl.save_adapters(load(folder, lora_rank=2), path)
    parl.merge_adapters(folder, path, tmp_path / "again")
    assert load(tmp_path / "again").statistics["q01"] == STATISTICS["q01"]


# ---------------------------------------- instructions ----------------------------------------


def test_two_instructions_that_want_opposite_things(tmp_path):
    """The image is the same: what is told nothing, or another episode's, is right half the time."""
    torch.manual_seed(0)
    args = parl.Args(
        discount=0.9, q_min=-10.0, q_max=0.0, batch_size=32, offline_ratio=0.0, hidden_dims=(32, 32), ensemble_size=2,
        encoder_widths=(4,), encoding_width=16, critic_image_size=16, critic_lr=3e-3, target_rate=0.05, action_lr=0.05,
        num_keep=3, num_gradient_steps=2, augment_pixels=0, distill_argmax=True,
    )  # fmt: skip
    policy, device = parl.load_policy(2, args, torch.device("cpu")), torch.device("cpu")
    agent = parl.Agent(common.ReplayBuffer((64, 64, 3), 2, np.uint8), policy, 2, args, device, np.random.default_rng(0))
    agent.online.open(tmp_path / "images.bin")
    made = envs.make("pixels:Opposite-v0", True, image_size=64)
    env, expected = parl.PolicyEnv(made, policy, agent.told, args), []
    for seed in range(30):
        length = len(agent.collect(env, agent.explore_raw, seed)["rewards"])
        expected += (length + 1) * [("go right", "go left")[seed % 2]]
    assert agent.observe(torch.arange(agent.online.num_states))["instruction"] == expected
    for step in range(150):
        agent.improve_critic(step, 0)
    left, right = first_actions(env, agent.act)
    assert left < -0.5 and right > 0.5
    for _ in range(100):
        agent.distill(0, 2e-3)
    left, right = first_actions(env, agent.act_raw)
    assert left < -0.5 and right > 0.5


def first_actions(env, act):
    """The mean of what is done first where it is told to go left, and where right."""
    actions = {"go left": [], "go right": []}
    for seed in range(100, 120):
        (episode,) = common.run_episodes([env], act, [seed])
        actions[env.told[seed]].append(episode["actions"][0, 0])
    return [np.mean(values) for values in actions.values()]


def test_a_flag_is_told_in_all_episodes():
    for given, expected in (("", ["go right", "go left"]), ("stay", ["stay", "stay"])):
        policy, told = parl.OpenVLAPolicy(2, parl.Args()), {}
        made = envs.make("pixels:Opposite-v0", True, image_size=64)
        env = parl.PolicyEnv(made, policy, told, parl.Args(instruction=given))
        env.reset(seed=3)
        env.reset(seed=4)
        assert [told[3], told[4]] == expected
    env.args = parl.Args(instruction="up " * 2000)
    with pytest.raises(InputError, match="the prompt has"):
        env.reset(seed=5)


def test_codes_of_instructions():
    """The run's own is 0; another's signs follow from its text, in every process."""
    args = dataclasses.replace(parl.Args(), instruction="push", q_min=-1.0, q_max=0.0, critic_image_size=16)
    codes = parl.Critic(64, 2, args).codes(["push", "pull", "lift", "pull"])
    assert not codes[0].any() and torch.equal(codes[1], codes[3]) and (codes[1:].abs() == 1).all()
    assert not torch.equal(codes[1], codes[2])
    assert codes[1, :8].tolist() == [-1, 1, 1, -1, -1, 1, 1, -1]


# ---------------------------------------- official evaluations ----------------------------------------


def test_greedy_tokens_are_the_official_ones(data, obs, golden_policy):
    actions = golden_policy.sample(obs, 3, temperature=0)
    for k in range(3):
        assert np.array_equal(golden_policy.tokenize(actions[:, k]), data["greedy_tokens"])


def test_a_temperature_sharpens(obs, golden_policy):
    spread = [golden_policy.sample(obs, 20, seeds=[1, 2], temperature=t).std(1).mean() for t in (0.1, 1.0, 3.0)]
    assert spread[0] < spread[1] < spread[2]


def test_the_raw_policy_is_evaluated_at_its_temperature(log, tmp_path, monkeypatch):
    asked, sample = [], parl.OpenVLAPolicy.sample

    def watched(policy, obs, num_samples, seeds=None, temperature=1.0):
        asked.append((num_samples, temperature))
        return sample(policy, obs, num_samples, seeds, temperature)

    monkeypatch.setattr(parl.OpenVLAPolicy, "sample", watched)
    flags = ["--num-eval-episodes", 1, "--sample-temperature", 0, "--online-episodes", 1]
    run_here("parl_openvla", *ONLINE, *flags, "--run-dir", tmp_path / "run")
    assert set(asked) == {(1, 0.0), (3, 1.0)}  # PA-RL's samples are no copies of one


def test_samples_have_an_age(log, tmp_path):
    run_here("parl_openvla", *ONLINE, "--refresh-states", 1, "--run-dir", tmp_path / "run")
    ages = [row["opt/sample_age"] for row in common.read_metrics(tmp_path / "run" / "metrics.csv")]
    assert 0 < ages[0] <= 1 and ages[0] < ages[-1] <= 3  # three episodes: three versions
    store = parl.SampleStore(2, parl.Args(num_samples=1))
    store.versions, store.version = torch.tensor([3, 1, 0]), 3
    assert store.age(torch.tensor([0, 1, 1])) == pytest.approx(4 / 3)


class FakeLibero:
    """What LIBERO's OffScreenRenderEnv gives: an upside-down image, gripper commands of -1 (open) and 1 (close)."""

    def __init__(self):
        self.sent, rows = [], np.arange(256, dtype=np.uint8)
        self.image = np.stack([np.tile(rows[:, None], (1, 256)), np.tile(rows, (256, 1)), np.zeros((256, 256))], -1)
        self.obs = {"agentview_image": self.image.astype(np.uint8)[::-1, ::-1]}

    def seed(self, seed):
        self.seeded = seed

    def reset(self):
        return self.obs

    def set_init_state(self, state):
        self.state = state
        return self.obs

    def step(self, action):
        self.sent.append(np.asarray(action))
        return self.obs, 0.0, len(self.sent) > 12, {}

    def close(self):
        self.closed = True


def test_liberos_evaluation_of_the_docs():
    """Against its official script by hand: ten steps of rest, the gripper's sign and range, the image turned and its
    middle 90 % of the area."""
    scope = {}
    exec(snippet("class Libero"), scope)
    fake = FakeLibero()
    env = scope["Libero"](fake, "put the bowl on the plate", [np.zeros(3), np.ones(3)])
    obs, info = env.reset(seed=3)
    assert [sent.tolist() for sent in fake.sent] == [[0, 0, 0, 0, 0, 0, -1]] * 10
    assert env.instruction == "put the bowl on the plate" and fake.state.tolist() == [1, 1, 1]
    assert obs["image"].shape == (224, 224, 3) and obs["image"].dtype == np.uint8
    side = math.sqrt(0.9)
    expected = 255 * ((1 - side) / 2 + side * np.array([0, 0.5, 1]))  # rows, then columns: upright, cropped
    assert obs["image"][[0, 112, 223], 112, 0] == pytest.approx(expected, abs=2)
    assert obs["image"][112, [0, 112, 223], 1] == pytest.approx(expected, abs=2)
    for gripper, sent in ((0.996, -1), (0.2, 1)):  # of the policy: 1 open, 0 close
        _, _, terminated, _, info = env.step(np.float32([0.1, 0, 0, 0, 0, 0, gripper]))
        assert fake.sent[-1].tolist() == pytest.approx([0.1, 0, 0, 0, 0, 0, sent])
        assert info["success"] is False and not terminated
    *_, info = env.step(np.zeros(7, np.float32))
    assert info["success"] is True
    assert env.action_space.low.tolist() == [-1] * 6 + [0] and env.action_space.high.tolist() == [1] * 7
    env.close()
    assert fake.closed
