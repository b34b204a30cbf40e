"""Share of pass keys found by length of the prompt and place of the key (FoT, section 5).

  python -m fot.evaluate passkey --workdir=runs/passkey_tiny --lengths=4k,16k,64k --depths=0,0.5,1 --trials=20
  python -m fot.evaluate passkey --workdir=runs/longllama --config.generate.reader=knn

Hides a number in filler, asks for it at the end, and compares the digits of the likeliest continuation, which is
generated as `python -m fot.generate` does it. For any model and its tokenizer. The config is the one stored with the
newest checkpoint in the workdir, unless --config names another. Prints a table, and writes passkey.json and
passkey.png.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tqdm
from jax.sharding import Mesh

from fot import bucket, generate, incremental, model
from fot import config as config_lib
from fot import trained as trained_model
from fot.config import EvaluateConfig, ExperimentConfig
from fot.data import corpus as corpora
from fot.data import passkey
from fot.data.passkey import Prompt
from fot.data.tokenizer import Tokenizer
from fot.errors import UserError
from fot.evaluate import passkey_report as report
from fot.evaluate import sizes
from fot.evaluate.passkey_report import Cell, Wrong
from fot.loading import Show
from fot.metrics import Progress

# A space, and a digit more than the key has: a longer number is another number.
_MORE_TOKENS = 2

# (prompts, show) -> their continuations, all token ids; `show` is told how far their reading is.
Continue = Callable[[Sequence[np.ndarray], Show], list[np.ndarray]]


def evaluate(
    params: model.Params, config: ExperimentConfig, tokenizer: Tokenizer, mesh: Mesh, log: Callable[[str], None]
) -> tuple[Cell, ...]:
    """Asks for `evaluate.trials` keys at every length and depth of `config.evaluate`.

    Args:
      params: as `model.init` gives them; placed on the mesh if they aren't.
      config: model, `data.context`, `data.seed`, `passkey.digits`, `evaluate`, and `generate`, but for how the next
        token is chosen (the likeliest) and how many of them.
      tokenizer: the model's.
      mesh: what the parameters are placed on.
      log: receives a line for every cell.

    Raises:
      ConfigError: a prompt has no room for filler.
    """
    tokens = config.passkey.digits + _MORE_TOKENS
    greedy = dataclasses.replace(config.generate, temperature=0.0, max_new_tokens=tokens)
    config = dataclasses.replace(config, generate=greedy)
    weights = incremental.prepare(params, config.model, mesh)

    def follow(prompts: Sequence[np.ndarray], show: Show) -> list[np.ndarray]:
        return generate.generate(weights, config, prompts, mesh, stop=[tokenizer.eos], show=show)

    return ask(follow, config, tokenizer, log)


def ask(
    follow: Continue, config: ExperimentConfig, tokenizer: Tokenizer, log: Callable[[str], None]
) -> tuple[Cell, ...]:
    """Asks for keys as `evaluate` does, of what continues prompts, `evaluate.batch_size` of a cell at a time."""
    settings, cells = config.evaluate, []
    rows = min(settings.batch_size, settings.trials)
    shape = list(itertools.product(settings.lengths, enumerate(settings.depths)))
    with Progress(len(shape) * settings.trials, 0, sys.stderr, "prompt") as bar:
        for length, (place, depth) in shape:
            keys = passkey.keys(settings.trials, config.passkey.digits, config.data.seed, length, place)
            prompts = [passkey.prompt(tokenizer, key, length, depth) for key in keys]
            answers: list[str] = []
            while len(answers) < len(prompts):
                some = prompts[len(answers) : len(answers) + rows]
                show = functools.partial(_show, bar, len(cells) * settings.trials + len(answers), length)
                answers += _answers(follow, some, rows, tokenizer, show)
            cells.append(_cell(length, depth, prompts, answers))
            log(report.line(cells[-1]))
            _show(bar, len(cells) * settings.trials, length, 0, 0.0)
    return tuple(cells)


def _show(bar: Progress, prompts: int, length: int, windows: int, speed: float) -> None:
    reading = f", {windows} windows at {speed:,.0f} tokens/s" if windows else ""
    bar.show(prompts, f"{sizes.short(length)} tokens{reading}")


def _answers(follow: Continue, prompts: Sequence[Prompt], rows: int, tokenizer: Tokenizer, show: Show) -> list[str]:
    """Returns the text that follows each prompt."""
    # As many rows each time, so that the same programs run.
    missing = [np.array([tokenizer.bos], np.int32)] * (rows - len(prompts))
    following = follow([*(each.tokens for each in prompts), *missing], show)
    return [tokenizer.decode(tokens.tolist()) for tokens in following[: len(prompts)]]


def _cell(length: int, depth: float, prompts: Sequence[Prompt], answers: Sequence[str]) -> Cell:
    wrong = [
        Wrong(each.key, answer)
        for each, answer in zip(prompts, answers, strict=True)
        if not passkey.answered(answer, each.key)
    ]
    return report.cell(length, min(len(each.tokens) for each in prompts), depth, len(prompts), wrong)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      workdir: folder of the run, with its checkpoints/; the newest checkpoint is evaluated.
      lengths: lengths of the prompts in tokens, such as 2k,8k,32k; empty is `evaluate.lengths`.
      depths: places of the key in the filler, from 0 to 1, such as 0,0.5,1; empty is `evaluate.depths`.
      trials: prompts of each length and depth; 0 is `evaluate.trials`.
      output: folder that receives passkey.json and passkey.png; empty is the workdir.
    """

    workdir: str
    lengths: str = ""
    depths: str = ""
    trials: int = 0
    output: str = ""


def main(config: ExperimentConfig, flags: Flags) -> None:
    """Runs the command line."""
    config = dataclasses.replace(config, evaluate=_settings(config.evaluate, flags))
    tokenizer = corpora.load_tokenizer(config)
    passkey.check_length(tokenizer, config.passkey.digits, config.evaluate.lengths[0])
    output = bucket.path(flags.output or flags.workdir)
    trained = trained_model.load(flags.workdir, config)
    print(f"{flags.workdir}: step {trained.step}, reader {config.generate.reader}", flush=True)
    cells = evaluate(trained.params, config, tokenizer, trained.mesh, tqdm.tqdm.write)
    about = {"workdir": flags.workdir, "step": trained.step, "config": config_lib.to_dict(config)}
    path = report.save(cells, about, output)
    report.plot(cells, output / report.PLOT_FILE)
    print(f"\n{report.table(cells)}\n\nwritten to {path} and {output / report.PLOT_FILE}")


def _settings(config: EvaluateConfig, flags: Flags) -> EvaluateConfig:
    changes: dict[str, Any] = {}
    if flags.lengths:
        changes["lengths"] = sizes.parse(flags.lengths, "lengths")
    if flags.depths:
        changes["depths"] = _depths(flags.depths)
    if flags.trials < 0:
        raise UserError(f"--trials={flags.trials} must be 1 or more")
    if flags.trials:
        changes["trials"] = flags.trials
    return dataclasses.replace(config, **changes)


def _depths(words: str) -> tuple[float, ...]:
    try:
        depths = tuple(sorted({float(word) for word in words.split(",")}))
    except ValueError:
        depths = (-1.0,)
    if not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"--depths={words}: depths are numbers from 0 to 1, such as 0,0.5,1")
    return depths
