"""Checkpoints: training state, data position and config in one folder a step; only here and in `checksum` is orbax.

`<directory>/<step>/` holds three items: `state` (arrays), `position` (JSON) and `config` (JSON), all with checksums.
orbax writes them into a temporary folder and renames it when every item is there, so a folder named by a number is
complete and an interrupted save leaves nothing that could be taken for a checkpoint.
"""

import asyncio
import contextlib
import functools
import json
import logging
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import absl.logging
import jax
import orbax.checkpoint as ocp
from etils import epath

from fot import bucket, checksum, distributed
from fot.config import ExperimentConfig, TrainConfig, differences, from_dict, to_dict
from fot.errors import CheckpointError, ConfigError, LostError

# What a resumed run may change: fields (or, with a final dot, groups of them) that alter neither what the parameters
# mean nor which batches come next. `train.steps` is here so that a run can be made longer; with the cosine schedule
# that also moves the end of the cosine. A new mesh or remat keeps the mathematics, but not the order of float
# additions: bit-identical resume needs the same ones.
CHANGEABLE = (
    "data.cache_dir",
    "evaluate.",
    "mesh.",
    "model.attention_block",
    "model.attention_kernel",
    "model.attention_exchange",
    "model.remat",
    "model.unroll",
    "train.steps",
    "train.log_every",
    "train.evaluate_every",
    "train.evaluate_batches",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.max_skipped",
    "train.stuck_seconds",
)

# What a failed save raises: asyncio's own error comes from arrays whose writing was given up for another's failure.
FAILURES = (Exception, asyncio.CancelledError)


class Restored(NamedTuple):
    """A restored training state, and the data position that was saved with it."""

    state: Any
    data_position: dict[str, Any]


