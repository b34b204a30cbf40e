"""What `fot.evaluate.passkey` found: cells, their JSON, table and heat map."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from fot import files, picture
from fot.evaluate import sizes, text

JSON_FILE, PLOT_FILE = "passkey.json", "passkey.png"
KEPT_WRONG = 4  # wrong answers of a cell that are written down
_REMEDY = "choose a folder that can be written"


@final
@dataclasses.dataclass(frozen=True)
class Wrong:
    """A wrong answer: the pass key, and what was said instead."""

    key: str
    answer: str


@final
@dataclasses.dataclass(frozen=True)
class Cell:
    """Prompts of one length with the key at one depth.

    Attributes:
      length: tokens that were asked for.
      tokens: tokens of the shortest prompt; whole sentences of filler leave it below `length`.
      depth: share of the filler before the key.
      trials: prompts.
      correct: how many were answered with the key.
      accuracy: their share.
      error: its standard error.
      wrong: the first wrong answers.
    """

    length: int
    tokens: int
    depth: float
    trials: int
    correct: int
    accuracy: float
    error: float
    wrong: tuple[Wrong, ...]


def cell(length: int, tokens: int, depth: float, trials: int, wrong: Sequence[Wrong]) -> Cell:
    """Returns the cell of so many trials, with these wrong answers."""
    correct = trials - len(wrong)
    accuracy, error = _share(correct, trials)
    return Cell(length, tokens, depth, trials, correct, accuracy, error, tuple(wrong[:KEPT_WRONG]))


def line(found: Cell) -> str:
    """Returns a cell in one line."""
    return (
        f"{sizes.short(found.length)}, depth {found.depth:g}: {_percent(found.correct, found.trials)} "
        f"({found.correct} of {found.trials})"
    )


def save(cells: Sequence[Cell], about: Mapping[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Writes `passkey.json` at once, with the values of `about` (JSON) before the cells; returns its path."""
    files.write_json(folder / JSON_FILE, {**about, "cells": [dataclasses.asdict(each) for each in cells]}, _REMEDY)
    return folder / JSON_FILE


def table(cells: Sequence[Cell]) -> str:
    """Returns accuracies by depth and length, and of all depths together, as aligned text."""
    lengths, depths = _axes(cells)
    held = {(each.length, each.depth): each for each in cells}
    lines = [["depth", *map(sizes.short, lengths)]]
    for depth in depths:
        lines.append([f"{depth:g}", *(_percent(held[n, depth].correct, held[n, depth].trials) for n in lengths)])
    sums = [[held[n, depth] for depth in depths] for n in lengths]
    lines.append(["all", *(_percent(sum(c.correct for c in s), sum(c.trials for c in s)) for s in sums)])
    trials = sorted({each.trials for each in cells})
    title = f"Pass keys found by length of the prompt in tokens, ± standard error ({trials[0]:,} trials each)"
    return "\n".join([title, *text.aligned(lines, left=1)])


def _axes(cells: Sequence[Cell]) -> tuple[list[int], list[float]]:
    return sorted({each.length for each in cells}), sorted({each.depth for each in cells})


def _share(correct: int, trials: int) -> tuple[float, float]:
    """Returns the share and its standard error."""
    share = correct / trials
    return share, math.sqrt(share * (1 - share) / trials)


def _percent(correct: int, trials: int) -> str:
    share, error = _share(correct, trials)
    return f"{100 * share:.1f} ± {100 * error:.1f}%"


def plot(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Writes a PNG: a heat map of accuracy over length and depth.

    Raises:
      UserError: it can't be written.
    """
    lengths, depths = _axes(cells)
    with picture.drawing(path, 2.5 + 0.9 * max(len(lengths), 3), 2 + 0.5 * max(len(depths), 3), _REMEDY) as figure:
        _draw(figure, cells)


def _draw(figure: Any, cells: Sequence[Cell]) -> None:
    lengths, depths = _axes(cells)
    percent = np.zeros((len(depths), len(lengths)))
    for each in cells:
        percent[depths.index(each.depth), lengths.index(each.length)] = 100 * each.accuracy
    axes = figure.subplots()
    image = axes.imshow(percent, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(percent):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(lengths)), [sizes.short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("prompt, tokens")
    axes.set_ylabel("depth of the pass key")
    axes.set_title("Pass keys found, %", loc="left", fontsize=11)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes)
