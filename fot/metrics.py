"""Where numbers go during a run: `metrics.jsonl`, TensorBoard and a progress bar. For one process of a run."""

import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any, TextIO

import tensorboardX
import tqdm

from fot import files
from fot.errors import UserError

FILE = "metrics.jsonl"
LINE_SECONDS = 10.0  # between two progress lines where there is no terminal


class MetricsWriter:
    """Appends metrics to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard`; a context manager.

    A run that resumes at a step drops what it had written after it, so that each step is there once.
    """

    def __init__(self, workdir: str | pathlib.Path, resumed_at: int):
        """Args: workdir: made if missing; resumed_at: steps that stay, 0 for a new run."""
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        _drop_after(workdir / FILE, resumed_at)
        self._file = open(workdir / FILE, "a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"),
            purge_step=resumed_at + 1,
            filename_suffix=f".{resumed_at}",  # names are by the second: a quick resume would overwrite the old file
        )

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line, at once; values are numbers or scalar arrays, non-finite ones become null."""
        values = {name: _plain(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step} | finite, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._file.close()
        self._board.close()


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a `metrics.jsonl`, null as NaN; a last line cut off by a kill is left out.

    Raises:
      UserError: there is no such file, or a line in it is not a JSON object with a step.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: a run writes it to its workdir") from None
    whole = text[: text.rfind("\n") + 1]
    return [_parse(path, number, line) for number, line in enumerate(whole.splitlines(), start=1)]


class Progress:
    """A bar with loss, tokens/s and time left on a terminal; elsewhere a line now and then; a context manager."""

    def __init__(self, steps: int, start: int, stream: TextIO):
        """Args: steps: of the whole run; start: steps done before; stream: usually sys.stderr."""
        self._steps, self._start, self._stream = steps, start, stream
        self._began = time.monotonic()
        self._printed = -math.inf
        self._bar = None
        if stream.isatty():
            self._bar = tqdm.tqdm(total=steps, initial=start, file=stream, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` steps are done, with the last loss (nats per token) and speed."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step >= self._steps or now - self._printed >= LINE_SECONDS:
            self._printed = now
            seconds = (now - self._began) / max(step - self._start, 1) * (self._steps - step)
            left = tqdm.tqdm.format_interval(seconds)
            line = f"step {step}/{self._steps}: loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, {left} left"
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


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Rewrites the file without later steps and without a half line."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    lines = [json.dumps({k: None if v != v else v for k, v in line.items()}) + "\n" for line in kept]
    files.write(path, lambda file: file.write("".join(lines).encode()), "choose another workdir")
