"""The mesh before there are devices: the sizes of its axes, and whether they divide what they split."""

import math
from collections.abc import Mapping

from fot.config.experiment import ExperimentConfig
from fot.config.training import MeshConfig
from fot.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")  # over which the rows of a batch are split
# The mesh axes that split a logical axis; a logical axis that is not named here is not split.
MESH_AXES = {
    "rows": ROWS,
    "dim": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}


def sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Returns the size of each axis in `AXES`; an axis of -1 takes what the others leave.

    Raises:
      ConfigError: the sizes don't multiply to the number of devices.
    """
    given = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in given.values() if size != -1)
    if devices % fixed or (-1 not in given.values() and fixed != devices):
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in given.items())
        raise ConfigError(f"{named} does not fit {devices} devices: set one axis to -1 or change the sizes")
    return {axis: devices // fixed if size == -1 else size for axis, size in given.items()}


def between_slices(sizes: Mapping[str, int], slices: int) -> str:
    """Returns the axis that leads from TPU slice to TPU slice: data if they divide it, so that parameters stay within.

    Raises:
      ConfigError: they divide neither data nor fsdp.
    """
    for axis in ROWS:
        if sizes[axis] % slices == 0:
            return axis
    named = ", ".join(f"mesh.{axis}={sizes[axis]}" for axis in ROWS)
    raise ConfigError(f"{named}: one of them must be a multiple of the {slices} slices, such as mesh.data={slices}")


def check(shape: Mapping[str, int], config: ExperimentConfig) -> None:
    """Raises ConfigError naming the field if an axis of these sizes does not divide what it splits."""
    model, rows = config.model, config.data.batch_size // config.train.accumulation
    row_shards = shape["data"] * shape["fsdp"]
    splits = [(f"{rows} rows (data.batch_size / train.accumulation)", rows, "data × fsdp", row_shards)]
    for name, axis in (("dim", "dim"), ("vocab_size", "vocab"), ("heads", "heads"), ("mlp_dim", "mlp")):
        size = getattr(model, name)
        splits.append((f"model.{name}={size}", size, MESH_AXES[axis], shape[MESH_AXES[axis]]))
    splits.append((f"model.kv_heads={model.kv_heads}", model.kv_heads, "tensor", shape["tensor"]))
    for what, size, axes, shards in splits:
        if size % shards:
            raise ConfigError(f"{what} can't be split over mesh axis {axes} of {shards} devices")
