"""The text of a stream of tokens is that of all of them together."""

import numpy as np
import pytest

from fot import config as config_lib
from fot.data import tokenizer as tokenizers
from fot.data.text_stream import texts

TEXT = "def f(x):\n    return 'ä €😀' # naïve\n" * 2


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return tokenizers.load(config_lib.DataConfig(tokenizer="bytes"), config_lib.ModelConfig())


@pytest.mark.parametrize("start", [0, 1, 9, 12])
def test_pieces_join_to_the_text(bytes_tokenizer, start):
    ids = bytes_tokenizer.encode(TEXT)
    found = list(texts(bytes_tokenizer, ids[:start], iter(ids[start:])))
    assert "".join(found) == TEXT[start:]
    assert "😀" in found and not any("\ufffd" in piece for piece in found)


def test_bytes_that_make_no_character_come_out_at_last(bytes_tokenizer):
    ids = np.frombuffer(b"a\xf0\x9f", np.uint8).astype(np.int32) + tokenizers.BYTE_SPECIALS
    assert "".join(texts(bytes_tokenizer, [], ids)) == bytes_tokenizer.decode(ids)
    many = np.full(9, 0x80 + tokenizers.BYTE_SPECIALS)
    assert "".join(texts(bytes_tokenizer, [], many)) == "\ufffd" * 9


def test_marks_give_no_text(bytes_tokenizer):
    tokenizer = bytes_tokenizer
    ids = [*tokenizer.encode("ab"), tokenizer.eos, *tokenizer.encode("c")]
    assert list(texts(tokenizer, [tokenizer.bos], ids)) == ["a", "b", "", "c", ""]
