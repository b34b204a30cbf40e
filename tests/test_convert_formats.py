"""EasyLM's and llama.cpp's files hold the same model as the Hugging Face folder they were made from."""

import io
import json
import pathlib

import gguf
import jax
import llama_files
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from fot.config import DataConfig, ModelConfig, RopeScalingConfig
from fot.convert import easylm, gguf_file, gguf_tokenizer, huggingface
from fot.data import tokenizer
from fot.errors import ConversionError


@pytest.fixture(scope="module")
def made():
    return llama_files.torch_model("llama")


@pytest.fixture(scope="module")
def reference(made, tmp_path_factory):
    """The parameters, by way of Hugging Face."""
    folder = tmp_path_factory.mktemp("llama")
    made.save_pretrained(folder)
    return llama_files.load(huggingface.open_source(folder, 0))


@pytest.fixture(scope="module")
def easylm_config(tmp_path_factory) -> str:
    """A config in EasyLM's names."""
    values = {name: value for name, value in llama_files.SHAPE.items() if name != "max_position_embeddings"}
    path = tmp_path_factory.mktemp("easylm") / "config.json"
    path.write_text(json.dumps({**values, "max_sequence_length": 24, "mem_layers": [1], "rope_theta": 1e6}))
    return str(path)


@pytest.mark.parametrize("chunk", [0, 100])
@pytest.mark.parametrize("prefix", ["", "params/", "params/params/"])
def test_easylm_is_the_same_model(prefix, chunk, made, reference, easylm_config, tmp_path):
    arrays = {prefix + name: array for name, array in llama_files.easylm_arrays(made).items()}
    if prefix == "params/params/":  # a training state
        moments = {f"opt_state/1/0/mu/params/{name}": np.zeros_like(array) for name, array in arrays.items()}
        arrays = {"step": np.int32(7).reshape(()), **moments, **arrays, "opt_state/1/0/count": np.arange(3)}
    llama_files.save_easylm(tmp_path / "streaming", arrays, chunk)
    source = easylm.open_source(tmp_path / "streaming", easylm_config, 0)
    assert (source.config.model.memory_layers, source.config.model.rope_theta) == ((1,), 1e6)
    assert (source.origin.model_type, source.origin.context) == ("longllama", 24)
    jax.tree.map(np.testing.assert_array_equal, llama_files.load(source), reference)


def test_easylm_in_bfloat16(made, reference, easylm_config, tmp_path):
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in llama_files.easylm_arrays(made).items()}
    llama_files.save_easylm(tmp_path / "streaming", arrays)
    found = llama_files.load(easylm.open_source(tmp_path / "streaming", easylm_config, 0))
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), reference)
    jax.tree.map(np.testing.assert_array_equal, found, rounded)


def test_easylm_without_a_tensor_says_which(made, easylm_config, tmp_path):
    arrays = llama_files.easylm_arrays(made)
    del arrays["transformer/h/2/attention/wk/kernel"]
    llama_files.save_easylm(tmp_path / "streaming", arrays)
    with pytest.raises(ConversionError, match="transformer/h/2/attention/wk/kernel is missing"):
        llama_files.load(easylm.open_source(tmp_path / "streaming", easylm_config, 0))


@pytest.mark.parametrize("damage", ["short", "garbage", "empty", "absent"])
def test_damaged_easylm_is_one_line(damage, made, easylm_config, tmp_path):
    path = tmp_path / "streaming"
    llama_files.save_easylm(path, llama_files.easylm_arrays(made))
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes({"short": content[:-9], "garbage": b"\x82\xa1x" * 40, "empty": b""}[damage])
    with pytest.raises(ConversionError) as caught:
        llama_files.load(easylm.open_source(path, easylm_config, 0))
    assert "\n" not in str(caught.value)


WORDS = ["<|endoftext|>", "<|im_start|>", *(chr(c) for c in range(33, 127))]
WORDS += ["Ġ", "Ċ", "he", "ll", "hell", "Ġhell"]
MERGES = ["h e", "l l", "he ll", "Ġ hell"]


