"""Hugging Face folders: every architecture computes what it does in transformers, or is refused by name."""

import json
import pathlib
import shutil
import struct

import jax
import llama_files
import numpy as np
import pytest

from fot.config import MeshConfig, RopeScalingConfig
from fot.convert import hf_config, huggingface, safetensors_file
from fot.errors import ConversionError

LLAMA = {**llama_files.SHAPE, "model_type": "llama"}


def config_of(**changes) -> tuple:
    values = {name: value for name, value in {**LLAMA, **changes}.items() if value != "absent"}
    return hf_config.read(values, "config.json", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The untied LLaMA with grouped queries, as transformers saves it."""
    path = tmp_path_factory.mktemp("llama")
    llama_files.saved("llama", path)
    return path


@pytest.mark.parametrize("name", llama_files.MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    made = llama_files.saved(name, tmp_path)
    source = huggingface.open_source(tmp_path, 0)
    params = llama_files.load(source)
    inputs = llama_files.tokens(2 * llama_files.CONTEXT)
    theirs = llama_files.torch_logits(made, inputs)
    assert np.std(theirs) > 0.5
    np.testing.assert_allclose(llama_files.our_logits(params, source.config.model, inputs), theirs, atol=1e-4, rtol=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded_bin", "legacy_bin"])
def test_every_form_of_file_gives_the_same_parameters(form, folder, tmp_path):
    made = llama_files.torch_model("llama")
    if form == "sharded":
        made.save_pretrained(tmp_path, max_shard_size="10KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    elif form == "legacy_bin":
        import torch

        made.config.save_pretrained(tmp_path)
        torch.save(made.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        llama_files.save_bin(made, tmp_path, 1 if form == "bin" else 3)
    found = llama_files.load(huggingface.open_source(tmp_path, 0))
    jax.tree.map(np.testing.assert_array_equal, found, llama_files.load(huggingface.open_source(folder, 0)))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_bfloat16_comes_back_exactly(form, tmp_path):
    import torch

    made = llama_files.torch_model("llama").to(torch.bfloat16)
    if form == "bin":
        llama_files.save_bin(made, tmp_path, 1)
    else:
        made.save_pretrained(tmp_path)
    source = huggingface.open_source(tmp_path, 0)
    assert source.origin.dtype == "bfloat16"
    found = llama_files.load(source)["embedding"]
    np.testing.assert_array_equal(found, made.model.embed_tokens.weight.detach().float().numpy())


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_sharded_equals_unsharded(mesh, folder):
    source = huggingface.open_source(folder, 0)
    found = llama_files.load(source, mesh)
    jax.tree.map(np.testing.assert_array_equal, found, llama_files.load(source))
    query = found["layers"]["attention"]["query"]
    assert len(query.sharding.device_set) == 8
    assert not query.sharding.is_fully_replicated


def test_every_wrong_tensor_is_named_in_one_error(folder, tmp_path):
    import safetensors.numpy

    shutil.copytree(folder, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    state = safetensors.numpy.load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    del state["lm_head.weight"]
    state["model.norm.weight"] = np.ones(31, np.float32)
    state["model.layers.0.extra"] = np.ones((2, 3), np.float32)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)  # says what the config says
    safetensors.numpy.save_file(state, path)
    with pytest.raises(ConversionError) as caught:
        llama_files.load(huggingface.open_source(tmp_path / "broken", 0))
    message = str(caught.value)
    assert "\n" not in message
    for told in (
        "model.layers.1.mlp.up_proj.weight is missing",
        "lm_head.weight is missing",
        "model.norm.weight is [31] and not [32]",
        "model.layers.0.extra [2, 3] is too many",
    ):
        assert told in message
    assert "inv_freq" not in message


def test_the_copy_of_a_tied_head_is_ignored(tmp_path):
    made = llama_files.torch_model("tied")
    llama_files.save_bin(made, tmp_path, 1)  # which holds lm_head.weight too
    assert "head" not in llama_files.load(huggingface.open_source(tmp_path, 0))


@pytest.mark.parametrize("damage", ["short", "garbage", "absent", "shard", "dtype"])
def test_damaged_files_are_one_line(damage, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "model.safetensors"
    content = path.read_bytes()
    if damage == "short":
        path.write_bytes(content[:-8])
    elif damage == "garbage":
        path.write_bytes(b"not a header" * 10)
    elif damage == "absent":
        path.unlink()
    elif damage == "dtype":
        length = struct.unpack("<Q", content[:8])[0]
        path.write_bytes(content[:8] + content[8 : 8 + length].replace(b'"F32"', b'"I32"') + content[8 + length :])
    else:
        path.unlink()
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    with pytest.raises(ConversionError) as caught:
        llama_files.load(huggingface.open_source(copy, 0))
    assert "\n" not in str(caught.value)


def test_pickled_code_is_not_run(folder, tmp_path):
    import torch

    shutil.copy(folder / "config.json", tmp_path)
    torch.save({"model.norm.weight": pathlib.Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="no PyTorch weights"):
        llama_files.load(huggingface.open_source(tmp_path, 0))


OLD = {"type": "linear", "factor": 2}
ROPES = [
    ({}, 1e4, RopeScalingConfig()),
    ({"rope_theta": 1e6}, 1e6, RopeScalingConfig()),
    ({"rope_theta": 500000}, 5e5, RopeScalingConfig()),
    ({"rope_theta": 1e6, "rope_scaling": None}, 1e6, RopeScalingConfig()),
    ({"rope_theta": 1e6, "rope_scaling": OLD}, 1e6, RopeScalingConfig(kind="linear", factor=2.0)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, 3e4, RopeScalingConfig()),
    ({"rope_theta": 3e4, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, 3e4, RopeScalingConfig()),
    (
        {"rope_parameters": llama_files.LLAMA3},
        5e5,
        RopeScalingConfig("llama3", 4.0, 1.0, 4.0, llama_files.CONTEXT),
    ),
]


@pytest.mark.parametrize(("changes", "theta", "scaling"), ROPES)
def test_rope_in_old_and_new_form(changes, theta, scaling):
    model, _ = config_of(**changes)
    assert (model.rope_theta, model.rope_scaling) == (theta, scaling)


def test_longllama_keeps_its_memory():
    fields = dict(mem_layers=[2, 1], mem_dtype="float32", last_context_length=24, num_key_value_heads="absent")
    model, origin = config_of(model_type="longllama", **fields)
    assert (model.memory_layers, model.memory_positions) == ((1, 2), "zero")
    assert (origin.mem_dtype, origin.last_context_length, origin.context) == ("float32", 24, llama_files.CONTEXT)
    assert model.kv_heads == model.heads
    assert config_of(model_type="longllama", mem_positionals=False)[0].memory_positions == "none"


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_a_sliding_window_needs_a_context_inside_it(model_type):
    values = {**LLAMA, "model_type": model_type, "sliding_window": 16, "use_sliding_window": True}
    with pytest.raises(ConversionError, match="sliding_window=16: .* give --context=16"):
        hf_config.read(values, "config.json", 0)
    assert hf_config.read(values, "config.json", 16)[1].context == 16
    assert hf_config.read({**values, "sliding_window": None}, "config.json", 0)[1].context == llama_files.CONTEXT


def test_qwen2_uses_its_window_only_if_it_says_so():
    config_of(model_type="qwen2", sliding_window=16, use_sliding_window=False)


REFUSED = [
    ({"model_type": "gemma"}, "model_type='gemma'"),
    ({"model_type": "absent"}, "model_type is missing"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "absent"}, "hidden_size is missing"),
    ({"hidden_size": "32"}, "hidden_size='32' must be of type int"),
    ({"rms_norm_eps": "absent"}, "rms_norm_eps is missing"),
    ({"num_key_value_heads": 3}, "kv_heads=3"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling: rope_type='yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type='dynamic'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling: the field factor is missing"),
    ({"rope_scaling": {**OLD, "attention_factor": 1.2}}, "attention_factor=1.2"),
    ({"rope_scaling": OLD, "rope_parameters": {"rope_type": "default"}}, "don't say the same"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "must be equal"),
    ({"rope_theta": None}, "rope_theta is missing"),
    ({"model_type": "longllama", "mem_layers": [3]}, "layer 3 does not exist"),
    ({"model_type": "longllama", "mem_layers": ["1"]}, "mem_layers=['1']"),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED)
def test_what_is_not_llama_is_refused_by_name(changes, told):
    with pytest.raises(ConversionError, match="config.json") as caught:
        config_of(**changes)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", safetensors_file.DTYPES)
def test_safetensors_are_those_of_the_library(dtype, tmp_path):
    import safetensors.numpy

    kind = safetensors_file.DTYPES[dtype]
    arrays = {"a": np.arange(12).reshape(3, 4).astype(kind), "b": np.ones(3, kind), "c": np.ones((0, 2), kind)}
    sources = [safetensors_file.Source(name, each.shape, lambda each=each: each) for name, each in arrays.items()]
    with open(tmp_path / "ours", "wb") as file:
        safetensors_file.write(file, sources, kind)
    if dtype != "BF16":  # which the library's NumPy side leaves to others
        for name, array in safetensors.numpy.load_file(tmp_path / "ours").items():
            np.testing.assert_array_equal(array, arrays[name])
    for name, stored in safetensors_file.index(tmp_path / "ours").items():
        np.testing.assert_array_equal(safetensors_file.read(tmp_path / "ours", stored), arrays[name])
