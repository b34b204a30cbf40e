"""What `fot.evaluate.perplexity` found: results, their JSON, tables and plot."""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, final

from fot import files, picture
from fot.config import MEMORY_MODES, READER_NAMES
from fot.errors import UserError
from fot.evaluate import text

JSON_FILE, PLOT_FILE = "perplexity.json", "perplexity.png"
_REMEDY = "choose a folder that can be written"
NO_MEMORY = "none"  # mode and reader of the column without memory


@final
@dataclasses.dataclass(frozen=True)
class Bin:
    """Targets whose input token is at `start` to `stop` - 1 in its document.

    Attributes:
      start: first position, in tokens.
      stop: position after the last; None is the end of the document.
      tokens: targets in it.
      nll: their mean negative log-likelihood, in nats.
    """

    start: int
    stop: int | None
    tokens: int
    nll: float


@final
@dataclasses.dataclass(frozen=True)
class Column:
    """What one way of reading gave.

    Attributes:
      mode: "single_doc" or "multi_doc"; "none" without memory.
      reader: entry of `fot.readers.table.READERS`; "none" without memory.
      memory: memory length, in tokens per row.
      tokens: targets, the same in every column.
      nll: mean negative log-likelihood, in nats.
      change: of the perplexity against no memory, in percent.
      seconds: spent on reading, without compilation.
      positions: the bins by position in the document that hold targets, ascending.
    """

    mode: str
    reader: str
    memory: int
    tokens: int
    nll: float
    change: float
    seconds: float
    positions: tuple[Bin, ...]

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return perplexity(self.nll)


@final
@dataclasses.dataclass(frozen=True)
class Results:
    """Columns of one model, the one without memory first.

    Attributes:
      context: local context, in tokens.
      columns: one for each mode, reader and memory length.
    """

    context: int
    columns: tuple[Column, ...]

    @property
    def no_memory(self) -> Column:
        """The column without memory."""
        return self.columns[0]

    def curves(self) -> dict[tuple[str, str], tuple[Column, ...]]:
        """Returns {(mode, reader): its columns by ascending memory, that without memory first}.

        Without any column with memory: {("none", "none"): the one without}.
        """
        keys = dict.fromkeys((column.mode, column.reader) for column in self.columns[1:])
        curves = {
            key: (self.no_memory, *(column for column in self.columns if (column.mode, column.reader) == key))
            for key in keys
        }
        return curves or {(NO_MEMORY, NO_MEMORY): (self.no_memory,)}

    def main_curve(self) -> tuple[str, str]:
        """Returns the key of the curve that stands for all: single_doc and dense before others."""
        order = (NO_MEMORY, *MEMORY_MODES), (NO_MEMORY, *READER_NAMES)
        return min(self.curves(), key=lambda key: (order[0].index(key[0]), order[1].index(key[1])))


def perplexity(nll: float) -> float:
    """Returns exp(nll), infinite where that overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def to_dict(results: Results) -> dict[str, Any]:
    """Returns plain values for JSON, non-finite numbers as None; `from_dict` is the inverse."""
    columns = [
        dataclasses.asdict(column)
        | {"perplexity": column.perplexity}
        | {"positions": [dataclasses.asdict(part) | {"perplexity": perplexity(part.nll)} for part in column.positions]}
        for column in results.columns
    ]
    return _finite({"context": results.context, "columns": columns})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_dict(values: Mapping[str, Any]) -> Results:
    """Returns the results that `to_dict` wrote; what else is in `values` is left out."""

    def build(cls: type, plain: Mapping[str, Any]) -> Any:
        names = {field.name: field.type for field in dataclasses.fields(cls)}
        return cls(**{n: math.nan if kind is float and plain[n] is None else plain[n] for n, kind in names.items()})

    columns = []
    for column in values["columns"]:
        positions = tuple(build(Bin, part) for part in column["positions"])
        columns.append(build(Column, {**column, "positions": positions}))
    return Results(values["context"], tuple(columns))


def load(path: str | pathlib.Path) -> Results:
    """Returns the results in a `perplexity.json`.

    Raises:
      UserError: there is none, or it isn't one.
    """
    try:
        return from_dict(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(
            f"can't read {path} ({error.strerror}): write it with python -m fot.evaluate perplexity"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no results of python -m fot.evaluate perplexity: write it again") from None


def save(results: Results, about: Mapping[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Writes `perplexity.json` at once, with the values of `about` (JSON) before the results; returns its path."""
    files.write_json(folder / JSON_FILE, {**about, **to_dict(results)}, _REMEDY)
    return folder / JSON_FILE


def table(results: Results) -> str:
    """Returns perplexity and its change by memory length, a row for each mode and reader, as aligned text."""
    curves = results.curves()
    lengths = sorted({column.memory for column in results.columns})
    lines = [["mode", "reader", *(f"{length:,}" for length in lengths)]]
    for (mode, reader), columns in curves.items():
        cells = {column.memory: _number(column.perplexity) for column in columns}
        cells |= {c.memory: f"{_number(c.perplexity)} {_percent(c.change)}" for c in columns[1:]}
        lines.append([mode, reader, *(cells.get(length, "") for length in lengths)])
    title = f"Perplexity by memory length in tokens, and its change against no memory ({_targets(results)})"
    return "\n".join([title, *text.aligned(lines, left=2)])


