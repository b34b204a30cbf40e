"""Text of tokens that come one after the other."""

from collections.abc import Iterable, Iterator, Sequence

from fot.data.tokenizer import Tokenizer

_UNKNOWN = "\ufffd"  # what decoders give for bytes that make no character
_LONGEST = 4  # bytes of a character in UTF-8, each of which may be a token


def texts(tokenizer: Tokenizer, before: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yields what the text grows by, token by token; of a character in several tokens, nothing until it is whole.

    Args:
      tokenizer: their tokenizer.
      before: the tokens that they follow, whose text is not given; decoders strip the first space of a text.
      tokens: the tokens, which may be without end.
    """
    held = [int(token) for token in before[-_LONGEST:]]
    shown, waiting = len(tokenizer.decode(held)), 0
    for token in tokens:
        held.append(int(token))
        text = tokenizer.decode(held)
        if text.endswith(_UNKNOWN) and waiting < _LONGEST - 1:
            waiting += 1
            continue
        yield text[shown:]
        held = held[-_LONGEST:]
        shown, waiting = len(tokenizer.decode(held)), 0
    yield tokenizer.decode(held)[shown:]
