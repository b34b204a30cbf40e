"""The points of a space, their ids, and every check of a sweep, before anything is created."""

import hashlib
import itertools
import json
import math
import os
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fot import cli
from fot import config as config_lib
from fot.config.checks import nearest, require
from fot.errors import ConfigError
from launch.space import Adaptive, Choice, Grid, Halving, Integer, LogReal, Median, Product, Random, Range, Sweep, Zip

GOALS = ("minimize", "maximize")
CORNERS = 4096  # of an adaptive space that are checked
DRAWS = 1000  # for each point of a random space, until it is one that is new
DIGITS = 10  # hexadecimal, of an id
READABLE = 60  # characters of an id besides

Point = dict[str, Any]  # dotted name -> value
Texts = dict[str, str]  # dotted name -> value as on the command line


def load(path: str) -> Sweep:
    """Returns what get_sweep() of a sweep file gives, not checked yet.

    Raises:
      ConfigError: one line, if the file is missing, can't be run, or gives no Sweep.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"sweep file {path!r} does not exist: those that come along are in configs/sweeps")
    found = cli.run_file("sweep", path, "get_sweep")
    if not isinstance(found, Sweep):
        raise ConfigError(
            f"sweep file {path!r}: get_sweep() must return launch.space.Sweep, not {type(found).__name__}"
        )
    return found


def text(value: Any) -> str:
    """Returns a value of a config field as it is written on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list) and value and all(isinstance(each, str) for each in value):
        return ",".join(value) + ("," if value[-1] == "" else "")
    return value if isinstance(value, str) else repr(tuple(value) if isinstance(value, list) else value)


def texts(point: Mapping[str, Any]) -> Texts:
    """Returns the texts of a point's values."""
    return {name: text(value) for name, value in point.items()}


def points(space: Any) -> list[Point]:
    """Returns the points of a space that are known beforehand, in order; of an adaptive one none is."""
    return list(_POINTS[type(space)](space))


def _grid(space: Grid) -> Iterator[Point]:
    for values in itertools.product(*space.fields.values()):
        yield dict(zip(space.fields, values, strict=True))


def _zip(space: Zip) -> Iterator[Point]:
    for values in zip(*space.fields.values(), strict=True):
        yield dict(zip(space.fields, values, strict=True))


def _product(space: Product) -> Iterator[Point]:
    for parts in itertools.product(*map(points, space.parts)):
        yield {name: value for part in parts for name, value in part.items()}


def _random(space: Random) -> Iterator[Point]:
    draw, seen = random.Random(space.seed), set()
    for _ in range(space.trials * DRAWS):
        point = {name: _drawn(range_, draw) for name, range_ in space.fields.items()}
        key = json.dumps(texts(point))
        if key not in seen:
            seen.add(key)
            yield point
        if len(seen) == space.trials:
            return
    raise ConfigError(f"Random: trials={space.trials} are more than the space has different points")


def _drawn(range_: Range, draw: random.Random) -> Any:
    if isinstance(range_, Choice):
        return draw.choice(range_.values)
    if isinstance(range_, Integer):
        return draw.randrange(range_.low, range_.high + 1, range_.step)
    if isinstance(range_, LogReal):
        value = math.exp(draw.uniform(math.log(range_.low), math.log(range_.high)))
        return min(max(value, range_.low), range_.high)
    return draw.uniform(range_.low, range_.high)


_POINTS = {Grid: _grid, Zip: _zip, Product: _product, Random: _random, Adaptive: lambda space: ()}


def trial_id(base: str, fixed: Texts, point: Texts) -> str:
    """Returns the id of a trial: the same for the same base file and overrides, in whatever order they are given."""
    known = json.dumps([base, sorted({**fixed, **point}.items())])
    parts = [f"{name.rpartition('.')[2]}-{value}" for name, value in sorted(point.items())]
    readable = re.sub(r"[^A-Za-z0-9.]+", "_", "-".join(parts).replace("-", "_"))[:READABLE].strip("_.")
    return f"{hashlib.sha256(known.encode()).hexdigest()[:DIGITS]}-{readable}"


def words(overrides: Texts) -> list[str]:
    """Returns overrides as words of a command line."""
    return [f"--config.{name}={value}" for name, value in overrides.items()]


def fields(space: Any) -> list[str]:
    """Returns the names of the config fields of a space, a name as often as it is there."""
    parts = space.parts if isinstance(space, Product) else (space,)
    return [name for part in parts for name in part.fields]