def save_gguf(path: pathlib.Path, made, kind: Type, **changes) -> dict[str, np.ndarray]:
    """Writes the model as llama.cpp's converter does; returns what each quantized tensor stands for."""
    config = made.config
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.pop("pre", "smollm"))
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3] + [1] * (len(WORDS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    for add, value in changes.pop("metadata", {}).items():
        getattr(writer, add)(value)
    stands_for = {}
    for name, rows in {**gguf_arrays(made), **changes}.items():
        stored = kind if rows.ndim == 2 else Type.F32
        data = gguf.quantize(rows, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
        stands_for[name] = gguf.dequantize(data, stored).astype(np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands_for


def gguf_arrays(made) -> dict[str, np.ndarray]:
    state = {name: value.detach().numpy() for name, value in made.state_dict().items()}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    heads = {"q_proj": made.config.num_attention_heads, "k_proj": made.config.num_key_value_heads}
    arrays = {"token_embd.weight": state["model.embed_tokens.weight"], "output_norm.weight": state["model.norm.weight"]}
    if not made.config.tie_word_embeddings:
        arrays["output.weight"] = state["lm_head.weight"]
    for name, value in state.items():
        parts = name.split(".")
        if parts[1] == "layers":
            array = llama_files.interleaved(value, heads.get(parts[-2], 0))
            arrays[f"blk.{parts[2]}.{names[parts[-2]]}.weight"] = array
    return arrays


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1], ids=str)
def test_gguf_is_the_same_model(kind, made, reference, tmp_path):
    stands_for = save_gguf(tmp_path / "x.gguf", made, kind)
    source = gguf_file.open_source(tmp_path / "x.gguf", 0)
    found, model = llama_files.load(source), source.config.model
    assert (model.norm_epsilon, model.rope_theta, model.tied_embeddings) == (1e-5, 1e4, False)
    if kind == Type.F32:
        jax.tree.map(np.testing.assert_array_equal, found, reference)
    np.testing.assert_array_equal(found["head"].T, stands_for["output.weight"])
    query = stands_for["blk.1.attn_q.weight"].reshape(4, 4, 2, 32).swapaxes(1, 2).reshape(4, 8, 32)
    np.testing.assert_array_equal(found["layers"]["attention"]["query"][1], query.transpose(2, 0, 1))


def test_gguf_of_a_tied_model(tmp_path):
    tied = llama_files.torch_model("tied")
    save_gguf(tmp_path / "x.gguf", tied, Type.F32)
    source = gguf_file.open_source(tmp_path / "x.gguf", 0)
    inputs = llama_files.tokens(llama_files.CONTEXT)
    logits = llama_files.our_logits(llama_files.load(source), source.config.model, inputs)
    np.testing.assert_allclose(logits, llama_files.torch_logits(tied, inputs), atol=1e-4, rtol=0)


def llama3_factors(factor: float, theta: float, half: int) -> np.ndarray:
    """What llama.cpp stores, from the definition by wavelengths (LLaMA 3.1)."""
    factors = []
    for i in range(half):
        wavelength = 2 * np.pi * theta ** (i / half)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("metadata", "factors", "scaling"),
    [
        ({}, None, RopeScalingConfig()),
        ({}, np.ones(4, np.float32), RopeScalingConfig()),
        ({}, llama3_factors(8.0, 1e6, 4), RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 8192)),
        (
            {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 2.0},
            None,
            RopeScalingConfig("linear", 2.0),
        ),
    ],
)
def test_gguf_says_how_rope_is_stretched(metadata, factors, scaling, tmp_path):
    extra = {} if factors is None else {"rope_freqs.weight": factors}
    save_gguf(tmp_path / "x.gguf", llama_files.torch_model("code"), Type.F32, metadata=metadata, **extra)
    source = gguf_file.open_source(tmp_path / "x.gguf", 0)
    assert source.config.model.rope_scaling == scaling
    llama_files.load(source)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "falcon"}, "general.architecture='falcon'"),
        ({"metadata": {"add_expert_count": 8}}, "expert_count"),
        ({"metadata": {"add_rope_scaling_type": gguf.RopeScalingType.YARN}}, "rope.scaling.type='yarn'"),
        ({"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}, "rope_freqs.weight"),
    ],
)
def test_gguf_that_is_no_llama_is_refused_by_name(changes, told, made, tmp_path):
    save_gguf(tmp_path / "x.gguf", made, Type.F32, **changes)
    with pytest.raises(ConversionError) as caught:
        gguf_file.open_source(tmp_path / "x.gguf", 0)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"not a GGUF file at all"])
