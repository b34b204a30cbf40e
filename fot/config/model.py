"""The Transformer."""

import dataclasses

from fot.config.checks import one_of, positive, require

MLPS = ("swiglu", "gelu")
MEMORY_POSITIONS = ("none", "zero")
ROPE_SCALINGS = ("none", "linear", "llama3")
REMATS = ("none", "elementwise", "mlp", "full")
ATTENTION_KERNELS = ("auto", "jnp", "pallas")
ATTENTION_EXCHANGES = ("ring", "gather")
DTYPES = ("float32", "bfloat16")
# Fields of ModelConfig that change no result but for rounding: how it is computed.
INDIFFERENT = ("remat", "attention_block", "attention_kernel", "attention_exchange", "loss_block", "unroll")


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary frequencies are stretched for contexts longer than a checkpoint was first trained on.

    Attributes:
      kind: "none", "linear" (all divided by `factor`) or "llama3" (LLaMA 3.1: only those that turn slowly).
      factor: what frequencies are divided by.
      low_factor: for "llama3": those with fewer turns than this in the original context are divided by all of `factor`.
      high_factor: for "llama3": those with more turns than this stay as they are; between the two it is gradual.
      original_context: for "llama3": tokens of the context that the checkpoint was first trained on.
    """

    kind: str = "none"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        one_of(self, "kind", ROPE_SCALINGS)
        positive(self, "factor", "low_factor", "original_context")
        require(
            self.high_factor > self.low_factor,
            f"high_factor={self.high_factor} must be greater than low_factor={self.low_factor}",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The Transformer (FoT, Appendix A). Data, not subclasses, tells the paper's models from LLaMA ones.

    Attributes:
      vocab_size: rows of the embedding; a tokenizer may have fewer pieces.
      layers: number of layers.
      dim: width of the residual stream.
      heads: query heads.
      kv_heads: key and value heads; fewer than `heads` is grouped-query attention.
      head_dim: width of a head.
      mlp_dim: width of the feed-forward layer.
      mlp: "swiglu" (LLaMA) or "gelu" (the paper's small models).
      tied_embeddings: the output head is the embedding, transposed.
      qkv_bias: queries, keys and values have a bias (Qwen2).
      rope_theta: base of the rotary frequencies, θ.
      rope_scaling: how the rotary frequencies are stretched.
      norm_epsilon: ε of RMSNorm.
      memory_layers: indices (from 0) of the layers that see other contexts or a memory, ascending.
      memory_positions: "none": memory layers have no positional encoding (the paper's small models); "zero": RoPE
        inside the local context, keys from elsewhere encoded at position 0 (LongLLaMA).
      qk_norm: L2-normalised queries and keys with a learnable temperature per head (the paper's small models).
      qk_scale: for qk_norm: what the inner products are multiplied by at first, 1/τ; about log2 of the square of the
        keys in view (Henry et al., 2020).
      logn_keys: log-n scaling (Chiang and Cholak, 2022): with n keys in a row's memory, more than this, logits of
        memory layers are multiplied by log n / log logn_keys, so that attention stays as sharp among many keys as it is
        among those of training; 0 never does it. Crossbatch training has no memory, and isn't changed by it.
      memory_gate: combine local and memory attention by a learned gate per head (Memorizing Transformer) and not
        in one softmax.
      compute_dtype: dtype of activations and matrix products; parameters are stored in float32.
      remat: what the backward pass computes again instead of keeping it: "none", "elementwise" (norms, activations
        and attention's output projection), "mlp" (that, and the feed-forward layer), "full" (whole layers); each takes
        less memory and more time than the one before.
      attention_block: queries per block of attention logits, in tokens; bounds memory, changes no result.
      attention_kernel: how plain layers attend, memory layers to crossbatch contexts in training, and both to a memory
        or a cache elsewhere: "jnp", "pallas" (kernels for TPUs; elsewhere they are interpreted, which is slow) or
        "auto" (the kernels, on TPUs). Changes no result. Where no kernel can be used, on v2 and v3 and, of crossbatch,
        with `memory_gate`, it is "jnp".
      attention_exchange: how crossbatch contexts that are rows of other devices come: "ring" (shard by shard, while the
        one before is attended to; shards that no row sees are left out) or "gather" (all rows to every device, once a
        layer, whatever d is). Changes no result.
      loss_block: positions of each row whose output logits exist at once in training; bounds memory, changes no result.
      unroll: layers unrolled in each iteration of the scan over layers; more compiles longer and may run faster.
    """

    vocab_size: int = 512
    layers: int = 4
    dim: int = 128
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 512
    mlp: str = "gelu"
    memory_layers: tuple[int, ...] = (2,)
    memory_positions: str = "none"
    qk_norm: bool = True
    qk_scale: float = 12.0
    logn_keys: int = 0
    memory_gate: bool = False
    tied_embeddings: bool = True
    qkv_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    norm_epsilon: float = 1e-6
    compute_dtype: str = "float32"
    remat: str = "none"
    attention_block: int = 128
    attention_kernel: str = "auto"
    attention_exchange: str = "ring"
    loss_block: int = 128
    unroll: int = 1

    def __post_init__(self):
        positive(self, "unroll", "vocab_size", "layers", "dim", "heads", "kv_heads", "head_dim", "mlp_dim")
        positive(self, "rope_theta", "norm_epsilon", "attention_block", "loss_block", "qk_scale")
        one_of(self, "mlp", MLPS)
        one_of(self, "memory_positions", MEMORY_POSITIONS)
        one_of(self, "compute_dtype", DTYPES)
        one_of(self, "remat", REMATS)
        one_of(self, "attention_kernel", ATTENTION_KERNELS)
        one_of(self, "attention_exchange", ATTENTION_EXCHANGES)
        require(
            self.attention_kernel != "pallas" or not self.memory_gate,
            "attention_kernel=pallas has one softmax over local context and contexts, which memory_gate=True keeps "
            "apart: set attention_kernel=auto or jnp",
        )
        require(self.logn_keys == 0 or self.logn_keys >= 2, f"logn_keys={self.logn_keys} must be 0 (off) or at least 2")
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}",
        )
        require(
            tuple(sorted(set(self.memory_layers))) == self.memory_layers,
            f"memory_layers={self.memory_layers} must be ascending without repeats",
        )
        for layer in self.memory_layers:
            require(
                0 <= layer < self.layers,
                f"memory_layers={self.memory_layers}: layer {layer} does not exist, "
                f"layers={self.layers} are numbered 0 to {self.layers - 1}",
            )
