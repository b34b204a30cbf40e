"""Tables of the variants against their formulas; streamed contexts against the plain formula."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import attention, crossbatch
from fot.attention import Partial, Tokens
from fot.config import CrossbatchConfig
from fot.contexts import alike, attend_contexts
from fot.crossbatch import VARIANTS, Table

SEGMENTS_3B, SEGMENTS_7B = ((0, 0), (1, 1), (2, 1), (3, 0)), ((0, 0), (1, 2), (2, 5), (3, 4))

K, PACKS, T, N, G, H = 4, 2, 6, 4, 2, 4
B = K * PACKS
SEGMENTS = ((0, 0), (1, 2), (2, 3), (3, 4))
CONFIG = CrossbatchConfig(packing=K, w=2, segments=SEGMENTS, range=5, stepping=False)


def config_of(variant: str) -> CrossbatchConfig:
    return dataclasses.replace(CONFIG, variant=variant)


def seen(table: Table) -> list[list[tuple[int, bool]]]:
    """What each row sees, as (row, negative), in the order of the columns."""
    return [
        [(int(c), bool(n)) for c, n in zip(contexts, negatives, strict=True) if c >= 0]
        for contexts, negatives in zip(*table, strict=True)
    ]


# Tables.


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_table_keeps_to_what_a_table_is(variant, rows):
    table = crossbatch.make_table(config_of(variant), rows, 2)
    assert table.contexts_BC.dtype == np.int32 and table.negative_BC.dtype == bool
    assert table.contexts_BC.shape == table.negative_BC.shape == (rows, table.contexts_BC.shape[1])
    assert not table.negative_BC[table.contexts_BC < 0].any()
    for row, contexts in enumerate(seen(table)):
        assert len({context for context, _ in contexts}) == len(contexts)
        for context, negative in contexts:
            own = context // K == row // K
            assert context < rows and negative != own
            assert not own or context < row


def test_no_row_sees_another_without_crossbatch():
    assert crossbatch.make_table(config_of("none"), 8, 3).contexts_BC.shape == (8, 0)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_paper_current_contexts_see_previous_contexts_of_d_documents_cyclically(d):
    packs = 5
    table = crossbatch.previous(CrossbatchConfig(packing=2, w=1), 2 * packs, d)
    for pack in range(packs):
        assert seen(table)[2 * pack] == []  # C_prev
        expected = [(2 * ((pack + other) % packs), other > 0) for other in range(d)]
        assert seen(table)[2 * pack + 1] == expected  # C_curr


@pytest.mark.parametrize(("packing", "w", "d"), [(4, 2, 1), (4, 3, 2), (3, 1, 3)])
def test_paper_w_previous_contexts_of_each_document(packing, w, d):
    packs = 3
    table = crossbatch.previous(CrossbatchConfig(packing=packing, w=w), packs * packing, d)
    for row, contexts in enumerate(seen(table)):
        pack, place = divmod(row, packing)
        first = max(place - w, 0)
        documents = [(pack + other) % packs for other in range(d)]
        assert {c for c, _ in contexts} == {o * packing + p for o in documents for p in range(first, place)}
        assert {c for c, negative in contexts if not negative} == {pack * packing + p for p in range(first, place)}


@pytest.mark.parametrize("segments", [SEGMENTS_3B, SEGMENTS_7B])
def test_longllama_segments_count_positives_and_negatives_by_place(segments):
    table = crossbatch.segments(dataclasses.replace(CONFIG, segments=segments), 16, 1)
    for row, contexts in enumerate(seen(table)):
        positives, negatives = segments[row % 4]
        assert [c for c, negative in contexts if not negative] == [row - 1 - i for i in range(positives)]
        others = [c for c, negative in contexts if negative]
        assert len(set(others)) == len(others) == negatives
        assert not any(c // 4 == row // 4 for c in others)


@pytest.mark.parametrize(
    ("packing", "reach", "stepping"),
    [(2, 2, True), (4, 3, False), (4, 3, True), (4, 7, True), (8, 3, True), (1, 3, True), (2, 5, False), (4, 1, True)],
)
def test_released_range_and_stepping_never_wrap(packing, reach, stepping):
    table = crossbatch.released(
        CrossbatchConfig(variant="released", packing=packing, range=reach, stepping=stepping), 16, 1
    )
    step = int(np.ceil((reach + 1) / max(packing - 1, 1)))
    for row, contexts in enumerate(seen(table)):
        with_itself = reach + 1
        if stepping and packing > 1:
            with_itself = min(row % packing * step + 1, reach + 1)
        with_itself = min(with_itself, row + 1)
        assert [c for c, _ in contexts] == [row - back for back in range(1, with_itself)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_are_batches_of_their_own(variant):
    alone = crossbatch.make_table(config_of(variant), 8, 2)
    table = crossbatch.make_table(dataclasses.replace(config_of(variant), groups=3), 24, 2)
    for group in range(3):
        rows = slice(8 * group, 8 * group + 8)
        np.testing.assert_array_equal(
            table.contexts_BC[rows], np.where(alone.contexts_BC < 0, -1, alone.contexts_BC + 8 * group)
        )
        np.testing.assert_array_equal(table.negative_BC[rows], alone.negative_BC)


def test_loss_rows_are_all_or_the_last_of_each_pack():
    assert list(range(8)[crossbatch.loss_rows(CONFIG)]) == list(range(8))
    assert list(range(8)[crossbatch.loss_rows(dataclasses.replace(CONFIG, loss_rows="last"))]) == [3, 7]


# Attention to contexts.


def stream() -> Tokens:
    """Two packs of four rows whose documents begin and end inside rows; the second pack ends in padding."""
    lengths = [[15, 4, 5], [3, 19]]
    documents, positions = np.full((PACKS, K * T), -1, np.int32), np.zeros((PACKS, K * T), np.int32)
    for pack, sizes in enumerate(lengths):
        ends = np.cumsum(sizes)
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            documents[pack, end - size : end] = pack + PACKS * index
            positions[pack, end - size : end] = np.arange(size)
    return Tokens(jnp.asarray(documents.reshape(B, T)), jnp.asarray(positions.reshape(B, T)))


TOKENS = stream()


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def inputs() -> dict[str, jax.Array]:
    """Queries, local keys, keys as other rows see them, values."""
    shapes = {"q": (B, T, N, H), "near": (B, T, G, H), "far": (B, T, G, H), "v": (B, T, G, H)}
    return {name: draw(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def sees(query: tuple[int, int], row: int, key: int, negative: bool) -> bool:
    """Whether a token sees one of another row, in a positive or negative column."""
    documents, positions = np.asarray(TOKENS.documents), np.asarray(TOKENS.positions)
    if documents[row, key] == -1:
        return False
    if documents[row, key] == documents[query]:
        return positions[row, key] <= positions[query]
    return negative


def context_mask(table: Table) -> np.ndarray:
    """[B, T, C, T], by a loop over everything."""
    mask = np.zeros((B, T, table.contexts_BC.shape[1], T), bool)
    for row, time, column, key in np.ndindex(mask.shape):
        context = table.contexts_BC[row, column]
        if context >= 0:
            mask[row, time, column, key] = sees((row, time), context, key, table.negative_BC[row, column])
    return mask


def local_mask() -> np.ndarray:
    documents = np.asarray(TOKENS.documents)
    same = (documents[:, :, None] == documents[:, None]) & (documents >= 0)[:, None]
    return same & np.tri(T, dtype=bool)


def plain_weights(q, near, far, contexts_BC, local_BTS, context_BTCS) -> jax.Array:
    """One softmax over all logits of the local context and all gathered contexts: weights [B, N, T, 1 + C, S]."""
    keys = jnp.concatenate([near[:, None], far[contexts_BC]], axis=1)
    keys = jnp.repeat(keys, q.shape[2] // keys.shape[3], axis=3)
    s = jnp.einsum("btnh,bcsnh->bntcs", q, keys)
    mask = jnp.concatenate([local_BTS[:, :, None], context_BTCS], axis=2)[:, None]
    flat = jnp.where(mask, s, -1e30).reshape(*s.shape[:3], -1)
    return jnp.where(mask, jax.nn.softmax(flat, axis=-1).reshape(s.shape), 0)


def plain(x: dict[str, jax.Array], contexts_BC, local_BTS, context_BTCS) -> jax.Array:
    """Attention by the formula: gathers all contexts, forms all logits."""
    weights = plain_weights(x["q"], x["near"], x["far"], contexts_BC, local_BTS, context_BTCS)
    values = jnp.concatenate([x["v"][:, None], x["v"][contexts_BC]], axis=1)
    return jnp.einsum("bntcs,bcsnh->btnh", weights, jnp.repeat(values, weights.shape[1] // values.shape[3], axis=3))


def streamed(x: dict[str, jax.Array], table: Table, block: int) -> jax.Array:
    local = attention.attend_local(x["q"], x["near"], x["v"], TOKENS, block)
    far = attend_contexts(x["q"], x["far"], x["v"], TOKENS, TOKENS, table, block)
    return attention.merge(local, far).out


def value_and_gradients(f):
    """Jitted: f(inputs) and the gradients of a weighted sum of it."""

    def loss(x):
        out = f(x)
        return (out * draw(*out.shape, seed=9)).sum(), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(inputs())
    return gradients | {"out": out}


def close(left, right, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@functools.cache
def result(variant: str, block: int) -> dict[str, jax.Array]:
    table = crossbatch.make_table(config_of(variant), B, 2)
    return value_and_gradients(lambda x: streamed(x, table, block))


@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_contexts_equal_the_plain_formula_in_value_and_gradient(variant):
    table = crossbatch.make_table(config_of(variant), B, 2)
    expected = value_and_gradients(lambda x: plain(x, table.contexts_BC, local_mask(), context_mask(table)))
    close(result(variant, 4), expected)


def test_rows_are_grouped_so_that_few_wait_for_those_that_see_more():
    table = crossbatch.previous(CrossbatchConfig(packing=16, w=15), 64, 4)
    count_B = (table.contexts_BC >= 0).sum(1)
    groups = alike(count_B)
    np.testing.assert_array_equal(np.sort(np.concatenate(groups)), np.flatnonzero(count_B))
    visited = sum(len(rows) * count_B[rows].max() for rows in groups)
    assert count_B.sum() <= visited < 1.2 * count_B.sum() <= 0.6 * count_B.size * count_B.max()


def test_groups_of_rows_equal_the_plain_formula_in_value_and_gradient():
    table = crossbatch.previous(CrossbatchConfig(packing=K, w=K - 1), B, 2)
    assert len(alike((table.contexts_BC >= 0).sum(1))) == K - 1
    expected = value_and_gradients(lambda x: plain(x, table.contexts_BC, local_mask(), context_mask(table)))
    close(value_and_gradients(lambda x: streamed(x, table, 4)), expected)


def test_block_changes_no_result():
    for block in (T, 100):
        close(result("previous", block), result("previous", 4))


def test_released_behaviour_shows_every_context_whole():
    table = crossbatch.make_table(config_of("released"), B, 1)
    whole = crossbatch.rows_as_documents(B, T)
    same(whole.documents, np.repeat(np.arange(B), T).reshape(B, T))
    shown = crossbatch.without_documents(table)

    def far(x):
        return attend_contexts(x["q"], x["far"], x["v"], whole, whole, shown, T).out

    mask = np.broadcast_to((table.contexts_BC >= 0)[:, None, :, None], (B, T, table.contexts_BC.shape[1], T))
    nothing = np.zeros((B, T, T), bool)
    close(value_and_gradients(far), value_and_gradients(lambda x: plain(x, table.contexts_BC, nothing, mask)))


@pytest.mark.parametrize("keep", [[3, 7], [0, 5], [6]])
def test_some_query_rows_get_what_they_get_among_all(keep):
    keep = np.array(keep)
    table = crossbatch.make_table(config_of("previous"), B, 2)
    part = Table(table.contexts_BC[keep], table.negative_BC[keep])
    queries = jax.tree.map(lambda x: x[keep], TOKENS)
    x = inputs()
    some = attend_contexts(x["q"][keep], x["far"], x["v"], queries, TOKENS, part, T)
    every = attend_contexts(x["q"], x["far"], x["v"], TOKENS, TOKENS, table, T)
    close(some, jax.tree.map(lambda x: x[keep], every), 1e-6)


@pytest.mark.parametrize("variant", ["previous", "segments", "released"])
def test_permuting_negatives_changes_nothing(variant):
    table = crossbatch.make_table(config_of(variant), B, 2)
    columns = np.arange(table.contexts_BC.shape[1])
    orders = np.stack([columns.copy() for _ in range(B)])
    for row, order in enumerate(orders):
        negative = columns[table.negative_BC[row]]
        order[negative] = np.roll(negative, 1)
    permuted = Table(*(np.take_along_axis(x, orders, axis=1) for x in table))
    assert (permuted.contexts_BC != table.contexts_BC).any()
    close(value_and_gradients(lambda x: streamed(x, permuted, 4)), result(variant, 4))


@functools.cache
def influence(variant: str) -> np.ndarray:
    """[B, T, B, T]: the gradient that the value of each token gets from each token's attention to contexts."""
    table = crossbatch.make_table(config_of(variant), B, 2)
    x = inputs()

    def far(v):
        return attend_contexts(x["q"], x["far"], v, TOKENS, TOKENS, table, T).out.sum((-1, -2))

    def gradient(cotangent):
        return jax.vjp(far, x["v"])[1](cotangent)[0].sum((-1, -2))

    return np.asarray(jax.jit(jax.vmap(gradient))(jnp.eye(B * T).reshape(-1, B, T))).reshape(B, T, B, T)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_takes_another_document_for_its_own(variant):
    table = crossbatch.make_table(config_of(variant), B, 2)
    for query_row, time, row, key in np.ndindex(B, T, B, T):
        columns = [negative for context, negative in seen(table)[query_row] if context == row]
        expected = bool(columns) and sees((query_row, time), row, key, columns[0])
        assert (influence(variant)[query_row, time, row, key] != 0) == expected


