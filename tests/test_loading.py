"""Properties of loading: the entries of the full forward pass, for less, and in memory that doesn't grow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import config as config_lib
from fot import incremental, loading, memory, model, sharding
from fot.attention import Tokens
from fot.batch import Batch
from fot.config import ModelConfig
from fot.errors import UserError
from fot.readers.reader import Reader

B, T, CAPACITY = 2, 8, 64
READER = Reader("knn", 6, 16, True, 0.9, 4, 2)
MODEL = ModelConfig(
    vocab_size=32,
    layers=4,
    dim=16,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    memory_layers=(2,),
    attention_block=8,
)
MODELS = {
    "one_layer": MODEL,
    "first_layer": dataclasses.replace(MODEL, memory_layers=(0,)),
    "several": dataclasses.replace(MODEL, memory_layers=(0, 1, 3)),
    "gate": dataclasses.replace(MODEL, memory_layers=(1, 2), memory_gate=True),
    "llama": dataclasses.replace(
        MODEL, memory_layers=(1, 3), memory_positions="zero", qk_norm=False, mlp="swiglu", tied_embeddings=False
    ),
    "bf16": dataclasses.replace(MODEL, compute_dtype="bfloat16"),
    "bf16_several": dataclasses.replace(MODEL, memory_layers=(0, 2), compute_dtype="bfloat16"),
}
QUIET = lambda done, speed: None  # noqa: E731


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])


def windows(count: int, rows: int = B) -> list[Batch]:
    """Two documents, one after the other; the last window has padding, and one row ends before it."""
    rng = np.random.default_rng(count)
    batches = []
    for index in range(count):
        documents = np.full((rows, T), 2 * index // count, np.int32)
        if index == count - 1:
            documents[:, T // 2 :] = -1
            documents[-1] = -1
        positions = np.broadcast_to(np.arange(index * T, (index + 1) * T, dtype=np.int32), (rows, T))
        batches.append(Batch(rng.integers(0, 32, (rows, T), np.int32), None, None, documents, positions))
    return batches


def load(params, config, mesh, batches, together=4, capacity=CAPACITY, overflow="drop_oldest", show=QUIET):
    empty = loading.store(mesh).empty(config, len(batches[0].tokens), capacity, config.compute_dtype)
    how = loading.Loading(READER, together, overflow)
    return loading.load(params, config, empty, iter(batches), how, mesh, show)


def init(config: ModelConfig) -> model.Params:
    return jax.jit(lambda key: model.init(key, config))(jax.random.key(0))


def full_forward(params, config, batches, capacity=CAPACITY) -> memory.Memory:
    """Window by window through the whole model."""

    @jax.jit
    def forward(params, tokens, where, held):
        return model.apply(params, tokens, where, config, memory=held, reader=READER)

    dtype = jnp.dtype(config.compute_dtype)
    held = memory.empty(len(config.memory_layers), B, capacity, config.kv_heads, config.head_dim, dtype)
    for batch in batches:
        output = forward(params, batch.tokens, Tokens(batch.documents, batch.positions), held)
        held = jax.jit(memory.write)(held, output.keys, output.values, batch.documents)
    return held


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_entries_are_those_of_the_full_forward_pass_bit_for_bit(config, mesh):
    params, batches = init(config), windows(6)
    wanted = full_forward(params, config, batches)
    assert wanted.written.tolist() == [5 * T + T // 2, 5 * T]
    assert jnp.abs(wanted.keys[..., : 5 * T, :].astype(jnp.float32)).min(-1).max() > 0
    for weights in (params, incremental.prepare(params, config, mesh)):
        for together in (1, 4):
            same(load(weights, config, mesh, batches, together), wanted)


@pytest.mark.parametrize("name", ["one_layer", "first_layer", "several"])
def test_nothing_is_computed_that_no_entry_depends_on(name, mesh):
    """What isn't needed may be anything: here it is NaN."""
    config, last = MODELS[name], MODELS[name].memory_layers[-1]
    params, batches = init(config), windows(3)
    poisoned = jax.tree.map(lambda p: p.at[last + 1 :].set(jnp.nan), params["layers"])
    attention = poisoned["attention"]
    for part, names in ((attention, ("query", "output", "temperature")), (poisoned["mlp"], ("up", "down"))):
        for each in names:
            part[each] = part[each].at[last].set(jnp.nan)
    found = load({**params, "layers": poisoned, "final_norm": params["final_norm"] * jnp.nan}, config, mesh, batches)
    same(found, load(params, config, mesh, batches))


