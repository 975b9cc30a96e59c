"""What every script promises: its interface, its errors, what it is made of."""

import ast
import csv
import dataclasses
import importlib
import inspect
import io
import json
import re
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import POLICIES, ROOT, SCRIPTS, run_here
from parallel import PARALLEL, first_difference, split

import common

BANNERS = ["POLICY", "CRITIC", "ACTION OPTIMISATION", "LOSSES", "TRAIN"]


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


def test_interface(script):
    module = importlib.import_module(script)
    assert list(inspect.signature(getattr(module, POLICIES[script]).sample).parameters)[:3] == [
        "self",
        "obs",
        "num_samples",
    ]
    assert list(inspect.signature(module.optimize_actions).parameters) == [
        "critic", "obs", "candidates", "args", "dataset_actions"
    ]  # fmt: skip
    assert list(inspect.signature(module.critic_loss).parameters) == [
        "critic", "target_critic", "batch", "args", "random_actions", "td_members", "cql_members"
    ]  # fmt: skip
    for name, preset in module.PRESETS.items():
        args = module.Args(**common.preset_flags(name, module.PRESETS, module.Args))
        common.check_flags(args)
        if script == "parl_openvla":
            module.check(args)
        else:
            getattr(module, POLICIES[script])(4, 2, args)  # a policy checks its own flags
        scripts = PARALLEL if script in PARALLEL else [script]  # a preset names flags of several policies
        assert set(preset) <= set().union(*(vars(importlib.import_module(other).Args()) for other in scripts)), name


def test_sections_stand_in_order(script):
    source = (ROOT / f"{script}.py").read_text()
    positions = [source.index("class Args"), source.index("PRESETS = {")]
    positions += [source.index(f"= {banner} =") for banner in BANNERS]
    assert positions == sorted(positions)


def test_train_shows_where_it_logs_evaluates_saves_and_stops(script):
    """Hidden in a helper of common.py, a reader of the loop would not find them, nor change them."""
    module = importlib.import_module(script)
    source = inspect.getsource(module.learn if script == "parl_openvla" else module.train)  # learn: on rank 0
    for step in ("log.write(", "evaluate_agent(", "checkpoint.save()", "stop.asked", "stop.leave()"):
        assert step in source, step


@pytest.mark.parametrize("other", [name for name in PARALLEL if name != "parl_diffusion"])
def test_parallel_scripts_differ_in_their_policy_alone(other):
    names = ("parl_diffusion", other)
    assert not (difference := first_difference(names, [(ROOT / f"{name}.py").read_text() for name in names])), (
        difference
    )


def test_the_parallel_test_names_the_first_line_that_breaks_it():
    source = (ROOT / "parl_diffusion.py").read_text()
    own = source.replace("    width: int = 256", "    another: int = 1\n    width: int = 256")
    own = own.replace("F.silu(self.expand(", "F.relu(self.expand(")  # in the POLICY section
    assert own.count("\n") == source.count("\n") + 1 and "F.relu" in own
    assert first_difference(("one", "two"), (source, own)) == ""
    broken = own.replace("best = q.topk(", "best = (-q).topk(")
    number = source[: source.index("best = q.topk(")].count("\n") + 1
    difference = first_difference(("one", "two"), (source, broken))
    assert (
        f"one.py:{number}:     best = q.topk(" in difference and f"two.py:{number + 1}:     best = (-q)" in difference
    )
    assert first_difference(("one", "two"), (source, source)) == ""
    with pytest.raises(ValueError, match=r"0 places match .*; expected 1"):  # a hunk that nothing marks any more
        split(source.replace("    # policy\n", ""))


