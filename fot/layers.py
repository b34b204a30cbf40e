"""The modules of the Transformer: what the parameters of a layer are, and what they make of its input.

FoT, Appendix A. Data tells the paper's small models from LLaMA ones (`fot.config.ModelConfig`). Flax NNX modules
describe a layer; outside this file `params` is a plain dict whose "layers" are stacked along a leading axis.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from fot import attention, sharding
from fot.attention import Partial
from fot.config import ModelConfig

Params = dict[str, Any]

QKV, HIDDEN = "qkv", "hidden"  # for remat policies, as `attention.OUTPUT`: what weights made of a layer's input


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> nnx.Param:
    return nnx.Param(gain * fan_in**-0.5 * jax.random.normal(rngs.params(), shape))


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm of the last axis, in float32."""
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
        projected = checkpoint_name(sharding.activation(_dense(x_BTD, getattr(self, name)[...]), "heads"), QKV)
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

    @jax.named_scope("projections")
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

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] → [B, T, D]."""
        up = self._project(x, "up")
        hidden = jax.nn.silu(self._project(x, "gate")) * up if hasattr(self, "gate") else jax.nn.gelu(up)
        return _matmul(hidden, self.down[...])

    def _project(self, x_BTD: jax.Array, name: str) -> jax.Array:
        return checkpoint_name(sharding.activation(_matmul(x_BTD, getattr(self, name)[...]), "hidden"), HIDDEN)


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = nnx.Param(jnp.ones(config.dim))
        self.attention = Attention(config, rngs)
        self.mlp_norm = nnx.Param(jnp.ones(config.dim))
        self.mlp = Mlp(config, rngs)
        self.epsilon = config.norm_epsilon

    @jax.named_scope("projections")
    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of the normalised input."""
        return self.attention.project(self._normalised(x_BTD))

    def project_entries(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the normalised input."""
        return self.attention.project_entries(self._normalised(x_BTD))

    def _normalised(self, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, self.attention_norm[...], self.epsilon)

    def finish(self, x_BTD: jax.Array, out_BTNH: jax.Array) -> jax.Array:
        """Adds attention output and feed-forward layer to the residual stream."""
        out_BTNH = sharding.activation(out_BTNH, "heads")
        x_BTD = sharding.activation(x_BTD + self.attention.project_out(out_BTNH), "stream")
        return sharding.activation(x_BTD + self.mlp(rms_norm(x_BTD, self.mlp_norm[...], self.epsilon)), "stream")


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


def block_of(config: ModelConfig, layer: Params) -> Block:
    """Returns the layer with these parameters, which are not stacked."""
    return nnx.merge(_graphdef(config), layer)


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
