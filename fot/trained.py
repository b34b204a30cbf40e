"""A trained model: the newest checkpoint of a workdir, and the tokenizer that lies there.

Beside `checkpoints/`, a run that trained its tokenizer and an imported model have `tokenizer/`: wherever the workdir is
moved to, and whatever documents it is used on, the model reads text as it learnt to.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from fot import bucket, checkpoint, files, model, sharding
from fot.config import ExperimentConfig, fields, to_dict
from fot.data.tokenizer import Tokenizer
from fot.errors import ConfigError

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # the first that is there counts


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


def load_config(workdir: str | pathlib.Path) -> ExperimentConfig:
    """Returns the config stored with the newest checkpoint; its tokenizer is the one that lies in the workdir, if any.

    Raises:
      CheckpointError: there is none.
    """
    config = checkpoint.load_config(bucket.path(workdir) / "checkpoints")
    for path in (tokenizer_folder(workdir) / name for name in TOKENIZER_FILES):
        if path.is_file():
            data = dataclasses.replace(config.data, tokenizer="file", tokenizer_file=str(bucket.absolute(path)))
            return dataclasses.replace(config, data=data)
    return config


def config_named(flags: Any) -> ExperimentConfig:
    """Returns `load_config` of a command's flag `workdir`."""
    return load_config(flags.workdir)


def inherit(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's config values, not validated yet, with what they leave out as `train.init_from` has it.

    So a config file without a model's shape trains whatever model another workdir holds, on its tokens. Nothing is read
    if nothing is left out.

    Raises:
      ConfigError: fields are left out but no workdir is named.
      CheckpointError: that workdir has no checkpoint, or its config can't be read.
    """
    names = [name for name, _ in fields(to_dict(ExperimentConfig()))]
    given = {name for name, _ in fields(values)}
    missing = [name for name in names if name not in given]
    source = values.get("train", {}).get("init_from", "")
    if not missing or not isinstance(source, str):
        return values
    if not source:
        raise ConfigError(
            f"config field {missing[0]} is missing: give it, or --config.train.init_from, the workdir to take it from"
        )
    return checkpoint.filled(values, to_dict(load_config(source)))


def keep_tokenizer(workdir: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer that a run trained into its workdir; others are files already, or none.

    Raises:
      UserError: it can't be written.
    """
    if tokenizer.trained:
        path = tokenizer_folder(workdir) / TOKENIZER_FILES[0]
        files.write(path, lambda file: file.write(tokenizer.trained), "free space, or choose another --workdir")


def tokenizer_folder(workdir: str | pathlib.Path) -> pathlib.Path:
    """Returns where a workdir has its tokenizer."""
    return bucket.path(workdir) / "tokenizer"


def load(workdir: str, config: ExperimentConfig) -> Trained:
    """Returns the parameters of the newest checkpoint.

    Raises:
      CheckpointError: there is none, or its parameters aren't those of `config.model`.
      ConfigError: the devices don't make the mesh of the config.
    """
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    sharding.check_mesh(mesh, config)
    with checkpoint.Checkpointer(bucket.path(workdir) / "checkpoints", config.train) as checkpoints:
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
