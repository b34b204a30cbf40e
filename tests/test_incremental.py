"""Token after token gives what the training model gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import config as config_lib
from fot import crossbatch, generate, incremental, session
from fot import memory as memories
from fot.attention import Tokens
from fot.model import apply, unembed
from tests.generating import SMALL, drawn, experiment, one_device, prompts_of

MODELS = {
    "qk_norm_grouped": SMALL,
    "llama_bias": dataclasses.replace(SMALL, memory_positions="zero", qk_norm=False, qkv_bias=True, mlp="swiglu"),
    "gate": dataclasses.replace(SMALL, memory_layers=(2,), memory_gate=True),
    "logn": dataclasses.replace(SMALL, logn_keys=4),
    "no_memory": dataclasses.replace(SMALL, memory_layers=()),
}


@pytest.fixture(scope="module")
def mesh():
    return one_device()


def reference(model, prompt, new, window, last):
    """Greedy tokens, each by whole windows through the training model with a memory of those before."""
    params, reader = drawn(model), session.setup_of(experiment(model, window), None).reader

    @jax.jit
    def read(held, tokens, count):
        where = Tokens(jnp.where(jnp.arange(window) < count, 0, -1)[None], jnp.arange(window)[None])
        output = apply(params, tokens, where, model, memory=held, reader=reader)
        held = memories.write(held, output.keys, output.values, where.documents)
        return held, unembed(params, output.hidden[0, count - 1], model).argmax()

    begin, text, found = len(prompt) - last, prompt.tolist(), []
    spans = [(i, min(i + window, begin)) for i in range(0, begin, window)]
    for _ in range(new):
        if len(text) - begin > window:
            spans, begin = [*spans, (begin, len(text) - 1)], len(text) - 1
        held = memories.empty(len(model.memory_layers), 1, 64, model.kv_heads, model.head_dim, jnp.float32)
        for first, end in (*spans, (begin, len(text))):
            tokens = np.zeros((1, window), np.int32)
            tokens[0, : end - first] = text[first:end]
            held, token = read(held, tokens, end - first)
        found.append(int(token))
        text.append(found[-1])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_generation_is_what_the_training_model_says(name, mesh):
    model, [prompt] = MODELS[name], prompts_of([21])
    config = experiment(model, 8, last_context_length=5, max_new_tokens=9)
    wanted = reference(model, prompt, 9, 8, 5)
    assert (
        generate.generate(incremental.prepare(drawn(model), model, mesh), config, [prompt], mesh)[0].tolist() == wanted
    )


@pytest.mark.parametrize("positions", ["zero", "none"])
def test_training_and_inference_agree(positions, mesh):
    """A document packed into four rows that see all before, and the same read window by window."""
    model = dataclasses.replace(MODELS["llama_bias"], memory_positions=positions)
    [text], window = prompts_of([4 * 16]), 16
    table = crossbatch.released(
        config_lib.CrossbatchConfig(variant="released", packing=4, range=3, stepping=False), 4, 1
    )
    rows, place = jnp.array(text.reshape(4, window)), jnp.arange(4 * window).reshape(4, window)
    output = jax.jit(lambda p: apply(p, rows, Tokens(0 * rows, place), model, table=table))(drawn(model))
    wanted = unembed(drawn(model), output.hidden, model).reshape(4 * window, -1)
    config = experiment(model, window, last_context_length=window)
    found = generate.prompt_logits(incremental.prepare(drawn(model), model, mesh), config, [text], mesh)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_no_cache_is_an_empty_one_bit_for_bit(name, mesh):
    model, rows, counts = MODELS[name], prompts_of([12, 12]), np.array([12, 7], np.int32)
    params = incremental.prepare(drawn(model), model, mesh)
    extend = incremental.extension(model, session.setup_of(experiment(model, 16), mesh).reader, mesh)
    found = extend(params, np.stack(rows), counts, None, None, 16)
    empty = jax.tree.map(jnp.zeros_like, found[1])
    wanted = extend(params, np.stack(rows), counts, empty, None, 16)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
