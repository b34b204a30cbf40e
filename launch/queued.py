"""Queued resources of Cloud TPU: the gcloud commands of one, its states, and what its machines run."""

import dataclasses
import json
import math
import re
import shlex
from typing import NamedTuple

from fot.config import accelerators
from fot.config.accelerators import Slice
from fot.errors import UserError
from launch import shell
from launch.job import Job

# States of a queued resource: on its way, ready, and taken away; FAILED, DELETING and none at all are the others.
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING")
ACTIVE = "ACTIVE"
FAILED = "FAILED"
TAKEN = ("SUSPENDING", "SUSPENDED")
GONE = "GONE"  # it doesn't exist

RUNNING, STOPPED = -1, -2  # in the place of exit codes


@dataclasses.dataclass(frozen=True)
class Place:
    """Where, and on which terms; the flags of the same names."""

    project: str
    zone: str
    network: str
    runtime: str
    spot: bool
    reserved: bool
    wait_minutes: int


class State(NamedTuple):
    """State of a queued resource, and what the service says of it, if anything."""

    name: str
    detail: str


def gcloud(place: Place, verb: str, name: str, *words: str) -> list[str]:
    """Returns a command about the queued resource `name`."""
    where = [f"--zone={place.zone}", *([f"--project={place.project}"] if place.project else []), "--quiet"]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, name, *words, *where]


def create(job: Job, place: Place) -> list[str]:
    """Returns the command that requests the machines."""
    nodes = (
        [f"--node-id={job.name}"] if job.slices == 1 else [f"--node-count={job.slices}", f"--node-prefix={job.name}"]
    )
    flags = {
        "--runtime-version": place.runtime or job.slice.generation.runtime,
        "--network": place.network,
    }
    tier = [flag for flag, wanted in (("--spot", place.spot), ("--reserved", place.reserved)) if wanted]
    named = [f"{flag}={value}" for flag, value in flags.items() if value]
    return gcloud(place, "create", job.name, *accelerator(job.slice), *named, *nodes, *tier, "--async")


def accelerator(piece: Slice) -> list[str]:
    """Returns the flags that name a slice.

    An accelerator type stands for the most cube-like of the shapes of its size; v4 takes others by their shape.

    Raises:
      UserError: there are no queued resources of it.
    """
    generation = piece.generation
    if not generation.queued:
        raise UserError(f"{piece.name} has no queued resources: use --backend=gke")
    usual = _usual(piece)
    if piece.shape == usual:
        return [f"--accelerator-type={generation.queued}-{piece.chips * generation.queued_units}"]
    if piece.name == "v4":
        return ["--type=v4", f"--topology={piece.topology}"]
    shape = "x".join(map(str, usual))
    raise UserError(f"queued resources give {piece.chips} chips of {piece.name} as {shape} only: take that shape")