def test_damaged_gguf_is_one_line(content, tmp_path):
    if content is not None:
        (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ConversionError) as caught:
        gguf_file.open_source(tmp_path / "x.gguf", 0)
    assert "\n" not in str(caught.value)


def test_a_gguf_that_is_cut_short_is_one_line(made, tmp_path):
    path = tmp_path / "x.gguf"
    save_gguf(path, made, Type.F32)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(ConversionError, match="cut short"):
        gguf_file.open_source(path, 0)


def test_the_tokenizer_in_a_gguf_encodes_as_it_did(made, tmp_path):
    save_gguf(tmp_path / "x.gguf", made, Type.F32)
    source = gguf_file.open_source(tmp_path / "x.gguf", 0)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(source.tokenizer["tokenizer.json"])
    found = tokenizer.load(DataConfig(tokenizer="file", tokenizer_file=str(path)), ModelConfig(vocab_size=len(WORDS)))
    assert (found.bos, found.eos) == (0, 0)  # texts are separated by <|endoftext|>
    text = "hello hell 1234\n<|im_start|>"
    pieces = [WORDS[i] for i in found.encode(text)]
    assert pieces == ["hell", "o", "Ġhell", "Ġ", "1", "2", "3", "4", "Ċ", *"<|im_start|>"]
    assert found.decode(found.encode(text)) == text
    assert json.loads(source.tokenizer["tokenizer_config.json"])["bos_token"] == "<|im_start|>"
    assert source.notes == ()


def test_a_sentencepiece_tokenizer_in_a_gguf_encodes_as_it_did(made, tmp_path):
    import sentencepiece

    text = [f"the grass is green, number {i}: {i * i} 草" for i in range(200)]
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=proto,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    before = sentencepiece.SentencePieceProcessor(model_proto=proto.getvalue())
    pieces = range(before.vocab_size())
    kinds = [
        2 if before.is_unknown(i) else 3 if before.is_control(i) else 6 if before.is_byte(i) else 1 for i in pieces
    ]
    fields = {"model": "llama", "tokens": [before.id_to_piece(i) for i in pieces], "token_type": kinds}
    fields |= {"scores": [before.get_score(i) for i in pieces], "bos_token_id": 1, "eos_token_id": 2}
    found = gguf_tokenizer.convert({f"tokenizer.ggml.{name}": value for name, value in fields.items()})
    path = tmp_path / "tokenizer.model"
    path.write_bytes(found.files["tokenizer.model"])
    after = tokenizer.load(DataConfig(tokenizer="file", tokenizer_file=str(path)), ModelConfig(vocab_size=400))
    assert (after.bos, after.eos) == (1, 2)
    for sample in (*text[:3], "two  spaces, an é and 草\n"):
        np.testing.assert_array_equal(after.encode(sample), before.encode(sample))


def test_a_tokenizer_of_another_kind_is_noted(made, tmp_path):
    save_gguf(tmp_path / "x.gguf", made, Type.F32, pre="deepseek-llm")
    source = gguf_file.open_source(tmp_path / "x.gguf", 0)
    assert source.tokenizer == {}
    assert "deepseek-llm" in source.notes[0]
