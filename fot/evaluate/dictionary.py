"""Accuracy of dictionary lookup by memory length (FoT, section 4.1 and Appendix D).

  python -m fot.evaluate dictionary --workdir=runs/dictionary_tiny --memory=16k,256k,1m
  python -m fot.evaluate dictionary --workdir=runs/dictionary_tiny --plain=runs/dictionary_plain

Loads the definitions of one dictionary into a memory, up to each length, and asks for records of all of it. The plain
transformer of --plain reads definitions and questions in one local context, as far as `evaluate.plain_tokens` lets it.
The config is the one stored with the newest checkpoint in the workdir, unless --config names another. Prints a table,
and writes dictionary.json and dictionary.png.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh

from fot import bucket, loading, model, objective, sharding
from fot import config as config_lib
from fot import trained as trained_model
from fot.attention import Tokens
from fot.batch import Batch
from fot.config import ExperimentConfig, ModelConfig
from fot.data import dictionary
from fot.data.dictionary import Dictionary
from fot.errors import ConfigError, UserError
from fot.evaluate import dictionary_report as report
from fot.evaluate import sizes
from fot.evaluate.dictionary_report import Curve, Point
from fot.loading import Loading
from fot.readers import table
from fot.readers.reader import Reader, of_config

PLAIN_BLOCK = 1024  # queries per block of attention of a plain transformer: long contexts compile in few blocks


def evaluate(
    params: model.Params, config: ExperimentConfig, mesh: Mesh, log: Callable[[str], None]
) -> tuple[Curve, ...]:
    """Measures the accuracy of values, for every reader and memory length of `config.evaluate` but 0.

    There is one dictionary: a shorter memory holds its first definitions. Heads are split over the mesh axis tensor.

    Args:
      params: as `model.init` gives them; placed on the mesh if they aren't.
      config: model, `dictionary`, `evaluate`, and `data.seed`, which with others gives another dictionary.
      mesh: what the parameters are placed on.
      log: receives a line for every point.

    Raises:
      ConfigError: a memory length is no whole number of windows, or more than there are keys for; the model has no
        memory layer.
    """
    asked = Dictionary(config.dictionary, config.data.seed)
    lengths = _lengths(config, asked)
    if not config.model.memory_layers:
        raise ConfigError("model.memory_layers is empty: name such a model with --plain, and one with memory otherwise")
    params = jax.device_put(params, sharding.shardings(params, mesh))
    readers = [of_config(name, config) for name in config.evaluate.readers]
    found = {}
    for place in dict.fromkeys(table.place(reader.name) for reader in readers):
        group = [reader for reader in readers if table.place(reader.name) == place]
        found |= _measure(params, config, asked, lengths, group, mesh, log)
    return tuple(Curve(_label(reader), tuple(found[reader])) for reader in readers)


def _measure(
    params: model.Params,
    config: ExperimentConfig,
    asked: Dictionary,
    lengths: list[int],
    readers: list[Reader],
    mesh: Mesh,
    log: Callable[[str], None],
) -> dict[Reader, list[Point]]:
    """Loads one memory, which all these readers can read, up to each length in turn, and asks."""
    settings, window = config.evaluate, asked.config.window
    rows = mesh.shape["data"] * mesh.shape["fsdp"]  # the first is the dictionary's; the others are there to be split
    store = loading.store_of(readers[0], mesh)
    dtype = config.model.compute_dtype if settings.memory_dtype == "compute" else settings.memory_dtype
    memory = store.empty(config.model, rows, lengths[-1], dtype)
    how = Loading(readers[0], settings.windows, "refuse")
    points: dict[Reader, list[Point]] = {reader: [] for reader in readers}
    loaded, seconds = 0, 0.0
    with jax.set_mesh(mesh):
        for length in lengths:
            began = time.perf_counter()
            windows = _windows(asked, range(loaded, length // window), rows)
            with loading.progress(length // window - loaded) as show:
                memory = store.build(loading.load(params, config.model, memory, windows, how, mesh, show))
            loaded, seconds = length // window, seconds + time.perf_counter() - began
            for reader in readers:
                ask = functools.partial(_ask(config.model, reader, mesh), params, memory)
                points[reader].append(_point(ask, asked, length, seconds, settings.questions))
                log(report.line(_label(reader), points[reader][-1]))
    return points


def evaluate_plain(params: model.Params, config: ExperimentConfig, mesh: Mesh, log: Callable[[str], None]) -> Curve:
    """Measures the accuracy of a model that reads definitions and questions in one local context.

    Args:
      params: as `model.init` gives them; placed on the mesh if they aren't.
      config: as for `evaluate`; lengths above `evaluate.plain_tokens` are left out.
      mesh: what the parameters are placed on.
      log: receives a line for every point.

    Raises:
      ConfigError: see `evaluate`.
    """
    asked = Dictionary(config.dictionary, config.data.seed)
    lengths = [length for length in _lengths(config, asked) if length <= config.evaluate.plain_tokens]
    params = jax.device_put(params, sharding.shardings(params, mesh))
    changed = dataclasses.replace(config.model, attention_block=PLAIN_BLOCK)
    points = []
    for length in lengths:
        defined = np.concatenate([asked.definitions(i) for i in range(length // asked.config.window)])
        ask = functools.partial(_ask_plain(changed, mesh), params, defined)
        points.append(_point(ask, asked, length, 0.0, config.evaluate.questions))
        log(report.line(report.PLAIN, points[-1]))
    return Curve(report.PLAIN, tuple(points))


def _label(reader: Reader) -> str:
    return f"FoT, {reader.name}" + (f", k = {reader.neighbours}" if reader.name != "dense" else "")


def _lengths(config: ExperimentConfig, asked: Dictionary) -> list[int]:
    """Returns the memory lengths to measure, ascending, in tokens."""
    window = asked.config.window
    lengths = [length for length in config.evaluate.memory if length > 0]
    if not lengths:
        raise ConfigError("evaluate.memory has no length above 0: name some with --memory=16k,1m")
    for length in lengths:
        if length % window:
            raise ConfigError(f"a memory of {length} tokens is no whole number of windows of {window} tokens: round it")
    most = asked.windows * window
    if lengths[-1] > most:
        raise ConfigError(
            f"a memory of {lengths[-1]:,} tokens has more records than there are keys: ask for at most {most:,} tokens"
        )
    return lengths


def _point(
    ask: Callable[[np.ndarray], jax.Array], asked: Dictionary, length: int, load_seconds: float, questions: int
) -> Point:
    """Puts windows of questions, one after the other."""
    correct, began = [], time.perf_counter()
    for number in range(questions):
        tokens = asked.questions(length // asked.config.window, number)
        right = jax.device_get(ask(tokens))  # of each token, whether the one after it was predicted
        counted = dictionary.answers(tokens, asked.config)
        correct.append(np.append(False, right[:-1])[counted].reshape(-1, asked.config.value_tokens))
    return report.point(length, np.concatenate(correct), load_seconds, time.perf_counter() - began)


def _windows(asked: Dictionary, numbers: range, rows: int) -> Iterator[Batch]:
    """Yields windows of definitions for the first row; the others have none."""
    place = np.arange(asked.config.window, dtype=np.int32)
    documents = np.full((rows, len(place)), -1, np.int32)
    documents[0] = 0
    for number in numbers:
        tokens = np.broadcast_to(asked.definitions(number), documents.shape)
        positions = np.broadcast_to(number * len(place) + place, documents.shape)
        yield Batch(tokens, np.zeros_like(tokens), np.zeros(tokens.shape, np.float32), documents, positions)


def _row_tokens(tokens_BT: jax.Array) -> Tokens:
    place_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    return Tokens(jnp.zeros_like(place_BT), place_BT)


@functools.lru_cache(maxsize=64)
def _ask(config: ModelConfig, reader: Reader, mesh: Mesh) -> Callable:
    """Returns (params, memory, token ids [T]) -> bool [T], whether the next token was predicted."""

    def ask(params, memory, tokens_T):
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        tokens_BT = jnp.broadcast_to(tokens_T, (rows, len(tokens_T)))
        output = model.apply(params, tokens_BT, _row_tokens(tokens_BT), config, memory=memory, reader=reader)
        return _correct(params, output.hidden[:1], tokens_T, config)

    return jax.jit(ask, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=64)
def _ask_plain(config: ModelConfig, mesh: Mesh) -> Callable:
    """Returns (params, definitions [S], token ids [T]) -> bool [T], whether the next token was predicted."""

    def ask(params, definitions_S, tokens_T):
        row = jnp.concatenate([definitions_S, tokens_T])[None]
        output = model.apply(params, row, _row_tokens(row), config)
        return _correct(params, output.hidden[:, len(definitions_S) :], tokens_T, config)

    return jax.jit(ask, out_shardings=sharding.replicated(mesh))


def _correct(params: model.Params, hidden_1TD: jax.Array, tokens_T: jax.Array, config: ModelConfig) -> jax.Array:
    return objective.token_nll(params, hidden_1TD, jnp.roll(tokens_T, -1)[None], config)[1][0]


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      workdir: folder of the run, with its checkpoints/; the newest checkpoint is evaluated.
      plain: folder of the run of a plain transformer to compare with, see configs/dictionary_plain.py; empty is none.
      memory: memory lengths in tokens, such as 16k,256k,1m; empty is `evaluate.memory`.
      output: folder that receives dictionary.json and dictionary.png; empty is the workdir.
    """

    workdir: str
    plain: str = ""
    memory: str = ""
    output: str = ""


