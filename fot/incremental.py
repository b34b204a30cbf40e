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
    x_BTD, tokens = begin(params["embedding"], inputs_BT, count_B, cache.length)
    entries = []
    for index, layer in enumerate(params["layers"]):
        held, number = caches.layer_of(cache, index, config), memory_number(index, config)
        x_BTD, new = extend_layer(layer, x_BTD, tokens, held, config, number, memory, reader)
        entries.append(new)
    return Extension(end(params, x_BTD, config), caches.joined(entries))


def begin(
    embedding: jax.Array, inputs_BT: jax.Array, count_B: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, Tokens]:
    """Returns the stream [B, T, D] that enters the first layer after a cache of that length, and its tokens."""
    place_T = jnp.arange(inputs_BT.shape[1])
    document_BT = jnp.where(place_T < count_B[:, None], 0, -1)
    return embedding[inputs_BT], Tokens(document_BT, length_B[:, None] + place_T)


def end(params: Params, x_BTD: jax.Array, config: ModelConfig) -> jax.Array:
    """Returns the last hidden states [B, T, D], of the stream that leaves the last layer."""
    return rms_norm(x_BTD, params["final_norm"], config.norm_epsilon)


def memory_number(index: int, config: ModelConfig) -> int | None:
    """Returns which memory layer that layer is; None is a layer without memory."""
    return config.memory_layers.index(index) if index in config.memory_layers else None


def extend_layer(
    layer: Params,
    x_BTD: jax.Array,
    tokens: Tokens,
    cache: Cache | None,
    config: ModelConfig,
    number: int | None,
    memory: Memory | None,
    reader: Reader,
) -> tuple[jax.Array, Entries]:
    """Runs new tokens through one layer.

    Args:
      layer: its parameters.
      x_BTD: the stream that enters it.
      tokens: of `begin`.
      cache: of this layer, see `fot.cache.layer_of`; None is an empty one, which changes no result.
      config: the model.
      number: see `memory_number`.
      memory, reader: see `extend`.

    Returns:
      The stream that leaves it, and what to append to its cache.
    """
    block = block_of(config, layer)
    q, k, v = block.project(x_BTD)
    stored = () if number is None else (k,)
    if number is not None and memory is not None:
        q = attention.sharpen(q, memory.length, config.logn_keys)
    if number is None or config.memory_positions == "zero":
        q, k = (attention.rope(x, tokens.positions, config.rope_theta, config.rope_scaling) for x in (q, k))
    local = attention.attend_local(q, k, v, tokens, config.attention_block)
    if cache is not None:
        [keys], [values] = cache.keys, cache.values
        local = attention.merge(local, caches.attend(q, keys, values, cache.length, reader.block))
    remote = []
    if number is not None and memory is not None:
        remote.append(readers.read(q, tokens.documents, memory.slots(number), reader))
    return block.finish(x_BTD, block.attention.combine(local, remote)), Entries((k,), (v,), stored)
