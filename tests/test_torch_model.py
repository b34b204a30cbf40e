"""The PyTorch model that ships with exports: as the released code, whatever is read in whatever pieces."""

import json
import pathlib
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from fot.convert.torch_model.configuration_longllama import LongLlamaConfig  # noqa: E402
from fot.convert.torch_model.memory_longllama import pieces  # noqa: E402
from fot.convert.torch_model.modeling_longllama import LongLlamaForCausalLM, rotate  # noqa: E402
from tests.longllama import BASE, LLAMA3, MEMORY, SMALL, Plain, close, padded, small, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("without_gradients")
DATA = pathlib.Path(__file__).parent / "data"
CODE = pathlib.Path(__file__).parents[1] / "fot" / "convert" / "torch_model"
LAST = BASE["last_context_length"]


def released(**overrides):
    """The model of the golden files."""
    model = LongLlamaForCausalLM(LongLlamaConfig(**BASE, **overrides)).eval()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in np.load(DATA / "longllama_state_dict.npz").items()})
    return model


# Golden files


def test_forward_is_the_released_code():
    golden, model = np.load(DATA / "longllama_fwd_mem13_n200.npz"), released(**MEMORY)
    outputs = model(torch.from_numpy(golden["input_ids"]))
    close(outputs.logits, golden["logits"])
    check_cache(model, outputs.past_key_values, golden, "pkv_")
    assert (outputs.past_key_values.local_length, outputs.past_key_values.memory_length) == (LAST, 200 - LAST)


def check_cache(model, cache, golden, prefix):
    length, memory = cache.local_length, cache.memory_length
    close(cache.positions, golden[f"{prefix}layer0_local_pos"][:, 0, :, 0], 0)
    cos, sin = model.model.rotary_emb(cache.positions - cache.base, torch.float32)
    for i, layer in enumerate(cache.layers):
        keys, values = layer.local.read(length)
        close(keys, rotate(torch.from_numpy(golden[f"{prefix}layer{i}_local_k"]), cos, sin))
        close(values, golden[f"{prefix}layer{i}_local_v"])
        assert (layer.memory is not None) == (f"{prefix}layer{i}_mem_k" in golden)
        if layer.memory is not None:
            keys, values = layer.memory.read(memory)
            close(keys, golden[f"{prefix}layer{i}_mem_k"])
            close(values, golden[f"{prefix}layer{i}_mem_v"])


def test_decoding_is_the_released_code():
    golden, model = np.load(DATA / "longllama_decode_mem13_n50.npz"), released(**MEMORY)
    prompt = torch.from_numpy(golden["input_ids"])
    outputs = model(prompt)
    close(outputs.logits, golden["prompt_logits"])
    ids, logits, lengths = [], [], []
    for _ in range(80):
        cache = outputs.past_key_values
        lengths.append((cache.local_length, cache.memory_length))
        ids.append(outputs.logits[:, -1].argmax(dim=-1))
        outputs = model(ids[-1][:, None], past_key_values=cache)
        logits.append(outputs.logits[0, -1])
    lengths.append((cache.local_length, cache.memory_length))
    close(torch.stack(logits), golden["step_logits"])
    assert torch.cat(ids).tolist() == golden["greedy_ids"].tolist()
    assert lengths == [tuple(x) for x in golden["layer1_local_and_mem_len"].tolist()]
    check_cache(model, cache, golden, "final_pkv_")
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=80, eos_token_id=None)
    assert generated[0, 50:].tolist() == golden["generate_ids"].tolist()


# Against the plain computation: edge cases the golden files don't hold

MODELS = {
    "memory": {},
    "no memory": {"mem_layers": []},
    "no positions": {"mem_positionals": False},
    "bfloat16 memory": {"mem_dtype": "bfloat16"},
    "grouped": {"num_key_value_heads": 2, "head_dim": 12, "attention_bias": True},
    "llama3": {"rope_parameters": LLAMA3},
}
CALLS = {  # calls one after the other: tokens, and the arguments that aren't the defaults
    "short": [(5, {})],
    "steps past the window": [(10, {}), *[(1, {})] * 20],
    "long": [(53, {}), (1, {})],
    "last context longer than the window": [(45, {"last": 20}), (1, {}), (3, {})],
    "all in the last context": [(30, {"last": 40}), (2, {})],
    "pieces": [(10, {}), (5, {}), (40, {}), (3, {}), (3, {}), (21, {"last": 3})],
    "memory only, then more": [(37, {"use_cache": False}), (20, {"use_cache": False}), (9, {}), (1, {})],
}
PADDING = ("none", "left", "right", "both")


