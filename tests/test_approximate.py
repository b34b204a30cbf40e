"""Properties of the readers that may miss a nearest slot: what they find, and that lists lose no entry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import attention, memory
from fot.memory import Memory, Slots
from fot.readers import approximate, chosen, clustered, index, knn, table
from fot.readers.reader import Reader

B, T, N, G, H = 2, 8, 4, 2, 8
M, K = 4096, 16
LIST = 64


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def reader(name: str = "clustered", **changes) -> Reader:
    default = Reader(name, K, block=256, multi_doc=True, recall_target=0.9, list_size=LIST, probes=4)
    return default._replace(**changes)


def documents(queries: int = T) -> jax.Array:
    return jnp.zeros((B, queries), jnp.int32)


def slots(size: int = M) -> Slots:
    return Slots(draw(B, G, size, H, seed=1), draw(B, G, size, H, seed=2), jnp.zeros((B, size), jnp.int32))


def heads(queries: int = T) -> jax.Array:
    return attention.split_heads(draw(B, queries, N, H), G)


def found(nearest, *arguments, queries: int = T) -> np.ndarray:
    """The slots of all queries and heads, one below the other, in order; -1 for none."""
    result = jax.jit(lambda q, d, s: nearest(q, d, s, *arguments))(heads(queries), documents(queries), slots())
    return np.where(np.isfinite(result.score), result.index, -1).reshape(-1, result.index.shape[-1])


def recall(some: np.ndarray, all_of_them: np.ndarray) -> float:
    return np.mean([np.isin(right, left).mean() for left, right in zip(some, all_of_them, strict=True)])


# knn


def brute_force(slots: Slots, count: int) -> np.ndarray:
    s = np.asarray(chosen.scores(heads(), documents(), slots, chosen.cut(slots, 0, slots.keys.shape[2]), True))
    return np.argsort(-np.moveaxis(s, 2, 4), axis=-1, kind="stable")[..., :count]


@pytest.mark.parametrize(("size", "count", "block"), [(4096, 2, 256), (4099, 2, 100), (1000, 9, 1000), (37, 4, 10)])
def test_groups_find_the_same_slots_as_sorting(size, count, block):
    found = knn.nearest(heads(), documents(), slots(size), reader(neighbours=count, block=block))
    np.testing.assert_array_equal(np.sort(found.index, -1), np.sort(brute_force(slots(size), count), -1))


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_of_equal_logits_the_lower_slot_wins(chunk, monkeypatch):
    monkeypatch.setattr(knn, "_MAXIMA", chunk)
    twice = slots(500)
    # Whole numbers, so that equal keys have equal logits whatever the order of the sums.
    keys = jnp.round(twice.keys)
    twice = twice._replace(keys=jnp.concatenate([keys, keys], 2), documents=jnp.zeros((B, 1000), jnp.int32))
    q = jnp.round(heads())
    found = knn.nearest(q, documents(), twice, reader(neighbours=10, block=64))
    s = np.asarray(jnp.einsum("bgrth,bgmh->bgrtm", q, twice.keys))
    np.testing.assert_array_equal(found.index, np.argsort(-s, axis=-1, kind="stable")[..., :10])


# approximate


def test_bins_are_those_of_xla():
    for size, count, target in [(4096, 16, 0.9), (2**20, 128, 0.95), (50_000, 32, 0.99), (100, 8, 0.9)]:
        s = jax.ShapeDtypeStruct((2, size), jnp.float32)
        search = functools.partial(jax.lax.approx_max_k, k=count, recall_target=target, aggregate_to_topk=False)
        kept = jax.eval_shape(search, s)[0].shape[1]
        width = approximate.bin_width(size, count, target)
        # XLA rounds bins up to whole lanes.
        assert kept - 128 * 2 < size / width <= kept


@pytest.mark.parametrize(("target", "block"), [(0.8, 256), (0.9, 100), (0.99, 4096)])
def test_bins_have_the_recall_that_is_asked_for(target, block):
    ask = reader(recall_target=target, block=block)
    width = approximate.bin_width(M, K, target)
    some, exact = found(approximate.by_bins, ask, width, queries=64), found(knn.nearest, ask, queries=64)
    # The j-th largest is found if none of the j - 1 larger ones is in its bin.
    expected = np.mean((1 - width / M) ** np.arange(K))
    assert expected >= target
    # 512 queries of 16 slots each: a deviation of 0.01 is beyond three standard deviations.
    assert recall(some, exact) == pytest.approx(expected, abs=0.01)
    assert all(len(set(row)) == len(row) for row in some)


def test_bins_keep_the_largest_of_each():
    width, ask = 32, reader(neighbours=M // 32, block=M // 32)
    s = np.asarray(chosen.scores(heads(), documents(), slots(), chosen.cut(slots(), 0, M), True))
    winners = s.reshape(B, G, width, M // width, N // G, T).argmax(2)
    kept = found(approximate.by_bins, ask, width)
    expected = winners.transpose(0, 1, 3, 4, 2).reshape(-1, M // width) * (M // width) + np.arange(M // width)
    np.testing.assert_array_equal(np.sort(kept), np.sort(expected))


@pytest.mark.parametrize("size", [M, 3000])
def test_the_instruction_finds_as_much_as_the_bins(size):
    ask, exact = reader(), brute_force(slots(size), K).reshape(-1, K)
    result = approximate.by_instruction(heads(), documents(), slots(size), ask, approximate.bin_width(size, K, 0.9))
    assert recall(np.asarray(result.index).reshape(-1, K), exact) >= 0.9


def test_a_tpu_gets_the_instruction():
    read = jax.jit(lambda q, d, s: approximate.nearest(q, d, s, reader("approximate")))
    traced = read.trace(heads(), documents(), slots())
    for platform, instruction in (("tpu", True), ("cpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("ApproxTopK" in text or "approx_top_k" in text.lower()) is instruction


# clustered


def filled(written: int, capacity: int = 512, rows: tuple[int, ...] = (1, 2)) -> Memory:
    """A memory of two layers; row b took b times as many entries."""
    result = memory.empty(2, B, capacity, G, H, jnp.float32)
    for start in range(0, written * max(rows), 100):
        number = start + np.arange(100)
        real = np.stack([number < written * row for row in rows])
        entries = (draw(2, B, 100, G, H, seed=start + which) for which in (1, 2))
        result = _write(result, *entries, jnp.where(real, 0, -1))
    return result


_write = jax.jit(memory.write)
_build = jax.jit(index.build, static_argnums=1)
_refresh = jax.jit(index.refresh, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def _read(slots: Slots, reader: Reader) -> attention.Partial:
    return table.read(draw(B, T, N, H), documents(), slots, reader)


def read(held: Memory, **changes) -> attention.Partial:
    return _read(held.slots(1), reader(**changes))


def exact(held: Memory) -> attention.Partial:
    return _read(held._replace(index=None).slots(1), reader("knn"))


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


@pytest.mark.parametrize("list_size", [1, 16, 64, 2000])
@pytest.mark.parametrize("written", [0, 5, 200, 400])
def test_lists_hold_every_entry_once(written, list_size):
    held = _build(filled(written), list_size)
    lists = held.index.lists
    for layer, row, head in np.ndindex(2, B, G):
        order, begin, length, mean, spread, keys = (
            np.asarray(x[layer, row, head])
            for x in (lists.order, lists.begin, lists.length, lists.mean, lists.spread, held.keys)
        )
        listed = [order[start : start + size] for start, size in zip(begin, length, strict=True) if size]
        listed = np.concatenate([*listed, np.zeros(0, int)])
        np.testing.assert_array_equal(np.sort(listed), np.flatnonzero(np.asarray(held.entries[row]) >= 0))
        assert length.max() <= list_size and length.min() >= 0
        for i in np.flatnonzero(length):
            members = order[begin[i] : begin[i] + length[i]]
            assert len(np.unique(np.asarray(lists.cluster[layer, row, head])[members])) == 1
            np.testing.assert_allclose(mean[i], keys[members].mean(0), atol=1e-5)
            far = np.sqrt(np.square(keys[members] - keys[members].mean(0)).sum(-1).mean())
            np.testing.assert_allclose(spread[i], far, atol=1e-3)
    np.testing.assert_array_equal(
        lists.keys, jnp.take_along_axis(held.keys, lists.order[..., None], 3)
    )  # a list is read as one piece
    np.testing.assert_array_equal(held.index.covered, held.written)


def test_entries_are_with_the_nearest_centroid():
    held = _build(filled(200), LIST)
    s = jnp.einsum("lbgmh,lbgch->lbgmc", held.keys, held.index.lists.centroids)
    nearest = jnp.where((held.entries >= 0)[None, :, None], s.argmax(-1), s.shape[-1])
    np.testing.assert_array_equal(held.index.lists.cluster, nearest)
    assert len(np.unique(nearest)) == s.shape[-1] + 1  # no centroid is without entries


def test_a_cluster_with_several_lists_is_cut_along_its_longest_axis():
    axis = jnp.eye(H)[0]
    along = draw(M, 1, seed=5)
    # A large bunch of keys and a small one; a key of each is a seed of k-means.
    far = jnp.where(jnp.arange(M) % 8 == 3, -20.0, 20.0)[:, None]
    keys = (far + along * axis + 0.1 * draw(M, H, seed=6))[None, None]
    held = _build(Memory(keys[None], keys[None], jnp.zeros((1, M), jnp.int32), jnp.full(1, M)), 7 * M // 16)
    lists = jax.tree.map(lambda x: np.asarray(x[0, 0, 0]), held.index.lists)
    np.testing.assert_allclose(np.abs(lists.axes @ axis), 1, atol=0.01)
    members = [
        np.asarray(along)[lists.order[i : i + n], 0] for i, n in zip(lists.begin, lists.length, strict=True) if n
    ]
    whole, *others = sorted(members, key=len)
    assert [len(whole), *map(len, others)] == [M // 8, 7 * M // 16, 7 * M // 16]
    left, right = sorted(others, key=np.mean)
    assert left.max() < right.min() + 0.5  # up to the keys' width in other directions
    assert whole.std() == pytest.approx(1, abs=0.1)


def test_without_lists_or_with_all_of_them_clustered_is_exact():
    held = filled(200)
    close(read(held), exact(held))
    close(read(_build(held, LIST), probes=10**6), exact(held))


@pytest.mark.parametrize("grown", [0, 30, 300, 1000])
@pytest.mark.parametrize("update", [lambda held: held, lambda held: _refresh(held, LIST)], ids=["stale", "refreshed"])
def test_a_memory_that_grew_is_read_whole(grown, update):
    """Entries that came after the lists, in slots that held others: nothing is missed, nothing read twice."""
    held = _build(filled(250), LIST)  # 500 of 512 slots of the other row
    for start in range(0, grown, 10):
        entries = (draw(2, B, 10, G, H, seed=10_000 + start + which) for which in (1, 2))
        held = _write(held, *entries, jnp.zeros((B, 10), jnp.int32))
    held = update(held)
    close(read(held, probes=10**6), exact(held))


def test_a_cleared_row_is_empty_and_fills_again():
    held = memory.clear(_build(filled(200), LIST), jnp.array([True, False]))
    assert (read(held, probes=10**6).lse[0] == -jnp.inf).all()
    held = _write(held, *(draw(2, B, 10, G, H, seed=which) for which in (8, 9)), jnp.zeros((B, 10), jnp.int32))
    close(read(held, probes=10**6), exact(held))
    close(read(_refresh(held, LIST), probes=10**6), exact(held))


def test_refreshing_lists_by_the_centroids_there_are():
    whole = _build(filled(200), LIST)
    again = _refresh(whole, LIST)
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    # All assignments forgotten: found again.
    forgot = whole._replace(index=whole.index._replace(covered=jnp.zeros(B, jnp.int32)))
    jax.tree.map(np.testing.assert_array_equal, _refresh(forgot, LIST), whole)


def test_recall_grows_with_probes():
    """Keys in bunches, and queries among them; random keys without any order would need most lists."""
    bunches = draw(G, 64, 1, H, seed=5)
    keys = (bunches + 0.2 * draw(B, G, 64, 64, H, seed=6)).reshape(B, G, M, H)
    held = Memory(keys[None], keys[None], jnp.zeros((B, M), jnp.int32), jnp.full(B, M))
    view = _build(held, LIST).slots(0)
    q = jnp.moveaxis(keys[:, :, :: M // T] + 0.1 * draw(B, G, T, H, seed=7), 1, 2)
    q = attention.split_heads(q, G)

    @functools.partial(jax.jit, static_argnums=1)
    def search(view, ask):
        return clustered.nearest(q, documents(), view, ask).index.reshape(-1, K)

    best = np.asarray(knn.nearest(q, documents(), view, reader("knn")).index).reshape(-1, K)
    recalls = [recall(np.asarray(search(view, reader(probes=probes))), best) for probes in (1, 4, 16, 10**6)]
    assert recalls == sorted(recalls) and recalls[0] < 0.98 and recalls[-1] == 1
    assert recalls[2] > 0.95


def test_documents_are_told_apart_in_lists():
    held = _build(filled(200), LIST)
    mixed = held._replace(documents=jnp.where(held.documents >= 0, jnp.arange(512) % 3, -1))
    ask = reader(multi_doc=False, probes=10**6)
    close(_read(mixed.slots(0), ask), _read(mixed._replace(index=None).slots(0), ask._replace(name="knn")))
