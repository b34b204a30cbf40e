"""The kernel of memory attention without a TPU: equal to its reference, free of races; and where readers use it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from fot import cache, sharding
from fot.attention import Partial
from fot.config import ExperimentConfig, MeshConfig, ModelConfig
from fot.kernels import memory as kernels
from fot.memory import Memory, Slots, Stack
from fot.readers.reader import Reader, of_config
from fot.readers.table import read

B, G, H = 2, 2, 8


def draw(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


def slots_of(M: int, filled: tuple[tuple[int, int], ...], dtype: str = "float32") -> Slots:
    """Slots of documents 0, 1 and 2, in use from and to where `filled` says, of each row."""
    place = np.arange(M)
    documents = [np.where((place >= begin) & (place < end), place % 3, -1) for begin, end in filled]
    keys, values = (draw(B, G, M, H, seed=seed, dtype=dtype) for seed in (1, 2))
    return Slots(keys, values, jnp.asarray(np.stack(documents), jnp.int32))


def read_by(attend, queries: tuple[jax.Array, jax.Array], slots: Slots, *rest) -> kernels.Read:
    """Of the second of two layers, the first of which is not a number."""
    stack = Stack(*(jnp.stack([jnp.full_like(x, jnp.nan), x]) for x in slots[:2]), 1)
    return attend(*queries, stack, slots.documents, *rest)


def queries(Q: int) -> tuple[jax.Array, jax.Array]:
    """Queries of documents 0 to 3, the last of which has no slots, and of none."""
    return draw(B, G, Q, H), jnp.asarray(np.arange(B * Q).reshape(B, Q) % 5 - 1, jnp.int32)


def close(left, right, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


SOME = ((0, 30), (17, 50))  # one row's first slots, the other's last ones


@pytest.mark.parametrize("multi_doc", [True, False])
@pytest.mark.parametrize(
    ("M", "Q", "block"),
    [
        (50, 1, (8, 16)),  # one query, a last block that is cut
        (50, 12, (8, 16)),  # two blocks of queries, the second padded
        (48, 8, (8, 16)),
        (50, 8, (8, 64)),  # one block
    ],
)
def test_the_kernel_equals_the_reference(M, Q, block, multi_doc):
    arguments = queries(Q), slots_of(M, SOME), multi_doc, True, block
    found = read_by(kernels.attend, *arguments)
    close(found, read_by(kernels.reference, *arguments))
    blind = np.isneginf(np.asarray(found.lse))
    assert blind.any() != multi_doc and (np.asarray(found.out)[blind] == 0).all()


@pytest.mark.parametrize("filled", [((0, 0), (0, 50)), ((0, 0), (0, 0)), ((49, 50), (16, 32))])
def test_it_does_where_rows_have_nothing_or_little(filled):
    """Blocks in the middle and at the end that are empty, and rows whose blocks all are."""
    arguments = queries(4), slots_of(50, filled), True, True, (8, 16)
    close(read_by(kernels.attend, *arguments), read_by(kernels.reference, *arguments))


def test_a_memory_without_slots_gives_nothing():
    out, lse = read_by(kernels.attend, queries(4), slots_of(0, SOME), True, True)
    assert out.shape == (B, G, 4, H) and not np.asarray(out).any() and np.isneginf(np.asarray(lse)).all()


def test_only_blocks_in_use_are_brought_in():
    order, used = kernels._used(slots_of(50, ((0, 20), (33, 34))).documents, 16)
    assert used.tolist() == [2, 1]
    assert order.tolist() == [0, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("M", "Q", "dtype", "size"),
    [
        (10**6, 512, "bfloat16", 1024),
        (10**6, 1, "bfloat16", 4096),
        (10**6, 1, "float32", 2048),
        (1000, 512, "bfloat16", 1000),
    ],
)
def test_as_many_slots_are_brought_in_as_fit(M, Q, dtype, size):
    keys = jax.ShapeDtypeStruct((3, 1, 1, M, 100), dtype)
    assert kernels._size(keys, Q, kernels.BLOCK[1]) == size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bfloat16_memory_is_read_as_the_reference_reads_it(dtype):
    """By queries in bfloat16, or in float32: products are of the wider of the two."""
    q, documents = queries(12)
    arguments = (q.astype(dtype), documents), slots_of(50, SOME, "bfloat16"), True, True, (8, 16)
    exact = read_by(kernels.reference, (q, documents), slots_of(50, SOME), *arguments[2:])
    found, wanted = read_by(kernels.attend, *arguments), read_by(kernels.reference, *arguments)
    assert found.out.dtype == wanted.out.dtype == jnp.float32
    for mine, reference, true in zip(found, wanted, exact, strict=True):
        assert jnp.abs(mine - true).max() < 2 * jnp.abs(reference - true).max() + 0.01


def test_the_kernel_has_no_races():
    arguments = queries(12), slots_of(50, SOME), False
    pltpu.reset_tpu_interpret_mode_state()
    found = read_by(kernels.attend, *arguments, pltpu.InterpretParams(detect_races=True), (8, 16))
    close(found, read_by(kernels.reference, *arguments, True))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


# Where it is used.


READER = Reader("dense", 1, 16, True, 0.9, 4, 2, attention_kernel="pallas")
SPREAD = MeshConfig(data=2, tensor=2, sequence=2)


def value_and_gradients(reader: Reader, mesh: MeshConfig | None = None):
    """What a reader gives of the second of two layers; gradients of a weighted sum by queries, all keys and values."""
    slots = slots_of(48, ((0, 30), (17, 48)))
    keys, values = (jnp.stack([jnp.full_like(x, jnp.nan), x]) for x in slots[:2])
    q, documents = draw(B, 6, 2 * G, H), jnp.asarray(np.arange(B * 6).reshape(B, 6) % 3, jnp.int32)

    @jax.jit
    def run(q, keys, values):
        def loss(q, keys, values) -> tuple[jax.Array, Partial]:
            memory = Memory(keys, values, slots.documents, jnp.full(B, 48))
            part = read(q, documents, memory.slots(1), reader)
            return (part.out * draw(*part.out.shape, seed=9)).sum() + (part.lse * draw(*part.lse.shape)).sum(), part

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, keys, values)

    made = None if mesh is None else sharding.make_mesh(mesh, jax.devices())
    with jax.set_mesh(made) if made else contextlib.nullcontext():
        return jax.device_get(run(q, keys, values)), str(run.trace(q, keys, values).jaxpr)


@pytest.mark.parametrize("multi_doc", [True, False])
@pytest.mark.parametrize(
    ("name", "mesh"), [("dense", None), ("dense", SPREAD), ("dense", MeshConfig(fsdp=8)), ("sharded_dense", SPREAD)]
)
def test_readers_are_the_same_by_the_kernel_on_any_mesh_in_value_and_gradient(name, mesh, multi_doc):
    """Rows and heads over devices, slots too; or two rows, which 8 devices can't split."""
    plain = READER._replace(attention_kernel="jnp", multi_doc=multi_doc)
    wanted, text = value_and_gradients(plain)
    assert "pallas_call" not in text
    found, text = value_and_gradients(READER._replace(name=name, multi_doc=multi_doc), mesh)
    assert "pallas_call" in text
    close(found, wanted)


def test_the_cache_of_generation_is_read_by_the_kernel_too():
    q, length = draw(B, 3, 2 * G, H), jnp.asarray([0, 20], jnp.int32)
    keys, values = draw(B, G, 24, H, seed=1), draw(B, G, 24, H, seed=2)

    def attend(reader: Reader):
        return lambda q: cache.attend(q, keys, values, length, reader)

    found, wanted = (attend(READER._replace(attention_kernel=kernel))(q) for kernel in ("pallas", "jnp"))
    close(found, wanted)
    assert "pallas_call" in str(jax.make_jaxpr(attend(READER))(q))


def test_readers_take_the_choice_of_the_model():
    config = ExperimentConfig(model=ModelConfig(attention_kernel="jnp"))
    assert of_config("dense", config).attention_kernel == "jnp"
    assert of_config("dense", ExperimentConfig()).attention_kernel == "auto"
