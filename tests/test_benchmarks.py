import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import crossbatch as benchmark

ROOT = pathlib.Path(__file__).parent.parent

COMPILED = {"compile_seconds", "compiled_peak_rss_bytes", "temp_bytes"}
STEP = {"step_seconds_median", "model_flops_per_second"}
ATTENTION = {"seconds_median", "seconds_min", "value", "gradient_norms"} | COMPILED
TRAIN = STEP | {"contexts", "step_seconds_min", "tokens_per_second", "model_flops"} | COMPILED
PAIR = {f"step_seconds_{which}_{n}" for which in ("median", "min") for n in (0, 7)} | {"ratio"}
KEYS = {
    "train_0": TRAIN,
    "train_2": TRAIN,
    "train_7": TRAIN,
    "step_pair": PAIR,
    "matmul_pair": STEP | {"matmul_size", "matmul_flops_per_second", "ratio"},
    "attention_local": ATTENTION,
    "attention_ours": ATTENTION,
    "attention_plain": ATTENTION,
}
SHARED = {"case", "size", "remat", "unroll", "attention_block", "steps", "peak_rss_bytes"}


def run(*flags, **environment):
    command = [sys.executable, "-m", "benchmarks.crossbatch", *flags]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    # Cases of the same step share what was compiled.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = run("--quick", "--steps=1", **cache)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def cases(lines):
    return {line["case"]: line for line in lines if "case" in line}


@pytest.fixture(scope="module")
def bars(lines):
    return [line for line in lines if "bar" in line]


def numbers(line):
    values = [value if isinstance(value, list) else [value] for value in line.values()]
    return [value for group in values for value in group if isinstance(value, int | float)]


@pytest.mark.slow
def test_every_line_is_a_case_or_a_bar(lines, cases, bars):
    assert [line.get("case") for line in lines[: len(cases)]] == list(KEYS)
    assert lines[len(cases) :] == bars


@pytest.mark.slow
def test_cases_have_their_keys(cases):
    for name, keys in KEYS.items():
        assert set(cases[name]) == SHARED | keys


@pytest.mark.slow
def test_measurements_are_finite(cases):
    for line in cases.values():
        assert all(map(math.isfinite, numbers(line)))
        assert line["peak_rss_bytes"] > 1e7
    for name in ("step_pair", "matmul_pair"):
        assert cases[name]["ratio"] > 0


@pytest.mark.slow
def test_bars_have_values_and_do_not_count_at_the_quick_size(bars):
    assert len(bars) == 8
    for bar in bars:
        assert set(bar) == {"bar", "value", "limit", "must_be", "met"}
        assert math.isfinite(bar["value"]) and bar["value"] > 0
        assert bar["must_be"] in ("at most", "at least") and bar["met"] is None


@pytest.mark.slow
def test_bars_are_judged_at_the_full_size(cases):
    full = {name: dict(line, size="full") for name, line in cases.items()}
    for bar in benchmark.bars(full):
        met = {"at most": bar["value"] <= bar["limit"], "at least": bar["value"] >= bar["limit"]}
        assert bar["met"] is met[bar["must_be"]]


@pytest.mark.slow
def test_ours_computes_the_plain_formula_and_the_baseline_does_not(cases):
    ours, plain, local = (cases[f"attention_{name}"] for name in ("ours", "plain", "local"))
    assert ours["value"] == pytest.approx(plain["value"], rel=1e-3, abs=1e-2)
    assert ours["gradient_norms"] == pytest.approx(plain["gradient_norms"], rel=1e-4)
    assert local["gradient_norms"] != pytest.approx(plain["gradient_norms"], rel=1e-2)


@pytest.mark.slow
def test_contexts_cost_flops(cases):
    flops = [cases[f"train_{n}"]["model_flops"] for n in (0, 2, 7)]
    assert flops == sorted(set(flops))


def test_full_size_is_the_case_of_the_issue():
    size = benchmark.SIZES["full"]
    assert (size.model.layers, size.model.dim, size.model.mlp_dim, size.model.vocab_size) == (12, 512, 2048, 8192)
    assert (size.model.heads, size.model.kv_heads, size.model.head_dim) == (8, 8, 64)
    assert (size.rows, size.context, size.matmul, size.model.memory_layers) == (8, 512, 2048, (8,))
    assert (size.model.compute_dtype, size.model.mlp) == ("float32", "gelu")


def test_every_row_sees_every_other():
    table = benchmark.crossbatch.make_table(benchmark._crossbatch(7), 8, 1)
    for row, seen in enumerate(table.contexts_BC):
        assert sorted([row, *seen]) == list(range(8))
    assert table.negative_BC.all()


def test_unknown_case_is_a_clear_line():
    done = run("--case=trian_7")
    assert done.returncode == 2
    assert "invalid choice: 'trian_7'" in done.stderr and done.stdout == ""
