"""What a sweep has found: a table, two pictures, and the best trial's config file."""

import math
import pathlib
import pprint
from collections.abc import Sequence
from typing import Any, final

from fot import cli, files, picture
from launch.trials import Trial

REMEDY = "free disk space"
NEAR = 0.04  # of an axis, between two labels
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#94a3b8"


def write(folder: pathlib.Path, found: Sequence[Trial], kept: dict[str, Any]) -> str:
    """Writes the report into a folder and returns its table and what it has written, as text.

    Args:
      folder: made if missing; gets table.txt, and with a complete trial parameters.png, coordinates.png and best.py.
      found: the trials.
      kept: the sweep.json of the sweep.

    Raises:
      UserError: the folder can't be written.
    """
    ordered = ranked(found, kept["goal"])
    shown = table(ordered, kept["metric"])
    _write(folder / "table.txt", shown.encode())
    complete = [trial for trial in ordered if trial.state == "COMPLETE"]
    if not complete:
        return f"{shown}no trial is complete yet\n"
    parameters(ordered, kept["metric"], folder / "parameters.png")
    coordinates(complete, kept["metric"], folder / "coordinates.png")
    _write(folder / "best.py", best(complete[0], kept).encode())
    return f"{shown}best config: {folder}/best.py; pictures: {folder}/parameters.png, {folder}/coordinates.png\n"


def ranked(found: Sequence[Trial], goal: str) -> list[Trial]:
    """Returns the trials, complete ones first, the best of them at the top; then pruned ones, then the others."""
    sign = 1 if goal == "minimize" else -1
    states = ("COMPLETE", "PRUNED", "RUNNING", "WAITING", "FAIL")

    def key(trial: Trial) -> tuple[int, float, int]:
        finite = trial.value is not None and math.isfinite(trial.value)
        return states.index(trial.state), sign * trial.value if finite else math.inf, trial.number

    return sorted(found, key=key)