class Checkpointer:
    """Saves and restores the checkpoints of one run; a context manager.

    Reading never writes, so evaluations may read beside a running training; only one run may save to a directory.
    All processes of a run call every method. `data_position` must be the same on all of them: the first one writes it.
    """

    def __init__(self, directory: str | pathlib.PurePath, config: TrainConfig):
        """Args: directory: where the numbered folders are, made by the first save; config: which are kept."""
        _quieten()
        self._directory = _path(directory)
        self._config = config
        self._manager = None
        self._step = None
        self._unseen = False  # whether the last save has not been seen on disk yet
        self._failure = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # don't hide what ended the run

    def save(self, step: int, state: Any, data_position: dict[str, Any], config: ExperimentConfig) -> None:
        """Starts to save in the background; the arrays are copied before it returns, so they may be donated then.

        Saving the step that was just saved or restored again does nothing.

        Args:
          step: optimizer steps done.
          state: pytree of arrays, with the parameters under the field or key `params`.
          data_position: JSON values (the keys strings) that let the data go on where it was.
          config: the run's config.

        Raises:
          CheckpointError: the save before this one failed, this one can't start, or the step is already there.
          TypeError: `data_position` isn't JSON.
        """
        json.dumps(data_position)  # here, not in the background
        self.wait()
        if step == self._step:
            return
        if step in _steps(self._directory):
            raise CheckpointError(
                f"{self._directory} already has a checkpoint of step {step}: to train on from an earlier step, "
                "delete the later folders or choose another workdir"
            )
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            position=ocp.args.JsonSave(checksum.sealed(data_position)),
            config=ocp.args.JsonSave(checksum.sealed(to_dict(config))),
        )
        self._step, self._unseen = step, True
        try:
            self._manager = self._manager or _open(self._directory, self._config)
            self._manager.save(step, args=items, force=True)
        except FAILURES as error:
            self._fail(error)

    def wait(self) -> None:
        """Waits for the save in progress, if any.

        Raises:
          CheckpointError: it failed. Earlier checkpoints are untouched, but this run can't save any more: orbax's
            threads may be writing still. Another process may go on from the checkpoint before.
        """
        if self._failure is not None:
            raise self._failure
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
            # orbax takes arrays whose writing was given up, for another's failure, for a save that was called off.
            if self._unseen and jax.process_index() == 0 and self._step not in _steps(self._directory):
                raise OSError("its writing was given up")
            self._unseen = False
        except FAILURES as error:
            self._fail(error)

    def check(self) -> None:
        """Raises what `wait` does if the save in progress has failed by now; doesn't wait."""
        if self._manager is None or not self._manager.is_saving_in_progress() or _barriers().failed:
            self.wait()

    def close(self) -> None:
        """Waits for the save in progress and stops orbax's threads; raises what `wait` does, if it hasn't yet."""
        if self._failure is None:
            self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint on disk, None if there is none."""
        return max(_steps(self._directory), default=None)

    def restore(self, step: int | None, abstract_state: Any) -> Restored:
        """Restores a checkpoint, bit for bit, onto whatever devices the abstract state names.

        Args:
          step: which one; None is the newest.
          abstract_state: pytree of `jax.ShapeDtypeStruct`s, each with its sharding, as the state that was saved.

        Raises:
          CheckpointError: there is none, it is damaged, or its arrays differ in name, shape or dtype.
        """
        folder = _folder(self._directory, step)
        _check_arrays(folder, abstract_state, whole=True)
        args = ocp.args.PyTreeRestore(
            abstract_state, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state)
        )
        restored = _read(folder, state=args, position=ocp.args.JsonRestore())
        self._step = int(folder.name)
        return Restored(restored.state, _unsealed(folder, "position", restored.position))

    def restore_params(self, step: int | None, abstract_params: Any) -> Any:
        """Restores the parameters alone, reading nothing else; arguments and errors are those of `restore`."""
        folder = _folder(self._directory, step)
        abstract = {"params": abstract_params}
        _check_arrays(folder, abstract, whole=False)
        args = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        return _read(folder, state=args).state["params"]

    def _fail(self, error: BaseException) -> None:
        """Raises the CheckpointError of a failed save, now and at every later one."""
        reason = error
        while isinstance(reason, LostError) and reason.__context__ is not None:  # heard of after this one's own
            reason = reason.__context__
        self._failure = CheckpointError(
            f"the checkpoint of step {self._step} was not saved to {self._directory} ({_first_line(reason)}): "
            "check free space and permissions there, then run the same command again"
        )
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(*FAILURES):  # the same failure, told by another thread
                manager.close()
        raise self._failure from error


def load_config(directory: str | pathlib.PurePath) -> ExperimentConfig:
    """Returns the config saved with the newest checkpoint.

    A field that fot did not have yet when it was saved gets its default: that of a new field keeps what older runs did.

    Raises:
      CheckpointError: there is no checkpoint, or its config can't be read or is of another version of fot.
    """
    _quieten()
    folder = _folder(_path(directory), None)
    values = _unsealed(folder, "config", _read(folder, config=ocp.args.JsonRestore()).config)
    try:
        return from_dict(filled(values, to_dict(ExperimentConfig())))
    except ConfigError as error:
        raise CheckpointError(f"the config in {folder} is of another version of fot: {error}") from error


def filled(values: Any, defaults: Any) -> Any:
    """Returns `values` with the fields that only `defaults` has, in every group."""
    if not isinstance(values, dict) or not isinstance(defaults, dict):
        return values
    return defaults | {name: filled(value, defaults.get(name)) for name, value in values.items()}


def check_config(saved: ExperimentConfig, current: ExperimentConfig) -> None:
    """Raises CheckpointError, naming the fields, if a run can't go on from a checkpoint with another config."""
    changed = [line for line in differences(saved, current) if not _changeable(line.split(":")[0])]
    if changed:
        raise CheckpointError(
            f"the checkpoint was trained with another config ({'; '.join(changed)}): "
            "restore these fields or choose another workdir"
        )


def _changeable(field: str) -> bool:
    return any(field == name or (name.endswith(".") and field.startswith(name)) for name in CHANGEABLE)


