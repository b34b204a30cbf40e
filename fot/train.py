"""Trains a Focused Transformer: one command for every run, and again the same command to go on.

  python -m fot.train --config=configs/code_tiny.py --workdir=runs/tiny
  python -m fot.train --config=configs/code_small.py --workdir=runs/small --config.model.memory_layers=1,2

The workdir, a folder or gs://bucket/folder, receives checkpoints, metrics.jsonl and tensorboard/. A run that was
interrupted, killed even, goes on from its newest checkpoint, data position included, as if it had never stopped.

Several processes train together where Slurm, GKE or a TPU pod has started them, or launch --backend=local, or one that
sets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each. The first one logs.

Exit codes: 0 trained; 2 an error, told in one line; 42 ended by SIGTERM, all steps saved, or because another process is
gone: run the same command again; 130 ended by Ctrl-C, which saves nothing.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fot import bucket, checkpoint, cli, distributed, model, optimizer, sharding, train_step, trained
from fot.batch import Batch
from fot.clock import Clock
from fot.config import ExperimentConfig, TrainConfig
from fot.data import corpus, loader, rows
from fot.data.loader import Loader
from fot.errors import CheckpointError, LostError, TrainingError, UserError
from fot.metrics import MetricsWriter, NoMetrics, Progress
from fot.profiling import HANG_FILE, Ends, Span, Trace, Watch, span
from fot.termination import Termination, nothing
from fot.train_step import StepMetrics, TrainState
from fot.workdir import Workdir, opened

PREFETCH = 4  # batches that lie ready


class Run(NamedTuple):
    """What stays the same during a run: config, mesh, documents, and held-out batches."""

    config: ExperimentConfig
    mesh: Mesh
    corpus_key: str
    held_out: list[Batch]
    held_out_step: Callable

    def data_position(self, position: rows.Position) -> dict[str, Any]:
        """Returns what is saved of the data: the position, and the documents it belongs to."""
        return {"position": position.to_dict(), "corpus": self.corpus_key}

    def restore_position(self, saved: dict[str, Any]) -> rows.Position:
        """Returns the position that `data_position` saved, if it is one in this run's documents."""
        if saved["corpus"] != self.corpus_key:
            raise CheckpointError(
                "the documents or the tokenizer have changed since the checkpoint was saved: restore them, or choose "
                "another workdir"
            )
        return rows.position_from_dict(saved["position"])

    def evaluates(self, step: int) -> bool:
        """Returns whether the held-out losses after that many steps belong into the metrics."""
        train = self.config.train
        return len(self.held_out) > 0 and step > 0 and (step % train.evaluate_every == 0 or step == train.steps)

    def held_out_losses(self, params: model.Params) -> dict[str, float]:
        """Returns loss and accuracy on held-out documents, without contexts and with those of the first d."""
        contexts = {"": 0}
        if self.config.crossbatch.variant != "none":
            contexts["_with_contexts"] = self.config.crossbatch.d[0]
        losses = {}
        for name, d in contexts.items():
            with jax.set_mesh(self.mesh):
                sums = [self.held_out_step(params, batch, d=d) for batch in self.held_out]
            weight = sum(s.weight for s in sums)
            losses[f"held_out/loss{name}"] = float(sum(s.nll for s in sums) / weight)
            losses[f"held_out/accuracy{name}"] = float(sum(s.correct for s in sums) / weight)
        return losses


def train(
    config: ExperimentConfig,
    workdir: str | os.PathLike,
    log: Callable[[str], None],
    termination: Termination | None = None,
    traced: Span | None = None,
) -> TrainState:
    """Trains to `config.train.steps`, from the newest checkpoint in the workdir if there is one.

    Of several processes each calls this once; the first alone writes what is not a checkpoint.

    Args:
      config: the run.
      workdir: receives checkpoints/, metrics.jsonl, tensorboard/, and tokenizer/ if the run trains its own; gs://… too.
      log: receives lines for the user.
      termination: has SIGTERM save the steps that are not saved yet; None leaves signals as they are.
      traced: steps of which profile/ receives a trace.

    Returns:
      The last state.

    Raises:
      UserError: data, checkpoint or config don't fit, the workdir is in use or can't be written, or gradients stay
        non-finite.
    """
    mesh = sharding.make_mesh(config.mesh, jax.devices())
    sharding.check_mesh(mesh, config)
    termination = termination or Termination()

    def leave() -> str:
        with contextlib.suppress(UserError):  # the bucket is out of reach: another run waits until this one is silent
            place.close()
        return nothing()

    with (
        opened(workdir, log) as place,
        termination.rescue(leave),
        checkpoint.Checkpointer(place.checkpoints, config.train) as checkpoints,
    ):
        if checkpoints.latest() is not None:
            checkpoint.check_config(checkpoint.load_config(place.checkpoints), config)
        tokenizer, documents = corpus.load(config, "train")
        log(f"{len(documents)} training documents, {documents.token_count:,} tokens")
        abstract = sharding.abstract(jax.eval_shape(lambda: train_step.init_state(config)), mesh)
        held_out_step = jax.jit(functools.partial(train_step.held_out_sums, config=config), static_argnames="d")
        run = Run(config, mesh, documents.key, _held_out_batches(config, mesh), held_out_step)
        if checkpoints.latest() is None:
            state, position = _first_state(config, abstract, log), rows.start(config)
        else:
            restored = checkpoints.restore(None, abstract)
            state, position = restored.state, run.restore_position(restored.data_position)
            log(f"going on from the checkpoint of step {int(state.step)} in {place.checkpoints}")
        if distributed.is_first():
            trained.keep_tokenizer(place.local, tokenizer)
        with (
            _reports(place, config, int(state.step), log, traced) as reports,
            Loader(documents, config, position, sharding.batch_sharding(mesh), PREFETCH) as batches,
        ):
            return _loop(run, state, batches, checkpoints, reports, termination)


