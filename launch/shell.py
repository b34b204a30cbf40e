"""Other programs: run with a time limit, none left behind, and what they say in one line."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fot.errors import UserError

TIMED_OUT = 124  # exit code, as that of timeout(1)


class Done(NamedTuple):
    """A program that has ended: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """Returns what it said of its failure, in one line: its last line that reads ERROR, else its last line."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or [f"exit code {self.code}"])[-1]


def need(tools: Sequence[str], remedies: dict[str, str]) -> None:
    """Raises UserError, with the remedy, if a program is not on PATH."""
    for tool in tools:
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not on PATH: {remedies[tool]}, or look at the job with --dry_run")


def run(argv: Sequence[str], timeout: float, text: str = "") -> Done:
    """Runs a program to its end and returns what it said; past `timeout` seconds it is ended with code 124.

    It gets no Ctrl-C of its own; whatever ends the call ends the program with all that it started.
    """
    with _started(argv) as process:
        try:
            out, err = process.communicate(text, timeout)
        except subprocess.TimeoutExpired:
            return Done(TIMED_OUT, "", f"no answer from {name(argv)} in {timeout:g} seconds")
        return Done(process.returncode, out, err)


def must(argv: Sequence[str], timeout: float, text: str = "") -> str:
    """Runs a program as `run` does and returns its output.

    Raises:
      UserError: it failed; the message has its name and its reason.
    """
    done = run(argv, timeout, text)
    if done.code:
        raise UserError(f"{name(argv)}: {done.reason}")
    return done.out


def show(argv: Sequence[str]) -> int:
    """Runs a program whose output is for the user, who ends it with Ctrl-C, and returns its exit code."""
    return subprocess.run(argv, check=False).returncode


class Lines:
    """A program whose lines of output are handed to `say` as they come, in a thread; `close` ends it."""

    def __init__(self, argv: Sequence[str], say: Callable[[str], None]):
        self._stack = contextlib.ExitStack()
        process = self._stack.enter_context(_started(argv, subprocess.DEVNULL))
        self._thread = threading.Thread(target=lambda: [say(line.rstrip("\n")) for line in process.stdout], daemon=True)
        self._thread.start()
        self._process = process

    def wait(self, seconds: float) -> bool:
        """Waits until the program ends, so many seconds at most, and returns whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Ends the program, with all that it started."""
        _end(self._process)
        self._thread.join()
        self._stack.close()


@contextlib.contextmanager
def _started(argv: Sequence[str], err: int = subprocess.PIPE) -> Iterator[subprocess.Popen]:
    """Starts a program in a session of its own; at the end of the block nothing of it runs."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=err,
        encoding="utf-8",
        errors="surrogateescape",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError, AttributeError):  # stderr may be None
                stream.close()


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def name(argv: Sequence[str]) -> str:
    """Returns the words of a command up to its first flag or argument with a slash, for messages."""
    words = []
    for word in argv:
        if word.startswith("-") or (words and "/" in word):
            break
        words.append(os.path.basename(word))
    return " ".join(words)


def line(argv: Sequence[str]) -> str:
    """Returns a command as one types it into a shell."""
    return shlex.join(argv)
