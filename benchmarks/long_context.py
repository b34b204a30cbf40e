"""What a long prompt costs: tokens/s of reading it and of decoding after it, and peak memory, by its length.

  python -m benchmarks.long_context                       # all lengths, in JAX
  python -m benchmarks.long_context --framework=torch     # the same with the PyTorch model of an export
  python -m benchmarks.long_context --case=32k            # one length, in this process
  python -m benchmarks.long_context --quick               # everything, tiny: shows that it works, measures nothing

stdout has JSON alone: a line a case, each measured in a fresh process. A case reads a prompt of random tokens into the
memory of a model with random weights, and decodes some greedily. In JAX a shorter prompt is read before, so that
compilation is not counted; it counts for peak memory.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tqdm

from benchmarks.crossbatch import HUGE_PAGES, peak_rss_bytes
from fot import config as config_lib
from fot.config import ModelConfig

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
      lengths: name of a case -> tokens of the prompt.
      model: the model.
      window: tokens of a window.
      last_context_length: tokens at the end of the prompt that stay in the local context.
      decoded: tokens decoded after it.
    """

    lengths: dict[str, int]
    model: ModelConfig
    window: int
    last_context_length: int
    decoded: int


MODEL = ModelConfig(
    vocab_size=1024,
    layers=12,
    dim=512,
    heads=8,
    kv_heads=8,
    head_dim=64,
    mlp_dim=1376,
    mlp="swiglu",
    memory_layers=(8,),
    memory_positions="zero",
    qk_norm=False,
    tied_embeddings=False,
    attention_block=256,
)
TINY = dataclasses.replace(MODEL, layers=3, dim=32, heads=2, kv_heads=2, head_dim=16, mlp_dim=64, memory_layers=(1,))
SIZES = {
    "full": Size({"8k": 2**13, "32k": 2**15, "128k": 2**17}, MODEL, window=2048, last_context_length=1024, decoded=16),
    "quick": Size({"8k": 2**8, "32k": 2**9, "128k": 2**10}, TINY, window=64, last_context_length=32, decoded=4),
}
MEMORY_DTYPES = {"8k": "float32", "32k": "float32", "128k": "float32"}  # bfloat16 is slow to read on a CPU


class Times(NamedTuple):
    """Seconds of reading the prompt, and of decoding after it."""

    load: float
    decode: float


def prompt(length: int, size: Size) -> np.ndarray:
    """Returns random tokens."""
    return np.random.default_rng(length).integers(0, size.model.vocab_size, length).astype(np.int32)


def measure_jax(length: int, size: Size, memory_dtype: str) -> Times:
    """Reads and decodes with `fot.session`."""
    import jax

    from fot import incremental, lean, model, session, sharding

    lean.return_freed()
    settings = config_lib.GenerateConfig(last_context_length=size.last_context_length, memory_dtype=memory_dtype)
    config = config_lib.ExperimentConfig(
        model=size.model,
        crossbatch=config_lib.CrossbatchConfig(variant="none"),
        data=config_lib.DataConfig(context=size.window),
        generate=settings,
        evaluate=config_lib.EvaluateConfig(block=size.model.attention_block),
    )
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices())
    init = jax.jit(lambda key: model.init(key, size.model), compiler_options=lean.compiler_options(mesh))
    params = incremental.prepare(init(jax.random.key(0)), size.model, mesh)
    del init  # a trained model, whose parameters are read, has no such program
    setup = session.setup_of(config, mesh)

    def run(tokens: np.ndarray) -> Times:
        entries = session.entries_of(setup, length, size.decoded)
        state = session.reserve(setup, session.empty(setup, 1), entries)
        began = time.perf_counter()
        state, logits = session.read(params, setup, state, [tokens], lambda done, speed: None)
        token = int(np.asarray(logits).argmax())
        read = time.perf_counter()
        for _ in range(size.decoded):
            state, logits = session.advance(params, setup, state, [[token]])
            token = int(np.asarray(logits).argmax())
        return Times(read - began, time.perf_counter() - read)

    run(prompt(size.window + size.last_context_length, size))
    return run(prompt(length, size))


def measure_torch(length: int, size: Size, memory_dtype: str) -> Times:
    """Reads and decodes with the PyTorch model that an export ships with."""
    import torch

    from fot.convert.torch_model.modeling_longllama import LongLlamaConfig, LongLlamaForCausalLM

    model = size.model
    torch.manual_seed(0)
    made = LongLlamaForCausalLM(
        LongLlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.dim,
            intermediate_size=model.mlp_dim,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            max_position_embeddings=size.window,
            last_context_length=size.last_context_length,
            mem_layers=list(model.memory_layers),
            mem_dtype=memory_dtype,
            tie_word_embeddings=False,
        )
    ).eval()
    tokens = torch.from_numpy(prompt(length, size).astype(np.int64))[None]
    with torch.inference_mode():
        began = time.perf_counter()
        found = made(tokens, use_cache=True, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(size.decoded):
            token = found.logits[:, -1:].argmax(-1)
            found = made(token, past_key_values=found.past_key_values, use_cache=True, logits_to_keep=1)
        return Times(read - began, time.perf_counter() - read)


FRAMEWORKS: dict[str, Callable[[int, Size, str], Times]] = {"jax": measure_jax, "torch": measure_torch}


def run_case(name: str, framework: str, size_name: str) -> Line:
    """Measures one length in this process."""
    size = SIZES[size_name]
    times = FRAMEWORKS[framework](size.lengths[name], size, MEMORY_DTYPES[name])
    return {
        "case": name,
        "framework": framework,
        "size": size_name,
        "tokens": size.lengths[name],
        "memory_dtype": MEMORY_DTYPES[name],
        "load_tokens_per_second": size.lengths[name] / times.load,
        "decode_tokens_per_second": size.decoded / times.decode,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def run_fresh(name: str, framework: str, size_name: str) -> Line:
    """Measures one length in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.long_context", f"--case={name}", f"--framework={framework}"]
    command += ["--quick"] if size_name == "quick" else []
    done = subprocess.run(command, env=os.environ | HUGE_PAGES, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: case {name} ended with code {done.returncode}; see above, and run it alone by --case={name}")
    return json.loads(done.stdout)


def main(flags: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_context", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=SIZES["full"].lengths, help="measure this case alone, in this process")
    parser.add_argument("--framework", choices=FRAMEWORKS, default="jax", help="what reads and decodes")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="tiny sizes")
    arguments = parser.parse_args(flags)
    if arguments.case:
        print(json.dumps(run_case(arguments.case, arguments.framework, arguments.size)), flush=True)
        return
    with tqdm.tqdm([*SIZES[arguments.size].lengths], file=sys.stderr, unit="case") as progress:
        for name in progress:
            progress.set_postfix_str(name)
            print(json.dumps(run_fresh(name, arguments.framework, arguments.size)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