def table(ordered: Sequence[Trial], metric: str) -> str:
    """Returns the trials as a table with their metric, its last step, and their fields."""
    names = _names(ordered)
    rows = [["trial", "state", metric, "step", *names]]
    for trial in ordered:
        value = trial.value if trial.value is not None else next(reversed(trial.curve.values()), None)
        step = str(max(trial.curve)) if trial.curve else "-"
        number = "-" if value is None else f"{value:.5g}"
        rows.append([trial.id, trial.state.lower(), number, step, *(trial.overrides.get(name, "-") for name in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{trial.id}: {trial.why}" for trial in ordered if trial.why]
    return "\n".join([*lines, *notes]) + "\n"


def best(trial: Trial, kept: dict[str, Any]) -> str:
    """Returns a config file of the trial, which stands alone; raises ConfigError if the sweep's base can't be read."""
    changes = {**kept["fixed"], **trial.overrides}
    values = cli.override(cli.load_file(kept["base"]), changes)
    shown = pprint.pformat(values, width=118, sort_dicts=False)
    lines = "\n".join(f"{name} = {value}" for name, value in changes.items())
    return BEST.format(
        trial=trial.id, metric=kept["metric"], value=trial.value, base=kept["base"], changes=lines, values=shown
    )


BEST = '''\
"""The best trial of a sweep, {trial}: {metric} {value:.5g}.

{base} with
{changes}
"""

import ml_collections

VALUES = {values}


def get_config() -> ml_collections.ConfigDict:
    """Returns these values."""
    return ml_collections.ConfigDict(VALUES)
'''


def parameters(ordered: Sequence[Trial], metric: str, path: pathlib.Path) -> None:
    """Writes a PNG: the metric by each field."""
    names = _names(ordered)
    shown = [trial for trial in ordered if trial.state in ("COMPLETE", "PRUNED") and math.isfinite(trial.value)]
    with picture.drawing(path, max(4.0 * len(names), 5.0), 3.6, REMEDY) as figure:
        for column, name in enumerate(names):
            axes = figure.add_subplot(1, len(names), column + 1)
            scale = _Scale(name, shown)
            for state, colour in (("COMPLETE", BLUE), ("PRUNED", GREY)):
                of = [trial for trial in shown if trial.state == state]
                axes.scatter([scale.place(trial) for trial in of], [trial.value for trial in of], color=colour, s=22)
            axes.set_xticks(scale.ticks, scale.labels)
            axes.set_xlabel(name)
            axes.set_ylabel(metric if column == 0 else "")
            picture.tidy(axes, legend="")


def coordinates(complete: Sequence[Trial], metric: str, path: pathlib.Path) -> None:
    """Writes a PNG: a line a trial through its fields to its metric; the best, which comes first, stands out."""
    names = _names(complete)
    with picture.drawing(path, max(2.2 * (len(names) + 1), 5.0), 4.0, REMEDY) as figure:
        _draw_coordinates(figure.add_subplot(), names, complete, metric)


def _draw_coordinates(axes: Any, names: Sequence[str], complete: Sequence[Trial], metric: str) -> None:
    scales = [_Scale(name, complete) for name in names]
    values = [trial.value for trial in complete]
    low, high = min(values), max(values)
    for number, trial in reversed(list(enumerate(complete))):
        heights = [scale.height(trial) for scale in scales] + [(trial.value - low) / ((high - low) or 1.0)]
        look = {"color": ORANGE, "linewidth": 2.4} if number == 0 else {"color": BLUE, "alpha": 0.35}
        axes.plot(range(len(heights)), heights, **look)
    for place, scale in enumerate(scales):
        for tick, label in zip(scale.ticks, scale.labels, strict=True):
            axes.text(place, scale.share(tick), f" {label}", fontsize=8, va="center")
    for height, value in ((0.0, low), (1.0, high)):
        axes.text(len(names), height, f" {value:.4g}", fontsize=8, va="center")
    axes.set_xticks(range(len(names) + 1), [*names, metric])
    axes.set_yticks([])
    axes.grid(axis="x", color=GREY)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)


@final
class _Scale:
    """Where the values of a field are on an axis: numbers by size, the others in order."""

    def __init__(self, name: str, shown: Sequence[Trial]):
        self._name = name
        texts = list(dict.fromkeys(trial.overrides[name] for trial in shown))
        numbers = {text: _number(text) for text in texts}
        if all(number is not None for number in numbers.values()):
            positive = [number for number in numbers.values() if number > 0]
            # Learning rates and batches are spread over powers.
            wide = len(positive) == len(numbers) and max(positive) >= 10 * min(positive)
            self._places = {text: math.log10(number) if wide else number for text, number in numbers.items()}
        else:
            self._places = {text: float(place) for place, text in enumerate(sorted(texts))}
        chosen = sorted(texts, key=self._places.__getitem__)
        if len(chosen) > 6:
            chosen = [chosen[0], chosen[len(chosen) // 2], chosen[-1]]
        chosen = self._apart(chosen)
        self.ticks = [self._places[text] for text in chosen]
        self.labels = [text if numbers[text] is None else f"{numbers[text]:.4g}" for text in chosen]

    def _apart(self, ordered: Sequence[str]) -> list[str]:
        """Returns the texts without those whose labels would lie on the one below."""
        kept: list[str] = []
        for text in ordered:
            if not kept or self.share(self._places[text]) - self.share(self._places[kept[-1]]) > NEAR:
                kept.append(text)
        return kept

    def place(self, trial: Trial) -> float:
        """Returns where a trial is."""
        return self._places[trial.overrides[self._name]]

    def height(self, trial: Trial) -> float:
        """Returns where a trial is, from 0 to 1."""
        return self.share(self.place(trial))

    def share(self, place: float) -> float:
        """Returns where a place is, from 0 to 1."""
        low, high = min(self._places.values()), max(self._places.values())
        return (place - low) / (high - low) if high > low else 0.5


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _names(found: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(name for trial in found for name in trial.overrides))


def _write(path: pathlib.Path, data: bytes) -> None:
    files.write(path, lambda file: file.write(data), REMEDY)
