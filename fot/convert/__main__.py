"""Converts checkpoints of the LLaMA family: other programs' in, Focused Transformers out.

  python -m fot.convert --from=hf --source=open_llama_3b --to=fot --target=runs/openllama --memory_layers=6,12,18
  python -m fot.convert --from=gguf --source=SmolLM2-135M.gguf --to=fot --target=runs/smollm2
  python -m fot.convert --from=easylm --source=streaming_params --model_config=config.json --to=hf --target=hf
  python -m fot.convert --from=fot --source=runs/tuned --to=longllama --target=long_tuned --dtype=bf16

--from, and what --source is:
  hf      a Hugging Face folder with config.json and weights (safetensors or PyTorch, one file or many): LLaMA 1 to 3,
          Code Llama, OpenLLaMA, TinyLlama, SmolLM2, Mistral, Qwen2, LongLLaMA
  easylm  a file of EasyLM's streaming checkpointer, parameters alone or a training state; the model's shape comes from
          --model_config=FILE (JSON, EasyLM's or Hugging Face's names) or --config=configs/longllama_3b.py
  gguf    a file of llama.cpp, architecture llama; quantized weights become float32
  fot     a workdir, of which the newest checkpoint is taken

--to, and what --target becomes:
  fot        a workdir, for python -m fot.evaluate … --workdir=DIR and for --config.train.init_from=DIR; always float32
  hf         a folder for transformers: LlamaForCausalLM, or Qwen2ForCausalLM if there are biases
  longllama  a folder for transformers with the code of LongLLaMA inside, to be loaded with trust_remote_code=True

Memory layers add no parameters, so any layers can become memory layers, at the conversion or later. The target must not
exist; it appears when it is complete. The config stored in a workdir is that of the source; --config.… changes fields
that the weights leave open, such as --config.mesh.tensor=4.

Exit codes: 0 converted; 2 an error, told in one line; 130 ended by Ctrl-C.
"""

import dataclasses
import functools
import pathlib

from fot import bucket, cli
from fot import config as config_lib
from fot.config import ExperimentConfig, ModelConfig
from fot.convert import easylm, export, gguf_file, hf_config, huggingface, workdir
from fot.convert.source import Source
from fot.errors import ConfigError, ConversionError

