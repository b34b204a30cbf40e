"""`benchmarks/loading.py` measures what it says, and judges its bar at the full size alone."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import loading as benchmark

ROOT = pathlib.Path(__file__).parent.parent
KEYS = {"case", "size", "tokens", "times", "seconds_median", "tokens_per_second", "peak_rss_bytes"}


def test_a_case_is_a_line():
    command = [sys.executable, "-m", "benchmarks.loading", "--quick", "--case=128k"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    [line] = map(json.loads, done.stdout.splitlines())
    assert set(line) == KEYS and (line["case"], line["tokens"], line["times"]) == ("128k", 512, 2)
    assert all(math.isfinite(value) and value > 0 for value in line.values() if not isinstance(value, str))


@pytest.mark.parametrize(("size", "speed", "met"), [("full", 90.0, True), ("full", 89.0, False), ("quick", 90.0, None)])
def test_the_bar_is_judged_of_the_best_turns_at_the_full_size(size, speed, met):
    speeds = [("16k", 100.0), ("128k", 300.0), ("1m", speed), ("16k", 50.0), ("1m", 20.0)]
    lines = [{"size": size, "case": case, "tokens_per_second": each} for case, each in speeds]
    bar = benchmark.bar(lines)
    assert bar["value"] == speed / 100 and bar["met"] is met and set(bar) == {"bar", "value", "limit", "must_be", "met"}


def test_full_size_is_the_case_of_the_bar():
    assert benchmark.SIZES["full"].lengths == {"16k": 16_384, "128k": 131_072, "1m": 1_048_576}
    assert len(benchmark.MODEL.memory_layers) == 1
