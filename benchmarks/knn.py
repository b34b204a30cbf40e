"""What reading a large memory costs: readers beside FAISS, in queries/s, recall and memory.

  python -m benchmarks.knn                              # random keys: FAISS's flat index beside knn and approximate
  python -m benchmarks.knn --workdir=runs/code_small    # and a trained model's keys over its documents: clustered too
  python -m benchmarks.knn --case=knn                   # one case, in this process
  python -m benchmarks.knn --quick                      # tiny: shows that it works, measures nothing

stdout has JSON alone: a line a case, each measured in a fresh process, then a line a bar; a table of the cases goes to
stderr. Queries/s are those of one head, all heads being searched in one call. "extra_bytes" is the largest resident
size of the process while it searches, less what it had before, keys and values included; it is made beforehand.
The library under test uses all cores that the process may use, FAISS as many threads as there are.

Real keys are those of the first memory layer of the newest checkpoint of the workdir, over its training documents
window by window; queries come from the windows of its held-out documents. Recall is against "knn" in the same process.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import tqdm

from fot import attention, memory, model, trained
from fot.attention import Partial, Tokens
from fot.config import EvaluateConfig, ExperimentConfig
from fot.data import corpus as corpora
from fot.errors import UserError
from fot.memory import Memory, Slots
from fot.readers import approximate, clustered, index, knn, table
from fot.readers.reader import Reader

Line = dict[str, Any]
NEAREST = {"knn": knn.nearest, "approximate": approximate.nearest, "clustered": clustered.nearest}


@dataclasses.dataclass(frozen=True)
class Size:
    """What is searched: `slots` slots and `queries` queries a head, `heads` heads of `head_dim` for random keys."""

    slots: int
    queries: int
    heads: int
    head_dim: int
    neighbours: int


SIZES = {"full": Size(2**20, 512, 8, 64, 128), "quick": Size(2**12, 16, 2, 8, 8)}


def random_keys(arguments: argparse.Namespace) -> tuple[Slots, jax.Array]:
    """Returns slots and queries [B, T, N, H] of normal random numbers."""
    size = SIZES[arguments.size]
    shape = (1, size.heads, size.slots, size.head_dim)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(seed, shape):
        # Head by head, as random numbers take several times their own memory.
        keys = jax.random.split(jax.random.key(seed), shape[1])
        return jax.lax.map(lambda key: jax.random.normal(key, shape[2:]), keys)[None]

    keys, values = draw(0, shape), draw(1, shape)
    q = draw(2, (1, size.heads, size.queries, size.head_dim)).swapaxes(1, 2)
    return Slots(keys, values, jnp.zeros((1, size.slots), jnp.int32)), q


def trained_keys(arguments: argparse.Namespace) -> tuple[Slots, jax.Array]:
    """Returns slots with the keys and values of training documents, and queries of held-out ones."""
    config = trained.load_config(arguments.workdir)
    if not config.model.memory_layers:
        raise UserError(f"the model of --workdir={arguments.workdir} has no memory layer")
    params = trained.load(arguments.workdir, config).params
    size = SIZES[arguments.size]
    keys, values, _ = _project(params, config, _tokens(config, "train", size.slots))
    q = _project(params, config, _tokens(config, "held_out", size.queries))[2]
    heads = (jnp.asarray(x.swapaxes(0, 1)[None]) for x in (keys, values))
    return Slots(*heads, jnp.zeros((1, len(keys)), jnp.int32)), jnp.asarray(q[None])


KEYS = {"random": random_keys, "trained": trained_keys}


def _tokens(config: ExperimentConfig, split: str, count: int) -> np.ndarray:
    """Returns at least `count` tokens of whole windows [windows, context]."""
    tokens = np.concatenate([part.tokens for part in corpora.load(config, split).corpus.parts])
    windows = min(-(-count // config.data.context), len(tokens) // config.data.context)
    return tokens[: windows * config.data.context].astype(np.int32).reshape(windows, -1)


def _project(params: model.Params, config: ExperimentConfig, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns keys, values and queries [tokens, heads, H] of the first memory layer."""
    m = config.model

    @jax.jit
    def run(params, tokens_BT):
        seen = []

        def keep(q_BTNH, documents_BT, slots, reader):
            seen.append(q_BTNH)
            return Partial(jnp.zeros(q_BTNH.shape), jnp.full(q_BTNH.shape[:3], -jnp.inf))

        documents = jnp.zeros_like(tokens_BT)
        places = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        nothing = memory.empty(len(m.memory_layers), len(tokens_BT), 0, m.kv_heads, m.head_dim, jnp.float32)
        with mock.patch.dict(table.READERS, {"keep": keep}):
            reader = _reader("keep", argparse.Namespace(size="quick", block=1, probes=1, list_size=1))
            read = dataclasses.replace(m, remat="none")
            output = model.apply(params, tokens_BT, Tokens(documents, places), read, memory=nothing, reader=reader)
        return output.keys[0], output.values[0], seen[0]

    parts = [jax.device_get(run(params, part)) for part in np.array_split(tokens, -(-len(tokens) // 256))]
    return tuple(np.concatenate([part[i].reshape(-1, *part[i].shape[2:]) for part in parts]) for i in range(3))


def _reader(name: str, arguments: argparse.Namespace) -> Reader:
    target = EvaluateConfig().recall_target
    neighbours = SIZES[arguments.size].neighbours
    return Reader(name, neighbours, arguments.block, True, target, arguments.list_size, arguments.probes)


class Peak:
    """Watches the resident size of this process while it is open: `extra` bytes beyond that at its beginning."""

    def __enter__(self):
        self._process, self._stop = psutil.Process(), threading.Event()
        self._before = self._most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.02):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.extra = max(self._most, self._process.memory_info().rss) - self._before


def timed(search: Callable[[], Any], calls: int) -> tuple[list[float], Any]:
    """Returns the seconds of each call, after one that isn't timed, and what the last gave."""
    result = jax.block_until_ready(search())
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        result = jax.block_until_ready(search())
        seconds.append(time.perf_counter() - began)
    return seconds, result


def recall(found: np.ndarray, best: np.ndarray) -> float:
    """Share of the best that was found, over the queries and heads."""
    pairs = zip(found.reshape(-1, found.shape[-1]), best.reshape(-1, best.shape[-1]), strict=True)
    return float(np.mean([np.isin(right, left).mean() for left, right in pairs]))


def _read(name: str, slots: Slots, q: jax.Array, arguments: argparse.Namespace) -> tuple[Line, np.ndarray]:
    """Measures a reader; returns with it what it found [B, G, R, T, K]."""
    reader, documents = _reader(name, arguments), jnp.zeros(q.shape[:2], jnp.int32)
    read = jax.jit(lambda slots: table.read(q, documents, slots, reader)).lower(slots).compile()
    with Peak() as peak:
        seconds, _ = timed(lambda: read(slots), arguments.calls)
    q_BGRTH = attention.split_heads(q, slots.keys.shape[1])
    found = jax.jit(lambda slots: NEAREST[name](q_BGRTH, documents, slots, reader).index)(slots)
    return _line(seconds, q) | {"extra_bytes": peak.extra}, np.asarray(found)


def _line(seconds: list[float], q: jax.Array) -> Line:
    median = statistics.median(seconds)
    queries = q.shape[0] * q.shape[1] * q.shape[2]
    return {
        "queries": queries,
        "seconds_median": median,
        "seconds_min": min(seconds),
        "queries_per_second_a_head": queries / median,
    }


def one(name: str, arguments: argparse.Namespace) -> Line:
    """A reader of the whole memory, and its recall."""
    slots, q = jax.block_until_ready(KEYS[arguments.keys](arguments))
    line, found = _read(name, slots, q, arguments)
    best = found if name == "knn" else _read("knn", slots, q, _once(arguments))[1]
    return line | {"slots": slots.documents.shape[1], "recall": recall(found, best)}


def _once(arguments: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), "calls": 1})


