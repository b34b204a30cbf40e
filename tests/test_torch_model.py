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

DATA = pathlib.Path(__file__).parent / "data"
CODE = pathlib.Path(__file__).parents[1] / "fot" / "convert" / "torch_model"
BASE = json.loads((DATA / "longllama_base_config.json").read_text())
WINDOW, LAST = BASE["max_position_embeddings"], BASE["last_context_length"]
MEMORY = {"mem_layers": [1, 3], "mem_dtype": "float32"}
SMALL = {**BASE, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16, "last_context_length": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


@pytest.fixture(autouse=True)
def without_gradients():
    """And with one thread: models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def released(**overrides):
    """The model of the golden files."""
    model = LongLlamaForCausalLM(LongLlamaConfig(**BASE, **overrides)).eval()
    model.load_state_dict({name: torch.from_numpy(x) for name, x in np.load(DATA / "longllama_state_dict.npz").items()})
    return model


def small(**overrides):
    """A model of random parameters, large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    fields = {**SMALL, **MEMORY, "mem_layers": [1, 2], "initializer_range": 0.3}
    return LongLlamaForCausalLM(LongLlamaConfig(**(fields | overrides))).eval()


def tokens(rows, n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(3, BASE["vocab_size"], (rows, n)))


def close(left, right, tolerance=1e-4):
    torch.testing.assert_close(torch.as_tensor(left), torch.as_tensor(right), rtol=0, atol=tolerance)


class Plain:
    """What the released code computes, in the plainest way: every key concatenated, every mask written out."""

    def __init__(self, model):
        self.model, self.config = model.model, model.config
        self.head = model.lm_head
        self.local, self.memory = None, [None] * self.config.num_hidden_layers  # k, v, positions; k, v, mask

    def __call__(self, ids, mask=None, positions=None, use_cache=True, last=None):
        rows, n = ids.shape
        last, window = last or self.config.last_context_length, self.config.max_position_embeddings
        cached = 0 if self.local is None else self.local[0][0].shape[2]
        if positions is None:
            first = 0 if self.local is None else self.local[0][2].max(dim=1, keepdim=True).values + 1
            positions = (torch.arange(n) + first).expand(rows, -1)
        mask = torch.ones((rows, cached + n)) if mask is None else mask[:, -(cached + n) :]
        prefix, outputs = max(n - last, 0), []
        bounds = [(i, min(prefix, i + window), self.local is not None) for i in range(0, prefix, window)]
        for begin, end, keep in [*bounds, (prefix, n, use_cache)]:
            held = 0 if self.local is None else self.local[0][0].shape[2]
            part = mask[:, cached + begin - held : cached + end].bool()
            outputs.append(self.window(ids[:, begin:end], part, positions[:, begin:end], keep))
        return self.head(torch.cat(outputs, dim=1))

    def window(self, ids, mask, positions, keep):
        x, caches = self.model.embed_tokens(ids), []
        for i, layer in enumerate(self.model.layers):
            past = None if self.local is None else self.local[i]
            out, cache = self.attention(i, layer.self_attn, layer.input_layernorm(x), mask, positions, past, keep)
            caches.append(cache)
            x = x + layer.self_attn.o_proj(out)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        self.local = caches if keep else None
        return self.model.norm(x)

    def attention(self, i, layer, x, mask, positions, past, keep):
        heads, T = self.config.num_attention_heads, x.shape[1]
        q, k, v = (
            f(x).unflatten(2, (-1, layer.head_dim)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        queries, has_memory, moved = positions, i in self.config.mem_layers, None
        rotates = self.config.mem_positionals or not has_memory
        if past is not None:
            held = past[0].shape[2]
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            positions = torch.cat([past[2], positions], dim=1)
            if k.shape[2] > self.config.max_position_embeddings:
                if has_memory:
                    self.remember(i, k[:, :, :held], v[:, :, :held], mask[:, :held])
                k, v, positions, mask = k[:, :, held:], v[:, :, held:], positions[:, held:], mask[:, held:]
        elif has_memory and not keep:
            moved = k, v, mask
        cache, S = (k, v, positions), k.shape[2]
        if rotates:
            oldest = positions.min(dim=1, keepdim=True).values
            q = rotate(q, *self.model.rotary_emb(queries - oldest, q.dtype))
            k = rotate(k, *self.model.rotary_emb(positions - oldest, k.dtype))
        visible = torch.ones((T, S), dtype=torch.bool).tril(S - T) & mask[:, None, :]
        if self.memory[i] is not None:
            memory_k, memory_v, memory_mask = self.memory[i]
            k, v = torch.cat([k, memory_k.to(k.dtype)], dim=2), torch.cat([v, memory_v.to(v.dtype)], dim=2)
            visible = torch.cat([visible, memory_mask[:, None, :].expand(-1, T, -1)], dim=2)
        k, v = (y.repeat_interleave(heads // y.shape[1], dim=1) for y in (k, v))
        logits = (q @ k.transpose(2, 3) / layer.head_dim**0.5).masked_fill(~visible[:, None], -1e6)
        if moved is not None:
            self.remember(i, *moved)
        return (logits.softmax(dim=3) @ v).transpose(1, 2).flatten(2), cache

    def remember(self, i, k, v, mask):
        dtype = getattr(torch, self.config.mem_dtype)
        new = k.to(dtype), v.to(dtype), mask
        if self.memory[i] is not None:
            new = tuple(
                torch.cat([x, y], dim=-1 if x.dim() == 2 else 2) for x, y in zip(self.memory[i], new, strict=True)
            )
        self.memory[i] = new


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


def padded(rows, n, side):
    mask = torch.ones((rows, n), dtype=torch.long)
    if side in ("left", "both"):
        mask[0, : min(n - 1, 19)], mask[1, : n // 3] = 0, 0
    if side in ("right", "both"):
        mask[-1, -(n // 3) or n :] = 0
    return mask


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


def test_generation_of_padded_rows_equals_manual_steps_and_single_rows():
    model, ids, mask = small(), tokens(3, 12), torch.ones((3, 12), dtype=torch.long)
    mask[0, :5], mask[2, :7] = 0, 0
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)
    plain, manual, fed = Plain(model), ids, ids
    for _ in range(24):
        fed = plain(fed, mask)[:, -1:].argmax(dim=-1)
        manual, mask = torch.cat([manual, fed], dim=1), torch.cat([mask, torch.ones((3, 1), dtype=torch.long)], dim=1)
    assert generated.tolist() == manual.tolist()
    for row, pad in ((0, 5), (2, 7)):
        alone = model.generate(ids[row : row + 1, pad:], max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert alone[0, -4:].tolist() == generated[row, 12:16].tolist()  # later their windows are cut elsewhere


def test_sampling_and_no_cache_and_continued_generation():
    model, ids = small(), tokens(2, 30)
    arguments = {"max_new_tokens": 6, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(1)
    assert model.generate(ids, do_sample=True, top_k=5, **arguments).shape == (2, 36)
    cached = model.generate(ids, do_sample=False, return_dict_in_generate=True, **arguments)
    assert isinstance(cached.past_key_values.get_seq_length(), int) and cached.past_key_values.get_seq_length() == 35
    on = torch.cat([cached.sequences, tokens(2, 3, 1)], dim=1)
    continued = model.generate(on, past_key_values=cached.past_key_values, max_new_tokens=3, eos_token_id=None)
    plain = Plain(model)
    plain(ids)
    for i in range(30, 35):
        plain(on[:, i : i + 1])
    assert continued[:, 39].tolist() == plain(on[:, 35:])[:, -1].argmax(dim=-1).tolist()
    short = model.generate(ids[:, :6], max_new_tokens=3, eos_token_id=None)
    assert model.generate(ids[:, :6], max_new_tokens=3, eos_token_id=None, use_cache=False).tolist() == short.tolist()


@pytest.mark.parametrize("way", ("last_context_length", "prefill_chunk_size", "memory first"))
def test_generation_from_a_prompt_read_otherwise(way):
    model, prompt, plain = small(), tokens(2, 60), Plain(small())
    arguments = {"max_new_tokens": 5, "eos_token_id": None, "attention_mask": torch.ones_like(prompt)}
    if way == "last_context_length":
        arguments["last_context_length"] = 4
        logits = plain(prompt, last=4)
    elif way == "prefill_chunk_size":
        arguments["prefill_chunk_size"] = 10
        logits = [plain(part) for part in prompt.split(10, dim=1)][-1]
    else:
        arguments["past_key_values"] = model(prompt, use_cache=False, logits_to_keep=1).past_key_values
        plain(prompt, use_cache=False)
        prompt = tokens(2, 6, 1)
        arguments["attention_mask"] = torch.ones_like(prompt)
        logits = plain(prompt)
    manual = prompt
    for _ in range(5):
        manual = torch.cat([manual, logits[:, -1:].argmax(dim=-1)], dim=1)
        logits = plain(manual[:, -1:])
    assert model.generate(prompt, **arguments).tolist() == manual.tolist()


def test_beams():
    model, ids = small(), tokens(2, 20)
    arguments = {"num_beams": 3, "max_new_tokens": 14, "eos_token_id": None, "do_sample": False}
    together = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    for row in range(2):
        assert model.generate(ids[row : row + 1], **arguments)[0].tolist() == together[row].tolist()
    beams = [(0.0, ids[:1])]  # the same search, every step from the whole history
    for _ in range(14):
        candidates = []
        for score, history in beams:
            plain = Plain(model)
            logits = plain(history[:, :20])
            for i in range(20, history.shape[1]):
                logits = plain(history[:, i : i + 1])
            best = logits[0, -1].log_softmax(dim=0).topk(6)
            for value, token in zip(best.values.tolist(), best.indices, strict=True):
                candidates.append((score + value, torch.cat([history, token.view(1, 1)], dim=1)))
        beams = sorted(candidates, key=lambda candidate: -candidate[0])[:3]
    assert together[0].tolist() == beams[0][1][0].tolist()


def test_rows_of_the_cache_are_moved_repeated_and_chosen():
    model, ids, mask = small(), tokens(3, 40), padded(3, 40, "left")
    step, rows = tokens(3, 1, 1), torch.tensor([2, 0, 0])
    expected = model(step, past_key_values=model(ids, mask).past_key_values).logits
    cache = model(ids, mask).past_key_values
    cache.reorder_cache(rows)
    close(model(step[rows], past_key_values=cache).logits, expected[rows], 1e-5)
    cache = model(ids[:2], mask[:2]).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 3]))
    close(model(step[:2], past_key_values=cache).logits, expected[:2], 1e-5)
    with pytest.raises(NotImplementedError, match="cropped"):
        cache.crop(-1)


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
