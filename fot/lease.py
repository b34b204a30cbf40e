"""A folder of a bucket that is held by one run: what the kernel's lock is to a folder of this machine.

The object `run.lock` names its owner, who writes it again every little while. Each write names the generation that it
replaces, so of two runs only one succeeds. An owner that was killed falls silent, and is followed by the next run.
"""

import datetime
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable
from typing import NamedTuple, final

from fot import bucket, files
from fot.bucket import Content
from fot.errors import UserError

BEAT = 20.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one, after which an owner is taken for dead
LOOK = 2.0  # seconds between two looks at another's signs


class Process(NamedTuple):
    """A process, as others can tell it.

    Attributes:
      who: in words.
      machine: of this boot, or container; "" where that can't be known.
      number: there.
      began: clock ticks; "" if there is no such process.
    """

    who: str
    machine: str
    number: int
    began: str


@final
class Lease:
    """The hold on a folder: `acquire`, `renew` every `BEAT` seconds, `release`."""

    def __init__(self, folder: str, log: Callable[[str], None]):
        """Args: folder: gs://…; log: is told of a wait."""
        self._folder, self._url, self._log = folder, f"{folder}/{files.LOCK}", log
        self._generation: int | None = None

    def acquire(self) -> None:
        """Returns when the folder is held.

        An owner on this machine is known to run or not to; one elsewhere is watched for a sign of life, `SILENCE`
        seconds at the most, by this machine's clock alone.

        Raises:
          UserError: another run holds the folder, or the bucket can't be written.
        """
        first, began = bucket.read(self._url), time.monotonic()
        if first and _runs(_owner(first)) is None:
            self._log(f"waiting for a sign of life, up to {SILENCE:g} s: {self._folder} was {_use(first)}")
        there = first
        while self._generation is None:
            runs = _runs(_owner(there)) if there else False
            if there and (runs or not first or there.generation != first.generation):
                raise UserError(f"{self._folder} is {_use(there)}: stop that one or choose another workdir")
            if runs is False or time.monotonic() - began >= SILENCE:
                self._generation = bucket.write(self._url, _content(), there.generation if there else 0)
            else:
                time.sleep(LOOK)
            there = bucket.read(self._url)

    def renew(self) -> None:
        """Gives a sign of life.

        Raises:
          UserError: another run has taken the folder over, or the bucket can't be written.
        """
        written = bucket.write(self._url, _content(), self._generation)
        if written is None:
            there = bucket.read(self._url)
            raise UserError(
                f"{self._folder} is {_use(there) if there else 'no longer held by this run'}: this one was silent for "
                "too long and saves no more; stop the other, or choose another workdir"
            )
        self._generation = written

    def release(self) -> None:
        """Leaves the folder to others; raises UserError if the bucket can't be written."""
        if self._generation is not None:
            bucket.delete(self._url, self._generation)
            self._generation = None


def _content() -> bytes:
    """Returns what the object holds: this process, and when; no two are the same."""
    now = datetime.datetime.now(datetime.UTC).isoformat()
    return json.dumps({**_this()._asdict(), "written": now, "nonce": os.urandom(8).hex()}).encode()


def _owner(content: Content) -> Process:
    """Returns the process that wrote the object, nobody known if it is not of this module's making."""
    try:
        values = json.loads(content.data)
        return Process(*(values[name] for name in Process._fields))
    except (ValueError, KeyError, TypeError):
        return Process("another program", "", 0, "")


def _use(content: Content) -> str:
    return f"in use by {_owner(content).who}"


def _this() -> Process:
    number = os.getpid()
    return Process(f"process {number} on host {socket.gethostname()}", _machine(), number, _began(number))


def _runs(process: Process) -> bool | None:
    """Returns whether a process runs, None if it is not of this machine."""
    if not process.machine or process.machine != _machine():
        return None
    return _began(process.number) == process.began


def _machine() -> str:
    """Returns what no other machine, boot or container has: where it is the same, process numbers are too."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(number: int) -> str:
    """Returns when a process of this machine began, "" if there is none."""
    try:
        words = pathlib.Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        return "" if words[0] == "Z" else words[19]
    except OSError:
        return ""
