"""What comes back is what was saved, on any mesh; what was not saved whole is never taken for a checkpoint."""

import asyncio
import contextlib
import dataclasses
import json
import resource
import shutil
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fot import checksum
from fot.checkpoint import CHANGEABLE, Checkpointer, check_config, load_config
from fot.config import ExperimentConfig, TrainConfig, fields, to_dict
from fot.errors import CheckpointError

CONFIG = ExperimentConfig()
KEEP = TrainConfig(keep_last=2)
POSITION = {"epoch": 1, "document": 12345678901234567890, "offsets": [1, 2, 3], "random": {"state": [0.1, "x"]}}


# When one array can't be read or written, tensorstore's threads report the others to an event loop that is closed.
tensorstore_noise = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


class State(NamedTuple):
    params: dict[str, Any]
    opt_state: Any
    step: jax.Array
    key: jax.Array


def make_state(seed: int = 0) -> State:
    """A state with every kind of leaf: float32, bfloat16, integers, scalars, raw and typed random keys, NaN."""
    key = jax.random.key(seed)
    embedding = jax.random.normal(key, (16, 8)).at[0, 0].set(jnp.nan).at[0, 1].set(-0.0)
    layers = {"mlp": {"up": jax.random.normal(key, (2, 8, 8)).astype(jnp.bfloat16)}, "mlp_norm": jnp.ones((2, 8))}
    params = {"embedding": embedding, "layers": layers}
    opt_state = (optax.adamw(1e-3).init(params), {"raw": jax.random.key_data(key)}, None)
    return State(params, opt_state, jnp.int32(seed), key)


def on_mesh(state: Any, devices: int) -> Any:
    """Returns the abstract state with the first axis of each array that 8 divides split over the devices."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))

    def leaf(x):
        spec = PartitionSpec("fsdp") if x.ndim and x.shape[0] % 8 == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, jax.eval_shape(lambda: state))


def assert_same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        a, b = (jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(directory, *steps: int, config: TrainConfig = KEEP) -> None:
    with Checkpointer(directory, config) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), POSITION, CONFIG)


def folders(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextlib.contextmanager
def full_disk():
    """No file can grow past 1 kB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_restore_is_bit_identical(tmp_path):
    state = make_state(3)
    with Checkpointer(tmp_path / "new", KEEP) as checkpointer:
        checkpointer.save(3, state, POSITION, CONFIG)
    restored = Checkpointer(tmp_path / "new", KEEP).restore(None, on_mesh(state, 1))
    assert isinstance(restored.state, State) and restored.data_position == POSITION
    assert_same_bits(restored.state, state)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 1), (1, 8), (8, 2)])
def test_restore_onto_another_mesh_takes_the_sharding_of_the_abstract_state(tmp_path, saved_on, restored_on):
    state = make_state(1)
    shardings = jax.tree.map(lambda x: x.sharding, on_mesh(state, saved_on))
    with Checkpointer(tmp_path, KEEP) as checkpointer:
        checkpointer.save(1, jax.device_put(state, shardings), POSITION, CONFIG)
        abstract = on_mesh(state, restored_on)
        checkpointer.wait()
        restored = checkpointer.restore(1, abstract).state
    assert_same_bits(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract)


def test_state_may_be_donated_right_after_save(tmp_path):
    state = make_state(1)
    expected = jax.tree.map(lambda x: x.copy(), state)
    spoil = jax.jit(lambda p: jax.tree.map(lambda x: x * 0 + 7, p), donate_argnums=0)
    with Checkpointer(tmp_path, KEEP) as checkpointer:
        checkpointer.save(1, state, POSITION, CONFIG)
        jax.block_until_ready(spoil(state.params))  # writes over the arrays, but for those that a save still holds
    assert_same_bits(Checkpointer(tmp_path, KEEP).restore(1, on_mesh(expected, 1)).state, expected)


def test_params_are_restored_alone(tmp_path):
    save(tmp_path, 4)
    shutil.rmtree(tmp_path / "4" / "position")  # not needed, so not read
    params = make_state(4).params
    assert_same_bits(Checkpointer(tmp_path, KEEP).restore_params(None, on_mesh(params, 8)), params)


def test_config_comes_back_with_its_tuples(tmp_path):
    save(tmp_path, 1)
    assert load_config(str(tmp_path)) == CONFIG


@pytest.mark.parametrize(("keep_every", "kept"), [(0, ["5", "6"]), (3, ["3", "5", "6"]), (2, ["2", "4", "5", "6"])])
def test_newest_and_multiples_are_kept(tmp_path, keep_every, kept):
    save(tmp_path, 1, 2, 3, config=TrainConfig(keep_last=2, keep_every=keep_every))
    save(tmp_path, 4, 5, 6, config=TrainConfig(keep_last=2, keep_every=keep_every))
    assert folders(tmp_path) == kept
    assert Checkpointer(tmp_path, KEEP).latest() == 6


def test_a_step_is_restored_by_its_number(tmp_path):
    save(tmp_path, 1, 2)
    assert_same_bits(Checkpointer(tmp_path, KEEP).restore(1, on_mesh(make_state(), 1)).state, make_state(1))


