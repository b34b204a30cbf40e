"""Real training in several processes of this machine: as one process trains, and on through kills."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fot import cli, train
from tests.trainings import timeless

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 120  # enough that a run is not over before it is disturbed
CONFIG = {
    "model.layers": 2,
    "model.memory_layers": 1,
    "model.dim": 16,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 32,
    "model.attention_block": 16,
    "crossbatch.d": 2,
    "crossbatch.d_schedule": "constant",
    "data.task": "files",
    "data.tokenizer": "bytes",
    "data.context": 16,
    "data.min_document_tokens": 32,
    "data.held_out_fraction": 0.3,
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.evaluate_every": 30,
    "train.evaluate_batches": 1,
    "train.checkpoint_every": 30,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """The config of a short run on twenty documents of random words."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for number in range(20):
        text = random.choice(["alpha ", "beta ", "gamma ", "delta\n"], size=int(random.integers(20, 60)))
        (folder / f"{number}.txt").write_text("".join(text))
    values = CONFIG | {"data.files": f"{folder}/*.txt", "data.cache_dir": f"{folder}/cache"}
    return ["--config=configs/code_tiny.py", *(f"--config.{name}={value}" for name, value in values.items())]


@contextlib.contextmanager
def launched(words: list[str], workdir: pathlib.Path, processes: int = 2, devices: int = 1):
    """Gives the command that trains in so many processes of so many devices."""
    command = [
        sys.executable,
        "-m",
        "launch.pod",
        "--backend=local",
        f"--processes={processes}",
        f"--devices={devices}",
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen([*command, *words, f"--workdir={workdir}"], cwd=ROOT, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def lines(workdir: pathlib.Path) -> list[dict]:
    """Returns the metrics of a run, without its speed."""
    return timeless(workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with launched(words, workdir) as process:
        shown = process.communicate(timeout=900)[0]
    assert process.returncode == 0, shown
    said = [line for line in shown.splitlines() if "Gloo" not in line and "tokenizing" not in line]
    assert said[-2].startswith(f"[0] trained {STEPS} steps") and said[-1].endswith("] done")
    assert not [line for line in said if line.startswith("[1]")], "the first process alone logs"
    return workdir


def test_two_processes_train_as_one_does(undisturbed, words, tmp_path, monkeypatch):
    ours = lines(undisturbed)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["120", "90"]
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    command = cli.parse([*words, f"--workdir={tmp_path}"], train.Flags, "")
    alone = train.train(command.config, tmp_path, print)
    for left, right in zip(ours, lines(tmp_path), strict=True):
        assert left.keys() == right.keys() and left["batch_checksum"] == right["batch_checksum"]
        for name in left:
            np.testing.assert_allclose(left[name], right[name], rtol=1e-5, err_msg=f"{name} at step {left['step']}")
    # What two processes have saved, one restores.
    restored = train.train(command.config, undisturbed, print)
    assert int(restored.step) == STEPS
    for left, right in zip(jax.tree.leaves(restored.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_run_that_moves_from_mesh_to_mesh_has_the_losses_of_one_that_stays(words, tmp_path):
    fifty = [*words, "--config.train.steps=50", "--config.train.evaluate_every=25"]
    with launched(fifty, tmp_path / "stays", 1, 8) as process:
        assert process.communicate(timeout=900)[0] and process.returncode == 0
    for processes, devices, stop in [(2, 4, 14), (1, 4, 30), (4, 2, 50)]:
        with launched(fifty, tmp_path / "moves", processes, devices) as process:
            if stop < 50:
                until_step(process, tmp_path / "moves", stop)
                process.send_signal(signal.SIGINT)
            shown = process.communicate(timeout=900)[0]
        assert process.returncode == (0 if stop == 50 else cli.INTERRUPTED), shown
        assert stop <= lines(tmp_path / "moves")[-1]["step"] <= (50 if stop == 50 else stop + 10), shown
    stays, moves = lines(tmp_path / "stays"), lines(tmp_path / "moves")
    assert [line["step"] for line in moves] == list(range(1, 51))
    assert [line["batch_checksum"] for line in moves] == [line["batch_checksum"] for line in stays]
    # Bit for bit until float additions across processes come in another order; then to float32's last digits.
    assert moves[0]["loss"] == stays[0]["loss"]
    for name in ("loss", "held_out/loss", "held_out/loss_with_contexts"):
        here, there = ([line[name] for line in run if name in line] for run in (moves, stays))
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-6, err_msg=name)


def until_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    """Waits until the metrics have a step; fails if the command ends before."""
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or f'{{"step": {step},' not in metrics.read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def disturbed(words, workdir: pathlib.Path, disturb) -> tuple[int, str]:
    """Returns exit code and output of a run that `disturb(launcher, pids)` befalls between two checkpoints."""
    with launched(words, workdir) as process:
        until_step(process, workdir, 33)
        disturb(process.pid, json.loads((workdir / "launch" / "local.json").read_text())["processes"])
        shown = process.communicate(timeout=900)[0]
    return process.returncode, shown


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_is_killed_changes_nothing(undisturbed, words, tmp_path, number):
    code, shown = disturbed(words, tmp_path, lambda launcher, pids: os.kill(pids[number], signal.SIGKILL))
    assert code == 0, shown
    assert f"process {number} ended with 137: starting again (1 of 10)" in shown
    assert "[0] going on from the checkpoint of step 30 in" in shown
    assert lines(tmp_path) == lines(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_when_one_process_is_terminated_all_save_and_go_on(undisturbed, words, tmp_path, number):
    code, shown = disturbed(words, tmp_path, lambda launcher, pids: os.kill(pids[number], signal.SIGTERM))
    assert code == 0, shown
    assert shown.count("is saved; the same command goes on from it") == 2 and "starting again (1 of 10)" in shown
    assert "step 0: " in shown and "going on from the checkpoint of step 30 in" not in shown
    assert lines(tmp_path) == lines(undisturbed)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(undisturbed, words, tmp_path):
    code, shown = disturbed(words, tmp_path, lambda launcher, pids: os.kill(launcher, signal.SIGINT))
    assert code == 130 and shown.count("is saved; the same command goes on from it") == 2, shown
    assert shown.splitlines()[-2].endswith("] stopped") and shown.splitlines()[-1] == "interrupted"
    with launched(words, tmp_path) as process:
        assert process.communicate(timeout=900)[0] and process.returncode == 0
    assert lines(tmp_path) == lines(undisturbed)
