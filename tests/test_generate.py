"""Generation is the released code's, the training model's, and each row's own."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from fot import cli, crossbatch, generate, incremental, session, sharding
from fot import config as config_lib
from fot import memory as memories
from fot.attention import Tokens, rope
from fot.config import ModelConfig
from fot.errors import UserError
from fot.model import apply, init, unembed

QUIET = lambda done, speed: None  # noqa: E731
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
        evaluate=config_lib.EvaluateConfig(block=16, neighbours=1000, list_size=8, probes=1000),
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
    return incremental.prepare(released_params(), RELEASED, mesh)


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
    state, last = session.read(released, setup, session.empty(setup, 2), prompts, QUIET)
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
    state, logits = session.read(released, setup, session.empty(setup, 1), [prompt], QUIET)
    lengths = [(int(state.length[0]), int(state.written[0]))]
    for token, wanted in zip(ids, golden["step_logits"], strict=True):
        state, logits = session.advance(released, setup, state, [[int(token)]])
        np.testing.assert_allclose(logits[0], wanted, atol=1e-4)
        lengths.append((int(state.length[0]), int(state.written[0])))
    assert lengths == [tuple(each) for each in golden["layer1_local_and_mem_len"].tolist()]
    check_state(state, golden, "final_pkv_")


def prompts_of(lengths, vocabulary=128, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, length).astype(np.int32) for length in lengths]


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
MODELS = {
    "qk_norm_grouped": SMALL,
    "llama_bias": dataclasses.replace(SMALL, memory_positions="zero", qk_norm=False, qkv_bias=True, mlp="swiglu"),
    "gate": dataclasses.replace(SMALL, memory_layers=(2,), memory_gate=True),
    "no_memory": dataclasses.replace(SMALL, memory_layers=()),
}


@functools.cache
def drawn(model: ModelConfig):
    return jax.jit(lambda key: init(key, model))(jax.random.key(1))


def prepared(model: ModelConfig, mesh):
    return incremental.prepare(drawn(model), model, mesh)


def reference(params, model, prompt, new, window, last):
    """Greedy tokens, each by whole windows through the training model with a memory of those before."""
    spans = [(i, min(i + window, len(prompt) - last)) for i in range(0, len(prompt) - last, window)]
    text, begin, found = [int(t) for t in prompt], max(len(prompt) - last, 0), []
    reader = session.setup_of(experiment(model, window), None).reader
    for _ in range(new):
        if len(text) - begin > window and len(text) - begin > len(prompt[begin:]):
            spans.append((begin, len(text) - 1))
            begin = len(text) - 1
        held = memories.empty(len(model.memory_layers), 1, 512, model.kv_heads, model.head_dim, np.float32)
        for first, end in (*spans, (begin, len(text))):
            tokens = np.array([text[first:end]], np.int32)
            where = Tokens(np.zeros_like(tokens), np.arange(end - first)[None])
            output = apply(params, tokens, where, model, memory=held, reader=reader)
            held = memories.write(held, output.keys, output.values, where.documents)
        logits = unembed(params, output.hidden[0, -1], model)
        found.append(int(logits.argmax()))
        text.append(found[-1])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_generation_is_what_the_training_model_says(name, mesh):
    model, [prompt] = MODELS[name], prompts_of([21], 48)
    config = experiment(model, 8, last_context_length=5, max_new_tokens=9)
    wanted = reference(drawn(model), model, prompt, 9, 8, 5)
    assert generate.generate(prepared(model, mesh), config, [prompt], mesh)[0].tolist() == wanted


@pytest.mark.parametrize("positions", ["zero", "none"])
def test_training_and_inference_agree(positions, mesh):
    """A document packed into four rows that see all before, and the same read window by window."""
    model = dataclasses.replace(RELEASED, memory_positions=positions)
    [text], window = prompts_of([4 * 16]), 16
    table = crossbatch.released(
        config_lib.CrossbatchConfig(variant="released", packing=4, range=3, stepping=False), 4, 1
    )
    rows, place = text.reshape(4, window), np.arange(4 * window, dtype=np.int32).reshape(4, window)
    output = apply(released_params(), rows, Tokens(np.zeros_like(rows), place), model, table=table)
    wanted = unembed(released_params(), output.hidden, model).reshape(4 * window, -1)
    config = experiment(model, window, last_context_length=window)
    found = generate.prompt_logits(incremental.prepare(released_params(), model, mesh), config, [text], mesh)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


LENGTHS = (70, 3, 32, 131, 33)


def test_a_row_gets_what_it_gets_alone(mesh, released):
    prompts = prompts_of(LENGTHS)
    config = released_config(max_new_tokens=40, temperature=1.0)
    keys = jax.random.split(jax.random.key(3), len(prompts))
    together = generate.generate(released, config, prompts, mesh, keys=keys, stop=[5, 9])
    for row, prompt in enumerate(prompts):
        alone = generate.generate(released, config, [prompt], mesh, keys=keys[row : row + 1], stop=[5, 9])[0]
        assert together[row].tolist() == alone.tolist()
    assert len({len(row) for row in together}) > 1  # they stop at their own times
    every = generate.prompt_logits(released, config, prompts, mesh)
    for prompt, logits in zip(prompts, every, strict=True):
        np.testing.assert_allclose(logits, generate.prompt_logits(released, config, [prompt], mesh)[0], atol=1e-4)


def test_pieces_that_fit_are_as_good_as_single_tokens(mesh, released):
    setup, [prompt, rest] = session.setup_of(released_config(), mesh), prompts_of([50, 90])

    def feed(sizes):
        state, _ = session.read(released, setup, session.empty(setup, 1), [prompt], QUIET)
        begin = 0
        for size in sizes:
            state, logits = session.advance(released, setup, state, [rest[begin : begin + size]])
            begin += size
        return state, np.asarray(logits)

    # 32 entries after the prompt: 32 more fit, and what follows begins a new local context.
    for sizes in ((32, 58), (7, 25, 1, 30, 27)):
        state, logits = feed(sizes)
        alone, wanted = feed([1] * 90)
        assert state.length == alone.length == 58 and state.written == alone.written == 82
        np.testing.assert_allclose(logits, wanted, atol=1e-4)
    # A piece that doesn't fit moves all that is there, whatever room was left.
    assert feed((20, 30))[0].length == 30


def test_a_text_after_a_cache_is_read_in_windows(mesh, released):
    setup, [prompt, rest] = session.setup_of(released_config(), mesh), prompts_of([50, 120])
    start, _ = session.read(released, setup, session.empty(setup, 1), [prompt], QUIET)
    state, logits = session.read(released, setup, start, [rest], QUIET)
    other, _ = session.read(released, setup, session.empty(setup, 1), [prompt], QUIET)
    for part in (rest[:64], rest[64:88], rest[88:]):
        other, wanted = session.advance(released, setup, other, [part])
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    assert state.length == other.length and state.written == other.written


READER_MESHES = {name: config_lib.MeshConfig(sequence=4, tensor=2) for name in ("sharded_dense", "sharded_knn")}


@pytest.mark.parametrize("reader", [name for name in config_lib.READER_NAMES if name != "dense"])
def test_readers_that_find_everything_generate_what_dense_does(reader, mesh, released):
    prompts = prompts_of((150, 70))
    config = released_config(max_new_tokens=40)
    wanted = generate.generate(released, config, prompts, mesh)
    on, params = mesh, released
    if reader in READER_MESHES:
        on = sharding.make_mesh(READER_MESHES[reader], jax.devices())
        params = incremental.prepare(released_params(), RELEASED, on)
    found = generate.generate(params, released_config(max_new_tokens=40, reader=reader), prompts, on)
    assert [row.tolist() for row in found] == [row.tolist() for row in wanted]


def test_rows_and_heads_are_spread_over_devices(mesh, released):
    prompts, many = prompts_of((90, 40, 7)), sharding.make_mesh(config_lib.MeshConfig(tensor=2), jax.devices())
    config = released_config(max_new_tokens=30)
    found = generate.generate(incremental.prepare(released_params(), RELEASED, many), config, prompts, many)
    wanted = generate.generate(released, config, prompts, mesh)
    assert [row.tolist() for row in found] == [row.tolist() for row in wanted]


def test_a_bfloat16_memory_is_close(mesh, released):
    setup, prompts = session.setup_of(released_config(memory_dtype="bfloat16"), mesh), prompts_of([200])
    state, logits = session.read(released, setup, session.empty(setup, 1), prompts, QUIET)
    assert state.memory.keys.dtype == state.memory.values.dtype == jax.numpy.bfloat16
    exact = generate.prompt_logits(released, released_config(), prompts, mesh)[0][-1]
    assert 0 < np.abs(logits[0] - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("last", [1, 64, 100])
def test_any_last_context_length(last, mesh, released):
    """Longer than the window, too: its entries move as soon as a token follows."""
    setup, prompts = session.setup_of(released_config(last_context_length=last), mesh), prompts_of((90, 5))
    state, _ = session.read(released, setup, session.empty(setup, 2), prompts, QUIET)
    assert state.length.tolist() == [min(90, last), min(5, last)]
    state, logits = session.advance(released, setup, state, [[7], [7]])
    moved = last >= 64
    assert state.length.tolist() == [1 if moved else 2, min(5, last) + 1]
    assert state.written.tolist() == [90 if moved else 89, max(5 - last, 0)]
    assert np.isfinite(logits).all()


def test_stop_tokens_and_streaming(mesh, released):
    prompts, config = prompts_of((40, 12)), released_config(max_new_tokens=12)
    whole = generate.generate(released, config, prompts, mesh)
    steps = np.stack(list(generate.stream(released, config, prompts, mesh)), 1)
    assert steps.tolist() == [row.tolist() for row in whole] and steps.shape == (2, 12)
    stop = int(whole[0][5])
    found = generate.generate(released, config, prompts, mesh, stop=[stop])
    for row, wanted in zip(found, whole, strict=True):
        ends = np.flatnonzero(wanted == stop)
        assert row.tolist() == wanted[: ends[0] if len(ends) else None].tolist()
    assert generate.generate(released, released_config(max_new_tokens=0), prompts, mesh)[1].tolist() == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate.generate(released, config, [prompts[0], []], mesh)


def test_greedy_is_the_only_likeliest(mesh, released):
    prompts = prompts_of((40,))
    greedy, single = (
        generate.generate(released, released_config(**settings), prompts, mesh)[0].tolist()
        for settings in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 1, "seed": 5})
    )
    assert greedy == single


def test_loading_compiles_once_whatever_the_length(mesh, released, compilations):
    config = released_config(max_new_tokens=2, memory_block=512)
    generate.generate(released, config, prompts_of((100,)), mesh)
    with compilations() as seen:
        for length in (40, 97, 160, 300):
            generate.generate(released, config, prompts_of((length,)), mesh)
    assert not seen


def test_the_memory_grows_when_it_has_to(mesh, released):
    """By blocks, with the result of one that was large enough from the beginning."""
    prompts = prompts_of((50,))
    small, large = (released_config(max_new_tokens=200, memory_block=block) for block in (64, 1024))
    found, wanted = (generate.generate(released, config, prompts, mesh) for config in (small, large))
    assert found[0].tolist() == wanted[0].tolist() and len(found[0]) == 200


def test_a_memory_from_elsewhere_comes_before_the_prompt(mesh, released):
    setup, [before, prompt] = session.setup_of(released_config(), mesh), prompts_of((128, 40))
    # Two windows that are wholly in memory, and what follows them.
    state, _ = session.read(released, setup, session.empty(setup, 1), [np.concatenate([before, prompt[:32]])], QUIET)
    held = jax.device_get(state.memory)
    wanted = session.read(released, setup, session.empty(setup, 1), [np.concatenate([before, prompt[:32]])], QUIET)[1]
    for rows in (1, 2):
        state = session.remember(setup, session.empty(setup, rows), held)
        assert state.written.tolist() == [128] * rows
        logits = session.read(released, setup, state, [prompt[:32]] * rows, QUIET)[1]
        np.testing.assert_allclose(logits, np.broadcast_to(wanted, logits.shape), atol=1e-5)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(generate.main, generate.Flags, generate.__doc__, generate.load, words)
    return caught.value.code


def test_the_command(workdirs, tmp_path, capsys):
    context = tmp_path / "context.txt"
    context.write_text("word1 & line <2>\n" * 12)
    words = (f"--workdir={workdirs / 'focused'}", f"--context={context}", "--prompt=wörd")
    words += (
        "--config.generate.max_new_tokens=20",
        "--config.generate.temperature=1",
        "--config.generate.memory_block=64",
    )
    words += ("--config.generate.last_context_length=6",)
    assert run(*words) == 0
    first = capsys.readouterr()
    assert first.out.endswith("\n") and "window 26/26" in first.err
    assert run(*words) == 0 and capsys.readouterr().out == first.out
    assert run(*words, "--config.generate.seed=1") == 0 and capsys.readouterr().out != first.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workdir=/no/such/folder",), "no complete checkpoint in /no/such/folder"),
        (("--workdir={}/focused", "--context=/no/such.txt"), "can't read --context=/no/such.txt"),
        (("--workdir={}/focused", "--memory=/no/such"), "no memory in /no/such"),
        (("--workdir={}/focused", "--config.generate.reader=denze"), "did you mean 'dense'?"),
        (("--workdir={}/focused", "--config.generate.top_p=0"), "generate.top_p=0.0 must be above 0"),
    ],
)
def test_errors_of_the_command(workdirs, words, message, capsys):
    assert run(*(word.format(workdirs) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_help(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "--prompt" in shown and "--config.generate.last_context_length=1024" in shown
