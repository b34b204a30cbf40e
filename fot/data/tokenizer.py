"""Tokenizers: bytes, a SentencePiece model trained on the run's own documents, or one from a file."""

import hashlib
import heapq
import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fot import bucket
from fot.config import DataConfig, ModelConfig
from fot.data import cache, tasks
from fot.errors import DataError

BYTE_SPECIALS = 3  # unk (also padding), bos, eos: the ids LLaMA tokenizers give them
TRAINING_BYTES = 32_000_000  # of text that SentencePiece is trained on: 12 MB take 3 s
SAMPLED_BYTES = 10 * TRAINING_BYTES  # of text, divided among the sources, that this is drawn from

# The newline is a piece of its own, runs of spaces are pieces: indentation costs one token, no text is changed.
# Coverage below 1 leaves rare characters to the byte pieces, which saves a small vocabulary for merges: 0.995
# instead of SentencePiece's 0.9995 gives 1.5% more bytes a token at 512 pieces.
TRAINING_SETTINGS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 0.995,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "user_defined_symbols": ["\n"],
    "max_sentence_length": 65536,
    "hard_vocab_limit": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "num_threads": 1,
    "minloglevel": 2,
}

# What the beginning and the end of a text are called where a tokenizer.json does not add them itself.
BOS_PIECES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
EOS_PIECES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]")

_SPACE_MARK = "\u2581"  # SentencePiece writes a space so; in a text it would come back as a space


class Tokenizer(NamedTuple):
    """Text to token ids and back.

    Attributes:
      encode_batch: texts -> one int32 array of ids for each, without bos or eos.
      decode: ids -> text; bos, eos and ids from `vocab_size` on give nothing.
      vocab_size: number of ids, at most `model.vocab_size`.
      bos: id before the first token of a document.
      eos: id after the last token of a document.
      key: names this tokenizer in cache keys.
      trained: the SentencePiece model that was trained for the run; empty if its tokenizer is not of its own making.
    """

    encode_batch: Callable[[Sequence[str]], list[np.ndarray]]
    decode: Callable[[Iterable[int]], str]
    vocab_size: int
    bos: int
    eos: int
    key: str
    trained: bytes = b""

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of one text, int32 [tokens], without bos or eos."""
        return self.encode_batch([text])[0]


def load(data: DataConfig, model: ModelConfig) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names, training it first if need be.

    Raises:
      DataError: its vocabulary exceeds `model.vocab_size`, or it can't be read or trained.
    """
    tokenizer = TOKENIZERS[data.tokenizer](data, model)
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"data.tokenizer={data.tokenizer} has {tokenizer.vocab_size} pieces but model.vocab_size="
            f"{model.vocab_size}: set model.vocab_size to {tokenizer.vocab_size} or more"
        )
    return tokenizer


def byte_tokenizer(data: DataConfig, model: ModelConfig) -> Tokenizer:
    """Returns the tokenizer whose token for byte b of the UTF-8 text is b + 3."""

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + BYTE_SPECIALS for text in texts]

    def decode(ids: Iterable[int]) -> str:
        values = (int(i) - BYTE_SPECIALS for i in ids)
        return bytes(value for value in values if 0 <= value < 256).decode("utf-8", "replace")

    return Tokenizer(encode_batch, decode, BYTE_SPECIALS + 256, 1, 2, "bytes")


def file_tokenizer(data: DataConfig, model: ModelConfig) -> Tokenizer:
    """Returns the tokenizer in `tokenizer_file`; how exactly texts come back is for that file to say.

    Raises:
      DataError: the file can't be read, is neither a SentencePiece model nor a Hugging Face tokenizer.json, or has no
        bos or eos.
    """
    path = bucket.path(data.tokenizer_file).expanduser()
    read = _huggingface if path.suffix == ".json" else _sentencepiece
    try:
        return read(path.read_bytes(), f"data.tokenizer_file={path}")
    except OSError as error:
        raise DataError(
            f"can't read data.tokenizer_file={path} ({error.strerror or 'it is not there'}): name a readable file"
        ) from None


def trained_tokenizer(data: DataConfig, model: ModelConfig) -> Tokenizer:
    """Returns a SentencePiece BPE of at most `model.vocab_size` pieces, trained on training documents of all sources.

    Every text comes back exactly, byte pieces standing in for rare characters. It is trained once and then read
    from the cache. Of a corpus above 32 MB a sample is used: of the first 320 MB, in equal parts from the sources,
    the documents whose names have the smallest hashes.

    Raises:
      DataError: `model.vocab_size` is too small for the byte pieces and the frequent characters.
    """
    settings = {**TRAINING_SETTINGS, "vocab_size": model.vocab_size}
    origin = [f"{settings} {TRAINING_BYTES} {SAMPLED_BYTES}"]
    origin += [tasks.fingerprint(source, data) for source in data.sources]
    path = cache.folder(data) / f"tokenizer-{cache.key(origin)}.model"
    if not path.exists():
        proto = _train([document.text for document in _sample(data)], settings)
        cache.write(path, lambda file: file.write(proto))
    proto = path.read_bytes()
    return _sentencepiece(proto, str(path))._replace(trained=proto)


