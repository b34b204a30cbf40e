"""Contexts of other devices: the numbers of one device, and what devices send each other for them."""

import dataclasses
import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fot import checkpoint, crossbatch, joint, ring, sharding
from fot.attention import Tokens
from fot.compile import costs, generations, hlo
from fot.config import CrossbatchConfig, MeshConfig, ModelConfig
from fot.contexts import attend_contexts
from fot.crossbatch import Table
from fot.errors import ConfigError
from fot.kernels.passes import Keys
from fot.sharding import ROWS

B, T, N, G, H = 16, 6, 4, 2, 4
SEGMENTS = ((0, 0), (1, 2), (2, 5), (3, 4))
CASES = {
    "own": CrossbatchConfig(groups=8),
    "half": CrossbatchConfig(d=(4,), groups=2),
    "next": CrossbatchConfig(d=(2,)),
    "some": CrossbatchConfig(d=(4,)),
    "all shards": CrossbatchConfig(d=(8,)),
    "w = 3": CrossbatchConfig(packing=4, w=3, d=(2,)),
    "packs of 8": CrossbatchConfig(packing=8, w=5, d=(2,)),
    "segments": CrossbatchConfig(variant="segments", packing=4, segments=SEGMENTS),
    "released": CrossbatchConfig(variant="released", packing=4, range=7),
    "released, all": CrossbatchConfig(variant="released", packing=1, range=15, stepping=False),
}
MESHES = {
    "fsdp": MeshConfig(fsdp=8),
    "data, fsdp": MeshConfig(data=2, fsdp=4),
    "data, fsdp, tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp, sequence": MeshConfig(fsdp=4, sequence=2),
}


def table_of(case: str) -> Table:
    return crossbatch.make_table(CASES[case], B, CASES[case].d[0])


