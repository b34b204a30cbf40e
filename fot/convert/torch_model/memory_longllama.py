"""The cache of LongLLaMA, local context and memory, and the attention that reads both in one softmax.

Axes: B rows, T queries, S local keys, M memory slots, N heads, G key/value heads, H head dim.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin

CONVERTED = 2**22  # elements of memory that are converted to the dtype of the computation at once
EXPLICIT = 2**26  # logits that exist at once where no kernel gives the log-sum-exp


class Slots:
    """Keys and values [B, G, S, H] in tensors that grow by doubling.

    What is written without gradient is written in place; with gradient a new tensor is made, so that it can flow.
    """

    def __init__(self, dtype: torch.dtype | None = None):
        self.dtype = dtype
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor, reserve: int = 0):
        """Puts keys and values [B, G, T, H] at start, start + 1, …; makes room for `reserve` slots if it must grow."""
        self.keys = self._written(self.keys, start, keys, reserve)
        self.values = self._written(self.values, start, values, reserve)

    def read(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views of the first `length` keys and values."""
        return self.keys[:, :, :length], self.values[:, :, :length]

    def apply(self, function):
        """Replaces keys and values by function of them."""
        if self.keys is not None:
            self.keys, self.values = function(self.keys), function(self.values)

    def _written(self, stored, start, new, reserve):
        end = start + new.shape[2]
        dtype = self.dtype or new.dtype
        if torch.is_grad_enabled() and (new.requires_grad or (start and stored.requires_grad)):
            new = new.to(dtype)
            return torch.cat([stored[:, :, :start], new], dim=2) if start else new
        if stored is None or stored.shape[2] < end or stored.shape[0] != new.shape[0]:
            room = max(end, reserve, 2 * start)
            with torch.inference_mode(False):  # else the cache could only be written to inside inference_mode
                grown = new.new_empty((*new.shape[:2], room, new.shape[3]), dtype=dtype, requires_grad=False)
            if start:
                grown[:, :, :start] = stored[:, :, :start]
            stored = grown
        stored[:, :, start:end] = new
        return stored


