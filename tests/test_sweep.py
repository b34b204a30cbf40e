"""Sweeps run, with a program that plays training; through kills, failures and Ctrl-C; and once with real training."""

import pathlib
import random
import re
import signal
import sys
import time

import psutil
import pytest

from fot import files
from fot.errors import UserError
from launch import points, storage, sweep
from launch.claims import FolderClaims
from launch.trials import Trials, read_curve
from tests.sweeping import ROOT, completed, started, steps, sweep_file, words

GRID = "Grid({'optimizer.learning_rate': (1e-1, 1e-2, 1e-3, 1e-4)})"
TWELVE = "Grid({'optimizer.learning_rate': (1e-1, 1e-2, 1e-3, 1e-4), 'train.seed': (0, 1, 2)})"
SEARCH = "Adaptive({'optimizer.learning_rate': LogReal(1e-5, 1e-1), 'train.seed': Integer(0, 3)}, 12, 5)"


def trials(workdir: pathlib.Path):
    """Returns a sweep's trials."""
    return Trials.read(sweep._kept(workdir)["study"], workdir, "")


def test_a_sweep_runs_and_is_done_once(tmp_path):
    given = words(tmp_path, sweep_file(tmp_path, GRID), "--parallel=2")
    with started(given, 0.05) as process:
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == "", errors
    assert shown.count(" started\n") == 4 and "4 trials: 4 complete, 0 pruned, 0 failed" in shown
    found = trials(tmp_path / "run")
    assert [trial.state for trial in found] == ["COMPLETE"] * 4
    assert completed(tmp_path / "run") == {trial.id: 1 for trial in found}
    best = min(found, key=lambda trial: trial.value)
    assert best.overrides == {"optimizer.learning_rate": "0.01"} and best.value == pytest.approx(1 / 5)
    assert best.curve == pytest.approx({step: 1 / step for step in range(1, 6)})
    with started(given, 0.05) as process:
        assert "started" not in process.communicate(timeout=60)[0] and process.returncode == 0
    with started([*given, "--config.train.seed=3"], 0.05) as process:
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "has another sweep (tried-" in error and error.count("\n") == 1


@pytest.mark.parametrize("space", [TWELVE, pytest.param(SEARCH, marks=pytest.mark.slow)], ids=["grid", "adaptive"])
def test_killed_at_random_every_trial_is_complete_once(tmp_path, space):
    given = words(tmp_path, sweep_file(tmp_path, space), "--parallel=2")
    draw = random.Random(len(space))
    for _ in range(3):
        with started(given, 0.1) as process:
            assert "started" in process.stdout.readline()
            time.sleep(draw.uniform(0.0, 1.5))
    with started(given, 0.02) as process:
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "again" in shown, errors
    found = trials(tmp_path / "run")
    assert len({trial.id for trial in found}) == len(found) == 12
    assert {trial.state for trial in found} == {"COMPLETE"}
    assert completed(tmp_path / "run") == {trial.id: 1 for trial in found}
    for trial in found:
        assert steps(tmp_path / "run" / "trials" / trial.id) == list(trial.curve) == [1, 2, 3, 4, 5]


def test_a_trial_that_fails_is_told_and_the_others_go_on(tmp_path):
    given = words(tmp_path, sweep_file(tmp_path, GRID), "--parallel=2")
    with started(given, 0.01, play="fails") as process:
        shown = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "4 trials: 3 complete, 0 pruned, 1 failed" in shown
    log = re.search(r"failed: exit code 1, see (.*/trial.log)\n", shown).group(1)
    assert "it fails" in pathlib.Path(log).read_text()
    assert [trial.state for trial in trials(tmp_path / "run")].count("FAIL") == 1


