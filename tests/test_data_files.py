"""Reading: the same documents from plain, .gz and .zst; what can't be read is found, named, and costs nothing else."""

import gzip
import json
import os
import random
import zlib

import pytest
import zstandard

from fot.data import files
from fot.data.files import Bad, Document

PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
ROWS = [{"text": f"document {i}\n\té中🎉", "meta": {"source": f"s{i}", "stars": i}} for i in range(20)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PIECE_SIZES = (1, 7, 1 << 20)


def read(path, field="text", wanted=lambda name: True):
    return [each for file in files.find(str(path)) for each in files.read(file, field, wanted)]


def only_bad(path, field="text"):
    [bad] = [each for each in read(path, field) if isinstance(each, Bad)]
    assert bad.kind in files.KINDS
    return bad


@pytest.mark.parametrize("at_once", PIECE_SIZES)
@pytest.mark.parametrize("suffix", PACK)
def test_documents_of_jsonl_are_its_lines(tmp_path, monkeypatch, suffix, at_once):
    monkeypatch.setattr(files, "READ_AT_ONCE", at_once)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](JSONL))
    expected = [Document(f"a.jsonl{suffix}:{i}", row["text"]) for i, row in enumerate(ROWS, start=1)]
    assert read(tmp_path / "*.jsonl*") == expected
    assert read(tmp_path / "*.jsonl*", "meta.source") == [Document(d.name, f"s{i}") for i, d in enumerate(expected)]


@pytest.mark.parametrize("at_once", PIECE_SIZES)
@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("text", ["", "\n", "é\r\n\n", "x" * 100_000], ids=len)
def test_a_text_file_is_one_document_kept_to_the_byte(tmp_path, monkeypatch, suffix, at_once, text):
    monkeypatch.setattr(files, "READ_AT_ONCE", at_once)
    (tmp_path / f"a.md{suffix}").write_bytes(PACK[suffix](text.encode()))
    assert read(tmp_path / "*") == [Document(f"a.md{suffix}", text)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("at_once", PIECE_SIZES)
def test_archives_in_one_file_follow_one_another(tmp_path, monkeypatch, suffix, at_once):
    monkeypatch.setattr(files, "READ_AT_ONCE", at_once)
    lines = JSONL.splitlines(keepends=True)
    content = b"".join(PACK[suffix](part) for part in (b"".join(lines[:7]), b"", b"".join(lines[7:])))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(content)
    assert [each.text for each in read(tmp_path / "*")] == [row["text"] for row in ROWS]


def test_zst_with_a_long_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28)  # zstd --long=28; its own limit is 27
    archive = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(archive.compress(JSONL) + archive.flush())
    assert len(read(tmp_path / "*")) == len(ROWS)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_gives_what_was_whole(tmp_path, suffix):
    noise = random.Random(0)
    rows = [{"text": noise.randbytes(500).hex()} for _ in range(1000)]
    packed = PACK[suffix]("".join(json.dumps(row) + "\n" for row in rows).encode())
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in (1, 5, len(packed) // 2, len(packed) - 1):
        path.write_bytes(packed[:cut])
        *found, last = read(path)
        assert last == Bad("truncated archive", str(path))
        assert [each.text for each in found] == [row["text"] for row in rows[: len(found)]]
    assert len(found) >= 900
    path = tmp_path / f"b.txt{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    assert read(path) == [Bad("truncated archive", str(path))]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_archive_is_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"not packed at all")
    bad = only_bad(path)
    assert bad.kind == "damaged archive" and bad.where == str(path) and "\n" not in bad.reason


def test_a_flipped_bit_in_gz_is_found(tmp_path):
    packed = bytearray(gzip.compress(JSONL))
    packed[-6] ^= 1  # in the checksum
    (tmp_path / "a.txt.gz").write_bytes(packed)
    assert only_bad(tmp_path / "a.txt.gz").kind == "damaged archive"


BAD_LINES = [
    (b'{"text": "cut', "broken JSON line"),
    (b"not json", "broken JSON line"),
    (b"[" * 100_000, "broken JSON line"),
    (b'{"content": "x"}', "line without the field"),
    (b'["text"]', "line without the field"),
    (b'{"text": 3}', "field that isn't text"),
    (b'{"text": null}', "field that isn't text"),
    (b'{"text": {"text": "x"}}', "field that isn't text"),
    (b'{"text": "\xff"}', "invalid UTF-8"),
    (b'{"text": "\\ud83d"}', "invalid UTF-8"),
]


@pytest.mark.parametrize(("line", "kind"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, kind):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n\n  \n{"text": "last"}')
    first, bad, last = read(path)
    assert (first, last) == (Document("a.jsonl:1", "first"), Document("a.jsonl:5", "last"))
    assert bad.kind == kind and bad.where == f"{path}:2" and "\n" not in bad.reason


def test_the_fields_that_a_line_has_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "meta": {}}')
    assert only_bad(tmp_path / "a.jsonl").reason == "no 'text' in 'content', 'meta'"
    assert only_bad(tmp_path / "a.jsonl", "meta.text").reason == "no 'meta.text' in an empty object"


def test_invalid_utf8_names_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    assert only_bad(tmp_path / "a.txt") == Bad("invalid UTF-8", str(tmp_path / "a.txt"), "byte 3")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst"])
def test_an_unreadable_file_is_named(tmp_path, name):
    file = files.File(name, str(tmp_path / name))
    [bad] = files.read(file, "text", lambda name: True)
    assert bad == Bad("unreadable file", file.path, "No such file or directory")


@pytest.mark.parametrize("suffix", PACK)
def test_only_what_is_wanted_is_looked_at(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](b"broken\n" + JSONL))
    (tmp_path / f"b.txt{suffix}").write_bytes(b"\xff")
    found = read(tmp_path / "*", wanted=lambda name: name.endswith(":3"))
    assert found == [Document(f"a.jsonl{suffix}:3", ROWS[1]["text"])]