class LongLlamaCacheLayer(CacheLayerMixin):
    """One layer: its local keys, rotated, and, if it is a memory layer, memory keys, un-rotated.

    Un-rotated local keys and their values are written behind the end of memory at once; moving them to memory is then
    a matter of its length, which the cache keeps.
    """

    def __init__(self, mem_dtype: torch.dtype | None):
        super().__init__()
        self.local = Slots()
        self.memory = None if mem_dtype is None else Slots(mem_dtype)

    def lazy_initialization(self, key_states, value_states):
        """Does nothing: slots are made when first written."""

    def update(self, key_states, value_states, start: int = 0, reserve: int = 0):
        """Writes local keys (rotated) and values [B, G, T, H] behind `start` others; returns all of them."""
        self.local.write(start, key_states, value_states, reserve)
        return self.local.read(start + key_states.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the number of keys that slots have room for, and no offset."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Returns the number of local slots; the cache itself knows how many of them are in use."""
        return 0 if self.local.keys is None else self.local.keys.shape[2]

    def get_max_length(self) -> int:
        """Returns -1: there is no maximum."""
        return -1

    def apply(self, function):
        """Replaces every tensor by function of it."""
        self.local.apply(function)
        if self.memory is not None:
            self.memory.apply(function)


class LongLlamaCache(Cache):
    """What a LongLLaMA model remembers: the local context of every layer and the memory of memory layers.

    Local positions are relative to the oldest token of the local context. When it would grow past
    `max_position_embeddings`, all of it moves to memory, where every key counts as at position 0 (FoT, Appendix A).

    Attributes:
        local_length: tokens in the local context.
        memory_length: tokens in memory.
        positions: [B, local_length] long, position of each local token; None before the first.
        local_mask: [B, local_length] bool, False for padding; None if nothing is padding.
        memory_mask: [B, memory_length] bool likewise.
    """

    def __init__(self, config):
        dtype = getattr(torch, config.mem_dtype)
        indices = range(config.num_hidden_layers)
        super().__init__(layers=[LongLlamaCacheLayer(dtype if i in config.mem_layers else None) for i in indices])
        self.window = config.max_position_embeddings
        self.has_memory = bool(config.mem_layers)
        self.reset()

    def reset(self):
        """Forgets everything; the slots stay allocated."""
        self.local_length = self.memory_length = self.seen = self.reserve = 0
        self.positions = self.base = self.local_mask = self.memory_mask = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns how many tokens of the sequence were read; what `use_cache=False` put to memory isn't counted."""
        return self.seen

    def begin(self, positions: torch.Tensor, mask: torch.Tensor | None):
        """Makes room for T tokens, moving the local context to memory if it would grow past the window.

        Args:
            positions: [B, T] long.
            mask: [B, local_length + T] bool, False for padding; None if nothing is.
        """
        if self.local_length:
            self.local_mask = None if mask is None else mask[:, : self.local_length]
            if self.local_length + positions.shape[1] > self.window:
                mask = None if mask is None else mask[:, self.local_length :]
                self.flush()
        if not self.local_length:
            self.base = positions.min(dim=1, keepdim=True).values
        self.positions = torch.cat([self.positions, positions], dim=1) if self.local_length else positions
        self.local_mask = mask

    def end(self, keep: bool):
        """Counts the tokens that `begin` made room for; without keep they move to memory with the local context."""
        self.local_length = self.positions.shape[1]
        if not keep:
            self.flush()

    def flush(self):
        """Moves the whole local context to memory; layers without memory lose it."""
        if self.has_memory:
            if self.local_mask is not None or self.memory_mask is not None:
                rows, device = self.positions.shape[0], self.positions.device
                parts = ((self.memory_mask, self.memory_length), (self.local_mask, self.local_length))
                ones = torch.ones((rows, 1), dtype=torch.bool, device=device)
                self.memory_mask = torch.cat([ones.expand(-1, n) if m is None else m for m, n in parts], dim=1)
            self.memory_length += self.local_length
        self.local_length = 0
        self.positions = self.base = self.local_mask = None

    def memory_keys(self) -> torch.Tensor | int:
        """Returns how many keys that aren't padding each row has in memory, [B] or one number for all."""
        return self.memory_length if self.memory_mask is None else self.memory_mask.sum(1)

    def reorder_cache(self, beam_idx: torch.LongTensor):
        """Takes the rows beam_idx."""
        if not torch.equal(beam_idx.cpu(), torch.arange(beam_idx.shape[0])):  # beams often stay where they are
            self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int):
        """Repeats each row."""
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        """Keeps the rows indices."""
        self._apply(lambda x: x[indices])

    def crop(self, tokens_to_remove: int):
        """Raises: what moved to memory can't be taken back."""
        raise NotImplementedError("a LongLlamaCache can't be cropped: what moved to memory can't be taken back")

    def _apply(self, function):
        for layer in self.layers:
            layer.apply(function)
        for name in ("positions", "base", "local_mask", "memory_mask"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))


class Piece(NamedTuple):
    """Tokens begin … end - 1 of an input, read at once; keep: they stay in the local cache."""

    begin: int
    end: int
    keep: bool


def pieces(tokens: int, last: int, window: int, local: int, use_cache: bool) -> list[Piece]:
    """Cuts an input into windows: the last `last` tokens and, before them, windows from the beginning.

    Without local context, windows before the last go to memory one by one. With it, they are appended to it, and what
    is there moves to memory whenever it would grow past `window`; pieces that would move before the next aren't kept.
    """
    prefix = max(tokens - last, 0)
    bounds = [*range(0, prefix, window), prefix, tokens] if prefix else [0, tokens]
    cut, continued, sizes = [], local > 0, [end - begin for begin, end in itertools.pairwise(bounds)]
    for begin, size, following in zip(bounds, sizes, sizes[1:] + [None], strict=False):
        local = local + size if local + size <= window else size
        keep = use_cache if following is None else continued and local + following <= window
        local = local if keep else 0
        cut.append(Piece(begin, begin + size, keep))
    return cut