def test_masked_documents_are_there_to_be_masked():
    """The tables and documents above have every case: hidden, later, padded, own earlier and others' tokens."""
    table = crossbatch.make_table(config_of("previous"), B, 2)
    documents = np.asarray(TOKENS.documents)
    shares = influence("previous")
    own = documents[:, :, None, None] == documents
    hidden, shown = (shares == 0), (shares != 0)
    positive = np.zeros((B, 1, B, 1), bool)
    for row, contexts in enumerate(seen(table)):
        positive[row, 0, [c for c, negative in contexts if not negative], 0] = True
    assert (positive & hidden & ~own).any() and (positive & shown & own).any() and (shown & ~own).any()


def test_rows_without_contexts_give_nothing_and_change_no_bit():
    table = crossbatch.make_table(config_of("previous"), B, 2)
    x = inputs()
    part = attend_contexts(x["q"], x["far"], x["v"], TOKENS, TOKENS, table, T)
    first = np.arange(0, B, K)
    same(part.out[first], np.zeros((PACKS, T, N, H)))
    same(part.lse[first], np.full((PACKS, T, N), -np.inf))
    local = attention.attend_local(x["q"], x["near"], x["v"], TOKENS, T)
    merged = attention.merge(local, part)
    same(jax.tree.map(lambda x: x[first], merged), jax.tree.map(lambda x: x[first], local))
    assert all(jnp.isfinite(g).all() for g in result("previous", 4).values())


