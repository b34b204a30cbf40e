"""The Transformer: one forward pass for training, evaluation and generation (FoT, section 3).

`fot.layers` has the layers and their parameters; here is what tokens go through.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fot import attention, contexts, joint, local, sharding
from fot.attention import Tokens
from fot.config import ModelConfig
from fot.crossbatch import Table
from fot.kernels.passes import Keys
from fot.layers import HIDDEN, QKV, Params, block_of, init, rms_norm
from fot.memory import Memory
from fot.readers import table as readers
from fot.readers.reader import Reader

__all__ = ["Params", "init"]  # they come with the passes: `model.init`, `model.Params`


def _keeping(*names: str) -> Callable:
    return functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))


_REMAT: dict[str, Callable] = {
    "none": lambda layer: layer,
    "elementwise": _keeping(attention.OUTPUT, QKV, HIDDEN),
    "mlp": _keeping(attention.OUTPUT, QKV),
    "full": jax.checkpoint,
}


class Reads(NamedTuple):
    """How a memory layer looked beyond its rows, to contexts or a memory.

    Attributes:
      queries: [B, T, N, H], scaled, as keys from elsewhere meet them.
      share: [B, T, N] float32, the weight that all keys from elsewhere have together, beside the local context.
    """

    queries: jax.Array
    share: jax.Array


class Output(NamedTuple):
    """What a forward pass gives; under `jax.jit`, what isn't used isn't computed.

    Attributes:
      hidden: [B', T, D] last hidden states, of the rows in `keep`; `unembed` makes logits of them.
      keys, values: [L, B, T, G, H] of the memory layers, keys as other rows and a memory see them.
      reads: of each memory layer; in the last one, of the rows in `keep`.
    """

    hidden: jax.Array
    keys: jax.Array
    values: jax.Array
    reads: tuple[Reads, ...]


class Entries(NamedTuple):
    """Keys and values [L, B, T, G, H] of the memory layers, keys as other rows and a memory see them."""

    keys: jax.Array
    values: jax.Array


class Source(NamedTuple):
    """Where memory layers look beyond their row."""

    tokens: Tokens
    table: Table | None = None
    memory: Memory | None = None
    reader: Reader | None = None


def apply(
    params: Params,
    inputs_BT: jax.Array,
    tokens: Tokens,
    config: ModelConfig,
    *,
    table: Table | None = None,
    keep: slice = slice(None),
    memory: Memory | None = None,
    reader: Reader | None = None,
) -> Output:
    """Runs the Transformer over rows of tokens.

    Args:
      params: as `init` gives them.
      inputs_BT: int32 token ids.
      tokens: [B, T], documents and positions, from which every mask is made.
      config: the model.
      table: crossbatch contexts of each row (training).
      keep: rows wanted; the others are context alone and stop at the last memory layer.
      memory: what the memory layers read, with `reader`.
      reader: how they read it.

    Returns:
      Hidden states of the kept rows, keys and values of all rows for a memory.
    """
    layers, x_BTD = _embed(params, inputs_BT, config)
    source = Source(tokens, table, memory, reader)
    count = len(config.memory_layers)
    x_BTD, entries, reads = _climb(layers, x_BTD, config, source, count, keep)
    x_BTD = x_BTD if config.memory_layers else x_BTD[keep]
    last = Tokens(tokens.documents[keep], tokens.positions[keep])
    x_BTD = _run(layers, _after(config, count), config.layers, x_BTD, last, config)
    hidden = rms_norm(x_BTD, params["final_norm"], config.norm_epsilon)
    return Output(hidden, *_stacked(entries, x_BTD.dtype, inputs_BT.shape, config), tuple(reads))


def memory_entries(
    params: Params,
    inputs_BT: jax.Array,
    tokens: Tokens,
    config: ModelConfig,
    *,
    memory: Memory | None = None,
    reader: Reader | None = None,
) -> Entries:
    """Returns the keys and values that `apply` gives for the same arguments, computing only what they depend on.

    The last memory layer attends to nothing, so with one memory layer the memory isn't read.
    """
    layers, x_BTD = _embed(params, inputs_BT, config)
    entries: list[Entries] = []
    if config.memory_layers:
        last, before = config.memory_layers[-1], len(config.memory_layers) - 1
        x_BTD, entries, _ = _climb(layers, x_BTD, config, Source(tokens, memory=memory, reader=reader), before)
        x_BTD = _run(layers, _after(config, before), last, x_BTD, tokens, config)
        block = block_of(config, _layer(layers, last))
        entries = [*entries, Entries(*block.project_entries(x_BTD))]
    return _stacked(entries, x_BTD.dtype, inputs_BT.shape, config)


def _embed(params: Params, inputs_BT: jax.Array, config: ModelConfig) -> tuple[Params, jax.Array]:
    """Returns the layers' parameters in the compute dtype, and the stream [B, T, D] that enters the first of them."""
    dtype = jnp.dtype(config.compute_dtype)
    layers = jax.tree.map(lambda p: p.astype(dtype), params["layers"])
    return layers, sharding.activation(params["embedding"].astype(dtype)[inputs_BT], "stream")


def _climb(
    layers: Params, x_BTD: jax.Array, config: ModelConfig, source: Source, count: int, keep: slice = slice(None)
) -> tuple[jax.Array, list[Entries], list[Reads]]:
    """Runs the layers up to the count-th memory layer, which it includes.

    Returns:
      The stream, and what each of these memory layers stores and how it reads.
    """
    remat = _REMAT[config.remat]
    entries, reads = [], []
    for index, layer in enumerate(config.memory_layers[:count]):
        x_BTD = _run(layers, _after(config, index), layer, x_BTD, source.tokens, config)
        rows = keep if layer == config.memory_layers[-1] else slice(None)
        step = remat(functools.partial(memory_layer, config=config, source=source, index=index, keep=rows))
        x_BTD, k, v, read = step(_layer(layers, layer), x_BTD)
        entries.append(Entries(k, v))
        reads.append(read)
    return x_BTD, entries, reads


def _after(config: ModelConfig, count: int) -> int:
    """Returns the layer after the first `count` memory layers."""
    return config.memory_layers[count - 1] + 1 if count > 0 else 0


def _stacked(entries: list[Entries], dtype: jnp.dtype, shape_BT: tuple[int, ...], config: ModelConfig) -> Entries:
    if not entries:
        return Entries(*2 * [jnp.zeros((0, *shape_BT, config.kv_heads, config.head_dim), dtype)])
    return jax.tree.map(lambda *layers: jnp.stack(layers), *entries)


def head(params: Params, config: ModelConfig) -> jax.Array:
    """Returns the output head [D, V]: a parameter of its own, or the embedding."""
    return params["embedding"].T if config.tied_embeddings else params["head"]


def logits(w_DV: jax.Array, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., D] by an output head."""
    return jnp.matmul(hidden, w_DV.astype(hidden.dtype), preferred_element_type=jnp.float32)


def unembed(params: Params, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., D]."""
    return logits(head(params, config), hidden)


def _layer(layers: Params | tuple[Params, ...], index: int) -> Params:
    """Returns one layer's parameters, of a stack or, for generation, of layers apart (`fot.incremental.prepare`)."""
    return layers[index] if isinstance(layers, tuple) else jax.tree.map(lambda p: p[index], layers)


def _run(
    layers: Params | tuple[Params, ...], begin: int, end: int, x_BTD: jax.Array, tokens: Tokens, config: ModelConfig
) -> jax.Array:
    """Runs the layers begin … end-1, none of which sees other contexts; scans them if they are stacked."""
    if begin == end:
        return x_BTD
    step = _REMAT[config.remat](functools.partial(local_layer, tokens=tokens, config=config))
    if isinstance(layers, tuple):
        return functools.reduce(lambda x_BTD, layer: step(layer, x_BTD), layers[begin:end], x_BTD)
    stack = jax.tree.map(lambda p: p[begin:end], layers)
    return jax.lax.scan(lambda x, layer: (step(layer, x), None), x_BTD, stack, unroll=min(config.unroll, end - begin))[
        0
    ]


def local_layer(layer: Params, x_BTD: jax.Array, tokens: Tokens, config: ModelConfig) -> jax.Array:
    """A layer that sees its row alone."""
    block = block_of(config, layer)
    q, k, v = block.project(x_BTD)
    q, k = _rotate(q, config), _rotate(k, config)
    return block.finish(x_BTD, local.attend(q, k, v, tokens, config))


def _rotate(x_BTNH: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotates by the place in the row: RoPE is relative, so where a document began does not matter."""
    places_BT = jnp.broadcast_to(jnp.arange(x_BTNH.shape[1]), x_BTNH.shape[:2])
    return attention.rope(x_BTNH, places_BT, config.rope_theta, config.rope_scaling)


_POSITIONS: dict[str, Callable[[jax.Array, ModelConfig], jax.Array]] = {
    "none": lambda x_BTNH, config: x_BTNH,
    "zero": _rotate,
}


def memory_layer(
    layer: Params, x_BTD: jax.Array, *, config: ModelConfig, source: Source, index: int, keep: slice = slice(None)
) -> tuple[jax.Array, jax.Array, jax.Array, Reads]:
    """A layer that sees other contexts; returns the kept rows' stream, all rows' keys and values, the kept rows' reads.

    Keys are handed on as they are at position 0, where RoPE is the identity.
    """
    block = block_of(config, layer)
    tokens, table = source.tokens, source.table
    q, k, v = block.project(x_BTD)
    if source.memory is not None:
        q = attention.sharpen(q, source.memory.length, config.logn_keys)
    place = _POSITIONS[config.memory_positions]
    q, x_BTD, queries = place(q[keep], config), x_BTD[keep], Tokens(tokens.documents[keep], tokens.positions[keep])
    near = Keys(place(k[keep], config), v[keep])
    seen = None if table is None else Table(table.contexts_BC[keep], table.negative_BC[keep])
    if joint.runs(config, seen, source.memory):
        both = joint.attend(q, near, Keys(k, v), queries, tokens, seen, config.attention_exchange)
        return block.finish(x_BTD, both.out), k, v, Reads(q, both.share)
    own = attention.attend_local(q, *near, queries, config.attention_block)
    remote = []
    if seen is not None and seen.contexts_BC.shape[1] > 0:
        how = config.attention_block, config.attention_exchange
        remote.append(contexts.attend_contexts(q, k, v, queries, tokens, seen, *how))
    if source.memory is not None:
        remote.append(readers.read(q, queries.documents, source.memory.slots(index), source.reader))
    reads = Reads(q, block.attention.share(own, remote))
    return block.finish(x_BTD, block.attention.combine(own, remote)), k, v, reads