def test_a_trial_whose_launcher_is_killed_goes_on(tmp_path):
    given = words(tmp_path, sweep_file(tmp_path, GRID))
    with started(given, 0.1) as process:
        while not list((tmp_path / "run" / "trials").glob("*/metrics.jsonl")):
            time.sleep(0.02)
        [launcher] = psutil.Process(process.pid).children()
        launcher.kill()
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == "", errors
    assert shown.count("ended with 137, goes on") == shown.count("started, again") == 1
    assert "4 trials: 4 complete, 0 pruned, 0 failed" in shown
    for trial in trials(tmp_path / "run"):
        assert steps(tmp_path / "run" / "trials" / trial.id) == [1, 2, 3, 4, 5]
    assert completed(tmp_path / "run") == {trial.id: 1 for trial in trials(tmp_path / "run")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_and_loses_nothing(tmp_path, number):
    given = words(tmp_path, sweep_file(tmp_path, GRID), "--parallel=2")
    with started(given, 0.5) as process:
        while len(list((tmp_path / "run" / "trials").glob("*/metrics.jsonl"))) < 2:
            time.sleep(0.05)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and errors == "interrupted\n"
    assert {trial.state for trial in trials(tmp_path / "run")} == {"WAITING", "RUNNING"}
    assert not [trial for trial in trials(tmp_path / "run") if sweep_in_use(tmp_path, trial.id)]
    with started(given, 0.01) as process:
        shown = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and shown.count("started, again") == 2
    assert list(completed(tmp_path / "run").values()) == [1] * 4


def sweep_in_use(folder: pathlib.Path, key: str) -> bool:
    from launch import worker

    return worker._in_use(folder / "run" / "trials" / key)


def test_a_trial_whose_folder_is_in_use_waits_and_the_others_go_on(tmp_path):
    given = words(tmp_path, sweep_file(tmp_path, GRID))
    loaded = points.load(str(tmp_path / "tried.py"))
    first = points.texts(points.points(loaded.space)[0])
    fixed = points.texts(loaded.fixed)
    folder = tmp_path / "run" / "trials" / points.trial_id(loaded.base, fixed, first)
    with started(given, 0.01) as process:
        with files.hold(folder):
            while len(completed(tmp_path / "run")) < 3:
                assert process.poll() is None
                time.sleep(0.05)
            assert not (folder / "metrics.jsonl").exists()
        assert process.wait(60) == 0
    assert len(completed(tmp_path / "run")) == 4


def test_poor_trials_are_pruned(tmp_path):
    rates = "Grid({'optimizer.learning_rate': (1e-2, 1e-3, 1e-4, 2e-2)})"
    given = words(tmp_path, sweep_file(tmp_path, rates, "pruner=Median(trials=1, steps=2)"))
    with started(given, 0.2) as process:
        shown = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "pruned, held_out/loss" in shown
    states = {trial.overrides["optimizer.learning_rate"]: trial for trial in trials(tmp_path / "run")}
    assert states["0.01"].state == "COMPLETE"
    for rate in ("0.001", "0.0001"):
        assert states[rate].state == "PRUNED" and 2 <= max(states[rate].curve) < 5
        assert states[rate].id not in completed(tmp_path / "run")


def test_half_a_line_of_a_killed_writer_is_taken_off(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = points.load(str(sweep_file(tmp_path, GRID)))
    with Trials(loaded, {}, "study", tmp_path, "") as opened:
        first = opened.claim(())
        opened.finish(first, "COMPLETE", 1.0)
    with open(tmp_path / storage.JOURNAL, "a") as journal:
        journal.write('{"op_code": 6, "wor')
    with Trials(loaded, {}, "study", tmp_path, "") as opened:
        opened.finish(opened.claim(()), "COMPLETE", 2.0)
        assert [trial.state for trial in opened.all()] == ["COMPLETE"] * 2 + ["WAITING"] * 2


def test_a_claim_is_one_processs_and_a_finished_trial_nobodys(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = points.load(str(sweep_file(tmp_path, GRID)))
    with Trials(loaded, {}, "study", tmp_path, "") as left, Trials(loaded, {}, "study", tmp_path, "") as right:
        mine = left.claim(())
        others = [right.claim(()) for _ in range(4)]
        assert mine.id not in [trial.id for trial in others if trial] and others[3] is None
        left.release(mine)
        assert right.claim(()).id == mine.id
        right.finish(mine, "FAIL", None, "why")
        assert left.claim(()) is None and left.all()[0].why == "why"


def test_what_dies_between_asking_and_naming_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = points.load(str(sweep_file(tmp_path, "Adaptive({'train.seed': Integer(0, 2)}, 3)")))
    with Trials(loaded, {}, "study", tmp_path, "") as opened:
        opened._study.ask()  # and dies
        found = [opened.claim(()) for _ in range(3)]
        assert opened.claim(()) is None and {trial.overrides["train.seed"] for trial in found} == {"0", "1", "2"}
        assert not opened.over()
        for trial in found:
            opened.finish(trial, "COMPLETE", 0.0)
        assert opened.over()


def test_claims_of_a_folder(tmp_path):
    left, right = FolderClaims(tmp_path), FolderClaims(tmp_path)
    assert left.take("a") and not right.take("a") and not left.take("a") and right.take("b")
    left.release("a")
    assert right.take("a")
    right.close()
    assert left.take("a") and left.take("b")
    left.close()
    with pytest.raises(UserError, match="can't lock .*: choose another --workdir"):
        FolderClaims(pathlib.Path("/proc/none")).take("a")


def test_metrics_that_grow_are_read_to_the_last_whole_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_curve(str(path), "held_out/loss") == {}
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "held_out/loss": 2.5}\n{"step": 4, "held_out/loss": 1')
    assert read_curve(str(path), "held_out/loss") == {2: 2.5}


@pytest.mark.parametrize(
    ("space", "more", "message"),
    [
        ("Grid({'model.layer': (1,)})", [], "unknown config field model.layer; did you mean 'model.layers'?"),
        (GRID, ["--config.train.step=1"], "unknown config field train.step"),
        (GRID, ["--config.optimizer.learning_rate=1"], "is in the space and is set for all trials too"),
        (GRID, ["--parallel=0"], "--parallel=0 must be 1 or more"),
        (GRID, ["--paralel=2"], "unknown flag --paralel"),
        (GRID, ["--storage=mysql://x"], "--storage must read postgresql+psycopg://user:password@host/database"),
        ("Random({'train.seed': Real('a', 'b')}, 2)", [], "train.seed=Real(low='a', high='b') must have"),
        ("Random({'optimizer.learning_rate': LogReal(1e-4, 1e999)}, 2)", [], "must have finite numbers"),
        ("Random({'train.seed': Integer(0, 9)}, 2.5)", [], "Random: trials=2.5 must be a whole number, 1 or more"),
        ("Adaptive({'train.seed': Integer(0, 9)}, 2, -1)", [], "random_trials=-1 must be a whole number, 0 or more"),
        (GRID, ["--name=a"], "--name=a is each trial's own"),
        (GRID, ["--devices=3"], "--config.mesh.*: "),
        ("Grid({'data.batch_size': (128, 12)})", [], "trial --config.data.batch_size=12: crossbatch.d=(1, 64)"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_made(tmp_path, monkeypatch, capsys, space, more, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        sweep.main(words(tmp_path, sweep_file(tmp_path, space), *more))
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_optuna_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit) as end:
        sweep.main(words(tmp_path, sweep_file(tmp_path, GRID)))
    assert end.value.code == 2 and capsys.readouterr().err == "error: a sweep needs Optuna: pip install fot[sweep]\n"
    assert not (tmp_path / "run").exists()


def test_without_the_driver_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SystemExit) as end:
        sweep.main(words(tmp_path, sweep_file(tmp_path, GRID), "--storage=postgresql+psycopg://a@b/c"))
    assert end.value.code == 2 and "needs psycopg for --storage: pip install fot[sweep]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_trials(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        sweep.main(words(tmp_path, sweep_file(tmp_path, GRID), "--dry_run"))
    shown = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and len(shown) == 4 and not (tmp_path / "run").exists()
    assert re.fullmatch(r"[0-9a-f]{10}-learning_rate_0.1 --config.optimizer.learning_rate=0.1", shown[0])


def test_a_sweep_of_another_name_or_place_has_other_studies_or_jobs(tmp_path, monkeypatch):
    """The study is the storage's, which workdirs share; a cluster's jobs are known by their names alone."""
    monkeypatch.chdir(ROOT)
    file = str(sweep_file(tmp_path, GRID))

    def plan(workdir, **more):
        return sweep.plan(sweep.Flags(file, str(workdir), **more), {}, ["--backend=slurm"])

    here, there, named = plan("a"), plan("b"), plan("a", study="mine")
    assert here.name == there.name != named.name and named.name.startswith("mine-")
    names = {made.command("0123456789", {})[-1] for made in (here, there, named)}
    assert len(names) == 3 and plan(pathlib.Path("a").absolute()).command("0123456789", {})[-1] in names


def test_halving_lets_the_best_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = points.load(str(sweep_file(tmp_path, TWELVE, "pruner=Halving(steps=1, factor=3)")))
    with Trials(loaded, {}, "study", tmp_path, "") as opened:
        ended = []
        for loss in (1.0, 2.0, 3.0, 4.0, 0.5):
            trial = opened.claim(())
            ended.append(opened.report(trial, {1: loss}))
            opened.finish(trial, "PRUNED" if ended[-1] else "COMPLETE", loss)
    assert ended == [False, True, True, True, False]
