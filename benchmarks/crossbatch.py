"""What crossbatch costs: train steps with and without contexts, and attention beside the plain formula.

  python -m benchmarks.crossbatch                    # all cases and the bars; minutes, on an otherwise idle machine
  python -m benchmarks.crossbatch --remat=mlp --unroll=4
  python -m benchmarks.crossbatch --case=train_7     # one case, in this process
  python -m benchmarks.crossbatch --quick            # everything, tiny: shows that it works, measures nothing

stdout has JSON alone: a line a case, each measured in a fresh process, then a line a bar. Peak memory is a process's
maximum resident size, all of Python and the compiler included ("compiled_peak": as it was before the first call).
Cases whose times are compared are also timed by turns in one process ("step_pair", "matmul_pair"), because a machine's
speed drifts from one process to the next.
"""

import argparse
import dataclasses
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from fot import attention, config, crossbatch, sharding, train_step
from fot.attention import Partial, Tokens
from fot.batch import Batch
from fot.contexts import attend_contexts
from fot.crossbatch import Table

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured: the model, `rows` rows of `context` tokens, and the matrix product to compare with."""

    model: config.ModelConfig
    rows: int
    context: int
    matmul: int


SIZES = {
    "full": Size(
        config.ModelConfig(
            vocab_size=8192, layers=12, dim=512, heads=8, kv_heads=8, head_dim=64, mlp_dim=2048, memory_layers=(8,)
        ),
        rows=8,
        context=512,
        matmul=2048,
    ),
    "quick": Size(
        config.ModelConfig(
            vocab_size=64, layers=2, dim=32, heads=4, kv_heads=4, head_dim=8, mlp_dim=64, memory_layers=(1,)
        ),
        rows=8,
        context=64,
        matmul=256,
    ),
}
MOST_CONTEXTS = 7  # all the other rows

# The released JAX code of LongLLaMA at the full size, remat on: seconds a step and peak bytes of its process, by
# contexts per row. Measured elsewhere on the same kind of machine; for orientation, not measured again here.
RELEASED_SECONDS = {2: 20.5, 7: 23.1}
RELEASED_BYTES = {2: 5.8e9, 7: 6.85e9}

# Page faults would be a good part of what is measured; `make` sets this, too.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if sys.platform == "linux" else {}

# The same for every case of a size. Full: no step from a cache. Quick: nothing is measured, so compile fast.
ENVIRONMENT = {
    "full": {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        **HUGE_PAGES,
    },
    "quick": {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    },
}

# Two processes that do the same differ in peak memory by about this much; a smaller difference counts as this.
NOISE_BYTES = 1 << 20


class Trainer:
    """One training state, and compiled train steps with different contexts that take turns on it."""

    def __init__(self, size: Size, contexts: Iterable[int]):
        self._state, self._batch = None, None
        self.compiled, self.compile_seconds, self.flops = {}, {}, {}
        for count in contexts:
            experiment = config.ExperimentConfig(
                model=size.model,
                crossbatch=_crossbatch(count),
                data=config.DataConfig(context=size.context, batch_size=size.rows),
            )
            mesh = sharding.make_mesh(experiment.mesh, jax.devices())
            if self._state is None:
                initial = functools.partial(train_step.init_state, experiment)
                shardings = sharding.shardings(jax.eval_shape(initial), mesh)
                self._state = jax.block_until_ready(jax.jit(initial, out_shardings=shardings)())
                self._batch = jax.device_put(random_batch(size), sharding.batch_sharding(mesh))
            began = time.perf_counter()
            self.compiled[count] = train_step.compile_step(experiment, mesh, 1)
            self.compile_seconds[count] = time.perf_counter() - began
            self.flops[count] = train_step.step_flops(experiment, 1)

    def step(self, contexts: int) -> None:
        """Makes one train step and waits for it."""
        self._state, metrics = self.compiled[contexts](self._state, self._batch)
        jax.block_until_ready((self._state, metrics))


def _crossbatch(contexts: int) -> config.CrossbatchConfig:
    """Every row sees the `contexts` rows before it, all of them negatives."""
    if contexts == 0:
        return config.CrossbatchConfig(variant="none", packing=1)
    return config.CrossbatchConfig(variant="segments", packing=1, segments=((0, contexts),))


def random_batch(size: Size) -> Batch:
    """Returns random tokens, a document a row."""
    shape = (size.rows, size.context)
    tokens = np.random.default_rng(0).integers(size.model.vocab_size, size=shape, dtype=np.int32)
    documents = np.broadcast_to(np.arange(size.rows, dtype=np.int32)[:, None], shape)
    positions = np.broadcast_to(np.arange(size.context, dtype=np.int32), shape)
    return Batch(tokens, np.roll(tokens, -1, axis=1), np.ones(shape, np.float32), documents, positions)


def peak_rss_bytes() -> int:
    """Returns the largest resident size that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def take_turns(calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Returns the seconds of each call in `rounds` rounds in which all take their turn; a first round isn't counted."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def train_case(size: Size, steps: int, contexts: int) -> Line:
    """The whole train step: peak memory, and speed."""
    trainer = Trainer(size, (contexts,))
    compiled_peak = peak_rss_bytes()
    seconds = take_turns({contexts: functools.partial(trainer.step, contexts)}, steps)[contexts]
    median = statistics.median(seconds)
    return {
        "contexts": contexts,
        "compile_seconds": trainer.compile_seconds[contexts],
        "compiled_peak_rss_bytes": compiled_peak,
        "temp_bytes": trainer.compiled[contexts].memory_analysis().temp_size_in_bytes,
        "step_seconds_median": median,
        "step_seconds_min": min(seconds),
        "tokens_per_second": size.rows * size.context / median,
        "model_flops": trainer.flops[contexts],
        "model_flops_per_second": trainer.flops[contexts] / median,
    }


def step_pair(size: Size, steps: int) -> Line:
    """Train steps without contexts and with all the others, by turns."""
    trainer = Trainer(size, (0, MOST_CONTEXTS))
    seconds = take_turns({n: functools.partial(trainer.step, n) for n in (0, MOST_CONTEXTS)}, steps)
    none, seven = (statistics.median(seconds[n]) for n in (0, MOST_CONTEXTS))
    return {
        "step_seconds_median_0": none,
        "step_seconds_median_7": seven,
        "step_seconds_min_0": min(seconds[0]),
        "step_seconds_min_7": min(seconds[MOST_CONTEXTS]),
        "ratio": seven / none,
    }


def matmul_pair(size: Size, steps: int) -> Line:
    """The train step without contexts and square float32 matrix products, by turns: shares of the machine's speed."""
    trainer, n, repeats = Trainer(size, (0,)), size.matmul, 5
    left, right = jax.random.normal(jax.random.key(0), (2, n, n))
    product = jax.jit(jnp.matmul)

    def products() -> None:
        for _ in range(repeats):
            product(left, right).block_until_ready()

    seconds = take_turns({"step": functools.partial(trainer.step, 0), "matmul": products}, steps)
    step, matmul = (statistics.median(seconds[name]) for name in ("step", "matmul"))
    step_flops, matmul_flops = trainer.flops[0] / step, repeats * 2 * n**3 / matmul
    return {
        "step_seconds_median": step,
        "model_flops_per_second": step_flops,
        "matmul_size": n,
        "matmul_flops_per_second": matmul_flops,
        "ratio": step_flops / matmul_flops,
    }


Attend = Callable[[jax.Array, jax.Array, jax.Array, Tokens, Table, int], Partial]


def attend_local(q, k, v, tokens, table, block) -> Partial:
    """The baseline: no contexts."""
    return attention.attend_local(q, k, v, tokens, block)


def attend_ours(q, k, v, tokens, table, block) -> Partial:
    """Local attention and contexts as the model has them."""
    contexts = attend_contexts(q, k, v, tokens, tokens, table, block)
    return attention.merge(attention.attend_local(q, k, v, tokens, block), contexts)


def attend_plain(q, k, v, tokens, table, block) -> Partial:
    """The plain formula: gathers all contexts of each row and forms all logits, for one softmax."""
    B = len(q)
    rows_BC = np.concatenate([np.arange(B)[:, None], table.contexts_BC], axis=1)
    others_BC = np.concatenate([np.zeros((B, 1), bool), table.negative_BC], axis=1)

    def gather(x: jax.Array) -> jax.Array:
        return x[rows_BC].reshape(B, -1, *x.shape[2:])

    masks = [
        attention.visible(tokens, Tokens(tokens.documents[rows_B], tokens.positions[rows_B]), others_B)
        for rows_B, others_B in zip(rows_BC.T, others_BC.T, strict=True)
    ]
    logits_BNTS = jnp.einsum("btnh,bsnh->bnts", q, gather(k), preferred_element_type=jnp.float32)
    logits_BNTS = jnp.where(jnp.concatenate(masks, axis=-1)[:, None], logits_BNTS, -jnp.inf)
    weights_BNTS = jax.nn.softmax(logits_BNTS, axis=-1)
    out_BTNH = jnp.einsum("bnts,bsnh->btnh", weights_BNTS, gather(v), preferred_element_type=jnp.float32)
    return Partial(out_BTNH, jax.nn.logsumexp(logits_BNTS, axis=-1).swapaxes(1, 2))


def attention_case(size: Size, steps: int, attend: Attend) -> Line:
    """Attention of one memory layer with all other rows as contexts: its value, and gradients of its inputs."""
    model, documents = size.model, random_batch(size)
    tokens = Tokens(jnp.asarray(documents.documents), jnp.asarray(documents.positions))
    table = crossbatch.make_table(_crossbatch(MOST_CONTEXTS), size.rows, 1)
    # One at a time and in float32: what is held for a moment here would hide as much of what attention needs.
    random = np.random.default_rng(1)
    shape = (size.rows, size.context, model.heads, model.head_dim)
    *inputs, cotangent = (jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(4))

    def value(inputs: list[jax.Array], cotangent: jax.Array, tokens: Tokens) -> jax.Array:
        q, k, v = inputs
        out = attend(q * model.head_dim**-0.5, k, v, tokens, table, model.attention_block).out
        return (out * cotangent).sum()

    began = time.perf_counter()
    compiled = jax.jit(jax.value_and_grad(value)).lower(inputs, cotangent, tokens).compile()
    compile_seconds, compiled_peak = time.perf_counter() - began, peak_rss_bytes()
    call = functools.partial(compiled, inputs, cotangent, tokens)
    seconds = take_turns({"call": lambda: jax.block_until_ready(call())}, steps)["call"]
    result, gradients = call()
    return {
        "compile_seconds": compile_seconds,
        "compiled_peak_rss_bytes": compiled_peak,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "value": float(result),
        "gradient_norms": [float(jnp.linalg.norm(g)) for g in gradients],
    }


CASES: dict[str, Callable[[Size, int], Line]] = {
    "train_0": functools.partial(train_case, contexts=0),
    "train_2": functools.partial(train_case, contexts=2),
    "train_7": functools.partial(train_case, contexts=MOST_CONTEXTS),
    "step_pair": step_pair,
    "matmul_pair": matmul_pair,
    "attention_local": functools.partial(attention_case, attend=attend_local),
    "attention_ours": functools.partial(attention_case, attend=attend_ours),
    "attention_plain": functools.partial(attention_case, attend=attend_plain),
}


def run_case(name: str, arguments: argparse.Namespace) -> Line:
    """Measures one case in this process."""
    size = SIZES[arguments.size]
    changed = {"remat": arguments.remat, "unroll": arguments.unroll, "attention_block": arguments.attention_block}
    size = dataclasses.replace(size, model=dataclasses.replace(size.model, **changed))
    line = CASES[name](size, arguments.steps)
    line = {"case": name, "size": arguments.size, **changed, "steps": arguments.steps, **line}
    return line | {"peak_rss_bytes": peak_rss_bytes()}


def run_fresh(name: str, size: str, flags: list[str]) -> Line:
    """Measures one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.crossbatch", *flags, f"--case={name}"]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT[size], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: case {name} ended with code {done.returncode}; see above, and run it alone by --case={name}")
    return json.loads(done.stdout)


def bars(lines: dict[str, Line]) -> list[Line]:
    """Returns a line for each bar: its value, its limit, and whether it is met; at the full size alone it counts."""

    def extra(key: str) -> float:
        ours, plain, baseline = (lines[f"attention_{name}"][key] for name in ("ours", "plain", "local"))
        return max(ours - baseline, NOISE_BYTES) / max(plain - baseline, NOISE_BYTES)

    most = [
        ("step with 7 contexts / step without", lines["step_pair"]["ratio"], 1.25),
        ("attention: extra peak memory / plain formula's", extra("peak_rss_bytes"), 0.25),
        ("attention: extra buffers of the compiled function / plain formula's", extra("temp_bytes"), 0.25),
    ]
    least = [("step FLOP/s / matrix product's", lines["matmul_pair"]["ratio"], 0.55)]
    for contexts, seconds in RELEASED_SECONDS.items():
        line = lines[f"train_{contexts}"]
        with_contexts = f"with {contexts} contexts / released code's"
        least.append((f"tokens/s {with_contexts}", seconds / line["step_seconds_median"], 1.5))
        most.append((f"peak memory {with_contexts}", line["peak_rss_bytes"] / RELEASED_BYTES[contexts], 0.6))
    counts = lines["train_0"]["size"] == "full"
    return [
        {"bar": name, "value": value, "limit": limit, "must_be": must_be, "met": (met if counts else None)}
        for must_be, group in (("at most", most), ("at least", least))
        for name, value, limit in group
        for met in ((value <= limit) if must_be == "at most" else (value >= limit),)
    ]


def _arguments(flags: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crossbatch", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, help="measure this case alone, in this process")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="tiny sizes")
    parser.add_argument("--steps", type=int, default=5, help="calls that are timed, after one that isn't (default 5)")
    parser.add_argument(
        "--remat", choices=config.REMATS, default="elementwise", help="see fot.config (default elementwise)"
    )
    parser.add_argument("--unroll", type=int, default=1, help="see fot.config (default 1)")
    parser.add_argument("--attention_block", type=int, default=128, help="see fot.config (default 128)")
    return parser.parse_args(flags)


def main(flags: list[str]) -> None:
    """Runs the command line."""
    arguments = _arguments(flags)
    if arguments.case:
        print(json.dumps(run_case(arguments.case, arguments)), flush=True)
        return
    lines = {}
    with tqdm.tqdm(CASES, file=sys.stderr, unit="case") as progress:
        for name in progress:
            progress.set_postfix_str(name)
            lines[name] = run_fresh(name, arguments.size, flags)
            print(json.dumps(lines[name]), flush=True)
    for line in bars(lines):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
