"""Properties of the token cache: exact, there whole or not at all, found without reading, the same by many workers."""

import dataclasses
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import numpy as np
import psutil
import pytest

from fot.config import DataConfig, ExperimentConfig, ModelConfig
from fot.data import corpus, encode, stored, tasks
from fot.errors import DataError, UserError


@pytest.fixture
def folder(tmp_path):
    """A folder of forty texts of one to forty lines."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02}-é.txt").write_text("naïve line\n" * (i + 1))
    return texts


def config(folder, **changes) -> ExperimentConfig:
    values = {
        "task": ("files",),
        "files": (f"{folder}/*.txt",),
        "held_out_fraction": 0.2,
        "min_document_tokens": (0,),
        "tokenizer": "bytes",
        "cache_dir": f"{folder.parent}/cache",
    }
    return ExperimentConfig(model=ModelConfig(vocab_size=512), data=DataConfig(**{**values, **changes}))


def load(folder, split="train", **changes) -> corpus.Corpus:
    return corpus.load(config(folder, **changes), split).corpus


def cached(folder) -> list[str]:
    cache = folder.parent / "cache"
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def message(error, function, *arguments, **changes) -> str:
    with pytest.raises(error) as caught:
        function(*arguments, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(left: corpus.Corpus, right: corpus.Corpus) -> None:
    assert len(left) == len(right) and left.key == right.key
    for number in range(len(left)):
        assert left.name(number) == right.name(number)
        np.testing.assert_array_equal(left.document(number), right.document(number))


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_documents_are_bos_text_eos(folder, split):
    values = config(folder)
    encoder, documents = corpus.load(values, split)
    texts = list(tasks.documents(values.data.sources[0], values.data, split))
    assert len(documents) == len(texts) > 0
    assert documents.token_count == documents.lengths.sum()
    for number, text in enumerate(texts):
        tokens = documents.document(number)
        assert tokens.dtype == np.int32 and len(tokens) == documents.length(number) == documents.lengths[number]
        assert (tokens[0], tokens[-1]) == (encoder.bos, encoder.eos)
        assert documents.name(number) == text.name and encoder.decode(tokens[1:-1]) == text.text
        np.testing.assert_array_equal(documents.read(number, 3, 9), tokens[3:9])


def test_second_load_reads_no_document(folder, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(tasks, "documents", None)
    assert_same(load(folder), first)
    assert len(cached(folder)) == 1


def test_a_row_reads_from_the_disk_what_it_needs(folder):
    for part in load(folder).parts:
        assert isinstance(part.tokens.base, np.memmap) and part.tokens.dtype == np.uint16
        assert isinstance(part.offsets.base, np.memmap)


CHANGES = [
    dict(held_out_fraction=0.3),
    dict(min_document_tokens=(50,)),
    dict(tokenizer="trained"),
    dict(bad_documents="refuse"),
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_what_changes_the_tokens_is_another_corpus_in_the_cache(folder, changes):
    before, entries = load(folder), cached(folder)
    after = load(folder, **changes)
    assert len([name for name in cached(folder) if name.startswith("corpus")]) == len(entries) + 1
    assert (after.key == before.key) == (changes == dict(bad_documents="refuse"))


def test_a_changed_file_is_tokenized_again(folder):
    before = load(folder)
    name = before.name(0)
    (folder / name).write_text("other text, of another size")
    after = load(folder)
    assert after.key != before.key and after.length(0) == len("other text, of another size") + 2


def test_another_copy_of_the_files_has_the_same_key(folder, tmp_path):
    first = load(folder)
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    for path in (tmp_path / "elsewhere" / "copy").iterdir():
        os.utime(path, (1, 1))
    assert_same(load(tmp_path / "elsewhere" / "copy"), first)
    (folder / first.name(0)).rename(folder / "00-a.txt")
    assert load(folder).key != first.key


def test_several_sources_are_numbered_through(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(20):
        (other / f"{i}.txt").write_text(f"other {i}")
    files = (f"{folder}/*.txt", f"{other}/*.txt")
    both = load(folder, files=files, min_document_tokens=(100, 0))
    alone = [load(folder, min_document_tokens=(100,)), load(folder, files=files[1:])]
    names = [part.source for part in both.parts]
    assert names == ["files_0", "files_1"] and alone[0].parts[0].source == "files"
    assert len(both) == sum(map(len, alone)) and both.firsts == [0, len(alone[0]), len(both)]
    numbers = [(one, i) for one in alone for i in range(len(one))]
    for number, (one, i) in enumerate(numbers):
        assert both.name(number) == one.name(i) and both.length(number) == one.length(i)
        assert alone[both.source(number)] is one
        np.testing.assert_array_equal(both.document(number), one.document(i))
    np.testing.assert_array_equal(both.lengths, np.concatenate([one.lengths for one in alone]))


def test_workers_change_nothing(folder, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_DOCUMENTS", 3)
    changes = dict(tokenizer="trained")  # trained here, then found in the cache by the workers
    expected = load(folder, **changes)
    shutil.rmtree(next((folder.parent / "cache").glob("corpus-*")))
    assert_same(load(folder, workers=2, **changes), expected)


@pytest.mark.parametrize("limit", ["CHUNK_DOCUMENTS", "CHUNK_CHARACTERS"])
def test_documents_are_read_no_faster_than_they_are_tokenized(limit, monkeypatch):
    monkeypatch.setattr(encode, limit, 10)
    read = []

    def documents():
        for i in range(1000):
            read.append(i)
            yield tasks.Document(str(i), "text")

    class Encoder:
        bos, eos = 1, 2

        def encode_batch(self, texts):
            return [np.zeros(3, np.int32)] * len(texts)

    taken = 0
    for chunk in encode.encoded(documents(), Encoder(), ExperimentConfig()):
        taken += len(chunk)
        assert len(read) == taken and len(chunk) <= 10
    assert taken == 1000


def test_short_documents_are_left_out(folder):
    everything = load(folder)
    limit = int(np.median(everything.lengths))
    some = load(folder, min_document_tokens=(limit,))
    kept = [number for number in range(len(everything)) if everything.length(number) >= limit]
    assert 0 < len(kept) < len(everything) and len(some) == len(kept)
    for number, old in enumerate(kept):
        assert some.name(number) == everything.name(old)
        np.testing.assert_array_equal(some.document(number), everything.document(old))


def test_no_document_long_enough_names_the_field_and_leaves_nothing(folder):
    text = message(DataError, load, folder, min_document_tokens=(10**6,))
    assert "data.min_document_tokens=1000000" in text and "longest has" in text
    assert cached(folder) == []


@pytest.mark.parametrize("file", ["tokens", "offsets", "names", "name_offsets", "summary.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_cache_is_named(folder, file, damage):
    load(folder)
    path = next((folder.parent / "cache").glob(f"corpus-*/{file}"))
    path.write_bytes(path.read_bytes()[:-1]) if damage == "cut" else path.unlink()
    assert f"{path.parent} is damaged: delete it" in message(DataError, load, folder)


def test_a_full_disk_is_one_line_and_leaves_nothing(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        text = message(UserError, load, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "data.cache_dir" in text and "too large" in text
    assert cached(folder) == []
    assert len(load(folder)) > 0


def test_a_cache_that_cannot_be_written_is_one_line(folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    text = message(UserError, load, folder, cache_dir=f"{tmp_path}/file/cache")
    assert "file/cache" in text and "data.cache_dir" in text


def test_an_error_while_reading_leaves_nothing(folder, monkeypatch):
    original = tasks.documents

    def failing(*arguments):
        yield from list(original(*arguments))[:5]
        raise DataError("a line is broken")

    monkeypatch.setattr(tasks, "documents", failing)
    assert "a line is broken" in message(DataError, load, folder)
    assert cached(folder) == []


def test_a_worker_that_dies_is_one_line(folder, monkeypatch):
    class Dying:
        def __reduce__(self):
            return os._exit, (1,)

    chunk = [tasks.Document("x", Dying())]
    monkeypatch.setattr(encode, "_chunks", lambda documents: iter([chunk]))
    values = config(folder, workers=2)
    assert "data.workers" in message(DataError, lambda: list(encode.encoded([], None, values)))


ENDLESS = """
import itertools, multiprocessing
from fot.config import DataConfig, ExperimentConfig
from fot.data import encode, tasks
config = ExperimentConfig(data=DataConfig(tokenizer="bytes", workers=2))
documents = (tasks.Document(str(i), "text") for i in itertools.count())
for chunk in encode.encoded(documents, None, config):
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
"""


def test_workers_end_with_a_killed_process():
    root = pathlib.Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_who_comes_second_takes_what_is_there(folder, monkeypatch):
    expected = load(folder)
    there = folder.parent / "cache" / cached(folder)[0]
    (folder.parent / "aside").mkdir()
    there.rename(folder.parent / "aside" / there.name)
    original = stored.write

    def slow(*arguments):
        (folder.parent / "aside" / there.name).rename(there)  # another process is done first
        return original(*arguments)

    monkeypatch.setattr(stored, "write", slow)
    assert_same(load(folder), expected)
    assert cached(folder) == [there.name]


def test_source_names():
    [source] = DataConfig().sources
    sources = [dataclasses.replace(source, task=task) for task in "aba"]
    assert corpus.source_names(sources) == ["a_0", "b", "a_2"]
