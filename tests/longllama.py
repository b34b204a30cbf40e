"""Small LongLLaMA models in PyTorch, and what they compute in the plainest way."""

import json
import pathlib

import numpy as np
import torch

from fot.convert.torch_model.configuration_longllama import LongLlamaConfig
from fot.convert.torch_model.modeling_longllama import LongLlamaForCausalLM, rotate

BASE = json.loads((pathlib.Path(__file__).parent / "data" / "longllama_base_config.json").read_text())
MEMORY = {"mem_layers": [1, 3], "mem_dtype": "float32"}
SMALL = {**BASE, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16, "last_context_length": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


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


def padded(rows, n, side):
    mask = torch.ones((rows, n), dtype=torch.long)
    if side in ("left", "both"):
        mask[0, : min(n - 1, 19)], mask[1, : n // 3] = 0, 0
    if side in ("right", "both"):
        mask[-1, -(n // 3) or n :] = 0
    return mask
