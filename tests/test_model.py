"""Properties of the Transformer: what its parameters are, who influences whom, and what may change no result."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fot import attention, crossbatch, layers, memory, model
from fot.attention import Partial, Tokens
from fot.config import REMATS, CrossbatchConfig, ModelConfig, RopeScalingConfig
from fot.readers.reader import Reader
from fot.readers.table import READERS
from fot.readers.table import place as place_of

# The paper's small models, and LLaMA's with grouped queries.
PAPER = ModelConfig(
    vocab_size=40,
    layers=3,
    dim=16,
    heads=4,
    kv_heads=4,
    head_dim=4,
    mlp_dim=24,
    mlp="gelu",
    memory_layers=(1,),
    memory_positions="none",
    qk_norm=True,
    tied_embeddings=True,
    rope_theta=50.0,
    attention_block=8,
)
LLAMA = dataclasses.replace(
    PAPER,
    mlp="swiglu",
    memory_positions="zero",
    qk_norm=False,
    qkv_bias=True,
    tied_embeddings=False,
    kv_heads=2,
    rope_scaling=RopeScalingConfig("linear", factor=2.0),
)
CONFIGS = {"paper": PAPER, "llama": LLAMA}
PACKS, K, T = 2, 2, 6
ROWS = PACKS * K
TABLE = crossbatch.previous(CrossbatchConfig(packing=K, w=1), ROWS, 2)
PREVIOUS, KEEP = slice(0, None, 2), slice(1, None, 2)

# Pack 0 ends a document inside its first row; pack 1 is one document.
DOCUMENTS = np.array([[0] * 4 + [2] * 2, [2] * 6, [1] * 6, [1] * 6], np.int32)
POSITIONS = np.array([[5, 6, 7, 8, 0, 1], range(2, 8), range(6), range(6, 12)], np.int32)
TOKENS = Tokens(jnp.asarray(DOCUMENTS), jnp.asarray(POSITIONS))
INPUTS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (ROWS, T)), jnp.int32)


def close(left, right, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@functools.cache
def params(config: ModelConfig) -> model.Params:
    """Parameters that differ from layer to layer and head to head, norms and temperatures too."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    noise = np.random.default_rng(0)

    def draw(path, leaf):
        values = noise.normal(size=leaf.shape).astype(np.float32)
        return 1 + 0.1 * values if path[-1].key.endswith("norm") else 0.25 * values

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnames=("config", "crossbatched", "kept"))
def _apply(params, inputs, documents, positions, config, crossbatched, kept):
    table, keep = TABLE if crossbatched else None, KEEP if kept else slice(None)
    return model.apply(params, inputs, Tokens(documents, positions), config, table=table, keep=keep)


def apply(config, inputs=INPUTS, tokens=TOKENS, crossbatched=True, kept=False) -> model.Output:
    return _apply(params(config), inputs, *tokens, config, crossbatched, kept)


@functools.partial(jax.jit, static_argnames=("config", "kept"))
def _gradients(params, config, kept):
    """Gradients of a scalar that depends on the last row of each pack."""

    def loss(params):
        output = model.apply(params, INPUTS, TOKENS, config, table=TABLE, keep=KEEP if kept else slice(None))
        hidden = output.hidden if kept else output.hidden[KEEP]
        return (model.unembed(params, hidden, config) * jnp.sin(jnp.arange(40.0))).mean()

    return jax.grad(loss)(params)


def gradients(config: ModelConfig, kept: bool = True) -> model.Params:
    return _gradients(params(config), config, kept)


