"""Properties of rotary positions, local attention and the joint softmax of partial attentions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import attention, sharding
from fot.attention import Partial, Tokens
from fot.config import MeshConfig, RopeScalingConfig

B, T, N, G, H = 3, 8, 4, 2, 4
BLOCKS = [3, 8, 64]

# Documents that fill, begin, and end inside rows; the last row ends in padding.
DOCUMENTS = np.array([[0] * 8, [1] * 3 + [2] * 4 + [3], [4] * 3 + [5] * 3 + [-1] * 2], np.int32)
POSITIONS = np.array([range(20, 28), [7, 8, 9, *range(4), 0], [*range(3), *range(3), 0, 0]], np.int32)
TOKENS = Tokens(jnp.asarray(DOCUMENTS), jnp.asarray(POSITIONS))
VISIBLE = np.array(
    [[[DOCUMENTS[b, t] == DOCUMENTS[b, s] != -1 and s <= t for s in range(T)] for t in range(T)] for b in range(B)]
)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def qkv(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    return draw(B, T, N, H, seed=seed), draw(B, T, G, H, seed=seed + 1), draw(B, T, G, H, seed=seed + 2)


@jax.jit
def plain(q, k, v, visible_BTS) -> Partial:
    """Softmax attention as the textbook has it: kv heads repeated, all logits at once."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    mask = jnp.asarray(visible_BTS)[:, :, None]
    s = jnp.where(mask, jnp.einsum("btnh,bsnh->btns", q, k), -1e30)
    p = jnp.where(mask, jax.nn.softmax(s, -1), 0)
    lse = jnp.where(mask.any(-1), jax.nn.logsumexp(s, -1), -jnp.inf)
    return Partial(jnp.einsum("btns,bsnh->btnh", p, v), lse)


def score(part: Partial) -> jax.Array:
    """A scalar that depends on every output and every finite log-sum-exp."""
    lse = jnp.where(part.lse > -jnp.inf, part.lse, 0)
    return (part.out * draw(*part.out.shape, seed=7)).sum() + (lse * draw(*lse.shape, seed=8)).sum()


