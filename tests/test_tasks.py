import dataclasses
import logging

import pytest

from fot.config import DataConfig
from fot.data import cache, tasks
from fot.errors import DataError, UserError


def config(folder, **changes):
    values = {"task": "files", "files": f"{folder}/**/*.txt", "held_out_fraction": 0.3, "cache_dir": f"{folder}/cache"}
    return DataConfig(**{**values, **changes})


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        path = tmp_path / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"document {i}\r\n\tété\n".encode())
    return tmp_path


def error(function, *arguments):
    with pytest.raises(DataError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_splits_are_disjoint_and_make_up_the_task(task, folder):
    values = config(folder, task=task)
    splits = [{document.name for document in tasks.documents(values, split)} for split in tasks.SPLITS]
    assert not splits[0] & splits[1]
    assert splits[0] | splits[1] == {source.name for source in tasks.TASKS[task](values)}


@pytest.mark.parametrize("task", tasks.TASKS)
def test_names_are_sorted_unique_and_relative(task, folder):
    names = [document.name for document in tasks.documents(config(folder, task=task), "train")]
    assert names == sorted(set(names))
    assert not any(name.startswith("/") for name in names)


def test_split_depends_on_the_name_alone(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    folder.rename(other)
    (other / "part0" / "new.txt").write_text("one more")
    before = {name for i in range(40) if tasks.is_held_out(name := f"part{i % 3}/{i}.txt", 0.3)}
    after = {document.name for document in tasks.documents(config(other), "held_out")}
    assert after - {"part0/new.txt"} == before


def test_split_is_the_same_in_every_version():
    # Those whose `printf NAME | sha256sum` starts below 1999999999999999, a tenth of the range.
    assert [i for i in range(40) if tasks.is_held_out(f"{i}.txt", 0.1)] == [1, 18, 20, 27, 39]


def test_held_out_share_is_about_the_fraction():
    share = sum(tasks.is_held_out(f"{i}.py", 0.05) for i in range(10000)) / 10000
    assert 0.04 < share < 0.06


def test_text_is_kept_to_the_byte(folder):
    for document in tasks.documents(config(folder), "train"):
        assert document.text.encode() == (folder / document.name).read_bytes()


def test_standard_library_without_its_tests():
    names = [source.name for source in tasks.python_stdlib(DataConfig())]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert len(names) > 500
    assert not any(set(name.split("/")[:-1]) & {"test", "tests", "idlelib", "site-packages"} for name in names)


def test_undecodable_files_are_left_out_and_counted(folder, caplog):
    name = next(document.name for document in tasks.documents(config(folder), "train"))
    (folder / name).write_bytes(b"\xff\xfe\x00")
    with caplog.at_level(logging.WARNING):
        assert name not in {document.name for document in tasks.documents(config(folder), "train")}
    assert "1 of " in caplog.text


def test_no_file_matches(tmp_path):
    assert "data.files" in error(tasks.documents, config(tmp_path), "train")


@pytest.mark.parametrize(("split", "fraction"), [("held_out", 1e-9), ("train", 1 - 1e-9)])
def test_empty_split_names_the_fraction(folder, split, fraction):
    message = error(tasks.documents, config(folder, held_out_fraction=fraction), split)
    assert "data.held_out_fraction" in message and split in message


def test_unreadable_file_is_named(folder, monkeypatch):
    gone = tasks.Source("gone.txt", folder / "gone.txt")
    monkeypatch.setitem(tasks.TASKS, "files", lambda _: [gone])
    values = dataclasses.replace(config(folder), held_out_fraction=1e-9)
    assert "gone.txt" in error(tasks.documents, values, "train")


def test_cache_that_cannot_be_written_names_the_field(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="file/x .*: set data.cache_dir to"):
        cache.write(tmp_path / "file" / "x", lambda file: None)
