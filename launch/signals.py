"""Signals that end a command: turned into one interrupt, and held off while it cleans up."""

import contextlib
import signal
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """Has SIGTERM, and SIGHUP unless it is ignored, do in the block as Ctrl-C does: once."""

    def interrupt(*_: object) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handled(lambda number, old: old if old == signal.SIG_IGN else interrupt):
        yield


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keeps these signals, and Ctrl-C, from ending the block."""
    with _handled(lambda number, old: signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], object]) -> Iterator[None]:
    old = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        signal.signal(number, handler(number, old[number]))
    try:
        yield
    finally:
        for number in _SIGNALS:
            signal.signal(number, old[number])