@pytest.mark.parametrize(
    "fields,calls",
    [("memory", calls) for calls in CALLS] + [(fields, "pieces") for fields in MODELS if fields != "memory"],
)
def test_equals_the_plain_computation(fields, calls):
    model = small(**MODELS[fields])
    for side in PADDING:
        plain, cache, seen = Plain(model), None, torch.zeros((3, 0), dtype=torch.long)
        for number, (n, arguments) in enumerate(CALLS[calls]):
            mask = None
            if side != "none":
                seen = torch.cat(
                    [seen, padded(3, n, side) if not number else torch.ones((3, n), dtype=torch.long)], dim=1
                )
                mask = seen
            ids = tokens(3, n, number)
            expected = plain(ids, mask, **arguments)
            translated = {"last_context_length": arguments.get("last"), "use_cache": arguments.get("use_cache")}
            outputs = model(ids, mask, past_key_values=cache, **translated)
            close(outputs.logits, expected, 0.02 if fields == "bfloat16 memory" else 1e-4)  # a bit may round otherwise
            cache = outputs.past_key_values


def test_positions_count_from_the_oldest_local_token():
    model, ids = small(), tokens(2, 40)
    positions = torch.arange(40).expand(2, -1) * 2 // 3 + torch.tensor([[5], [900]])
    close(model(ids, position_ids=positions).logits, Plain(model)(ids, positions=positions))


def test_gradients_flow_through_memory_and_give_the_same_logits():
    model, ids = small(), tokens(2, 40)
    mask = padded(2, 40, "both")
    expected = model(ids, mask, labels=ids)
    with torch.enable_grad():
        outputs = model(ids, mask, labels=ids, use_cache=False)
    close(outputs.logits, expected.logits)
    close(outputs.loss, expected.loss)
    memory = outputs.past_key_values.layers[1].memory
    with torch.enable_grad():
        gradient = torch.autograd.grad(
            outputs.loss, [memory.keys, model.model.layers[1].self_attn.k_proj.weight], allow_unused=True
        )
    assert all(bool(g.isfinite().all()) for g in gradient if g is not None)
    assert gradient[1].abs().max() > 0


# Properties


def test_a_piece_at_once_equals_token_by_token():
    model, ids = small(), tokens(2, 40)
    at_once, one_by_one = (model(ids[:, :34]).past_key_values for _ in range(2))
    logits = model(ids[:, 34:], past_key_values=at_once).logits
    steps = [model(ids[:, i : i + 1], past_key_values=one_by_one).logits for i in range(34, 40)]
    close(logits, torch.cat(steps, dim=1), 1e-5)


@pytest.mark.parametrize("n,pad", [(7, 9), (40, 32), (16, 16)])
def test_padding_changes_nothing(n, pad):
    """On the left, of short inputs or by whole windows, so that windows are cut alike; on the right, of any length."""
    model, ids = small(last_context_length=16), tokens(1, n)
    mask = torch.cat([torch.ones((1, n)), torch.zeros((1, pad))], dim=1)
    right = model(torch.cat([ids, tokens(1, pad, 1)], dim=1), mask, last_context_length=16 + pad).logits
    close(right[:, :n], model(ids).logits, 1e-5)
    left = model(torch.cat([tokens(1, pad, 1), ids], dim=1), mask.flip(1)).logits
    close(left[:, pad:], model(ids).logits, 1e-5)


@pytest.mark.parametrize("fields", ({}, {"num_key_value_heads": 2}, {"rope_parameters": LLAMA3}, {"head_dim": 4}))
def test_without_memory_it_is_llama(fields):
    model, ids = small(mem_layers=[], tie_word_embeddings=True, **fields), tokens(2, 8)
    config = transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": True, **fields})
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict(model.state_dict())
    assert llama.state_dict().keys() == model.state_dict().keys()
    close(model(ids).logits, llama(ids).logits)


@pytest.mark.parametrize("keep", (1, 3, 13, 100))
def test_logits_to_keep(keep):
    model, ids = small(), tokens(2, 40)
    full = model(ids, output_hidden_states=True)
    outputs = model(ids, logits_to_keep=keep)
    close(outputs.logits, full.logits[:, -keep:], 1e-5)
    step = tokens(2, 1, 1)
    after = [model(step, past_key_values=x.past_key_values).logits for x in (full, outputs)]
    close(*after, 1e-5)
    close(model(ids, logits_to_keep=torch.tensor([0, 39])).logits, full.logits[:, [0, 39]], 1e-5)
    assert len(full.hidden_states) == 5 and {x.shape for x in full.hidden_states} == {(2, 40, 32)}
    close(model.lm_head(full.hidden_states[-1]), full.logits)