def _quieten() -> None:
    """orbax logs every step, and failures with tracebacks; from here failures come as one CheckpointError."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    # The other arrays of a failed save: whose writing failed too, and whose writing never began.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine 'async_serialize", category=RuntimeWarning)
    if not isinstance(sys.unraisablehook, functools.partial) or sys.unraisablehook.func is not _unraisable:
        sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _unraisable(report: Callable[[Any], object], unraisable: Any) -> None:
    """Reports as before, but for news of the other arrays of a save or restore that has failed, and was told."""
    if not str(unraisable.exc_value).startswith(("Event loop is closed", "Encountered error while reading array")):
        report(unraisable)


def _path(directory: str | pathlib.PurePath) -> epath.Path:
    """Returns the directory as a path; orbax wants absolute ones, those in buckets are; raises UserError."""
    return bucket.absolute(epath.Path(bucket.path(directory)).expanduser())


def _open(directory: epath.Path, config: TrainConfig) -> ocp.CheckpointManager:
    """Opens the directory for writing, sweeping out what interrupted saves have left."""
    keep = [ocp.checkpoint_managers.LatestN(config.keep_last)]
    if config.keep_every > 0:
        keep.append(ocp.checkpoint_managers.EveryNSteps(config.keep_every))
    directory.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(
        create=False,
        multiprocessing_options=_processes(),
        async_options=ocp.options.AsyncOptions(barrier_sync_fn=_barriers() if jax.process_count() > 1 else None),
        cleanup_tmp_directories=True,
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
    )
    handlers = {
        "state": checksum.arrays(_processes()),
        "position": ocp.JsonCheckpointHandler(),
        "config": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def _processes() -> ocp.options.MultiprocessingOptions:
    """Returns who takes part; naming them has orbax wait by JAX's coordinator, in any thread and not for ever.

    Otherwise it waits by a computation of all devices, which comes after those that are under way.
    """
    several = jax.process_count() > 1
    return ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())) if several else None)


@functools.cache
def _barriers() -> distributed.Barriers:
    """Returns what the threads of a save wait by: of one that fails, all hear."""
    return distributed.Barriers("saves")


def _steps(directory: epath.Path) -> list[int]:
    """Returns the steps of the complete checkpoints on disk, ascending; without a directory there are none."""
    with bucket.errors(directory):
        return sorted(ocp.utils.checkpoint_steps(directory))


def _folder(directory: epath.Path, step: int | None) -> epath.Path:
    """Returns the folder of a complete checkpoint, the newest if `step` is None."""
    steps = _steps(directory)
    if not steps:
        raise CheckpointError(f"no complete checkpoint in {directory}: name the folder that holds the numbered ones")
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}: choose from {steps}")
    return directory / str(steps[-1] if step is None else step)


def _read(folder: epath.Path, **items: Any) -> ocp.args.Composite:
    """Reads the named items of a checkpoint."""
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=_processes()) as reader:
            restored = reader.restore(folder, args=ocp.args.Composite(**items))
    except Exception as error:
        raise _damaged(folder, _first_line(error)) from error
    missing = [name for name in items if restored[name] is None]
    if missing:
        raise _damaged(folder, f"{missing[0]} is missing")
    return restored


def _unsealed(folder: epath.Path, item: str, saved: Any) -> Any:
    """Returns the JSON values of an item; raises CheckpointError if they aren't those that were saved."""
    try:
        return checksum.unsealed(saved)
    except ValueError as error:
        raise _damaged(folder, f"{item}: {error}") from error


def _check_arrays(folder: epath.Path, abstract: Any, *, whole: bool) -> None:
    """Compares names, shapes and dtypes with those saved: orbax would cast, or leave unknown names unread, silently.

    Raises:
      ValueError: a leaf without sharding; orbax would put it where it was when saved.
    """
    try:
        saved = _arrays(ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree)
    except Exception as error:
        raise _damaged(folder, _first_line(error)) from error
    wanted = _arrays(abstract)
    if not whole:
        saved = {name: array for name, array in saved.items() if name.startswith("params/")}
    for name, leaf in wanted.items():
        if leaf.sharding is None:
            raise ValueError(f"{name} in the abstract state has no sharding")
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = (_describe(arrays[name]) if name in arrays else "absent" for arrays in (saved, wanted))
        if there != here:
            raise CheckpointError(
                f"{name} is {there} in {folder} but {here} in this model and optimizer: use the config saved with it"
            )


def _arrays(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(array: Any) -> str:
    """Returns dtype and shape as they are on disk, where typed random keys are integers."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.eval_shape(jax.random.key_data, array)
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _damaged(folder: epath.Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} can't be read ({reason}): it is damaged, delete it to go back to the one before"
    )


def _first_line(error: BaseException) -> str:
    """Returns the first reason, which names array or file; what came of it, and tensorstore's whole request, do not."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).partition(" [tensorstore_spec=")[0].strip().splitlines()
    return lines[0] if lines else type(error).__name__
