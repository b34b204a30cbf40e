"""Jobs to launch, programs on PATH that play clusters, and a training that plays exit codes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from launch.gke import Place as Cluster
from launch.job import Job
from launch.local import Place as Machine
from launch.queued import Place as Zone
from launch.slurm import Place as Partition

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "data" / "launch"

# Plays, on each start, the next line of the file $TRAIN: an exit code, or several with commas, one a machine; `wait` is
# until SIGTERM, then 42; `stuck` is until SIGKILL, and makes $TRAIN.stuck when it has begun.
TRAINING = r"""#!/bin/bash
trap 'echo saved; exit 42' TERM
starts=$TRAIN.$MACHINE
echo >> "$starts"
number=$(wc -l < "$starts")
echo "$MACHINE starts $number: $*"
action=$(sed -n "${number}p" "$TRAIN")
case "$action" in *,*) action=$(cut -d, -f$((${MACHINE#machine} + 1)) <<< "$action") ;; esac
[ "$action" = stuck ] && trap '' TERM && touch "$TRAIN.stuck"
while [ "$action" = wait ] || [ "$action" = stuck ]; do sleep 0.02; done
exit "$action"
"""


def job(**changes) -> Job:
    """Returns a job of two slices on v4."""
    values = {
        "name": "fot-3b",
        "config": "configs/longllama_3b.py",
        "overrides": ("--config.mesh.data=2",),
        "workdir": "gs://bucket/runs/3b",
        "topology": "v4:2x2x4",
        "slices": 2,
        "image": "",
        "setup": "",
        "python": "python",
        "environment": ("JAX_LOG_COMPILES=1", "NOTE=it's two words"),
        "retries": 3,
    }
    return Job(**{**values, **changes})


CLUSTER = Cluster(context="", namespace="default", queue="multislice-queue", priority="", service_account="")
ZONE = Zone(project="", zone="us-central2-b", network="", runtime="", spot=True, reserved=False, wait_minutes=1)
MACHINE = Machine(processes=2, devices=4)
PARTITION = Partition(partition="gpu", account="", nodes=2, gpus=8, time="24:00:00")


def golden(name: str, text: str) -> None:
    """Compares a text with a golden file; FOT_GOLDEN=write writes it instead."""
    path = GOLDEN / name
    if os.environ.get("FOT_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs: FOT_GOLDEN=write python -m pytest … writes it anew"


def program(folder: pathlib.Path, name: str, text: str) -> pathlib.Path:
    """Writes an executable script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def on_path(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


class FakeCloud:
    """A gcloud on PATH that plays, see fake_gcloud.py."""

    def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.train = folder / "cloud", folder / "train"
        self.folder.mkdir()
        fake = f'#!/bin/sh\nexec {sys.executable} -SE {HERE / "fake_gcloud.py"} "$@"\n'
        program(folder / "bin", "gcloud", fake)
        on_path(monkeypatch, folder / "bin")
        self.python = str(program(folder / "bin", "train", TRAINING))
        monkeypatch.setenv("FAKE_GCLOUD", str(self.folder))
        monkeypatch.setenv("TRAIN", str(self.train))

    def plays(self, *states: list[str], train: tuple[str, ...] = ("0",), **play) -> None:
        """Sets the states of each request in turn, what each start of training does, and other entries of play.json."""
        (self.folder / "play.json").write_text(json.dumps({"states": states, **play}))
        self.train.write_text("\n".join(train) + "\n")

    @property
    def verbs(self) -> list[str]:
        """The verbs of all calls so far, without looks at the state."""
        calls = self.folder / "calls"
        lines = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return [words[3] for words in lines if words[0] == "compute" and words[3] != "describe"]

    @property
    def left(self) -> list[str]:
        """What there is yet of requests and machines."""
        return [path.name for path in self.folder.iterdir() if path.name.startswith(("request", "machine"))]


def repository(folder: pathlib.Path) -> pathlib.Path:
    """Makes a git repository with one commit."""
    folder.mkdir(parents=True)
    (folder / "README").write_text("read me\n")
    (folder / ".gitignore").write_text("ignored\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=one")
    return folder


def git(folder: pathlib.Path, *words: str) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True).stdout
