"""A trained model: the newest checkpoint of a workdir."""

import pathlib
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from fot import checkpoint, model, sharding
from fot.config import ExperimentConfig
from fot.errors import ConfigError


class Trained(NamedTuple):
    """A model as training left it.

    Attributes:
      step: optimizer steps behind it.
      params: as `model.init` gives them, placed on the mesh.
      mesh: all devices, in the shape that the config names.
    """

    step: int
    params: model.Params
    mesh: Mesh


def load_config(workdir: str) -> ExperimentConfig:
    """Returns the config stored with the newest checkpoint.

    Raises:
      CheckpointError: there is none.
    """
    return checkpoint.load_config(pathlib.Path(workdir) / "checkpoints")


def load(workdir: str, config: ExperimentConfig) -> Trained:
    """Returns the parameters of the newest checkpoint.

    Raises:
      CheckpointError: there is none, or its parameters aren't those of `config.model`.
      ConfigError: the devices don't make the mesh of the config.
    """
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    sharding.check_mesh(mesh, config)
    with checkpoint.Checkpointer(pathlib.Path(workdir) / "checkpoints", config.train) as checkpoints:
        step = checkpoints.latest()
        params = checkpoints.restore_params(step, sharding.abstract_params(model.init, config.model, mesh))
    return Trained(step, params, mesh)


def check_rows(config: ExperimentConfig, mesh: Mesh) -> None:
    """Raises ConfigError if the rows of an evaluation can't be split over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.evaluate.batch_size % shards:
        raise ConfigError(
            f"evaluate.batch_size={config.evaluate.batch_size} must be a multiple of {shards}, the devices that its "
            "rows are split over"
        )