def test_what_parallel_scripts_share_is_copied_and_their_own_hunks_stay(tmp_path):
    """A copy that takes a policy along, that misses one of the five shared parts, or one of the scripts."""
    (tmp_path / "tests").mkdir()
    for name in ("tests/parallel.py", *(f"{script}.py" for script in PARALLEL)):
        shutil.copy(ROOT / name, tmp_path / name)
    before = {name: split((tmp_path / f"{name}.py").read_text()) for name in PARALLEL}
    shared, own = before["parl_gaussian"]
    for i, part in enumerate(shared):  # a line in the middle of each
        lines = part.split("\n")
        shared[i] = "\n".join([*lines[: len(lines) // 2], f"# changed {i}", *lines[len(lines) // 2 :]])
    text = "".join(part + hunk for part, hunk in zip(shared, [*own, ""], strict=True))
    (tmp_path / "parl_gaussian.py").write_text(text)
    subprocess.run([sys.executable, "tests/parallel.py", "parl_gaussian"], cwd=tmp_path, check=True)
    assert (tmp_path / "parl_gaussian.py").read_text() == text
    for name in PARALLEL:
        assert split((tmp_path / f"{name}.py").read_text()) == (shared, before[name][1]), name


def test_no_work_at_import_and_nothing_of_ours_but_common(script):
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert "common" in imported and not any(name.startswith(("parl_", "envs")) for name in imported)
    *body, last = tree.body
    assert isinstance(body[0].value, ast.Constant) and ast.unparse(last.test) == "__name__ == '__main__'"
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
    others = [ast.unparse(node) for node in body[1:] if not isinstance(node, allowed)]
    assert others == ["os.environ.setdefault('GOMP_SPINCOUNT', '10000')"]  # which torch reads when it is loaded


def test_a_script_is_imported_with_common_alone(script, tmp_path):
    """Beside them in a project of one's own there is no envs/."""
    for name in (f"{script}.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    code = f"import importlib.util, {script}; assert importlib.util.find_spec('envs') is None"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_every_flag_is_read(script):
    """A flag that nothing reads is the released code's best-known trap."""
    module = importlib.import_module(script)
    text = (ROOT / f"{script}.py").read_text() + (ROOT / "common.py").read_text()
    assert [name for name in vars(module.Args()) if not re.search(rf"args\.{name}\b", text)] == []


# ---------------------------------------------------------------- bad input


# No data, one evaluation environment: what a command needs to fail late, fast
LITTLE = ["--bc-steps", 0, "--offline-ratio", 0, "--num-eval-episodes", 1]

BAD_FLAGS = {
    "--env-id pointmaze-umaze-pley": "did you mean pointmaze-umaze-play",
    "--env-id antmaze-large-diverse-v1": "did you mean antmaze-large-diverse-v2",
    "--env-id metaworld_drawer_open": "did you mean metaworld-drawer-open",
    "--env-id CartPole-v1": "expected a bounded Box of one dimension",
    "--dataset-path=": "--dataset-path: empty; expected a file",
    "--env-id no_such_module:Env-v0": "no_such_module",
    "--env-id Pendulum-v1 --bc-steps 1": "--dataset-path FILE",
    "--env-id Pendulum-v1": "--q-min --q-max: expected both",
    "--dataset-path nowhere.hdf5 --bc-steps 1": "nowhere.hdf5: no such file",
    "--num-keep 9 --num-samples 8": "--num-keep 9: expected between 1 and 8",
    "--num-samples 0": "--num-samples 0: expected at least 1",
    "--bc-steps -1": "--bc-steps -1: expected at least 0",
    "--offline-steps -1": "--offline-steps -1: expected at least 0",
    "--offline-ratio 1.5": "--offline-ratio 1.5: expected between 0 and 1",
    "--discount 1": "--discount 1.0: expected between 0",
    "--eval-only": "--eval-only: expected --resume RUN",
    "--resume nowhere": "--resume nowhere: no config.json",
    "--policy-checkpoint nowhere.pt": "--policy-checkpoint nowhere.pt: no such file",
    "--policy-checkpoint notes.pt": "--policy-checkpoint notes.pt: not a checkpoint",
    "--hidden-dims 0": "--hidden-dims (0,): expected one or more widths",
    "--num-bins 1": "--num-bins 1: expected at least 2",
    "--critic-utd 0": "--critic-utd 0: expected at least 1",
    "--online-steps None": "expected a number for one of them",
    "--q-min nan": "--q-min nan: expected less than --q-max",
    "--q-min 5 --q-max 0": "--q-min 5.0: expected less than --q-max",
}
if not torch.cuda.is_available():
    BAD_FLAGS["--device cuda"] = "--device cuda: torch finds no GPU"

BAD_POLICY_FLAGS = {
    "parl_diffusion --width 6": "--width 6: expected a multiple of 4",
    "parl_diffusion --diffusion-steps 0": "--diffusion-steps 0: expected at least 1",
    "parl_diffusion --dropout 1.5": "--dropout 1.5: expected between 0 and 1",
    "parl_gaussian --num-layers 0": "--num-layers 0: expected at least 1",
    "parl_transformer --dropout 1.5": "--dropout 1.5: expected between 0 and 1",
    "parl_transformer --num-heads 0": "--num-heads 0: expected at least 1",
    "parl_transformer --num-heads 7": "expected a multiple of --num-heads 7",
    "parl_transformer --action-bins 1": "--action-bins 1: expected at least 2",
    "parl_transformer --head continuous --num-components 0": "--num-components 0: expected at least 1",
}


@pytest.mark.parametrize("script", PARALLEL)
@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(script, flags, monkeypatch, tmp_path):
    """One line, exit status 1 (which a text has), no run directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.pt").write_text("not a checkpoint")
    with pytest.raises(SystemExit) as stop:
        run_here(script, *LITTLE, *flags.split())
    assert str(stop.value).startswith("error: ") and BAD_FLAGS[flags] in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", BAD_POLICY_FLAGS)
def test_bad_flags_of_a_policy(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script, *flags = command.split()
    with pytest.raises(SystemExit) as stop:
        run_here(script, *LITTLE, *flags)
    assert str(stop.value).startswith("error: ") and BAD_POLICY_FLAGS[command] in str(stop.value)


@pytest.mark.parametrize("script", PARALLEL)
def test_a_robot_is_one_environment(script, monkeypatch, tmp_path):
    """It is not opened again for evaluation; and with 0 evaluation episodes it moves to learn alone."""
    made, episodes, make = [], [], gym.make
    if "Brief-v0" not in gym.registry:
        gym.register("Brief-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=4)
    monkeypatch.setattr(gym, "make", lambda *all, **named: made.append(all) or make(*all, **named))
    run = common.run_episodes
    monkeypatch.setattr(common, "run_episodes", lambda *all, **named: episodes.append(all[2]) or run(*all, **named))
    flags = ["--env-id", "Brief-v0", "--q-min", -9, "--q-max", 0, "--bc-steps", 0, "--offline-ratio", 0]
    flags += ["--online-episodes", 2, "--hidden-dims", 8, "--ensemble-size", 1, "--num-samples", 2, "--num-keep", 1]
    flags += ["--num-gradient-steps", 1, "--width", 8, "--batch-size", 4, "--num-threads", 1]
    for num_episodes, seeds in ((3, [3, 1, 1, 3, 3]), (0, [1, 1])):  # the policy is not cloned: it is evaluated first
        made.clear(), episodes.clear()
        run_here(script, *flags, "--num-eval-episodes", num_episodes, "--run-dir", tmp_path / str(num_episodes))
        assert len(made) == 1 and [len(part) for part in episodes] == seeds
    rows = dict(observations=np.zeros((9, 3)), actions=np.zeros((9, 1)), rewards=np.arange(9.0) - 9)
    np.savez(tmp_path / "data.npz", **rows, terminals=np.zeros(9), timeouts=np.arange(9) == 8)
    made.clear()
    flags += ["--offline-ratio", 0.5, "--offline-steps", 0, "--dataset-path", tmp_path / "data.npz"]
    run_here(script, *flags, "--num-eval-episodes", 1, "--run-dir", tmp_path / "data")
    assert len(made) == 1


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    module = importlib.import_module("parl_openvla")
    assert common.start(module.Args(device="cuda"))[0] == torch.device("cuda:1")


def test_unknown_flags(script, capsys):
    with pytest.raises(SystemExit) as stop:
        run_here(script, "--no-such-flag", 1)
    assert stop.value.code == 2 and "--no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("script", PARALLEL)
def test_resuming_a_run_of_another_script_or_a_broken_one(script, tmp_path):
    for text, message in (
        ('{"env_id": "pointmaze-umaze-play"}', r"config\.json is not one of this script's"),
        ('{"env_id": "point', r"config\.json cannot be read"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(SystemExit, match=message):
            run_here(script, "--resume", tmp_path)


@pytest.fixture(scope="session")
def empty_run(tmp_path_factory):
    """empty_run(script): the directory of a run that took no step, made once per script."""
    directories = {}

    def get(script):
        if script not in directories:
            directories[script] = tmp_path_factory.mktemp(script) / "run"
            run_here(script, *LITTLE, "--online-steps", 0, "--run-dir", directories[script])
        return directories[script]

    return get


# What no shape tells (or where a shape would tell it less clearly): flags, and the values there and here
OTHER_POLICIES = {
    "parl_diffusion --diffusion-steps 4": "--diffusion-steps is 5 there and 4 here",
    "parl_diffusion --width 32": "--width is 64 there and 32 here",
    "parl_diffusion --num-layers 1": "--num-layers is 2 there and 1 here",
    "parl_gaussian --width 32": "--width is 64 there and 32 here",
    "parl_gaussian --num-layers 1": "--num-layers is 2 there and 1 here",
    "parl_transformer --num-heads 4": "--num-heads is 8 there and 4 here",
    "parl_transformer --head continuous": "--head is 'tokens' there and 'continuous' here",
    "parl_transformer --action-bins 64": "--action-bins is 128 there and 64 here",
    "parl_transformer --num-components 4": "--num-components is 5 there and 4 here",
} | {f"{script} --no-normalize-obs": "--normalize-obs is True there and False here" for script in PARALLEL}


@pytest.mark.parametrize("by", ["--policy-checkpoint", "--resume"])
@pytest.mark.parametrize("command", OTHER_POLICIES)
def test_a_checkpoint_of_another_policy_is_refused(by, command, empty_run, tmp_path):
    """Loaded into a policy of equal shapes, its numbers would mean something else."""
    script, *flags = command.split()
    path = empty_run(script) / "checkpoint.pt"
    with pytest.raises(SystemExit) as stop:
        if by == "--resume":
            run_here(script, by, path.parent, *flags)
        else:
            run_here(script, *LITTLE, by, path, *flags, "--run-dir", tmp_path / "run")
    assert str(stop.value) == f"error: {by} {path}: {OTHER_POLICIES[command]}; expected the same"
    assert not (tmp_path / "run").exists()


OTHER_VALUES = {
    "--q-min -7": "--q-min is -50.0 there and -7.0 here",
    "--q-max 1": "--q-max is 0.0 there and 1.0 here",
    "--num-bins 64": "--num-bins is 128 there and 64 here",
    "--discount 0.9": "--discount is 0.98 there and 0.9 here",
    "--reward-bias -2": "--reward-bias is -1.0 there and -2.0 here",
    "--reward-scale 2": "--reward-scale is 1.0 there and 2.0 here",
    "--no-sparse-reward": "--sparse-reward is True there and False here",
    "--policy-checkpoint policy.pt": "--policy-checkpoint is '' there and 'policy.pt' here",
}


@pytest.mark.parametrize("script", PARALLEL)
@pytest.mark.parametrize("flags", OTHER_VALUES)
def test_a_run_is_not_resumed_with_other_values(script, flags, empty_run):
    """Its critic's outputs, or the rewards and returns in its buffer, would mean something else; cloning would end."""
    with pytest.raises(SystemExit) as stop:
        run_here(script, "--resume", empty_run(script), *flags.split())
    assert OTHER_VALUES[flags] in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("script", PARALLEL)
def test_a_run_is_resumed_with_other_settings_of_learning(script, empty_run, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(empty_run(script), directory)
    flags = ["--bc-lr", 1e-5, "--distill-lr", 1e-5, "--policy-warmup-steps", 3, "--policy-ema-rate", 0.5]
    flags += ["--num-samples", 16, "--batch-size", 8, "--cql-weight", 1]
    flags += ["--dropout", 0.3] if script != "parl_gaussian" else []
    run_here(script, "--resume", directory, *flags)
    assert json.loads((directory / "config.json").read_text())["num_samples"] == 16


@pytest.mark.parametrize("script", PARALLEL)
def test_a_policy_is_taken_from_a_checkpoint_with_other_settings_of_learning(script, empty_run, tmp_path):
    """A critic of its own begins with it: what fixes a critic's numbers fixes nothing here."""
    path = empty_run(script) / "checkpoint.pt"
    flags = ["--bc-lr", 1e-5, "--policy-ema-rate", 0.5, "--num-bins", 64, "--hidden-dims", 8, "--discount", 0.9]
    flags += ["--dropout", 0.3] if script != "parl_gaussian" else []
    flags += ["--online-steps", 0, "--run-dir", tmp_path / "run"]
    run_here(script, *LITTLE, "--policy-checkpoint", path, *flags)
    there, here = (torch.load(file, weights_only=True) for file in (path, tmp_path / "run" / "checkpoint.pt"))
    for name in ("policy", "policy_ema"):
        assert all(torch.equal(here[name][key], value) for key, value in there["policy_ema"].items())


@pytest.mark.parametrize("command", ["parl_diffusion --diffusion-steps 4", "parl_transformer --head continuous"])
def test_what_a_checkpoint_fixes_does_not_depend_on_the_order_of_flags(command, empty_run, monkeypatch, tmp_path):
    """Read off the places of fields in Args, a flag of one's own at its end would be fixed, one that moved free."""
    (script, *flags), directory = command.split(), tmp_path / "run"
    module = importlib.import_module(script)
    shutil.copytree(empty_run(script), directory)
    fields = [(f.name, f.type, dataclasses.field(default=f.default)) for f in dataclasses.fields(module.Args)]
    monkeypatch.setattr(module, "Args", dataclasses.make_dataclass("Args", reversed(fields)))
    for refused, message in ((flags, OTHER_POLICIES[command]), (["--num-bins", 64], OTHER_VALUES["--num-bins 64"])):
        with pytest.raises(SystemExit, match=re.escape(f"{message}; expected the same")):
            run_here(script, "--resume", directory, *refused)
    with pytest.raises(SystemExit, match=re.escape(f"{OTHER_POLICIES[command]}; expected the same")):
        run_here(script, *LITTLE, "--policy-checkpoint", directory / "checkpoint.pt", *flags)
    run_here(script, "--resume", directory, "--dropout", 0.3, "--distill-lr", 1e-5, "--num-samples", 16)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_checkpoint_fixes_are_flags(script):
    """A name that was changed in Args and not in fixed_flags: loading would fail with it, and not by its name."""
    module = importlib.import_module(script)
    owners = [getattr(module, POLICIES[script]), module.Critic, *[common.Normalizer] * (script in PARALLEL)]
    for owner in owners:
        assert owner.fixed_flags and set(owner.fixed_flags) <= {f.name for f in dataclasses.fields(module.Args)}


def opened(directory, script="parl_gaussian", policy_class=None, **flags):
    """A run before `begin`, of states (3,) and actions (2,), and its flags."""
    module = importlib.import_module(script)
    sizes = dict(width=8, num_layers=1, hidden_dims=(8,), ensemble_size=1, q_min=-10.0, q_max=0.0)
    args = module.Args(**{"run_dir": str(directory), **sizes, **flags})
    generator, dataset = np.random.default_rng(0), common.ReplayBuffer(3, 2)
    agent = module.Agent(dataset, 3, 2, args, torch.device("cpu"), generator)
    if policy_class:
        agent.policy = policy_class(3, 2, args)
    return common.open_run(args, script, generator, dataset, agent.kept()), args


@pytest.mark.parametrize("script", PARALLEL)
def test_trying_what_later_phases_cost_changes_nothing_of_the_run(script):
    """A run of more than a minute that differs from a short one: an update too many, noise that is used up."""
    module = importlib.import_module(script)
    heads = dict(num_heads=1) if script == "parl_transformer" else {}
    sizes = dict(width=8, num_layers=1, hidden_dims=(8,), batch_size=4)
    args = module.Args(q_min=-10.0, q_max=0.0, **sizes, **heads)
    dataset, generator = common.ReplayBuffer(3, 2), np.random.default_rng(0)
    rng = np.random.default_rng(1)
    numbers = (rng.normal(size=(9, 3)), rng.uniform(-1, 1, (8, 2)), -np.ones(8), np.ones(8), -np.ones(8))
    dataset.add_episode(*(array.astype(np.float32) for array in numbers))
    agent = module.Agent(dataset, 3, 2, args, torch.device("cpu"), generator)
    agent.improve_critic(0, 4)  # its optimiser has a state by now
    latest = agent.latest

    def state():
        torch.save({name: part.state_dict() for name, part in agent.kept().items()}, file := io.BytesIO())
        return file.getvalue(), torch.get_rng_state().tolist(), generator.bit_generator.state

    before = state()
    offline, update = agent.time_later()
    assert offline > update > 0
    assert state() == before and agent.latest is latest
    agent.improve_critic(1, 4)
    assert state() != before


@pytest.mark.parametrize("script", PARALLEL)
def test_one_state_is_acted_on_by_one_thread(script, monkeypatch):
    """Beside other programs the second one is waited for, and an action took 2.6 seconds."""
    agent_class, threads = importlib.import_module(script).Agent, []
    monkeypatch.setattr(agent_class, "act", lambda *_: threads.append(torch.get_num_threads()))
    with common.threads(2):
        agent_class.explore(object.__new__(agent_class), None, None)
        assert threads == [1] and torch.get_num_threads() == 2


PHASES_LEFT = [("offline", "bc"), ("distill", "offline"), ("online", "bc"), ("online", "offline_distill")]


@pytest.mark.parametrize("phase, name", PHASES_LEFT)
def test_a_phase_that_a_run_has_left_is_not_gone_back_to(phase, name, tmp_path):
    """More cloning would overwrite what the policy has learned since."""
    flag, steps = f"--{name.replace('_', '-')}-steps", dict(bc_steps=3, offline_steps=3, offline_distill_steps=3)
    run, args = opened(tmp_path, **steps)
    common.begin(run, args)
    run.counters.phase = phase
    run.checkpoint.save()
    with pytest.raises(
        common.InputError, match=f"^{flag} 4 with --resume .*: expected at most its 3; it is in {phase}"
    ):
        opened(tmp_path, resume=str(tmp_path), **steps | {f"{name}_steps": 4})
    for number in (3, 2):
        opened(tmp_path, resume=str(tmp_path), **steps | {f"{name}_steps": number})


def test_a_metric_of_ones_own_gets_a_column(tmp_path):
    """In the middle of a run: rows of another length than the header, values under another column's name, rows before
    that are lost; resumed, a column that is written twice, or one that is gone."""

    def cells():
        with open(tmp_path / "metrics.csv", newline="") as file:
            return list(csv.reader(file))

    run, args = opened(tmp_path)
    common.begin(run, args)
    run.log.add({"critic/loss": 1.0})
    run.log.write({"eval/return": 7.0})
    assert cells()[0] == common.COLUMNS
    run.log.add({"mine/x": 2.0})
    run.log.add({"mine/x": torch.tensor(4.0)})
    run.log.write({})
    run.checkpoint.save()
    for number in (5.0, 6.0):  # the first is of a run that is killed before it saves
        run.log.write({"mine/y": number, "eval/return": 8.0})
        header, *rows = cells()
        assert header == [*common.COLUMNS, "mine/x", "mine/y"] and {len(row) for row in rows} == {len(header)}
        first, second, third = common.read_metrics(tmp_path / "metrics.csv")
        assert (first["critic/loss"], first["eval/return"], second["mine/x"]) == (1, 7, 3)
        assert (third["mine/y"], third["eval/return"]) == (number, 8)
        assert not {"mine/x", "mine/y"} & set(first) and "mine/y" not in second and "mine/x" not in third
        run, args = opened(tmp_path, resume=str(tmp_path))
        common.begin(run, args)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    run, args = opened(tmp_path)
    common.begin(run, args)
    run.log.add({"critic/loss": torch.tensor(1.0)})
    run.checkpoint.save()
    good = (tmp_path / "checkpoint.pt").read_bytes()
    run.log.add({"critic/loss": torch.tensor(float("nan"))})
    with pytest.raises(FloatingPointError, match="critic/loss"):
        run.checkpoint.save()
    assert (tmp_path / "checkpoint.pt").read_bytes() == good
    assert not list(tmp_path.glob(".*.partial"))


def test_checkpoints_of_another_policy_class_or_kind_are_refused(tmp_path):
    run, args = opened(tmp_path / "run")
    common.begin(run, args)

    class Another(importlib.import_module("parl_gaussian").GaussianPolicy):
        """Of the same shapes and flags."""

    def load(path, **options):
        return opened(tmp_path / "other", policy_checkpoint=str(tmp_path / path), **options)

    load("run/checkpoint.pt")
    with pytest.raises(common.InputError, match="policy_class is GaussianPolicy there; expected Another"):
        load("run/checkpoint.pt", policy_class=Another)
    with pytest.raises(common.InputError, match=r"--resume .*: policy_class is GaussianPolicy there; expected Another"):
        opened(tmp_path / "run", policy_class=Another, resume=str(tmp_path / "run"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(common.InputError, match="holds a list"):
        load("list.pt")
    torch.save(args, tmp_path / "object.pt")  # would run code if it were unpickled
    with pytest.raises(common.InputError, match="not a checkpoint"):
        load("object.pt")
    with pytest.raises(common.InputError, match="holds a run"):
        common.begin(run, args)
