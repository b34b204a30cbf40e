"""Processes of this machine that run together: their lines merged, and none left when one is gone."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

from launch import signals

# Becomes the program that it is given, which on Linux is killed when the process that started it is gone. A program of
# its own: what a fork does before it is one is not safe beside threads.
_LEASH = """
import ctypes, os, signal, sys
control = getattr(ctypes.CDLL(None), "prctl", None)
if control is not None:
    control(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(sys.argv[1]):
        sys.exit(128 + signal.SIGKILL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Command(NamedTuple):
    """A program with its arguments, and what it has in its environment besides that of this process."""

    argv: Sequence[str]
    environment: Mapping[str, str]


@final
class Group:
    """Runs commands side by side; a context manager, at whose end, whatever ends it, none of them runs.

    They end too when this process does, killed even; and get no Ctrl-C of their own.
    """

    def __init__(self, commands: Sequence[Command], say: Callable[[int, str], None], grace: float):
        """Starts them.

        Args:
          commands: what to run.
          say: takes each line of their output with the number of its process; called in threads.
          grace: seconds that they have after SIGTERM, until SIGKILL.
        """
        self._grace = grace
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen] = []
        self._threads: list[threading.Thread] = []
        with contextlib.ExitStack() as undo:
            undo.push(self)
            for number, command in enumerate(commands):
                process = _start(command)
                self._processes.append(process)
                for target, what in ((_read, (process, number, say)), (self._wait, (number,))):
                    thread = threading.Thread(target=target, args=what, daemon=True)
                    self._threads.append(thread)
                    thread.start()
            undo.pop_all()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: Any) -> None:
        with signals.undisturbed():
            self._send(signal.SIGTERM)
            deadline = time.monotonic() + self._grace
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(deadline - time.monotonic(), 0))
            self.kill()
            for thread in self._threads:
                thread.join()

    @property
    def pids(self) -> list[int]:
        """The numbers that the system has given them."""
        return [process.pid for process in self._processes]

    @property
    def codes(self) -> list[int | None]:
        """Exit codes, as a shell tells them; None of those that run."""
        codes = [process.poll() for process in self._processes]
        return [code if code is None or code >= 0 else 128 - code for code in codes]

    def terminate(self) -> None:
        """Asks those that still run to end, and does not wait."""
        self._send(signal.SIGTERM)

    def first_failure(self, settle: float) -> tuple[int, int] | None:
        """Waits until one ends with another exit code than 0; returns its number and that code, None if all end well.

        Once one has ended well, the others have `settle` seconds: one that takes longer counts as killed.
        """
        deadline = None
        for _ in self._processes:
            try:
                number = self._ended.get(timeout=deadline and max(deadline - time.monotonic(), 0))
            except queue.Empty:
                number = next(n for n, process in enumerate(self._processes) if process.poll() is None)
                return number, 128 + signal.SIGKILL
            if code := self.codes[number]:
                return number, code
            deadline = deadline or time.monotonic() + settle
        return None

    def kill(self) -> None:
        """Ends those that still run, without a word."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def _wait(self, number: int) -> None:
        self._processes[number].wait()
        self._ended.put(number)


def _read(process: subprocess.Popen, number: int, say: Callable[[int, str], None]) -> None:
    with process.stdout:
        for line in process.stdout:
            say(number, line.rstrip("\n"))


def _start(command: Command) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *command.argv],
        env={**os.environ, **command.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
