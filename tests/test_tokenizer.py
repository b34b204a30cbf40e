import argparse
import encodings.cp437
import inspect

import numpy as np
import pytest
import tokenizers

from fot.config import DataConfig, ExperimentConfig, ModelConfig
from fot.data import cache, tasks, tokenizer
from fot.errors import DataError

HARD_TEXTS = [
    "",
    " ",
    "\n",
    "\n\n\r\n\t\t  \n",
    "    indented\n        more\n",
    "naïve 中文 🎉 \u2028 \ufeff",
    "a\u2581b \u2581\u2581",
    "<s> </s> <unk> <0x0A>",
    "\x00\x7f",
]


def config(folder, vocab_size=320, **changes):
    values = {"task": ("files",), "files": (f"{folder}/*.txt",), "min_document_tokens": (20,)}
    data = DataConfig(**{**values, "held_out_fraction": 0.2, "cache_dir": f"{folder}/cache", **changes})
    return ExperimentConfig(model=ModelConfig(vocab_size=vocab_size), data=data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    lines = inspect.getsource(argparse).splitlines(keepends=True)
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(lines[i * 50 : i * 50 + 50]))
    values = config(folder)
    tokenizer.load(values.data, values.model)
    next(folder.glob("cache/*.model")).rename(folder / "saved.model")
    return folder


def huggingface(post_processor=None, special_tokens=("<unk>", "<s>", "</s>")):
    """Returns a small Hugging Face tokenizer, byte-level BPE, as GPT-2 and LLaMA 3 have it."""
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE())
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    encoder.train_from_iterator([inspect.getsource(argparse)], trainer)
    if post_processor is not None:
        encoder.post_processor = post_processor
    return encoder


def template(single, *names):
    numbered = [(name, i) for i, name in enumerate(("<unk>", "<s>", "</s>")) if name in names]
    return tokenizers.processors.TemplateProcessing(single=single, special_tokens=numbered)


@pytest.fixture(params=["bytes", "trained", "saved.model", "tokenizer.json"])
def any_tokenizer(request, folder):
    huggingface().save(f"{folder}/tokenizer.json")
    kind = request.param if request.param in tokenizer.TOKENIZERS else "file"
    values = config(folder, tokenizer=kind, tokenizer_file=f"{folder}/{request.param}")
    return tokenizer.load(values.data, values.model)


