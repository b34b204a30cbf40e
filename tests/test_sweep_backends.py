"""Sweeps whose trials are jobs of clusters: killed and started again, each job is sent once, and none is left."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import sweep
from launch.trials import Trials
from tests import fake_gcs
from tests.launching import FakeCloud, on_path, program
from tests.sweeping import ROOT, completed, started, sweep_file, words

HERE = pathlib.Path(__file__).parent
GRID = "Grid({'optimizer.learning_rate': (1e-2, 1e-3, 1e-4)})"
BUCKET = "gs://bucket/sweep"
FAKES = ("sbatch", "squeue", "scancel", "srun", "kubectl")
CLOUD = [f"--trials={BUCKET}", "--topology=v4:2x2x1", "--config.mesh.data=1"]
JOBS = {
    "slurm": ["--backend=slurm", "--poll=0.1", "--parallel=2"],
    "gke": ["--backend=gke", "--poll=0.1", "--image=image", *CLOUD, "--parallel=2"],
    "tpu_vm": ["--backend=tpu_vm", "--poll=0.1", "--zone=a", "--setup=:", *CLOUD],  # the fake has one request at a time
}
SLOW = [pytest.param(backend, marks=pytest.mark.slow) for backend in ("gke", "tpu_vm")]


class Cluster:
    """Programs on PATH that play every backend's."""

    def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.bucket, self.cloud = folder / "cluster", folder / "buckets", FakeCloud(folder, monkeypatch)
        self.folder.mkdir()
        self.cloud.plays(*[["ACTIVE"]] * 9)
        for name in FAKES:
            fake = f'#!/bin/sh\nexec {sys.executable} -E {HERE / "fake_cluster.py"} {name} "$@"\n'
            program(folder / "bin", name, fake)
        on_path(monkeypatch, folder / "bin")
        monkeypatch.setenv("CLUSTER", str(self.folder))
        monkeypatch.setenv("BUCKETS", str(self.bucket))

    @property
    def sent(self) -> int:
        """How many jobs were sent."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        sent = [line for line in lines if line.startswith("sbatch") or " create " in line]
        return len(sent) + self.cloud.verbs.count("create")

    @property
    def left(self) -> list[str]:
        """What there is yet of jobs."""
        return [path.name for path in self.folder.iterdir() if path.name != "calls"] + self.cloud.left


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    with fake_gcs.connected():
        made = Cluster(tmp_path, monkeypatch)
        yield made
        for path in made.folder.glob("fot-*"):
            if not path.suffix:
                os.killpg(int(path.read_text()), signal.SIGKILL)


def folders(cluster: Cluster, workdir: pathlib.Path, backend: str) -> pathlib.Path:
    """Returns where the fake training writes what a sweep's trials have."""
    return workdir if backend == "slurm" else cluster.bucket / "bucket" / "sweep"


@pytest.mark.parametrize("backend", ["slurm", "gke", pytest.param("tpu_vm", marks=pytest.mark.slow)])
def test_killed_and_started_again_each_job_is_sent_once(cluster, tmp_path, backend):
    given = words(tmp_path, sweep_file(tmp_path, GRID), *JOBS[backend])
    run = tmp_path / "run"
    trials, at_once = folders(cluster, run, backend), 2 if "--parallel=2" in JOBS[backend] else 1
    with started(given, 0.4) as process:
        begun(cluster, run, backend, process, at_once)  # so that no job is just being sent
    before = cluster.sent
    assert before >= at_once and cluster.left
    with started(given, 0.05) as process:
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == "", (shown, errors)
    assert shown.count("started, again") >= before and cluster.sent == 3
    found = Trials.read(kept(run), run, "")
    assert [trial.state for trial in found] == ["COMPLETE"] * 3
    assert [list(trial.curve) for trial in found] == [[1, 2, 3, 4, 5]] * 3
    ends = completed(run) if backend == "slurm" else completed(trials, "*")
    assert ends == {trial.id: 1 for trial in found}
    assert cluster.left == []


def begun(cluster: Cluster, run: pathlib.Path, backend: str, process: subprocess.Popen, number: int = 1) -> list[str]:
    """Returns the ids of trials that train, once there are so many."""
    where = "trials/*/metrics.jsonl" if backend in ("slurm", "local") else "*/metrics.jsonl"
    top = run if backend == "local" else folders(cluster, run, backend)
    while len(found := [path.parent.name for path in top.glob(where)]) < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return found


def stop(run: pathlib.Path, key: str, backend: str) -> None:
    """Has somebody stop a trial's job."""
    workdir = f"{run}/trials/{key}" if backend in ("slurm", "local") else f"{BUCKET}/{key}"
    command = [sys.executable, "-m", "launch.pod", "stop", f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["local", "slurm", "gke", pytest.param("tpu_vm", marks=pytest.mark.slow)])
def test_a_trial_whose_job_is_stopped_fails_and_is_not_started_again(cluster, tmp_path, backend):
    run = tmp_path / "run"
    given = words(tmp_path, sweep_file(tmp_path, GRID), *JOBS.get(backend, ["--parallel=2"]))
    with started(given, 0.4) as process:
        key = begun(cluster, run, backend, process)[0]
        stop(run, key, backend)
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and errors == "", (shown, errors)
    assert shown.count(f"{key} failed: stopped by launch.pod stop\n") == 1 and shown.count(f"{key} started") == 1, shown
    assert "3 trials: 2 complete, 0 pruned, 1 failed" in shown and "again" not in shown
    assert cluster.sent == (0 if backend == "local" else 3) and cluster.left == []


