"""The Transformer after a local cache: new tokens, one or many, that see the cache, each other, and a memory.

Inference of FoT, section 3.1, as the released LongLLaMA code does it.
"""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot import attention, sharding
from fot import cache as caches
from fot.attention import Tokens
from fot.cache import Cache, Entries
from fot.config import ModelConfig
from fot.layers import Params, block_of, rms_norm
from fot.memory import Memory
from fot.readers import table as readers
from fot.readers.reader import Reader


class Extension(NamedTuple):
    """What new tokens give.

    Attributes:
      hidden: [B, T, D] last hidden states; `model.unembed` makes logits of them.
      entries: for `fot.cache.append`.
    """

    hidden: jax.Array
    entries: Entries


def prepare(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Returns parameters as `extend` takes them: in the compute dtype, "layers" a tuple with a dict for each layer.

    So a step reads every parameter once; it would copy what it cuts out of a stack, and cast anew each time. Every pass
    of `fot.model` takes them too.

    Args:
      params: as `model.init` gives them; placed on the mesh if they aren't.
      config: the model.
      mesh: where the result is.
    """

    def apart(params: Params) -> Params:
        params = cast(params, config)
        each = (jax.tree.map(operator.itemgetter(i), params["layers"]) for i in range(config.layers))
        return {**params, "layers": tuple(each)}

    specs = sharding.shardings(params, mesh)
    layer = jax.tree.map(lambda place: NamedSharding(mesh, PartitionSpec(*place.spec[1:])), specs["layers"])
    return jax.jit(apart, out_shardings={**specs, "layers": (layer,) * config.layers})(jax.device_put(params, specs))


def cast(params: Params, config: ModelConfig) -> Params:
    """Returns the parameters in the compute dtype, which changes no result of a forward pass."""
    dtype = jnp.dtype(config.compute_dtype)
    # The last norm is applied in float32 with a scale that no pass casts.
    return {
        name: p if name == "final_norm" else jax.tree.map(lambda x: x.astype(dtype), p) for name, p in params.items()
    }


def extend(
    params: Params,
    inputs_BT: jax.Array,
    count_B: jax.Array,
    cache: Cache,
    config: ModelConfig,
    memory: Memory | None,
    reader: Reader,
) -> Extension:
    """Runs new tokens through the model; the cache is read and not changed.

    Args:
      params: of `prepare`.
      inputs_BT: int32 token ids.
      count_B: int32, tokens of each row that are real, its first ones.
      cache: what came before, in the local context.
      config: the model.
      memory: what the memory layers read besides; None is nothing.
      reader: how they read it; its `block` is that of the cache too.

    Returns:
      Hidden states, and what to append to the cache.
    """
    B, T = inputs_BT.shape
    place_BT = cache.length[:, None] + jnp.arange(T)
    document_BT = jnp.where(jnp.arange(T) < count_B[:, None], 0, -1)
    x_BTD = params["embedding"][inputs_BT]
    keys, values, stored = [], [], []
    for index, layer in enumerate(params["layers"]):
        block = block_of(config, layer)
        q, k, v = block.project(x_BTD)
        is_memory = index in config.memory_layers
        rotated = not is_memory or config.memory_positions == "zero"
        if is_memory:
            stored.append(k)
            if memory is not None:
                q = attention.sharpen(q, memory.length, config.logn_keys)
        if rotated:
            q, k = (attention.rope(x, place_BT, config.rope_theta, config.rope_scaling) for x in (q, k))
        keys.append(k)
        values.append(v)
        local = attention.merge(
            attention.attend_local(q, k, v, Tokens(document_BT, place_BT), config.attention_block),
            caches.attend(q, cache.keys[index], cache.values[index], cache.length, reader.block),
        )
        remote = []
        if is_memory and memory is not None:
            slots = memory.slots(config.memory_layers.index(index))
            remote.append(readers.read(q, document_BT, slots, reader))
        x_BTD = block.finish(x_BTD, block.attention.combine(local, remote))
    hidden = rms_norm(x_BTD, params["final_norm"], config.norm_epsilon)
    return Extension(hidden, Entries(tuple(keys), tuple(values), tuple(stored)))
