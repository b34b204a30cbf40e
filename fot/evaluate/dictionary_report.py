"""What `fot.evaluate.dictionary` found: points, their JSON, table and plot."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from fot import files, picture
from fot.evaluate import sizes, text

JSON_FILE, PLOT_FILE = "dictionary.json", "dictionary.png"
PLAIN = "plain transformer"
_REMEDY = "choose a folder that can be written"

# What the paper says in words of its 37M model, trained on 512 tokens too (FoT, section 4.1).
PAPER_TOKENS, PAPER_ACCURACY = 16 * 2**20, 0.92  # "more than"
PAPER_PLAIN_TOKENS = 16 * 2**10  # where a plain transformer fails; no accuracy is given


@final
@dataclasses.dataclass(frozen=True)
class Point:
    """Accuracy with one length of memory.

    Attributes:
      memory: definitions, in tokens; for a plain transformer, in its local context.
      questions: records that were asked for.
      tokens: tokens of their values.
      token_accuracy: share of those that were predicted.
      token_error: its standard error, the tokens of a value counting together.
      value_accuracy: share of the values all of whose tokens were predicted.
      value_error: its standard error.
      load_seconds: spent on loading all definitions, compilation included.
      ask_seconds: spent on asking, compilation included.
    """

    memory: int
    questions: int
    tokens: int
    token_accuracy: float
    token_error: float
    value_accuracy: float
    value_error: float
    load_seconds: float
    ask_seconds: float


@final
@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of one model, read in one way, by ascending memory; the label tells both."""

    label: str
    points: tuple[Point, ...]


def point(memory: int, correct: np.ndarray, load_seconds: float, ask_seconds: float) -> Point:
    """Returns the point of answers: correct [questions, value_tokens] bool."""
    count = len(correct)
    tokens, values = correct.mean(1), correct.all(1)
    return Point(
        memory=memory,
        questions=count,
        tokens=correct.size,
        token_accuracy=float(tokens.mean()),
        token_error=float(tokens.std() / math.sqrt(count)),
        value_accuracy=float(values.mean()),
        value_error=float(values.std() / math.sqrt(count)),
        load_seconds=load_seconds,
        ask_seconds=ask_seconds,
    )


def line(label: str, found: Point) -> str:
    """Returns a point in one line."""
    return (
        f"{label}, {sizes.short(found.memory)}: tokens {_percent(found.token_accuracy, found.token_error)}, values "
        f"{_percent(found.value_accuracy, found.value_error)} of {found.questions:,} questions; loaded in "
        f"{found.load_seconds:.1f} s, asked in {found.ask_seconds:.1f} s"
    )


def save(curves: Sequence[Curve], about: Mapping[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Writes `dictionary.json` at once, with the values of `about` (JSON) before the curves; returns its path."""
    files.write_json(folder / JSON_FILE, {**about, "curves": [dataclasses.asdict(curve) for curve in curves]}, _REMEDY)
    return folder / JSON_FILE


def table(curves: Sequence[Curve]) -> str:
    """Returns accuracies by memory length, two rows for each curve, as aligned text."""
    lengths = sorted({found.memory for curve in curves for found in curve.points})
    lines = [["", "accuracy of", *map(sizes.short, lengths)]]
    for curve in curves:
        for what in ("token", "value"):
            cells = {p.memory: (getattr(p, f"{what}_accuracy"), getattr(p, f"{what}_error")) for p in curve.points}
            shown = [_percent(*cells[length]) if length in cells else "" for length in lengths]
            lines.append([curve.label if what == "token" else "", f"{what}s", *shown])
    asked = sorted({found.questions for curve in curves for found in curve.points})
    title = f"Accuracy by memory length in tokens, ± standard error ({asked[0]:,} questions at each)"
    return "\n".join([title, *text.aligned(lines, left=2), _paper()])


def _paper() -> str:
    return (
        f"The paper's 37M model: more than {PAPER_ACCURACY:.0%} at {sizes.short(PAPER_TOKENS)}; a plain transformer "
        f"fails at {sizes.short(PAPER_PLAIN_TOKENS)}."
    )


def _percent(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}%"


_COLORS = ("#2563eb", "#059669", "#c026d3", "#d97706", "#0891b2", "#4d7c0f")
_PLAIN_COLOR, _PAPER_COLOR = "#dc2626", "#475569"


def plot(curves: Sequence[Curve], path: pathlib.Path) -> None:
    """Writes a PNG of token accuracy by memory length, with what the paper says beside it.

    Raises:
      UserError: it can't be written.
    """
    with picture.drawing(path, 8, 5, _REMEDY) as figure:
        _draw(figure.subplots(), curves)


def _draw(axes: Any, curves: Sequence[Curve]) -> None:
    for number, curve in enumerate(curves):
        plain = curve.label == PLAIN
        axes.errorbar(
            [found.memory for found in curve.points],
            [100 * found.token_accuracy for found in curve.points],
            [100 * found.token_error for found in curve.points],
            color=_PLAIN_COLOR if plain else _COLORS[number % len(_COLORS)],
            linestyle="--" if plain else "-",
            marker="s" if plain else "o",
            markersize=5,
            capsize=3,
            label=curve.label,
        )
    lower = f"paper, 37M: more than {PAPER_ACCURACY:.0%} at {sizes.short(PAPER_TOKENS)}"
    axes.plot(PAPER_TOKENS, 100 * PAPER_ACCURACY, "*", markersize=13, color=_PAPER_COLOR, label=lower)
    axes.annotate("", (PAPER_TOKENS, 99), (PAPER_TOKENS, 93), arrowprops={"arrowstyle": "->", "color": _PAPER_COLOR})
    failing = f"paper: a plain transformer fails at {sizes.short(PAPER_PLAIN_TOKENS)}"
    axes.axvline(PAPER_PLAIN_TOKENS, linestyle=":", color=_PAPER_COLOR, label=failing)
    lengths = sorted({found.memory for curve in curves for found in curve.points} | {PAPER_PLAIN_TOKENS, PAPER_TOKENS})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [sizes.short(length) for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 103)
    axes.set_xlabel("definitions in memory (plain: in the local context), tokens")
    axes.set_ylabel("tokens of values predicted, %")
    axes.set_title("Dictionary lookup by memory length", loc="left", fontsize=11)
    picture.tidy(axes, "center right")