# Parameters.


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_a_dict_of_stacked_float32_layers(name, gate):
    config = dataclasses.replace(CONFIGS[name], memory_gate=gate, compute_dtype="bfloat16")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), config))
    D, N, G, H, F = config.dim, config.heads, config.kv_heads, config.head_dim, config.mlp_dim
    layer = {
        "attention_norm": (D,),
        "mlp_norm": (D,),
        "attention": {"query": (D, N, H), "key": (D, G, H), "value": (D, G, H), "output": (N, H, D)}
        | ({"query_bias": (N, H), "key_bias": (G, H), "value_bias": (G, H)} if config.qkv_bias else {})
        | ({"temperature": (N,)} if config.qk_norm else {})
        | ({"memory_gate": (N,)} if gate else {}),
        "mlp": {"up": (D, F), "down": (F, D)} | ({"gate": (D, F)} if config.mlp == "swiglu" else {}),
    }
    stacked = jax.tree.map(lambda shape: (config.layers, *shape), layer, is_leaf=lambda x: isinstance(x, tuple))
    expected = {"embedding": (40, D), "final_norm": (D,), "layers": stacked}
    expected |= {} if config.tied_embeddings else {"head": (D, 40)}
    assert jax.tree.map(lambda x: x.shape, shapes) == expected
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_init_is_finite_and_differs_from_layer_to_layer_and_key_to_key():
    first, second = (jax.jit(lambda key: model.init(key, LLAMA))(jax.random.key(seed)) for seed in (0, 1))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(first))
    query = first["layers"]["attention"]["query"]
    assert (query[0] != query[1]).all()
    assert (query != second["layers"]["attention"]["query"]).all()


def test_a_new_model_predicts_nothing_yet():
    drawn = jax.jit(lambda key: model.init(key, PAPER))(jax.random.key(0))
    output = _apply(drawn, INPUTS, *TOKENS, PAPER, True, False)
    logits = model.unembed(drawn, output.hidden, PAPER)
    assert logits.shape == (ROWS, T, 40) and logits.dtype == jnp.float32
    nll = jax.nn.logsumexp(logits, -1).mean() - logits.mean()
    assert jnp.isfinite(logits).all() and abs(nll - np.log(40)) < 1


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name):
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients(CONFIGS[name])):
        assert jnp.isfinite(gradient).all() and jnp.abs(gradient).max() > 1e-6, path


# The forward pass, restated.


def plain_forward(p: model.Params, config: ModelConfig) -> jax.Array:
    """The Transformer as a loop over layers without contexts: all logits at once, heads repeated."""

    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.norm_epsilon) * scale

    def unit(x):
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    same_document = DOCUMENTS[:, :, None] == DOCUMENTS[:, None]
    mask = jnp.asarray(same_document & np.tri(T, dtype=bool))[:, None]
    places = jnp.broadcast_to(jnp.arange(T), (ROWS, T))
    x = p["embedding"][INPUTS]
    for index in range(config.layers):
        layer = jax.tree.map(lambda leaf: leaf[index], p["layers"])  # noqa: B023
        w, y = layer["attention"], norm(x, layer["attention_norm"])
        q, k, v = (
            jnp.einsum("btd,dnh->btnh", y, w[name]) + w.get(f"{name}_bias", 0.0) for name in ("query", "key", "value")
        )
        scale = config.head_dim**-0.5
        if config.qk_norm:
            q, k, scale = unit(q), unit(k), jnp.exp(-w["temperature"])[:, None, None]
        if not (index in config.memory_layers and config.memory_positions == "none"):
            q, k = (attention.rope(z, places, config.rope_theta, config.rope_scaling) for z in (q, k))
        k, v = (jnp.repeat(z, config.heads // config.kv_heads, axis=2) for z in (k, v))
        s = jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, k) * scale, -1e30)
        out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s, -1), v)
        x = x + jnp.einsum("btnh,nhd->btd", out, w["output"])
        y, w = norm(x, layer["mlp_norm"]), layer["mlp"]
        inner = jax.nn.silu(y @ w["gate"]) * (y @ w["up"]) if config.mlp == "swiglu" else jax.nn.gelu(y @ w["up"])
        x = x + inner @ w["down"]
    return norm(x, p["final_norm"])


@pytest.mark.parametrize("memory_layers", [(), (0, 1)])
@pytest.mark.parametrize("name", CONFIGS)
def test_scanned_layers_equal_a_loop_over_layers(name, memory_layers):
    config = dataclasses.replace(CONFIGS[name], memory_layers=memory_layers)
    expected = jax.jit(plain_forward, static_argnums=1)(params(config), config)
    close(apply(config, crossbatched=False).hidden, expected)


