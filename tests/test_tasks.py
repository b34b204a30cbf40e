"""Tasks: splits by document, the same everywhere; bad documents counted or refused in one line."""

import gzip
import json
import logging
import os

import pytest

from fot import config as config_lib
from fot.config import DataConfig, SourceConfig
from fot.data import cache, files, tasks
from fot.errors import DataError, UserError

LOCAL = ("python_stdlib", "files", "directories", "repositories", "isabelle")  # those that need no network


def config(folder, task="files", files="**/*.txt", **changes):
    values = {"held_out_fraction": 0.3, "cache_dir": f"{folder}/cache"}
    return DataConfig(task=(task,), files=(f"{folder}/{files}",), **{**values, **changes})


def read(values, split):
    [source] = values.sources
    return list(tasks.documents(source, values, split))


def fingerprint(values):
    [source] = values.sources
    return tasks.fingerprint(source, values)


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        path = tmp_path / f"part{i}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"document {i}\r\n\tété\n".encode())
    lines = [json.dumps({"text": f"line {i}"}) for i in range(40)]
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


def error(values, split="train"):
    with pytest.raises(DataError) as caught:
        read(values, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_config_lists_the_tasks():
    assert tuple(tasks.TASKS) + config_lib.GENERATED_TASKS == config_lib.TASKS


@pytest.mark.parametrize("task", LOCAL)
def test_splits_are_disjoint_and_make_up_the_task(task, folder):
    values = config(folder, task)
    splits = [{document.name for document in read(values, split)} for split in tasks.SPLITS]
    everything = tasks.TASKS[task].read(values.sources[0], values, lambda name: True)
    assert not splits[0] & splits[1]
    assert splits[0] | splits[1] == {document.name for document in everything}


@pytest.mark.parametrize("task", LOCAL)
def test_names_are_sorted_unique_and_relative(task, folder):
    names = [document.name for document in read(config(folder, task), "train")]
    assert names == sorted(set(names))
    assert not any(name.startswith("/") for name in names)


def test_lines_are_split_one_by_one(folder):
    values = config(folder, files="*.jsonl.gz")
    held_out = [int(document.name.removeprefix("lines.jsonl.gz:")) for document in read(values, "held_out")]
    assert held_out == [i for i in range(1, 41) if tasks.is_held_out(f"lines.jsonl.gz:{i}", 0.3)]
    assert 0 < len(held_out) < 40
    assert [document.text for document in read(values, "held_out")] == [f"line {i - 1}" for i in held_out]


def test_split_depends_on_the_name_alone(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    folder.rename(other)
    (other / "part0" / "new.txt").write_text("one more")
    before = {name for i in range(40) if tasks.is_held_out(name := f"part{i}/{i}.txt", 0.3)}
    after = {document.name for document in read(config(other), "held_out")}
    assert after - {"part0/new.txt"} == before


def test_split_is_the_same_in_every_version():
    # Those whose `printf NAME | sha256sum` starts below 1999999999999999, a tenth of the range.
    assert [i for i in range(40) if tasks.is_held_out(f"{i}.txt", 0.1)] == [1, 18, 20, 27, 39]


def test_held_out_share_is_about_the_fraction():
    share = sum(tasks.is_held_out(f"{i}.py", 0.05) for i in range(10000)) / 10000
    assert 0.04 < share < 0.06


def test_text_is_kept_to_the_byte(folder):
    for document in read(config(folder), "train"):
        assert document.text.encode() == (folder / document.name).read_bytes()


def test_documents_are_read_one_by_one(folder, monkeypatch):
    values = config(folder)
    opened = []
    real = files._open
    monkeypatch.setattr(files, "_open", lambda path: opened.append(path) or real(path))
    stream = tasks.documents(values.sources[0], values, "train")
    for count in range(1, 4):
        next(stream)
        assert len(opened) == count


def test_standard_library_without_its_tests():
    values = DataConfig()
    names = [document.name for split in tasks.SPLITS for document in read(values, split)]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert len(names) > 500
    assert not any(set(name.split("/")[:-1]) & {"test", "tests", "idlelib", "site-packages"} for name in names)


def train_names(values, count):
    return [document.name for document in read(values, "train")][:count]


def test_bad_documents_are_left_out_and_counted_in_one_warning(folder, caplog):
    values = config(folder)
    names = train_names(values, 3)
    for name in names[:2]:
        (folder / name).write_bytes(b"\xff\xfe\x00")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 100)[:-9])
    values = config(folder, files="**/*.txt*", held_out_fraction=1e-9)
    with caplog.at_level(logging.WARNING):
        found = {document.name for document in read(values, "train")}
        read(values, "train")  # again, as for a tokenizer and for tokens
    assert not found & {*names[:2], "cut.txt.gz"} and names[2] in found
    [record] = caplog.records
    message = record.getMessage()
    first = min(names[:2])
    assert f"2 × invalid UTF-8, first {folder}/{first} (byte 0)" in message
    assert f"1 × truncated archive, first {folder}/cut.txt.gz" in message


