"""SIGTERM, the warning that a machine is about to be taken away: save what is unsaved, then exit with code 42.

Of several processes that train together, one that gets it tells the others, and all end.

This is the TPU's preemption notice too: JAX's service (`multihost_utils.reached_preemption_sync_point`, which orbax's
`reached_preemption` asks) has SIGTERM as its only source (XLA's `SigtermNotifier`; `create_preemption_sync_manager`
takes no other). It is off, `fot.distributed`, for two reasons: its handler takes the place of Python's, and it can be
asked between steps alone, not while a program compiles or a held-out loss is computed.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, final

from fot import cli, distributed
from fot.errors import LostError


@final
class Termination:
    """Ends the process with code 42 ("retry me") when SIGTERM comes; a context manager, for the main thread.

    Python runs signal handlers in the main thread and only between its bytecodes, which a compilation can keep from
    happening for longer than a scheduler waits. So a thread acts, at once, and from then on the main thread does not
    enter `deferred`. A further SIGTERM changes nothing. Never entered, it only keeps `rescue` and `deferred` working,
    as in a notebook.
    """

    def __init__(self):
        self._turn = threading.Condition()
        self._requested, self._changing = threading.Event(), threading.Lock()
        self._enough: Callable[[], bool] = lambda: True
        self._save: Callable[[], str] = nothing

    def __enter__(self) -> "Termination":
        self._received, self._sent = socket.socketpair()
        self._sent.setblocking(False)
        # The interpreter writes to the wakeup fd at once, wherever the main thread is; the handler does it again for
        # the moments when an event loop has put its own fd there.
        self._handler = signal.signal(signal.SIGTERM, self._notice)
        signal.siginterrupt(signal.SIGTERM, False)  # a write under way goes on
        self._wakeup = signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="fot-termination", daemon=True).start()
        self._others = contextlib.ExitStack()
        self._others.enter_context(distributed.told(distributed.TERMINATED, self._notice))
        return self

    def __exit__(self, *_: Any) -> None:
        self._others.close()
        with self.deferred():
            signal.set_wakeup_fd(self._wakeup)
            signal.signal(signal.SIGTERM, self._handler)
            self._sent.close()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Keeps `halted` waiting during the block: for what changes the state that a rescue saves."""
        with self._turn:
            while self._requested.is_set() and self._enough():
                self._turn.wait()  # the process is about to end
            try:
                yield
            finally:
                self._turn.notify_all()

    @contextlib.contextmanager
    def rescue(self, save: Callable[[], str]) -> Iterator[None]:
        """Has SIGTERM call `save` during the block, and not at once exit.

        Args:
          save: called in another thread, while the main thread is anywhere in the block; returns the line to print. A
            `UserError` of it makes the exit code 2. Of blocks in each other the innermost's is called.
        """
        outer = self._change(save)
        try:
            yield
        finally:
            self._change(outer)

    @contextlib.contextmanager
    def halted(self, enough: Callable[[], bool] = lambda: True, seconds: float = 0.0) -> Iterator[bool]:
        """Keeps the main thread out of `deferred` during the block: for the `save` of a rescue.

        Args:
          enough: what has to be true before, if another process is further than this one; the main thread goes on
            through `deferred`, where alone this changes, until it is.
          seconds: for which it goes on at the most.

        Gives whether it is.
        """
        with self._turn:
            self._enough = enough
            self._turn.notify_all()
            yield self._turn.wait_for(enough, seconds)

    def _change(self, save: Callable[[], str]) -> Callable[[], str]:
        """Has SIGTERM call another one, and returns the one before; after SIGTERM doesn't return."""
        with self._changing:
            if not self._requested.is_set():
                before, self._save = self._save, save
                return before
        while True:
            time.sleep(1)  # the process is about to end

    def _notice(self, *_: Any) -> None:
        with contextlib.suppress(OSError):  # full, so there is news enough
            self._sent.send(bytes([signal.SIGTERM]))

    def _watch(self) -> None:
        with self._received:
            while signal.SIGTERM not in (numbers := self._received.recv(64)):
                if not numbers:
                    return
        with self._changing:
            self._requested.set()
        distributed.tell_all(distributed.TERMINATED)
        code = 1
        try:
            code = cli.exit_code(self._report) or cli.RETRY
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)  # the main thread may be compiling yet

    def _report(self) -> None:
        line = self._save()
        with contextlib.suppress(OSError):  # whoever read it may have been terminated too
            print(f"terminated: {line}", file=sys.stderr)
            sys.stdout.flush()


def nothing() -> str:
    """Leaves the other processes, and returns the line of a run without steps: the `save` of no rescue at all."""
    with contextlib.suppress(LostError):  # others may have something to save, and end after this one
        distributed.part(0)
    return "there was nothing to save; the same command starts again"
