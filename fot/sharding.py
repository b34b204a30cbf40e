"""Where arrays live: the mesh, and two tables that place parameters, their moments and activations on it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot.config import ExperimentConfig, MeshConfig, ModelConfig
from fot.config import mesh as config_mesh
from fot.config.mesh import AXES, MESH_AXES, ROWS

SLOTS = "sequence"  # the mesh axis over which the slots of a memory are split, for the readers that say so

# The logical axes of every parameter, by the last name of its path; those of layers come after the layer axis.
PARAM_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "dim"),
    "head": ("dim", "vocab"),
    "final_norm": ("norm",),
    "attention_norm": ("layer", "norm"),
    "mlp_norm": ("layer", "norm"),
    "query": ("layer", "dim", "heads", "head_dim"),
    "key": ("layer", "dim", "kv_heads", "head_dim"),
    "value": ("layer", "dim", "kv_heads", "head_dim"),
    "query_bias": ("layer", "heads", "head_dim"),
    "key_bias": ("layer", "kv_heads", "head_dim"),
    "value_bias": ("layer", "kv_heads", "head_dim"),
    "output": ("layer", "heads", "head_dim", "dim"),
    "temperature": ("layer", "head"),
    "memory_gate": ("layer", "head"),
    "gate": ("layer", "dim", "mlp"),
    "up": ("layer", "dim", "mlp"),
    "down": ("layer", "mlp", "dim"),
}

# The logical axes of the activations that say where they lie; where others lie follows from these.
ACTIVATION_AXES: dict[str, tuple[str, ...]] = {
    "microbatches": ("microbatch", "rows", "tokens"),
    "stream": ("rows", "tokens", "width"),
    "heads": ("rows", "tokens", "heads", "head_dim"),
    "hidden": ("rows", "tokens", "mlp"),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device]) -> Mesh:
    """Arranges devices in the axes `AXES`; an axis of -1 takes what the others leave.

    Neighbors on an axis are neighbors on the TPU's torus as far as that goes; what goes around a ring takes short ways.
    Of several slices, one axis alone leads from slice to slice, over the data center's network: data if it can.

    Raises:
      ConfigError: the sizes don't multiply to the number of devices, or the slices don't divide data nor fsdp.
    """
    return Mesh(arranged(config, devices), AXES)


def arranged(config: MeshConfig, devices: list[jax.Device]) -> np.ndarray:
    """Returns the devices as `make_mesh` arranges them, an array with an axis for each of `AXES`."""
    sizes = config_mesh.sizes(config, len(devices))
    shape = [sizes[axis] for axis in AXES]
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) <= 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    between = config_mesh.between_slices(sizes, len(slices))
    outer = [len(slices) if axis == between else 1 for axis in AXES]
    inner = [size // count for size, count in zip(shape, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def check_mesh(mesh: Mesh, config: ExperimentConfig) -> None:
    """Raises ConfigError naming the field if an axis of the mesh does not divide what it splits."""
    config_mesh.check(mesh.shape, config)


def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
    """Returns the spec of one leaf of params or optimizer state, by the parameter name in its path.

    A moment of another shape than its parameter (AdaFactor's factored ones), and what belongs to no parameter (step
    counts), is replicated.

    Raises:
      ValueError: a leaf of params has a name that isn't in `PARAM_AXES`.
    """
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if not names:
        return PartitionSpec()
    if names[-1] not in PARAM_AXES:
        raise ValueError(f"parameter {'/'.join(names)} has no entry in sharding.PARAM_AXES")
    axes = PARAM_AXES[names[-1]]
    if len(axes) != len(leaf.shape):
        return PartitionSpec()
    return PartitionSpec(*(MESH_AXES.get(axis) for axis in axes))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every leaf of params, optimizer state or a whole training state."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), tree)


def abstract(tree: Any, mesh: Mesh) -> Any:
    """Returns the shapes of `jax.eval_shape` with their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def abstract_params(init: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """Returns shapes and shardings of the parameters that `init(key, config)` draws."""
    return abstract(jax.eval_shape(lambda: init(jax.random.key(0), config)), mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [R, T]: rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(ROWS, None))


def row_shards() -> int:
    """Returns in how many parts rows lie on the mesh of `jax.set_mesh`; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(np.prod([mesh.shape[axis] for axis in ROWS]))


def rows_of(count: int) -> tuple[str, ...] | None:
    """Returns the mesh axes over which so many rows can be split; None if they can't be split evenly."""
    return None if count % row_shards() else ROWS


def activation(x: jax.Array, name: str) -> jax.Array:
    """Tells the compiler where an activation, and its cotangent, lies on the mesh of `jax.set_mesh`.

    Without a mesh there is nothing to tell. Rows that are fewer than the devices for them lie as the compiler likes.

    Args:
      x: of the axes that its name has.
      name: in `ACTIVATION_AXES`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    axes = dict(zip(ACTIVATION_AXES[name], x.shape, strict=True))
    splits = {axis: MESH_AXES.get(axis) for axis in axes}
    if axes["rows"] < row_shards():
        splits["rows"] = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*splits.values()))


def over_devices(
    f: Callable, in_specs: Any, out_specs: Any, axes: tuple[str, ...] = (*ROWS, MESH_AXES["heads"])
) -> Callable:
    """Lets each device of `jax.set_mesh` run `f` on the rows and heads that it has; without a mesh there is one device.

    Args:
      f: called with the device's part of each argument; may use collectives over `ROWS`.
      in_specs: how rows and heads of the arguments are split.
      out_specs: how those of the results are.
      axes: mesh axes that `f` knows of beside those it is already in; those that split nothing have copies. Pallas
        kernels must know of all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f
    names = {*axes} - {*mesh.manual_axes}
    # Loops start from constants, which the check of what varies over devices does not allow.
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
