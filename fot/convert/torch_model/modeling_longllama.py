"""LongLLaMA: LLaMA whose memory layers attend to the keys and values of everything read before.

The Focused Transformer of arXiv 2307.03170 (FoT), as its released checkpoints are used: Section 3.1 and Appendix A.
Parameters have the names they have in `LlamaForCausalLM`, and without memory layers the model is LLaMA.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.generation import MaxLengthCriteria
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_longllama import LongLlamaConfig
from .memory_longllama import LongLlamaCache, Window, attend, attend_with_memory, pieces, sharpen, window_masks


class LongLlamaRMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] → [..., D]."""
        x32 = x.float()
        return (self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype)).to(
            x.dtype
        )


class LongLlamaRotaryEmbedding(nn.Module):
    """Angles of the rotary positions, scaled as `rope_parameters` say; a subset of transformers' kinds."""

    def __init__(self, config: LongLlamaConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        kinds = {"default": self.compute_default_rope_parameters} | {
            kind: ROPE_INIT_FUNCTIONS[kind] for kind in ("linear", "llama3")
        }
        if self.rope_type not in kinds:
            raise ValueError(f"rope_type must be one of {tuple(kinds)}, got {self.rope_type!r}")
        inv_freq, self.scale = kinds[self.rope_type](config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)  # transformers fills both on load

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **_) -> tuple[torch.Tensor, float]:
        """Frequencies theta^(-2h/H) [H/2] and the factor of cosines and sines; transformers calls it by this name."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [B, T] → cosines and sines [B, 1, T, H]."""
        angles = positions[:, None, :, None].float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)

    def _apply(self, fn, recurse=True):
        """Lets frequencies follow the model to another device, but not to half precision."""
        frequencies = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != frequencies.dtype:
            self.inv_freq = frequencies.to(self.inv_freq.device)
            self.original_inv_freq = self.inv_freq.clone()
        return self


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (h, h + H/2) of heads [B, N, T, H]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class LongLlamaMLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: LongLlamaConfig):
        super().__init__()
        D, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, F, bias=bias)
        self.up_proj = nn.Linear(D, F, bias=bias)
        self.down_proj = nn.Linear(F, D, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] → [B, T, D]."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LongLlamaAttention(nn.Module):
    """Attention to the local context and, in memory layers, to memory, in one softmax (FoT, Section 3.1)."""

    def __init__(self, config: LongLlamaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.has_memory = layer in config.mem_layers
        self.rotates = config.mem_positionals or not self.has_memory
        self.head_dim = config.head_dim
        self.logn_keys = config.logn_keys
        D, N, G = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads
        self.q_proj = nn.Linear(D, N, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, G * config.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, G * config.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(N, D, bias=config.attention_output_bias)

    def remember(self, x: torch.Tensor, window: Window, cache: LongLlamaCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys, un-rotated, and values [B, G, T, H] of x [B, T, D], and writes them behind memory's end."""
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        if self.has_memory:
            cache.layers[self.layer].memory.write(cache.memory_length + window.start, k, v, cache.reserve)
        return k, v

    def forward(self, x: torch.Tensor, window: Window, cache: LongLlamaCache) -> torch.Tensor:
        """[B, T, D] → [B, T, D]."""
        q = self._heads(self.q_proj(x))
        if self.has_memory and self.logn_keys:
            q = sharpen(q, cache.memory_keys(), self.logn_keys)
        k, v = self.remember(x, window, cache)
        if self.rotates:
            q, k = rotate(q, window.cos, window.sin), rotate(k, window.cos, window.sin)
        stored = cache.layers[self.layer]
        if window.keep or window.start:
            k, v = stored.update(k, v, window.start)
        if self.has_memory and cache.memory_length:
            out = attend_with_memory(q, k, v, *stored.memory.read(cache.memory_length), cache.memory_mask, window)
        else:
            out = attend(q, k, v, window)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x):
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class LongLlamaDecoderLayer(nn.Module):
    """Attention and feed-forward layer, each behind a norm and beside a residual connection."""

    def __init__(self, config: LongLlamaConfig, layer: int):
        super().__init__()
        self.self_attn = LongLlamaAttention(config, layer)
        self.mlp = LongLlamaMLP(config)
        self.input_layernorm = LongLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LongLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, window: Window, cache: LongLlamaCache) -> torch.Tensor:
        """[B, T, D] → [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), window, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LongLlamaPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the models below."""

    config_class = LongLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["LongLlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"decoder\.version"]
    _supports_sdpa = True

    def __init__(self, config: LongLlamaConfig):
        super().__init__(config)
        self.register_load_state_dict_pre_hook(_drop_frequencies)


def _drop_frequencies(module, state_dict, *_):
    """Old checkpoints hold the rotary frequencies of every layer."""
    for name in [name for name in state_dict if name.endswith("rotary_emb.inv_freq")]:
        del state_dict[name]


class LongLlamaModel(LongLlamaPreTrainedModel):
    """The layers of LongLLaMA, reading inputs of any length window by window."""

    def __init__(self, config: LongLlamaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LongLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LongLlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LongLlamaRotaryEmbedding(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: LongLlamaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        last_context_length: int | None = None,
        tokens_to_keep: int = 0,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Reads n tokens: all but the last of them into memory, those into the local cache.

        Args:
            input_ids: [B, n].
            attention_mask: [B, local context + n or more], 0 for padding; what is more than that is past and ignored.
            position_ids: [B, n]; what counts is their distance from the smallest one in the local context.
            past_key_values: what was read before; changed in place.
            inputs_embeds: [B, n, D], instead of input_ids.
            use_cache: False moves the last tokens to memory too.
            output_hidden_states: whether to return the inputs of all layers and the output, [B, n, D] each.
            output_attentions: not available, as attention weights never exist as a whole.
            last_context_length: tokens that don't go to memory; the configuration's if None.
            tokens_to_keep: how many of the last tokens' outputs to return, 0 for all; what only the other outputs would
                need isn't computed.
            kwargs: ignored.

        Returns:
            last_hidden_state [B, n or tokens_to_keep, D]; past_key_values, None if there is nothing to remember.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        config = self.config
        if config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions isn't available: attention weights never exist as a whole")
        states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache
        last = config.last_context_length if last_context_length is None else last_context_length
        if last < 1:
            raise ValueError(f"last_context_length must be at least 1, got {last}")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        cache = _cache(past_key_values, config)
        if cache.local_length and not use_cache:
            raise ValueError("past_key_values holds a local context, which use_cache=False can't go on with")
        rows, tokens = inputs.shape[:2]
        local, wanted = cache.local_length, 0 if states or not tokens_to_keep else tokens - tokens_to_keep
        mask = _mask(attention_mask, cache, rows, tokens, inputs.device)
        if position_ids is None:
            begin = cache.positions.max(dim=1, keepdim=True).values + 1 if local else 0
            position_ids = torch.arange(tokens, device=inputs.device) + begin
        position_ids = position_ids.expand(rows, -1)
        cache.reserve = cache.memory_length + tokens + config.max_position_embeddings
        outputs = []
        for begin, end, keep in pieces(tokens, last, config.max_position_embeddings, local, use_cache):
            piece_mask = None if mask is None else mask[:, local + begin - cache.local_length : local + end]
            cache.begin(position_ids[:, begin:end], piece_mask)
            piece = self._read(inputs[:, begin:end], cache, keep, wanted=end > wanted)
            if end > wanted:
                outputs.append([x[:, max(0, wanted - begin) :] for x in (piece if states else piece[-1:])])
            cache.end(keep)
        cache.seen = cache.seen + tokens if use_cache else 0
        hidden_states = tuple(torch.cat(x, dim=1) for x in zip(*outputs, strict=True))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states[-1],
            past_key_values=cache if use_cache or cache.has_memory else None,
            hidden_states=hidden_states if states else None,
        )

    def _read(self, inputs, cache, keep, wanted) -> list[torch.Tensor]:
        """Reads a window [B, T] or [B, T, D]; returns the inputs of all layers and the output, if wanted.

        What is neither wanted nor kept matters for memory only: nothing past the keys of the last memory layer does.
        """
        memory_only = not (keep or wanted)
        if memory_only and not cache.has_memory:
            return []
        x = self.embed_tokens(inputs) if inputs.dim() == 2 else inputs
        start = cache.local_length
        cos, sin = self.rotary_emb(cache.positions[:, start:] - cache.base, x.dtype)
        window = Window(cos, sin, start, keep, *window_masks(cache.local_mask, start, x.shape[1], x))
        states = [x]
        for i, layer in enumerate(self.layers):
            if memory_only and i == self.config.mem_layers[-1]:
                layer.self_attn.remember(layer.input_layernorm(x), window, cache)
                return []
            x = layer(x, window, cache)
            states.append(x)
        return [*states[:-1], self.norm(x)] if wanted else []


def _cache(past, config) -> LongLlamaCache:
    if isinstance(past, LongLlamaCache):
        return past
    if past is None or (hasattr(past, "get_seq_length") and not past.get_seq_length()):
        return LongLlamaCache(config)
    raise TypeError(f"past_key_values must be a LongLlamaCache, got {type(past).__name__}")


def _mask(attention_mask, cache, rows, tokens, device) -> torch.Tensor | None:
    """Returns [B, local context + tokens] bool, False for padding; None if nothing is padding."""
    if attention_mask is None:
        if cache.local_mask is None:
            return None
        return torch.cat([cache.local_mask, torch.ones((rows, tokens), dtype=torch.bool, device=device)], dim=1)
    expected = cache.local_length + tokens
    if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < expected:
        raise ValueError(
            f"attention_mask must cover the local context and the input: at least {[rows, expected]}, "
            f"got {list(attention_mask.shape)}"
        )
    mask = attention_mask[:, -expected:].bool()
    return None if bool(mask.all()) else mask


class LongLlamaForCausalLM(LongLlamaPreTrainedModel, GenerationMixin):
    """LongLLaMA with the head that gives next-token logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongLlamaConfig):
        super().__init__(config)
        self.model = LongLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: LongLlamaCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        last_context_length: int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Reads n tokens, see `LongLlamaModel.forward`, and returns logits.

        Args:
            input_ids: [B, n].
            attention_mask: [B, local context + n or more].
            position_ids: [B, n].
            past_key_values: what was read before; changed in place.
            inputs_embeds: [B, n, D], instead of input_ids.
            labels: [B, n], -100 for tokens without loss; token i's logits are scored by label i + 1.
            use_cache: False moves the last tokens to memory too.
            output_hidden_states: whether to return hidden states.
            output_attentions: not available.
            last_context_length: tokens that don't go to memory; the configuration's if None.
            logits_to_keep: how many of the last tokens' logits to return, 0 for all; or the indices of the tokens.
            kwargs: what the loss takes.

        Returns:
            logits [B, n or logits_to_keep, V]; past_key_values; loss, if there are labels.
        """
        indices = isinstance(logits_to_keep, torch.Tensor)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            last_context_length=last_context_length,
            tokens_to_keep=0 if indices else logits_to_keep,
            return_dict=True,
        )
        kept = logits_to_keep if indices else slice(-logits_to_keep, None)  # hidden states, if asked for, are of all
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        """As for other models; without cache each step reads all of the input, and what the last left is dropped."""
        past_key_values = None if kwargs.get("use_cache") is False else past_key_values
        return super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Called by `generate`, which would make a cache of its own."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError("LongLLaMA has a cache of its own: leave cache_implementation unset")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LongLlamaCache(self.config)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _get_stopping_criteria(self, *args, **kwargs):
        """Called by `generate`, which would warn of sequences longer than `max_position_embeddings`."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
        return criteria