def lonely() -> Table:
    """Of the rows of the second half none sees a thing; those of the first see every other shard, one of them twice."""
    contexts, negative = np.full((B, 4), -1, np.int32), np.zeros((B, 4), bool)
    contexts[: B // 2] = (np.arange(B // 2)[:, None] + [4, 8, 12, 13]) % B
    negative[: B // 2, 1:] = True
    return Table(contexts, negative)


def set_mesh(config: MeshConfig):
    return jax.set_mesh(sharding.make_mesh(config, jax.devices()))


# Routes.


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_each_context_is_met_once_where_it_lies(case, shards):
    table = table_of(case)
    with set_mesh(MeshConfig(fsdp=shards, tensor=8 // shards)):
        route = ring.route(table, B, "ring")
    found = []
    for offset, stop in zip(route.trip.offsets, route.tables, strict=True):
        assert offset == 0 or (stop.contexts_BC >= 0).any()
        assert stop.contexts_BC.shape[1] == (stop.contexts_BC >= 0).sum(1).max(initial=0)
        assert (stop.contexts_BC < route.rows).all() and not stop.negative_BC[stop.contexts_BC < 0].any()
        for row, column in np.argwhere(stop.contexts_BC >= 0):
            here, size = row // route.rows, route.trip.ring
            first = (here // size * size + (here + offset) % size) * route.rows
            found.append((row, first + stop.contexts_BC[row, column], stop.negative_BC[row, column]))
    wanted = [(r, table.contexts_BC[r, c], table.negative_BC[r, c]) for r, c in np.argwhere(table.contexts_BC >= 0)]
    assert sorted(found) == sorted(wanted)
    assert route.trip.offsets[0] == 0 and len(set(route.trip.offsets)) == len(route.trip.offsets)


@pytest.mark.parametrize(
    ("case", "offsets"),
    [
        ("own", (0,)),
        ("half", (0, 1, 2, 3)),
        ("next", (0, 1)),
        ("some", (0, 1, 2, 3)),
        ("w = 3", (0, 1, 2, 7)),
        ("released", (0, 7, 6, 5)),
    ],
)
def test_shards_that_nobody_sees_are_passed_and_the_nearest_is_next(case, offsets):
    with set_mesh(MeshConfig(fsdp=8)):
        route = ring.route(table_of(case), B, "ring")
    assert route.trip.offsets == offsets


def test_groups_of_several_shards_are_rings_of_their_own():
    with set_mesh(MeshConfig(fsdp=8)):
        assert [ring.route(table_of(case), B, "ring").trip.ring for case in ("own", "half", "next")] == [1, 4, 8]


def test_what_is_of_the_device_never_travels_and_rows_that_do_not_divide_are_the_compilers():
    with set_mesh(MeshConfig(fsdp=8)):
        for exchange in ("ring", "gather"):
            own = ring.route(table_of("own"), B, exchange)
            assert not own.gathers and own.trip == ring.Trip(8, 1, (0,)) and own.rows == 2
            few = ring.route(Table(*(x[:4] for x in table_of("all shards"))), B, exchange)
            assert few.axis is None and few.trip == ring.Trip(1, 1, (0,))
        gather = ring.route(table_of("next"), B, "gather")
        assert gather.gathers and gather.trip == ring.Trip(8, 8, (0,)) and gather.rows == B


def test_rows_with_a_loss_lie_where_their_packs_do():
    last = crossbatch.loss_rows(CrossbatchConfig(packing=2, loss_rows="last"))
    with set_mesh(MeshConfig(fsdp=8)):
        route = ring.route(Table(*(x[last] for x in table_of("some"))), B, "ring")
    assert route.trip.offsets == (0, 1, 2, 3)
    for stop in route.tables:
        np.testing.assert_array_equal(stop.contexts_BC, np.zeros((8, 1)))


# Attention.


def tokens() -> Tokens:
    """A document a pack of 8 rows, from which others begin in rows 3 and 9; the last row ends in padding."""
    rows = np.arange(B).repeat(T).reshape(B, T)
    documents = rows // 8 + 2 * (rows == 3) + 3 * (rows == 9)
    positions = np.arange(B * T).reshape(B, T) % (8 * T)
    documents[-1, -2:] = -1
    return Tokens(jnp.asarray(documents, jnp.int32), jnp.asarray(positions, jnp.int32))


def results(table: Table, exchange: str, rows: slice = slice(None)):
    draw = np.random.default_rng(0).normal
    q, k, v = (jnp.asarray(draw(size=(B, T, heads, H)), jnp.float32) for heads in (N, G, G))

    def loss(q, k, v):
        queries = Tokens(*(x[rows] for x in tokens()))
        part = attend_contexts(q[rows], k, v, queries, tokens(), table, 4, exchange)
        weighted = jnp.sin(jnp.arange(part.out.size).reshape(part.out.shape)) * part.out
        return weighted.sum() + jnp.where(jnp.isfinite(part.lse), part.lse, 0).sum(), part

    return jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v))


@functools.cache
def alone(case: str):
    return results(table_of(case), "ring")


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


USUAL = (
    ("next", "fsdp"),
    ("half", "data, fsdp"),
    ("all shards", "data, fsdp"),
    ("segments", "data, fsdp, tensor"),
    ("released", "fsdp, sequence"),
)


def _pairs():
    """Every case with every mesh; but for one case a mesh, only when asked for."""
    for pair in itertools.product(CASES, MESHES):
        yield pytest.param(*pair, marks=[] if pair in USUAL else [pytest.mark.slow])


@pytest.mark.parametrize(("case", "mesh"), [*_pairs()])
def test_around_the_ring_are_the_values_and_gradients_of_one_device(case, mesh):
    with set_mesh(MESHES[mesh]):
        spread = results(table_of(case), "ring")
    close(spread, alone(case))


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize("mesh", ["fsdp", "data, fsdp, tensor"])
def test_shards_that_see_nothing_go_along(mesh, exchange):
    with set_mesh(MESHES[mesh]):
        spread = results(lonely(), exchange)
    close(spread, results(lonely(), "ring"))
    assert np.isneginf(spread[1].lse[B // 2 :]).all() and (spread[1].out[B // 2 :] == 0).all()


def test_queries_of_some_rows_go_around():
    last = crossbatch.loss_rows(CrossbatchConfig(packing=2, loss_rows="last"))
    table = Table(*(x[last] for x in table_of("some")))
    with set_mesh(MESHES["data, fsdp"]):
        spread = results(table, "ring", last)
    close(spread, results(table, "ring", last))


# What devices send.


def step(d: int, exchange: str, groups: int = 1, rows: int = B) -> jax.stages.Compiled:
    """Forward and backward with packs of 2 rows over 8 devices, so that d is also the shards that a row sees."""
    table = crossbatch.make_table(CrossbatchConfig(packing=2, d=(d,), groups=groups), rows, d)
    mesh = sharding.make_mesh(MeshConfig(fsdp=8), jax.devices())
    spread = NamedSharding(mesh, PartitionSpec(ROWS))

    def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, T, *shape), dtype, sharding=spread)

    def loss(q, k, v, documents, positions):
        at = Tokens(documents, positions)
        return (attend_contexts(q, k, v, at, at, table, T, exchange).out ** 2).sum()

    numbers = array(dtype=jnp.int32)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=spread)
        return gradient.lower(array(N, H), array(G, H), array(G, H), numbers, numbers).compile()


def sent(d: int, exchange: str, groups: int = 1, rows: int = B) -> dict[str, int]:
    """Bytes that a device sends, by the kind of collective."""
    found = {}
    for each in costs.collectives(hlo.parse(step(d, exchange, groups, rows).as_text())):
        found[each.kind] = found.get(each.kind, 0) + each.sent_bytes
    return {kind: size for kind, size in found.items() if size}


def test_the_ring_sends_a_shard_a_hop_and_gathers_nothing():
    shard = B // 8 * T * G * H * 4
    moved = {d: sent(d, "ring") for d in (1, 2, 4, 8)}
    assert moved[1] == {} and all(kinds.keys() == {"collective-permute"} for d, kinds in moved.items() if d > 1)
    each = {d: kinds["collective-permute"] for d, kinds in moved.items() if d > 1}
    assert each[8] - each[4] == 2 * (each[4] - each[2]) > 0
    # Keys and values forward and backward, their gradients backward, documents and positions of tokens both times. The
    # CPU's compiler keeps what came forward, and sends it once.
    once, twice = 4 * shard + 2 * B // 8 * T * 4, 6 * shard + 4 * B // 8 * T * 4
    assert once <= (each[8] - each[4]) / 4 <= twice
    assert each[2] <= twice + 2 * shard  # and the gradients go home


def test_one_all_gather_sends_the_same_for_any_contexts_of_other_devices():
    assert "all-gather" in sent(2, "gather") and sent(2, "gather") == sent(8, "gather")


@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_groups_of_a_device_send_nothing_whatever_d_is(exchange):
    assert [sent(d, exchange, groups=8, rows=64) for d in (1, 2, 4)] == 3 * [{}]


def test_the_exchange_is_one_that_there_is():
    with pytest.raises(ConfigError, match="attention_exchange='rings' is not one of ring, gather; did you mean 'ring'"):
        dataclasses.replace(ModelConfig(), attention_exchange="rings")


def test_a_run_may_go_on_with_another_exchange():
    assert "model.attention_exchange" in checkpoint.CHANGEABLE


libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra `tpu`")


def for_tpu(topology: str, rows: int, length: int, d: int, attend, effort: float) -> jax.stages.Compiled:
    """Forward and backward, with packs of 2 rows, on devices that are not there."""
    table = crossbatch.make_table(CrossbatchConfig(packing=2, d=(d,)), rows, d)
    mesh = sharding.make_mesh(MeshConfig(fsdp=-1), generations.devices(topology))
    spread = NamedSharding(mesh, PartitionSpec(ROWS))
    x = jax.ShapeDtypeStruct((rows, length, 8, 128), jnp.bfloat16, sharding=spread)
    numbers = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=spread)

    def loss(q, k, v, documents, positions):
        return attend(q, k, v, Tokens(documents, positions), table).out.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=spread)
        return gradient.lower(x, x, x, numbers, numbers).compile({"exec_time_optimization_effort": effort})