def test_a_large_archive_is_read_piece_by_piece(tmp_path, monkeypatch):
    """The first document is there before the file was read to its end."""
    read_bytes = 0
    path = tmp_path / "a.jsonl.gz"
    noise = random.Random(0)
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(4000):
            file.write(json.dumps({"text": noise.randbytes(500).hex()}).encode() + b"\n")
    monkeypatch.setattr(files, "READ_AT_ONCE", 1 << 16)
    decompressobj = zlib.decompressobj

    class Counting:
        def __init__(self, wbits):
            self._inner = decompressobj(wbits=wbits)

        def decompress(self, chunk):
            nonlocal read_bytes
            read_bytes += len(chunk)
            return self._inner.decompress(chunk)

        eof = property(lambda self: self._inner.eof)
        unused_data = property(lambda self: self._inner.unused_data)

    monkeypatch.setattr(files.zlib, "decompressobj", Counting)
    [file] = files.find(str(path))
    documents = files.read(file, "text", lambda name: True)
    next(documents)
    assert 0 < read_bytes <= 1 << 16 < path.stat().st_size / 10
    assert sum(1 for _ in documents) == 3999


def test_names_are_relative_to_the_first_wildcard(tmp_path, monkeypatch):
    for name in ("a/x.txt", "a/b/y.txt", "c/z.txt", "a/b/.hidden.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern):
        return [file.name for file in files.find(pattern)]

    assert names(f"{tmp_path}/**/*.txt") == ["a/b/y.txt", "a/x.txt", "c/z.txt"]
    assert names(f"{tmp_path}/a/**") == ["b/y.txt", "x.txt"]
    assert names(f"{tmp_path}/a*/x.txt") == ["a/x.txt"]
    assert names(f"{tmp_path}/[ac]/?.txt") == ["a/x.txt", "c/z.txt"]
    assert names(f"{tmp_path}/a/x.txt") == ["x.txt"]
    assert names(f"{tmp_path}/none/*") == []
    monkeypatch.chdir(tmp_path)
    assert names("./a//**/*.txt") == names("a/**/*.txt") == ["b/y.txt", "x.txt"]
    assert names("*/*.txt") == ["a/x.txt", "c/z.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/a/*.txt") == ["x.txt"]


def test_the_stamp_changes_with_size_and_time(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    [file] = files.find(str(path))
    stamps = {files.stamp(file)}
    assert files.stamp(file) in stamps
    os.utime(path, ns=(2, 2))
    stamps.add(files.stamp(file))
    path.write_text("three")
    os.utime(path, ns=(2, 2))
    stamps.add(files.stamp(file))
    path.unlink()
    stamps.add(files.stamp(file))
    assert len(stamps) == 4


def test_paths_with_a_scheme_go_through_gfile(tmp_path):
    tensorflow = pytest.importorskip("tensorflow", reason="TensorFlow isn't installed (extra seqio)")
    for name in ("a.jsonl", "deep/er/b.jsonl.gz", "deep/c.jsonl"):
        tensorflow.io.gfile.makedirs(f"ram://documents/{name}/..")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PACK[".gz" if name.endswith("gz") else ""](JSONL))
    for pattern in ("**/*.jsonl*", "*.jsonl", "deep/*.jsonl", "*/c.jsonl"):
        assert read(f"file://{tmp_path}/{pattern}") == read(f"{tmp_path}/{pattern}") != []
    [file] = files.find(f"file://{tmp_path}/a.jsonl")
    assert files.stamp(file).startswith(f"a.jsonl:{len(JSONL)}:")
    gone = files.File("gone", f"file://{tmp_path}/gone")
    assert next(files.read(gone, "text", lambda name: True)).kind == "unreadable file"
    assert files.stamp(gone) == "gone:unreadable"