def close(left, right, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def local():
    """Local attention and its gradients, by block size."""

    def run(q, k, v, block):
        def loss(q, k, v):
            part = attention.attend_local(q, k, v, TOKENS, block)
            return score(part), part

        gradients, part = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return part, gradients

    return jax.jit(run, static_argnums=3)


@pytest.mark.parametrize("block", BLOCKS)
def test_local_attention_is_the_plain_softmax_in_value_and_gradient(local, block):
    part, gradients = local(*qkv(), block)
    close(part, plain(*qkv(), VISIBLE))
    close(gradients, jax.jit(jax.grad(lambda *x: score(plain(*x, VISIBLE)), argnums=(0, 1, 2)))(*qkv()))


@pytest.mark.parametrize("tensor", [1, 2])
def test_heads_one_after_the_other_change_no_number_and_a_mesh_that_splits_them_has_all_at_once(monkeypatch, tensor):
    """As where a cache holds no more than one head's logits."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=1, tensor=tensor), jax.devices()[:tensor])

    def run(q, k, v):
        def loss(*qkv):
            part = attention.attend_local(*qkv, TOKENS, 3)
            return score(part), part

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    with jax.set_mesh(mesh):
        wanted = jax.jit(run)(*qkv())
        monkeypatch.setattr(attention, "_CACHE_LOGITS", 1)
        traced = jax.jit(lambda *x: run(*x)).trace(*qkv())
        close(traced.lower().compile()(*qkv()), wanted)
    assert (str(traced.jaxpr).count("scan[") == 2) == (tensor == 1)


@pytest.mark.parametrize("block", BLOCKS)
def test_no_token_sees_a_later_one_or_another_document(local, block):
    q, k, v = qkv()
    before = local(q, k, v, block)[0]
    for place in range(T):
        after = local(q, k.at[:, place].add(3), v.at[:, place].add(3), block)[0]
        unchanged = ~VISIBLE[:, :, place]
        same(*(jax.tree.map(lambda x: x[unchanged], part) for part in (before, after)))  # noqa: B023
        assert (before.out != after.out).any((-1, -2))[~unchanged].all()


def test_tokens_without_a_document_see_nothing_and_give_finite_gradients(local):
    part, gradients = local(*qkv(), 3)
    nothing = DOCUMENTS == -1
    same(part.out[nothing], np.zeros((2, N, H)))
    same(part.lse[nothing], np.full((2, N), -np.inf))
    assert all(jnp.isfinite(g).all() for g in gradients)
    assert all((g[nothing] == 0).all() for g in gradients)


def test_grouped_queries_equal_repeated_kv_heads(local):
    q, k, v = qkv()
    part, (dq, dk, dv) = local(q, k, v, 3)
    repeated, (dq2, dk2, dv2) = local(q, *(jnp.repeat(x, N // G, axis=2) for x in (k, v)), 3)
    close(part, repeated)
    close((dq, dk, dv), (dq2, *(x.reshape(B, T, G, N // G, H).sum(3) for x in (dk2, dv2))))


def test_bfloat16_inputs_give_float32_partials(local):
    exact, gradients = local(*qkv(), 3)
    part, rounded = local(*(x.astype(jnp.bfloat16) for x in qkv()), 3)
    assert part.out.dtype == part.lse.dtype == jnp.float32
    assert {g.dtype for g in rounded} == {jnp.dtype(jnp.bfloat16)}
    close(part, exact, 0.05)
    close(jax.tree.map(lambda g: g.astype(jnp.float32), rounded), gradients, 0.1)


def pieces() -> tuple[tuple, list[tuple], np.ndarray]:
    """Queries, three disjoint sets of keys and values, and who sees which of them; some rows see none of a set."""
    keys = [(draw(B, size, G, H, seed=size), draw(B, size, G, H, seed=2 * size)) for size in (3, 5, 7)]
    visible = np.random.default_rng(0).random((B, T, 15)) < 0.6
    visible[0, :, :3] = visible[1, :4, 3:8] = visible[2, 2] = False
    return draw(B, T, N, H), keys, visible


@functools.partial(jax.jit, static_argnums=3)
def joined(q, keys, visible, order=(0, 1, 2)) -> Partial:
    cut = jnp.split(visible, [3, 8], axis=2)
    return attention.merge(*(plain(q, *keys[i], cut[i]) for i in order))


def test_merged_equals_joint_softmax_in_value_and_gradient():
    q, keys, visible = pieces()

    def joint(q, keys, visible):
        return plain(q, *(jnp.concatenate(x, axis=1) for x in zip(*keys, strict=True)), visible)

    close(joined(q, keys, visible), joint(q, keys, visible))
    gradients = [
        jax.jit(jax.grad(lambda q, keys, f=f: (f(q, keys, visible).out * q).sum(), argnums=(0, 1)))(q, keys)
        for f in (joined, joint)
    ]
    close(*gradients)


def test_order_of_merged_parts_does_not_matter():
    q, keys, visible = pieces()
    first = joined(q, keys, visible)
    for order in [(2, 1, 0), (1, 0, 2)]:
        close(joined(q, keys, visible, order), first, 1e-6)


def test_a_part_that_sees_nothing_changes_no_bit():
    part = plain(*qkv(), VISIBLE)
    nothing = Partial(jnp.zeros_like(part.out), jnp.full_like(part.lse, -jnp.inf))
    for merge in (attention.merge, jax.jit(attention.merge)):
        same(merge(part, nothing), part)
        same(merge(nothing, part), part)
        same(merge(nothing, nothing), nothing)
        same(merge(part), part)


def test_gradients_of_merge_are_finite_where_nothing_is_visible():
    part = plain(*qkv(), VISIBLE)
    nothing = Partial(jnp.zeros_like(part.out), jnp.full_like(part.lse, -jnp.inf))
    gradients = jax.jit(jax.grad(lambda a, b: score(attention.merge(a, b)), argnums=(0, 1)))(part, nothing)
    seen = VISIBLE.any(-1)
    assert all(jnp.isfinite(x[seen]).all() for x in jax.tree.leaves(gradients))


def test_merging_large_logits_does_not_overflow():
    out = jnp.ones((1, 1, 1, 2))
    merged = attention.merge(Partial(out, jnp.full((1, 1, 1), 300.0)), Partial(3 * out, jnp.full((1, 1, 1), 300.0)))
    close(merged, Partial(2 * out, jnp.full((1, 1, 1), 300 + np.log(2))))


def test_rope_at_position_zero_is_the_identity():
    x = draw(B, T, N, H)
    same(attention.rope(x, jnp.zeros((B, T), jnp.int32), 10000.0), x)


def test_rope_depends_on_relative_positions_alone_and_keeps_lengths():
    q, k, _ = qkv()
    k = jnp.repeat(k, N // G, axis=2)
    places = jnp.broadcast_to(jnp.arange(T), (B, T))

    def products(shift):
        rotated = [attention.rope(x, places + shift, 100.0) for x in (q, k)]
        close(jnp.linalg.norm(rotated[0], axis=-1), jnp.linalg.norm(q, axis=-1))
        return jnp.einsum("btnh,bsnh->btns", *rotated)

    close(products(0), products(11), 1e-4)
    assert jnp.abs(products(0) - jnp.einsum("btnh,bsnh->btns", q, k)).max() > 0.1


def turns(scaling: RopeScalingConfig, theta: float, pairs: int) -> np.ndarray:
    """The angle by which one token's step turns each pair."""
    turned = attention.rope(jnp.ones((1, 1, 1, 2 * pairs)), jnp.ones((1, 1)), theta, scaling)[0, 0, 0]
    return np.arctan2(turned[pairs:], turned[:pairs]) - np.pi / 4


def test_linear_scaling_stretches_every_wavelength():
    plain, stretched = (turns(RopeScalingConfig(kind, factor=4.0), 100.0, 8) for kind in ("none", "linear"))
    np.testing.assert_allclose(stretched, plain / 4, atol=1e-6)


def test_llama3_scaling_stretches_long_wavelengths_alone():
    scaling = RopeScalingConfig("llama3", factor=8.0, low_factor=1.0, high_factor=4.0, original_context=64)
    plain, stretched = (turns(each, 1000.0, 16) for each in (RopeScalingConfig(), scaling))
    in_context = 64 * plain / (2 * np.pi)
    np.testing.assert_allclose(stretched[in_context > 4], plain[in_context > 4], atol=1e-6)
    np.testing.assert_allclose(stretched[in_context < 1], plain[in_context < 1] / 8, atol=1e-6)
    between = (in_context > 1) & (in_context < 4)
    assert between.any() and (stretched < plain)[between].all() and (stretched > plain / 8)[between].all()


def test_rope_turns_each_pair_by_position_over_its_wavelength():
    theta, position = 100.0, 3
    turned = attention.rope(jnp.ones((1, 1, 1, H)), jnp.full((1, 1), position), theta)[0, 0, 0]
    for pair in range(H // 2):
        angle = position * theta ** (-2 * pair / H)
        expected = np.exp(1j * angle) * (1 + 1j)
        close(turned[pair], expected.real)
        close(turned[pair + H // 2], expected.imag)


def test_heads_split_and_join_back():
    q = draw(B, T, N, H)
    same(attention.join_heads(attention.split_heads(q, G)), q)
    same(attention.split_heads(q, G)[:, 1, 0], q[:, :, N // G])
