"""Small checkpoints for the tests of conversion, as other programs write them, and what transformers makes of them."""

import json
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from fot import model, sharding
from fot.attention import Tokens
from fot.config import MeshConfig, ModelConfig
from fot.convert import weights
from fot.convert.source import Source

VOCAB, CONTEXT = 96, 32
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
SHAPE |= dict(num_key_value_heads=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=CONTEXT, rope_theta=5e5)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 4 * CONTEXT}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "code": ("Llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "wide_heads": ("Llama", {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}


def torch_model(name: str) -> Any:
    """Returns a model of transformers whose norms and biases are random too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch and transformers say of their own imports
        import torch
        import transformers
    transformers.utils.logging.disable_progress_bar()
    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(5)  # else attention is uniform and no mistake in it would show
    return made


def saved(name: str, folder: pathlib.Path, **settings: Any) -> Any:
    """Saves a model into the folder as transformers does, and returns it."""
    made = torch_model(name)
    made.save_pretrained(folder, **settings)
    return made


def save_bin(made: Any, folder: pathlib.Path, files: int) -> None:
    """Saves a model as before safetensors: PyTorch files, with an index if there are several."""
    import torch

    folder.mkdir(exist_ok=True)
    made.config.dtype = made.dtype
    made.config.save_pretrained(folder)
    state = made.state_dict()
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    placed = {name: f"pytorch_model-{i % files + 1:05}-of-{files:05}.bin" for i, name in enumerate(names)}
    for file in set(placed.values()):
        torch.save({name: state[name] for name in names if placed[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": placed}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def tokens(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (2, length)).astype(np.int32)


def torch_logits(made: Any, inputs: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return made(torch.from_numpy(inputs.astype(np.int64))).logits.numpy()


def load(source: Source, mesh: MeshConfig | None = None) -> model.Params:
    """Returns the parameters, by default on one device."""
    devices = jax.devices() if mesh else jax.devices()[:1]
    place = sharding.make_mesh(mesh or MeshConfig(), devices)
    return weights.load(source.weights(source.config.model), source.config.model, place)


def our_logits(params: model.Params, config: ModelConfig, inputs: np.ndarray) -> np.ndarray:
    def run(params: model.Params, inputs: jax.Array) -> jax.Array:
        places = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
        output = model.apply(params, inputs, Tokens(jnp.zeros_like(inputs), places), config)
        return model.unembed(params, output.hidden, config)

    return np.asarray(jax.jit(run)(params, inputs))


def save_easylm(path: pathlib.Path, arrays: dict[str, np.ndarray], chunk: int = 0) -> None:
    """Writes arrays in the format of EasyLM's streaming checkpointer; `chunk` values in a piece, 0 for whole ones."""

    def pack(array: np.ndarray) -> msgpack.ExtType:
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))

    with open(path, "wb") as file:
        for name, array in arrays.items():
            value: Any = pack(array)
            if chunk and array.size > chunk:
                pieces = [array.reshape(-1)[i : i + chunk] for i in range(0, array.size, chunk)]
                value = {"__msgpack_chunked_array__": True, "shape": _numbered(array.shape)}
                value["chunks"] = _numbered([pack(piece) for piece in pieces])
            file.write(msgpack.packb((name.split("/"), msgpack.packb(value))))


def _numbered(values: Any) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(values)}


def easylm_arrays(made: Any) -> dict[str, np.ndarray]:
    """Returns a LLaMA of transformers as EasyLM has it: kernels [in, out], the pairs of RoPE side by side."""
    heads = {"q": made.config.num_attention_heads, "k": made.config.num_key_value_heads}
    state = {name: value.detach().numpy() for name, value in made.state_dict().items()}
    arrays = {"transformer/wte/embedding": state["model.embed_tokens.weight"]}
    arrays |= {"transformer/ln_f/kernel": state["model.norm.weight"], "lm_head/kernel": state["lm_head.weight"].T}
    for i in range(made.config.num_hidden_layers):
        ours, theirs = f"transformer/h/{i}", f"model.layers.{i}"
        for name in "qkvo":
            kernel = state[f"{theirs}.self_attn.{name}_proj.weight"]
            arrays[f"{ours}/attention/w{name}/kernel"] = interleaved(kernel, heads.get(name, 0)).T
        for ours_name, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            arrays[f"{ours}/feed_forward/{ours_name}/kernel"] = state[f"{theirs}.mlp.{name}.weight"].T
        arrays[f"{ours}/attention_norm/kernel"] = state[f"{theirs}.input_layernorm.weight"]
        arrays[f"{ours}/ffn_norm/kernel"] = state[f"{theirs}.post_attention_layernorm.weight"]
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows of a Hugging Face projection with the two of a pair side by side; 0 heads leave them alone."""
    if heads == 0:
        return rows
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