def test_reading_writes_nothing(tmp_path):
    checkpointer = Checkpointer(tmp_path / "none", KEEP)
    assert checkpointer.latest() is None
    checkpointer.wait()
    checkpointer.close()
    assert folders(tmp_path) == []


@tensorstore_noise
def test_failed_save_raises_at_wait_and_leaves_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    with Checkpointer(tmp_path, TrainConfig(keep_last=1)) as checkpointer:
        with full_disk(), pytest.raises(CheckpointError, match="step 2 was not saved") as raised:
            checkpointer.save(2, make_state(2), POSITION, CONFIG)
            checkpointer.wait()
        assert "\n" not in str(raised.value)
        with pytest.raises(CheckpointError, match="step 2 was not saved"):  # once failed, no save is taken on trust
            checkpointer.save(3, make_state(3), POSITION, CONFIG)
        assert checkpointer.latest() == 1  # keep_last=1 didn't cost the old one
        restored = checkpointer.restore(None, on_mesh(make_state(), 1)).state
    assert_same_bits(restored, make_state(1))


def break_disk(patch: pytest.MonkeyPatch) -> None:
    """Makes writing the JSON items fail in the background, after `save` has returned."""

    async def fail(*_):
        raise OSError("disk on fire")

    patch.setattr(ocp.JsonCheckpointHandler, "_save_fn", fail)


def test_a_save_that_was_given_up_in_the_background_is_a_failed_one(tmp_path, monkeypatch):
    async def give_up(*_):
        raise asyncio.CancelledError

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", give_up)
    with pytest.raises(CheckpointError, match="step 2 was not saved"), Checkpointer(tmp_path, KEEP) as checkpointer:
        checkpointer.save(2, make_state(2), POSITION, CONFIG)
        checkpointer.wait()


def test_failed_save_raises_at_the_next_save(tmp_path, monkeypatch):
    break_disk(monkeypatch)
    checkpointer = Checkpointer(tmp_path, KEEP)
    checkpointer.save(2, make_state(2), POSITION, CONFIG)
    with pytest.raises(CheckpointError, match="step 2 was not saved"):
        checkpointer.save(3, make_state(3), POSITION, CONFIG)
    checkpointer.close()


def test_check_raises_once_the_save_has_failed_and_does_not_wait(tmp_path, monkeypatch):
    go = threading.Event()

    async def fail(*_):
        go.wait(30)
        raise OSError("disk on fire")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", fail)
    checkpointer = Checkpointer(tmp_path, KEEP)
    checkpointer.check()
    checkpointer.save(2, make_state(2), POSITION, CONFIG)
    checkpointer.check()
    go.set()
    with pytest.raises(CheckpointError, match="step 2 was not saved"):
        for _ in range(1000):
            checkpointer.check()
            time.sleep(0.01)
    checkpointer.close()


def test_failed_save_raises_at_close_but_does_not_hide_another_error(tmp_path, monkeypatch):
    break_disk(monkeypatch)
    with pytest.raises(CheckpointError, match="step 2"), Checkpointer(tmp_path / "a", KEEP) as checkpointer:
        checkpointer.save(2, make_state(2), POSITION, CONFIG)
    with pytest.raises(KeyError) as raised, Checkpointer(tmp_path / "b", KEEP) as checkpointer:
        checkpointer.save(2, make_state(2), POSITION, CONFIG)
        raise KeyError("mine")
    assert "step 2 was not saved" in raised.value.__notes__[0]


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="step 1 was not saved"):
        save(tmp_path / "file" / "checkpoints", 1)


def test_interrupted_save_is_no_checkpoint_and_is_swept_out(tmp_path, monkeypatch):
    save(tmp_path, 1)
    reader, seen, write = Checkpointer(tmp_path, KEEP), [], ocp.JsonCheckpointHandler._save_fn

    async def write_and_look(*args):
        await write(*args)
        seen.append((reader.latest(), set(folders(tmp_path))))

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", write_and_look)
    save(tmp_path, 2)
    assert reader.latest() == 2 and {latest for latest, _ in seen} == {1}
    (temporary,) = seen[0][1] - {"1"}
    (tmp_path / "2").rename(tmp_path / temporary)  # all written, but killed before the rename
    assert reader.latest() == 1
    assert_same_bits(reader.restore(None, on_mesh(make_state(), 1)).state, make_state(1))
    save(tmp_path, 3)
    assert folders(tmp_path) == ["1", "3"]


def test_saving_the_same_step_again_does_nothing_but_another_runs_step_is_refused(tmp_path):
    save(tmp_path, 1, 1)
    with Checkpointer(tmp_path, KEEP) as checkpointer:
        with pytest.raises(CheckpointError, match="already has a checkpoint of step 1"):
            checkpointer.save(1, make_state(1), POSITION, CONFIG)
        checkpointer.restore(1, on_mesh(make_state(), 1))
        checkpointer.save(1, make_state(1), POSITION, CONFIG)
    assert folders(tmp_path) == ["1"]


