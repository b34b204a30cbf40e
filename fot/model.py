"""The Transformer: parameters, and one forward pass for training, evaluation and generation.

FoT, section 3 and Appendix A. Data tells the paper's small models from LLaMA ones (`fot.config.ModelConfig`). Flax NNX
modules describe a layer; outside this file `params` is a plain dict whose "layers" are stacked along a leading axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fot import attention, crossbatch
from fot.attention import Partial, Tokens
from fot.config import ModelConfig
from fot.crossbatch import Table
from fot.memory import Memory
from fot.readers import table as readers
from fot.readers.reader import Reader

Params = dict[str, Any]

# What the backward pass keeps by name: `attention.OUTPUT`, and here what weights made of a layer's input.
_QKV, _HIDDEN = "qkv", "hidden"


def _keeping(*names: str) -> Callable:
    return functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))


_REMAT: dict[str, Callable] = {
    "none": lambda layer: layer,
    "elementwise": _keeping(attention.OUTPUT, _QKV, _HIDDEN),
    "mlp": _keeping(attention.OUTPUT, _QKV),
    "full": jax.checkpoint,
}


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> nnx.Param:
    return nnx.Param(gain * fan_in**-0.5 * jax.random.normal(rngs.params(), shape))


def _rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + epsilon)
    return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


def _unit(x: jax.Array) -> jax.Array:
    """L2-normalises the last axis."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, -1, keepdims=True) + 1e-12)).astype(x.dtype)


@jax.custom_vjp
def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """[..., K] × [K, F] → [..., F], with the weights' gradient in the form that transposes the smaller operand.

    Autodiff would transpose the cotangent; XLA's CPU backend fuses what computes it, an activation, into that
    transposition, and then runs it element by element.
    """
    return x @ w


def _matmul_backward(saved, g):
    x, w = saved
    rows = tuple(range(x.ndim - 1)), tuple(range(x.ndim - 1))
    dw = (
        jax.lax.dot_general(x, g, (rows, ((), ())))
        if x.shape[-1] <= g.shape[-1]
        else jax.lax.dot_general(g, x, (rows, ((), ()))).T
    )
    return g @ w.T, dw


_matmul.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_backward)


