"""Kernels without a TPU: equal to their reference in value and gradient, free of races; the plan against its table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from fot import attention, crossbatch
from fot.attention import Tokens
from fot.config import CrossbatchConfig
from fot.contexts import attend_contexts
from fot.crossbatch import VARIANTS, Table
from fot.kernels import crossbatch as kernels
from fot.kernels.blocks import blocks_of
from fot.kernels.passes import Keys
from fot.kernels.plan import FIRST, JOINT, KIND, LAST, NEAR, NEGATIVE, NOTHING, POSITIVE, Plan, make_plan

K, PACKS, T, G, H = 4, 2, 12, 2, 8
B = K * PACKS
CONFIG = CrossbatchConfig(packing=K, w=2, segments=((0, 0), (1, 2), (2, 3), (3, 4)), range=5)


def table_of(variant: str) -> Table:
    return crossbatch.make_table(dataclasses.replace(CONFIG, variant=variant), B, 2)


def some_tokens() -> Tokens:
    """Documents begin and end inside rows and go on in the next; the second pack ends in a row of padding."""
    documents, positions = np.full((PACKS, K * T), -1, np.int32), np.zeros((PACKS, K * T), np.int32)
    ends = [[T * 5 // 2, K * T], [T // 2, T * 7 // 3]]
    for pack, pack_ends in enumerate(ends):
        begin = 0
        for number, end in enumerate(pack_ends):
            documents[pack, begin:end] = pack + PACKS * number
            positions[pack, begin:end] = np.arange(end - begin)
            begin = end
    return Tokens(jnp.asarray(documents.reshape(B, T)), jnp.asarray(positions.reshape(B, T)))


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def inputs(heads: int, rows: slice = slice(None)) -> tuple[jax.Array, Keys, Keys]:
    """Queries and local keys of these rows, keys of all."""
    q = draw(B, T, heads, H)[rows]
    k, v, far, far_v = (draw(B, T, G, H, seed=seed) for seed in (1, 2, 3, 4))
    return q, Keys(k[rows], v[rows]), Keys(far, far_v)


def value_and_gradients(attend, q, near, far, *rest):
    """Of a weighted sum of the output and of the finite log-sum-exps."""

    @jax.jit
    def run(q, near, far):
        def loss(*arrays):
            joint = attend(*arrays, *rest)
            total = (joint.out * draw(*joint.out.shape, seed=9)).sum()
            return total + (attention.finite(joint.lse) * draw(*joint.lse.shape, seed=8)).sum(), joint

        gradients, joint = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, near, far)
        return joint, gradients

    return run(q, near, far)


def close(left, right, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def agree(table: Table, heads: int, block: int, rows: slice = slice(None)):
    """Asserts that kernels and reference are equal for queries of these rows, and returns the results."""
    tokens = some_tokens()
    plan = kernels.plan(*table, rows=B, length=T, block=block)
    arguments = *inputs(heads, rows), Tokens(*(x[rows] for x in tokens)), tokens, plan, block, True
    found = value_and_gradients(kernels.attend, *arguments)
    close(found, value_and_gradients(kernels.reference, *arguments))
    return found


# The plan.


def steps_of(plan: Plan, blocks: int) -> set[tuple[int, int, int]]:
    """All that the table and causality ask for: (block of queries, block of keys, kind)."""
    A = len(plan.contexts_AC)
    near = {(a * blocks + i, a * blocks + j, NEAR) for a in range(A) for i in range(blocks) for j in range(i + 1)}
    far = {
        (a * blocks + i, row * blocks + j, NEGATIVE if negative else POSITIVE)
        for a, c in np.ndindex(plan.contexts_AC.shape)
        for row, negative in [(int(plan.contexts_AC[a, c]), bool(plan.negative_AC[a, c]))]
        for i in range(blocks)
        for j in range(blocks)
        if row >= 0
    }
    return near | far


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lists_have_every_pair_of_blocks_once_and_stay_with_one_until_it_is_done(variant, blocks):
    plan = make_plan(*table_of(variant), rows=B, blocks=blocks)
    wanted = steps_of(plan, blocks)
    queries, near, far, flags = plan.queries
    kinds = flags & KIND
    pairs = list(zip(queries, np.where(kinds == NEAR, near, far), kinds, strict=True))
    assert len(pairs) == len(wanted) and {tuple(map(int, pair)) for pair in pairs} == wanted
    done = [(queries, flags)]
    for steps, mine in ((plan.near, lambda kind: kind == NEAR), (plan.far, lambda kind: kind > NEAR)):
        kinds = steps.flags & KIND
        pairs = [
            tuple(map(int, pair)) for pair in zip(steps.queries, steps.keys, kinds, strict=True) if pair[2] != NOTHING
        ]
        assert len(pairs) == len(set(pairs)) and set(pairs) == {each for each in wanted if mine(each[2])}
        done.append((steps.keys, steps.flags))
    for stays, flags in done:
        assert sorted(set(stays)) == list(range(B * blocks)) and (np.diff(stays) >= 0).all()
        assert [int(x) for x in stays[(flags & FIRST) > 0]] == [int(x) for x in stays[(flags & LAST) > 0]]
        assert ((flags & FIRST) > 0).sum() == B * blocks
    joints = plan.queries.flags & JOINT > 0
    assert joints.sum() == B * blocks and (plan.queries.flags[joints] & KIND == NEAR).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_their_local_context_rows_keep_their_contexts_and_all_blocks_are_written(variant):
    whole, plan = (make_plan(*table_of(variant), rows=B, blocks=2, local=local) for local in (True, False))
    before, after = whole.queries.flags & KIND > NEAR, plan.queries.flags & KIND > NEAR
    for wanted, got in ((whole.queries.queries, plan.queries.queries), (whole.queries.far, plan.queries.far)):
        np.testing.assert_array_equal(wanted[before], got[after])
    assert (plan.queries.flags[~after] & KIND == NOTHING).all() and (plan.near.flags & KIND == NOTHING).all()
    assert ((plan.queries.flags & FIRST) > 0).sum() == ((plan.queries.flags & LAST) > 0).sum() == 2 * B
    assert sorted(set(plan.queries.queries)) == list(range(2 * B))
    jax.tree.map(np.testing.assert_array_equal, whole.far, plan.far)


def test_blocks_that_a_step_does_not_need_stay_what_they_were():
    plan = make_plan(*table_of("segments"), rows=B, blocks=2)
    kinds = plan.queries.flags & KIND
    for blocks, needed in ((plan.queries.near, kinds == NEAR), (plan.queries.far, kinds > NEAR)):
        changes = np.flatnonzero(np.diff(blocks)) + 1
        assert needed[changes].all()


def test_shards_have_lists_of_their_own_of_one_length():
    """The second shard sees nothing, so its lists are padded."""
    contexts, negative = (x.copy() for x in table_of("released"))
    contexts[B // 2 :], negative[B // 2 :] = -1, False
    plan = make_plan(contexts, negative, rows=B // 2, blocks=2, shards=2)
    for number in range(2):
        half = slice(number * B // 2, (number + 1) * B // 2)
        alone = make_plan(contexts[half], negative[half], rows=B // 2, blocks=2)
        for joined, own in zip(plan[2:], alone[2:], strict=True):
            for padded, field in zip(joined, own, strict=True):
                mine = np.split(padded, 2)[number]
                np.testing.assert_array_equal(mine[: len(field)], field)
                assert (mine[len(field) :] == (0 if field is own.flags else field[-1])).all()
    assert len(plan.queries.flags) > 2 * len(alone.queries.flags)


@pytest.mark.parametrize(
    ("length", "block", "blocks"),
    [(2048, 512, (512, 4)), (640, 512, (384, 2)), (100, 512, (100, 1)), (12, 5, (5, 3)), (513, 512, (384, 2))],
)
def test_rows_are_cut_into_few_and_even_blocks(length, block, blocks):
    assert blocks_of(length, block) == blocks


# The kernels.


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernels_equal_the_reference_in_value_and_gradient(variant):
    agree(table_of(variant), heads=4, block=5)


@pytest.mark.parametrize("block", [4, 8, 12, 128])
@pytest.mark.parametrize("heads", [2, 6])
def test_they_do_with_blocks_that_divide_or_not_and_any_heads_for_a_key_head(heads, block):
    agree(table_of("segments"), heads, block)


def test_they_do_for_queries_of_some_rows():
    last = crossbatch.loss_rows(dataclasses.replace(CONFIG, loss_rows="last"))
    table = table_of("previous")
    agree(Table(*(x[last] for x in table)), 4, 6, last)


def test_the_reference_is_local_attention_and_the_streamed_contexts():
    tokens, table = some_tokens(), table_of("segments")
    q, near, far = inputs(4)
    plan = kernels.plan(*table, rows=B, length=T, block=T)
    joint = kernels.reference(q, near, far, tokens, tokens, plan, T, True)
    local = attention.attend_local(q, *near, tokens, 4)
    both = attention.merge(local, attend_contexts(q, *far, tokens, tokens, table, 4))
    close(joint, kernels.Joint(both.out, both.lse, local.lse))


def test_a_token_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    """Row 7 is padding alone: it sees nothing in its own row and in those before it, and nobody sees it."""
    joint, (dq, near, far) = agree(crossbatch.previous(CONFIG, B, 1), heads=2, block=4)
    assert (some_tokens().documents[7] == -1).all()
    blind = np.isneginf(np.asarray(joint.lse))
    assert blind.any() and np.isneginf(np.asarray(joint.local_lse[7])).all()
    assert (np.asarray(joint.out)[blind] == 0).all() and (np.asarray(dq)[blind] == 0).all()
    for gradient in (*near, *far):
        assert (np.asarray(gradient[7]) == 0).all()


def test_no_gradient_comes_through_the_local_log_sum_exp():
    tokens, plan = some_tokens(), kernels.plan(*table_of("segments"), rows=B, length=T, block=T)
    for attend in (kernels.attend, kernels.reference):
        gradients = jax.grad(
            lambda *x, attend=attend: attention.finite(attend(*x, tokens, tokens, plan, T, True).local_lse).sum(),
            argnums=(0, 1, 2),
        )(*inputs(2))
        assert all((gradient == 0).all() for gradient in jax.tree.leaves(gradients))


def test_bfloat16_is_as_near_to_float32_as_the_references():
    tokens, plan = some_tokens(), kernels.plan(*table_of("segments"), rows=B, length=T, block=4)

    def out(attend, dtype):
        x = jax.tree.map(lambda a: a.astype(dtype), inputs(4))
        joint, gradients = value_and_gradients(attend, *x, tokens, tokens, plan, 4, True)
        assert joint.out.dtype == dtype and all(g.dtype == dtype for g in jax.tree.leaves(gradients))
        return jax.tree.leaves((joint.out.astype(jnp.float32), gradients))

    exact = out(kernels.reference, jnp.float32)
    errors = [
        [float(jnp.abs(a - b).max()) for a, b in zip(out(attend, jnp.bfloat16), exact, strict=True)]
        for attend in (kernels.attend, kernels.reference)
    ]
    for kernel, reference in zip(*errors, strict=True):
        assert kernel < 2 * reference + 0.02


@pytest.mark.slow
def test_two_cores_do_not_race():
    """Memory that nothing was written to is not a number; heads are shared out to the cores of a megacore chip."""
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    rows, table = slice(4), crossbatch.previous(CrossbatchConfig(packing=2), 4, 2)
    tokens = Tokens(*(x[rows] for x in some_tokens()))
    plan = kernels.plan(*table, rows=4, length=T, block=8)
    q, near, far = inputs(4, rows)
    arguments = q, near, Keys(*(x[rows] for x in far)), tokens, tokens, plan, 8, interpret
    pltpu.reset_tpu_interpret_mode_state()
    close(value_and_gradients(kernels.attend, *arguments), value_and_gradients(kernels.reference, *arguments))
    assert not races().races_found


def races():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races
