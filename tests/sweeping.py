"""Sweeps to run, with a program in place of training that saves each step, and refuses to run twice at a time."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

from tests.launching import program

ROOT = pathlib.Path(__file__).parent.parent
RATES = (1e-1, 1e-2, 1e-3, 1e-4)

# Takes the words of fot.train. Its loss is lowest at a learning rate of 1e-2; each step is saved at once; `completed`
# gets a line each time that a run comes to its end.
TRAINER = """
import fcntl, json, math, os, pathlib, sys, time
words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
scheme, _, bucket = words["workdir"].partition("gs://")
workdir = pathlib.Path(os.environ["BUCKETS"], bucket) if bucket else pathlib.Path(scheme)
workdir.mkdir(parents=True, exist_ok=True)
lock = open(workdir / "run.lock", "a+")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    (workdir / "twice").touch()
    sys.exit("in use")
rate, steps = float(words["config.optimizer.learning_rate"]), int(words["config.train.steps"])
if "fails" in os.environ.get("PLAY", "") and rate == 1e-1:
    sys.exit("it fails")
metrics = workdir / "metrics.jsonl"
done = metrics.read_text().count(chr(10)) if metrics.exists() else 0
with open(metrics, "a") as file:
    for step in range(done + 1, steps + 1):
        time.sleep(float(os.environ["STEP"]))
        loss = abs(math.log10(rate) + 2) + 1 / step
        file.write(json.dumps({"step": step, "held_out/loss": loss}) + chr(10))
        file.flush()
        if bucket:
            import urllib.parse, urllib.request
            name, _, path = bucket.partition("/")
            query = urllib.parse.urlencode({"uploadType": "media", "name": path + "/metrics.jsonl"})
            url = os.environ["STORAGE_EMULATOR_HOST"] + "/upload/storage/v1/b/" + name + "/o?" + query
            urllib.request.urlopen(url, metrics.read_bytes()).close()
if not (workdir / "completed").exists():
    os.write(os.open(workdir / "completed", os.O_CREAT | os.O_APPEND | os.O_WRONLY), b"once" + bytes([10]))
"""


def sweep_file(folder: pathlib.Path, space: str, more: str = "") -> pathlib.Path:
    """Writes a sweep of that space."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tried.py"
    path.write_text(
        "from launch.space import *\n\ndef get_sweep():\n"
        f"    return Sweep('configs/dictionary_tiny.py', {space}, {{'train.steps': 5}}, {more})\n"
    )
    return path


def words(folder: pathlib.Path, sweep: pathlib.Path, *more: str) -> list[str]:
    """Returns the words of a sweep in which the program trains."""
    trainer = program(folder / "bin", "trainer", f"#!{sys.executable} -SE\n{TRAINER}")
    return [f"--sweep={sweep}", f"--workdir={folder / 'run'}", f"--python={trainer}", *more]


@contextlib.contextmanager
def started(words: list[str], step: float, play: str = "") -> Iterator[subprocess.Popen]:
    """Gives the command under way, with so many seconds a step of training."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = {**os.environ, "STEP": str(step), "PLAY": play}
    command = [sys.executable, "-m", "launch.sweep", *words]
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def completed(workdir: pathlib.Path, trials: str = "trials/*") -> dict[str, int]:
    """Returns how often each trial has come to its end."""
    assert not list(workdir.glob(f"{trials}/twice")), "a trial ran twice at a time"
    return {path.parent.name: path.read_text().count("once") for path in workdir.glob(f"{trials}/completed")}


def steps(trial: pathlib.Path) -> list[int]:
    """Returns the steps that a trial has trained, in order."""
    return [json.loads(line)["step"] for line in (trial / "metrics.jsonl").read_text().splitlines()]
