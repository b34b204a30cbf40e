"""Flipped bits in checkpoints are told, wherever they are; checkpoints from before there were checksums are read."""

import json
import pathlib
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from fot import checksum
from fot.checkpoint import Checkpointer, load_config
from fot.config import ExperimentConfig, TrainConfig, to_dict
from fot.errors import CheckpointError

POSITION = {"document": 1234567, "rows": [3, 4.5]}
FLIPS = 100


def make_state() -> dict[str, Any]:
    """Returns arrays that compress and arrays that don't, of more bytes than are kept in OCDBT's own tree."""
    noise = jax.random.normal(jax.random.key(0), (2, 24, 24))
    params = {"a": noise, "b": noise.astype(jnp.bfloat16)}
    return {"params": params, "moments": jnp.zeros((24, 240)), "step": jnp.int32(3)}


def abstract(tree: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def same(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    with Checkpointer(tmp_path, TrainConfig()) as checkpointer:
        checkpointer.save(1, make_state(), POSITION, ExperimentConfig())
    return tmp_path


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_no_flipped_bit_of_arrays_goes_unnoticed(folder):
    state, told = make_state(), 0
    files = sorted(path for path in folder.glob("1/state/**/*") if path.is_file())
    draw = random.Random(0)
    for path in draw.choices(files, [path.stat().st_size for path in files], k=FLIPS):
        content = path.read_bytes()
        bit = draw.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            restored = Checkpointer(folder, TrainConfig()).restore(None, abstract(state))
            assert same(restored.state, state), (path, bit)
            params = Checkpointer(folder, TrainConfig()).restore_params(None, abstract(state["params"]))
            assert same(params, state["params"]), (path, bit)
        except CheckpointError as error:
            assert str(folder / "1") in str(error)
            told += 1
        path.write_bytes(content)
    assert told > 0.7 * FLIPS  # the others change nothing: names of files, times


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_of_an_array_is_one_line_that_names_it(folder):
    path = max(folder.glob("1/state/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"1 can't be read \(.*params\.a.*[Dd]igest.*\): it is damaged") as raised:
        Checkpointer(folder, TrainConfig()).restore(None, abstract(make_state()))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("item", ["position", "config"])
def test_other_json_than_was_saved_is_told(folder, item):
    path = folder / "1" / item / "metadata"
    text = path.read_text()
    number = "1234567" if item == "position" else str(ExperimentConfig().model.dim)
    assert number in text
    path.write_text(text.replace(number, str(int(number) ^ 4), 1))
    with pytest.raises(CheckpointError, match=f"{item}: the checksum is of other values.*is damaged"):
        load_config(folder)
        Checkpointer(folder, TrainConfig()).restore(None, abstract(make_state()))


def test_checkpoints_from_before_there_were_checksums_are_read(tmp_path):
    state, config = make_state(), ExperimentConfig()
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(state),
        position=ocp.args.JsonSave(POSITION),
        config=ocp.args.JsonSave(to_dict(config)),
    )
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=items)
    restored = Checkpointer(tmp_path, TrainConfig()).restore(None, abstract(state))
    assert same(restored.state, state) and restored.data_position == POSITION
    assert load_config(tmp_path) == config


def test_orbax_alone_reads_the_arrays(folder):
    args = ocp.checkpoint_utils.construct_restore_args(abstract(make_state()))
    with ocp.PyTreeCheckpointer() as reader:
        assert same(reader.restore(folder / "1" / "state", restore_args=args), make_state())


def test_json_has_its_checksum_whatever_the_order_of_keys():
    saved = json.loads(json.dumps(checksum.sealed({"b": (1, 2.5), "a": None})))
    saved["values"] = dict(sorted(saved["values"].items()))
    assert checksum.unsealed(saved) == {"a": None, "b": [1, 2.5]}
