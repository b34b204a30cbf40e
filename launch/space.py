"""What a sweep tries, as plain data: a sweep file's get_sweep() returns a Sweep, built of the classes below.

def get_sweep() -> space.Sweep:
    return space.Sweep(
        base="configs/dictionary_tiny.py",
        space=space.Grid({"optimizer.learning_rate": (1e-2, 3e-3), "train.seed": (0, 1)}),
    )
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every combination of the values of these config fields (dotted names)."""

    fields: Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Zip:
    """The first values of these config fields together, then the second ones, and so on."""

    fields: Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Product:
    """Every combination of the points of these grids and zips."""

    parts: Sequence[Grid | Zip]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Real:
    """A number from low to high."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class LogReal:
    """A number from low, above 0, to high, whose logarithm is spread evenly."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Integer:
    """One of low, low + step, …, up to high."""

    low: int
    high: int
    step: int = 1


Range = Choice | Real | LogReal | Integer


@dataclasses.dataclass(frozen=True)
class Random:
    """So many different points, drawn independently; the seed tells which."""

    fields: Mapping[str, Range]
    trials: int
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """So many points, each chosen by what is known of those before it (Optuna's TPE).

    Attributes:
      fields: where to search.
      trials: in all.
      random_trials: how many are drawn at random before the search begins.
      seed: of the draws.
    """

    fields: Mapping[str, Range]
    trials: int
    random_trials: int = 10
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Median:
    """Ends a trial whose metric is worse than the median of the earlier ones' at the same step.

    Attributes:
      trials: that are complete before any is ended.
      steps: of training before a trial may be ended.
    """

    trials: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Halving:
    """Lets the best 1/factor of trials go on past `steps` steps, of these the best 1/factor past factor × steps, …"""

    steps: int
    factor: int


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
      base: config file that every trial begins with, relative to the root of the source.
      space: what differs between trials.
      fixed: other config fields that differ from the base, the same in all trials.
      metric: of metrics.jsonl that trials are compared by, its last value.
      goal: minimize or maximize.
      pruner: when to end a trial early; None is never.
    """

    base: str
    space: Grid | Zip | Product | Random | Adaptive
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metric: str = "held_out/loss"
    goal: str = "minimize"
    pruner: Median | Halving | None = None
