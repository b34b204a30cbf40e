"""What `fot.evaluate.retrieval` found, as text and as one HTML page."""

import html
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fot import files
from fot.data.tokenizer import Tokenizer
from fot.evaluate.pieces import Piece, pieces

HTML_FILE = "retrieval.html"
_REMEDY = "choose a folder that can be written"
_SHOWN = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


class Entry(NamedTuple):
    """A memory token that was retrieved.

    Attributes:
      position: where it is in the document, in tokens.
      score: kNN score, the scaled inner product of its key with the query; the logit of the softmax.
      focus: its weight in the joint softmax of memory and local context (or by the gate), from 0 to 1.
    """

    position: int
    score: float
    focus: float


class Head(NamedTuple):
    """What one head of a memory layer retrieved.

    Attributes:
      layer: the memory layer.
      head: the query head.
      share: weight of the whole memory beside the local context, from 0 to 1.
      entries: by descending score; none while the memory is empty.
    """

    layer: int
    head: int
    share: float
    entries: tuple[Entry, ...]


class Query(NamedTuple):
    """A token whose retrieval is shown.

    Attributes:
      position: where it is in the document, in tokens.
      loss: of predicting the next token with the memory, in nats.
      loss_without: the same without a memory.
      heads: by layer and head.
    """

    position: int
    loss: float
    loss_without: float
    heads: tuple[Head, ...]


class Page(NamedTuple):
    """All that is shown.

    Attributes:
      title: which model read which document.
      reader: entry of `fot.readers.table.READERS`.
      memory: its capacity, in tokens.
      document: the document's tokens.
      queries: tokens whose retrieval is shown.
      surroundings: tokens shown before and after each.
    """

    title: str
    reader: str
    memory: int
    document: np.ndarray
    queries: Sequence[Query]
    surroundings: int


class _Passage(NamedTuple):
    """A token among its neighbours."""

    before: list[Piece]
    token: Piece
    after: list[Piece]


def _passage(page: Page, tokenizer: Tokenizer, position: int) -> _Passage:
    start = max(position - page.surroundings, 0)
    stop = min(position + page.surroundings + 1, len(page.document))
    found = pieces(tokenizer, page.document, start, stop)
    place = position - start
    return _Passage(found[:place], found[place], found[place + 1 :])


def _about(page: Page) -> str:
    return f"reader {page.reader}, memory of {page.memory:,} tokens"


def as_text(page: Page, tokenizer: Tokenizer) -> str:
    """Returns all as text: tokens in question between ⟦ and ⟧, a newline as ⏎ and a tab as ⇥."""

    def line(position: int) -> str:
        before, token, after = _passage(page, tokenizer, position)
        shown = ["".join(piece.text for piece in part).translate(_SHOWN) for part in (before, [token], after)]
        return "{}⟦{}⟧{}".format(*shown)

    parts = [f"{page.title}\n{_about(page)}"]
    for query in page.queries:
        cells = [["layer", "head", "share", "kNN score", "focus", "position", "memory token"]]
        for head in query.heads:
            where = [str(head.layer), str(head.head), f"{head.share:.3f}"]
            for entry in head.entries:
                found = [f"{entry.score:.2f}", f"{entry.focus:.3f}", f"{entry.position:,}", line(entry.position)]
                cells.append([*where, *found])
                where = [""] * 3
            if not head.entries:
                cells.append([*where, "", "", "", "(the memory is empty)"])
        # The last column is of any width.
        table = [a + "  " + row[-1] for a, row in zip(_columns(cells), cells, strict=True)]
        parts.append("\n".join([_headline(query), line(query.position), *table]))
    return "\n\n".join(parts)


def _columns(cells: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in cells), strict=True)]
    for row in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False))


def _headline(query: Query) -> str:
    return (
        f"token {query.position:,}: loss of the next token {query.loss_without:.3f} nats without memory, "
        f"{query.loss:.3f} with ({query.loss - query.loss_without:+.3f})"
    )


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #0f172a; background: #fff; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .4rem; }
p { max-width: 60rem; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #cbd5e1; }
th, td { padding: .15rem .6rem; vertical-align: top; }
td { border-top: 1px solid #e2e8f0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.passage { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.passage span { border-right: 1px dotted #cbd5e1; }
.passage i { color: #94a3b8; font-style: normal; }
.passage mark { background: #fde68a; border-radius: 3px; padding: 0 1px; }
meter { width: 4rem; }
"""

_EXPLANATION = (
    "For each marked token, the memory tokens whose keys have the largest inner products with its query, in every "
    "memory layer and head. Share: weight of the whole memory beside the local context. kNN score: the scaled inner "
    "product. Focus score: the weight in the joint softmax of memory and local context. Dotted lines part the tokens; "
    "⏎ is a newline, ⇥ a tab, and grey names are tokens without text of their own."
)


def as_html(page: Page, tokenizer: Tokenizer) -> str:
    """Returns all as one HTML page that loads nothing and runs nothing."""
    title = html.escape(page.title)
    sections = "".join(_section(page, tokenizer, query) for query in page.queries)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"<p>{html.escape(_about(page))}</p>\n<p>{html.escape(_EXPLANATION)}</p>\n{sections}</body>\n</html>\n"
    )


def _section(page: Page, tokenizer: Tokenizer, query: Query) -> str:
    names = ("layer", "head", "share", "kNN score", "focus score", "position", "memory token")
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = "".join(_rows(page, tokenizer, each) for each in query.heads)
    return (
        f'<section id="token-{query.position}">\n<h2>{html.escape(_headline(query))}</h2>\n'
        f'<div class="passage">{_marked(page, tokenizer, query.position)}</div>\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table>\n</section>\n"
    )


def _rows(page: Page, tokenizer: Tokenizer, head: Head) -> str:
    def number(value: str) -> str:
        return f'<td class="number">{value}</td>'

    where = number(str(head.layer)) + number(str(head.head)) + number(f"{head.share:.3f}")
    if not head.entries:
        return f'<tr>{where}<td colspan="4">the memory is empty</td></tr>\n'
    lines = []
    for entry in head.entries:
        meter = f'<meter min="0" max="1" value="{entry.focus:.4f}"></meter> {entry.focus:.3f}'
        passage = f'<td class="passage">{_marked(page, tokenizer, entry.position)}</td>'
        cells = number(f"{entry.score:.2f}") + number(meter) + number(f"{entry.position:,}") + passage
        lines.append(f"<tr>{where}{cells}</tr>\n")
        where = "<td></td>" * 3
    return "".join(lines)


def _marked(page: Page, tokenizer: Tokenizer, position: int) -> str:
    before, token, after = _passage(page, tokenizer, position)
    return "".join(map(_span, before)) + f"<mark>{_span(token)}</mark>" + "".join(map(_span, after))


def _span(piece: Piece) -> str:
    shown = html.escape(piece.text.translate(_SHOWN))
    return f"<span><i>{shown}</i></span>" if piece.named else f"<span>{shown}</span>"


def save(page: Page, tokenizer: Tokenizer, folder: pathlib.Path) -> pathlib.Path:
    """Writes `retrieval.html` at once; returns its path.

    Raises:
      UserError: it can't be written.
    """
    content = as_html(page, tokenizer).encode("utf-8", "replace")
    files.write(folder / HTML_FILE, lambda file: file.write(content), _REMEDY)
    return folder / HTML_FILE