def position_table(results: Results) -> str:
    """Returns perplexity by position in the document and memory length, of the main curve, as aligned text."""
    mode, reader = results.main_curve()
    columns = results.curves()[mode, reader]
    lines = [["position", "targets", *(f"{column.memory:,}" for column in columns)]]
    for place, part in enumerate(results.no_memory.positions):
        found = [perplexity(column.positions[place].nll) for column in columns]
        changes = [""] + [f" {_percent(100 * (each / found[0] - 1))}" for each in found[1:]]
        cells = [_number(each) + change for each, change in zip(found, changes, strict=True)]
        lines.append([_range(part, "{:,}".format), f"{part.tokens:,}", *cells])
    way = "without memory" if mode == NO_MEMORY else f"{mode}, {reader}"
    return "\n".join([f"Perplexity by position in the document, in tokens ({way})", *text.aligned(lines, left=1)])


def _targets(results: Results) -> str:
    return f"{results.no_memory.tokens:,} target tokens, context {results.context:,}"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:,.1f}"


def _percent(value: float) -> str:
    return f"({value:+.1f}%)"


def _range(part: Bin, number: Any) -> str:
    return f"from {number(part.start)}" if part.stop is None else f"{number(part.start)}-{number(part.stop - 1)}"


_MODE_LINES = {"single_doc": "-", "multi_doc": "--"}
_READER_MARKERS = dict(zip(READER_NAMES, itertools.cycle("os^vDP*Xd<>")))  # noqa: B905


def plot(results: Mapping[str, Results], path: str | pathlib.Path) -> None:
    """Writes a PNG of two panels: perplexity by memory length, and by position in the document.

    Args:
      results: {label of a model: its results}.
      path: of the file, replaced at once.

    Raises:
      UserError: it can't be written.
    """
    with picture.drawing(path, 12.5, 5, _REMEDY) as figure:
        by_memory, by_position = figure.subplots(1, 2)
        _plot_memory(by_memory, results)
        _plot_positions(by_position, results)
        for axes in (by_memory, by_position):
            axes.set_ylabel("perplexity")
            picture.tidy(axes)


def _plot_memory(axes: Any, results: Mapping[str, Results]) -> None:
    lengths = sorted({column.memory for each in results.values() for column in each.columns})
    for label, each, color in _colored(results):
        for (mode, reader), columns in each.curves().items():
            if mode == NO_MEMORY:
                axes.axhline(columns[0].perplexity, color=color, linestyle=":", label=f"{label}, no memory")
                continue
            axes.plot(
                [column.memory for column in columns],
                [column.perplexity for column in columns],
                color=color,
                linestyle=_MODE_LINES[mode],
                marker=_READER_MARKERS[reader],
                markersize=5,
                markerfacecolor=color if reader == "dense" else "white",
                label=f"{label}, {mode}, {reader}",
            )
    # 0 has a place on the axis: linear up to the shortest memory, in powers of 2 from there.
    axes.set_xscale("symlog", base=2, linthresh=lengths[1] if len(lengths) > 1 else 1, linscale=0.7)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("memory length, tokens")
    axes.set_title("By memory length", loc="left", fontsize=11)


def _plot_positions(axes: Any, results: Mapping[str, Results]) -> None:
    parts = sorted(
        {(part.start, part.stop or math.inf): part for r in results.values() for part in r.no_memory.positions}.items()
    )
    places = {key: place for place, (key, _) in enumerate(parts)}
    for label, each, color in _colored(results):
        mode, reader = each.main_curve()
        columns = each.curves()[mode, reader]
        styles = [(columns[0], ":", "no memory")]
        if len(columns) > 1:
            styles.append((columns[-1], "-", f"memory {_short(columns[-1].memory)}, {mode}, {reader}"))
        for column, line, name in styles:
            x = [places[part.start, part.stop or math.inf] for part in column.positions]
            y = [perplexity(part.nll) for part in column.positions]
            axes.plot(x, y, color=color, linestyle=line, marker="o", markersize=4, label=f"{label}, {name}")
    axes.set_xticks(range(len(parts)), [_range(part, _short) for _, part in parts])
    axes.set_xlabel("position in the document, tokens")
    axes.set_title("By position in the document", loc="left", fontsize=11)


def _colored(results: Mapping[str, Results]) -> list[tuple[str, Results, str]]:
    return [(label, each, picture.COLORS[i % len(picture.COLORS)]) for i, (label, each) in enumerate(results.items())]


def _short(number: int) -> str:
    """Returns 16384 as 16k, 16383 too: ends of ranges stay short."""
    if number < 1024:
        return str(number)
    rounded = round(number / 1024, 1)
    return f"{rounded:g}k"