@pytest.mark.parametrize(("kv_heads", "mlp", "tied"), [(1, "gelu", False), (4, "swiglu", True)])
def test_every_kind_of_layer_equals_the_loop(kv_heads, mlp, tied):
    config = dataclasses.replace(PAPER, kv_heads=kv_heads, mlp=mlp, tied_embeddings=tied)
    hidden = apply(config, crossbatched=False).hidden
    close(hidden, jax.jit(plain_forward, static_argnums=1)(params(config), config))
    head = params(config)["embedding"].T if tied else params(config)["head"]
    close(model.unembed(params(config), hidden, config), hidden @ head)


@pytest.mark.parametrize("unroll", [2, 9])
def test_unroll_changes_no_result(unroll):
    config = dataclasses.replace(PAPER, memory_layers=())
    close(apply(dataclasses.replace(config, unroll=unroll), kept=True).hidden, apply(config, kept=True).hidden, 1e-6)


@pytest.mark.parametrize("remat", ["full", *(pytest.param(each, marks=pytest.mark.slow) for each in REMATS[1:-1])])
def test_remat_changes_no_gradient(remat):
    close(gradients(dataclasses.replace(LLAMA, remat=remat)), gradients(LLAMA))


def test_remat_computes_again_what_its_name_says():
    """Of matrix products: the output projection, then the feed-forward layer's two, then all of a layer's."""
    none, elementwise, mlp, full = (products(dataclasses.replace(LLAMA, remat=remat)) for remat in REMATS)
    pieces = 3  # of program: the layers before the memory layer, that layer, and those after it
    assert elementwise == none + pieces
    assert mlp == elementwise + 2 * pieces
    assert full > mlp + 3 * pieces


def products(config: ModelConfig) -> int:
    return str(jax.make_jaxpr(lambda: gradients(config))()).count("dot_general[")


def test_bfloat16_compute_stays_close_with_float32_parameters():
    config = dataclasses.replace(PAPER, compute_dtype="bfloat16")
    rounded, exact = apply(config), apply(PAPER)
    assert rounded.hidden.dtype == rounded.keys.dtype == jnp.bfloat16
    assert model.unembed(params(PAPER), rounded.hidden, config).dtype == jnp.float32
    error = jnp.linalg.norm(rounded.hidden.astype(jnp.float32) - exact.hidden) / jnp.linalg.norm(exact.hidden)
    assert error < 0.03
    got, expected = jax.tree.leaves(gradients(config)), jax.tree.leaves(gradients(PAPER))
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == jnp.float32
        assert jnp.linalg.norm(left - right) < 0.2 * jnp.linalg.norm(right)


# Who influences whom.


def influenced(config: ModelConfig, row: int, place: int) -> np.ndarray:
    """[rows, T] bool: which hidden states another token at that place changes by as much as a bit."""
    changed = INPUTS.at[row, place].set((INPUTS[row, place] + 1) % 40)
    return np.asarray((apply(config).hidden != apply(config, changed).hidden).any(-1))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_is_influenced_by_a_later_one_or_by_what_its_row_does_not_see(name):
    for row, place in np.ndindex(ROWS, T):
        after = influenced(CONFIGS[name], row, place)
        own = (DOCUMENTS[row] == DOCUMENTS[row, place]) & (np.arange(T) >= place)
        np.testing.assert_array_equal(after[row], own)
        for other in set(range(ROWS)) - {row}:
            columns = np.flatnonzero(TABLE.contexts_BC[other] == row)
            negative = TABLE.negative_BC[other, columns].any()
            reached = np.isin(DOCUMENTS[row, place:], DOCUMENTS[row, place])
            # A context reaches a row through its own document in the positive, through any in a negative.
            expected = [len(columns) and (negative or d == DOCUMENTS[row, place]) for d in DOCUMENTS[other]]
            np.testing.assert_array_equal(after[other], np.array(expected, bool))
            assert reached.any()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_start_of_a_row_inside_a_document_changes_nothing(name):
    shifted = TOKENS._replace(positions=TOKENS.positions + 100)
    same(apply(CONFIGS[name], tokens=shifted, crossbatched=False), apply(CONFIGS[name], crossbatched=False))