class _Reports(NamedTuple):
    """Where a run tells of itself; metrics and progress of all processes but the first go nowhere."""

    place: Workdir
    writer: MetricsWriter | NoMetrics
    progress: Progress
    log: Callable[[str], None]
    trace: Trace
    watch: Watch


@contextlib.contextmanager
def _reports(
    place: Workdir, config: ExperimentConfig, step: int, log: Callable[[str], None], traced: Span | None
) -> Iterator[_Reports]:
    steps, number = config.train.steps, jax.process_index()
    with contextlib.ExitStack() as stack:
        if distributed.is_first():
            writer, stream = stack.enter_context(MetricsWriter(place.local, step)), sys.stderr
        else:
            writer, stream = NoMetrics(), stack.enter_context(open(os.devnull, "w"))
        progress = stack.enter_context(Progress(steps, step, stream))
        trace = stack.enter_context(Trace(traced, place.local))
        hang = HANG_FILE.format(number)
        shown = str(place.checkpoints.parent / hang)  # of a bucket, where the copy will be
        ends = Ends(config.train.stuck_seconds, distributed.give_up) if jax.process_count() > 1 else None
        watch = stack.enter_context(Watch(place.local / hang, log, shown=shown, ends=ends))
        stack.enter_context(distributed.told(distributed.STUCK, watch.give_up))
        yield _Reports(place, writer, progress, log, trace, watch)