class Window(NamedTuple):
    """What all layers share while a window of T tokens is read behind `start` local tokens; S = start + T.

    Attributes:
        cos, sin: [B, 1, T, H], the rotation to each token's local position.
        start: local tokens before the window.
        keep: whether the window's keys stay in the local cache.
        bias: [B or 1, 1, T, S], 0 where a query sees a key, else -inf, and 0 all along for queries that see none; None
            if there is nothing to hide, or only what `causal` hides.
        causal: whether queries see the keys up to themselves, there being none before the window.
        blind: [B, T] bool, queries that see no local key, which only padding does; None if there are none.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    start: int
    keep: bool
    bias: torch.Tensor | None
    causal: bool
    blind: torch.Tensor | None


def window_masks(mask: torch.Tensor | None, start: int, length: int, like: torch.Tensor) -> tuple:
    """Returns `bias`, `causal` and `blind` of a Window of `length` queries.

    Args:
        mask: [B, start + length] bool, False for padding; None if nothing is.
        start: local tokens before the window.
        length: T.
        like: a tensor of the dtype and device wanted.
    """
    if mask is None and (length == 1 or not start):
        return None, length > 1, None
    visible = torch.ones((length, start + length), dtype=torch.bool, device=like.device).tril(start)[None]
    blind = None
    if mask is not None:
        visible = visible & mask[:, None, :]
        blind = ~visible.any(dim=2)
        visible = visible | blind[:, :, None]
        blind = blind if bool(blind.any()) else None
    bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill(~visible, -torch.inf)
    return bias[:, None], False, blind


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: Window) -> torch.Tensor:
    """Attention to the local context.

    A query that sees nothing, which only padding does, averages all values, as in the released code.

    Args:
        q: [B, N, T, H].
        k: [B, G, S, H], like q rotated.
        v: [B, G, S, H].
        window: what hides what.

    Returns:
        [B, N, T, H].
    """
    q, grouped = _zeroed(q, window.blind), q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, window.bias, is_causal=window.causal, enable_gqa=grouped)


def sharpen(q: torch.Tensor, keys: torch.Tensor | int, known: int) -> torch.Tensor:
    """Multiplies queries [B, N, T, H] by log n / log `known` in rows with more than `known` keys n in memory."""
    n = torch.as_tensor(keys, dtype=torch.float32, device=q.device).clamp(min=known)
    return (q * ((n / known).log() / math.log(known) + 1).reshape(-1, 1, 1, 1)).to(q.dtype)


def attend_with_memory(q, k, v, memory_k, memory_v, memory_mask, window: Window) -> torch.Tensor:
    """Attention to memory and to the local context in one softmax (FoT, Section 3.1), without copying memory.

    Args:
        q, k, v: as in `attend`.
        memory_k: [B, G, M, H], any dtype; its keys count as at position 0, so they are as they were before rotation.
        memory_v: [B, G, M, H].
        memory_mask: [B, M] bool, False for padding; None if nothing is.
        window: what hides what in the local context.

    Returns:
        [B, N, T, H].
    """
    if q.device.type != "cpu" or (torch.is_grad_enabled() and (q.requires_grad or memory_k.requires_grad)):
        return _explicit(q, k, v, memory_k, memory_v, memory_mask, window)
    blind, bias, nothing = window.blind, None, None
    if memory_mask is not None:
        bias = torch.zeros(memory_mask.shape, dtype=q.dtype).masked_fill(~memory_mask, -torch.inf)[:, None, None]
    out, lse = _kernel(_zeroed(q, blind), k, v, window.bias, window.causal)
    if blind is not None:
        seen = torch.ones_like(blind[:, :1]) if memory_mask is None else memory_mask.any(dim=1, keepdim=True)
        lse = lse.masked_fill((blind & seen)[:, None], -torch.inf)
        nothing = (blind & ~seen)[:, None]
    parts = [(out, lse)]
    folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # the queries that share keys, one after the other
    step = memory_k.shape[2] if memory_k.dtype == q.dtype else max(1, CONVERTED // k[:, :, 0].numel())
    scratch = () if memory_k.dtype == q.dtype else q.new_empty((2, *k.shape[:2], step, k.shape[3]))
    for start in range(0, memory_k.shape[2], step):
        block = slice(start, start + step)
        keys, values = memory_k[:, :, block], memory_v[:, :, block]
        if keys.dtype != q.dtype:
            keys, values = (x[:, :, : keys.shape[2]].copy_(y) for x, y in zip(scratch, (keys, values), strict=True))
        out, lse = _kernel(folded, keys, values, None if bias is None else bias[..., block])
        out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
        if bias is not None:  # of keys that are all hidden the kernel gives a log-sum-exp of 0
            lse = lse.masked_fill(~memory_mask[:, block].any(dim=1)[:, None, None], -torch.inf)
        if nothing is not None:
            average = values.mean(dim=2, keepdim=True).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            out, lse = torch.where(nothing[..., None], average, out), lse.masked_fill(nothing, math.log(keys.shape[2]))
        parts.append((out, lse))
    lses = torch.stack([lse for _, lse in parts])
    weights = (lses - lses.amax(dim=0)).exp()  # not softmax, which wakes all threads however small its input
    weights = (weights / weights.sum(dim=0))[..., None]
    return sum(out * weight for (out, _), weight in zip(parts, weights, strict=True)).to(q.dtype)


def _zeroed(q, blind):
    """Returns q, zero where blind: all its logits are then equal."""
    return q if blind is None else q.masked_fill(blind[:, None, :, None], 0)


def _kernel(q, k, v, bias=None, causal=False):
    """Returns attention [B, N, T, H] and the log-sum-exp [B, N, T] of its logits, both of PyTorch's CPU kernel."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, attn_mask=bias)


