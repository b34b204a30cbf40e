"""What the tests of generation share: small models, prompts, and configs."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import Mesh

from fot import config as config_lib
from fot import sharding
from fot.config import ModelConfig
from fot.layers import init

QUIET = lambda done, speed: None  # noqa: E731
SMALL = ModelConfig(
    vocab_size=48,
    layers=4,
    dim=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    memory_layers=(1, 2),
    attention_block=8,
)
TINY = dataclasses.replace(SMALL, layers=2, memory_layers=(0, 1))
WINDOW, LAST = 16, 8


def one_device() -> Mesh:
    return sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])


def experiment(model: ModelConfig, window: int, **generate) -> config_lib.ExperimentConfig:
    settings = {"last_context_length": 32, "memory_block": 64, "max_new_tokens": 8} | generate
    crossbatch = config_lib.CrossbatchConfig(variant="none")
    return config_lib.ExperimentConfig(
        model=model,
        crossbatch=crossbatch,
        data=config_lib.DataConfig(context=window),
        evaluate=config_lib.EvaluateConfig(block=16, neighbours=1000, list_size=8, probes=1000),
        generate=config_lib.GenerateConfig(**settings),
    )


def tiny_config_of(**generate):
    return experiment(TINY, WINDOW, **{"last_context_length": LAST} | generate)


def prompts_of(lengths, vocabulary=48, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, length).astype(np.int32) for length in lengths]


@functools.cache
def drawn(model: ModelConfig):
    return jax.jit(lambda key: init(key, model))(jax.random.key(1))
