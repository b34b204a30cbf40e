"""What `fot.evaluate.distraction` found: results, their JSON, tables and plot."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, final

import numpy as np

from fot import files, picture
from fot.config import CrossbatchConfig, ExperimentConfig
from fot.errors import UserError
from fot.evaluate import text

JSON_FILE, PLOT_FILE = "distraction.json", "distraction.png"
_REMEDY = "choose a folder that can be written"


@final
@dataclasses.dataclass(frozen=True)
class Masses:
    """Positive attention mass r_d of one model.

    Attributes:
      context: length of a context, in tokens.
      documents: that the contexts were cut from.
      queries: tokens averaged over.
      contexts: numbers d of contexts in view, ascending.
      layers: memory layers.
      masses: [contexts][layers][heads], means over the queries, from 0 to 1.
    """

    context: int
    documents: int
    queries: int
    contexts: tuple[int, ...]
    layers: tuple[int, ...]
    masses: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def means(self) -> tuple[float, ...]:
        """Means over layers and heads, one for each number of contexts."""
        return tuple(np.mean(self.masses, axis=(1, 2)).tolist())


def labels(configs: Mapping[str, ExperimentConfig]) -> dict[str, str]:
    """Returns a label for each workdir: the folder's name, or all of it where names are shared, and the training."""
    names = [pathlib.Path(workdir).name for workdir in configs]
    return {
        workdir: f"{workdir if names.count(name) > 1 or not name else name} ({training(config.crossbatch)})"
        for name, (workdir, config) in zip(names, configs.items(), strict=True)
    }


def training(config: CrossbatchConfig) -> str:
    """Returns what training showed the memory layers, in a few words."""
    if config.variant == "none":
        return "plain"
    if config.variant == "previous":
        return "d = " + ", ".join(map(str, dict.fromkeys(config.d)))
    return config.variant


def summary(masses: Masses) -> str:
    """Returns what was measured on, in a few words."""
    windows = f"{masses.queries:,} queries in windows of {masses.context:,} tokens"
    return f"{windows}, contexts of {masses.documents:,} documents"


def save(
    results: Mapping[str, Masses], about: Mapping[str, Mapping[str, Any]], split: str, folder: pathlib.Path
) -> pathlib.Path:
    """Writes `distraction.json` at once, with what `about` (JSON) says of each model; returns its path."""
    models = [
        {"label": label, **about[label], **dataclasses.asdict(each), "means": each.means}
        for label, each in results.items()
    ]
    files.write_json(folder / JSON_FILE, {"split": split, "models": models}, _REMEDY)
    return folder / JSON_FILE


def load(path: str | pathlib.Path) -> dict[str, Masses]:
    """Returns the results in a `distraction.json`, by label.

    Raises:
      UserError: there is none, or it isn't one.
    """
    try:
        models = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["models"]
        return {each["label"]: _masses(each) for each in models}
    except OSError as error:
        raise UserError(
            f"can't read {path} ({error.strerror}): write it with python -m fot.evaluate distraction"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no results of python -m fot.evaluate distraction: write it again") from None


def _masses(values: Mapping[str, Any]) -> Masses:
    fields = {field.name: _tuples(values[field.name]) for field in dataclasses.fields(Masses)}
    return Masses(**fields)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def table(results: Mapping[str, Masses]) -> str:
    """Returns the mean of r_d over layers and heads, a row for each model, and 1/d, as aligned text."""
    counts = _counts(results)
    lines = [["model", *map(str, counts)]]
    for label, each in results.items():
        found = dict(zip(each.contexts, each.means, strict=True))
        lines.append([label, *(_number(found[count]) if count in found else "" for count in counts)])
    lines.append(["1/d", *(_number(1 / count) for count in counts)])
    title = "Positive attention mass r_d by contexts in view, d; mean over queries, layers and heads"
    return "\n".join([title, *text.aligned(lines, left=1)])


def head_table(results: Mapping[str, Masses]) -> str:
    """Returns r_d of each memory layer and head, as aligned text."""
    counts = _counts(results)
    lines = [["model", "layer", "head", *map(str, counts)]]
    for label, each in results.items():
        for place, layer in enumerate(each.layers):
            for head in range(len(each.masses[0][place])):
                found = {d: mass[place][head] for d, mass in zip(each.contexts, each.masses, strict=True)}
                cells = (_number(found[count]) if count in found else "" for count in counts)
                lines.append([label, str(layer), str(head), *cells])
    return "\n".join(["By memory layer and head", *text.aligned(lines, left=1)])


def _counts(results: Mapping[str, Masses]) -> list[int]:
    return sorted({count for each in results.values() for count in each.contexts})


def _number(value: float) -> str:
    return f"{value:.3f}"


def plot(results: Mapping[str, Masses], path: str | pathlib.Path) -> None:
    """Writes a PNG of r_d by d: a line for each model, a faint one for each of its heads, and 1/d.

    Args:
      results: {label of a model: its results}.
      path: of the file, replaced at once.

    Raises:
      UserError: it can't be written.
    """
    with picture.drawing(path, 7.5, 5, _REMEDY) as figure:
        draw(figure.subplots(), results)


def draw(axes: Any, results: Mapping[str, Masses]) -> None:
    """Draws the picture of `plot` on matplotlib axes."""
    counts = _counts(results)
    for place, (label, each) in enumerate(results.items()):
        color = picture.COLORS[place % len(picture.COLORS)]
        heads = np.reshape(each.masses, (len(each.contexts), -1))
        axes.plot(each.contexts, heads, color=color, linewidth=0.8, alpha=0.25)
        axes.plot(each.contexts, each.means, color=color, marker="o", markersize=4, label=label)
    axes.plot(counts, [1 / count for count in counts], color="black", linestyle="--", linewidth=1, label="1/d")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel("contexts in view, d")
    axes.set_ylabel("positive attention mass, $r_d$")
    axes.set_title("Mean over heads (strong) and each head (faint)", loc="left", fontsize=11)
    picture.tidy(axes)
