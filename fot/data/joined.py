"""Files joined into documents: directories, repositories in random order, Isabelle theories in import order."""

import itertools
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from fot.data import cache, files
from fot.data.files import Bad, Document, File

SEPARATOR = "\n"

# Formal comments and cartouches may hold anything, and come before the header.
_ISABELLE_TEXT = re.compile(r"\(\*|\*\)|\\<open>|\\<close>|[‹›]")
_ISABELLE_OPENS = {"(*": "*)", r"\<open>": r"\<close>", "‹": "›"}
_ISABELLE_HEADER = re.compile(
    r'\btheory\s+(?:"[^"]*"|\S+)\s+imports\s+(.*?)\s*\b(?:keywords|abbrevs|begin)\b', re.DOTALL
)


def directories(found: list[File], field: str, wanted: Callable[[str], bool]) -> Iterator[Document | Bad]:
    """Yields a document for each directory: its own files in random order (FoT, section 5, the Python part)."""
    return _join(found, wanted, lambda name: posixpath.dirname(name) or ".", _shuffled)


def repositories(found: list[File], field: str, wanted: Callable[[str], bool]) -> Iterator[Document | Bad]:
    """Yields a document for each top folder: its files, directory by directory in random order (FoT's GitHub set)."""
    return _join(found, wanted, _top, _shuffled)


def isabelle(found: list[File], field: str, wanted: Callable[[str], bool]) -> Iterator[Document | Bad]:
    """Yields a document for each top folder: its theory files, each after those it imports (FoT's Isabelle set)."""
    return _join(found, wanted, _top, _by_imports)


def import_order(imports: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the keys of `imports`, each after those it imports; of a cycle, the first key comes last.

    Where imports leave the choice, keys keep their order.
    """
    order, seen = [], set()
    stack = [(name, False) for name in reversed(imports)]
    while stack:
        name, ready = stack.pop()
        if ready:
            order.append(name)
        elif name not in seen:
            seen.add(name)
            stack.append((name, True))
            stack += [(each, False) for each in reversed(imports[name])]
    return order


def theory_imports(text: str) -> list[str]:
    """Returns what the header of an Isabelle theory imports, as written there without quotes."""
    header = _ISABELLE_HEADER.search(_without_comments(text))
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|([^\s"]+)', header[1])] if header else []


Order = Callable[[str, dict[str, str]], list[str]]


def _join(
    found: list[File], wanted: Callable[[str], bool], unit: Callable[[str], str], order: Order
) -> Iterator[Document | Bad]:
    """Yields a document for each unit of files: their texts in the order that `order` gives them.

    Args:
      unit: name of a file -> name of its document.
      order: name of a document, and name -> text of its files -> the names in order.
    """
    ordered = sorted(found, key=lambda file: (unit(file.name), file.name))
    for name, group in itertools.groupby(ordered, key=lambda file: unit(file.name)):
        if wanted(name):
            texts: dict[str, str] = {}
            for file in group:
                text = files.read_text(file)
                if isinstance(text, Bad):
                    yield text
                else:
                    texts[file.name] = text
            if texts:
                yield Document(name, SEPARATOR.join(texts[each] for each in order(name, texts)))


def _top(name: str) -> str:
    return name.partition("/")[0] if "/" in name else "."


def _shuffled(document: str, texts: dict[str, str]) -> list[str]:
    """Returns the files in an order that is random, but for their names: directory by directory."""

    def place(name: str) -> tuple[str, str]:
        return cache.key([document, posixpath.dirname(name)]), cache.key([document, name])

    return sorted(texts, key=place)


def _by_imports(document: str, texts: dict[str, str]) -> list[str]:
    places: dict[str, list[str]] = {}
    for name in texts:
        places.setdefault(pathlib.PurePosixPath(name).stem, []).append(name)
    return import_order(
        {
            name: [file for each in theory_imports(text) if (file := _imported(each, name, places)) is not None]
            for name, text in texts.items()
        }
    )


def _imported(theory: str, by: str, places: dict[str, list[str]]) -> str | None:
    """Returns the file of the theory that the file `by` calls `theory`, or None if it isn't in the document.

    `theory` may be a path from the folder of `by`, or have its session before a dot. Of several files of one name,
    the one on that path is taken, else the first.
    """
    candidates = places.get(theory.rpartition("/")[2].rpartition(".")[2], [])
    here = posixpath.normpath(posixpath.join(posixpath.dirname(by), theory)) + ".thy"
    return here if here in candidates else next(iter(candidates), None)


def _without_comments(text: str) -> str:
    """Returns a theory without its comments and cartouches, which may be nested."""
    kept, start, closers = [], 0, []
    for mark in _ISABELLE_TEXT.finditer(text):
        if not closers and mark[0] in _ISABELLE_OPENS:
            kept.append(text[start : mark.start()])
        if closers and mark[0] == closers[-1]:
            closers.pop()
            start = mark.end()
        elif mark[0] in _ISABELLE_OPENS:
            closers.append(_ISABELLE_OPENS[mark[0]])
    return "".join(kept) + ("" if closers else text[start:])