TOKENIZERS: dict[str, Callable[[DataConfig, ModelConfig], Tokenizer]] = {
    "bytes": byte_tokenizer,
    "trained": trained_tokenizer,
    "file": file_tokenizer,
}


def _sample(data: DataConfig) -> list[tasks.Document]:
    """Returns about `TRAINING_BYTES` of training documents, an arbitrary but fixed choice; holds no more at a time."""
    chosen: list[tuple[int, str, tasks.Document, int]] = []  # a heap, the largest hash first
    size = 0
    for source in data.sources:
        read = 0
        for document in tasks.documents(source, data, "train"):
            order = cache.key([document.name])
            length = len(document.text.encode())
            heapq.heappush(chosen, (-int(order, 16), document.name, document, length))
            size, read = size + length, read + length
            while size - chosen[0][-1] >= TRAINING_BYTES:
                size -= heapq.heappop(chosen)[-1]
            if read >= SAMPLED_BYTES / len(data.sources):
                break
    return [document for _, _, document, _ in sorted(chosen, reverse=True)]


def _train(texts: list[str], settings: dict) -> bytes:
    import sentencepiece

    # A tab is SentencePiece's own separator and newlines are given: neither belongs in what merges are learned from.
    lines = (line for text in texts for line in re.split(r"[\n\t]", text) if line)
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=proto, **settings)
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].splitlines()[0]  # what comes before names a C++ line
        raise DataError(
            f"data.tokenizer=trained can't have model.vocab_size={settings['vocab_size']} pieces: raise it or set "
            f"data.tokenizer=bytes ({reason})"
        ) from None
    return proto.getvalue()


def _sentencepiece(proto: bytes, origin: str) -> Tokenizer:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(proto)
    except RuntimeError:
        raise DataError(f"{origin} is not a SentencePiece model: replace or delete it") from None
    if processor.bos_id() < 0 or processor.eos_id() < 0:
        raise DataError(f"{origin} has no bos or no eos piece: train it with both")
    size = processor.vocab_size()
    mark = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
    has_mark = all(processor.is_byte(piece) for piece in mark)

    def encode_marked(text: str) -> list[int]:
        first, *rest = processor.encode(text.split(_SPACE_MARK))
        return first + [piece for part in rest for piece in mark + part]

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        lists = processor.encode(list(texts), num_threads=min(len(texts), os.cpu_count() or 1))
        for i, text in enumerate(texts):
            if has_mark and _SPACE_MARK in text:
                lists[i] = encode_marked(text)
        return [np.asarray(ids, np.int32) for ids in lists]

    def decode(ids: Iterable[int]) -> str:
        return processor.decode([int(i) for i in ids if 0 <= i < size])

    key = hashlib.sha256(proto).hexdigest()[:16]
    return Tokenizer(encode_batch, decode, size, processor.bos_id(), processor.eos_id(), key)


def _huggingface(content: bytes, origin: str) -> Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise DataError(f"{origin} needs the package tokenizers: run 'pip install fot[huggingface]'") from None
    try:
        encoder = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing more precise
        reason = str(error).splitlines()[0]
        raise DataError(f"{origin} is not a Hugging Face tokenizer.json ({reason}): replace it") from None
    encoder.no_truncation()
    encoder.no_padding()
    bos, eos = _boundaries(encoder, origin)
    encoder.encode_special_tokens = True  # in a text, "</s>" is four characters
    size = max(encoder.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(texts: Sequence[str]) -> list[np.ndarray]:
        encodings = encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(ids: Iterable[int]) -> str:
        return encoder.decode([int(i) for i in ids if 0 <= i < size], skip_special_tokens=True)

    return Tokenizer(encode_batch, decode, size, bos, eos, hashlib.sha256(content).hexdigest()[:16])


def _boundaries(encoder: Any, origin: str) -> tuple[int, int]:
    """Returns the ids of bos and eos: those that a Hugging Face tokenizer puts around a text, else by their names."""
    around = encoder.encode("a")
    inside = [i for i, special in enumerate(around.special_tokens_mask) if not special]
    before = around.ids[: inside[0]] if inside else []
    after = around.ids[inside[-1] + 1 :] if inside else []
    named = {token.content: i for i, token in encoder.get_added_tokens_decoder().items()}
    bos = before[:1] + [named[piece] for piece in BOS_PIECES if piece in named]
    eos = after[-1:] + [named[piece] for piece in EOS_PIECES if piece in named]
    if not eos:
        names = ", ".join(EOS_PIECES)
        raise DataError(f"{origin} has no eos token: add one of {names} to its added_tokens, or a post_processor")
    # GPT-2 and its heirs separate texts by one token, <|endoftext|>.
    if not bos and eos[0] != named.get("<|endoftext|>"):
        names = ", ".join(BOS_PIECES)
        raise DataError(f"{origin} has no bos token: add one of {names} to its added_tokens, or a post_processor")
    return (bos or eos)[0], eos[0]
