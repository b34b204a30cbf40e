"""`benchmarks/knn.py` measures what it says, and judges its bars at the full size alone."""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import knn as benchmark
from fot import config as config_lib
from fot import model
from fot.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parent.parent
KEYS = {
    "case",
    "keys",
    "size",
    "block",
    "queries",
    "seconds_median",
    "seconds_min",
    "queries_per_second_a_head",
    "extra_bytes",
    "slots",
    "recall",
}
CLUSTERED = KEYS | {"probes", "speedup", "build_seconds", "curve"}


def run(*flags):
    command = [sys.executable, "-m", "benchmarks.knn", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def done():
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    done = run("--quick", "--calls=1")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def lines(done):
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_line_a_case_then_the_bars_and_a_table(done, lines):
    cases, bars = lines[:3], lines[3:]
    assert [line["case"] for line in cases] == ["faiss_flat", "knn", "approximate"]
    for line in cases:
        assert set(line) == KEYS
        numbers = [value for value in line.values() if not isinstance(value, str)]
        assert all(math.isfinite(value) and value >= 0 for value in numbers) and line["seconds_min"] > 0
        assert f"random  {line['case']}" in done.stderr
    assert len(bars) == 2 and all(bar["met"] is None for bar in bars)


def test_exact_searches_agree_and_the_approximate_one_has_its_recall(lines):
    flat, knn, approximate = (line["recall"] for line in lines[:3])
    assert flat > 0.999 and knn == 1 and approximate > 0.9


@pytest.mark.slow
def test_keys_of_a_trained_model(tmp_path, capsys):
    (tmp_path / "documents").mkdir()
    for i in range(40):
        (tmp_path / "documents" / f"{i}.txt").write_text(f"{i} and more words\n" * 30)
    tiny = config_lib.ModelConfig(
        vocab_size=512, layers=2, dim=16, heads=4, kv_heads=2, head_dim=8, mlp_dim=16, memory_layers=(1,)
    )
    data = config_lib.DataConfig(
        task=("files",),
        files=(f"{tmp_path}/documents/*.txt",),
        tokenizer="bytes",
        context=32,
        cache_dir=str(tmp_path / "cache"),
        held_out_fraction=0.3,
    )
    config = dataclasses.replace(config_lib.ExperimentConfig(), model=tiny, data=data)
    with Checkpointer(tmp_path / "checkpoints", config.train) as checkpoints:
        checkpoints.save(1, {"params": model.init(jax.random.key(0), tiny)}, {}, config)
    flags = ["--quick", "--calls=1", "--keys=trained", f"--workdir={tmp_path}", "--list_size=64", "--probes=16"]
    benchmark.main([*flags, "--case=clustered"])
    line = json.loads(capsys.readouterr().out)
    assert set(line) == CLUSTERED and line["slots"] == 4096
    assert [point["probes"] for point in line["curve"]] == [4, 8, 16, 32]
    recalls = [point["recall"] for point in line["curve"]]
    assert recalls == sorted(recalls) and line["recall"] == recalls[2] > 0.5


def test_no_checkpoint_is_one_line(tmp_path):
    done = run("--quick", "--case=knn", "--keys=trained", f"--workdir={tmp_path}/none")
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "--keys=trained needs --workdir" in run("--case=knn", "--keys=trained").stderr


def test_bars_are_judged_at_the_full_size():
    def line(keys, case, rate, **more):
        return {"keys": keys, "case": case, "size": "full", "queries_per_second_a_head": rate, **more}

    cases = [line("random", "faiss_flat", 100), line("random", "knn", 101, extra_bytes=2**30)]
    assert [bar["met"] for bar in benchmark.bars(cases)] == [True, True]
    cases[1] |= {"queries_per_second_a_head": 99, "extra_bytes": 2**30 + 1}
    assert [bar["met"] for bar in benchmark.bars(cases)] == [False, False]
    cases.append(line("trained", "clustered", 1, speedup=5.1, recall=0.949))
    assert [bar["met"] for bar in benchmark.bars(cases)] == [False, False, True, False]


def test_full_size_is_the_case_of_the_bars():
    size = benchmark.SIZES["full"]
    assert (size.slots, size.queries, size.heads, size.head_dim, size.neighbours) == (2**20, 512, 8, 64, 128)


def test_recall_counts_what_was_found_of_the_best():
    best = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = np.array([[4, 3, 2, 9], [8, 7, 6, 5]])
    assert benchmark.recall(found, best) == 7 / 8
