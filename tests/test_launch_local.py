"""Processes of this machine as a pod: held against a golden file, and run, with a training that plays exit codes."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fot.errors import UserError
from launch import local, pod
from tests.launching import MACHINE, TRAINING, golden, job, program

ROOT = pathlib.Path(__file__).parent.parent
# Plays as tests/launching.py says, each process as a machine of its own, when both have started.
TOGETHER = r"""
for other in 0 1; do
  until [ "$(cat "$TRAIN.machine$other" 2>/dev/null | wc -l)" -ge "$number" ]; do sleep 0.02; done
done
action="""
PLAYER = TRAINING.replace("\nstarts=", "\nMACHINE=machine$JAX_PROCESS_ID\nstarts=", 1).replace("\naction=", TOGETHER, 1)
# The command, with a shorter grace.
SHORT = "import sys; from launch import local, pod; local.GRACE = float(sys.argv[1]); pod.main(sys.argv[2:])"


def one(workdir: pathlib.Path | str, **changes):
    return job(**{"topology": "", "slices": 1, "workdir": str(workdir), **changes})


@pytest.fixture
def play(tmp_path, monkeypatch):
    """A function that sets what each start of training does, and returns the job."""
    python = program(tmp_path / "bin", "python", PLAYER)
    monkeypatch.setenv("TRAIN", str(tmp_path / "train"))

    def set_up(*starts: str, **changes):
        (tmp_path / "train").write_text("\n".join(starts) + "\n")
        return one(tmp_path / "run", python=str(python), **changes)

    return set_up


@contextlib.contextmanager
def launched(job, grace: float = 30.0):
    """Gives the command for a job, in a process of its own, when all of the job's processes play."""
    words = ["--backend=local", "--config=configs/code_tiny.py", f"--workdir={job.workdir}", f"--python={job.python}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", SHORT, str(grace), *words], cwd=ROOT, **pipes) as process:
        try:
            seen = set()
            while seen != {"[0]", "[1]"}:
                line = process.stdout.readline()
                assert line, process.stderr.read()
                if "starts" in line:
                    seen.add(line[:3])
            while not json.loads((local.folder(job) / "local.json").read_text())["processes"]:
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def trainings(job) -> list[psutil.Process]:
    """Returns the running processes of a job."""
    running = [(each, each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline", "ppid"])]
    ours = [each for each, words in running if "fot.train" in words and f"--workdir={job.workdir}" in words]
    numbers = {each.pid for each in ours}
    return [each for each in ours if each.info["ppid"] not in numbers]  # bash makes more of itself


def gone(job) -> bool:
    """Waits a little for all processes of a job to end."""
    return not psutil.wait_procs(trainings(job), timeout=20)[1]


def plain(output: str) -> list[str]:
    """Returns the lines of a launch in a fixed order, without times."""
    return sorted(re.sub(r"^\[\d\d:\d\d:\d\d\]", "[-]", line) for line in output.splitlines())


def test_commands(tmp_path):
    golden("local.txt", local.plan(one("runs/3b", setup="make data"), MACHINE))
    golden("local_plain.txt", local.plan(one("runs/3b", environment=()), dataclasses.replace(MACHINE, processes=1)))


def test_lines_are_merged_and_kept(play, capfd):
    tiny = play("0")
    assert local.submit(tiny, MACHINE, False) == 0
    shown = capfd.readouterr().out
    command = "-m fot.train --config=configs/longllama_3b.py --config.mesh.data=2"
    wanted = [f"[{n}] machine{n} starts 1: {command} --workdir={tiny.workdir}" for n in (0, 1)]
    assert plain(shown) == ["[-] done", *wanted]
    assert (local.folder(tiny) / "local.log").read_text() == shown
    assert local.logs(tiny, MACHINE, True) == 0 and local.status(tiny, MACHINE) == 0
    assert capfd.readouterr().out == f"{shown}fot-3b: done\n"


@pytest.mark.parametrize(
    ("ends", "why"),
    [("stuck,137", "process 1 ended with 137"), ("134,stuck", "process 0 ended with 134"), ("42,wait", "process 0")],
)
def test_when_one_is_gone_all_start_again(play, capfd, ends, why):
    began = time.monotonic()
    assert local.submit(play(ends, "0"), MACHINE, False) == 0
    assert time.monotonic() - began < local.GRACE, "it waits for the others"
    lines = plain(capfd.readouterr().out)
    assert any(line.startswith(f"[-] {why}") and line.endswith(": starting again (1 of 3)") for line in lines)
    assert sum("starts 2" in line for line in lines) == 2 and sum("saved" in line for line in lines) == ("42" in ends)


def test_a_process_that_is_killed_starts_again(play):
    tiny = play("wait", "0")
    with launched(tiny) as process:
        trainings(tiny)[0].send_signal(signal.SIGKILL)
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "ended with 137: starting again (1 of 10)" in shown and "done" in shown and gone(tiny)


@pytest.mark.parametrize("ends", ["7,stuck", "stuck,7", "7"])
def test_a_failure_ends_the_job(play, capfd, ends):
    tiny = play(ends, "0")
    assert local.submit(tiny, MACHINE, False) == 7
    assert "starts 2" not in capfd.readouterr().out and gone(tiny)
    local.status(tiny, MACHINE)
    assert capfd.readouterr().out == "fot-3b: failed with exit code 7\n"


def test_retries_end(play):
    tiny = play("42", "137,wait", "0")
    with pytest.raises(UserError, match="terminated 2 times: --retries=1 allows no further start"):
        local.submit(dataclasses.replace(tiny, retries=1), MACHINE, False)
    assert gone(tiny)


def test_who_does_not_end_when_the_others_are_done_is_lost(play, capfd, monkeypatch):
    monkeypatch.setattr(local, "SETTLE", 4.0)
    tiny = play("0,stuck", "0")
    assert local.submit(tiny, MACHINE, False) == 0
    assert "process 1 ended with 137: starting again" in capfd.readouterr().out and gone(tiny)


def test_setup_comes_first(play, capfd):
    tiny = play("0", setup="echo prepared")
    assert local.submit(tiny, MACHINE, False) == 0
    assert capfd.readouterr().out.startswith("prepared\n[")
    with pytest.raises(UserError, match="--setup=exit 3 failed, see above"):
        local.submit(play("0", setup="exit 3"), MACHINE, False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all(play, number):
    tiny = play("wait")
    with launched(tiny) as process:
        assert len(trainings(tiny)) == 2
        process.send_signal(number)
        shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "interrupted\n"
    assert shown.count("saved") == 2 and shown.endswith("] stopped\n") and gone(tiny)


def test_who_ignores_an_interrupt_is_killed(play, tmp_path):
    tiny = play("stuck,wait")
    with launched(tiny, grace=2.0) as process:
        while not (tmp_path / "train.stuck").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)  # whose user is impatient
        assert process.wait(60) == 130
        assert gone(tiny)


def test_processes_end_with_a_launcher_that_is_killed(play, capfd):
    tiny = play("stuck", "0")
    with launched(tiny) as process:
        process.kill()
        process.wait()
        assert gone(tiny)
    assert local.status(tiny, MACHINE) == 0
    assert "killed while training, 0 times started again; again, it goes on" in capfd.readouterr().out
    assert local.submit(tiny, MACHINE, False) == 0


def test_words_for_a_job_that_runs(play, capfd):
    tiny = play("wait")
    with launched(tiny) as process:
        words = [f"--workdir={tiny.workdir}"]
        pids = json.loads((local.folder(tiny) / "local.json").read_text())["processes"]
        assert sorted(pids) == sorted(each.pid for each in trainings(tiny))
        for word, wanted in (
            ("status", "fot-run: training, 0 times started again\n"),
            ("status", f"on {os.uname().nodename}: process {process.pid} with {' '.join(map(str, pids))}\n"),
            ("logs", "[1] machine1 starts 1"),
            ("stop", "fot-run is stopped"),
            ("status", "fot-run: stopped"),
            ("delete", "fot-run does not run"),
        ):
            with pytest.raises(SystemExit) as end:
                pod.main([word, *words])
            assert end.value.code == 0 and wanted in capfd.readouterr().out
        assert process.wait(20) == 130 and gone(tiny)


def test_a_workdir_has_one_job(play):
    tiny = play("wait")
    with launched(tiny) as process:
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on host .*: stop that one or choose"):
            local.submit(tiny, MACHINE, False)
        process.terminate()
        process.wait()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology=v4:2x2x1"], "--topology=v4:2x2x1 is for clouds' TPUs: local takes --processes and --devices"),
        (["--slices=2"], "--slices=2 is for clouds' TPUs"),
        (["--image=a"], "--image=a: local runs no containers"),
        (["--workdir=gs://bucket/x"], "--workdir=gs://bucket/x is a bucket: local takes a folder of this machine"),
        (["--processes=0"], "--processes=0 must be 1 to 64"),
        (["--devices=0"], "--devices=0, of each, 1 or more"),
        (["--python=snake"], "--python=snake is no program of this machine"),
        (["--processes=3"], "8 rows (data.batch_size / train.accumulation) can't be split over"),
        (["--config.mesh.fsdp=3"], "--config.mesh.*: mesh.data=1, mesh.fsdp=3"),
        (["--config.model.layer=3"], "unknown config field model.layer"),
        (["--workdir=/proc/x"], "can't write /proc/x/launch/"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_made(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(ROOT)
    config = ["--backend=local", "--config=configs/code_tiny.py", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as end:
        pod.main([*config, *words])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
