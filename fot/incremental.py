"""The Transformer after a local cache: new tokens, one or many, that see the cache, each other, and a memory.

Inference of FoT, section 3.1, as the released LongLLaMA code does it.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot import attention, lean, sharding
from fot import cache as caches
from fot.attention import Tokens
from fot.cache import Cache, Entries
from fot.config import ModelConfig
from fot.layers import Params, block_of
from fot.readers import table as readers
from fot.readers.reader import Reader

_HEADS = sharding.MESH_AXES["kv_heads"]


def prepare(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Returns parameters as `extension` takes them: in the compute dtype, "layers" a tuple with a dict for each layer.

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


@functools.lru_cache(maxsize=64)
def extension(config: ModelConfig, reader: Reader, mesh: Mesh) -> Callable[..., tuple[jax.Array, Cache]]:
    """Returns what runs new tokens through the layers, each a call of its own; those of a kind share a program.

    So one layer is compiled, and what a layer computes is in its cache before the next one runs.

    Args:
      config: the model.
      reader: how memory layers read; its `block` and `attention_kernel` are those of the cache too.
      mesh: where everything lives.

    Returns:
      (params of `prepare`, tokens [B, T], counts [B], cache, memory, capacity) -> stream [B, T, D] that leaves the last
      layer, the cache with the first `counts` of the tokens. The cache that is given is given up; None is an empty one,
      in whose place one of that capacity is made. The memory may be None.
    """
    held, new = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((sharding.ROWS, _HEADS), (sharding.ROWS, None, _HEADS))
    )
    rows = NamedSharding(mesh, PartitionSpec(sharding.ROWS))
    place = Cache(held, held, held, rows)
    program = functools.partial(jax.jit, compiler_options=lean.compiler_options(mesh))

    @functools.partial(program, out_shardings=(rows, rows))
    def begin(embedding: jax.Array, tokens_BT: jax.Array, count_B: jax.Array, length_B: jax.Array) -> tuple:
        place_T = jnp.arange(tokens_BT.shape[1])
        document_BT = jnp.where(place_T < count_B[:, None], 0, -1)
        return embedding[tokens_BT], Tokens(document_BT, length_B[:, None] + place_T)

    @functools.partial(
        program, out_shardings=(rows, Entries(new, new, new)), donate_argnames="x_BTD", static_argnames="number"
    )
    def layer(
        params: Params, x_BTD: jax.Array, tokens: Tokens, cache: Cache | None, memory: Any, number: int | None
    ) -> tuple[jax.Array, Entries]:
        return _extend_layer(params, x_BTD, tokens, cache, config, number, memory, reader)

    @functools.partial(jax.jit, out_shardings=place, donate_argnames="held")
    def append(held: Entries, length_B: jax.Array, new: Entries, count_B: jax.Array) -> Cache:
        return caches.append(Cache(*held, length_B), new, count_B)

    fill = jax.jit(caches.fill, out_shardings=place, static_argnames="capacity")

    def extend(
        params: Params, tokens_BT: np.ndarray, count_B: np.ndarray, cache: Cache | None, memory: Any, capacity: int
    ) -> tuple[jax.Array, Cache]:
        length_B = np.zeros_like(count_B) if cache is None else cache.length
        x_BTD, tokens = begin(params["embedding"], tokens_BT, count_B, length_B)
        parts: list[Cache] = []
        for index, each in enumerate(params["layers"]):
            number = config.memory_layers.index(index) if index in config.memory_layers else None
            part = None if cache is None else caches.layer_of(cache, index, config)
            x_BTD, new = layer(each, x_BTD, tokens, part, None if number is None else memory, number=number)
            if part is None:
                parts.append(fill(new, count_B, capacity=capacity))
            else:
                parts.append(append(Entries(*part[:3]), length_B, new, count_B))
            if tokens_BT.shape[1] > 1:
                jax.block_until_ready(parts[-1])  # what is yet to run holds memory
        return x_BTD, caches.joined(parts)

    return extend


def _extend_layer(
    layer: Params,
    x_BTD: jax.Array,
    tokens: Tokens,
    cache: Cache | None,
    config: ModelConfig,
    number: int | None,
    memory: Any,
    reader: Reader,
) -> tuple[jax.Array, Entries]:
    """Runs new tokens through one layer; `number` counts memory layers, and is None in others.

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
        local = attention.merge(local, caches.attend(q, keys, values, cache.length, reader))
    remote = []
    if number is not None and memory is not None:
        remote.append(readers.read(q, tokens.documents, memory.slots(number), reader))
    return block.finish(x_BTD, block.attention.combine(local, remote)), Entries((k,), (v,), stored)