@pytest.mark.parametrize(("name", "memory_layers"), [("paper", (1,)), ("paper", ()), ("llama", (0, 2))])
def test_kept_rows_are_what_they_are_among_all(name, memory_layers):
    config = dataclasses.replace(CONFIGS[name], memory_layers=memory_layers)
    some, every = apply(config, kept=True), apply(config)
    close(some.hidden, every.hidden[KEEP])
    close((some.keys, some.values), (every.keys, every.values))
    assert every.keys.shape == (len(memory_layers), ROWS, T, config.kv_heads, config.head_dim)


def test_contexts_that_stop_early_get_the_same_gradients():
    close(gradients(LLAMA), gradients(LLAMA, kept=False))


# Training and evaluation agree.


@functools.partial(jax.jit, static_argnames=("config", "reader"))
def _evaluate(params, inputs, tokens, memories, config, reader) -> model.Output:
    return model.apply(params, inputs, tokens, config, memory=memories, reader=reader)


def evaluate(params, windows: slice, memories, config, reader) -> model.Output:
    inputs, tokens = INPUTS[windows], jax.tree.map(lambda x: x[windows], TOKENS)
    return _evaluate(params, inputs, tokens, memories, config, reader)


def written(config: ModelConfig, entries: model.Output, documents: np.ndarray) -> memory.Memory:
    """A memory of more slots than entries, which were there before and have been cleared."""
    rows, slots = documents.shape
    empty = memory.empty(len(config.memory_layers), rows, slots + 3, config.kv_heads, config.head_dim, jnp.float32)
    used = memory.write(empty, -entries.keys, 9 * entries.values, jnp.asarray(documents))
    return memory.write(memory.clear(used, jnp.ones(rows, bool)), entries.keys, entries.values, jnp.asarray(documents))


@pytest.mark.parametrize(("positions", "gate"), [("none", False), ("zero", False), ("zero", True)])
def test_reading_a_memory_equals_crossbatch_with_the_previous_context(positions, gate):
    """Each row remembers its own previous window: the paper's d = 1, and single-doc memory."""
    config = dataclasses.replace(PAPER, memory_positions=positions, memory_gate=gate)
    previous, current = PREVIOUS, KEEP
    table = crossbatch.previous(CrossbatchConfig(packing=K, w=1), ROWS, 1)
    trained = jax.jit(lambda p: model.apply(p, INPUTS, TOKENS, config, table=table))(params(config))
    first = evaluate(params(config), previous, None, config, None)
    close(first.hidden, trained.hidden[previous])
    memories = written(config, first, DOCUMENTS[previous])
    on_devices = [name for name in READERS if place_of(name) in ("device", "lists")]
    for name in on_devices if positions == "none" else ["dense"]:
        second = evaluate(params(config), current, memories, config, Reader(name, 2 * T, 4, False, 0.9, 4, 2))
        close(second.hidden, trained.hidden[current])
        close(second.keys, trained.keys[:, current])


def test_reading_a_memory_of_all_documents_equals_crossbatch_with_negatives():
    """Both rows remember both previous windows: d = 2 and multi-doc memory."""
    config = dataclasses.replace(LLAMA, memory_layers=(1,))
    # Documents begin with the row: a positive hides what is of other documents, a multi-doc memory doesn't.
    documents = np.repeat([[2], [2], [1], [1]], T, axis=1).astype(np.int32)
    tokens = Tokens(jnp.asarray(documents), jnp.asarray([range(T), range(T, 2 * T)] * 2, jnp.int32))
    trained = jax.jit(lambda p: model.apply(p, INPUTS, tokens, config, table=TABLE, keep=KEEP))(params(config))

    @functools.partial(jax.jit, static_argnums=2)
    def window(params, memories, rows):
        cut = jax.tree.map(lambda x: x[np.array(rows)], tokens)
        reader = Reader("dense", 1, 5, True, 0.9, 4, 2)
        return model.apply(params, INPUTS[np.array(rows)], cut, config, memory=memories, reader=reader)

    first = window(params(config), None, (0, 2))
    both = jax.tree.map(lambda x: jnp.repeat(x.reshape(1, 1, -1, *x.shape[3:]), 2, axis=1), first)
    memories = written(config, both, np.tile(documents[PREVIOUS].reshape(1, -1), (2, 1)))
    close(window(params(config), memories, (1, 3)).hidden, trained.hidden)