@pytest.mark.parametrize("backend", ["slurm", "gke"])
def test_a_job_that_is_stopped_while_its_sweep_is_killed_is_not_started_again(cluster, tmp_path, backend):
    run = tmp_path / "run"
    given = words(tmp_path, sweep_file(tmp_path, "Grid({'train.seed': (1,), 'optimizer.learning_rate': (1e-2,)})"))
    given += JOBS[backend]
    with started(given, 0.4) as process:
        [key] = begun(cluster, run, backend, process)
    stop(run, key, backend)
    with started(given, 0.05) as process:
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors == "" and "started" not in shown, (shown, errors)
    assert shown.count(f"{key} failed: stopped by launch.pod stop\n") == 1
    assert cluster.sent == 1 and cluster.left == []


@pytest.mark.parametrize("backend", ["slurm", *SLOW])
def test_pruning_ends_the_job_of_a_poor_trial(cluster, tmp_path, backend):
    """Metrics in a bucket are read every 10 seconds, so its trials take 20."""
    run, count = tmp_path / "run", 10 if backend == "slurm" else 60
    space = "Grid({'optimizer.learning_rate': (1e-2, 2e-2, 1e-4)})"  # the third is held to what the others were
    file = sweep_file(tmp_path, space, "pruner=Median(trials=2, steps=2)")
    file.write_text(file.read_text().replace("'train.steps': 5", f"'train.steps': {count}"))
    with started(words(tmp_path, file, *JOBS[backend]), 0.3) as process:
        shown, errors = process.communicate(timeout=240)
    assert process.returncode == 0 and errors == "", (shown, errors)
    found = {trial.overrides["optimizer.learning_rate"]: trial for trial in Trials.read(kept(run), run, "")}
    assert [trial.state for trial in found.values()].count("COMPLETE") == 2, shown
    assert found["0.0001"].state == "PRUNED" and max(found["0.0001"].curve) < count
    done = completed(run) if backend == "slurm" else completed(folders(cluster, run, backend), "*")
    assert done == {found[rate].id: 1 for rate in ("0.01", "0.02")}
    assert cluster.sent == 3 and cluster.left == []


def kept(run: pathlib.Path) -> str:
    return sweep._kept(run)["study"]


@pytest.mark.parametrize("backend", ["slurm", *SLOW])
def test_an_interrupt_leaves_no_job_and_the_same_command_goes_on(cluster, tmp_path, backend):
    run = tmp_path / "run"
    given = words(tmp_path, sweep_file(tmp_path, GRID), *JOBS[backend])
    number = 1 if backend == "tpu_vm" else 2
    with started(given, 0.4) as process:
        begun(cluster, run, backend, process, number)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "interrupted\n", (shown, errors)
    assert cluster.sent == number and cluster.left == []
    states = [trial.state for trial in Trials.read(kept(run), run, "")]
    assert sorted(states) == ["RUNNING"] * number + ["WAITING"] * (3 - number)
    with started(given, 0.02) as process:
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and shown.count("started, again") == number, (shown, errors)
    assert "3 trials: 3 complete, 0 pruned, 0 failed" in shown and cluster.left == []


@pytest.mark.parametrize("backend", ["slurm", *SLOW])
def test_a_job_that_fails_is_one_failed_trial_and_is_sent_once(cluster, tmp_path, backend):
    space = "Grid({'optimizer.learning_rate': (1e-1, 1e-2)})"
    given = words(tmp_path, sweep_file(tmp_path, space), *JOBS[backend])
    for _ in range(2):  # and again, as it isn't tried again
        with started(given, 0.02, play="fails") as process:
            shown, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and errors == "", (shown, errors)
        assert "2 trials: 1 complete, 0 pruned, 1 failed" in shown
        assert cluster.sent == 2 and cluster.left == []
    states = {
        trial.overrides["optimizer.learning_rate"]: trial.state
        for trial in Trials.read(kept(tmp_path / "run"), tmp_path / "run", "")
    }
    assert states == {"0.1": "FAIL", "0.01": "COMPLETE"}


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_a_second_launch_in_one_workdir_is_refused_and_the_first_stays_on_record(
    cluster, tmp_path, monkeypatch, backend
):
    trainer = words(tmp_path, tmp_path)[-1]
    one = [f"--backend={backend}", "--config=configs/dictionary_tiny.py", f"--workdir={tmp_path / 'run'}", trainer]
    one += ["--config.train.steps=9", "--config.optimizer.learning_rate=0.01"]
    one += ["--processes=1", "--devices=1"] if backend == "local" else []
    monkeypatch.setenv("STEP", "1")
    pipes = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-m", "launch.pod", *one], **pipes) as first:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.poll() in (None, 0), first.communicate()
            time.sleep(0.05)
        record = (tmp_path / "run" / "launch" / "job.json").read_bytes()
        second = subprocess.run(
            [sys.executable, "-m", "launch.pod", *one, "--config.train.seed=7"], timeout=60, **pipes
        )
        assert second.returncode == 2 and second.stderr.count("\n") == 1, second.stderr
        assert ("in use by" if backend == "local" else "Slurm has a job named") in second.stderr
        assert (tmp_path / "run" / "launch" / "job.json").read_bytes() == record
        first.terminate()
