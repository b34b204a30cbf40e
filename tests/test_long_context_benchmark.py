"""`benchmarks/long_context.py` measures what it says."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax

from benchmarks import long_context as benchmark
from fot import model

ROOT = pathlib.Path(__file__).parent.parent


def test_a_case_is_a_line():
    command = [sys.executable, "-m", "benchmarks.long_context", "--quick", "--case=32k"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    [line] = map(json.loads, done.stdout.splitlines())
    names = {name: line.pop(name) for name in ("case", "framework", "size", "memory_dtype")}
    assert names == {"case": "32k", "framework": "jax", "size": "quick", "memory_dtype": "float32"}
    assert set(line) == {"tokens", "load_tokens_per_second", "decode_tokens_per_second", "peak_rss_bytes"}
    assert line["tokens"] == 512 and all(math.isfinite(value) and value > 0 for value in line.values())


def test_the_full_size_is_the_case_of_the_bar():
    size = benchmark.SIZES["full"]
    assert size.lengths == {"8k": 8192, "32k": 32768, "128k": 131072}
    assert (size.window, size.last_context_length, size.decoded) == (2048, 1024, 16)
    shapes = jax.eval_shape(lambda key: model.init(key, size.model), jax.random.key(0))
    assert 38e6 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 40e6
