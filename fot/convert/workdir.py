"""Workdirs: an imported model as a checkpoint that evaluations and `train.init_from` read, and a run's to export.

Beside `checkpoints/`, an imported workdir has `tokenizer/`, and `origin.json` with what an export needs to know.
"""

import dataclasses
import json
import pathlib

import jax

from fot import bucket, checkpoint, files, model, sharding, trained
from fot.config import ExperimentConfig, MeshConfig, ModelConfig
from fot.convert import source, weights
from fot.convert.hf_config import BOS, EOS, Origin
from fot.convert.source import Source
from fot.convert.weights import Read
from fot.data import tokenizer as tokenizers
from fot.errors import ConversionError

ORIGIN = "origin.json"
REMEDY = "choose another --target"


def open_source(path: pathlib.Path) -> Source:
    """Opens a workdir's newest checkpoint.

    Raises:
      CheckpointError: there is none.
      ConversionError: its origin.json can't be read.
    """
    config = trained.load_config(path)

    def read(wanted: ModelConfig) -> Read:
        return weights.of_params(_params(path, dataclasses.replace(config, model=wanted)))

    tokenizer = _tokenizer(config)
    note = f"the run's tokenizer (data.tokenizer={config.data.tokenizer}) is not exported: name its file by --tokenizer"
    return Source(config, _origin(path, config), tokenizer, read, () if tokenizer else (note,))


def write(target: pathlib.Path, opened: Source, config: ExperimentConfig, read: Read) -> None:
    """Writes a workdir; it is there whole or not at all.

    Args:
      target: the workdir, which must not exist.
      opened: where the weights come from, and the tokenizer, which `trained.load_config` finds in the workdir.
      config: of the run that the checkpoint is stored with.
      read: the weights.

    Raises:
      ConfigError: the devices don't make the mesh of the config.
      UserError: the folder can't be written.
    """
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    sharding.check_mesh(mesh, config)
    with files.new_folder(target, REMEDY) as folder:
        write_files(trained.tokenizer_folder(folder), opened.tokenizer)
        write_files(folder, {ORIGIN: json.dumps(dataclasses.asdict(opened.origin), indent=1).encode()})
        params = weights.load(read, config.model, mesh)
        with checkpoint.Checkpointer(folder / "checkpoints", config.train) as checkpoints:
            checkpoints.save(0, {"params": params}, {}, config)


def write_files(folder: pathlib.Path, contents: dict[str, bytes]) -> None:
    """Writes files into a folder of a target that isn't in its place yet."""
    for name, content in contents.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _params(path: pathlib.Path, config: ExperimentConfig) -> model.Params:
    """Returns the parameters in the host's own memory: the run's mesh may be that of another machine."""
    mesh = sharding.make_mesh(MeshConfig(), jax.local_devices(backend="cpu")[:1])
    with checkpoint.Checkpointer(path / "checkpoints", config.train) as checkpoints:
        return checkpoints.restore_params(None, sharding.abstract_params(model.init, config.model, mesh))


def _origin(path: pathlib.Path, config: ExperimentConfig) -> Origin:
    """Returns the origin of the workdir, of the one that its run began with, or of none."""
    for folder in (path, bucket.path(config.train.init_from or path)):
        if (folder / ORIGIN).is_file():
            values = source.read_json(folder / ORIGIN)
            try:
                return Origin(**values)
            except TypeError as error:
                raise ConversionError(f"{folder / ORIGIN} is of another version of fot: {error}") from None
    return Origin("llama", config.data.context, token_ids=_token_ids(config))


def _token_ids(config: ExperimentConfig) -> dict[str, int]:
    """Returns the ids that the run's documents begin and end with; without a tokenizer's file they are LLaMA's."""
    if not _tokenizer(config):
        return {"bos_token_id": BOS, "eos_token_id": EOS}
    loaded = tokenizers.file_tokenizer(config.data, config.model)
    return {"bos_token_id": loaded.bos, "eos_token_id": loaded.eos}


def _tokenizer(config: ExperimentConfig) -> dict[str, bytes]:
    """Returns the run's tokenizer file, and what lies beside it if it is in the folder of an imported one."""
    path = bucket.path(config.data.tokenizer_file).expanduser()
    if config.data.tokenizer != "file" or not path.is_file():
        return {}
    if path.name in source.TOKENIZER_FILES:
        return source.tokenizer_files(path.parent)
    return {"tokenizer.json" if path.suffix == ".json" else "tokenizer.model": path.read_bytes()}
