"""Where numbers go during a run: `metrics.jsonl`, TensorBoard and a progress bar. For one process of a run."""

import contextlib
import json
import math
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO, final

import tqdm

from fot import files
from fot.errors import UserError

FILE = "metrics.jsonl"
LINE_SECONDS = 10.0  # between two progress lines where there is no terminal
BOARD_SECONDS = 30.0  # that TensorBoard may lag behind
REMEDY = "free disk space or choose another workdir"


class MetricsWriter:
    """Appends metrics to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard`; a context manager.

    A run that resumes at a step drops what it had written after it. What is written of a step in several calls is one
    line to `read_metrics`.

    Attributes:
      resumed: what is kept of the step resumed at, {} if nothing.
    """

    def __init__(self, workdir: str | pathlib.Path, resumed_at: int):
        """Args: workdir: made if missing; resumed_at: steps that stay, 0 for a new run. Raises UserError."""
        self._path, self._resumed_at = pathlib.Path(workdir) / FILE, resumed_at
        files.sweep(self._path)
        self.resumed = _drop_after(self._path, resumed_at)
        self._board: Any = None
        with self._errors():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line, at once; values are numbers or scalar arrays, non-finite ones become null.

        Raises:
          UserError: the workdir can't be written.
        """
        # It imports torch where there is one, for 1 s and 140 MB: here, for what writes no metrics.
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = {name: _plain(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        with self._errors():
            self._file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
            self._file.flush()
            board = self._board = self._board or self._open_board()
            board.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())
            if time.monotonic() - self._flushed >= BOARD_SECONDS:
                self._flush_board()

    def flush(self) -> None:
        """Brings everything to disk; raises what `write` does."""
        with self._errors():
            self._flush_board()

    def close(self) -> None:
        """Flushes and closes both files; raises what `write` does."""
        with self._errors(), contextlib.ExitStack() as both:
            both.callback(self._file.close)
            if self._board is not None:
                both.callback(self._board.close)

    def _open_board(self) -> Any:
        """Opens an event file that hides the steps after `resumed_at` of earlier ones.

        Written here and not by a thread of tensorboardX, which would die of a full disk and leave its queue to block.
        """
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder = self._path.parent / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The second alone would let a quick resume overwrite the old file.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{self._resumed_at}"
        board = RecordWriter(str(folder / name))
        first = self._resumed_at + 1
        for event in (
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)),
        ):
            board.write(event.SerializeToString())
        self._flushed = time.monotonic()
        return board

    def _flush_board(self) -> None:
        if self._board is not None:
            self._board.flush()
            self._flushed = time.monotonic()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"can't write the metrics to {self._path.parent} ({error.strerror}): {REMEDY}") from None


@final
class NoMetrics:
    """Takes what another process of the run writes."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Returns a dict for each step in a `metrics.jsonl`, null as NaN; a last line cut off by a kill is left out.

    Raises:
      UserError: there is no such file, or a line in it is not a JSON object with a step.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: a run writes it to its workdir") from None
    return parsed(path, text)


def parsed(path: str | pathlib.Path, text: str) -> list[dict[str, Any]]:
    """Returns what `read_metrics` does for the text of the file `path`, which the error names."""
    whole = text[: text.rfind("\n") + 1]
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        values = _parse(path, number, line)
        steps.setdefault(values["step"], {}).update(values)
    return list(steps.values())


class Progress:
    """A bar with loss, tokens/s and time left on a terminal; elsewhere a line now and then; a context manager."""

    def __init__(self, steps: int, start: int, stream: TextIO, unit: str = "step"):
        """Args: steps: of the whole run; start: steps done before; stream: usually sys.stderr; unit: a step's name."""
        self._steps, self._start, self._stream, self._unit = steps, start, stream, unit
        self._began = time.monotonic()
        self._printed = -math.inf
        self._bar = None
        if stream.isatty():
            self._bar = tqdm.tqdm(total=steps, initial=start, file=stream, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` steps are done, with the last loss (nats per token) and speed."""
        self.show(step, f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s")

    def show(self, step: int, text: str) -> None:
        """Shows that `step` steps are done, and the text."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step >= self._steps or now - self._printed >= LINE_SECONDS:
            self._printed = now
            seconds = (now - self._began) / max(step - self._start, 1) * (self._steps - step)
            left = tqdm.tqdm.format_interval(seconds)
            line = f"{self._unit} {step}/{self._steps}: {text}, {left} left"
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        if self._bar is not None:
            self._bar.close()


def _plain(value: Any) -> int | float:
    return value.item() if hasattr(value, "item") else value


def _parse(path: str | pathlib.Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        values["step"] = int(values["step"])
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}, line {number}: not a JSON object with a step; delete that line") from None
    return {name: math.nan if value is None else value for name, value in values.items()}


def _drop_after(path: pathlib.Path, step: int) -> dict[str, Any]:
    """Rewrites the file without later steps and without a half line; returns what it has of that step itself."""
    if not path.exists():
        return {}
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    lines = [json.dumps({k: None if v != v else v for k, v in line.items()}) + "\n" for line in kept]
    files.write(path, lambda file: file.write("".join(lines).encode()), REMEDY)
    return kept[-1] if kept and kept[-1]["step"] == step else {}
