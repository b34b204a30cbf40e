"""What the data costs: documents through tokenizer and rows, and going on far into a run.

  python -m benchmarks.data                          # all cases and the bars, on one core
  python -m benchmarks.data --task=files --files=GLOB
  python -m benchmarks.data --case=resume            # one case, in this process
  python -m benchmarks.data --quick                  # everything, tiny: shows that it works, measures nothing

stdout has JSON alone: a line a case, each measured in a fresh process that keeps to one core, then a line a bar. Cases
read the training documents of a task with the tokenizer and the batches of configs/code_small.py. "uncached" tokenizes
them into an empty cache (a trained tokenizer has been trained before) and reads an epoch of rows; "cached" finds
them there and reads the same. "resume" goes on, from a saved position to its first batch, at two places of a stream of
generated documents, by turns.

What a train step waits for data is in the metrics of every run. As a share of the run's time:

  python -c 'import json, sys; lines = [line for line in map(json.loads, open(sys.argv[1])) if "data_wait" in line]; \\
    print(sum(line["data_wait"] * line["tokens_per_second"] * line["step"] \\
    / sum(line[key] for key in line if key.startswith("tokens/")) for line in lines) / len(lines))' runs/x/metrics.jsonl
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tqdm

from benchmarks.crossbatch import peak_rss_bytes
from configs import code_small
from fot import config as config_lib
from fot.config import ExperimentConfig
from fot.data import corpus, loader, mixture, rows, tokenizer
from fot.data.corpus import Corpus
from fot.data.stored import Stored
from fot.errors import UserError

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
      tokenizer: of the documents.
      documents: generated for "resume", in two sources.
      near: ordinal of the nearer place to go on from.
      far: ordinal of the other.
      turns: how often each is timed.
    """

    tokenizer: str
    documents: int
    near: int
    far: int
    turns: int


SIZES = {
    "full": Size("trained", documents=1_200_000, near=1_000, far=1_000_000, turns=101),
    "quick": Size("bytes", documents=12_000, near=10, far=10_000, turns=5),
}


def experiment(arguments: argparse.Namespace) -> ExperimentConfig:
    """Returns configs/code_small.py with the documents, tokenizer and cache that are asked for."""
    values = code_small.get_config()
    values.data.task, values.data.files = (arguments.task,), (arguments.files,)
    values.data.tokenizer = SIZES[arguments.size].tokenizer
    values.data.cache_dir = arguments.cache_dir
    return config_lib.from_dict(values.to_dict())


def read_epoch(documents: Corpus, config: ExperimentConfig) -> tuple[int, float]:
    """Reads batches until every document has been read to its end; returns their tokens and the seconds it took."""
    began = time.perf_counter()
    stream, position = mixture.mix(documents, config.data), rows.start(config)
    packs = range(rows.pack_count(config))
    while min(position.ordinals) < len(documents):
        _, position = rows.next_batch(stream, position, config, packs)
    return sum(position.tokens), time.perf_counter() - began


def through(config: ExperimentConfig) -> Line:
    """Loads the training documents, cached or not, and reads an epoch of rows; rates are in tokens of the documents."""
    began = time.perf_counter()
    documents = corpus.load(config, "train").corpus
    load_seconds = time.perf_counter() - began
    rows_tokens, rows_seconds = read_epoch(documents, config)
    rate = rows_tokens / rows_seconds
    return {
        "documents": len(documents),
        "tokens": documents.token_count,
        "load_seconds": load_seconds,
        "rows_seconds": rows_seconds,
        "rows_tokens_per_second": rate,
        "tokens_per_second": documents.token_count / (load_seconds + documents.token_count / rate),
    }


def uncached(arguments: argparse.Namespace) -> Line:
    """Tokenizes the documents into an empty cache first."""
    config = experiment(arguments)
    tokenizer.load(config.data, config.model)
    with tempfile.TemporaryDirectory(dir=arguments.cache_dir) as empty:
        for path in pathlib.Path(arguments.cache_dir).glob("tokenizer-*"):
            os.symlink(path, pathlib.Path(empty, path.name))
        data = dataclasses.replace(config.data, cache_dir=empty)
        return through(dataclasses.replace(config, data=data))


