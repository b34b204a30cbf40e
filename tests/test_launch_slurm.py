"""Batch scripts: held against a golden file, and run, with programs that play Slurm."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import time

import pytest

from fot.errors import UserError
from launch import slurm
from tests.launching import PARTITION, golden, job, on_path, program

# srun plays the training: the exit code in $CODE, or waits for SIGTERM.
SRUN = r"""#!/bin/bash
trap 'echo saved >> "$CALLS"; exit 42' TERM
echo "srun $NOTE $*" >> "$CALLS"
while [ "$CODE" = wait ]; do sleep 0.02; done
exit "$CODE"
"""
SLURM = r"""#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0")" in
  sbatch) [ -e "$CALLS.refuse" ] && { cat "$CALLS.refuse" >&2; exit 1; }; echo "17;cluster" ;;
  squeue) cat "$CALLS.queue" 2>/dev/null ;;
esac
exit 0
"""


def one(workdir: pathlib.Path, **changes):
    values = {"topology": "", "slices": 1, "workdir": str(workdir), "overrides": (), "setup": ": set up"}
    return job(**{**values, **changes})


@pytest.fixture
def calls(tmp_path, monkeypatch):
    program(tmp_path / "bin", "srun", SRUN)
    for name in ("sbatch", "squeue", "scancel", "scontrol"):
        program(tmp_path / "bin", name, SLURM)
    on_path(monkeypatch, tmp_path / "bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def said(calls) -> list[str]:
    return [line.split()[0] for line in calls.read_text().splitlines()]


def test_scripts():
    golden("slurm.sh", slurm.plan(one("/shared/runs/3b"), PARTITION))
    place = dataclasses.replace(PARTITION, partition="", account="lab", nodes=1, gpus=0, time="30")
    plain = one("gs://bucket/runs/3b", setup="", environment=(), retries=0)
    golden("slurm_bucket.sh", slurm.plan(plain, place))


def start(calls, code: str, restarts: int = 0, **changes) -> subprocess.Popen:
    script = calls.with_name("job.sh")
    script.write_text(slurm.script(one(calls.parent / "run", **changes), PARTITION))
    variables = {"CODE": code, "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
    return subprocess.Popen(["bash", script], env={**os.environ, **variables})


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (2, False), (42, True), (134, True), (137, True)]
)
def test_exit_codes(calls, code, requeued):
    assert start(calls, str(code)).wait(20) == (0 if requeued else code)
    lines = calls.read_text().splitlines()
    command = "python -m fot.train --config=configs/longllama_3b.py"
    assert lines[0] == f"srun it's two words --wait=60 {command} --workdir={calls.parent / 'run'}"
    assert lines[1:] == (["scontrol requeue 17"] if requeued else [])


def test_the_warning_before_the_time_limit(calls):
    process = start(calls, "wait")
    while not calls.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # to the batch shell alone, as --signal=B: says
    assert process.wait(20) == 0
    assert said(calls) == ["srun", "saved", "scontrol"]


def test_a_warning_during_the_setup(calls):
    process = start(calls, "0", setup=f"touch {calls}.begun; sleep 0.3")
    while not calls.with_suffix(".begun").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert said(calls) == ["scontrol"]


def test_a_setup_that_fails(calls):
    assert start(calls, "0", setup="false").wait(20) == 1
    assert not calls.exists()


def test_retries_end(calls):
    assert start(calls, "42", restarts=3).wait(20) == 42
    assert said(calls) == ["srun"]


def test_a_stopped_job_is_not_started_again(calls):
    slurm.stop(one(calls.parent / "run"), PARTITION)
    assert said(calls) == ["squeue"]
    calls.with_suffix(".queue").write_text("17\n")
    slurm.stop(one(calls.parent / "run"), PARTITION)
    assert said(calls) == ["squeue", "squeue", "scancel"]
    calls.unlink()
    assert start(calls, "42").wait(20) == 42
    assert said(calls) == ["srun"]


def test_submit(calls, capsys):
    run = one(calls.parent / "run")
    slurm.stop(run, PARTITION)
    assert slurm.submit(run, PARTITION, False) == 0
    folder = calls.parent / "run" / "launch"
    assert (folder / "job.sh").read_text() == slurm.script(run, PARTITION)
    assert not (folder / "stopped").exists()
    assert "Slurm job 17 (fot-3b): its log will be" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no log in .* yet"):
        slurm.logs(run, PARTITION, False)
    (folder / "slurm-17.log").write_text("step 1\n")
    assert slurm.logs(run, PARTITION, False) == 0
    assert slurm.status(run, PARTITION) == 0


def test_what_exists_is_left_alone(calls):
    calls.with_suffix(".queue").write_text("12\n")
    with pytest.raises(UserError, match="Slurm has a job named fot-3b: delete it, or give another --name"):
        slurm.submit(one(calls.parent / "run"), PARTITION, False)
    assert "scancel" not in said(calls)


def test_refusals(calls):
    calls.with_suffix(".refuse").write_text("sbatch: error: invalid partition specified: gpu\n")
    with pytest.raises(UserError, match="sbatch: sbatch: error: invalid partition specified: gpu"):
        slurm.submit(one(calls.parent / "run"), PARTITION, False)


@pytest.mark.parametrize(
    ("changes", "place", "message"),
    [
        ({"topology": "v4:4x4x4"}, {}, "--topology=v4:4x4x4 is for clouds' TPUs: Slurm takes --nodes and --gpus"),
        ({"slices": 2}, {}, "--slices=2 is for clouds' TPUs"),
        ({"image": "a"}, {}, "--image=a: Slurm runs no containers"),
        ({}, {"nodes": 0}, "--nodes=0 must be 1 or more"),
        ({}, {"time": "soon"}, "--time=soon must read minutes"),
    ],
)
def test_what_slurm_can_not_run(changes, place, message):
    with pytest.raises(UserError, match=message):
        slurm.check(one("runs/x", **changes), dataclasses.replace(PARTITION, **place))


@pytest.mark.parametrize("text", ["30", "90:00", "24:00:00", "2-12", "2-12:30:00"])
def test_time_limits(text):
    assert slurm.check(one("runs/x"), dataclasses.replace(PARTITION, time=text)) == 16
