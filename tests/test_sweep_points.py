"""Spaces, ids, and the checks of a sweep."""

import dataclasses
import pathlib

import pytest

from fot import config as config_lib
from fot.errors import ConfigError
from launch import points
from launch.space import Adaptive, Choice, Grid, Halving, Integer, LogReal, Median, Product, Random, Real, Sweep, Zip

ROOT = pathlib.Path(__file__).parent.parent
RATE, SEED, LAYERS = "optimizer.learning_rate", "train.seed", "model.memory_layers"
SWEEP = Sweep("configs/dictionary_tiny.py", Grid({RATE: (1e-2, 1e-3), SEED: (0, 1)}))
FILES = sorted(path.name for path in (ROOT / "configs" / "sweeps").glob("*.py") if path.stem != "__init__")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_points():
    assert points.points(SWEEP.space) == [{RATE: rate, SEED: seed} for rate in (1e-2, 1e-3) for seed in (0, 1)]
    pairs = Zip({RATE: (1e-2, 1e-3), LAYERS: ((1,), (2, 3))})
    assert points.points(pairs) == [{RATE: 1e-2, LAYERS: (1,)}, {RATE: 1e-3, LAYERS: (2, 3)}]
    both = points.points(Product((pairs, Grid({SEED: (0, 1)}))))
    assert len(both) == 4 and both[1] == {RATE: 1e-2, LAYERS: (1,), SEED: 1}


def test_random_points_are_within_their_ranges_and_the_seeds():
    ranges = {RATE: LogReal(1e-4, 1e-1), SEED: Integer(3, 9, 3), "model.norm_epsilon": Real(0.1, 0.2)}
    found = points.points(Random(ranges, 50, seed=1))
    assert found == points.points(Random(ranges, 50, seed=1)) != points.points(Random(ranges, 50, seed=2))
    assert {point[SEED] for point in found} == {3, 6, 9}
    assert all(1e-4 <= point[RATE] <= 1e-1 and 0.1 <= point["model.norm_epsilon"] <= 0.2 for point in found)
    assert 15 < sum(point[RATE] < 1e-2 for point in found) < 45, "two thirds, if the logarithm is spread evenly"
    few = points.points(Random({SEED: Integer(0, 3), LAYERS: Choice(((1,), (2,)))}, 8))
    assert len({str(point) for point in few}) == 8, "each point once"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(1e-2, "0.01"), (True, "true"), ((1, 64), "(1, 64)"), ([8], "(8,)"), (("a", "b"), "a,b"), (("",), ",")],
)
def test_texts(value, wanted):
    assert points.text(value) == wanted


def test_ids_come_from_the_overrides_alone():
    first = points.trial_id("a.py", {"train.steps": "4"}, {RATE: "0.01", SEED: "1"})
    assert first == "bebb88df3c-learning_rate_0.01_seed_1", "ids are kept: a change of them loses sweeps"
    assert first == points.trial_id("a.py", {"train.steps": "4"}, {SEED: "1", RATE: "0.01"})
    others = [
        points.trial_id("b.py", {"train.steps": "4"}, {RATE: "0.01", SEED: "1"}),
        points.trial_id("a.py", {"train.steps": "5"}, {RATE: "0.01", SEED: "1"}),
        points.trial_id("a.py", {"train.steps": "4"}, {RATE: "0.02", SEED: "1"}),
    ]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("name", FILES)
def test_every_sweep_that_comes_along_is_valid(name):
    sweep = points.load(f"configs/sweeps/{name}")
    points.check(sweep, points.texts(sweep.fixed))


