"""`benchmarks/data.py` measures what it says, and judges its bar at the full size alone."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import data as benchmark

ROOT = pathlib.Path(__file__).parent.parent
THROUGH = {
    "documents",
    "tokens",
    "load_seconds",
    "rows_seconds",
    "rows_tokens_per_second",
    "tokens_per_second",
}
RESUME = {"documents", "near", "far", "near_seconds_median", "far_seconds_median", "ratio"}
KEYS = {"uncached": THROUGH, "cached": THROUGH, "resume": RESUME}
SHARED = {"case", "size", "task", "peak_rss_bytes"}


def run(*flags):
    command = [sys.executable, "-m", "benchmarks.data", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} and more words\n" * 300)
    done = run("--quick", "--task=files", f"--files={folder}/*.txt")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_line_a_case_then_the_bar(lines):
    *cases, bar = lines
    assert [line["case"] for line in cases] == list(KEYS) == list(benchmark.CASES)
    for line in cases:
        assert set(line) == SHARED | KEYS[line["case"]]
        assert all(math.isfinite(value) and value > 0 for value in line.values() if not isinstance(value, str))
    assert set(bar) == {"bar", "value", "limit", "must_be", "met"} and bar["met"] is None


def test_cached_reads_the_same_documents(lines):
    uncached, cached, _, _ = lines
    assert uncached["tokens"] == cached["tokens"] and 0 < uncached["documents"] == cached["documents"] < 40


@pytest.mark.parametrize(("ratio", "met"), [(1.5, True), (1.6, False)])
def test_the_bar_is_judged_at_the_full_size(ratio, met):
    line = {"size": "full", "near": 1000, "far": 1_000_000, "ratio": ratio}
    [bar] = benchmark.bars({"resume": line})
    assert bar["met"] is met


def test_full_size_is_the_case_of_the_bar():
    size = benchmark.SIZES["full"]
    assert (size.near, size.far) == (1_000, 1_000_000) and size.documents > size.far


def test_a_mistake_is_one_line(tmp_path):
    done = run("--quick", "--case=cached", "--task=files", f"--files={tmp_path}/none.txt")
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