def _usual(piece: Slice) -> tuple[int, ...]:
    """Returns the most cube-like shape that clouds offer of the slice's generation and size."""
    if len(piece.shape) == 2:
        return piece.shape  # each size has one shape
    shapes = []
    for first in range(1, math.isqrt(piece.chips) + 1):
        for second in range(first, piece.chips // first + 1):
            third, rest = divmod(piece.chips, first * second)
            if not rest and third >= second:
                # 2x2x1 is the one that is written largest first.
                shapes.append((2, 2, 1) if (first, second, third) == (1, 2, 2) else (first, second, third))
    return min((shape for shape in shapes if _is_offered(piece.name, shape)), key=sum)


def _is_offered(name: str, shape: tuple[int, ...]) -> bool:
    try:
        accelerators.offered(f"{name}:{'x'.join(map(str, shape))}")
    except UserError:
        return False
    return True


def describe(job: Job, place: Place) -> list[str]:
    """Returns the command that tells the state."""
    return gcloud(place, "describe", job.name, "--format=json")


def remove(job: Job, place: Place) -> list[str]:
    """Returns the command that deletes the request and its machines."""
    return gcloud(place, "delete", job.name, "--force")


def state(job: Job, place: Place, timeout: float) -> State | None:
    """Returns the state, None if the service didn't tell (`shell` has no better reason than silence)."""
    done = shell.run(describe(job, place), timeout)
    if done.code:
        absent = "NOT_FOUND" in done.err or "not found" in done.err.lower()
        return State(GONE, "") if absent else None
    try:
        values = json.loads(done.out)["state"]
        return State(values["state"], _detail(values))
    except (ValueError, KeyError, TypeError):
        return None


def _detail(values: dict) -> str:
    """Returns the message that a state comes with, such as that of failedData, in one line."""
    found = re.search(r'"message": "((?:[^"\\]|\\.)*)"', json.dumps(values, ensure_ascii=False))
    return " ".join(json.loads(f'"{found[1]}"').split()) if found else ""


def on_all(job: Job, place: Place, command: str) -> list[str]:
    """Returns the command that runs a shell command on every machine."""
    return gcloud(place, "ssh", job.name, "--node=all", "--worker=all", f"--command={command}")


def on_first(job: Job, place: Place, command: str) -> list[str]:
    """Returns the command that runs a shell command on the first machine of the first slice."""
    return gcloud(place, "ssh", job.name, "--node=0", "--worker=0", f"--command={command}")


def copy(job: Job, place: Place, path: str) -> list[str]:
    """Returns the command that copies the packed source to every machine."""
    words = (f"{job.name}:{job.name}.tar.gz", "--node=all", "--worker=all")
    return gcloud(place, "scp", path, *words)


def prepare(job: Job) -> str:
    """Returns the shell command that makes a machine ready: image pulled, or source unpacked and installed."""
    if job.image:
        registry = job.image.partition("/")[0]
        login = f"sudo gcloud auth configure-docker {registry} --quiet && " if "." in registry else ""
        return f"mkdir -p {job.name} && {login}sudo docker pull --quiet {shlex.quote(job.image)}"
    unpack = f"rm -rf {job.name} && mkdir {job.name} && tar -xzf {job.name}.tar.gz -C {job.name} && cd {job.name}"
    return f"{unpack} && {job.setup}"


def start(job: Job) -> str:
    """Returns the shell command that starts training and leaves it running: log, pid and exit are files beside it."""
    # The shell waits for the exit code; a trap that does nothing keeps SIGTERM from ending it first.
    inner = f"trap : TERM; {_train(job)}; echo $? > exit"
    background = f"setsid nohup bash -c {shlex.quote(inner)} >> log 2>&1 < /dev/null & echo $! > pid"
    return f"cd {job.name} && rm -f exit stopped && {{ {background}; }}"


def _train(job: Job) -> str:
    if not job.image:
        return shlex.join([*(["env", *job.environment] if job.environment else []), *job.command])
    words = ["sudo", "docker", "run", "--rm", f"--name={job.name}", "--privileged", "--net=host"]
    words += ["--volume=/dev/shm:/dev/shm", *(f"--env={text}" for text in job.environment), job.image]
    command = ["bash", "-c", f"{job.setup} && exec {shlex.join(job.command)}"] if job.setup else job.command
    return shlex.join([*words, *command])


def started(job: Job) -> str:
    """Returns the shell command that fails on a machine where training was never started."""
    return f"test -e {job.name}/pid"


def follow(job: Job, line: int) -> str:
    """Returns the shell command that prints the log from a line on, until training ends."""
    return f"cd {job.name} && tail --pid=$(cat pid) --sleep-interval=0.2 --lines=+{line} --follow=name log"


def show(job: Job) -> str:
    """Returns the shell command that prints the log so far."""
    return f"cat {job.name}/log"


def terminate(job: Job) -> str:
    """Returns the shell command that has training save and end, for good."""
    return f"cd {job.name} && touch stopped && kill -TERM -- -$(cat pid)"


def kill(job: Job) -> str:
    """Returns the shell command that ends training where it still runs."""
    forced = f"; sudo docker kill {job.name}" if job.image else ""
    return f"cd {job.name} && test -e exit || {{ kill -KILL -- -$(cat pid){forced}; echo 137 > exit; }}"


def report(job: Job) -> str:
    """Returns the shell command that prints one line of how training ended."""
    return (
        f"cd {job.name} && echo fot-exit=$(cat exit 2>/dev/null || echo {RUNNING}),$(test -e stopped && echo {STOPPED})"
    )


def codes(output: str) -> list[int]:
    """Returns what `report` says on each machine: its exit code, `RUNNING`, or `STOPPED`."""
    found = re.findall(r"fot-exit=(-?\d+),(-\d+)?", output)
    return [STOPPED if stopped and int(code) != RUNNING else int(code) for code, stopped in found]
