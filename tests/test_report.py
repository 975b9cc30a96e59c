"""benchmark/report.py, its statistics against values worked out by hand, and benchmark/run.sh with a script that only
pretends to learn."""

import csv
import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import common

sys.path.append(str(ROOT / "benchmark"))
report = importlib.import_module("report")

CONFIG = dict(env_id="pointmaze-umaze-play", policy_class="GaussianPolicy", num_eval_episodes=50, cql_weight=0.1)
CONFIG |= dict(bc_steps=100, offline_steps=50, offline_distill_steps=0, online_steps=30, online_episodes=None)
CONFIG |= dict(hidden_dims=[128, 128], sparse_reward=True, dataset_sha256="0123456789", policy_checkpoint="")


def row(phase, gradient_step, raw=None, optimised=None, **others):
    """A row of metrics.csv; raw, optimised: success rates."""
    rates = {"eval/policy_success_rate": raw, "eval/success_rate": optimised}
    others = {name.replace("__", "/"): value for name, value in others.items()}
    return {"phase": phase, "gradient_step": gradient_step, "env_step": 0, "episode": 0} | rates | others


def rows(cloned=0.4, offline=0.6, online=0.8, regret=0.5):
    """A run that ended: its last evaluations."""
    return [
        row("bc", 100, cloned),
        row("offline", 150, cloned, offline),
        row("online", 180, cloned + 0.1, online, env_step=30, episode=3, train__regret=regret),
    ]


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, rows, flags...) -> the directory of a run."""

    def make(name, rows, **flags):
        directory = tmp_path / name
        directory.mkdir()
        seed = int(name.rpartition("-")[2])
        config = CONFIG | {"seed": seed, "run_dir": str(directory), "command": ["--seed", str(seed)]} | flags
        (directory / "config.json").write_text(json.dumps(config))
        with open(directory / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
            writer.writeheader()
            writer.writerows(rows)
        return directory

    return make


def finals(directory):
    """{(phase, quantity): final value} of one run."""
    (group,) = report.group_runs([directory])
    return {key: next(iter(values.values())) for key, values in report.final_values(group.runs).items()}


# ======================================== STATISTICS ========================================


def test_mean_and_sample_standard_deviation():
    """Deviations -3, -2, -1, 0, 6: squares add up to 50, over n - 1 = 4. With n it would be 3.16."""
    stats = report.describe([1, 2, 3, 4, 10])
    assert (stats["n"], stats["mean"]) == (5, 4) and stats["sd"] == pytest.approx(12.5**0.5)


def test_iqm_is_the_mean_of_the_middle_half():
    """Of 8 values two are cut off at each end; of 5 one (5 / 4, rounded down); of 3 none. In any order, per row."""
    assert report.iqm(np.array([100, 1, 2, 3, 4, 5, 6, -50])) == (2 + 3 + 4 + 5) / 4
    assert report.describe([10, 2, 4, 3, 1])["iqm"] == 3
    assert report.iqm(np.array([[0, 3, 9], [1, 1, 4]])).tolist() == [4, 2]


def test_no_iqm_below_five_seeds_no_sd_of_one():
    assert "iqm" not in report.describe([1, 2, 3, 4]) and "sd" in report.describe([1, 2])
    assert set(report.describe([1])) == {"n", "mean"}


def test_bootstrap_interval():
    """Of 0, 0, 0, 0, 1 a resample of five holds k ones, binomial with p = 1/5: k <= 2 has probability 0.942, k <= 3
    0.993. So the 97.5th percentile is k = 3: mean 3/5; after the cut of one at each end two of the middle three are
    ones. k = 0 has 0.33: the lower end is 0."""
    stats = report.describe([0, 0, 1, 0, 0])
    assert (stats["low"], stats["high"]) == pytest.approx((0, 0.6))
    assert (stats["iqm_low"], stats["iqm_high"]) == pytest.approx((0, 2 / 3))


def test_bootstrap_interval_is_of_95_percent():
    """Of 0, 0, 1 a resample of three has k ones with p = 1/3: k <= 2 has 0.963, so 97.5 % is at three and 95 at two."""
    assert report.describe([0, 0, 1])["high"] == 1


def test_bootstrap_interval_of_two_seeds_is_their_range():
    """A quarter of the resamples is the lower value twice."""
    stats = report.describe([30, 50])
    assert (stats["low"], stats["high"], stats["mean"]) == (30, 50, 40)


def test_wilson_interval():
    """Of 0 in n: 0 to z^2 / (n + z^2); of 1 in 1: 1 / (1 + z^2) to 1; of 50 in 100, by the formula."""
    square = 1.959964**2
    assert report.wilson(0, 50) == pytest.approx((0, square / (50 + square)))
    assert report.wilson(1, 1) == pytest.approx((1 / (1 + square), 1))
    assert report.wilson(0.5, 100) == pytest.approx((0.403832, 0.596168), abs=1e-6)


def test_a_single_run_has_wilsons_interval_and_only_for_success(make_run):
    groups = report.group_runs([make_run("a-0", rows(cloned=0.0))])
    stats = {(row["phase"], row["quantity"]): row["stats"] for row in report.summarise(groups)}
    assert stats["bc", "raw policy: success %"]["high"] == pytest.approx(100 * report.wilson(0, 50)[1])
    assert "low" not in stats["online", "regret"]


def test_what_a_seed_does_not_have_does_not_count():
    stats = report.describe([math.nan, 2, 4])
    assert (stats["n"], stats["mean"], stats["sd"]) == (2, 3, pytest.approx(2**0.5))


# ======================================== GROUPS ========================================


def test_runs_that_differ_in_the_seed_alone_are_a_group(make_run):
    """And in what does not change learning: where things lie, threads, the device, tracking, versions."""
    others = dict(device="cuda", num_threads=4, track=True, dataset_path="/x.npz", resume="runs/a", torch="2.14")
    runs = [make_run("a-1", rows()), make_run("a-0", rows(), **others)]
    (group,) = report.group_runs(runs)
    assert list(group.runs) == [0, 1] and group.name == "pointmaze-umaze-play, GaussianPolicy"


def test_runs_with_other_flags_are_apart_and_named_by_them(make_run):
    sweep = [make_run(f"a{weight}-{seed}", rows(), cql_weight=weight) for weight in (0.01, 0.1) for seed in (0, 1)]
    groups = report.group_runs(sweep)
    assert [(group.name, list(group.runs)) for group in groups] == [
        ("--cql-weight 0.01", [0, 1]),
        ("--cql-weight 0.1", [0, 1]),
    ]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (dict(hidden_dims=[256] * 4), ["--hidden-dims 128 128", "--hidden-dims 256 256 256 256"]),
        (dict(sparse_reward=False), ["--sparse-reward", "--no-sparse-reward"]),
        (dict(dataset_sha256="ab" * 32), ["dataset_sha256 01234567", "dataset_sha256 abababab"]),
        (dict(head="tokens"), ["--head absent", "--head tokens"]),
        (dict(policy_class="DiffusionPolicy", width=64), ["GaussianPolicy", "DiffusionPolicy"]),
        (
            dict(policy_checkpoint="a/checkpoint.pt"),
            ["--policy-checkpoint none", "--policy-checkpoint a/checkpoint.pt"],
        ),
    ],
)
def test_names(flags, names, make_run):
    """What follows from another policy or task is not in the name."""
    groups = report.group_runs([make_run("a-0", rows()), make_run("b-0", rows(), **flags)])
    assert [group.name for group in groups] == names


def test_what_is_not_in_a_name_is_in_a_table(make_run):
    groups = report.group_runs([make_run("a-0", rows()), make_run("b-0", rows(), env_id="kitchen", cql_weight=0.5)])
    text = report.document(groups, report.summarise(groups))
    assert "| | `cql_weight` |\n|---|---|\n| pointmaze-umaze-play | 0.1 |\n| kitchen | 0.5 |" in text


def test_a_clone_of_its_own_for_each_seed_does_not_split_a_group(make_run):
    clones = [make_run(f"a-{seed}", rows(), policy_checkpoint=f"runs/clone-{seed}/checkpoint.pt") for seed in (0, 1)]
    one_clone = [make_run(f"b-{seed}", rows(), policy_checkpoint="runs/other-0/checkpoint.pt") for seed in (0, 1)]
    assert [len(group.runs) for group in report.group_runs(clones + one_clone)] == [2, 2]


def test_the_same_run_twice_is_not_two_samples(make_run):
    run, again = make_run("a-0", rows()), make_run("again-0", rows())
    assert len(report.group_runs([run, f"{run}/"])[0].runs) == 1
    with pytest.raises(common.InputError, match=r"a-0 and .*again-0: the same flags and seed 0"):
        report.group_runs([run, again])


def test_the_names_of_flags_and_columns_are_those_of_common():
    flags = {field.name for field in dataclasses.fields(common.RunArgs)}
    written = {
        "command",
        "commit",
        "python",
        "torch",
        "numpy",
        "gymnasium",
        "dataset_note",
    }  # into config.json, by `begin`
    assert flags | written >= report.NOT_LEARNING
    assert {column for column, _ in report.QUANTITIES.values()} <= set(common.COLUMNS)


# ======================================== FINAL VALUES ========================================


def test_final_not_best(make_run):
    """Nor are the steps to the goal of an earlier evaluation taken, where the last one had no success."""
    metrics = [row("bc", 50, 0.9, eval__policy_steps_to_goal=20), row("bc", 100, 0.0), row("offline", 120, 0.0, 1.0)]
    metrics += [row("offline", 150, 0.0, 0.3, eval__steps_to_goal=7)]
    assert finals(make_run("a-0", metrics, online_steps=0)) == {
        ("bc", "raw policy: success %"): 0,
        ("offline", "raw policy: success %"): 0,
        ("offline", "optimised: success %"): 30,
        ("offline", "optimised: steps to goal"): 7,
    }


@pytest.mark.parametrize(
    ("last", "unfinished"),
    [
        (row("bc", 60, 0.7), "bc"),
        (row("offline", 140, 0.4, 0.7), "offline"),
        (row("online", 170, 0.4, 0.7, env_step=20, episode=2), "online"),
        (row("online", 190, 0.4, 0.7, env_step=33, train__regret=1), None),  # the last episode is finished
    ],
)
def test_a_phase_that_has_not_ended_does_not_count(last, unfinished, make_run):
    before = [row("bc", 100, 0.4), row("offline", 150, 0.4, 0.6)]
    run = make_run("a-0", [row for row in before if row["gradient_step"] < last["gradient_step"]] + [last])
    groups = report.group_runs([run, make_run("a-1", rows())])
    assert groups[0].runs[0].unfinished() == unfinished
    values = report.final_values(groups[0].runs)
    assert math.isnan(values[last["phase"], "raw policy: success %"][0]) == (unfinished is not None)
    text = report.document(groups, report.summarise(groups))
    assert (f"{run} has not ended" in text) == ("(1 of 2)" in text) == (unfinished is not None)


def test_the_number_of_online_episodes_can_be_the_limit(make_run):
    flags = dict(online_steps=None, online_episodes=3)
    assert report.read_run(make_run("a-0", rows(), **flags)).unfinished() is None
    assert report.read_run(make_run("b-0", rows(), **flags | {"online_episodes": 4})).unfinished() == "online"


def test_the_policy_that_a_run_started_with(make_run):
    metrics = [row("bc", 0, 0.3), row("offline", 50, 0.3, 0.6)]
    values = finals(make_run("a-0", metrics, policy_checkpoint="clone/checkpoint.pt", online_steps=0))
    assert values["start", "raw policy: success %"] == pytest.approx(30)
    assert ("bc", "raw policy: success %") not in values and values["offline", "optimised: success %"] == 60


def test_trials_before_offline_rl_are_no_start(make_run):
    """--warmup-episodes: rows of no update and no evaluation."""
    metrics = [row("bc", 0, 0.3), row("warmup", 0, train__success=1.0), row("offline", 50, 0.3, 0.6)]
    assert {phase for phase, _ in finals(make_run("a-0", metrics, online_steps=0))} == {"start", "offline"}


def test_runs_without_evaluations_or_without_rows(make_run, tmp_path, capsys):
    last = row("online", 180, env_step=30, train__regret=0.2)
    runs = [make_run("a-0", [row("bc", 100), last]), make_run("a-1", [row("bc", 1)])]
    (runs[1] / "metrics.csv").write_text("phase,gradient_step,env_step,episode\n")
    report.report(runs, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "| online | regret | 0.2 | - | 0.2 | - | - |" in printed and f"{runs[1]} has no rows yet" in printed


@pytest.mark.parametrize("missing", ["config.json", "metrics.csv"])
def test_a_directory_that_is_not_a_run(missing, make_run):
    run = make_run("a-0", rows())
    (run / missing).unlink()
    with pytest.raises(common.InputError, match=rf"a-0: no {missing} there"):
        report.group_runs([run])


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_config_that_is_not_one(text, make_run):
    run = make_run("a-0", rows())
    (run / "config.json").write_text(text)
    with pytest.raises(common.InputError, match="a-0: "):
        report.group_runs([run])


# ======================================== TABLES ========================================


def table(text, heading):
    """The cells of the first table below a heading, a list per line."""
    lines = text.split(f"## {heading}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def test_the_document(make_run):
    runs = [make_run(f"a-{seed}", rows(online=rate, regret=0.25)) for seed, rate in enumerate((0.7, 0.9))]
    groups = report.group_runs(runs)
    text = report.document(groups, report.summarise(groups))
    titles, means = table(text, "Success % after each phase")
    assert dict(zip(titles, means, strict=True)) == {
        "": groups[0].name,
        "seeds": "2",
        "cloning, raw policy": "40 ± 0",
        "offline RL, raw policy": "40 ± 0",
        "offline RL, optimised": "60 ± 0",
        "online, raw policy": "50 ± 0",
        "online, optimised": "80 ± 14",
        "online, regret": "0.25 ± 0",
    }
    every_seed = table(text, groups[0].name)
    assert every_seed[0] == ["after", "", "seed 0", "seed 1", "mean", "sd", "95 %"]
    assert ["online", "optimised: success %", "70", "90", "80", "14", "70 to 90"] in every_seed
    assert "2 runs, 1 group" in text and "50 episodes per evaluation" in text


def test_normalised_scores_of_clone_raw_and_optimised(make_run):
    """Of D4RL's kitchen; a run from before the raw policy's score was logged has the optimised one's alone."""
    scores = [row("bc", 100, 0, eval__policy_normalized_score=40)]
    scores += [row("offline", 150, 0, 0, eval__policy_normalized_score=40, eval__normalized_score=55)]
    last = dict(env_step=30, eval__policy_normalized_score=60, eval__normalized_score=75)
    old = [row("bc", 100, 0), row("offline", 150, 0, 0, eval__normalized_score=50)]
    old += [row("online", 180, 0, 0, env_step=30, eval__normalized_score=60)]
    groups = report.group_runs([make_run("a-0", [*scores, row("online", 180, 0, 0, **last)]), make_run("b-1", old)])
    titles, values = table(report.document(groups, report.summarise(groups)), "Normalised score after each phase")
    line = dict(zip(titles, values, strict=True))
    assert line["cloning, raw policy"] == "40 (1 of 2)" and line["online, raw policy"] == "60 (1 of 2)"
    assert line["online, optimised"] == "67.5 ± 11" and "regret" not in line


