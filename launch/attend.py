"""A job that a command stays with, whoever began it: gone on with, never sent twice, and nothing of it left behind."""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fot.errors import UserError
from launch import record, signals
from launch.job import ABSENT, LOST, RESTARTS, UNDER_WAY, Job

LOOKS = 3  # in a row that don't find a job, until there is none: queues show what was sent with delay
SILENCE = 900.0  # seconds without an answer, until that is an error
LEAVE = 300.0  # seconds that a deleted job has to be gone


def attend(backend: ModuleType, job: Job, place: Any, begin: Callable[[], None], poll: float) -> int:
    """Sends a job, or finds the one that was sent from this workdir, and returns its exit code when it has ended.

    What is found: a job that waits or runs is waited for; one that has ended isn't sent again, unless it is to be
    started again (`RESTARTS`). Then, and after any error or Ctrl-C, the job is deleted.

    Args:
      backend: with progress, follow and delete.
      job: the description.
      place: of the backend's class.
      begin: writes the launch into the workdir, before the job is sent.
      poll: seconds between two looks.

    Raises:
      UserError: a job of that name was sent from elsewhere, or the backend refuses or is silent.
    """
    kept = record.newest(job.workdir)
    code = kept.get("ended")
    with signals.interrupting():
        there = bool(kept) and code is None and _found(backend, job, place, poll)
        if code in RESTARTS:
            _remove(backend, job, place, poll)  # what was killed before it could
        if not there and (code is None or code in RESTARTS):
            if backend.progress(job, place) != ABSENT:
                raise UserError(f"a job named {job.name} exists, of another launch: delete it, or give another --name")
            begin()
            code = None
        try:
            if code is None:
                code = backend.follow(job, place, there, poll)
                record.end(job.workdir, code)
            return code
        finally:
            with signals.undisturbed():
                _remove(backend, job, place, poll)


def follower(submit: Callable[[Job, Any, bool], int], progress: Callable[[Job, Any], int]) -> Callable[..., int]:
    """Returns the `follow` of a backend whose jobs go on without a command, as a cluster's do."""

    def follow(job: Job, place: Any, there: bool, poll: float) -> int:
        """Submits the job, unless it is there, and returns its exit code when it has ended."""
        if not there:
            submit(job, place, False)
        return _until_ended(lambda: progress(job, place), poll)

    return follow


def _until_ended(progress: Callable[[], int], poll: float) -> int:
    """Looks at a job until it has ended, and returns its exit code; `LOST` if it is gone without one.

    Raises:
      UserError: what `progress` raises, for too long.
    """
    deadline, missed = time.monotonic() + SILENCE, 0
    while True:
        try:
            code = progress()
        except UserError:
            if time.monotonic() > deadline:
                raise
        else:
            deadline = time.monotonic() + SILENCE
            missed = missed + 1 if code == ABSENT else 0
            if missed == LOOKS:
                return LOST
            if code not in (ABSENT, UNDER_WAY):
                return code
        time.sleep(poll)


def _found(backend: ModuleType, job: Job, place: Any, poll: float) -> bool:
    """Returns whether there is a job that was sent, perhaps just now, by a command that was killed."""
    for look in range(LOOKS):
        if look:
            time.sleep(poll)
        if backend.progress(job, place) != ABSENT:
            return True
    return False


def _remove(backend: ModuleType, job: Job, place: Any, poll: float) -> None:
    """Deletes the job and waits until it is gone; raises UserError if it stays."""
    backend.delete(job, place)
    deadline = time.monotonic() + LEAVE
    while backend.progress(job, place) != ABSENT:
        if time.monotonic() > deadline:
            raise UserError(f"{job.name} is deleted but not gone: launch.pod status --workdir={job.workdir} shows it")
        time.sleep(poll)