def check(sweep: Sweep, fixed: Texts) -> None:
    """Checks every trial of a sweep, of an adaptive one those at the ends of its ranges.

    Args:
      sweep: the sweep.
      fixed: texts of the overrides that all trials share, the sweep's own among them.

    Raises:
      ConfigError: one line naming the field and the remedy.
    """
    known = {name for name, _ in config_lib.fields(config_lib.to_dict(config_lib.ExperimentConfig()))}
    _check_shape(sweep.space)
    names = fields(sweep.space)
    for name in [*names, *fixed]:
        if any(each.startswith(f"{name}.") for each in known):
            raise ConfigError(f"{name} is a group of config fields: name one of them")
        if name not in known:
            raise ConfigError(config_lib.unknown_field(name))
    for name in names:
        require(names.count(name) == 1, f"{name} is twice in the space: leave one out")
        require(name not in fixed, f"{name} is in the space and is set for all trials too: leave one out")
    require(sweep.goal in GOALS, f"goal={sweep.goal!r} is not one of {', '.join(GOALS)}{nearest(sweep.goal, GOALS)}")
    _check_pruner(sweep.pruner)
    values, seen = cli.load_file(sweep.base), set()
    for point in examples(sweep.space):
        own = texts(point)
        try:
            config = config_lib.from_dict(cli.override(values, {**fixed, **own}))
        except ConfigError as error:
            raise ConfigError(f"trial {' '.join(words(own))}: {error}") from None
        if sweep.metric.startswith("held_out/"):
            every = config.train.evaluate_every
            require(0 < every, f"train.evaluate_every={every} gives no {sweep.metric}: set it above 0")
        key = trial_id(sweep.base, fixed, own)
        unique = isinstance(sweep.space, Adaptive) or key not in seen
        require(unique, f"trial {' '.join(words(own))} is twice in the sweep: leave one out")
        seen.add(key)


def examples(space: Any) -> list[Point]:
    """Returns the points of a space, of an adaptive one those at the ends of its ranges."""
    if not isinstance(space, Adaptive):
        return points(space)
    ends = {name: _ends(range_) for name, range_ in space.fields.items()}
    return list(itertools.islice(_grid(Grid(ends)), CORNERS))


def _ends(range_: Range) -> tuple[Any, ...]:
    if isinstance(range_, Choice):
        return tuple(range_.values)
    if isinstance(range_, Integer):
        return range_.low, range_.low + (range_.high - range_.low) // range_.step * range_.step
    return float(range_.low), float(range_.high)


def _check_shape(space: Any) -> None:
    """Checks what concerns no config."""
    require(type(space) in _POINTS, f"space={space!r} must be Grid, Zip, Product, Random or Adaptive of launch.space")
    if isinstance(space, Product):
        require(len(space.parts) > 0, "Product: parts is empty")
        for part in space.parts:
            require(isinstance(part, Grid | Zip), f"Product: {part!r} must be a Grid or a Zip")
            _check_shape(part)
        return
    kind = type(space).__name__
    require(len(space.fields) > 0, f"{kind}: no fields")
    for name, values in space.fields.items():
        if isinstance(space, Random | Adaptive):
            _check_range(name, values)
        else:
            _check_values(name, values)
    if isinstance(space, Zip):
        lengths = {name: len(values) for name, values in space.fields.items()}
        require(len(set(lengths.values())) == 1, f"Zip: fields have different numbers of values, {lengths}")
    if isinstance(space, Random | Adaptive):
        _check_count(kind, "trials", space.trials, 1)
        sizes = [_size(range_) for range_ in space.fields.values()]
        most = math.prod(sizes)
        require(space.trials <= most, f"{kind}: trials={space.trials} are more than the space's {most} points")
    if isinstance(space, Adaptive):
        _check_count(kind, "random_trials", space.random_trials, 0)


def _check_values(name: str, values: Any) -> None:
    ok = isinstance(values, list | tuple) and len(values) > 0
    require(ok, f"{name}={values!r} must be a tuple of the values to try, such as (1, 2)")


def _check_range(name: str, range_: Any) -> None:
    require(isinstance(range_, Range), f"{name}={range_!r} must be Choice, Real, LogReal or Integer of launch.space")
    if isinstance(range_, Choice):
        _check_values(name, range_.values)
        return
    kind = int if isinstance(range_, Integer) else int | float
    numbers = (range_.low, range_.high, *((range_.step,) if isinstance(range_, Integer) else ()))
    ok = all(isinstance(number, kind) and math.isfinite(number) for number in numbers)
    require(ok, f"{name}={range_!r} must have finite numbers, those of Integer whole")
    require(range_.low < range_.high, f"{name}={range_!r}: low must be below high")
    require(not isinstance(range_, LogReal) or range_.low > 0, f"{name}={range_!r}: low must be above 0")
    require(not isinstance(range_, Integer) or range_.step > 0, f"{name}={range_!r}: step must be 1 or more")


def _check_count(kind: str, name: str, count: Any, least: int) -> None:
    require(
        isinstance(count, int) and count >= least, f"{kind}: {name}={count!r} must be a whole number, {least} or more"
    )


def _size(range_: Range) -> float:
    if isinstance(range_, Choice):
        return len(range_.values)
    return (range_.high - range_.low) // range_.step + 1 if isinstance(range_, Integer) else math.inf


def _check_pruner(pruner: Any) -> None:
    require(isinstance(pruner, Median | Halving | None), f"pruner={pruner!r} must be Median, Halving or None")
    if isinstance(pruner, Median):
        require(
            pruner.trials > 0 and pruner.steps >= 0, f"pruner={pruner!r}: trials must be 1 or more, steps 0 or more"
        )
    if isinstance(pruner, Halving):
        require(pruner.steps > 0 and pruner.factor > 1, f"pruner={pruner!r}: steps must be 1 or more, factor 2 or more")
