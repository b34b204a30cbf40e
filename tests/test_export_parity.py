"""An exported LongLLaMA gives in PyTorch what its workdir gives here, with the memory in use."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest

from fot import cli, generate, incremental, model
from fot.checkpoint import Checkpointer
from fot.config import ExperimentConfig, RopeScalingConfig
from fot.convert import __main__ as command
from fot.session import PADDING
from tests.generating import SMALL, experiment, one_device

WINDOW = 16
MODEL = dataclasses.replace(SMALL, mlp="swiglu", memory_positions="zero", qk_norm=False, tied_embeddings=False)
MODELS = {
    "several": MODEL,
    "one": dataclasses.replace(MODEL, memory_layers=(2,), tied_embeddings=True, rope_theta=1e6),
    "none": dataclasses.replace(MODEL, memory_layers=(), kv_heads=4),
    "no_positions": dataclasses.replace(MODEL, memory_positions="none", kv_heads=1),
    "logn": dataclasses.replace(MODEL, logn_keys=10),
    "bias_llama3": dataclasses.replace(
        MODEL,
        qkv_bias=True,
        rope_scaling=RopeScalingConfig("llama3", factor=4.0, original_context=WINDOW),
    ),
}
WINDOWS = (0.5, 1, 1.5, 3, 10)


def config_of(name: str, last: int, new_tokens: int = 1) -> ExperimentConfig:
    return experiment(MODELS[name], WINDOW, last_context_length=last, max_new_tokens=new_tokens)


@functools.cache
def drawn(name: str):
    """Parameters so large that attention is far from uniform; norms and biases too differ from their first value."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), MODELS[name]))
    noise = np.random.default_rng(0)

    def draw(path, leaf):
        values = noise.normal(size=leaf.shape).astype(np.float32)
        return 1 + 0.1 * values if path[-1].key.endswith("norm") else 0.3 * values

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """Each model as a workdir, and exported."""
    root = tmp_path_factory.mktemp("parity")
    for name in MODELS:
        config = config_of(name, WINDOW)
        with Checkpointer(root / name / "checkpoints", config.train) as checkpoints:
            checkpoints.save(0, {"params": drawn(name)}, {}, config)
        words = ("--from=fot", f"--source={root / name}", "--to=longllama", f"--target={root / name}_torch")
        parsed = cli.parse((*words, "--mem_dtype=f32"), command.Flags, command.__doc__, command.load)
        command.main(parsed.config, parsed.flags)
    return root


@pytest.fixture(scope="module")
def torch_models(folders, remote_code):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    yield {
        name: AutoModelForCausalLM.from_pretrained(f"{folders / name}_torch", trust_remote_code=True) for name in MODELS
    }
    torch.set_grad_enabled(True)


def ours(name: str, prompts: list[np.ndarray], last: int) -> list[np.ndarray]:
    mesh, config = one_device(), config_of(name, last)
    params = incremental.prepare(drawn(name), MODELS[name], mesh)
    return generate.prompt_logits(params, config, prompts, mesh)


def theirs(exported, rows: np.ndarray, last: int) -> list[np.ndarray]:
    """Logits at the tokens of each row, `PADDING` being masked."""
    import torch

    mask = torch.from_numpy((rows != PADDING).astype(np.int64))
    ids = torch.from_numpy(np.maximum(rows, 0).astype(np.int64))
    logits = exported(ids, attention_mask=mask, last_context_length=last).logits.numpy()
    return [row[real] for row, real in zip(logits, rows != PADDING, strict=True)]


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, length)).integers(3, 48, length).astype(np.int32)


@pytest.mark.parametrize("last", [1, pytest.param(7, marks=pytest.mark.slow), WINDOW])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_prompts_of_any_length(name, last, torch_models):
    for windows in WINDOWS:
        rows = np.stack([prompt(int(windows * WINDOW), seed) for seed in range(2)])
        found, wanted = ours(name, list(rows), last), theirs(torch_models[name], rows, last)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_padded_batches(name, side, torch_models):
    lengths, most = (8, 24, 37, 48), 48
    rows = np.full((len(lengths), most), PADDING, np.int32)
    for row, length in zip(rows, lengths, strict=True):
        row[slice(most - length, None) if side == "left" else slice(length)] = prompt(length)
    for last in (7, WINDOW):
        for found, wanted in zip(ours(name, list(rows), last), theirs(torch_models[name], rows, last), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["several", "none", pytest.param("no_positions", marks=pytest.mark.slow)])
def test_greedy_tokens_across_overflows(name, torch_models):
    """Padding by whole windows, as the PyTorch model, like the released code, moves the cache of all rows at once."""
    import torch

    last, count = 7, 200
    texts = [prompt(5 * WINDOW // 2), prompt(9 * WINDOW // 2)]
    rows = np.stack([np.pad(text, (9 * WINDOW // 2 - len(text), 0), constant_values=PADDING) for text in texts])
    exported = torch_models[name]
    exported.config.last_context_length = last
    wanted = exported.generate(
        torch.from_numpy(np.maximum(rows, 0).astype(np.int64)),
        attention_mask=torch.from_numpy((rows != PADDING).astype(np.int64)),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[:, rows.shape[1] :]
    mesh = one_device()
    params = incremental.prepare(drawn(name), MODELS[name], mesh)
    found = generate.generate(params, config_of(name, last, count), texts, mesh)
    np.testing.assert_array_equal(np.stack(found), wanted.numpy())
    assert len(np.unique(wanted)) > 10  # it doesn't only repeat itself
