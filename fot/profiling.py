"""What a slow or hanging run leaves behind: an XProf trace of chosen steps, the stacks of all threads, its end."""

import contextlib
import faulthandler
import math
import pathlib
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, final

import jax

from fot.errors import UserError

FOLDER = "profile"  # in the workdir
HANG_FILE = "hang.{}.txt"  # there too, with the number of the process
SLOW = 10  # times the median
LEAST = 10.0  # seconds; less is no hang, whatever the median
STUCK = 2  # times that: what hangs so long won't go on
UNKNOWN = 4  # times the limit of a stretch: what may go by when nobody knows what is usual
KNOWN, _KEPT = 3, 100  # stretches that a median needs, and is of at the most


class Span(NamedTuple):
    """The steps `start` … `stop` - 1 of a run, counted from 0."""

    start: int
    stop: int


def span(text: str) -> Span | None:
    """Returns the steps that "start:stop" names; of "" None.

    Raises:
      UserError: the text reads otherwise, or names no step.
    """
    if not text:
        return None
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise UserError(f"--profile={text} must read start:stop, the first step and the one after the last, as 10:13")
    return Span(int(start), int(stop))


@final
class Trace:
    """Traces the steps of a span into `<workdir>/profile`, for XProf and TensorBoard; a context manager.

    What is traced when the run ends is written then.
    """

    def __init__(self, steps: Span | None, workdir: pathlib.Path):
        self._steps, self._folder, self._running = steps, workdir / FOLDER, False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def step(self, number: int, before: Any) -> contextlib.AbstractContextManager:
        """Returns the context in which to begin a step.

        Args:
          number: of the step.
          before: arrays that the steps before it give; a trace begins, and ends, when they are there.

        Raises:
          UserError: the workdir can't be written.
        """
        if self._steps is None:
            return contextlib.nullcontext()
        inside = self._steps.start <= number < self._steps.stop
        if inside != self._running:
            jax.block_until_ready(before)
            self._start() if inside else self._stop()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _start(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"can't write {self._folder} ({error.strerror}): choose another workdir") from None
        jax.profiler.start_trace(self._folder)
        self._running = True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


class Ends(NamedTuple):
    """How a run that doesn't go on is ended.

    Attributes:
      seconds: that a stretch of steps may take at least, or four times those if nobody knows; 0 is any time.
      give_up: receives why, the step, and where in the code the main thread is; doesn't return.
    """

    seconds: float
    give_up: Callable[[str, int, str], NoReturn]


@final
class Watch:
    """Reports the stacks of all threads when a stretch of steps takes 10 × the median of those before it.

    It may also end a run that doesn't go on. A context manager; a thread of its own watches, so that it notices also
    where the main thread waits for devices.

    Attributes:
      step: that has begun, counted from 0.
    """

    def __init__(
        self,
        report: pathlib.Path,
        log: Callable[[str], None],
        least: float = LEAST,
        shown: str = "",
        ends: Ends | None = None,
    ):
        """Args:
        report: file that the stacks are appended to.
        log: receives a line.
        least: seconds without report.
        shown: what the line calls the file, if it is copied elsewhere; "" is its path.
        ends: how the run is ended; None never does it by itself.
        """
        self._report, self._log, self._least, self._shown = report, log, least, shown or str(report)
        self._ends, self._limit = ends, ends.seconds if ends else 0
        self._seconds: deque[float] = deque(maxlen=_KEPT)
        self._turn = threading.Condition()
        self._began, self._due, self._over = 0.0, math.inf, math.inf
        self._closed = False
        self.step = 0

    def __enter__(self) -> "Watch":
        self._thread = threading.Thread(target=self._watch, name="fot-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._turn:
            self._closed = True
            self._turn.notify()
        self._thread.join()

    def begin(self) -> None:
        """Begins a stretch."""
        known = len(self._seconds) >= KNOWN
        self._set(max(self._least, SLOW * statistics.median(self._seconds)) if known else None)

    def end(self) -> None:
        """Ends the stretch, and remembers how long it took."""
        seconds = time.monotonic() - self._began
        self.rest()
        self._seconds.append(seconds)

    def rest(self) -> None:
        """Forgets the stretch: nobody knows how long what comes now takes."""
        self._set(None)

    def give_up(self) -> None:
        """Ends the run, as a thread may do at any time."""
        self._ends.give_up(f"nothing has come for {time.monotonic() - self._began:.3g} s", self.step, _main_thread())

    def _set(self, slow: float | None) -> None:
        """Begins to wait for a report after so many seconds, None is never, and for an end."""
        with self._turn:
            self._began = time.monotonic()
            self._due = math.inf if slow is None else self._began + slow
            last = UNKNOWN * self._limit if slow is None else max(STUCK * slow, self._limit)
            self._over = self._began + last if self._limit else math.inf
            self._turn.notify()

    def _watch(self) -> None:
        with self._turn:
            while not self._closed:
                now = time.monotonic()
                if now >= self._over:
                    self._over = math.inf
                    self.give_up()
                if now >= self._due:
                    self._due = math.inf
                    self._tell()
                left = min(self._due, self._over) - now
                self._turn.wait(None if left == math.inf else left)

    def _tell(self) -> None:
        usual, seconds = statistics.median(self._seconds), time.monotonic() - self._began
        try:
            with open(self._report, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {seconds:.3g} s, usually {usual:.3g} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"the stacks of all threads are in {self._shown}"
        except OSError as error:
            where = f"the stacks of all threads can't be written to {self._report} ({error.strerror})"
        self._log(f"hanging? the steps since the last line have taken {seconds:.3g} s, usually {usual:.3g} s: {where}")


def _main_thread() -> str:
    """Returns where in this package the main thread is, and in what it has called."""
    package = pathlib.Path(__file__).parent
    stack = traceback.walk_stack(sys._current_frames()[threading.main_thread().ident])  # the innermost first
    places = [(pathlib.Path(frame.f_code.co_filename), line) for frame, line in stack]
    own = [f"{path.relative_to(package.parent)}, line {line}" for path, line in places if package in path.parents]
    path, line = places[0]
    if package in path.parents:
        return own[0]
    return f"{own[0] if own else 'other code'} ({path.name}, line {line})"