def test_nothing_is_computed_that_no_result_needs():
    model, ids = small(), tokens(1, 16 * 3 + 8)
    calls = dict.fromkeys((0, 1, 2, 3, "head"), 0)

    def counted(name):
        def count(module, inputs, output):
            calls[name] += output.shape[1]

        return count

    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(counted(i))
    model.lm_head.register_forward_hook(counted("head"))
    model.generate(ids, max_new_tokens=1, eos_token_id=None)
    assert calls == {0: 56, 1: 56, 2: 8, 3: 8, "head": 1}


def test_pieces_that_leave_before_the_next_are_not_kept():
    assert [tuple(x) for x in pieces(50, 8, 16, 0, True)] == [
        (0, 16, False),
        (16, 32, False),
        (32, 42, False),
        (42, 50, True),
    ]
    assert [tuple(x) for x in pieces(27, 8, 16, 3, True)] == [(0, 16, False), (16, 19, True), (19, 27, True)]
    assert [tuple(x) for x in pieces(3, 8, 16, 3, True)] == [(0, 3, True)]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype):
    model, ids = small(initializer_range=0.05), tokens(2, 40)
    expected = model(ids, padded(2, 40, "left")).logits
    model.to(dtype)
    logits = model(ids, padded(2, 40, "left")).logits
    assert logits.dtype == dtype and model.model.rotary_emb.inv_freq.dtype == torch.float32
    close(logits.float(), expected, 0.02)


def test_a_cache_made_in_inference_mode_is_usable_outside():
    model, ids = small(), tokens(1, 40)
    with torch.inference_mode():
        cache = model(ids).past_key_values
    for i in range(12):
        logits = model(ids[:, i : i + 1], past_key_values=cache).logits
    assert logits.isfinite().all()


def test_wrong_arguments_are_named():
    model, ids = small(), tokens(1, 20)
    cache = model(ids).past_key_values
    for arguments, message in (
        ({"last_context_length": 0}, "last_context_length"),
        ({"past_key_values": cache, "use_cache": False}, "use_cache"),
        ({"attention_mask": torch.ones((1, 3))}, "attention_mask"),
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros((1, 1, 32))}, "input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, **arguments)
    for fields, message in (({"mem_layers": [4]}, "mem_layers"), ({"mem_dtype": "int8"}, "mem_dtype")):
        with pytest.raises(ValueError, match=message):
            LongLlamaConfig(**{**SMALL, **fields})


# Files


def test_saved_with_its_code_it_loads_as_remote_code(tmp_path, remote_code):
    model, ids = small(rope_parameters={**LLAMA3, "rope_theta": 1e6}, tie_word_embeddings=True), tokens(2, 40)
    model.config.auto_map = {
        "AutoConfig": "configuration_longllama.LongLlamaConfig",
        "AutoModel": "modeling_longllama.LongLlamaModel",
        "AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM",
    }
    model.save_pretrained(tmp_path / "export")
    for file in CODE.glob("*_longllama.py"):
        shutil.copy(file, tmp_path / "export")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", trust_remote_code=True, local_files_only=True, mem_dtype="float32"
    ).eval()
    assert type(loaded) is not LongLlamaForCausalLM and loaded.config.rope_theta == 1e6
    close(loaded(ids).logits, model(ids).logits, 1e-6)
    generated = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, eos_token_id=None)
    assert generated.shape == (2, 43)
    base = transformers.AutoModel.from_pretrained(tmp_path / "export", trust_remote_code=True, local_files_only=True)
    close(base.eval()(ids).last_hidden_state, model.model(ids).last_hidden_state, 1e-6)


def test_configurations_of_the_released_code_load_and_stay_readable(tmp_path):
    fields = {**BASE, "model_type": "longllama", "mem_layers": [1], "mem_attention_grouping": [4, 2048]}
    fields |= {"rope_theta": 1e6, "rope_scaling": None, "torch_attention": True, "gradient_checkpoint_every_ith": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = LongLlamaConfig.from_pretrained(tmp_path)
    assert config.rope_theta == config.rope_parameters["rope_theta"] == 1e6
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: saved[name] for name in fields if name != "rope_scaling"} == {
        name: value for name, value in fields.items() if name != "rope_scaling"
    }
    assert LongLlamaConfig.from_pretrained(tmp_path / "again", rope_theta=5e5).rope_parameters["rope_theta"] == 5e5


def test_frequencies_in_old_checkpoints_are_ignored():
    model = small()
    state = model.state_dict() | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for i in range(4)}
    model.load_state_dict(state)
