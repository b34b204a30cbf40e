"""Documents of seqio tasks: those a user registers, and C4 and PG-19 out of TensorFlow Datasets."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from fot.config import DataConfig, SourceConfig
from fot.data import files
from fot.data.files import Bad, Document
from fot.errors import DataError

C4 = "c4/en:3.1.0"
PG19 = "pg19:0.1.1"
SPLIT = "train"  # of the data set; what is held out is chosen out of it, as for every task

Wanted = Callable[[str], bool]


def read_registered(source: SourceConfig, config: DataConfig, wanted: Wanted) -> Iterator[Document | Bad]:
    """Yields the text in `source.field` of a registered seqio task, `files` being its name or 'module:name'.

    The task's preprocessors up to its tokenization are applied.

    Raises:
      DataError: there is no such task, it is a mixture, or its data set can't be read.
    """
    seqio = _seqio()
    module, _, name = source.files.rpartition(":")
    with _one_line(f"data.files={source.files!r}: can't load the seqio task"):
        if module:
            importlib.import_module(module)
        task = seqio.get_mixture_or_task(name)
    if isinstance(task, seqio.Mixture):
        rates = sorted((each.name, task.get_rate(each)) for each in task.tasks)
        where = ",".join(f"{module}:{each}" if module else each for each, _ in rates)
        weights = ",".join(str(rate) for _, rate in rates)
        raise DataError(
            f"data.files={source.files!r} is a seqio mixture: name its tasks, data.task=seqio data.files={where} "
            f"data.weights={weights} data.weight_unit=documents"
        )
    yield from _read(task, source.field, wanted)


def read_c4(source: SourceConfig, config: DataConfig, wanted: Wanted) -> Iterator[Document | Bad]:
    """Yields the documents of C4 (en); `files` is the data folder of TensorFlow Datasets, "" its default.

    The paper's filter, no document under 2k tokens, is `data.min_document_tokens=2048` (FoT, section 4.2).
    """
    return _read(_tfds_task("c4", C4, source), "text", wanted)


def read_pg19(source: SourceConfig, config: DataConfig, wanted: Wanted) -> Iterator[Document | Bad]:
    """Yields the books of PG-19; `files` is the data folder of TensorFlow Datasets, "" its default."""
    return _read(_tfds_task("pg19", PG19, source), "book_text", wanted)


def origin(source: SourceConfig, config: DataConfig) -> list[str]:
    """Returns the name of the data set; seqio has nothing that tells its content without reading it."""
    return [source.files, SPLIT, C4, PG19]


def _tfds_task(name: str, tfds_name: str, source: SourceConfig) -> Any:
    seqio = _seqio()
    with _one_line(f"data.task={name}: can't find {tfds_name}"):
        data_source = seqio.TfdsDataSource(tfds_name, tfds_data_dir=source.files or None, splits=(SPLIT,))
        return seqio.Task(f"fot_{name}", data_source, output_features={})


def _read(task: Any, field: str, wanted: Wanted) -> Iterator[Document | Bad]:
    """Yields the documents of a task before its tokenization, called '<task>:<number>'."""
    with _one_line(f"can't read the seqio task {task.name!r}"):
        dataset = _untokenized(task).get_dataset(split=SPLIT, shuffle=False, seed=0, try_in_mem_cache=False)
        examples = iter(dataset.as_numpy_iterator())
    number = 0
    while True:
        with _one_line(f"can't read the seqio task {task.name!r} after {number} documents"):
            example = next(examples, None)
        if example is None:
            return
        number += 1
        name = f"{task.name}:{number}"
        if wanted(name):
            yield _document(name, example, field)


def _document(name: str, example: dict[str, Any], field: str) -> Document | Bad:
    if field not in example:
        return files.no_field(name, field, example)
    text = example[field]
    if not isinstance(text, bytes):
        return Bad("field that isn't text", name, f"{field!r} is {type(text).__name__}")
    try:
        return Document(name, text.decode())
    except UnicodeDecodeError as error:
        return Bad("invalid UTF-8", name, f"byte {error.start}")


def _untokenized(task: Any) -> Any:
    """Returns a task that does what `task` does before it tokenizes."""
    seqio = _seqio()
    tokenizers = (seqio.preprocessors.tokenize, seqio.preprocessors.tokenize_and_append_eos)
    kept = []
    for step in task.preprocessors:
        if getattr(step, "func", step) in tokenizers:
            break
        if not isinstance(step, seqio.CacheDatasetPlaceholder):
            kept.append(step)
    return seqio.Task(task.name, task.source, output_features={}, preprocessors=kept)


def _seqio() -> Any:
    try:
        import seqio
        import tensorflow as tf
    except ImportError as error:
        raise DataError(f"seqio can't be imported ({error}): run 'pip install fot[seqio]'") from None
    tf.config.set_visible_devices([], "GPU")  # their memory is JAX's
    return seqio


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns whatever a user's task, TensorFlow or TensorFlow Datasets raises into one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{what} ({reason}): see that seqio reads it") from error
