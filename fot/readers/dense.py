"""Attention to a whole memory."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fot import attention, device, sharding
from fot.attention import Partial
from fot.kernels import memory as kernels
from fot.memory import Slots
from fot.readers.reader import Block, Reader, fold, visible


def dense(q_BTNH: jax.Array, documents_BT: jax.Array, slots: Slots, reader: Reader) -> Partial:
    """Attention to every visible slot (LongLLaMA): by a kernel where kernels run, else streamed in blocks."""
    q = attention.split_heads(q_BTNH, slots.keys.shape[1])
    attend = _by_kernel if device.runs_kernels(reader.attention_kernel) else _streamed
    out, lse = attend(q, slots.keys, slots.values, documents_BT, slots.documents, reader)
    return Partial(attention.join_heads(out), attention.join_heads(lse[..., None])[..., 0])


def _streamed(q_BGRTH, keys_BGMH, values_BGMH, documents_BT, documents_BM, reader: Reader):
    """Returns output [B, G, R, T, H] and log-sum-exp [B, G, R, T]."""
    slots = Slots(keys_BGMH, values_BGMH, documents_BM)

    def step(running, block: Block):
        s = attention.logits(q_BGRTH, block.keys, visible(documents_BT, block, reader))
        return attention.accumulate(running, s, block.values)

    if attention.few(q_BGRTH, keys_BGMH):
        whole = Block(*slots[:3], jnp.int32(0))
        running = attention.attend_few(q_BGRTH, keys_BGMH, values_BGMH, visible(documents_BT, whole, reader))
    else:
        running = fold(step, attention.start(q_BGRTH), slots, reader.block)
    return attention.finish(running)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _by_kernel(q_BGRTH, keys_BGMH, values_BGMH, documents_BT, documents_BM, reader: Reader):
    """`_streamed` by `fot.kernels.memory`, each device having the rows and heads that it holds."""

    def here(q, keys, values, documents_BT, documents_BM):
        B, G, R, T, H = q.shape
        documents_BQ = jnp.broadcast_to(documents_BT[:, None], (B, R, T)).reshape(B, R * T)
        slots = Slots(keys, values, documents_BM)
        found = kernels.attend(q.reshape(B, G, R * T, H), documents_BQ, slots, reader.multi_doc, device.interprets())
        return jax.tree.map(lambda x: x.reshape(B, G, R, T, *x.shape[3:]), tuple(found))

    axes = sharding.rows_of(len(q_BGRTH))
    rows, heads = PartitionSpec(axes), PartitionSpec(axes, sharding.MESH_AXES["kv_heads"])
    spread = sharding.over_devices(here, (heads, heads, heads, rows, rows), heads, sharding.AXES)
    return spread(q_BGRTH, keys_BGMH, values_BGMH, documents_BT, documents_BM)


def _by_kernel_forward(q, keys, values, documents_BT, documents_BM, reader: Reader):
    arguments = q, keys, values, documents_BT, documents_BM
    return _by_kernel(*arguments, reader), arguments


def _by_kernel_backward(reader: Reader, saved, cotangents):
    """Training reads no memory, so gradients may take their time: those of the streamed form."""
    q, keys, values, *documents = saved
    _, backward = jax.vjp(lambda *x: _streamed(*x, *documents, reader), q, keys, values)
    return *backward(cotangents), None, None


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)
