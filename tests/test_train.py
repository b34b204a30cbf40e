"""Properties of training: sharded equals single-device, resuming equals not stopping, and bad steps are skipped."""

import dataclasses

import jax
import numpy as np
import pytest

from fot import sharding, train, train_step, trained
from fot.batch import Batch
from fot.config import CrossbatchConfig, ExperimentConfig, MeshConfig
from fot.errors import CheckpointError, ConfigError, TrainingError, UserError
from fot.metrics import read_metrics
from fot.profiling import Span

SMALL = dict(layers=2, memory_layers=(1,))  # compiling is what these tests spend their time on


def replace(config: ExperimentConfig, **groups) -> ExperimentConfig:
    """Returns the config with fields of its groups replaced."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in groups.items()}
    )


@pytest.fixture
def config(tiny_config, tmp_path) -> ExperimentConfig:
    """A run on twenty documents of random words."""
    random = np.random.default_rng(0)
    (tmp_path / "documents").mkdir()
    for number in range(20):
        words = random.choice(["alpha ", "beta ", "gamma ", "delta\n"], size=int(random.integers(20, 60)))
        (tmp_path / "documents" / f"{number}.txt").write_text("".join(words))
    return replace(
        tiny_config,
        model=SMALL,
        data=dict(
            task=("files",),
            files=(str(tmp_path / "documents" / "*.txt"),),
            cache_dir=str(tmp_path / "cache"),
            held_out_fraction=0.3,
        ),
        mesh=dict(data=1, fsdp=8),
        crossbatch=dict(d=(2,)),
    )


def one_step(config: ExperimentConfig, devices: int):
    """Returns state and metrics after two steps on random rows."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    sharding.check_mesh(mesh, config)
    shape = config.data.batch_size, config.data.context
    random = np.random.default_rng(1)
    tokens = random.integers(0, 200, shape, dtype=np.int32)
    documents = np.repeat(np.arange(shape[0] // 2, dtype=np.int32), 2)[:, None] * np.ones(shape, np.int32)
    positions = np.arange(2 * shape[1], dtype=np.int32).reshape(2, -1)[np.arange(shape[0]) % 2]
    batch = Batch(tokens, np.roll(tokens, -1, 1), np.ones(shape, np.float32), documents, positions)
    shardings = sharding.shardings(jax.eval_shape(lambda: train_step.init_state(config)), mesh)
    step = train_step.compile_step(config, mesh, config.crossbatch.d[0])
    state = jax.jit(lambda: train_step.init_state(config), out_shardings=shardings)()
    for _ in range(2):
        state, metrics = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
    return jax.device_get((state, metrics))


def test_steps_with_bad_gradients_change_counts_alone(tiny_config):
    config = replace(
        tiny_config, model=SMALL, crossbatch=dict(d=(1, 2), d_schedule="accuracy"), optimizer=dict(warmup_steps=0)
    )
    shape = config.data.batch_size, config.data.context
    zeros = np.zeros(shape, np.int32)  # the target that argmax finds among logits that are all NaN
    positions = np.arange(shape[1], dtype=np.int32) + zeros
    batch = Batch(zeros, zeros, np.ones(shape, np.float32), np.arange(shape[0])[:, None] + zeros, positions)
    step = jax.jit(lambda state, batch: train_step.train_step(state, batch, config, 1))
    fresh = jax.jit(lambda: train_step.init_state(config))()
    good, metrics = step(fresh, batch)
    assert (int(good.step), int(good.skipped), int(metrics.skipped_in_a_row)) == (1, 0, 0)

    bad = good._replace(params=good.params | {"final_norm": good.params["final_norm"].at[0].set(np.nan)})
    before = jax.tree.map(np.array, bad)
    for count in (1, 2):
        bad, metrics = step(bad, batch)
        np.testing.assert_array_equal(jax.device_get(metrics.skipped_in_a_row), count)
        jax.tree.map(np.testing.assert_array_equal, (bad.params, bad.optimizer), (before.params, before.optimizer))
        assert (int(bad.step), int(bad.skipped), int(bad.phase)) == (1 + count, count, int(good.phase))

    mended, metrics = step(bad._replace(params=good.params), batch)
    assert (int(mended.step), int(mended.skipped), int(mended.skipped_in_a_row)) == (4, 2, 0)
    assert (mended.params["final_norm"] != good.params["final_norm"]).any()


def test_accumulation_changes_nothing_but_rounding(tiny_config):
    plain = replace(tiny_config, model=SMALL, crossbatch=dict(variant="none"), mesh=dict(data=1, fsdp=1))
    state, whole = one_step(plain, 1)
    other, parts = one_step(replace(plain, train=dict(accumulation=4)), 1)
    for left, right in zip(jax.tree.leaves(other.optimizer), jax.tree.leaves(state.optimizer), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(parts.gradient_norm, whole.gradient_norm, rtol=1e-5)


def test_the_checksum_of_a_batch_changes_with_every_value_and_every_swap_but_not_with_the_mesh():
    random = np.random.default_rng(0)
    tokens, targets, documents, positions = random.integers(0, 9, (4, 8, 6), dtype=np.int32)
    batch = Batch(tokens, targets, np.ones((8, 6), np.float32), documents, positions)
    checksum = jax.jit(train_step.checksum)
    there = sharding.batch_sharding(sharding.make_mesh(MeshConfig(), jax.devices()))
    assert checksum(jax.device_put(batch, there)) == checksum(batch)
    swapped = batch._replace(tokens=tokens[[1, 0, *range(2, 8)]])
    moved = batch._replace(tokens=targets, targets=tokens)
    changed = [
        f._replace(**{n: v + (np.arange(48).reshape(8, 6) == 7)}) for f in [batch] for n, v in f._asdict().items()
    ]
    changed = [jax.tree.map(lambda x, y: x.astype(y.dtype), each, batch) for each in changed]
    assert len({int(checksum(each)) for each in (batch, swapped, moved, *changed)}) == 3 + len(changed)


@pytest.mark.parametrize(("field", "mesh"), [("mesh.data=3", dict(data=3)), ("heads=4", dict(fsdp=1, tensor=8))])
def test_a_mesh_that_does_not_fit_is_one_line(tiny_config, field, mesh):
    with pytest.raises(ConfigError, match=field) as error:
        sharding.check_mesh(sharding.make_mesh(MeshConfig(**mesh), jax.devices()), tiny_config)
    assert "\n" not in str(error.value)


def test_a_parameter_without_axes_is_refused():
    with pytest.raises(ValueError, match="unheard_of"):
        sharding.shardings({"unheard_of": np.zeros(3)}, sharding.make_mesh(MeshConfig(), jax.devices()))


def test_schedules_of_d():
    def d(step, phase=0, **fields):
        return train_step.d_at(CrossbatchConfig(**fields), step, phase, 0)

    assert d(99, d=(2,)) == 2
    steps = dict(d=(1, 4, 8), d_schedule="steps", d_steps=(10, 20))
    assert [d(step, **steps) for step in (0, 9, 10, 19, 20, 99)] == [1, 1, 4, 4, 8, 8]
    assert [d(5, phase, d=(1, 8), d_schedule="accuracy") for phase in (0, 1)] == [1, 8]
    draws = [d(step, d=(2, 8), d_schedule="random") for step in range(40)]
    assert set(draws) == {2, 8} and draws == [d(step, d=(2, 8), d_schedule="random") for step in range(40)]


def losses(workdir) -> list:
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in read_metrics(workdir / "metrics.jsonl")]


def test_a_run_that_stops_and_goes_on_is_the_run_that_did_not_stop(config, tmp_path):
    lines = []
    half = replace(config, train=dict(steps=2, evaluate_every=0), optimizer=dict(schedule="constant"))
    whole = replace(half, train=dict(steps=4))
    train.train(half, tmp_path / "resumed", lines.append)
    resumed = train.train(whole, tmp_path / "resumed", lines.append)
    with_losses = replace(whole, train=dict(evaluate_every=4))
    straight = train.train(with_losses, tmp_path / "straight", lambda line: None, traced=Span(1, 3))
    assert list((tmp_path / "straight" / "profile").rglob("*.xplane.pb"))
    assert any("going on from the checkpoint of step 2" in line for line in lines)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    assert int(straight.step) == 4
    # The same command after the end trains no further, and another config is refused with the field that differs.
    again = train.train(whole, tmp_path / "resumed", lines.append)
    jax.tree.map(np.testing.assert_array_equal, again, resumed)
    with pytest.raises(CheckpointError, match=r"optimizer.learning_rate: 0.004 → 0.1") as error:
        train.train(replace(whole, optimizer=dict(learning_rate=0.1)), tmp_path / "resumed", lines.append)
    assert "\n" not in str(error.value)
    line = read_metrics(tmp_path / "straight" / "metrics.jsonl")[-1]
    assert {"learning_rate", "d", "tokens_per_second", "model_flops_per_second", "held_out/loss"} <= line.keys()
    assert {"data_wait", "tokens/files"} <= line.keys()
    assert line["step_time"] == pytest.approx(line["data_wait"] + line["compute_time"]) and line["save_wait"] >= 0
    read = [line["tokens/files"] for line in read_metrics(tmp_path / "resumed" / "metrics.jsonl")]
    assert read == [step * whole.data.batch_size * whole.data.context for step in (1, 2, 3, 4)]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_through_a_change_of_d(config, tmp_path):
    config = replace(
        config,
        train=dict(steps=5, evaluate_every=0, checkpoint_every=2),
        crossbatch=dict(d=(1, 2), d_schedule="steps", d_steps=(3,)),
    )

    def die(line):
        if "d = 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "killed", die)
    lines = []
    resumed = train.train(config, tmp_path / "killed", lines.append)
    straight = train.train(config, tmp_path / "straight", lambda line: None)
    assert "going on from the checkpoint of step 2" in lines[1]
    assert [line.split(" in ")[0] for line in lines[2:]] == [
        "step 2: compiled the train step for d = 1",
        "step 3: compiled the train step for d = 2",
    ]
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert [line["d"] for line in read_metrics(tmp_path / "straight" / "metrics.jsonl")] == [1, 1, 1, 2, 2]


def test_a_run_lost_at_its_end_names_the_checkpoint_to_return_to(config, tmp_path):
    lost = replace(
        config,
        optimizer=dict(learning_rate=1e38, warmup_steps=0, schedule="constant", clip_norm=0.0),
        train=dict(steps=5, max_skipped=3, evaluate_every=0, checkpoint_every=2),
    )
    with pytest.raises(TrainingError, match=r"up to step 5 .*documents \[\d.*newest checkpoint is of step 4"):
        train.train(lost, tmp_path / "lost", lambda line: None)


def test_bad_gradients_skip_the_step_and_too_many_end_the_run(config, tmp_path):
    # An overflowing learning rate makes the parameters, and every later gradient, infinite.
    broken = replace(
        config,
        optimizer=dict(learning_rate=1e38, warmup_steps=0, schedule="constant", clip_norm=0.0),
        train=dict(steps=40, max_skipped=3, evaluate_every=0, checkpoint_every=100),
    )
    with pytest.raises(TrainingError, match="not finite for .* steps in a row, up to step .*documents") as error:
        train.train(broken, tmp_path / "broken", lambda line: None)
    assert "there is no checkpoint yet" in str(error.value) and "\n" not in str(error.value)
    lines = read_metrics(tmp_path / "broken" / "metrics.jsonl")
    skipped = [line for line in lines if line["skipped_in_a_row"] > 0]
    assert skipped and len({line["parameter_norm"] for line in skipped if np.isfinite(line["parameter_norm"])}) <= 1


def test_a_run_can_begin_with_the_parameters_of_another(config, tmp_path):
    config = replace(config, data=dict(tokenizer="trained"))
    first = train.train(config, tmp_path / "first", print)
    assert trained.load_config(tmp_path / "first").data.tokenizer_file == str(
        tmp_path / "first" / "tokenizer" / "tokenizer.model"
    )
    begun = replace(
        config, train=dict(init_from=str(tmp_path / "first"), steps=1, seed=7), optimizer=dict(warmup_steps=2)
    )
    lines = []
    second = train.train(begun, tmp_path / "second", lines.append)  # its only learning rate is 0
    assert f"beginning with the parameters of step 4 in {tmp_path / 'first' / 'checkpoints'}" in lines
    jax.tree.map(np.testing.assert_array_equal, second.params, first.params)
    assert int(second.step) == 1

    with pytest.raises(CheckpointError, match="layers"):
        train.train(replace(begun, model=dict(layers=3)), tmp_path / "third", print)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        train.train(replace(begun, train=dict(init_from=str(tmp_path / "none"))), tmp_path / "fourth", print)


def test_another_storage_is_refused_and_not_taken_for_a_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="s3://bucket/run is of no storage that is known here") as error:
        train.main(config, train.Flags(workdir="s3://bucket/run"))
    assert "\n" not in str(error.value) and not (tmp_path / "s3:").exists()