def test_returns_are_shown_where_nothing_succeeds(make_run):
    metrics = [row("bc", 100, 0.0, eval__policy_return=-1234.6)]
    groups = report.group_runs([make_run("a-0", metrics, offline_steps=0, online_steps=0)])
    text = report.document(groups, report.summarise(groups))
    assert table(text, "Return after each phase")[1] == [groups[0].name, "1", "-1235"]
    assert table(text, "Success % after each phase")[1] == [groups[0].name, "1", "0"]


def test_returns_are_shown_where_all_succeed(make_run):
    """A dense task in which any end with a positive reward counts as a success."""
    metrics = [row("bc", 100, 1.0, eval__policy_return=999.7)]
    groups = report.group_runs([make_run("a-0", metrics, offline_steps=0, online_steps=0)])
    text = report.document(groups, report.summarise(groups))
    assert table(text, "Return after each phase")[1] == [groups[0].name, "1", "1000"]


def test_numbers():
    values = {999.7: "1000", -999.6: "-1000", 99.96: "100", 12.34: "12.3", 0.0: "0", 1e-5: "1e-05", 12345.6: "12346"}
    assert {value: report.number(value) for value in values} == values
    assert report.number(99.6, 2) == "100" and report.number(math.nan) == "-"
    assert report.describe([0.1] * 3)["sd"] == 0  # not 1.7e-17