def _explicit(q, k, v, memory_k, memory_v, memory_mask, window):
    """`attend_with_memory` by plain products, for devices and gradients that the kernel isn't for."""
    B, N, T, H = q.shape
    G, S, M = k.shape[1], k.shape[2], memory_k.shape[2]
    lowest = torch.finfo(q.dtype).min  # finite: a query that sees nothing then averages all values
    memory_k, memory_v = memory_k.to(q.dtype), memory_v.to(q.dtype)
    visible = torch.ones((T, S), dtype=torch.bool, device=q.device).tril(window.start)[None, None]
    if window.bias is not None:
        visible = window.bias == 0
        if window.blind is not None:
            visible = visible & ~window.blind[:, None, :, None]
    outs = []
    for queries in torch.arange(T).split(max(1, EXPLICIT // (B * N * (S + M)))):
        block = slice(int(queries[0]), int(queries[-1]) + 1)
        folded = q[:, :, block].reshape(B, G, -1, H) * H**-0.5
        local = (folded @ k.transpose(2, 3)).view(B, N, -1, S).masked_fill(~visible[:, :, block], lowest)
        memory = (folded @ memory_k.transpose(2, 3)).view(B, N, -1, M)
        if memory_mask is not None:
            memory = memory.masked_fill(~memory_mask[:, None, None], lowest)
        weights = torch.cat([local, memory], dim=3).softmax(dim=3, dtype=torch.float32).to(q.dtype)
        weights = weights.view(B, G, -1, S + M)
        outs.append((weights[..., :S] @ v + weights[..., S:] @ memory_v).view(B, N, -1, H))
    return torch.cat(outs, dim=2)
