"""The tokenizer inside a GGUF file: byte-level BPE as a Hugging Face tokenizer.json, LLaMA's own as tokenizer.model."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# How LLaMA 3 cuts a text into words, before bytes are merged.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _sequence(first: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [first, rest]}


_SPLIT = {"type": "Split", "pattern": {"Regex": _LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
# llama.cpp's name of what happens before BPE -> the pre_tokenizer.
PRETOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTES,
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _BYTES),
    "llama-bpe": _sequence(_SPLIT, {**_BYTES, "use_regex": False}),
}


class Converted(NamedTuple):
    """Files of a tokenizer by name, and lines for the user."""

    files: dict[str, bytes]
    notes: tuple[str, ...]


def convert(fields: Mapping[str, Any]) -> Converted:
    """Returns the tokenizer of a GGUF file's metadata; no files and a note if it is of another kind.

    Control tokens of a tokenizer.json become special ones, which no text is encoded to; it has no post-processor, so
    `fot.data.tokenizer` takes bos and eos by their names.
    """
    kind, words = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    needs = {"gpt2": ("tokens", "token_type", "merges"), "llama": ("tokens", "token_type", "scores")}.get(kind, ("?",))
    complete = all(f"tokenizer.ggml.{name}" in fields for name in needs)
    if kind == "llama" and complete:
        return Converted({"tokenizer.model": _sentencepiece(fields)}, ())
    if not complete or words not in PRETOKENIZERS:
        why = f"tokenizer.ggml.model={kind}, tokenizer.ggml.pre={words}"
        return Converted({}, (f"the tokenizer in the file ({why}) is not converted: name its file by --tokenizer",))
    return _byte_level(fields, words)


def _sentencepiece(fields: Mapping[str, Any]) -> bytes:
    """Returns a SentencePiece model: llama.cpp keeps its pieces, scores and types, which are numbered alike."""
    from sentencepiece import sentencepiece_model_pb2

    get = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}.get
    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(get("tokens"), get("scores"), get("token_type"), strict=True):
        proto.pieces.add(piece=token, score=float(score), type=int(kind))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(proto.pieces)
    trainer.byte_fallback = any(piece.type == piece.BYTE for piece in proto.pieces)
    for name, default in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", -1)):
        number = get("unknown_token_id" if name == "unk" else f"{name}_token_id", default)
        setattr(trainer, f"{name}_id", int(number))
        if number >= 0:
            setattr(trainer, f"{name}_piece", proto.pieces[int(number)].piece)
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(get("add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(get("remove_extra_whitespaces", False))
    normalizer.escape_whitespaces = True
    return proto.SerializeToString()


def _byte_level(fields: Mapping[str, Any], words: str) -> Converted:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRETOKENIZERS[words],
        "post_processor": None,
        "decoder": {**_BYTES, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": words == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]],
        },
    }
    names = {f"{role}_token": fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    about |= {role: tokens[int(number)] for role, number in names.items() if number is not None}
    if "tokenizer.chat_template" in fields:
        about["chat_template"] = fields["tokenizer.chat_template"]
    files = {"tokenizer.json": content, "tokenizer_config.json": about}
    return Converted({name: json.dumps(value, ensure_ascii=False).encode() for name, value in files.items()}, ())