def test_a_run_that_failed_at_its_flags_is_left_out(make_run, tmp_path, capsys):
    """It ended the whole table."""
    (tmp_path / "failed-9").mkdir()
    (tmp_path / "failed-9" / "log.txt").write_text("error: --preset nope")
    groups = report.group_runs([make_run("a-0", rows()), tmp_path / "failed-9"])
    assert [*groups[0].runs] == [0]
    assert re.fullmatch(r"warning: left out: .*failed-9: no config.json there; expected .*\n", capsys.readouterr().err)


def test_a_cut_line_is_no_traceback(make_run):
    run = make_run("a-0", rows())
    (run / "metrics.csv").write_text((run / "metrics.csv").read_text().rsplit(",", 12)[0])
    with pytest.raises(common.InputError, match=r"a-0: these are not the files of a run"):
        report.group_runs([run])


def test_a_run_that_is_to_go_online_is_told(make_run):
    """Stopped in the first online episode it looks like one of offline RL alone."""
    metrics = [row("bc", 100, 0.4), row("offline", 150, 0.4, 0.6)]
    runs = [make_run("a-0", metrics), make_run("b-0", metrics, online_steps=0), make_run("c-0", rows())]
    for run, expected in zip(runs, (True, False, False), strict=True):
        groups = report.group_runs([run])
        assert ("has not begun online" in report.document(groups, report.summarise(groups))) == expected