FROM = ("hf", "easylm", "gguf", "fot")
TO = ("fot", "hf", "longllama")
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
# Fields of the model that another value of would not change what the stored weights mean.
OPEN = ("memory_layers", "compute_dtype", *config_lib.INDIFFERENT)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      from_: what the source is: hf, easylm, gguf or fot.
      source: folder or file to read.
      to: what to write: fot, hf or longllama.
      target: folder to write; it must not exist.
      dtype: of exported weights: f32, bf16 or f16; "" is that of the source.
      model_config: for easylm: JSON file with the model's config.
      tokenizer: file of the tokenizer to go with the model, tokenizer.model or tokenizer.json; "" is the source's.
      memory_layers: layers (from 0) that see a memory; () leaves those of the source.
      context: tokens of a window; 0 is the source's max_position_embeddings, of a workdir its data.context.
      last_context_length: for longllama: tokens of the last window, those before which go to the memory; 0 is the
        source's, or 1024.
      mem_dtype: for longllama: dtype of the memory: f32, bf16 or f16; "" is the source's, or bf16.
      max_shard_bytes: size of a file of weights at the most, in bytes.
    """

    from_: str
    source: str
    to: str
    target: str
    dtype: str = ""
    model_config: str = ""
    tokenizer: str = ""
    memory_layers: tuple[int, ...] = ()
    context: int = 0
    last_context_length: int = 0
    mem_dtype: str = ""
    max_shard_bytes: int = 5_000_000_000


@functools.lru_cache(maxsize=1)
def opened(flags: Flags) -> Source:
    """Opens what the flags name.

    Raises:
      UserError: it can't be read, or a flag has a wrong value.
    """
    _check(flags)
    path = (bucket.path if flags.from_ == "fot" else pathlib.Path)(flags.source).expanduser()
    if flags.from_ == "hf":
        return huggingface.open_source(path, flags.context)
    if flags.from_ == "easylm":
        return easylm.open_source(path, flags.model_config, flags.context)
    if flags.from_ == "gguf":
        return gguf_file.open_source(path, flags.context)
    return workdir.open_source(path)


def load(flags: Flags) -> ExperimentConfig:
    """Returns the config that comes with the source.

    Raises:
      UserError: it can't be read, or there is none.
    """
    config = opened(flags).config
    if config is None:
        raise ConversionError(
            "a file of EasyLM doesn't say the model's shape: give --model_config=FILE, or --config such as "
            "--config=configs/longllama_3b.py"
        )
    return config


def main(config: ExperimentConfig, flags: Flags) -> None:
    """Runs the command line."""
    source = _completed(opened(flags), config, flags)
    config = _with_flags(config, flags)
    target = pathlib.Path(flags.target).expanduser()
    if source.config is not None:
        _check_facts(source.config.model, config.model)
    if flags.to == "fot":
        workdir.write(target, source, config, source.weights(config.model))
    else:
        # A window of LongLLaMA is what the run trained with; plain LLaMA may be read further.
        least = 0 if flags.to == "longllama" else source.origin.context
        context = flags.context or max(least, config.data.context)
        dtype = DTYPES.get(flags.dtype, source.origin.dtype)
        write, code = hf_config.write, {}
        if flags.to == "longllama":
            write, code = hf_config.write_longllama, export.code_files()
        values = write(config.model, source.origin, context, dtype)
        export.write(target, source, config.model, values, source.weights(config.model), code, flags.max_shard_bytes)
    for note in source.notes if not flags.tokenizer else ():
        print(f"note: {note}")
    print(f"converted {flags.source} ({flags.from_}) to {target} ({flags.to})")


def _check(flags: Flags) -> None:
    for name, value, choices in (("from", flags.from_, FROM), ("to", flags.to, TO)):
        if value not in choices:
            raise ConfigError(f"--{name}={value} is not one of {', '.join(choices)}")
    for name in ("dtype", "mem_dtype"):
        if getattr(flags, name) not in ("", *DTYPES):
            raise ConfigError(f"--{name}={getattr(flags, name)} is not one of {', '.join(DTYPES)}")
    for name in ("context", "last_context_length"):
        if getattr(flags, name) < 0:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be 0 or greater")
    if flags.max_shard_bytes <= 0:
        raise ConfigError(f"--max_shard_bytes={flags.max_shard_bytes} must be greater than 0")
    if flags.to == "fot" and flags.from_ == "fot":
        raise ConfigError("--from=fot --to=fot has nothing to convert: copy the workdir")
    if flags.to == "fot" and flags.dtype not in ("", "f32"):
        raise ConfigError(f"--dtype={flags.dtype}: a workdir holds float32; set --config.model.compute_dtype=bfloat16")
    if flags.model_config and flags.from_ != "easylm":
        raise ConfigError("--model_config is for --from=easylm: the other sources say the model's shape themselves")
    if bucket.folder("target", flags.target).expanduser().exists():
        raise ConversionError(f"--target={flags.target} exists: {workdir.REMEDY}, or delete it")


def _completed(source: Source, config: ExperimentConfig, flags: Flags) -> Source:
    """Returns the source with what the flags say instead of it."""
    origin = dataclasses.replace(source.origin, context=source.origin.context or flags.context or config.data.context)
    if flags.last_context_length:
        origin = dataclasses.replace(origin, last_context_length=flags.last_context_length)
    if flags.mem_dtype:
        origin = dataclasses.replace(origin, mem_dtype=DTYPES[flags.mem_dtype])
    tokenizer = source.tokenizer
    if flags.tokenizer:
        path = pathlib.Path(flags.tokenizer).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConversionError(f"can't read --tokenizer={path} ({error.strerror}): name a readable file") from None
        tokenizer = {"tokenizer.json" if path.suffix == ".json" else "tokenizer.model": content}
    return source._replace(origin=origin, tokenizer=tokenizer)


def _with_flags(config: ExperimentConfig, flags: Flags) -> ExperimentConfig:
    """Returns the config with the memory layers and the context of the flags."""
    values = config_lib.to_dict(config)
    if flags.memory_layers:
        values["model"]["memory_layers"] = flags.memory_layers
    if flags.context and flags.to == "fot":
        values["data"]["context"] = flags.context
    return config_lib.from_dict(values)


def _check_facts(stored: ModelConfig, wanted: ModelConfig) -> None:
    """Raises ConfigError if a field that the weights depend on was changed, by --config or an override."""
    left, right = config_lib.to_dict(stored), config_lib.to_dict(wanted)
    names = [name for name in left if name not in OPEN and left[name] != right[name]]
    changed = [f"model.{name}: {left[name]!r} → {right[name]!r}" for name in names]
    if changed:
        raise ConfigError(f"the source says otherwise ({'; '.join(changed)}): leave these fields as they are")


if __name__ == "__main__":
    cli.run(main, Flags, usage=__doc__, load=load)