def test_bad_documents_of_the_other_split_are_not_counted(folder, caplog):
    values = config(folder)
    (folder / read(values, "held_out")[0].name).write_bytes(b"\xff")
    with caplog.at_level(logging.WARNING):
        read(values, "train")
    assert not caplog.records


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b'{"text": "cut', "broken JSON line"),
        (b"{}", "line without the field"),
        (b'{"text": 3}', "field that isn't text"),
    ],
)
def test_refuse_names_file_line_and_remedy(tmp_path, line, kind):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + line + b"\n")
    values = config(tmp_path, files="*.jsonl", held_out_fraction=1e-9, bad_documents="refuse")
    message = error(values)
    assert message.startswith(f"{kind} {tmp_path}/a.jsonl:2 (")
    assert message.endswith(f": {files.KINDS[kind]}, or set data.bad_documents=skip")


def test_unreadable_file_is_refused_or_skipped(folder, monkeypatch):
    real = tasks.files.find
    gone = files.File("gone.txt", f"{folder}/gone.txt")
    monkeypatch.setattr(tasks.files, "find", lambda pattern: [*real(pattern), gone])
    values = config(folder, held_out_fraction=1e-9)
    assert len(read(values, "train")) == 40
    refusing = config(folder, held_out_fraction=1e-9, bad_documents="refuse")
    assert "gone.txt (No such file or directory): make it readable" in error(refusing)


def test_no_file_matches(tmp_path):
    for split in tasks.SPLITS:
        assert f"data.files='{tmp_path}/**/*.txt' matches no file" in error(config(tmp_path), split)
    with pytest.raises(DataError, match="matches no file"):
        fingerprint(config(tmp_path))


@pytest.mark.parametrize(("split", "fraction"), [("held_out", 1e-9), ("train", 1 - 1e-9)])
def test_empty_split_names_the_fraction(folder, split, fraction):
    message = error(config(folder, held_out_fraction=fraction), split)
    assert "data.held_out_fraction" in message and split in message


def test_a_corpus_of_nothing_but_bad_documents_says_why(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(["broken"] * 20))
    message = error(config(tmp_path, files="*.jsonl", held_out_fraction=1e-9))
    assert f"left out: 20 × broken JSON line, first {tmp_path}/a.jsonl:1" in message


def test_fingerprint_changes_with_files_and_settings(folder):
    values = config(folder)
    prints = [fingerprint(values)]
    assert fingerprint(values) == prints[0]
    prints.append(fingerprint(config(folder, field=("content",))))
    prints.append(fingerprint(config(folder, task="directories")))
    prints.append(fingerprint(config(folder, held_out_fraction=0.4)))
    os.utime(folder / "part0" / "0.txt", ns=(1, 1))
    prints.append(fingerprint(values))
    (folder / "part0" / "0.txt").rename(folder / "part0" / "1.txt")
    prints.append(fingerprint(values))
    assert len(set(prints)) == len(prints)


def test_fingerprint_reads_no_file(folder, monkeypatch):
    monkeypatch.setattr(files, "_open", None)
    for task in LOCAL:
        fingerprint(config(folder, task))


def test_a_source_takes_its_own_settings(tmp_path):
    for name, field in (("a", "text"), ("b", "content")):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({field: name * 3}) for _ in range(30)))
    patterns = tuple(f"{tmp_path}/{name}.jsonl" for name in "ab")
    values = DataConfig(task=("files",), files=patterns, field=("text", "content"), bad_documents="refuse")
    assert values.sources[1] == SourceConfig("files", patterns[1], "content", 1.0, 256)
    for source, text in zip(values.sources, ("aaa", "bbb"), strict=True):
        assert {document.text for document in tasks.documents(source, values, "train")} == {text}


def test_cache_that_cannot_be_written_names_the_field(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="file/x .*set data.cache_dir to"):
        cache.write(tmp_path / "file" / "x", lambda file: None)