def test_half_a_window_of_padding_is_not_computed(mesh):
    """Were it, values that are NaN would reach the other half, as 0 · NaN."""
    params, padding = incremental.prepare(init(MODEL), MODEL, mesh), MODEL.vocab_size - 1
    batches = [
        batch._replace(tokens=np.where(batch.documents < 0, padding, batch.tokens % padding)) for batch in windows(3)
    ]
    poisoned = {**params, "embedding": params["embedding"].at[padding].set(jnp.nan)}
    same(load(poisoned, MODEL, mesh, batches), load(params, MODEL, mesh, batches))


def test_with_one_memory_layer_the_memory_is_not_read(mesh):
    params, batches = init(MODEL), windows(2)
    used = memory.empty(1, B, CAPACITY, MODEL.kv_heads, MODEL.head_dim, jnp.float32)
    used = used._replace(keys=used.keys + jnp.nan, documents=used.documents + 1)
    found = jax.jit(lambda: model.memory_entries(params, batches[0].tokens, TOKENS, MODEL, memory=used, reader=READER))
    without = jax.jit(lambda: model.memory_entries(params, batches[0].tokens, TOKENS, MODEL))
    same(found(), without())


TOKENS = Tokens(jnp.zeros((B, T), jnp.int32), jnp.broadcast_to(jnp.arange(T), (B, T)))


def test_without_memory_layers_there_are_no_entries():
    config = dataclasses.replace(MODEL, memory_layers=())
    entries = model.memory_entries(init(config), jnp.zeros((B, T), jnp.int32), TOKENS, config)
    assert entries.keys.shape == entries.values.shape == (0, B, T, config.kv_heads, config.head_dim)


@pytest.mark.parametrize("name", ["one_layer", "several"])
def test_the_same_programs_run_whatever_the_length(name, mesh, compilations):
    config = dataclasses.replace(MODELS[name], norm_epsilon=1e-5)  # that no test before has compiled
    params, capacity = init(config), 136
    with compilations() as first:
        load(params, config, mesh, windows(3), capacity=capacity)
    assert 0 < len(first) <= 3  # an empty memory, entries, and their writing
    with compilations() as rest:
        for count in (1, 4, 17):
            load(params, config, mesh, windows(count), capacity=capacity)
    assert not rest


def test_loading_goes_on_where_it_stopped(mesh):
    params, batches = init(MODEL), windows(5)
    how = loading.Loading(READER, 2, "drop_oldest")
    first = load(params, MODEL, mesh, batches[:3], 2)
    same(
        loading.load(params, MODEL, first, batches[3:], how, mesh, QUIET),
        load(params, MODEL, mesh, batches, 2),
    )


def test_progress_is_told_windows_and_speed(mesh, capsys):
    told = []
    load(init(MODEL), MODEL, mesh, windows(5), show=lambda *each: told.append(each))
    assert told[-1][0] == 5 and told[-1][1] > 0
    with loading.progress(5) as show:
        load(init(MODEL), MODEL, mesh, windows(5), show=show)
    assert "window 5/5: " in (shown := capsys.readouterr().err) and "tokens/s" in shown


def test_sharded_equals_single_device(mesh):
    params, batches = init(MODELS["several"]), windows(5)
    many = sharding.make_mesh(config_lib.MeshConfig(tensor=2), jax.devices()[:4])
    spread = jax.device_put(params, sharding.shardings(params, many))
    found = load(spread, MODELS["several"], many, batches)
    assert found.keys.sharding.is_equivalent_to(loading.memory_sharding(many).keys, 5)
    alone = load(params, MODELS["several"], mesh, batches)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, alone)


def test_every_overflow_of_the_config_is_there():
    assert tuple(memory.OVERFLOWS) == config_lib.OVERFLOWS


def test_what_does_not_fit_is_dropped_or_refused(mesh):
    params, batches = init(MODEL), windows(5)
    entries = 4 * T + T // 2
    everything = load(params, MODEL, mesh, batches, capacity=entries, overflow="refuse")
    assert everything.written.max() == entries
    assert load(params, MODEL, mesh, batches, capacity=entries - 1).length.max() == entries - 1
    with pytest.raises(
        UserError, match=r"row 0 would have 36 memory entries but has room for 35: .*overflow"
    ) as caught:
        load(params, MODEL, mesh, batches, capacity=entries - 1, overflow="refuse")
    assert "\n" not in str(caught.value)
    # Nothing has been written when the first chunk is refused.
    held = full_forward(params, MODEL, batches[:4], capacity=35)
    how = loading.Loading(READER, 1, "refuse")
    with pytest.raises(UserError):
        loading.load(params, MODEL, held, batches[:1], how, mesh, QUIET)
    assert held.length.tolist() == [32, 32]
