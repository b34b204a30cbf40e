"""Arithmetic on blocks in VMEM, for all kernels of ours: masks, products, a softmax under way, gradients of logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from fot.kernels.plan import KIND, NEGATIVE

MASKED = -1e30  # a logit that no real one reaches; -inf less -inf would not be a number
_LARGEST = jnp.iinfo(jnp.int32).max


def visible(queries: tuple[jax.Array, ...], keys: tuple[jax.Array, ...], flag: jax.Array) -> jax.Array:
    """`attention.visible`, of documents and positions of which those of one side are columns, of the other rows.

    A key of another document gets a position that all queries are after, or none: so one comparison decides.
    """
    (query_document, query_position), (document, position) = queries, keys
    elsewhere = jnp.where(flag & KIND == NEGATIVE, -1, _LARGEST)
    other = jnp.where(document < 0, _LARGEST, elsewhere)
    same = query_document == jnp.where(document < 0, -2, document)
    return jnp.where(same, position, other) <= query_position


class Softmax(NamedTuple):
    """The softmax of a block of queries under way, in references to scratch.

    Attributes:
      top: [T, 1] float32, the largest logit so far.
      total: [T, 1] float32, the sum of exponentials below it.
      sums: [T, H] float32, values weighted by them.
    """

    top: Any
    total: Any
    sums: Any

    def start(self) -> None:
        """Has seen nothing."""
        self.top[...] = jnp.full(self.top.shape, MASKED)
        self.total[...] = jnp.zeros(self.total.shape)
        self.sums[...] = jnp.zeros(self.sums.shape)

    def take(self, s: jax.Array, v: jax.Array) -> None:
        """Takes logits [T, S], `MASKED` where nothing is seen, with values [S, H]."""
        top = self.top[...]
        higher = jnp.maximum(top, s.max(1, keepdims=True))
        # Of a query that has seen nothing yet these are ones; its first visible key shrinks them to nothing.
        p, shrink = jnp.exp(s - higher), jnp.exp(top - higher)
        self.top[...] = higher
        self.total[...] = self.total[...] * shrink + p.sum(1, keepdims=True)
        self.sums[...] = self.sums[...] * shrink + inner(p.astype(v.dtype), v)

    def out(self) -> jax.Array:
        """[T, H] float32; zeros where nothing was seen."""
        return jnp.where(self.top[...] > MASKED, self.sums[...] / self.total[...], 0)

    def lse(self) -> jax.Array:
        """[1, T] float32, log-sum-exp; -inf where nothing was seen."""
        return as_row(jnp.where(self.top[...] > MASKED, self.top[...] + jnp.log(self.total[...]), -jnp.inf))


def softmax_scratch(queries: int, head_dim: int) -> list[Any]:
    """The scratch of a `Softmax`."""
    return [pltpu.VMEM((queries, width), jnp.float32) for width in (1, 1, head_dim)]


def logit_gradients(s, dp, seen, lse, delta) -> tuple[jax.Array, jax.Array]:
    """Returns probabilities, and the gradients of the logits that they came from."""
    p = jnp.exp(jnp.where(seen, s, MASKED) - lse)
    return p, p * (dp - delta)


def outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """[T, H] × [S, H] → [T, S] float32."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def inner(p: jax.Array, x: jax.Array) -> jax.Array:
    """[T, S] × [S, H] → [T, H] float32."""
    return jax.lax.dot_general(p, x, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def two(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns both rows, or both columns."""
    return (x[:1], x[1:]) if axis == 0 else (x[:, :1], x[:, 1:])


def as_columns(rows: jax.Array) -> jax.Array:
    """[2, T] → [T, 2]."""
    return rows.T


def as_row(column: jax.Array) -> jax.Array:
    """[T, 1] → [1, T]."""
    return column.T
