"""Reads a long text with a trained model and continues it.

  python -m fot.generate --workdir=runs/small --prompt="def main("
  python -m fot.generate --workdir=runs/small --context=book.txt --prompt="Chapter 7" --config.generate.temperature=0.8

The context, a file, and the prompt after it are read as one text of any length: its end stays in the local context, all
that is before in memory. The continuation streams to stdout, progress to stderr. The config is the one stored with the
newest checkpoint in the workdir, unless --config names another; the fields of --config.generate say how it is read and
what is drawn.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from fot import cli, incremental, lean, loading, memory_file, session
from fot import config as config_lib
from fot import trained as trained_model
from fot.config import ExperimentConfig
from fot.data import corpus as corpora
from fot.data.text_stream import texts
from fot.errors import UserError
from fot.layers import Params
from fot.loading import Show
from fot.memory import Memory
from fot.sampling import Sampling, sample
from fot.session import Setup, State

NONE = -1  # in place of a token, in a row that has ended


def prompt_logits(
    params: Params, config: ExperimentConfig, prompts: Sequence[np.ndarray], mesh: Mesh
) -> list[np.ndarray]:
    """Returns float32 logits [tokens, V] at all tokens of each prompt, as generation sees them.

    Prompts may hold `session.PADDING`, which counts when they are cut into windows and for nothing else. So they are
    cut as the released code and the PyTorch model cut the rows of a padded batch.

    Args:
      params: of `incremental.prepare`.
      config: as for `stream`.
      prompts: token ids of each row, at least one.
      mesh: where they are.
    """
    setup, rows = session.setup_of(config, mesh), _rows(prompts, mesh)
    return session.all_logits(params, setup, session.empty(setup, len(rows)), rows)[1][: len(prompts)]


def generate(
    params: Params,
    config: ExperimentConfig,
    prompts: Sequence[np.ndarray],
    mesh: Mesh,
    *,
    stop: Collection[int] = (),
    keys: jax.Array | None = None,
    memory: Memory | None = None,
    show: Show = lambda done, speed: None,
) -> list[np.ndarray]:
    """Returns what follows each prompt, int32 [tokens], without the token it stopped at; arguments as for `stream`."""
    steps = list(stream(params, config, prompts, mesh, stop=stop, keys=keys, memory=memory, show=show))
    tokens_BT = np.stack(steps, 1) if steps else np.zeros((len(prompts), 0), np.int32)
    return [row[row != NONE] for row in tokens_BT]


def stream(
    params: Params,
    config: ExperimentConfig,
    prompts: Sequence[np.ndarray],
    mesh: Mesh,
    *,
    stop: Collection[int] = (),
    keys: jax.Array | None = None,
    memory: Memory | None = None,
    show: Show = lambda done, speed: None,
) -> Iterator[np.ndarray]:
    """Yields the tokens that follow the prompts, int32 [B], as they come; a row's result does not depend on the others.

    Args:
      params: of `incremental.prepare`, for any number of calls.
      config: model, `data.context`, `generate`, and of `evaluate` how readers read.
      prompts: token ids of each row, at least one, of any lengths.
      mesh: where they are.
      stop: tokens that end a row; they are not given out.
      keys: [B], a random key for each row; None makes them of `generate.seed` and the row's number.
      memory: what was read before the prompts, see `session.remember`; None is nothing.
      show: is told how many windows of the prompts are in memory, and tokens/s.

    Yields:
      A token of each row, `NONE` in those that have ended; at most `generate.max_new_tokens` times.

    Raises:
      UserError: a prompt is empty, or the mesh can't have the memory of the reader.
    """
    setup, settings, rows = session.setup_of(config, mesh), config.generate, _rows(prompts, mesh)
    if keys is None:
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(settings.seed)))(np.arange(len(prompts)))
    keys = keys[np.arange(len(rows)) % len(prompts)]
    draw = _draw(Sampling(settings.temperature, settings.top_k, settings.top_p))
    ended = np.arange(len(rows)) >= len(prompts)
    state = _start(setup, rows, settings.max_new_tokens, memory)
    state, logits = session.read(params, setup, state, rows, show)
    for number in range(settings.max_new_tokens):
        tokens = np.array(draw(keys, logits, number))
        ended = ended | np.isin(tokens, list(stop))
        if ended.all():
            return
        yield np.where(ended, NONE, tokens)[: len(prompts)]
        if number + 1 < settings.max_new_tokens:
            following = [[] if done else [token] for token, done in zip(tokens, ended, strict=True)]
            state, logits = session.advance(params, setup, state, following)


def _start(setup: Setup, rows: list[np.ndarray], new_tokens: int, memory: Memory | None) -> State:
    state = session.empty(setup, len(rows))
    if memory is not None:
        state = session.remember(setup, state, memory)
    entries = [session.entries_of(setup, len(row), new_tokens) for row in rows]
    return session.reserve(setup, state, int((state.written + entries).max()) if any(entries) else 0)


def _rows(prompts: Sequence[np.ndarray], mesh: Mesh) -> list[np.ndarray]:
    """Returns the prompts, and empty ones until the rows are a multiple of the devices that they are split over."""
    rows = [np.asarray(prompt, np.int32) for prompt in prompts]
    for number, row in enumerate(rows):
        if len(row) == 0:
            raise UserError(f"prompt {number} is empty: give it a token, such as <bos>")
    missing = -len(rows) % (mesh.shape["data"] * mesh.shape["fsdp"])
    return rows + [np.zeros(0, np.int32)] * missing


@functools.lru_cache(maxsize=64)
def _draw(sampling: Sampling) -> Callable:
    """Returns (keys [B], logits [B, V], number of the token) -> tokens [B]."""

    def draw(keys: jax.Array, logits_BV: jax.Array, number: int) -> jax.Array:
        return sample(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys, number), sampling)

    return jax.jit(draw)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      workdir: folder of the run, with its checkpoints/; the newest checkpoint is used.
      context: file of text to read before the prompt; empty is none.
      prompt: text to continue, after the context.
      memory: folder of a memory (see fot/memory_file.py) that was read before both; empty is none.
    """

    workdir: str
    context: str = ""
    prompt: str = ""
    memory: str = ""


