"""Arithmetic on blocks in VMEM, for the kernels of crossbatch attention: masks, products, gradients of logits."""

import jax
import jax.numpy as jnp

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
