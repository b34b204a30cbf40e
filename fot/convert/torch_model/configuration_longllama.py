"""Configuration of LongLLaMA: a LLaMA whose memory layers attend to everything read before."""

from transformers import LlamaConfig

MEMORY_DTYPES = ("bfloat16", "float16", "float32")


class LongLlamaConfig(LlamaConfig):
    """LLaMA's fields and those of the memory (FoT, Section 3.1 and Appendix A).

    Positions: `rope_parameters` holds them as in every current configuration; `rope_theta` reads and writes its base,
    is accepted as a field of its own and is saved as one, so that older readers find it.

    Args:
        mem_layers: indices, from 0, of the layers that attend to memory.
        mem_positionals: whether memory layers rotate queries and keys; False leaves them without positions.
        mem_dtype: what memory keys and values are stored as, one of `MEMORY_DTYPES`.
        last_context_length: tokens, at the end of an input, that stay in the local cache; all before them go to memory
            in windows of `max_position_embeddings` tokens.
        logn_keys: with more keys n than this in a row's memory, logits of memory layers are multiplied by
            log n / log logn_keys; 0 never does it.
        attention_bias: whether the projections to queries, keys and values have biases.
        attention_output_bias: whether the projection of attention's output has one.
        mem_attention_grouping: kept for older readers; attention is done in blocks anyway.
        torch_attention: kept for older readers; attention is PyTorch's own anyway.
        gradient_checkpoint_every_ith: kept for older readers.

    Raises:
        ValueError: a memory layer that doesn't exist, an unknown mem_dtype, a last_context_length below 1, a
            logn_keys that is neither 0 nor 2 or more.
    """

    model_type = "longllama"

    pad_token_id: int | None = 0
    mem_layers: list[int] | tuple[int, ...] | None = None
    mem_positionals: bool = True
    mem_dtype: str = "bfloat16"
    last_context_length: int = 1024
    logn_keys: int = 0
    attention_output_bias: bool = False
    mem_attention_grouping: list[int] | tuple[int, ...] | None = None
    torch_attention: bool = False
    gradient_checkpoint_every_ith: int = 1

    def __post_init__(self, **kwargs):
        """Fills what is derived from other fields and validates."""
        self.mem_layers = sorted(self.mem_layers or [])
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return (self.rope_parameters or {}).get("rope_theta", self.default_theta)

    @rope_theta.setter
    def rope_theta(self, value: float):
        self.rope_parameters = {**(self.rope_parameters or {}), "rope_theta": value}

    def to_dict(self) -> dict:
        """Returns all fields, `rope_theta` among them."""
        return {**super().to_dict(), "rope_theta": self.rope_theta}

    def validate_architecture(self):
        """Checks fields against each other."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        missing = [layer for layer in self.mem_layers if not 0 <= layer < self.num_hidden_layers]
        if missing:
            raise ValueError(f"mem_layers must be between 0 and {self.num_hidden_layers - 1}, got {missing}")
        if self.mem_dtype not in MEMORY_DTYPES:
            raise ValueError(f"mem_dtype must be one of {MEMORY_DTYPES}, got {self.mem_dtype!r}")
        if self.last_context_length < 1:
            raise ValueError(f"last_context_length must be at least 1, got {self.last_context_length}")
        if self.logn_keys < 0 or self.logn_keys == 1:
            raise ValueError(f"logn_keys must be 0 or at least 2, got {self.logn_keys}")