def plain(q, k, v, tokens: Tokens, table: Table):
    return attend_contexts(q, k, v, tokens, tokens, table, 2048, "ring")


def kernels(q, k, v, tokens: Tokens, table: Table, exchange: str = "ring"):
    return joint.attend(q, Keys(k, v), Keys(k, v), tokens, tokens, table, exchange)


@libtpu
@pytest.mark.parametrize("attend", [plain, kernels])
def test_a_tpu_attends_while_the_next_shard_comes_and_holds_no_more_for_more_of_them(attend):
    few, many = (for_tpu("v5e:2x4", 16, 2048, d, attend, 0.0) for d in (4, 8))
    program = hlo.parse(many.as_text())
    under_way, worked = set(), set()
    for instruction in program.computations[program.entry].values():
        if instruction.opcode == "collective-permute-start":
            under_way.add(instruction.name)
        elif instruction.opcode == "collective-permute-done":
            under_way -= {*instruction.operands}
        elif "tpu_custom_call" in instruction.attributes or "dot_general" in instruction.attributes:
            worked |= under_way
    sizes = [hlo.shape_bytes(program.computations[program.entry][name].shape) for name in worked]
    assert sum(size > 2**20 for size in sizes) >= 2 * 7 + 4 * 6  # keys and values there, and back with their gradients
    held = [compiled.memory_analysis().temp_size_in_bytes for compiled in (few, many)]
    assert held[1] - held[0] < 2 * 2 * 2048 * 8 * 128 * 2  # less than one shard's keys and values, with four more hops


@libtpu
def test_contexts_that_one_device_can_not_hold_come_around_the_ring():
    """16 devices with 0.5 GiB of keys and values each."""
    size = "v5e:4x4", 128, 16384, 64
    held = for_tpu(*size, kernels, -1.0).memory_analysis()
    assert held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes < 8 * 2**30
    with pytest.raises(jax.errors.JaxRuntimeError, match="Ran out of memory"):
        for_tpu(*size, functools.partial(kernels, exchange="gather"), -1.0)
