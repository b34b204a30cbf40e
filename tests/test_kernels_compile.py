"""Kernels by the TPU's own compiler, for every generation that has them, on devices that are not there."""

import dataclasses
import importlib.util
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import kernels as benchmark
from fot import crossbatch, joint, loading, local, model, sharding
from fot.attention import Tokens
from fot.compile import costs, generations, hlo
from fot.config import CrossbatchConfig, MeshConfig, ModelConfig
from fot.kernels.blocks import blocks_of
from fot.kernels.passes import Keys
from fot.memory import Memory
from fot.readers.reader import Reader
from fot.readers.table import read
from fot.sharding import ROWS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra `tpu`")
B = 8
TABLE = crossbatch.make_table(CrossbatchConfig(variant="segments", packing=4, groups=2), B, 1)


def compiled(topology: str, length: int, head_dim: int, heads: int = 4, kv_heads: int = 2) -> str:
    """Forward and backward, rows over two devices and heads over two: the program's text."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), generations.devices(topology)[:4])

    def loss(q, near, far, v, documents, positions):
        tokens = Tokens(documents, positions)
        return joint.attend(q, Keys(near, v), Keys(far, v), tokens, tokens, TABLE).out.astype(jnp.float32).sum()

    def arrays(count: int) -> jax.ShapeDtypeStruct:
        spread = NamedSharding(mesh, PartitionSpec(ROWS, None, "tensor"))
        return jax.ShapeDtypeStruct((B, length, count, head_dim), jnp.bfloat16, sharding=spread)

    tokens = jax.ShapeDtypeStruct((B, length), jnp.int32, sharding=sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        lowered = step.lower(arrays(heads), *3 * [arrays(kv_heads)], tokens, tokens)
    return lowered.compile().as_text()


@pytest.mark.parametrize(
    ("topology", "length", "head_dim"),
    [
        ("v4:2x2x1", 2048, 128),
        ("v4:2x2x1", 512, 64),
        ("v4:2x2x1", 640, 100),  # LLaMA 3B's heads; blocks that don't divide
        ("v5e:2x2", 1024, 128),
        ("v5p:2x2x1", 2048, 64),
        ("v6e:2x2", 2048, 128),
    ],
)
def test_they_compile_and_nothing_is_gathered_nor_are_there_logits(topology, length, head_dim):
    text = compiled(topology, length, head_dim)
    names = re.findall(r"%crossbatch_(\w+?)[.\d]* = .*tpu_custom_call", text)
    assert sorted(names) == ["forward", "key_gradients", "key_gradients", "query_gradients"]
    assert not re.search(r" (gather|scatter|all-gather)\(", text)
    # A row's queries in float32 are the largest that there is; logits of a block of them would be four times that.
    rows, heads = B // 2, 2
    largest = max(array.bytes for array in costs.largest(hlo.parse(text), 99))
    assert largest <= 4 * rows * heads * max(length, 1024) * 128
    work = costs.kernels(hlo.parse(text))
    blocks = -(-length // joint.BLOCK)
    pairs = rows * blocks * (blocks + 1) // 2 + 2 * int((TABLE.contexts_BC >= 0).sum()) // 4 * blocks**2
    assert work.flops >= (2 + 3 + 4) * 2 * heads * pairs * (length // blocks) ** 2 * head_dim
    assert work.bytes > 0


@pytest.mark.parametrize(
    ("topology", "tokens", "heads", "head_dim", "slots", "dtype"),
    [
        ("v4:2x2x1", 2048, 4, 128, 2**18, "bfloat16"),
        ("v4:2x2x1", 1, 4, 100, 5000, "bfloat16"),  # decoding; LLaMA 3B's heads; a last block that is cut
        ("v5e:2x2", 2048, 16, 128, 2**18, "bfloat16"),
        ("v5e:2x2", 1, 4, 64, 2**17, "float32"),
        ("v5p:2x2x1", 300, 4, 64, 2**17, "float32"),
        ("v6e:2x2", 1, 16, 128, 2**20, "bfloat16"),
    ],
)
@pytest.mark.parametrize("name", ["dense", "sharded_dense"])
def test_memory_attention_compiles_and_neither_copies_a_memory_nor_has_logits(
    name, topology, tokens, heads, head_dim, slots, dtype
):
    mesh = sharding.make_mesh(MeshConfig(tensor=2, sequence=2), generations.devices(topology)[:4])
    of_slots = "sequence" if name == "sharded_dense" else None
    reader = Reader(name, 1, 256, False, 0.9, 4, 2)

    def array(dtype: str, shape: tuple[int, ...], *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    place = loading.memory_format(mesh, of_slots)
    entries = jax.ShapeDtypeStruct((3, 1, 4, slots, head_dim), dtype, sharding=place.keys)
    held = Memory(entries, entries, array("int32", (1, slots), None, of_slots), array("int32", (1,)))
    q = array("bfloat16", (1, tokens, heads, head_dim), None, None, "tensor")
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda q, documents, held: read(q, documents, held.slots(1), reader)).lower(
            q, array("int32", (1, tokens)), held
        )
    text = lowered.compile().as_text()
    assert len(re.findall(r"%memory[.\d]* = .*tpu_custom_call", text)) == 1
    program = hlo.parse(text)
    own = slots // (2 if of_slots else 1)
    assert costs.kernels(program).flops >= 4 * tokens * heads // 2 * head_dim * own
    # Two heads' keys of a device.
    keys_bytes = 2 * own * head_dim * (2 if dtype == "bfloat16" else 4)
    assert max(array.bytes for array in costs.largest(program, 99)) <= max(
        keys_bytes // 8, 2 * 4 * max(tokens, 8) * heads * 128
    )


@pytest.mark.parametrize("name", ["dense", "sharded_dense"])
def test_a_memory_is_written_in_the_layout_in_which_it_is_read_and_given_up_for_the_new_one(name):
    mesh = sharding.make_mesh(MeshConfig(tensor=2, sequence=2), generations.devices("v4:2x2x1")[:4])
    store = loading.store_of(Reader(name, 1, 256, True, 0.9, 4, 2), mesh)
    place = loading.memory_format(mesh, "sequence" if name == "sharded_dense" else None)
    held = jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape[0], shape[1], sharding=where),
        Memory(*2 * [((3, 1, 4, 2**16, 100), jnp.bfloat16)], ((1, 2**16), jnp.int32), ((1,), jnp.int32)),
        place,
        is_leaf=lambda x: type(x) is tuple,
    )
    new = jax.ShapeDtypeStruct((3, 1, 512, 4, 100), jnp.bfloat16, sharding=sharding.replicated(mesh))
    documents = jax.ShapeDtypeStruct((1, 512), jnp.int32, sharding=sharding.replicated(mesh))
    written = store.write.lower(held, new, new, documents).compile()
    for made in (written.output_formats.keys, written.output_formats.values):
        assert made.layout.major_to_minor == place.keys.layout.major_to_minor
    own = 2 * 3 * 2 * 2**16 * 128 * 2 // (2 if name == "sharded_dense" else 1)
    assert written.memory_analysis().alias_size_in_bytes >= own
    assert written.memory_analysis().temp_size_in_bytes < own / 50  # it is written where it lies


@pytest.mark.parametrize(
    ("topology", "rows", "length", "head_dim"),
    [
        ("v4:2x2x1", B, 2048, 100),
        ("v4:2x2x1", 2, 2048, 100),  # one a device
        ("v4:2x2x1", B, 640, 64),
        ("v5e:2x2", B, 1024, 128),
        ("v5p:2x2x1", B, 2048, 64),
        ("v6e:2x2", B, 2048, 128),
    ],
)
def test_splash_attention_of_plain_layers_compiles_and_its_work_is_counted(topology, rows, length, head_dim):
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), generations.devices(topology)[:4])
    spread = NamedSharding(mesh, PartitionSpec(ROWS, None, "tensor"))
    q, kv = (jax.ShapeDtypeStruct((rows, length, n, head_dim), jnp.bfloat16, sharding=spread) for n in (4, 2))
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding.batch_sharding(mesh))

    def loss(q, k, v, documents, positions):
        return local.attend(q, k, v, Tokens(documents, positions), ModelConfig()).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, tokens, tokens).compile().as_text()
    assert splash_kernels(text) == ["dkv", "dq", "fwd"]
    padded = math.prod(blocks_of(length, local.BLOCK))
    work, pairs = (
        costs.kernels(hlo.parse(text)),
        rows // 2 * 2 * padded**2 // 2,
    )  # rows over two devices, heads over two
    assert work.flops == (2 + 3 + 4) * 2 * pairs * head_dim
    # Queries, keys and values of each kernel at least.
    assert work.bytes > 3 * 2 * (rows // 2) * (2 + 1 + 1) * length * head_dim


def splash_kernels(text: str) -> list[str]:
    return sorted(re.findall(r"%splash_mha_(fwd|dq|dkv)\w*[.\d]* = .*tpu_custom_call", text))


@pytest.mark.parametrize("remat", ["elementwise", "mlp"])
def test_the_forward_kernel_of_plain_layers_does_not_run_again_in_the_backward_pass(remat):
    config = ModelConfig(
        layers=2, memory_layers=(), dim=128, heads=2, kv_heads=2, head_dim=64, mlp_dim=256, remat=remat
    )
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), generations.devices("v4:2x2x1")[:1])
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    tokens = jax.ShapeDtypeStruct((B, 256), jnp.int32)

    def loss(params, ids, *tokens):
        return model.apply(params, ids, Tokens(*tokens), config).hidden.sum()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), in_shardings=sharding.replicated(mesh))
        text = step.lower(params, tokens, tokens, tokens).compile().as_text()
    # Layers are scanned: one of each kernel is one a layer.
    assert splash_kernels(text) == ["dkv", "dq", "fwd"]


def test_a_v3_compiles_the_jnp_form():
    config = ModelConfig(
        layers=2, memory_layers=(0,), dim=32, heads=2, kv_heads=2, head_dim=8, mlp_dim=32, attention_block=16
    )
    tokens = jax.ShapeDtypeStruct((B, 16), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), config))

    def text(topology: str, config: ModelConfig) -> str:
        mesh = sharding.make_mesh(MeshConfig(fsdp=1), generations.devices(topology)[:1])
        with jax.set_mesh(mesh):
            return (
                jax.jit(
                    lambda p, ids, *tokens: model.apply(p, ids, Tokens(*tokens), config, table=TABLE).hidden,
                    in_shardings=sharding.replicated(mesh),
                )
                .lower(params, tokens, tokens, tokens)
                .as_text()
            )

    kernels = text("v4:2x2x1", config)
    assert "tpu_custom_call" in kernels and "splash_mha_fwd" in kernels
    assert "tpu_custom_call" not in text("v3:2x2", config)
    assert "tpu_custom_call" not in text("v4:2x2x1", dataclasses.replace(config, attention_kernel="jnp"))


def test_the_benchmark_has_a_line_of_each_case(monkeypatch, capsys):
    flags = ["kernels", "--rows=4", "--heads=1", "--head_dim=64", "--context=256", "--slots=16384"]
    monkeypatch.setattr(sys, "argv", flags)
    benchmark.main()
    lines = {line["case"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(lines) == list(benchmark.CASES)
    assert all(line["cycles"] > 0 and line["temp_bytes"] >= 0 for line in lines.values())
    assert all((line["kernel_cycles"] > 0) == ("kernel" in case) for case, line in lines.items())
