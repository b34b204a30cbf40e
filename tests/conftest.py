"""Eight CPU devices for every test, and the configs that tests share."""

import atexit
import os
import shutil
import tempfile

# Tests compile much and run little: compile without optimising, and what several tests or their processes need once.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fot-tests-")
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from fot import config as config_lib  # noqa: E402


@pytest.fixture
def tiny_config() -> config_lib.ExperimentConfig:
    """A valid run of four layers, as small as runs get: 8 rows of 16 tokens."""
    return config_lib.ExperimentConfig(
        model=config_lib.ModelConfig(dim=32, head_dim=8, mlp_dim=64, attention_block=16),
        data=config_lib.DataConfig(tokenizer="bytes", context=16, min_document_tokens=(32,)),
        optimizer=config_lib.OptimizerConfig(warmup_steps=2),
        train=config_lib.TrainConfig(
            steps=4, log_every=1, evaluate_every=2, evaluate_batches=1, checkpoint_every=2, keep_last=2
        ),
        evaluate=config_lib.EvaluateConfig(
            memory=(0, 16, 64), neighbours=8, block=16, max_documents=2, max_tokens=64, position_bins=(16, 64)
        ),
    )
