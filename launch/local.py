"""This machine as a pod in small: processes with virtual CPU devices, that find each other over loopback.

This command stays with its job, and starts it again when a process was terminated or lost. The workdir's launch/ has
local.log, all that was said, and local.json, how the job goes; its lock tells whether this command still runs.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO, final

from fot import files
from fot.errors import UserError
from launch import record, shell, signals
from launch.group import Command, Group
from launch.job import GRACE, RESTARTS, RETRY, Job, check_no_cloud

TOOLS = ()
PYTHON = sys.executable
SETUP = ""
LOOPBACK = "127.0.0.1"
LOG, STATE = "local.log", "local.json"
ANSWER = 10.0  # seconds that this command has, besides its processes, to end
SETTLE = 120.0  # seconds that the other processes have to end after the first one has trained
MOST = 64  # processes


@dataclasses.dataclass(frozen=True)
class Place:
    """How this machine is divided; the flags of the same names."""

    processes: int
    devices: int


def check(job: Job, place: Place) -> int:
    """Returns the devices of the job; raises UserError, one line naming the flag, if this machine can't run it."""
    check_no_cloud(job, "local", "--processes and --devices")
    if job.in_bucket:
        raise UserError(f"--workdir={job.workdir} is a bucket: local takes a folder of this machine")
    if not 1 <= place.processes <= MOST or place.devices < 1:
        raise UserError(
            f"--processes={place.processes} must be 1 to {MOST} and --devices={place.devices}, of each, 1 or more"
        )
    if shutil.which(job.python) is None:
        raise UserError(f"--python={job.python} is no program of this machine: leave it out, for the present one")
    return place.processes * place.devices


def plan(job: Job, place: Place) -> str:
    """Returns the commands that `submit` runs, as text."""
    setup = f"# first\n{shell.line(_setup(job))}\n" if job.setup else ""
    trained = "".join(
        shell.line(["env", *(f"{name}={value}" for name, value in command.environment.items()), *command.argv]) + "\n"
        for command in commands(job, place, "PORT")
    )
    return f"{setup}# side by side; PORT is a free one, another at each start\n{trained}"


def commands(job: Job, place: Place, port: int | str) -> list[Command]:
    """Returns what runs side by side."""
    address = f"{LOOPBACK}:{port}"
    shared = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(place.devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(place.processes),
    }
    own = dict(text.partition("=")[::2] for text in job.environment)
    numbers = range(place.processes)
    return [Command(job.command, {**shared, "JAX_PROCESS_ID": str(number), **own}) for number in numbers]


def submit(job: Job, place: Place, keep: bool, begin: Callable[[], None] = lambda: None) -> int:
    """Runs the job to its end and returns its exit code; then, and after any error or Ctrl-C, no process is left.

    Args:
      job: the description.
      place: where.
      keep: changes nothing here.
      begin: writes the launch into the workdir, once it is known that no other is under way.

    Raises:
      UserError: the workdir is in use, the setup failed, or the job was terminated more often than it may be.
    """
    with signals.interrupting(), files.hold(folder(job)):
        begin()
        with open(folder(job) / LOG, "a", encoding="utf-8", errors="replace") as log:
            return _Run(job, place, log).until_it_ends()


@final
class _Run:
    """One job under way, and what the workdir has of it."""

    def __init__(self, job: Job, place: Place, log: TextIO):
        self._job, self._place, self._log = job, place, log
        self._writing = threading.Lock()

    def until_it_ends(self) -> int:
        """Trains, and does so again after terminations; returns the job's exit code."""
        how = "stopped"
        try:
            code = self._until_it_ends()
            how = "done" if code == 0 else f"failed with exit code {code}"
            return code
        except UserError as error:
            how = f"failed: {error}"
            raise
        finally:
            self._keep(how, [], over=True)
            self._say(how)

    def _until_it_ends(self) -> int:
        job, again = self._job, ""
        self._keep("setting up", [])
        if job.setup and shell.show(_setup(job)):
            raise UserError(f"--setup={job.setup} failed, see above")
        for attempt in range(job.retries + 1):
            if attempt:
                self._say(f"{again}: starting again ({attempt} of {job.retries})")
            with Group(commands(job, self._place, _free_port()), self._line, GRACE) as group:
                self._keep(f"training, {attempt} times started again", group.pids)
                failure = group.first_failure(SETTLE)
                if failure is None:
                    return 0
                number, code = failure
                if code != RETRY:
                    # Nothing can be saved without the one that is gone.
                    group.kill()
            if code not in RESTARTS:
                return code
            again = f"process {number} ended with {code}"
        raise UserError(f"terminated {job.retries + 1} times: --retries={job.retries} allows no further start")

    def _line(self, number: int, text: str) -> None:
        self._write(f"[{number}] {text}")

    def _say(self, text: str) -> None:
        self._write(f"[{time.strftime('%H:%M:%S')}] {text}")

    def _write(self, line: str) -> None:
        with self._writing, contextlib.suppress(OSError):  # the job goes on without a reader, or with a full disk
            print(line, file=self._log, flush=True)
            print(line, flush=True)

    def _keep(self, how: str, pids: list[int], over: bool = False) -> None:
        here = {"launcher": os.getpid(), "host": socket.gethostname(), "processes": pids}
        path = folder(self._job) / STATE
        files.write_json(path, {"how": how, "over": over, **here}, "choose another --workdir")


def folder(job: Job) -> pathlib.Path:
    """Returns where the workdir has the job's log and lock."""
    return pathlib.Path(job.workdir).expanduser() / record.FOLDER


def status(job: Job, place: Place) -> int:
    """Shows how the job goes, and its processes."""
    state = _state(job)
    runs = _runs(job)
    how = state["how"] if runs or state["over"] else f"this command was killed while {state['how']}; again, it goes on"
    print(f"{job.name}: {how}")
    if runs:
        print(f"on {state['host']}: process {state['launcher']} with {' '.join(map(str, state['processes']))}")
    return 0


def logs(job: Job, place: Place, follow: bool) -> int:
    """Shows what all processes print, each line with its process."""
    state = _state(job)
    wait = [f"--pid={state['launcher']}", "--follow=name"] if follow and _runs(job) else []
    return shell.show(["tail", "--lines=+1", *wait, str(folder(job) / LOG)])


def stop(job: Job, place: Place) -> int:
    """Ends the job: it saves, and is not started again."""
    state = _state(job)
    if not _runs(job):
        print(f"{job.name} does not run")
        return 0
    if state["host"] != socket.gethostname():
        raise UserError(f"{job.name} runs on {state['host']}: run this there")
    with contextlib.suppress(ProcessLookupError):
        os.kill(state["launcher"], signal.SIGTERM)
    deadline = time.monotonic() + GRACE + ANSWER
    while _runs(job):
        if time.monotonic() > deadline:
            raise UserError(f"process {state['launcher']} does not end: kill -KILL {state['launcher']}")
        time.sleep(0.1)
    print(f"{job.name} is stopped")
    return 0


delete = stop  # nothing is left of it but its logs


def _state(job: Job) -> dict[str, Any]:
    """Returns what `_Run` has kept of the newest launch."""
    path = folder(job) / STATE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"{path} can't be read: nothing was started in this --workdir") from None


def _runs(job: Job) -> bool:
    try:
        with files.hold(folder(job)):
            return False
    except UserError:
        return True


def _setup(job: Job) -> list[str]:
    return ["bash", "-c", job.setup]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        return free.getsockname()[1]
