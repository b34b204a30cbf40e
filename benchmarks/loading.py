"""What filling a memory costs: tokens/s by length, for a model with one memory layer.

  python -m benchmarks.loading                    # all lengths and the bar
  python -m benchmarks.loading --case=1m          # one length, in this process
  python -m benchmarks.loading --quick            # everything, tiny: shows that it works, measures nothing

stdout has JSON alone: a line a case, each measured in a fresh process, then a line for the bar. A case fills an empty
memory that holds exactly as many tokens, again and again for as long as the longest case needs, so that all see the
same machine; compilation is not counted.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm

from benchmarks.crossbatch import peak_rss_bytes
from fot import config as config_lib
from fot import loading, model, sharding
from fot.batch import Batch
from fot.config import ModelConfig
from fot.readers.reader import of_config

Line = dict[str, Any]

BAR = 0.9
MODEL = ModelConfig()  # 4 layers of width 128, memory layer 2


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
      lengths: name of a case -> tokens of the memory.
      window: tokens of a window.
      turns: how often the processes of all cases are run, by turns.
    """

    lengths: dict[str, int]
    window: int
    turns: int


SIZES = {
    "full": Size({"16k": 2**14, "128k": 2**17, "1m": 2**20}, window=256, turns=3),
    "quick": Size({"16k": 2**8, "128k": 2**9, "1m": 2**10}, window=32, turns=1),
}


def windows(length: int, size: int) -> Iterator[Batch]:
    """Yields one document of random tokens."""
    random = np.random.default_rng(length)
    documents = np.zeros((1, size), np.int32)
    for first in range(0, length, size):
        tokens = random.integers(0, MODEL.vocab_size, (1, size), np.int32)
        yield Batch(tokens, None, None, documents, np.arange(first, first + size, dtype=np.int32)[None])


def run_case(name: str, size_name: str) -> Line:
    """Measures one length in this process."""
    size, config = SIZES[size_name], config_lib.ExperimentConfig()
    length, longest = size.lengths[name], max(size.lengths.values())
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices())
    params = jax.jit(lambda key: model.init(key, MODEL))(jax.random.key(0))
    params = jax.device_put(params, sharding.shardings(params, mesh))
    how = loading.Loading(of_config("knn", config), config.evaluate.windows, "refuse")
    store = loading.store(mesh)

    def fill(count: int) -> float:
        memory = jax.block_until_ready(store.empty(MODEL, 1, length, "float32"))
        began = time.perf_counter()
        loading.load(params, MODEL, memory, windows(count, size.window), how, mesh, lambda done, speed: None)
        return time.perf_counter() - began

    fill(size.window)
    times = [fill(length) for _ in range(longest // length)]
    return {
        "case": name,
        "size": size_name,
        "tokens": length,
        "times": len(times),
        "seconds_median": statistics.median(times),
        "tokens_per_second": length * len(times) / sum(times),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def run_fresh(name: str, size_name: str) -> Line:
    """Measures one length in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", f"--case={name}"]
    command += ["--quick"] if size_name == "quick" else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: case {name} ended with code {done.returncode}; see above, and run it alone by --case={name}")
    return json.loads(done.stdout)


def bar(lines: list[Line]) -> Line:
    """Returns the line for the bar, of the best turn of each length; at the full size alone it counts."""

    def best(name: str) -> float:
        return max(line["tokens_per_second"] for line in lines if line["case"] == name)

    value = best("1m") / best("16k")
    met = value >= BAR if lines[0]["size"] == "full" else None
    return {"bar": "tokens/s at 1m / at 16k", "value": value, "limit": BAR, "must_be": "at least", "met": met}


def main(flags: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=SIZES["full"].lengths, help="measure this case alone, in this process")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="tiny sizes")
    arguments = parser.parse_args(flags)
    if arguments.case:
        print(json.dumps(run_case(arguments.case, arguments.size)), flush=True)
        return
    size = SIZES[arguments.size]
    lines = []
    with tqdm.tqdm([*size.lengths] * size.turns, file=sys.stderr, unit="case") as progress:
        for name in progress:
            progress.set_postfix_str(name)
            lines.append(run_fresh(name, arguments.size))
            print(json.dumps(lines[-1]), flush=True)
    print(json.dumps(bar(lines)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
