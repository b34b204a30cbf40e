"""Properties of generation: rows are alone, tokens stream, programs are few; and the command."""

import jax
import numpy as np
import pytest

from fot import cli, generate, incremental, trained
from fot.errors import UserError
from tests.generating import TINY, drawn, one_device, prompts_of, tiny_config_of


@pytest.fixture(scope="module")
def mesh():
    return one_device()


@pytest.fixture(scope="module")
def tiny(mesh):
    return incremental.prepare(drawn(TINY), TINY, mesh)


def test_a_row_gets_what_it_gets_alone(mesh, tiny):
    prompts = prompts_of((37, 3, 8))
    config = tiny_config_of(max_new_tokens=24, temperature=1.0)
    keys = jax.random.split(jax.random.key(3), len(prompts))
    together = generate.generate(tiny, config, prompts, mesh, keys=keys, stop=range(6))
    for row, prompt in enumerate(prompts):
        alone = generate.generate(tiny, config, [prompt], mesh, keys=keys[row : row + 1], stop=range(6))[0]
        assert together[row].tolist() == alone.tolist()
    assert len({len(row) for row in together}) > 1  # they stop at their own times
    every = generate.prompt_logits(tiny, config, prompts, mesh)
    for prompt, logits in zip(prompts, every, strict=True):
        np.testing.assert_allclose(logits, generate.prompt_logits(tiny, config, [prompt], mesh)[0], atol=1e-4)


def test_stop_tokens_and_streaming(mesh, tiny):
    prompts, config = prompts_of((20, 12)), tiny_config_of(max_new_tokens=12)
    whole = generate.generate(tiny, config, prompts, mesh)
    steps = np.stack(list(generate.stream(tiny, config, prompts, mesh)), 1)
    assert steps.tolist() == [row.tolist() for row in whole] and steps.shape == (2, 12)
    stop = int(whole[0][5])
    found = generate.generate(tiny, config, prompts, mesh, stop=[stop])
    for row, wanted in zip(found, whole, strict=True):
        ends = np.flatnonzero(wanted == stop)
        assert row.tolist() == wanted[: ends[0] if len(ends) else None].tolist()
    assert generate.generate(tiny, tiny_config_of(max_new_tokens=0), prompts, mesh)[1].tolist() == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate.generate(tiny, config, [prompts[0], []], mesh)


def test_greedy_is_the_only_likeliest(mesh, tiny):
    prompts = prompts_of((20,))
    greedy, single = (
        generate.generate(tiny, tiny_config_of(**settings), prompts, mesh)[0].tolist()
        for settings in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 1, "seed": 5})
    )
    assert greedy == single


def test_loading_compiles_once_whatever_the_length(mesh, tiny, compilations):
    config = tiny_config_of(max_new_tokens=2, memory_block=512)
    generate.generate(tiny, config, prompts_of((20,)), mesh)
    with compilations() as seen:
        for length in (9, 24, 97, 300):
            generate.generate(tiny, config, prompts_of((length,)), mesh)
    assert not seen


def test_the_memory_grows_when_it_has_to(mesh, tiny):
    """By blocks, with the result of one that was large enough from the beginning."""
    prompts = prompts_of((20,))
    small, large = (tiny_config_of(max_new_tokens=80, memory_block=block) for block in (32, 512))
    found, wanted = (generate.generate(tiny, config, prompts, mesh) for config in (small, large))
    assert found[0].tolist() == wanted[0].tolist() and len(found[0]) == 80


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(generate.main, generate.Flags, generate.__doc__, trained.config_named, words)
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
