"""Cost is told before it is paid: one line per phase, made from what was timed, and only what it tells of."""

import os
import re
import subprocess
import types

import pytest
from conftest import ROOT

import common


@pytest.fixture
def clock(monkeypatch):
    """clock.now: what time.perf_counter() returns, in seconds."""
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock.now)
    return clock


def counters(**flags):
    defaults = dict(bc_steps=0, policy_checkpoint="", num_eval_episodes=0, critic_utd=1, seed=0)
    return common.Counters(types.SimpleNamespace(**defaults | dict(online_steps=None, online_episodes=None) | flags))


def updates(clock, phase, number, seconds, first=0.0, **flags):
    """Goes through a phase, the first update of which takes `first` seconds more."""
    where = counters(**flags)
    then = {"bc": lambda _: where.then_offline(1800.0, 0.5), "offline": where.then_online}[phase]
    for step in where.steps(phase, number, then):
        clock.now += seconds + first * (step == 0)


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "about" in line]


def test_a_phase_is_told_after_20_updates_the_first_of_which_is_not_timed(clock, capsys):
    """A minute of compilation taken for what every update takes."""
    updates(clock, "bc", 1000, 2.0, first=60.0, offline_steps=0, online_steps=0)
    assert lines(capsys) == ["bc: about 33 minutes for 980 more updates; without evaluations"]
    updates(clock, "bc", 1000, 0.05)  # less than a minute
    updates(clock, "bc", 19, 100.0)
    assert lines(capsys) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (dict(online_steps=600), "; then online at least 10 minutes for 600 environment steps"),
        (dict(online_steps=600, critic_utd=3), "; then online at least 30 minutes for 600 environment steps"),
        (dict(online_episodes=1000), "; then online at least 17 minutes for each 1000 environment steps"),
        (dict(online_steps=0), ""),
        (dict(online_episodes=0), ""),
    ],
)
def test_offline_rl_tells_what_fine_tuning_takes_at_least(flags, expected, clock, capsys):
    """Nothing where there is none; no total where the length of an episode is not known."""
    updates(clock, "offline", 20_020, 1.0, **flags)
    assert lines(capsys) == [f"offline: about 5.6 hours for 20000 more updates{expected}; without evaluations"]


def test_cloning_tells_what_the_other_phases_take(clock, capsys):
    """Hours of cloning paid for before the days of offline RL are known."""
    updates(clock, "bc", 1000, 2.0, offline_steps=3600, online_steps=600)
    rest = "; then offline about 30 minutes; then online at least 5.0 minutes for 600 environment steps"
    assert lines(capsys) == [f"bc: about 33 minutes for 980 more updates{rest}; without evaluations"]


def test_online_is_told_after_an_episode(clock, capsys):
    """In environment steps or, where their number is not known, in episodes."""
    for flags, rest in (
        (dict(online_steps=1000), "900 more environment steps"),
        (dict(online_episodes=10), "9 more ep"),
    ):
        where = counters(**flags)
        for _ in where.episodes():
            clock.now += 50.0
            where.collected = {"train/length": 100.0, "train/success": 0.0}
            where.end_episode(100)
        (line,) = lines(capsys)
        assert line.startswith(f"online: about 7.5 minutes for {rest}")


def test_online_is_told_after_20_critic_updates_of_a_long_episode(clock, capsys):
    """After the episode it may be hours late; at the pace of the distillation, which comes first, a fifth."""
    where, told = counters(online_steps=1000), []
    for _ in where.episodes():
        clock.now += 10.0
        where.collected = {"train/length": 100.0, "train/success": 0.0}
        for _ in where.updates("distillation", 100):
            clock.now += 1.0
        for index in where.updates("critic", 100):
            clock.now += 5.0
            told += [(where.episode, index, line) for line in lines(capsys)]
        where.end_episode(100)
    line = "online: about 102 minutes for 1000 more environment steps; without evaluations"  # 6100 seconds
    assert told == [(0, 20, line)]


def test_without_a_terminal_a_line_follows_every_three_minutes(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with common.bar("samples", "states", 1000) as bar:
        for _ in range(1000):
            now[0] += 1.0
            bar.update()
    told = [line.strip() for line in capsys.readouterr().err.split("\n") if "of" in line]
    assert [line.split(" ")[1] for line in told] == ["180", "360", "540", "720", "900"]
    assert told[0] == "samples: 180 of 1000 states, about 13:40 left"


# ---------------------------------------------------------------- the script for a cluster


@pytest.mark.parametrize("status", [0, 1, 130, 143])
def test_only_a_run_that_was_told_to_stop_is_queued_again(status, tmp_path):
    """One that failed again and again, or one that finished again; and the job ends as its run did."""
    (script,) = re.findall(r"```bash\n(#!.*?)```", (ROOT / "docs" / "long-runs.md").read_text(), re.S)
    assert len(script.splitlines()) <= 10
    for name, ends in (("srun", f"exit {status}"), ("scontrol", "")):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >>{tmp_path}/log\n{ends}\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    (tmp_path / "parl.sh").write_text(script)
    assert subprocess.run(["bash", tmp_path / "parl.sh"], env=environment).returncode == status
    run, *after = (tmp_path / "log").read_text().splitlines()
    assert run.startswith("srun --cpus-per-task=4 python parl_diffusion.py ")
    assert run.endswith(" --seed 3 --run-dir runs/antmaze-3")
    assert after == ["scontrol requeue 77"] * (status == 143)