def test_the_configs_of_the_points_are_the_runs():
    point = points.texts({RATE: 1e-2, LAYERS: (1, 2)})
    assert points.words(point) == ["--config.optimizer.learning_rate=0.01", "--config.model.memory_layers=(1, 2)"]
    values = points.cli.override(points.cli.load_file(SWEEP.base), point)
    config = config_lib.from_dict(values)
    assert config.model.memory_layers == (1, 2) and config.optimizer.learning_rate == 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": Grid({"model.layer": (1,)})}, "unknown config field model.layer; did you mean 'model.layers'?"),
        ({"space": Grid({"model": (1,)})}, "model is a group of config fields: name one of them"),
        ({"space": Grid({RATE: ("fast",)})}, "'fast' is not of type float"),
        ({"space": Grid({LAYERS: ((1,), (4,))})}, r"trial --config.model.memory_layers=(4,): model.memory_layers=(4,)"),
        ({"space": Grid({RATE: ()})}, "optimizer.learning_rate=() must be a tuple of the values to try"),
        ({"space": Grid({RATE: 1e-2})}, "optimizer.learning_rate=0.01 must be a tuple of the values to try"),
        ({"space": Grid({SEED: (1, 2, 1)})}, "trial --config.train.seed=1 is twice in the sweep"),
        ({"space": Grid({})}, "Grid: no fields"),
        ({"space": Zip({RATE: (1e-2,), SEED: (1, 2)})}, "Zip: fields have different numbers of values"),
        ({"space": Product((Grid({SEED: (1,)}), Zip({SEED: (2,)})))}, "train.seed is twice in the space"),
        ({"space": Random({SEED: Integer(0, 1)}, trials=3)}, "Random: trials=3 are more than the space's 2 points"),
        ({"space": Adaptive({RATE: LogReal(0.0, 1.0)}, trials=3)}, "low must be above 0"),
        ({"space": Adaptive({RATE: Real(1.0, 1.0)}, trials=3)}, "low must be below high"),
        ({"space": Adaptive({SEED: (1, 2)}, trials=3)}, "train.seed=(1, 2) must be Choice, Real, LogReal or Integer"),
        ({"space": Adaptive({"model.layers": Integer(2, 8)}, trials=3)}, "trial --config.model.layers=2: model.mem"),
        ({"space": Adaptive({SEED: Real(0.0, 1.0)}, trials=3)}, "'0.0' is not of type int"),
        ({"space": None}, "space=None must be Grid, Zip, Product, Random or Adaptive"),
        ({"fixed": {SEED: 1}}, "train.seed is in the space and is set for all trials too"),
        ({"fixed": {"train.step": 1}}, "unknown config field train.step"),
        ({"fixed": {"train.evaluate_every": 0}}, "train.evaluate_every=0 gives no held_out/loss"),
        ({"goal": "minimise"}, "goal='minimise' is not one of minimize, maximize; did you mean 'minimize'?"),
        ({"pruner": Median(0, 0)}, "trials must be 1 or more"),
        ({"pruner": Halving(1, 1)}, "factor 2 or more"),
        ({"base": "configs/nothing.py"}, "config file 'configs/nothing.py' does not exist"),
    ],
)
def test_what_cant_run_is_one_line(changes, message):
    sweep = dataclasses.replace(SWEEP, **changes)
    with pytest.raises(ConfigError) as error:
        points.check(sweep, points.texts(sweep.fixed))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "has no function get_sweep()"),
        ("def get_sweep(): return 1", "must return launch.space.Sweep, not int"),
        ("def get_sweep(): return 1 / 0", "ZeroDivisionError"),
        (None, "does not exist"),
    ],
)
def test_files_that_are_no_sweeps(tmp_path, source, message):
    if source is not None:
        (tmp_path / "x.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        points.load(str(tmp_path / "x.py"))


def test_the_papers_grids():
    # The batches are in tokens of C_curr.
    grid = points.load("configs/sweeps/paper_rate_batch.py")
    values = points.cli.load_file(grid.base)
    seen = set()
    for point in points.points(grid.space):
        config = config_lib.from_dict(points.cli.override(values, points.texts({**grid.fixed, **point})))
        tokens = config.data.batch_size // config.crossbatch.packing * config.data.context
        seen.add((config.optimizer.learning_rate, tokens // 1024))
    assert seen == {(rate, batch) for rate in (1e-2, 5e-3, 3e-3, 1e-3) for batch in (8, 16, 32)}
    for name, field in (("d", "crossbatch.d"), ("w", "crossbatch.w"), ("memory_layers", "model.memory_layers")):
        assert field in points.fields(points.load(f"configs/sweeps/paper_{name}.py").space)
    table = points.points(points.load("configs/sweeps/paper_w_d.py").space)
    assert [(point["crossbatch.w"], *point["crossbatch.d"]) for point in table] == [(1, 1), (1, 2), (2, 1), (2, 2)]