def cached(arguments: argparse.Namespace) -> Line:
    """Finds the tokens in the cache."""
    config = experiment(arguments)
    corpus.load(config, "train")
    return through(config)


def generated(count: int) -> Stored:
    """Returns a source of `count` documents of 16 to 47 tokens."""
    random = np.random.default_rng(count)
    offsets = np.concatenate([[0], np.cumsum(random.integers(16, 48, count))])
    tokens = random.integers(0, 2**16, offsets[-1], np.uint16)
    return Stored("generated", tokens, offsets, np.zeros(0, np.uint8), np.zeros(count + 1, np.int64), str(count), None)


def resume(arguments: argparse.Namespace) -> Line:
    """Seconds from a saved position, as the checkpoint has it, to the first batch there."""
    size, config = SIZES[arguments.size], experiment(arguments)
    data = dataclasses.replace(config.data, task=("python_stdlib",), files=("",), weights=(0.6, 0.4))
    config = dataclasses.replace(config, data=data)
    documents = Corpus((generated(size.documents // 2), generated(size.documents // 2 + 1)))
    seconds: dict[int, list[float]] = {size.near: [], size.far: []}
    packs = rows.pack_count(config)
    for _ in range(size.turns):
        for place, times in seconds.items():
            position = rows.Position(tuple(range(place, place + packs)), (7,) * packs, (24 * place,) * 2)
            saved = json.dumps(position.to_dict())
            began = time.perf_counter()
            restored = rows.position_from_dict(json.loads(saved))
            with loader.Loader(documents, config, restored, None, 1) as batches:
                next(batches)
                times.append(time.perf_counter() - began)
    near, far = (statistics.median(times) for times in seconds.values())
    return {
        "documents": len(documents),
        "near": size.near,
        "far": size.far,
        "near_seconds_median": near,
        "far_seconds_median": far,
        "ratio": far / near,
    }


CASES: dict[str, Callable[[argparse.Namespace], Line]] = {"uncached": uncached, "cached": cached, "resume": resume}


def run_case(name: str, arguments: argparse.Namespace) -> Line:
    """Measures one case in this process, on one core where the system lets a process choose."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    line = {"case": name, "size": arguments.size, "task": arguments.task, **CASES[name](arguments)}
    return line | {"peak_rss_bytes": peak_rss_bytes()}


def run_fresh(name: str, flags: list[str], cache_dir: str) -> Line:
    """Measures one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data", *flags, f"--cache_dir={cache_dir}", f"--case={name}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: case {name} ended with code {done.returncode}; see above, and run it alone by --case={name}")
    return json.loads(done.stdout)


def bars(lines: dict[str, Line]) -> list[Line]:
    """Returns a line for each bar: its value, its limit, and whether it is met; at the full size alone it counts."""
    line = lines["resume"]
    met = line["ratio"] <= 1.5 if line["size"] == "full" else None
    name = f"going on at document {line['far']:,} / at document {line['near']:,}"
    return [{"bar": name, "value": line["ratio"], "limit": 1.5, "must_be": "at most", "met": met}]


def _arguments(flags: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, help="measure this case alone, in this process")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="tiny sizes")
    parser.add_argument("--task", choices=config_lib.TASKS, default="python_stdlib", help="see fot.config")
    parser.add_argument("--files", default="", help="see fot.config")
    parser.add_argument("--cache_dir", default="", help="where cases keep tokenizer and tokens (default: a new folder)")
    return parser.parse_args(flags)


def main(flags: list[str]) -> None:
    """Runs the command line."""
    arguments = _arguments(flags)
    with tempfile.TemporaryDirectory() as folder:
        arguments.cache_dir = arguments.cache_dir or folder
        if arguments.case:
            print(json.dumps(run_case(arguments.case, arguments)), flush=True)
            return
        lines = {}
        with tqdm.tqdm(CASES, file=sys.stderr, unit="case") as progress:
            for name in progress:
                progress.set_postfix_str(name)
                lines[name] = run_fresh(name, flags, arguments.cache_dir)
                print(json.dumps(lines[name]), flush=True)
        for line in bars(lines):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
