"""Properties of sampling: what may be drawn, how often, and that a row's draw is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot.sampling import Sampling, candidates, sample

P = np.array([0.4, 0.05, 0.3, 0.05, 0.2])
LOGITS = jnp.log(jnp.array(P, jnp.float32))[None]


@pytest.mark.parametrize(
    ("top_k", "top_p", "support"),
    [
        (0, 1.0, {0, 1, 2, 3, 4}),
        (99, 1.0, {0, 1, 2, 3, 4}),
        (2, 1.0, {0, 2}),
        (4, 1.0, {0, 1, 2, 4}),  # of equally likely ones the first
        (0, 0.3, {0}),
        (0, 0.5, {0, 2}),
        (0, 0.69, {0, 2}),
        (0, 0.8, {0, 2, 4}),
        (2, 0.55, {0}),  # top_p of what top_k leaves: 0.4 / 0.7
        (3, 0.6, {0, 2}),
        (0, 1e-6, {0}),
    ],
)
def test_support_and_frequencies(top_k, top_p, support):
    sampling = Sampling(1.0, top_k, top_p)
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(sample, static_argnums=2)(jnp.tile(LOGITS, (len(keys), 1)), keys, sampling)
    counts = np.bincount(drawn, minlength=len(P)) / len(keys)
    assert set(np.flatnonzero(counts)) == support
    wanted = np.where(np.isin(np.arange(len(P)), list(support)), P, 0)
    np.testing.assert_allclose(counts, wanted / wanted.sum(), atol=0.02)


def test_temperature_divides_logits():
    found = candidates(LOGITS, Sampling(0.5, 0, 1.0))
    np.testing.assert_allclose(jax.nn.softmax(found.logits)[0], np.sort(P**2)[::-1] / (P**2).sum(), atol=1e-6)
    for sampling in (Sampling(0.0, 0, 1.0), Sampling(1.0, 1, 1.0), Sampling(1e-3, 0, 1.0)):
        assert sample(LOGITS, jax.random.split(jax.random.key(0), 1), sampling).tolist() == [0]


def test_a_row_is_drawn_by_its_own_key():
    logits, keys = jax.random.normal(jax.random.key(1), (6, 40)), jax.random.split(jax.random.key(2), 6)
    sampling = Sampling(2.0, 30, 0.9)
    together = sample(logits, keys, sampling)
    alone = [int(sample(logits[i : i + 1], keys[i : i + 1], sampling)[0]) for i in range(6)]
    assert together.tolist() == alone
