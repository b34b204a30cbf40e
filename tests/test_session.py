"""What moves from local cache to memory, and when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import generate, incremental, session
from tests.generating import LAST, QUIET, TINY, WINDOW, drawn, one_device, prompts_of, tiny_config_of


@pytest.fixture(scope="module")
def mesh():
    return one_device()


@pytest.fixture(scope="module")
def tiny(mesh):
    return incremental.prepare(drawn(TINY), TINY, mesh)


def test_pieces_that_fit_are_as_good_as_single_tokens(mesh, tiny):
    setup, [prompt, rest] = session.setup_of(tiny_config_of(), mesh), prompts_of([20, 22])

    def feed(sizes):
        state, _ = session.read(tiny, setup, session.empty(setup, 1), [prompt], QUIET)
        for end, size in zip(np.cumsum(sizes), sizes, strict=True):
            state, logits = session.advance(tiny, setup, state, [rest[end - size : end]])
        return state, np.asarray(logits)

    # 8 entries after the prompt: 8 more fit, and what follows begins a new local context.
    alone, wanted = feed([1] * 22)
    for sizes in ((8, 14), (3, 5, 1, 6, 7)):
        state, logits = feed(sizes)
        assert state.length == alone.length == 14 and state.written == alone.written == 28
        np.testing.assert_allclose(logits, wanted, atol=1e-5)
    # A piece that doesn't fit moves all that is there, whatever room was left.
    state, _ = feed((6, 14))
    assert state.length == 14 and state.written == 26


def test_a_text_after_a_cache_is_read_in_windows(mesh, tiny):
    setup, [prompt, rest] = session.setup_of(tiny_config_of(), mesh), prompts_of([20, 27])
    state, other = (session.read(tiny, setup, session.empty(setup, 1), [prompt], QUIET)[0] for _ in range(2))
    state, logits = session.read(tiny, setup, state, [rest], QUIET)
    for part in (rest[:16], rest[16:19], rest[19:]):
        other, wanted = session.advance(tiny, setup, other, [part])
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    assert state.length == other.length and state.written == other.written


def test_a_bfloat16_memory_is_close(mesh, tiny):
    setup, prompts = session.setup_of(tiny_config_of(memory_dtype="bfloat16"), mesh), prompts_of([40])
    state, logits = session.read(tiny, setup, session.empty(setup, 1), prompts, QUIET)
    assert state.memory.keys.dtype == state.memory.values.dtype == jnp.bfloat16
    exact = generate.prompt_logits(tiny, tiny_config_of(), prompts, mesh)[0][-1]
    assert 0 < np.abs(logits[0] - exact).max() < 0.02 * np.abs(exact).max()


def test_the_cache_is_made_when_something_enters_it(mesh, tiny):
    """So it is not there while a long text is read into memory."""
    setup, [prompt] = session.setup_of(tiny_config_of(), mesh), prompts_of([40])
    state = session.reserve(setup, session.empty(setup, 1), session.entries_of(setup, 40, 8))
    assert state.memory is not None and state.cache is None
    state, _ = session.read(tiny, setup, state, [prompt], QUIET)
    assert state.cache.capacity == setup.cache_capacity and state.cache.length == LAST


@pytest.mark.parametrize("last", [1, WINDOW, 20])
def test_any_last_context_length(last, mesh, tiny):
    """Longer than the window, too: its entries move as soon as a token follows."""
    setup, prompts = session.setup_of(tiny_config_of(last_context_length=last), mesh), prompts_of((30, 5))
    state, _ = session.read(tiny, setup, session.empty(setup, 2), prompts, QUIET)
    assert state.length.tolist() == [min(30, last), min(5, last)]
    state, logits = session.advance(tiny, setup, state, [[7], [7]])
    moved = last >= WINDOW
    assert state.length.tolist() == [1 if moved else 2, min(5, last) + 1]
    assert state.written.tolist() == [30 if moved else 29, max(5 - last, 0)]
    assert np.isfinite(logits).all()


def test_a_memory_from_elsewhere_comes_before_the_prompt(mesh, tiny):
    setup, [text] = session.setup_of(tiny_config_of(), mesh), prompts_of((2 * WINDOW + LAST,))
    state, wanted = session.read(tiny, setup, session.empty(setup, 1), [text], QUIET)
    held = jax.device_get(state.memory)  # two windows
    for rows in (1, 2):
        state = session.remember(setup, session.empty(setup, rows), held)
        assert state.written.tolist() == [2 * WINDOW] * rows
        logits = session.read(tiny, setup, state, [text[2 * WINDOW :]] * rows, QUIET)[1]
        np.testing.assert_allclose(logits, np.broadcast_to(wanted, logits.shape), atol=1e-5)
