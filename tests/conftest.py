"""Eight CPU devices for every test, and the configs that tests share."""

import atexit
import contextlib
import dataclasses
import gc
import os
import pathlib
import shutil
import signal
import sys
import tempfile

# Where tests run in the background, Ctrl-C is ignored, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests compile much and run little: programs are made fast, not to be fast, and once for all who need them.
UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{UNOPTIMISED} --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fot-tests-")
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from fot import config as config_lib  # noqa: E402
from fot import model  # noqa: E402
from fot.checkpoint import Checkpointer  # noqa: E402

LONGEST = ("test_train_step.py", "test_lossless.py", "test_export_parity.py", "test_train.py", "test_notebooks.py")
LONGEST += ("test_bucket_training.py",)


def pytest_collection_modifyitems(items):
    """The longest files first: side by side with others, none is left to run alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """Drops the programs of each file: each maps memory, and a process may have so many maps, then XLA crashes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def compilations():
    """A context manager that gives a list, which grows with every program that is compiled."""

    @contextlib.contextmanager
    def counted():
        seen = []

        def listen(event, *_, **__):
            if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
                seen.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield seen
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return counted


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


@pytest.fixture(scope="session")
def workdirs(tmp_path_factory) -> pathlib.Path:
    """A folder with two runs, focused/ and plain/, that never trained: step 7 of the same parameters."""
    folder = tmp_path_factory.mktemp("runs")
    for number in range(24):
        lines = [f"word{number * line % 17} & line <{line}>" for line in range(12)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    base = config_lib.ExperimentConfig(
        model=config_lib.ModelConfig(layers=2, dim=32, head_dim=8, mlp_dim=64, memory_layers=(1,), attention_block=8),
        data=config_lib.DataConfig(
            task=("files",),
            files=(f"{folder}/*.txt",),
            tokenizer="bytes",
            context=8,
            min_document_tokens=(16,),
            held_out_fraction=0.5,
            cache_dir=str(folder / "cache"),
        ),
        evaluate=config_lib.EvaluateConfig(
            memory=(0, 64), neighbours=8, block=16, batch_size=4, contexts=(1, 4), query_windows=8, max_tokens=64
        ),
        mesh=config_lib.MeshConfig(tensor=2, fsdp=4),
    )
    params = jax.jit(lambda key: model.init(key, base.model))(jax.random.key(0))
    for name, variant in (("focused", "previous"), ("plain", "none")):
        run = dataclasses.replace(base, crossbatch=config_lib.CrossbatchConfig(variant=variant))
        with Checkpointer(folder / name / "checkpoints", run.train) as checkpoints:
            checkpoints.save(7, {"params": params}, {}, run)
    return folder


@pytest.fixture(scope="module")
def remote_code(tmp_path_factory):
    """Code that ships with checkpoints is imported from a folder of the test file's own, and forgotten after it."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def without_gradients():
    """PyTorch's are off, and it has one thread: models this small only wait for a second one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