@pytest.mark.parametrize("step", [None, 7])
def test_missing_checkpoint_is_one_line(tmp_path, step):
    for directory in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="no complete checkpoint") as raised:
            Checkpointer(directory, KEEP).restore(step, on_mesh(make_state(), 1))
        assert "\n" not in str(raised.value)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_config(tmp_path)


def test_data_position_must_be_json(tmp_path):
    with pytest.raises(TypeError):
        Checkpointer(tmp_path, KEEP).save(1, make_state(), {"array": jnp.ones(3)}, CONFIG)


def test_missing_step_names_those_there(tmp_path):
    save(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*\[1, 2\]"):
        Checkpointer(tmp_path, KEEP).restore(7, on_mesh(make_state(), 1))


def empty(path):
    path.write_bytes(b"")


def halve_arrays(folder):
    for path in folder.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@tensorstore_noise
@pytest.mark.parametrize(
    ("item", "damage"),
    [
        ("state/_METADATA", empty),
        ("state/manifest.ocdbt", empty),
        ("state", shutil.rmtree),
        ("state/d", shutil.rmtree),
        ("state", halve_arrays),
        ("position/metadata", empty),
        ("position", shutil.rmtree),
    ],
)
def test_damaged_checkpoint_is_one_line(tmp_path, item, damage):
    save(tmp_path, 1)
    damage(tmp_path / "1" / item)
    with pytest.raises(CheckpointError, match="is damaged") as raised:
        Checkpointer(tmp_path, KEEP).restore(None, on_mesh(make_state(), 1))
    assert "\n" not in str(raised.value)


def test_fields_newer_than_the_checkpoint_have_their_defaults(tmp_path):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dim=64))
    with Checkpointer(tmp_path, KEEP) as checkpointer:
        checkpointer.save(1, make_state(1), POSITION, config)
    path = tmp_path / "1" / "config" / "metadata"
    values = checksum.unsealed(json.loads(path.read_text()))
    del values["model"]["loss_block"], values["evaluate"]
    path.write_text(json.dumps(checksum.sealed(values)))
    assert load_config(tmp_path) == config


def test_damaged_config_is_one_line(tmp_path):
    save(tmp_path, 1)
    for values in ({"model": {"dims": 3}}, {"model": 3}):
        (tmp_path / "1" / "config" / "metadata").write_text(json.dumps(checksum.sealed(values)))
        with pytest.raises(CheckpointError, match="another version of fot") as raised:
            load_config(tmp_path)
        assert "\n" not in str(raised.value)
    empty(tmp_path / "1" / "config" / "metadata")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": jnp.zeros((16, 9))}, r"params/embedding is float32\[16,8\] in .* but float32\[16,9\]"),
        ({"embedding": jnp.zeros((16, 8), jnp.bfloat16)}, r"params/embedding is float32\[16,8\] in .* but bfloat16"),
        ({"head": jnp.zeros((8, 16))}, r"params/head is absent in .* but float32\[8,16\]"),
        ({"layers": {}}, r"params/layers/mlp/up is bfloat16\[2,8,8\] in .* but absent"),
    ],
)
def test_state_of_another_shape_is_named(tmp_path, change, message):
    save(tmp_path, 1)
    state = make_state()
    state = state._replace(params=state.params | change)
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(tmp_path, KEEP).restore(1, on_mesh(state, 1))
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(tmp_path, KEEP).restore_params(1, on_mesh(state.params, 1))


def test_abstract_state_needs_shardings(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="params/embedding in the abstract state has no sharding"):
        Checkpointer(tmp_path, KEEP).restore(1, jax.eval_shape(make_state))


def test_nothing_goes_to_stdout_or_stderr(tmp_path, capfd):
    save(tmp_path, 1, 2)
    Checkpointer(tmp_path, KEEP).restore(None, on_mesh(make_state(), 8))
    assert capfd.readouterr() == ("", "")


def test_another_config_is_refused_in_one_line_with_all_fields():
    model = dataclasses.replace(CONFIG.model, dim=256, remat="full")
    train = dataclasses.replace(CONFIG.train, seed=1, steps=5)
    current = dataclasses.replace(CONFIG, model=model, train=train)
    with pytest.raises(CheckpointError) as raised:
        check_config(CONFIG, current)
    message = str(raised.value)
    assert "model.dim: 128 → 256" in message and "train.seed: 0 → 1" in message
    assert "remat" not in message and "steps" not in message and "\n" not in message


def test_changeable_fields_may_change():
    check_config(CONFIG, CONFIG)
    train = dataclasses.replace(CONFIG.train, steps=7, keep_last=5, log_every=1)
    mesh = dataclasses.replace(CONFIG.mesh, data=2)
    evaluate = dataclasses.replace(CONFIG.evaluate, neighbours=3)
    check_config(CONFIG, dataclasses.replace(CONFIG, train=train, mesh=mesh, evaluate=evaluate))


@pytest.mark.parametrize("name", CHANGEABLE)
def test_changeable_fields_exist(name):
    known = [field for field, _ in fields(to_dict(CONFIG))]
    assert any(field.startswith(name) if name.endswith(".") else field == name for field in known)
