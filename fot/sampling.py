"""The next token, drawn from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are drawn; fixed for a run.

    Attributes:
      temperature: what logits are divided by; 0 takes the likeliest token.
      top_k: draw from this many likeliest tokens; 0 is all.
      top_p: draw from the fewest likeliest tokens of at least this probability together, given `top_k`; 1 is all.
    """

    temperature: float
    top_k: int
    top_p: float


class Candidates(NamedTuple):
    """Tokens that may be drawn: [B, K] int32, the likeliest first, and their float32 logits, -inf if not."""

    tokens: jax.Array
    logits: jax.Array


def candidates(logits_BV: jax.Array, sampling: Sampling) -> Candidates:
    """Returns what may be drawn; of equally likely tokens the first comes first. The temperature must not be 0."""
    vocabulary = logits_BV.shape[-1]
    top, tokens = jax.lax.top_k(logits_BV / sampling.temperature, min(sampling.top_k or vocabulary, vocabulary))
    p = jax.nn.softmax(top, -1)
    likelier = jnp.cumsum(p, -1) - p  # the probability of the tokens before each
    return Candidates(tokens, jnp.where((likelier < sampling.top_p) | (sampling.top_p >= 1), top, -jnp.inf))


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token for each row, with its own key; [B] int32."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    found = candidates(logits_BV, sampling)
    choice = jax.vmap(jax.random.categorical)(keys_B, found.logits)
    return jnp.take_along_axis(found.tokens, choice[:, None], 1)[:, 0]
