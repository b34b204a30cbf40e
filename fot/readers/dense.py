"""Attention to a whole memory."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fot import attention, device, sharding
from fot.attention import Partial
from fot.kernels import memory as kernels
from fot.memory import Slots, Stack
from fot.readers.reader import Block, Reader, fold, visible

_HEADS = sharding.MESH_AXES["kv_heads"]


def dense(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to every visible slot (LongLLaMA): by a kernel where kernels run, else streamed in blocks."""
    q = attention.split_heads(q_BTNH, slots.keys.shape[1])
    if device.runs_kernels(reader.attention_kernel):
        stack = slots.stack or Stack(slots.keys[None], slots.values[None], 0)
        out, lse = _by_kernel(q, *stack, documents_BT, slots.documents, reader)
    else:
        out, lse = _streamed(q, slots.keys, slots.values, documents_BT, slots.documents, reader)
    return Partial(attention.join_heads(out), attention.join_heads(lse[..., None])[..., 0])


def _streamed(q_BGRTH, keys_BGMH, values_BGMH, documents_BT, documents_BM, reader: Reader):
    """Returns output [B, G, R, T, H] and log-sum-exp [B, G, R, T]."""

    def step(running, block: Block):
        s = attention.logits(q_BGRTH, block.keys, visible(documents_BT, block, reader))
        return attention.accumulate(running, s, block.values)

    if attention.few(q_BGRTH, keys_BGMH):
        whole = Block(keys_BGMH, values_BGMH, documents_BM, jnp.int32(0))
        running = attention.attend_few(q_BGRTH, keys_BGMH, values_BGMH, visible(documents_BT, whole, reader))
    else:
        slots = Slots(keys_BGMH, values_BGMH, documents_BM)
        running = fold(step, attention.start(q_BGRTH), slots, reader.block)
    return attention.finish(running)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _by_kernel(q_BGRTH, keys_LBGMH, values_LBGMH, layer, documents_BT, documents_BM, reader: Reader):
    """`_streamed` by `fot.kernels.memory`, each device having the rows and heads that it holds."""

    def here(q, stack: Stack, documents_BT, documents_BM):
        B, G, R, T, H = q.shape
        documents_BQ = jnp.broadcast_to(documents_BT[:, None], (B, R, T)).reshape(B, R * T)
        queries = q.reshape(B, G, R * T, H), documents_BQ
        found = kernels.attend(*queries, stack, documents_BM, reader.multi_doc, device.interprets())
        return jax.tree.map(lambda x: x.reshape(B, G, R, T, *x.shape[3:]), tuple(found))

    axes = sharding.rows_of(len(q_BGRTH))
    rows, heads, stacked = (PartitionSpec(*x) for x in ((axes,), (axes, _HEADS), (None, axes, _HEADS)))
    stack_specs = Stack(stacked, stacked, PartitionSpec())
    spread = sharding.over_devices(here, (heads, stack_specs, rows, rows), heads, sharding.AXES)
    return spread(q_BGRTH, Stack(keys_LBGMH, values_LBGMH, layer), documents_BT, documents_BM)


def _by_kernel_forward(*arguments):
    return _by_kernel(*arguments), arguments[:-1]


def _by_kernel_backward(reader: Reader, saved, cotangents):
    """Training reads no memory, so gradients may take their time: those of the streamed form."""
    q, keys, values, layer, *documents = saved
    _, backward = jax.vjp(lambda q, k, v: _streamed(q, k[layer], v[layer], *documents, reader), q, keys, values)
    return *backward(cotangents), None, None, None


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)