def error(function, *arguments):
    with pytest.raises(DataError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip_of_hard_texts(any_tokenizer, text):
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


def test_round_trip_of_real_code(any_tokenizer):
    for module in (argparse, encodings.cp437):
        text = inspect.getsource(module)
        assert any_tokenizer.decode(any_tokenizer.encode(text)) == text
    assert not encodings.cp437.decoding_table.isascii()


def test_ids_are_int32_in_the_vocabulary_without_specials(any_tokenizer):
    for ids in any_tokenizer.encode_batch([*HARD_TEXTS, inspect.getsource(argparse)]):
        assert ids.dtype == np.int32
        assert not np.isin(ids, [0, any_tokenizer.bos, any_tokenizer.eos]).any()
        assert ids.size == 0 or ids.max() < any_tokenizer.vocab_size


def test_batch_equals_one_by_one(any_tokenizer):
    for text, ids in zip(HARD_TEXTS, any_tokenizer.encode_batch(HARD_TEXTS), strict=True):
        np.testing.assert_array_equal(ids, any_tokenizer.encode(text))


def test_specials_and_unknown_ids_decode_to_nothing(any_tokenizer):
    ids = [any_tokenizer.bos, *any_tokenizer.encode("x = 1"), any_tokenizer.eos, any_tokenizer.vocab_size]
    assert any_tokenizer.decode(np.array(ids)) == "x = 1"


def test_trained_is_deterministic_and_cached(folder, tmp_path, monkeypatch):
    values = config(folder, cache_dir=str(tmp_path))
    trained = tokenizer.load(values.data, values.model)
    assert trained.vocab_size == values.model.vocab_size
    assert next(tmp_path.glob("*.model")).read_bytes() == (folder / "saved.model").read_bytes()
    monkeypatch.setattr(tokenizer, "_train", None)
    assert tokenizer.load(values.data, values.model).key == trained.key


def test_trained_sees_no_held_out_document(folder, tmp_path):
    values = config(folder, cache_dir=str(tmp_path))
    names = {path.name for path in folder.glob("*.txt") if tasks.is_held_out(path.name, 0.2)}
    old = {name: (folder / name).read_text() for name in names}
    for name in names:
        (folder / name).write_text("entirely different " * 50)
    tokenizer.load(values.data, values.model)
    for name, text in old.items():
        (folder / name).write_text(text)
    assert names and next(tmp_path.glob("*.model")).read_bytes() == (folder / "saved.model").read_bytes()


def test_trained_newline_and_indentation_cost_one_token_each(folder):
    values = config(folder)
    trained = tokenizer.load(values.data, values.model)
    assert len(trained.encode("\n\n\n")) == 3
    assert len(trained.encode("        ")) == 1


def test_trained_merges_text_indented_with_tabs(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("def function():\n\treturn function\n" * 10)
    values = config(tmp_path, vocab_size=512)
    assert len(tokenizer.load(values.data, values.model).encode("\treturn function")) <= 3


def test_vocabulary_above_the_model_names_both_fields(folder):
    huggingface().save(f"{folder}/tokenizer.json")
    for kind, file in (("bytes", ""), ("file", "saved.model"), ("file", "tokenizer.json")):
        values = config(folder, vocab_size=258, tokenizer=kind, tokenizer_file=f"{folder}/{file}")
        message = error(tokenizer.load, values.data, values.model)
        assert "data.tokenizer" in message and "model.vocab_size" in message


def test_vocabulary_too_small_to_train(folder):
    values = config(folder, vocab_size=200)
    assert "model.vocab_size=200" in error(tokenizer.load, values.data, values.model)


@pytest.mark.parametrize("name", ["missing.model", "0.txt", "empty", "missing.json", "empty.json", "other.json"])
def test_file_that_is_no_tokenizer_is_named(folder, name):
    (folder / "empty").touch()
    (folder / "empty.json").touch()
    (folder / "other.json").write_text('{"version": "1.0"}')
    values = config(folder, tokenizer="file", tokenizer_file=f"{folder}/{name}")
    assert name in error(tokenizer.load, values.data, values.model)


GPT2 = ("<|endoftext|>",)
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>")


@pytest.mark.parametrize(
    ("post_processor", "special_tokens", "expected"),
    [
        (None, ("<unk>", "<s>", "</s>"), ("<s>", "</s>")),
        (None, LLAMA3, LLAMA3),
        (None, GPT2, ("<|endoftext|>", "<|endoftext|>")),
        (None, ("</s>", "<bos>", "<eos>"), ("<bos>", "</s>")),
        (template("</s> $A <s>", "<s>", "</s>"), ("<unk>", "<s>", "</s>"), ("</s>", "<s>")),
        (template("<unk> $A", "<unk>"), ("<unk>", "<s>", "</s>"), ("<unk>", "</s>")),
    ],
)
def test_huggingface_bos_and_eos(tmp_path, post_processor, special_tokens, expected):
    encoder = huggingface(post_processor, special_tokens)
    encoder.enable_truncation(4)
    encoder.enable_padding(length=64)
    encoder.save(f"{tmp_path}/tokenizer.json")
    values = config(tmp_path, tokenizer="file", tokenizer_file=f"{tmp_path}/tokenizer.json")
    loaded = tokenizer.load(values.data, values.model)
    assert (loaded.bos, loaded.eos) == tuple(encoder.token_to_id(piece) for piece in expected)
    text = inspect.getsource(argparse)[:1000] + "".join(special_tokens)
    assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize(("special_tokens", "missing"), [(("<s>",), "eos"), (("</s>",), "bos"), ((), "eos")])
def test_huggingface_without_bos_or_eos_is_an_error(tmp_path, special_tokens, missing):
    huggingface(special_tokens=special_tokens).save(f"{tmp_path}/tokenizer.json")
    values = config(tmp_path, tokenizer="file", tokenizer_file=f"{tmp_path}/tokenizer.json")
    assert f"tokenizer.json has no {missing} token: add one of" in error(tokenizer.load, values.data, values.model)


def test_trained_sees_documents_of_all_sources(tmp_path):
    for folder, word in (("a", "wintertime"), ("b", "summertime")):
        (tmp_path / folder).mkdir()
        for i in range(10):
            (tmp_path / folder / f"{i}.txt").write_text(f"{word} " * 50)
    patterns = (f"{tmp_path}/a/*.txt", f"{tmp_path}/b/*.txt")
    values = config(tmp_path, files=patterns, vocab_size=400)
    trained = tokenizer.load(values.data, values.model)
    assert all(len(trained.encode(f"{word} " * 8)) <= 16 for word in ("wintertime", "summertime"))


def test_training_sample_keeps_the_smallest_hashes(folder, monkeypatch):
    values = config(folder).data
    every = sorted(tasks.documents(values.sources[0], values, "train"), key=lambda document: cache.key([document.name]))
    monkeypatch.setattr(tokenizer, "TRAINING_BYTES", sum(len(document.text.encode()) for document in every[:3]))
    monkeypatch.setattr(tokenizer, "SAMPLED_BYTES", 10**9)
    assert tokenizer._sample(values) == every[:3]