def main(config: ExperimentConfig, flags: Flags) -> None:
    """Runs the command line."""
    if flags.memory:
        lengths = sizes.parse(flags.memory, "memory")
        config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, memory=lengths))
    _check_task(config, flags.workdir)
    output = bucket.path(flags.output or flags.workdir)
    curves, about = (), {"workdir": flags.workdir, "config": config_lib.to_dict(config)}
    if flags.plain:
        curves, about["plain"] = (_plain(config, flags),), flags.plain
    trained = trained_model.load(flags.workdir, config)
    print(f"{flags.workdir}: step {trained.step}", flush=True)
    curves = (*evaluate(trained.params, config, trained.mesh, _log), *curves)
    about["step"] = trained.step
    path = report.save(curves, about, output)
    report.plot(curves, output / report.PLOT_FILE)
    print(f"\n{report.table(curves)}\n\nwritten to {path} and {output / report.PLOT_FILE}")


def _log(line: str) -> None:
    tqdm.tqdm.write(line)


def _check_task(config: ExperimentConfig, workdir: str) -> None:
    if "dictionary" not in config.data.task:
        raise UserError(
            f"{workdir} holds a run of data.task={','.join(config.data.task)}: this evaluation needs one of "
            "data.task=dictionary, such as configs/dictionary_tiny.py"
        )


def _plain(config: ExperimentConfig, flags: Flags) -> Curve:
    """Measures the plain transformer with the dictionary and the settings of the other model."""
    plain = trained_model.load_config(flags.plain)
    _check_task(plain, flags.plain)
    if plain.crossbatch.variant != "none":
        raise UserError(f"--plain={flags.plain} was trained with crossbatch: name a run with crossbatch.variant=none")
    names = ("symbols", "key_tokens", "value_tokens", "window")
    changed = [name for name in names if getattr(plain.dictionary, name) != getattr(config.dictionary, name)]
    if changed:
        raise UserError(f"--plain={flags.plain} and --workdir={flags.workdir} differ in dictionary.{changed[0]}")
    trained = trained_model.load(flags.plain, plain)
    print(f"{flags.plain}: step {trained.step}", flush=True)
    same = dataclasses.replace(
        plain,
        dictionary=dataclasses.replace(config.dictionary, document=plain.dictionary.document),
        data=dataclasses.replace(plain.data, seed=config.data.seed),
        evaluate=config.evaluate,
    )
    return evaluate_plain(trained.params, same, trained.mesh, _log)
