"""What single tokens of a document look like: their text, or the byte that they stand for."""

from collections.abc import Sequence
from typing import NamedTuple

from fot.data.tokenizer import Tokenizer

_UNKNOWN = "\ufffd"  # what decoders give for bytes that make no character
_LONGEST = 4  # bytes of a character in UTF-8


class Piece(NamedTuple):
    """A token to show.

    Attributes:
      text: the characters that it adds to the text; a name such as <bos> or <0xC3> for one that adds none by itself.
      named: whether it is such a name.
    """

    text: str
    named: bool


def pieces(tokenizer: Tokenizer, ids: Sequence[int], start: int, stop: int) -> list[Piece]:
    """Returns the tokens `start` to `stop` - 1 of a document, as they are in its text.

    A token alone may decode to something else than in its place (decoders strip the first space, bytes of a character
    come in several tokens), so each is what the text grows by.
    """
    first, last = max(start - _LONGEST, 0), min(stop + _LONGEST, len(ids))
    anchor = max(first - 1, 0)  # whose first space may be lost
    found: list[Piece] = []
    before, group = "", []
    for place in range(anchor, last):
        group.append(int(ids[place]))
        text = tokenizer.decode(ids[anchor : place + 1])
        added = text[len(before) :]
        if added.endswith(_UNKNOWN) and len(group) < _LONGEST and place < last - 1:
            continue  # the next token may complete the character
        found += _split(tokenizer, group, added)
        before, group = text, []
    return found[start - anchor : stop - anchor]


def _split(tokenizer: Tokenizer, group: list[int], added: str) -> list[Piece]:
    """Returns the pieces of tokens that together add some text."""
    if len(group) == 1:
        return [Piece(added, False) if added else Piece(_name(tokenizer, group[0]), True)]
    content = added.encode()
    if len(content) == len(group):
        return [Piece(f"<0x{byte:02X}>", True) for byte in content]
    # Bytes that make no character, or a character of the text that looks like one: each token by itself.
    alone = [tokenizer.decode([each]) for each in group]
    return [
        Piece(text, False) if text else Piece(_name(tokenizer, each), True)
        for each, text in zip(group, alone, strict=True)
    ]


def _name(tokenizer: Tokenizer, token: int) -> str:
    names = {tokenizer.eos: "<eos>", tokenizer.bos: "<bos>"}
    return names.get(token, f"<{token}>")