def test_a_table_without_columns_gives_nothing():
    x = inputs()
    table = crossbatch.make_table(config_of("none"), B, 1)
    part = attend_contexts(x["q"], x["far"], x["v"], TOKENS, TOKENS, table, T)
    same(part, Partial(jnp.zeros((B, T, N, H)), jnp.full((B, T, N), -jnp.inf)))


# Peak memory.


def peak_bytes(f, d: int) -> int:
    """Bytes that the gradient of f needs beyond inputs and outputs, with 32 rows of 64 tokens."""
    rows, length = 32, 64
    table = crossbatch.previous(CrossbatchConfig(packing=2, w=1), rows, d)
    x = [jax.ShapeDtypeStruct((rows, length, 2, 16), jnp.float32)] * 3
    gradient = jax.grad(lambda q, k, v: (f(q, k, v, table) ** 2).sum(), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(*x).compile().memory_analysis().temp_size_in_bytes


def test_peak_memory_does_not_grow_with_the_contexts():
    def streaming(q, k, v, table):
        tokens = crossbatch.rows_as_documents(*q.shape[:2])
        return attend_contexts(q, k, v, tokens, tokens, crossbatch.without_documents(table), 32).out

    def gathering(q, k, v, table):
        rows, length = q.shape[:2]
        shown = jnp.asarray(table.contexts_BC >= 0)[:, None, :, None]
        mask = jnp.broadcast_to(shown, (rows, length, table.contexts_BC.shape[1], length))
        x = {"q": q, "near": k, "far": k, "v": v}
        return plain(x, table.contexts_BC, jnp.zeros((rows, length, length), bool), mask)

    assert peak_bytes(streaming, 16) < 1.1 * peak_bytes(streaming, 4)
    assert peak_bytes(gathering, 16) > 2.5 * peak_bytes(gathering, 4)
    assert peak_bytes(streaming, 16) < 0.25 * peak_bytes(gathering, 16)
