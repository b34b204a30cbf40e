"""Generation is the released code's, the training model's, and each row's own."""

import json
import pathlib

import jax
import numpy as np
import pytest

from fot import config as config_lib
from fot import generate, session, sharding
from fot.attention import rope
from fot.config import ModelConfig

DATA = pathlib.Path(__file__).parent / "data"
RELEASED = ModelConfig(
    vocab_size=128,
    layers=4,
    dim=64,
    heads=4,
    kv_heads=4,
    head_dim=16,
    mlp_dim=128,
    mlp="swiglu",
    memory_layers=(1, 3),
    memory_positions="zero",
    qk_norm=False,
    tied_embeddings=False,
    attention_block=32,
)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])


def experiment(
    model: ModelConfig, window: int, block: int = 16, neighbours: int = 1000, **generate
) -> config_lib.ExperimentConfig:
    settings = {"last_context_length": 32, "memory_block": 64, "max_new_tokens": 8} | generate
    crossbatch = config_lib.CrossbatchConfig(variant="none")
    return config_lib.ExperimentConfig(
        model=model,
        crossbatch=crossbatch,
        data=config_lib.DataConfig(context=window),
        evaluate=config_lib.EvaluateConfig(block=block, neighbours=neighbours, list_size=8, probes=1000),
        generate=config_lib.GenerateConfig(**settings),
    )


def released_params():
    """The released code's weights [out, in] as ours."""
    held = np.load(DATA / "longllama_state_dict.npz")
    D, N, H = RELEASED.dim, RELEASED.heads, RELEASED.head_dim

    def stack(name, shape=None):
        layers = [held[f"model.layers.{i}.{name}.weight"] for i in range(RELEASED.layers)]
        return np.stack([w if shape is None else w.T.reshape(shape) for w in layers])

    return {
        "embedding": held["model.embed_tokens.weight"],
        "final_norm": held["model.norm.weight"],
        "head": held["lm_head.weight"].T,
        "layers": {
            "attention_norm": stack("input_layernorm"),
            "mlp_norm": stack("post_attention_layernorm"),
            "attention": {
                **{f: stack(f"self_attn.{f[0]}_proj", (D, N, H)) for f in ("query", "key", "value")},
                "output": stack("self_attn.o_proj", (N, H, D)),
            },
            "mlp": {
                f: stack(f"mlp.{f}_proj", shape) for f, shape in (("gate", (D, -1)), ("up", (D, -1)), ("down", (-1, D)))
            },
        },
    }


@pytest.fixture(scope="module")
def released(mesh):
    return session.weights(released_params(), RELEASED, mesh)


def released_config(**changed):
    base = json.loads((DATA / "longllama_base_config.json").read_text())
    settings = {"last_context_length": base["last_context_length"]} | changed
    return experiment(RELEASED, base["max_position_embeddings"], **settings)


def check_state(state, golden, prefix):
    """Cached and stored keys and values are those of the released code, which caches keys without positions."""
    length, written = golden[f"{prefix}layer0_local_k"].shape[2], golden[f"{prefix}layer1_mem_k"].shape[2]
    assert set(state.length.tolist()) == set(np.asarray(state.cache.length).tolist()) == {length}
    assert set(state.written.tolist()) == set(np.asarray(state.memory.written).tolist()) == {written}
    for layer in range(RELEASED.layers):
        keys, values = (np.asarray(x[layer])[:, :, :length] for x in (state.cache.keys, state.cache.values))
        wanted = golden[f"{prefix}layer{layer}_local_k"]
        places = np.broadcast_to(np.arange(length), (len(keys), length))
        rotated = rope(wanted.swapaxes(1, 2), places, RELEASED.rope_theta).swapaxes(1, 2)
        np.testing.assert_allclose(keys, rotated, atol=1e-4)
        np.testing.assert_allclose(values, golden[f"{prefix}layer{layer}_local_v"], atol=1e-4)
    for index, layer in enumerate(RELEASED.memory_layers):
        stored = np.asarray(state.cache.stored[index])[:, :, :length]
        np.testing.assert_allclose(stored, golden[f"{prefix}layer{layer}_local_k"], atol=1e-4)
        keys, values = (np.asarray(x[index])[:, :, :written] for x in (state.memory.keys, state.memory.values))
        np.testing.assert_allclose(keys, golden[f"{prefix}layer{layer}_mem_k"], atol=1e-4)
        np.testing.assert_allclose(values, golden[f"{prefix}layer{layer}_mem_v"], atol=1e-4)


def test_a_long_prompt_is_read_as_the_released_code_reads_it(mesh, released):
    golden = np.load(DATA / "longllama_fwd_mem13_n200.npz")
    setup, prompts = session.setup_of(released_config(), mesh), list(golden["input_ids"].astype(np.int32))
    state, logits = session.all_logits(released, setup, session.empty(setup, 2), prompts)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
    check_state(state, golden, "pkv_")
    state, last = session.read(released, setup, session.empty(setup, 2), prompts, lambda *_: None)
    np.testing.assert_allclose(last, golden["logits"][:, -1], atol=1e-4)
    check_state(state, golden, "pkv_")


def test_decoding_is_that_of_the_released_code(mesh, released):
    golden = np.load(DATA / "longllama_decode_mem13_n50.npz")
    [prompt], ids = golden["input_ids"].astype(np.int32), golden["greedy_ids"]
    config = released_config(max_new_tokens=len(ids))
    assert [each.tolist() for each in generate.generate(released, config, [prompt], mesh)] == [ids.tolist()]
    np.testing.assert_allclose(
        generate.prompt_logits(released, config, [prompt], mesh)[0], golden["prompt_logits"][0], atol=1e-4
    )
    setup = session.setup_of(config, mesh)
    state, logits = session.read(released, setup, session.empty(setup, 1), [prompt], lambda *_: None)
    lengths = [(int(state.length[0]), int(state.written[0]))]
    for token, wanted in zip(ids, golden["step_logits"], strict=True):
        state, logits = session.advance(released, setup, state, [[int(token)]])
        np.testing.assert_allclose(logits[0], wanted, atol=1e-4)
        lengths.append((int(state.length[0]), int(state.written[0])))
    assert lengths == [tuple(each) for each in golden["layer1_local_and_mem_len"].tolist()]
    check_state(state, golden, "final_pkv_")