def lists(arguments: argparse.Namespace) -> Line:
    """The inverted file beside knn in one process, by turns: a recall and latency curve over probes."""
    slots, q = KEYS[arguments.keys](arguments)
    length = slots.documents.shape[1]
    held = Memory(slots.keys[None], slots.values[None], slots.documents, jnp.full(1, length))
    build = jax.jit(index.build, static_argnums=1).lower(held, arguments.list_size).compile()
    began = time.perf_counter()
    held = jax.block_until_ready(build(held))
    build_seconds = time.perf_counter() - began
    curve, chosen = [], None
    for probes in sorted({arguments.probes // 4, arguments.probes // 2, arguments.probes, 2 * arguments.probes} - {0}):
        exact, best = _read("knn", slots, q, arguments)
        with_probes = argparse.Namespace(**{**vars(arguments), "probes": probes})
        line, found = _read("clustered", held.slots(0), q, with_probes)
        point = {
            "probes": probes,
            "recall": recall(found, best),
            "queries_per_second_a_head": line["queries_per_second_a_head"],
            "speedup": exact["seconds_median"] / line["seconds_median"],
        }
        curve.append(point)
        chosen = line | point if probes == arguments.probes else chosen
    return chosen | {"slots": length, "build_seconds": build_seconds, "curve": curve}


def faiss_flat(arguments: argparse.Namespace) -> Line:
    """FAISS's exact index of inner products, an index a head, one after the other."""
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    slots, q = KEYS[arguments.keys](arguments)
    queries = attention.split_heads(q, slots.keys.shape[1])[0].swapaxes(1, 2)
    queries = np.ascontiguousarray(queries).reshape(slots.keys.shape[1], -1, q.shape[-1])
    k = SIZES[arguments.size].neighbours
    indexes = []
    for keys_MH in slots.keys[0]:
        indexes.append(faiss.IndexFlatIP(keys_MH.shape[-1]))
        indexes[-1].add(np.asarray(keys_MH))
    with Peak() as peak:
        seconds, found = timed(
            lambda: [each.search(part, k)[1] for each, part in zip(indexes, queries, strict=True)], arguments.calls
        )
    best = _read("knn", slots, q, _once(arguments))[1]
    line = _line(seconds, q) | {"extra_bytes": peak.extra, "slots": slots.documents.shape[1]}
    # Queries of a key/value head's own query heads lie side by side in both.
    best = best[0].transpose(0, 2, 1, 3)
    return line | {"recall": recall(np.stack(found), best)}


CASES: dict[str, Callable[[argparse.Namespace], Line]] = {
    "faiss_flat": faiss_flat,
    "knn": functools.partial(one, "knn"),
    "approximate": functools.partial(one, "approximate"),
    "clustered": lists,
}


def wanted(workdir: str) -> list[tuple[str, str]]:
    """Returns (keys, case); lists of random directions would say nothing of real ones."""
    cases = [("random", name) for name in CASES if name != "clustered"]
    return cases + [("trained", name) for name in CASES if workdir]


def run_case(arguments: argparse.Namespace) -> Line:
    """Measures one case in this process."""
    about = {"case": arguments.case, "keys": arguments.keys, "size": arguments.size, "block": arguments.block}
    return about | CASES[arguments.case](arguments)


def run_fresh(keys: str, name: str, flags: list[str]) -> Line:
    """Measures one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.knn", *flags, f"--keys={keys}", f"--case={name}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: case {name} ended with code {done.returncode}; see above, and run it alone by --case={name}")
    return json.loads(done.stdout)


def bars(lines: list[Line]) -> list[Line]:
    """Returns a line for each bar: its value, its limit, and whether it is met; at the full size alone it counts."""
    at = {(line["keys"], line["case"]): line for line in lines}
    exact = at["random", "knn"]
    ratio = exact["queries_per_second_a_head"] / at["random", "faiss_flat"]["queries_per_second_a_head"]
    values = [
        ("knn / FAISS flat, queries/s, random keys", ratio, 1.0, "at least"),
        ("knn, bytes beyond keys and values", exact["extra_bytes"], 2**30, "at most"),
    ]
    if ("trained", "clustered") in at:
        line = at["trained", "clustered"]
        values += [
            ("clustered / knn, queries/s, trained keys", line["speedup"], 5.0, "at least"),
            ("clustered, recall there", line["recall"], 0.95, "at least"),
        ]
    counts = exact["size"] == "full"
    return [
        {"bar": name, "value": value, "limit": limit, "must_be": must_be, "met": met if counts else None}
        for name, value, limit, must_be in values
        for met in ((value <= limit) if must_be == "at most" else (value >= limit),)
    ]


def summary(lines: list[Line]) -> str:
    """Returns the cases as a table."""
    rows = [("keys", "reader", "slots", "queries/s a head", "recall", "MiB beyond keys and values")]
    for line in lines:
        rate, extra = f"{line['queries_per_second_a_head']:,.0f}", f"{line['extra_bytes'] / 2**20:,.0f}"
        rows.append((line["keys"], line["case"], f"{line['slots']:,}", rate, f"{line['recall']:.4f}", extra))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def _arguments(flags: list[str]) -> argparse.Namespace:
    default = EvaluateConfig()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.knn", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, help="measure this case alone, in this process")
    parser.add_argument("--keys", choices=KEYS, default="random", help="of the one case (default random)")
    parser.add_argument("--workdir", default="", help="folder of a run whose model's keys are searched too")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="tiny sizes")
    parser.add_argument("--calls", type=int, default=3, help="calls that are timed, after one that isn't (default 3)")
    for name in ("block", "list_size", "probes"):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=int, default=value, help=f"see fot.config (default {value})")
    arguments = parser.parse_args(flags)
    if arguments.keys == "trained" and not arguments.workdir:
        parser.error("--keys=trained needs --workdir")
    return arguments


def main(flags: list[str]) -> None:
    """Runs the command line."""
    arguments = _arguments(flags)
    if arguments.case:
        print(json.dumps(run_case(arguments)), flush=True)
        return
    lines = []
    with tqdm.tqdm(wanted(arguments.workdir), file=sys.stderr, unit="case") as progress:
        for keys, name in progress:
            progress.set_postfix_str(f"{name}, {keys} keys")
            lines.append(run_fresh(keys, name, flags))
            print(json.dumps(lines[-1]), flush=True)
    for line in bars(lines):
        print(json.dumps(line), flush=True)
    print(summary(lines), file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
