"""Documents of seqio tasks: text before tokenization, in order; C4 and PG-19 in the format of TensorFlow Datasets."""

import sys

import pytest

from fot.config import DataConfig
from fot.data import tasks
from fot.data.files import Document
from fot.errors import DataError


def config(task, files="", **changes):
    values = {"held_out_fraction": 0.3, "bad_documents": "refuse"}
    return DataConfig(task=(task,), files=(files,), **{**values, **changes})


def read(values, split="train"):
    [source] = values.sources
    return list(tasks.documents(source, values, split))


def error(values):
    with pytest.raises(DataError) as caught:
        read(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def seqio():
    return pytest.importorskip("seqio", reason="seqio isn't installed (extra seqio)", exc_type=ImportError)


TEXTS = [f"Document {i} é" for i in range(20)]


@pytest.fixture
def registered(seqio):
    """Names a task that upper-cases its texts, tokenizes them, and appends eos, and a mixture of two tasks."""
    import tensorflow as tf

    def examples(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"body": TEXTS, "number": list(range(20))})

    def exclaim(dataset):
        return dataset.map(lambda example: {**example, "body": tf.strings.join([example["body"], "!"])})

    features = {"body": seqio.Feature(seqio.ByteVocabulary())}
    steps = [exclaim, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    for name in ("texts", "others"):
        source = seqio.FunctionDataSource(examples, splits=("train",))
        seqio.TaskRegistry.add(name, source=source, output_features=features, preprocessors=steps)
    seqio.MixtureRegistry.add("both", [("texts", 3.0), ("others", 1.0)])
    yield
    seqio.MixtureRegistry.remove("both")
    seqio.TaskRegistry.remove("texts")
    seqio.TaskRegistry.remove("others")


def test_documents_are_the_texts_before_tokenization(registered):
    values = config("seqio", "texts", field=("body",))
    found = {document for split in tasks.SPLITS for document in read(values, split)}
    assert found == {Document(f"texts:{i}", f"{text}!") for i, text in enumerate(TEXTS, start=1)}


def test_order_and_split_are_fixed(registered):
    values = config("seqio", "texts", field=("body",))
    held_out = [i for i in range(1, 21) if tasks.is_held_out(f"texts:{i}", 0.3)]
    assert [document.name for document in read(values, "held_out")] == [f"texts:{i}" for i in held_out]
    assert read(values, "held_out") == read(values, "held_out")


def test_the_module_that_registers_a_task_is_imported(seqio, tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "import seqio\n"
        f"source = seqio.TextLineDataSource(split_to_filepattern={{'train': '{tmp_path}/lines.txt'}})\n"
        "seqio.TaskRegistry.add('lines', source=source, output_features={}, preprocessors=[\n"
        "    lambda dataset: dataset.map(lambda line: {'text': line})])\n"
    )
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS))
    monkeypatch.syspath_prepend(str(tmp_path))
    values = config("seqio", "my_tasks:lines")
    assert {each.text for split in tasks.SPLITS for each in read(values, split)} == set(TEXTS)
    seqio.TaskRegistry.remove("lines")


def test_a_mixture_is_answered_with_its_tasks_and_weights(registered):
    remedy = "data.task=seqio data.files=others,texts data.weights=1.0,3.0 data.weight_unit=documents"
    assert error(config("seqio", "both")).endswith(remedy)


@pytest.mark.parametrize(
    ("files", "field", "message"),
    [
        ("text", "body", "data.files='text': can't load the seqio task (No Task or Mixture found with name 'text'.)"),
        ("no_such_module:x", "body", "can't load the seqio task (No module named 'no_such_module')"),
        ("texts", "text", "line without the field texts:"),
        ("texts", "number", "field that isn't text texts:"),
    ],
)
def test_errors_are_one_line(registered, files, field, message):
    assert message in error(config("seqio", files, field=(field,)))


def test_without_seqio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqio", None)
    for task in ("seqio", "c4", "pg19"):
        assert "pip install fot[seqio]" in error(config(task, "anything"))


@pytest.mark.parametrize("task", ["c4", "pg19"])
def test_data_sets_in_the_format_of_tensorflow_datasets(seqio, task):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=30):
        values = config(task)
        documents = [each for split in tasks.SPLITS for each in read(values, split)]
        assert read(values) == read(values)
    assert {document.name for document in documents} == {f"fot_{task}:{i}" for i in range(1, 31)}
    assert all(document.text for document in documents)


def test_a_data_set_that_is_not_there_is_one_line(seqio, tmp_path):
    assert "c4" in error(config("c4", str(tmp_path)))