# Log-n scaling.


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_grow_with_the_logarithm_of_the_keys_in_memory(name):
    """A memory layer then reads as one whose queries are longer by log n / log logn_keys."""
    config = dataclasses.replace(CONFIGS[name], logn_keys=4)
    [layer] = config.memory_layers
    first = evaluate(params(config), PREVIOUS, None, config, None)
    documents = np.where(np.arange(T) < np.array([[T], [4]]), DOCUMENTS[PREVIOUS], -1)
    memories, reader = written(config, first, documents), Reader("dense", 1, 5, True, 0.9, 4, 2)
    found = evaluate(params(config), KEEP, memories, config, reader)
    for row, keys in enumerate((T, 4)):
        longer = jax.tree.map(jnp.asarray, params(config))
        attention_params, factor = longer["layers"]["attention"], np.log(keys) / np.log(4)
        if config.qk_norm:
            attention_params["temperature"] = attention_params["temperature"].at[layer].add(-np.log(factor))
        else:
            for part in ("query", "query_bias"):
                attention_params[part] = attention_params[part].at[layer].multiply(factor)
        wanted = evaluate(longer, KEEP, memories, dataclasses.replace(config, logn_keys=0), reader)
        close(found.hidden[row], wanted.hidden[row])


def test_log_n_scaling_changes_no_training():
    same(gradients(PAPER), gradients(dataclasses.replace(PAPER, logn_keys=2)))


def test_few_keys_change_no_bit_by_log_n_scaling():
    first = evaluate(params(PAPER), PREVIOUS, None, PAPER, None)
    memories, reader = written(PAPER, first, DOCUMENTS[PREVIOUS]), Reader("dense", 1, 5, True, 0.9, 4, 2)
    outputs = [
        evaluate(params(PAPER), KEEP, memories, dataclasses.replace(PAPER, logn_keys=keys), reader)
        for keys in (0, T, 100)
    ]
    for output in outputs[1:]:
        same(output, outputs[0])
    assert (
        evaluate(params(PAPER), KEEP, memories, dataclasses.replace(PAPER, logn_keys=T - 1), reader).hidden
        != outputs[0].hidden
    ).any()


# The gate.


def test_gate_weighs_memory_against_local_context():
    config = dataclasses.replace(PAPER, memory_gate=True)
    layer = layers.Attention(config, nnx.Rngs(0))
    bias = np.array([-1.0, 0.0, 2.0, 50.0], np.float32)
    layer.memory_gate[...] = jnp.asarray(bias)
    rng = np.random.default_rng(0)
    local, remote = (
        Partial(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 4, 5), (2, 3, 4))))
        for _ in range(2)
    )
    gate = 1 / (1 + np.exp(-bias))[:, None]
    close(layer.combine(local, [remote]), remote.out * gate + local.out * (1 - gate))
    same(layer.combine(local, []), local.out)
    nothing = Partial(jnp.zeros_like(remote.out), jnp.full_like(remote.lse, -jnp.inf))
    same(layer.combine(local, [nothing]), local.out)
    close(layer.combine(local, [remote, nothing]), layer.combine(local, [remote]))


def test_without_a_gate_memory_and_local_context_share_one_softmax():
    layer = layers.Attention(PAPER, nnx.Rngs(0))
    assert not hasattr(layer, "memory_gate")
    rng = np.random.default_rng(0)
    parts = [
        Partial(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 4, 5), (2, 3, 4))))
        for _ in range(3)
    ]
    weights = jax.nn.softmax(jnp.stack([part.lse for part in parts]), 0)[..., None]
    close(layer.combine(parts[0], parts[1:]), sum(w * part.out for w, part in zip(weights, parts, strict=True)))
