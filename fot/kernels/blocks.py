"""How kernels see arrays: block by block; those of crossbatch attention pick each by a list of `fot.kernels.plan`."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Where = Callable[..., tuple[jax.Array, jax.Array]]  # (grid indices, lists) → block of tokens, head


def blocks_of(length: int, block: int) -> tuple[int, int]:
    """Returns how long the blocks of a row are, and how many: as few and as even as `block` allows.

    Those of a row that is cut are multiples of 128 tokens, as a TPU wants them, if `block` is.
    """
    count = -(-length // block)
    unit = min(block, 128)
    return (length, 1) if count == 1 else (min(-(-length // (count * unit)) * unit, block), count)


def heads_first(x: jax.Array, pad: int) -> jax.Array:
    """[rows, T, heads, H] → [rows, heads, T + pad, H]."""
    return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)


class Blocks(NamedTuple):
    """Blocks that rows of tokens are cut into.

    Attributes:
      length: tokens in a block.
      count: blocks in a row.
      interpret: run kernels without a TPU; or how.
    """

    length: int
    count: int
    interpret: bool | pltpu.InterpretParams

    def heads(self, head_dim: int, where: Where) -> pl.BlockSpec:
        """Of arrays [rows, heads, T, H]."""

        def index(*at):
            block, head = where(*at)
            return block // self.count, head, block % self.count, 0

        return pl.BlockSpec((None, None, self.length, head_dim), index)

    def numbers(self, count: int, where: Where) -> pl.BlockSpec:
        """Of arrays [rows, heads, count, T]: numbers of each token and head."""

        def index(*at):
            block, head = where(*at)
            return block // self.count, head, 0, block % self.count

        return pl.BlockSpec((None, None, count, self.length), index)

    def tokens(self, where: Where) -> pl.BlockSpec:
        """Of arrays [rows, 2, T]: documents and positions."""

        def index(*at):
            block, _ = where(*at)
            return block // self.count, 0, block % self.count

        return pl.BlockSpec((None, 2, self.length), index)

    def call(self, kernel: Callable, grid: tuple[int, ...], lists: int, products: int, like: jax.Array, **specs):
        """Returns the kernel, which is called with `lists` lists and its arrays.

        Args:
          kernel: takes references of lists, inputs, outputs and scratch.
          grid: heads, steps, and what else.
          lists: how many there are.
          products: of a step, each of queries × keys × head dim.
          like: an array of heads, of which a step brings in two blocks.
          **specs: in_specs, out_specs, scratch_shapes, out_shape.
        """
        steps, H = functools.reduce(int.__mul__, grid), like.shape[-1]
        shape = specs.pop("out_shape")
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=lists, grid=grid, **specs),
            out_shape=shape,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", *("arbitrary",) * (len(grid) - 1)),
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * steps * self.length**2 * H,
                transcendentals=steps * self.length**2,
                bytes_accessed=2 * steps * self.length * H * like.dtype.itemsize,
            ),
            interpret=self.interpret,
            name=f"crossbatch{kernel.__name__}",
        )
