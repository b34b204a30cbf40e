"""Joined documents: every file once, directories together, imports first, always in the same order."""

import itertools
import random

import pytest

from fot.data import files, joined
from fot.data.files import Bad, Document

NAMES = [f"repo{i}/{folder}{j}.py" for i in range(3) for folder in ("", "x/", "x/y/", "z/") for j in range(6)]


def tree(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return files.find(f"{folder}/**/*")


def read(join, found, wanted=lambda name: True):
    return list(join(found, "", wanted))


@pytest.fixture
def found(tmp_path):
    return tree(tmp_path, {name: name for name in NAMES})


def folder_of(name):
    return name.rpartition("/")[0]


def test_a_directory_is_a_document_of_its_own_files(found):
    documents = read(joined.directories, found)
    assert [document.name for document in documents] == sorted({folder_of(name) for name in NAMES})
    for document in documents:
        parts = document.text.split(joined.SEPARATOR)
        assert sorted(parts) == sorted(name for name in NAMES if folder_of(name) == document.name)


def test_a_repository_is_a_document_that_keeps_directories_together(found):
    documents = read(joined.repositories, found)
    assert [document.name for document in documents] == ["repo0", "repo1", "repo2"]
    for document in documents:
        parts = document.text.split(joined.SEPARATOR)
        assert sorted(parts) == sorted(name for name in NAMES if name.startswith(document.name + "/"))
        runs = [folder for folder, _ in itertools.groupby(parts, key=folder_of)]
        assert len(runs) == len(set(runs)) == 4


@pytest.mark.parametrize("join", [joined.directories, joined.repositories])
def test_the_order_is_random_but_for_the_names(found, join):
    documents = read(join, found)
    shuffled = found[:]
    random.Random(0).shuffle(shuffled)
    assert read(join, shuffled) == documents
    orders = [document.text.split(joined.SEPARATOR) for document in documents]
    assert all(order != sorted(order) for order in orders[:3])
    # Each document has an order of its own.
    relative = zip(documents, orders, strict=True)
    assert len({tuple(part.removeprefix(each.name) for part in order) for each, order in relative}) == len(documents)


@pytest.mark.parametrize("join", [joined.directories, joined.repositories, joined.isabelle])
def test_a_bad_file_is_left_out_of_its_document(tmp_path, join):
    found = tree(tmp_path, {"a/one.py": "one", "a/two.py": "two", "b/three.py": "three"})
    (tmp_path / "a" / "two.py").write_bytes(b"\xff")
    (tmp_path / "b" / "three.py").write_bytes(b"\xff")
    first, document, last = read(join, found)
    assert document == Document("a", "one")
    assert [first, last] == [
        Bad("invalid UTF-8", f"{tmp_path}/{name}", "byte 0") for name in ("a/two.py", "b/three.py")
    ]


@pytest.mark.parametrize("join", [joined.directories, joined.repositories, joined.isabelle])
def test_files_of_documents_that_are_not_wanted_are_not_read(found, join):
    gone = [files.File(file.name, "/no/such/file") if file.name.startswith("repo1") else file for file in found]
    documents = read(join, gone, wanted=lambda name: not name.startswith("repo1"))
    assert documents and all(isinstance(document, Document) for document in documents)


def test_files_without_a_folder_are_one_document(tmp_path):
    found = tree(tmp_path, {"a.py": "a", "b.py": "b"})
    for join in (joined.directories, joined.repositories, joined.isabelle):
        assert [document.name for document in read(join, found)] == ["."]


def test_imports_come_first_in_any_graph_without_cycles():
    generator = random.Random(1)
    names = [str(i) for i in range(60)]
    depth = names[:]
    generator.shuffle(depth)
    imports = {name: generator.sample(depth[: depth.index(name)], min(3, depth.index(name))) for name in names}
    order = joined.import_order(imports)
    assert sorted(order) == sorted(names)
    for name in names:
        assert all(order.index(each) < order.index(name) for each in imports[name])


def test_cycles_and_long_chains_are_ordered_too():
    assert joined.import_order({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["d", "a"]}) == ["c", "b", "a", "d"]
    chain = {str(i): [str(i + 1)] if i < 99_999 else [] for i in range(100_000)}
    assert joined.import_order(chain) == list(reversed(chain))


HEADERS = [
    ("theory A imports Main begin end", ["Main"]),
    (
        'theory A\n  imports Main "HOL-Library.Multiset" "../Base/B"\nbegin',
        ["Main", "HOL-Library.Multiset", "../Base/B"],
    ),
    ('theory "A-1" imports B C\n  keywords "foo" :: thy_decl and "begin"\nbegin', ["B", "C"]),
    ("theory A imports B abbrevs x = y begin", ["B"]),
    ("(* theory X imports Y (* nested *) begin *) theory A imports B (* no C *) D begin", ["B", "D"]),
    (r"section \<open>A theory imports \<open>much\<close> to begin with\<close> theory A imports B begin", ["B"]),
    ("text ‹theory X imports Y begin› theory A imports B begin lemma ‹theory Z imports W begin›", ["B"]),
    ("theory Pure begin", []),
    ("", []),
    ("(* never closed theory A imports B begin", []),
]


@pytest.mark.parametrize(("text", "expected"), HEADERS, ids=range(len(HEADERS)))
def test_headers_of_theories(text, expected):
    assert joined.theory_imports(text) == expected


def test_theories_are_joined_in_import_order(tmp_path):
    texts = {
        "Entry/A.thy": 'theory A imports "Sub/Z" "HOL-Library.Missing" Entry.M begin end',
        "Entry/M.thy": "theory M imports Main begin end",
        "Entry/Z.thy": "theory Z imports A begin end",
        "Entry/Sub/Z.thy": 'theory Z imports "../M" begin end',
        "Other/B.thy": "theory B imports C begin end",
        "Other/C.thy": "theory C imports B begin end",
    }
    entry, other = read(joined.isabelle, tree(tmp_path, texts))
    assert entry == Document("Entry", "\n".join(texts[f"Entry/{name}.thy"] for name in ("M", "Sub/Z", "A", "Z")))
    assert other == Document("Other", "\n".join(texts[f"Other/{name}.thy"] for name in ("C", "B")))


def test_of_theories_with_one_name_the_path_decides(tmp_path):
    texts = {
        "Entry/A.thy": 'theory A imports "Lib/Z" begin end',
        "Entry/Aux/Z.thy": "theory Z imports A begin end",
        "Entry/Lib/Z.thy": "theory Z imports Main begin end",
    }
    [entry] = read(joined.isabelle, tree(tmp_path, texts))
    assert entry.text == "\n".join(texts[f"Entry/{name}.thy"] for name in ("Lib/Z", "A", "Aux/Z"))
