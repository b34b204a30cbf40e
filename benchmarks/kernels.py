"""What the TPU's compiler makes of a memory layer's attention, on a pod that isn't there.

  python -m benchmarks.kernels        # LLaMA 3B on v4: 16 rows and 4 heads a device, LongLLaMA's segments
  python -m benchmarks.kernels --topology=v5e:2x2 --case=kernel
  python -m benchmarks.kernels --rows=4 --heads=1 --head_dim=64 --context=256

Cases of training, forward and backward: "local" is the row alone, as without crossbatch; "jnp" its contexts too, column
by column; "kernel" the same by the Pallas kernels. Cases of reading one layer of a bfloat16 memory of three layers and
`--slots` slots, a row a device, by a window of queries and by one: "memory_jnp" and "memory_kernel" are the reader
"dense", then come the readers that choose.

stdout has JSON, a line a case. Nothing is measured: "cycles" are the compiler's own estimate, which has none for
kernels; "kernel_cycles" are what these say that they do, at the hardware's peak: less than they will take.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from fot import attention, crossbatch, joint, loading, sharding
from fot.attention import Tokens
from fot.compile import costs, generations, hlo
from fot.config import CrossbatchConfig, ExperimentConfig, MeshConfig, ModelConfig
from fot.contexts import attend_contexts
from fot.kernels.passes import Keys
from fot.memory import Memory
from fot.readers.reader import of_config
from fot.readers.table import read
from fot.sharding import ROWS

BLOCK = 512  # queries per block of logits of the jnp forms, as in the LongLLaMA configs


def local(q, near, far, v, tokens, table):
    return attention.attend_local(q, near, v, tokens, BLOCK).out


def contexts(q, near, far, v, tokens, table):
    remote = attend_contexts(q, far, v, tokens, tokens, table, BLOCK)
    return attention.merge(attention.attend_local(q, near, v, tokens, BLOCK), remote).out


def kernel(q, near, far, v, tokens, table):
    return joint.attend(q, Keys(near, v), Keys(far, v), tokens, tokens, table).out


TRAINING = {"local": local, "jnp": contexts, "kernel": kernel}
# Reader and `model.attention_kernel`.
READING = {
    "memory_jnp": ("dense", "jnp"),
    "memory_kernel": ("dense", "auto"),
    "memory_knn": ("knn", "jnp"),
    "memory_approximate": ("approximate", "jnp"),
}
CASES = (*TRAINING, *(f"{case}_{queries}" for case in READING for queries in ("window", "one")))


def training(case: str, flags: argparse.Namespace, mesh: Mesh) -> Lowered:
    """Rows over two devices and heads over two."""
    rows, T = 2 * flags.rows, flags.context
    table = crossbatch.make_table(CrossbatchConfig(variant="segments", packing=4, groups=2), rows, 1)

    def loss(q, near, far, v, documents, positions):
        out = TRAINING[case](q, near, far, v, Tokens(documents, positions), table)
        return (out.astype(jnp.float32) ** 2).sum()

    spread = NamedSharding(mesh, PartitionSpec(ROWS, None, "tensor"))
    array = jax.ShapeDtypeStruct((rows, T, 2 * flags.heads, flags.head_dim), jnp.bfloat16, sharding=spread)
    numbers = jax.ShapeDtypeStruct((rows, T), jnp.int32, sharding=sharding.batch_sharding(mesh))
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*4 * [array], numbers, numbers)


def reading(case: str, flags: argparse.Namespace, mesh: Mesh) -> Lowered:
    """A row for each of two devices, heads over two."""
    name, _, queries = case.rpartition("_")
    reader, choice = READING[name]
    config = ExperimentConfig(model=ModelConfig(attention_kernel=choice))
    place = loading.memory_format(mesh)
    T = flags.context if queries == "window" else 1
    q = jax.ShapeDtypeStruct(
        (2, T, 2 * flags.heads, flags.head_dim),
        jnp.bfloat16,
        sharding=NamedSharding(mesh, PartitionSpec(ROWS, None, "tensor")),
    )
    shape = 3, 2, 2 * flags.heads, flags.slots, flags.head_dim
    entries = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place.keys)
    asked, held = (jax.ShapeDtypeStruct((2, n), jnp.int32, sharding=place.documents) for n in (T, flags.slots))
    memory = Memory(entries, entries, held, jax.ShapeDtypeStruct((2,), jnp.int32, sharding=place.written))
    how = of_config(reader, config)
    return jax.jit(lambda q, asked, memory: read(q, asked, memory.slots(1), how)).lower(q, asked, memory)


def line(case: str, flags: argparse.Namespace) -> dict[str, str | int | float]:
    """Compiles one case for four devices."""
    generation = generations.check(flags.topology)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), generations.devices(flags.topology)[:4])
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = (training if case in TRAINING else reading)(case, flags, mesh).compile()
    program = hlo.parse(compiled.as_text())
    return {
        "case": case,
        **vars(flags),
        "cycles": costs.cycles(program).total,
        "kernel_cycles": generation.cycles(*costs.kernels(program)),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v4:2x2x1")
    parser.add_argument("--rows", type=int, default=16, help="of a device, in packs of 4")
    parser.add_argument("--heads", type=int, default=4, help="of a device")
    parser.add_argument("--head_dim", type=int, default=100)
    parser.add_argument("--context", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--slots", type=int, default=2**18, help="of the memory")
    parser.add_argument("--case", choices=CASES, default=None)
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # nothing runs, so no accelerator is taken
    cases = [flags.case] if flags.case else list(CASES)
    del flags.case
    for case in cases:
        print(json.dumps(line(case, flags)), flush=True)


if __name__ == "__main__":
    main()