def test_runs_of_several_commits_are_told(make_run):
    same = [make_run(f"a-{seed}", rows(), commit="abc") for seed in range(2)]
    groups = report.group_runs(same)
    assert "commits" not in report.document(groups, report.summarise(groups))
    (group,) = groups = report.group_runs([*same, make_run("a-2", rows(), commit="def-dirty")])
    assert len(group.runs) == 3
    assert "of different commits: abc, def-dirty." in report.document(groups, report.summarise(groups))


def test_markdown_csv_and_plot_are_written(make_run, tmp_path, capsys, monkeypatch):
    runs = [make_run(f"a{w}-{s}", rows(online=s / 10), cql_weight=w) for w in (0.5, 1.0, 2.0) for s in range(5)]
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, runs), "--out", str(tmp_path / "tables" / "cql0.5")])
    report.main()
    assert (tmp_path / "tables" / "cql0.5.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "tables" / "cql0.5.png").stat().st_size > 10_000
    with open(tmp_path / "tables" / "cql0.5.csv", newline="") as file:
        lines = [row for row in csv.DictReader(file) if (row["phase"], row["cql_weight"]) == ("online", "2.0")]
    (line,) = (row for row in lines if row["quantity"] == "optimised: success %")
    assert [line[f"seed_{seed}"] for seed in range(5)] == ["0", "10", "20", "30", "40"]
    assert {name: float(line[name]) for name in ("n", "mean", "iqm")} == dict(n=5, mean=20, iqm=20)
    assert float(line["sd"]) == pytest.approx(250**0.5, rel=1e-5)


def test_an_error_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .*no config.json there; expected the directory of a run$"):
        report.main()


def test_the_tables_of_the_docs_are_those_of_the_results():
    tables = report.docs_tables(report.load_results())
    names = ["steady", "pointmaze", "manipulation", "chunks", "antmaze", "openvla"]
    assert set(tables) == {f"{name}.md" for name in names}
    for file, text in tables.items():
        assert text == (ROOT / "benchmark" / file).read_text(), f"python benchmark/report.py writes another {file}"


# ======================================== RUN.SH ========================================

STUB = '''
"""Ends with --status, once: begun again it goes on to its end."""
import pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = pathlib.Path(flags["--run-dir"])
status = 0 if (run / "metrics.csv").exists() else int(flags.get("--status", 0))
(run / "metrics.csv").write_text("phase\\n")
with open("calls.txt", "a") as file:
    print(run.name, *sys.argv[1:], file=file)
sys.exit(status)
'''


@pytest.fixture
def run_sh(tmp_path):
    """run_sh("lines of a file", arguments...) -> (the process, names of the runs so far, names of the results)"""
    (tmp_path / "benchmark").mkdir()
    shutil.copy(ROOT / "benchmark" / "run.sh", tmp_path / "benchmark")
    (tmp_path / "stub.py").write_text(STUB)

    def run(lines, *arguments):
        (tmp_path / "file.txt").write_text(lines)
        command = ["bash", str(tmp_path / "benchmark" / "run.sh"), "file.txt", *arguments]
        path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        where = dict(cwd=tmp_path, env=os.environ | {"PATH": path})
        result = subprocess.run(command, **where, capture_output=True, text=True, timeout=60)
        calls = (tmp_path / "calls.txt").read_text().splitlines() if (tmp_path / "calls.txt").exists() else []
        return result, calls, sorted(path.stem for path in (tmp_path / "benchmark" / "results").glob("*.csv"))

    return run


def test_run_sh_takes_a_file(run_sh):
    result, calls, results = run_sh('# comment\n\none-0 stub --seed 0\ntwo-0 stub --x "a  $HOME"', "1")
    assert result.returncode == 0 and results == ["one-0", "two-0"], result.stderr
    assert calls[0].startswith("one-0 --num-eval-episodes 100 --num-threads ")
    assert calls[0].endswith(" --run-dir runs/one-0 --seed 0") and calls[1].endswith(f" --x a  {os.environ['HOME']}")


def test_run_sh_seeds_and_sweep(run_sh):
    result, calls, results = run_sh("a stub --y 1\nb stub\n", "--seeds", "0-1,5", "2", "--sweep", "cql_weight=0.01,0.1")
    names = [f"{name}-cql_weight_{w}-{s}" for name in "ab" for w in ("0.01", "0.1") for s in (0, 1, 5)]
    assert result.returncode == 0 and results == sorted(names), result.stderr
    (call,) = (call for call in calls if call.startswith("a-cql_weight_0.1-5 "))
    assert call.endswith("--run-dir runs/a-cql_weight_0.1-5 --y 1 --cql-weight 0.1 --seed 5")


def test_run_sh_seeds_alone_and_sweep_alone(run_sh):
    assert run_sh("a stub\n", "--seeds", "3")[2] == ["a-3"]
    assert run_sh("b stub --seed 0\n", "--sweep", "head=tokens,continuous")[2][1:] == [
        "b-head_continuous",
        "b-head_tokens",
    ]


def test_run_sh_tells_of_a_failed_run_and_does_the_others(run_sh):
    result, _, results = run_sh("a stub --status 1\nb stub\n", "1")
    assert result.returncode != 0 and results == ["b"]
    assert result.stdout == "a failed: runs/a/log.txt\n"


@pytest.mark.parametrize("status", ["143", "130"])
def test_run_sh_goes_on_with_a_stopped_run(status, run_sh):
    """By the same command. It is not taken for finished, and what has finished is not run again."""
    lines = f"a stub --status {status}\nb stub\n"
    result, _, results = run_sh(lines, "1")
    assert result.returncode != 0 and results == ["b"]
    assert result.stdout == "a was stopped; the same command goes on\n"
    result, calls, results = run_sh(lines, "1")
    assert result.returncode == 0 and results == ["a", "b"]
    assert [call.split()[0] for call in calls] == ["a", "b", "a"] and calls[0] == calls[2]
    assert result.stdout == "b is not run again: benchmark/results/b.csv is there\n"


def test_run_sh_sweeps_lists_switches_and_clones(run_sh):
    lines = "a stub --policy-checkpoint runs/clone-{seed}/checkpoint.pt\n"
    _, calls, _ = run_sh(lines, "1", "--seeds", "4", "--sweep", "hidden_dims=128 128,64")
    assert [call.split()[0] for call in calls] == ["a-hidden_dims_128-128-4", "a-hidden_dims_64-4"]
    assert calls[0].endswith(" --policy-checkpoint runs/clone-4/checkpoint.pt --hidden-dims 128 128 --seed 4")
    _, calls, _ = run_sh("b stub\n", "1", "--sweep", "act_draw=True,False")
    assert [call.split()[-1] for call in calls[2:]] == ["--act-draw", "--no-act-draw"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "3-1"], "--seeds: expected seeds, as 0-4"),
        (["--seeds"], "--seeds: expected seeds, as 0-4"),
        (["--sweep", "cql_weight"], "--sweep: expected a flag and its values"),
        (["--seed", "3"], "--seed: expected --seeds or --sweep"),
        (["--seeds", "0"], "a has a --seed; expected none with --seeds"),
        (["--sweep", "a=1", "--sweep", "b=2"], "--sweep b=2: expected one flag"),
        (["0"], "0 processes: expected a number"),
        (["two"], "two processes: expected a number"),
    ],
)
def test_run_sh_says_what_it_expected(arguments, message, run_sh):
    result, calls, _ = run_sh("b stub\na stub --seed 1\n", *arguments)
    assert result.returncode == 2 and message in result.stderr and calls == []


@pytest.mark.parametrize(
    "lines, message", [("a stub\na stub --x 1\n", "two experiments of the name a"), ("# a\n", "no exp")]
)
def test_run_sh_refuses_a_file(lines, message, run_sh):
    """The second of two with one name was not run, and nothing said so."""
    result, calls, _ = run_sh(lines)
    assert result.returncode == 2 and message in result.stderr and calls == []