def main(config: ExperimentConfig, flags: Flags) -> None:
    """Runs the command line."""
    lean.return_freed()
    generated = set(config_lib.GENERATED_TASKS).intersection(config.data.task)
    if generated:
        raise UserError(
            f"{flags.workdir} holds a run of data.task={','.join(generated)}, which has no text to go on with"
        )
    text = _read(flags.context) + flags.prompt
    tokenizer = corpora.load_tokenizer(config)
    trained = trained_model.load(flags.workdir, config)
    memory = None
    if flags.memory:
        memory = memory_file.load(pathlib.Path(flags.memory), memory_file.owner(trained.params, config.model))
    begin = [] if flags.memory else [tokenizer.bos]
    prompt = np.concatenate([begin, tokenizer.encode(text)]).astype(np.int32)
    params = incremental.prepare(trained.params, config.model, trained.mesh)
    windows = -(-max(len(prompt) - config.generate.last_context_length, 0) // config.data.context)
    with loading.progress(windows) as show:
        tokens = stream(params, config, [prompt], trained.mesh, stop=[tokenizer.eos], memory=memory, show=show)
        first = next(tokens, None)
    if first is not None:
        following = (int(each[0]) for each in (first, *tokens))
        for piece in texts(tokenizer, prompt, following):
            print(piece, end="", flush=True)
    print()


def _read(path: str) -> str:
    if not path:
        return ""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't read --context={path} ({error.strerror}): name a file of text") from None
    except UnicodeDecodeError:
        raise UserError(f"--context={path} is not UTF-8 text: convert it") from None


if __name__ == "__main__":
    cli.run(main, Flags, __doc__, trained_model.config_named)