class Attention(nnx.Module):
    """Projections of one layer; who attends to whom is the caller's."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, N, G, H = config.dim, config.heads, config.kv_heads, config.head_dim
        self.query = _normal(rngs, (D, N, H), D)
        self.key = _normal(rngs, (D, G, H), D)
        self.value = _normal(rngs, (D, G, H), D)
        self.output = _normal(rngs, (N, H, D), N * H, (2 * config.layers) ** -0.5)
        if config.qkv_bias:
            self.query_bias = nnx.Param(jnp.zeros((N, H)))
            self.key_bias = nnx.Param(jnp.zeros((G, H)))
            self.value_bias = nnx.Param(jnp.zeros((G, H)))
        if config.qk_norm:
            self.temperature = nnx.Param(jnp.full(N, -jnp.log(config.qk_scale)))
        if config.memory_gate:
            self.memory_gate = nnx.Param(jnp.zeros(N))
        self.qk_norm = config.qk_norm

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns scaled queries [B, T, N, H], keys and values [B, T, G, H], without positions.

        With QK-norm, queries and keys have length 1 and logits are divided by exp(temperature), else by sqrt(H).
        """
        q = self._project(x_BTD, "query")
        k, v = self.project_entries(x_BTD)
        if not self.qk_norm:
            return q * q.shape[-1] ** -0.5, k, v
        return _unit(q) * jnp.exp(-self.temperature[...].astype(jnp.float32)).astype(q.dtype)[:, None], k, v

    def project_entries(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the keys and values [B, T, G, H] of `project` alone."""
        k, v = self._project(x_BTD, "key"), self._project(x_BTD, "value")
        return _unit(k) if self.qk_norm else k, v

    def _project(self, x_BTD: jax.Array, name: str) -> jax.Array:
        projected = checkpoint_name(_dense(x_BTD, getattr(self, name)[...]), _QKV)
        bias = getattr(self, f"{name}_bias", None)
        return projected if bias is None else projected + bias[...]

    def combine(self, local: Partial, remote: list[Partial]) -> jax.Array:
        """Joins local attention with attention to contexts or a memory: one softmax, or the gate per head.

        With the gate, a token that sees nothing remote keeps its local attention.
        """
        if not remote or not hasattr(self, "memory_gate"):
            return attention.merge(local, *remote).out
        elsewhere = attention.merge(*remote)
        gate_N = jax.nn.sigmoid(self.memory_gate[...].astype(jnp.float32))
        gate_BTN = jnp.where(elsewhere.lse == -jnp.inf, 0.0, gate_N)[..., None]
        return elsewhere.out * gate_BTN + local.out * (1 - gate_BTN)

    def share(self, local: Partial, remote: list[Partial]) -> jax.Array:
        """Returns the weight [B, T, N] that `combine` gives to all that is remote; float32."""
        if not remote:
            return jnp.zeros_like(local.lse)
        lse_BTN = attention.merge(*remote).lse
        share_BTN = jax.nn.sigmoid(lse_BTN - local.lse)
        if hasattr(self, "memory_gate"):
            share_BTN = jax.nn.sigmoid(self.memory_gate[...].astype(jnp.float32))
        return jnp.where(lse_BTN == -jnp.inf, 0.0, share_BTN)

    def project_out(self, out_BTNH: jax.Array) -> jax.Array:
        """Returns [B, T, D]."""
        w_NHD = self.output[...]
        B, T = out_BTNH.shape[:2]
        return _matmul(out_BTNH.astype(w_NHD.dtype).reshape(B, T, -1), w_NHD.reshape(-1, w_NHD.shape[-1]))


def _dense(x_BTD: jax.Array, w_DNH: jax.Array) -> jax.Array:
    """[B, T, D] × [D, N, H] → [B, T, N, H]."""
    out = _matmul(x_BTD, w_DNH.reshape(w_DNH.shape[0], -1))
    return out.reshape(*x_BTD.shape[:2], *w_DNH.shape[1:])


class Mlp(nnx.Module):
    """Feed-forward layer: SwiGLU (LLaMA) or GELU (the paper's small models)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, F = config.dim, config.mlp_dim
        if config.mlp == "swiglu":
            self.gate = _normal(rngs, (D, F), D)
        self.up = _normal(rngs, (D, F), D)
        self.down = _normal(rngs, (F, D), F, (2 * config.layers) ** -0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., D]."""
        up = checkpoint_name(_matmul(x, self.up[...]), _HIDDEN)
        if hasattr(self, "gate"):
            hidden = jax.nn.silu(checkpoint_name(_matmul(x, self.gate[...]), _HIDDEN)) * up
        else:
            hidden = jax.nn.gelu(up)
        return _matmul(hidden, self.down[...])


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = nnx.Param(jnp.ones(config.dim))
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.Param(jnp.ones(config.dim))
        self.mlp = Mlp(config, rngs)
        self.epsilon = config.norm_epsilon

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of the normalised input."""
        return self.attention.project(self._normalised(x_BTD))

    def project_entries(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the normalised input."""
        return self.attention.project_entries(self._normalised(x_BTD))

    def _normalised(self, x_BTD: jax.Array) -> jax.Array:
        return _rms_norm(x_BTD, self.attention_norm[...], self.epsilon)

    def finish(self, x_BTD: jax.Array, out_BTNH: jax.Array) -> jax.Array:
        """Adds attention output and feed-forward layer to the residual stream."""
        x_BTD = x_BTD + self.attention.project_out(out_BTNH)
        return x_BTD + self.mlp(_rms_norm(x_BTD, self.mlp_norm[...], self.epsilon))


class Ends(nnx.Module):
    """What is not a layer: embedding, last norm, and the output head unless it is tied to the embedding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embedding = _normal(rngs, (config.vocab_size, config.dim), config.dim)
        self.final_norm = nnx.Param(jnp.ones(config.dim))
        if not config.tied_embeddings:
            self.head = _normal(rngs, (config.dim, config.vocab_size), config.dim)


@functools.cache
def _graphdef(config: ModelConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Draws float32 parameters; `jax.eval_shape` gives their shapes alone.

    Returns:
      {"embedding": [V, D], "layers": {…: [L, …]}, "final_norm": [D], and "head": [D, V] unless tied}.
    """
    first, *rest = jax.random.split(key, config.layers + 1)

    def pure(module: nnx.Module) -> Params:
        return nnx.to_pure_dict(nnx.state(module))

    layers = jax.vmap(lambda layer_key: pure(Block(config, nnx.Rngs(layer_key))))(jnp.stack(rest))
    return {**pure(Ends(config, nnx.Rngs(first))), "layers": layers}


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


class _Source(NamedTuple):
    """Where memory layers look beyond their row."""

    tokens: Tokens
    table: Table | None
    memory: Memory | None
    reader: Reader | None


def apply(
    params: Params,
    inputs_BT: jax.Array,
    tokens: Tokens,
    config: ModelConfig,
    *,
    table: Table | None = None,
    keep: np.ndarray | None = None,
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
      keep: rows wanted; the others are context alone and stop at the last memory layer. None is all.
      memory: what the memory layers read, with `reader`.
      reader: how they read it.

    Returns:
      Hidden states of the kept rows, keys and values of all rows for a memory.
    """
    layers, x_BTD = _embed(params, inputs_BT, config)
    source = _Source(tokens, table, memory, reader)
    count = len(config.memory_layers)
    x_BTD, entries, reads = _climb(layers, x_BTD, config, source, count, keep)
    last = tokens
    if keep is not None:
        last = Tokens(tokens.documents[keep], tokens.positions[keep])
        x_BTD = x_BTD if config.memory_layers else x_BTD[keep]
    x_BTD = _run(layers, _after(config, count), config.layers, x_BTD, last, config)
    hidden = _rms_norm(x_BTD, params["final_norm"], config.norm_epsilon)
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
        x_BTD, entries, _ = _climb(layers, x_BTD, config, _Source(tokens, None, memory, reader), before, None)
        x_BTD = _run(layers, _after(config, before), last, x_BTD, tokens, config)
        block = nnx.merge(_graphdef(config), _layer(layers, last))
        entries = [*entries, Entries(*block.project_entries(x_BTD))]
    return _stacked(entries, x_BTD.dtype, inputs_BT.shape, config)


def _embed(params: Params, inputs_BT: jax.Array, config: ModelConfig) -> tuple[Params, jax.Array]:
    """Returns the layers' parameters in the compute dtype, and the stream [B, T, D] that enters the first of them."""
    dtype = jnp.dtype(config.compute_dtype)
    layers = jax.tree.map(lambda p: p.astype(dtype), params["layers"])
    return layers, params["embedding"].astype(dtype)[inputs_BT]


def _climb(
    layers: Params, x_BTD: jax.Array, config: ModelConfig, source: _Source, count: int, keep: np.ndarray | None
) -> tuple[jax.Array, list[Entries], list[Reads]]:
    """Runs the layers up to the count-th memory layer, which it includes.

    Returns:
      The stream, and what each of these memory layers stores and how it reads.
    """
    remat = _REMAT[config.remat]
    entries, reads = [], []
    for index, layer in enumerate(config.memory_layers[:count]):
        x_BTD = _run(layers, _after(config, index), layer, x_BTD, source.tokens, config)
        rows = keep if layer == config.memory_layers[-1] else None
        step = remat(functools.partial(_memory_layer, config=config, source=source, index=index, keep=rows))
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


def _layer(layers: Params, index: int) -> Params:
    return jax.tree.map(lambda p: p[index], layers)


def _run(layers: Params, begin: int, end: int, x_BTD: jax.Array, tokens: Tokens, config: ModelConfig) -> jax.Array:
    """Scans the layers begin … end-1, none of which sees other contexts."""
    if begin == end:
        return x_BTD
    step = _REMAT[config.remat](functools.partial(_local_layer, tokens=tokens, config=config))
    stack = jax.tree.map(lambda p: p[begin:end], layers)
    return jax.lax.scan(lambda x, layer: (step(layer, x), None), x_BTD, stack, unroll=min(config.unroll, end - begin))[
        0
    ]


def _local_layer(layer: Params, x_BTD: jax.Array, tokens: Tokens, config: ModelConfig) -> jax.Array:
    block = nnx.merge(_graphdef(config), layer)
    q, k, v = block.project(x_BTD)
    q, k = _rotate(q, config), _rotate(k, config)
    return block.finish(x_BTD, attention.attend_local(q, k, v, tokens, config.attention_block).out)


def _rotate(x_BTNH: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotates by the place in the row: RoPE is relative, so where a document began does not matter."""
    places_BT = jnp.broadcast_to(jnp.arange(x_BTNH.shape[1]), x_BTNH.shape[:2])
    return attention.rope(x_BTNH, places_BT, config.rope_theta, config.rope_scaling)


_POSITIONS: dict[str, Callable[[jax.Array, ModelConfig], jax.Array]] = {
    "none": lambda x_BTNH, config: x_BTNH,
    "zero": _rotate,
}


def _memory_layer(
    layer: Params, x_BTD: jax.Array, *, config: ModelConfig, source: _Source, index: int, keep: np.ndarray | None
) -> tuple[jax.Array, jax.Array, jax.Array, Reads]:
    """A layer that sees other contexts; returns the kept rows' stream, all rows' keys and values, the kept rows' reads.

    Keys are handed on as they are at position 0, where RoPE is the identity.
    """
    block = nnx.merge(_graphdef(config), layer)
    tokens, table = source.tokens, source.table
    q, k, v = block.project(x_BTD)
    place = _POSITIONS[config.memory_positions]
    rows = np.arange(len(x_BTD)) if keep is None else keep
    q, x_BTD, queries = place(q[rows], config), x_BTD[rows], Tokens(tokens.documents[rows], tokens.positions[rows])
    local = attention.attend_local(q, place(k[rows], config), v[rows], queries, config.attention_block)
    remote = []
    if table is not None and table.contexts_BC.shape[1] > 0:
        seen = Table(table.contexts_BC[rows], table.negative_BC[rows])
        remote.append(crossbatch.attend_contexts(q, k, v, queries, tokens, seen, config.attention_block))
    if source.memory is not None:
        remote.append(readers.read(q, queries.documents, source.memory.slots(index), source.reader))
    reads = Reads(q, block.attention.share(local, remote))
    return block.finish(x_BTD, block.attention.combine(local, remote)), k, v, reads