def _first_state(config: ExperimentConfig, abstract: TrainState, log: Callable[[str], None]) -> TrainState:
    """Returns the state that a new run begins with: drawn, or with the parameters of `train.init_from`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(lambda: train_step.init_state(config), out_shardings=shardings)()
    if not config.train.init_from:
        return state
    source = bucket.path(config.train.init_from) / "checkpoints"
    with checkpoint.Checkpointer(source, config.train) as checkpoints:
        step = checkpoints.latest()
        params = checkpoints.restore_params(step, abstract.params)
    log(f"beginning with the parameters of step {step} in {source}")
    return state._replace(params=params)


def _held_out_batches(config: ExperimentConfig, mesh: Mesh) -> list[Batch]:
    """Returns the batches of held-out documents whose loss is followed during training."""
    if config.train.evaluate_every == 0:
        return []
    documents = corpus.load(config, "held_out").corpus
    batches = loader.batches(documents, config, rows.start(config), sharding.batch_sharding(mesh))
    return [batch for batch, _ in itertools.islice(batches, config.train.evaluate_batches)]


def _loop(
    run: Run,
    state: TrainState,
    batches: Loader,
    checkpoints: checkpoint.Checkpointer,
    reports: _Reports,
    termination: Termination,
) -> TrainState:
    """Trains to the end. SIGTERM saves the variables here, when the main thread is anywhere but in `deferred`."""
    config, train, first = run.config, run.config.train, int(state.step)
    place, writer, progress, log, trace, watch = reports
    step, begun, position = first, first, None
    steps: dict[int, Callable] = {}

    def save() -> None:
        writer.flush()
        place.sync()  # before, so that a run that goes on from it finds its metrics
        checkpoints.save(step, state, run.data_position(position), config)

    def rescue() -> str:
        try:
            # Of several processes, a step that one has begun needs all of them: it can't end before they have agreed.
            last = distributed.agree("last step", begun)
            with termination.halted(lambda: step >= last, distributed.AGREE) as there:
                if not there:
                    raise LostError(f"another process is at step {last} and this one, for too long, at {step}")
                if step > first:
                    save()
                    checkpoints.wait()
                writer.close()
                place.close()
                distributed.part(step)
        except UserError as error:
            if (lost := distributed.lost(error)) is None:
                raise
            return f"{lost}; the same command goes on from the newest checkpoint"
        return f"step {step} is saved; the same command goes on from it" if step else "no step was done yet"

    def evaluate() -> None:
        losses = run.held_out_losses(state.params)
        with termination.deferred():
            writer.write(step, losses)

    with termination.rescue(rescue):
        # A run that was ended between a save and the losses that belong to its step owes them; the first process knows.
        owed = distributed.is_first() and run.evaluates(first) and "held_out/loss" not in writer.resumed
        if distributed.agree("losses owed", int(owed), distributed.JOIN):
            evaluate()
        clock = Clock(config, watch)
        while step < train.steps:
            batch, after, data_wait = next(batches)
            # Only this schedule depends on what the last step gave, and so has to wait for it.
            phase = int(state.phase) if config.crossbatch.d_schedule == "accuracy" else 0
            d = train_step.d_at(config.crossbatch, step, phase, train.seed)
            if d not in steps:
                jax.block_until_ready(state)
                with clock.stopped():
                    steps[d] = _compile(run, d, step, log)
            begun = step + 1
            with termination.deferred():
                checkpoints.check()
                clock.count(step, data_wait)
                with trace.step(step, state):
                    state, metrics = steps[d](state, batch)
                step, position = step + 1, after
                last = step == train.steps
                if step % train.max_skipped == 0 or last:
                    _stop_if_lost(metrics, batch, step, checkpoints, train)
                if step % train.log_every == 0 or last:
                    jax.block_until_ready(metrics)
                    line, speed = _line(metrics, config, step, d), clock.read(d)
                    progress.update(step, line["loss"], speed.tokens_per_second)
                    writer.write(step, line | speed._asdict() | _tokens_read(position, config))
                if step % train.checkpoint_every == 0 or last:
                    with clock.saving():
                        save()
            if run.evaluates(step):
                with clock.stopped():
                    evaluate()
        with termination.deferred(), clock.stopped():
            checkpoints.wait()
    return state


def _compile(run: Run, d: int, step: int, log: Callable[[str], None]) -> Callable:
    """Compiles the train step of one d and says how long it took; returns when all processes have done so."""
    began = time.perf_counter()
    compiled = train_step.compile_step(run.config, run.mesh, d)
    # Gloo waits 30 s at a program's first communication, which compilations of different speed can take.
    distributed.agree(f"step {step} compiled", step, distributed.COMPILED)
    log(f"step {step}: compiled the train step for d = {d} in {time.perf_counter() - began:.1f} s")
    return compiled


def _line(metrics: StepMetrics, config: ExperimentConfig, step: int, d: int) -> dict[str, Any]:
    """Returns what is logged of a step, without rates."""
    values = {name: value.item() for name, value in jax.device_get(metrics)._asdict().items()}
    schedule = optimizer.learning_rate(config.optimizer, config.train.steps)
    applied = step - 1 - values["skipped"]  # a skipped step does not move the optimizer's own count
    return values | {"perplexity": float(np.exp(values["loss"])), "learning_rate": float(schedule(applied)), "d": d}


def _tokens_read(position: rows.Position, config: ExperimentConfig) -> dict[str, int]:
    """Returns the tokens that the run has read of each source, all steps together."""
    names = corpus.source_names(config.data.sources)
    return {f"tokens/{name}": count for name, count in zip(names, position.tokens, strict=True)}


def _stop_if_lost(
    metrics: StepMetrics, batch: Batch, step: int, checkpoints: checkpoint.Checkpointer, config: TrainConfig
) -> None:
    """Raises TrainingError if too many steps in a row were skipped, naming step, rows and checkpoint."""
    skipped = int(metrics.skipped_in_a_row)
    if skipped < config.max_skipped:
        return
    shards = [np.asarray(shard.data) for shard in batch.documents.addressable_shards]
    documents = sorted({int(number) for shard in shards for number in shard.ravel() if number >= 0})
    checkpoints.wait()  # so that a save under way is counted
    saved = checkpoints.latest()
    back = "there is no checkpoint yet" if saved is None else f"the newest checkpoint is of step {saved}"
    raise TrainingError(
        f"gradients were not finite for {skipped} steps in a row, up to step {step} (its rows hold the documents "
        f"{documents}); {back}: lower optimizer.learning_rate, or look at these documents"
    )


@dataclasses.dataclass(frozen=True)
class Flags:
    """Flags of the command.

    Attributes:
      workdir: folder of the run, or gs://…: checkpoints, metrics.jsonl, tensorboard/; the same again resumes.
      profile: start:stop writes a trace of those steps to profile/ in the workdir, for XProf or TensorBoard.
    """

    workdir: str
    profile: str = ""


def main(config: ExperimentConfig, command: Flags) -> None:
    """Runs the command line."""
    with distributed.joined(), Termination() as termination:
        workdir, traced = bucket.path(command.workdir), span(command.profile)

        def log(line: str) -> None:
            if distributed.is_first():
                print(line, flush=True)

        state = train(config, workdir, log, termination, traced)
        log(f"trained {int(state.step)} steps ({int(state.skipped)} skipped); checkpoint in {workdir / 'checkpoints'}")


if __name__ == "__main__":
    cli.run(main, Flags, usage=__doc__, complete=trained.inherit)
