"""Properties of the mesh, and of the one table that places parameters and moments on it."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fot import model, optimizer, sharding
from fot.config import ExperimentConfig, MeshConfig, ModelConfig, OptimizerConfig
from fot.config.mesh import AXES
from fot.errors import ConfigError

MODEL = ModelConfig(
    vocab_size=64, layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, mlp_dim=48, mlp="swiglu", memory_layers=(1,)
)
MODELS = [MODEL, dataclasses.replace(MODEL, memory_gate=True, tied_embeddings=False, qk_norm=False)]


def mesh_of(**sizes):
    return sharding.make_mesh(MeshConfig(**sizes), jax.devices())


def shapes_of(config: ModelConfig):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), config))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (dict(), (1, 8, 1, 1)),
        (dict(data=2, tensor=2), (2, 2, 2, 1)),
        (dict(data=-1, fsdp=2), (4, 2, 1, 1)),
        (dict(data=8, fsdp=1), (8, 1, 1, 1)),
        (dict(data=1, fsdp=1, tensor=8), (1, 1, 8, 1)),
        (dict(fsdp=2, sequence=-1), (1, 2, 1, 4)),
    ],
)
def test_mesh_has_every_device_once(sizes, expected):
    mesh = mesh_of(**sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor", "sequence") and mesh.devices.shape == expected
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


class Chip(NamedTuple):
    """A device of a v4 slice, as far as a mesh asks."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def chips(slices: int, *shape: int) -> list[Chip]:
    places = [(x, y, z) for z in range(shape[2]) for y in range(shape[1]) for x in range(shape[0])]
    every = [(piece, place) for piece in range(slices) for place in places]
    return [Chip(number, piece, place) for number, (piece, place) in enumerate(every)]


def test_neighbors_on_an_axis_are_near_each_other_on_the_torus():
    def hops(axis: str) -> float:
        line = np.moveaxis(mesh, AXES.index(axis), 0)
        pairs = zip(line.reshape(len(line), -1).flat, np.roll(line, 1, 0).flat, strict=True)
        steps = [[abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)] for one, other in pairs]
        return float(np.minimum(steps, 4 - np.array(steps)).sum(1).mean())

    devices = chips(1, 4, 4, 4)
    mesh = sharding.arranged(MeshConfig(tensor=4), devices)
    assert mesh.shape == (1, 16, 4, 1)
    assert hops("tensor") == 1 and hops("fsdp") <= 1.5  # 3.25 in the order of their numbers
    assert sorted(device.id for device in mesh.flat) == list(range(64))


@pytest.mark.parametrize(
    ("sizes", "between"),
    [
        (dict(data=2, tensor=4), "data"),
        (dict(data=4), "data"),
        (dict(tensor=2), "fsdp"),
        (dict(data=-1, fsdp=1), "data"),
    ],
)
def test_one_axis_leads_from_slice_to_slice(sizes, between):
    mesh = sharding.arranged(MeshConfig(**sizes), chips(2, 2, 2, 4))
    assert sorted(device.id for device in mesh.flat) == list(range(32))
    for axis, name in enumerate(AXES):
        lines = np.moveaxis(mesh, axis, -1)
        for line in lines.reshape(-1, lines.shape[-1]):
            slices = [device.slice_index for device in line]
            assert slices == sorted(slices) and len({*slices}) == (2 if name == between else 1)


def test_slices_that_divide_neither_axis_of_rows_are_one_line():
    with pytest.raises(ConfigError, match="mesh.data=1, mesh.fsdp=1: .* multiple of the 2 slices, such as mesh.data=2"):
        sharding.make_mesh(MeshConfig(fsdp=1, tensor=-1), chips(2, 2, 2, 1))


@pytest.mark.parametrize("sizes", [dict(data=3), dict(data=2, fsdp=2), dict(data=16, fsdp=1), dict(tensor=5)])
def test_sizes_that_do_not_multiply_to_the_devices_are_one_line(sizes):
    with pytest.raises(ConfigError, match=r"mesh\.data=.*mesh\.fsdp=.*8 devices.*-1") as error:
        mesh_of(**sizes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model_fields", "sizes", "message"),
    [
        (dict(), dict(data=16), "8 rows .*data.batch_size.*16"),
        (dict(dim=36), dict(fsdp=8), "model.dim=36.*fsdp.*8"),
        (dict(vocab_size=63), dict(fsdp=4, tensor=2), "model.vocab_size=63.*tensor.*2"),
        (dict(heads=3, kv_heads=3), dict(fsdp=4, tensor=2), "model.heads=3"),
        (dict(heads=4, kv_heads=1), dict(fsdp=4, tensor=2), "model.kv_heads=1"),
        (dict(mlp_dim=50), dict(fsdp=2, tensor=4), "model.mlp_dim=50"),
    ],
)
def test_what_a_mesh_can_not_split_is_one_line(model_fields, sizes, message):
    config = ExperimentConfig(model=dataclasses.replace(ModelConfig(), **model_fields))
    axes = dict(data=1, fsdp=1, tensor=1) | sizes
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
    with pytest.raises(ConfigError, match=message) as error:
        sharding.check_mesh(mesh, config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", MODELS)
def test_every_parameter_has_axes_for_its_dimensions_and_splits_evenly(config):
    mesh = mesh_of(fsdp=4, tensor=2)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of(config)):
        assert len(sharding.PARAM_AXES[path[-1].key]) == leaf.ndim
        placed = sharding.shardings({path[-1].key: leaf}, mesh)[path[-1].key]
        placed.shard_shape(leaf.shape)  # raises if it doesn't divide
        if leaf.ndim >= 2 and "norm" not in path[-1].key and path[-1].key not in ("temperature", "memory_gate"):
            assert set(jax.tree.leaves(tuple(placed.spec))) == {"fsdp", "tensor"}


def test_an_unknown_parameter_raises_with_its_path():
    tree = {"layers": {"attention": {"rotation": np.zeros((2, 3))}}}
    with pytest.raises(ValueError, match="layers/attention/rotation.*PARAM_AXES"):
        sharding.shardings(tree, mesh_of())


def test_moments_lie_where_their_parameters_lie():
    mesh, shapes = mesh_of(fsdp=4, tensor=2), shapes_of(MODEL)
    moments = jax.eval_shape(optimizer.optimizer(OptimizerConfig(), 10).init, shapes)
    params = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(sharding.shardings(shapes, mesh))
    }
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(sharding.shardings(moments, mesh)):
        names = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        assert leaf.spec == params.get(names, PartitionSpec())
        found += names in params
    assert found == 2 * len(params)


def test_factored_moments_are_placed_without_raising():
    shapes = shapes_of(dataclasses.replace(MODEL, dim=256, mlp_dim=512))
    moments = jax.eval_shape(optimizer.optimizer(OptimizerConfig(name="adafactor"), 10).init, shapes)
    placed = sharding.shardings(moments, mesh_of(fsdp=4, tensor=2))
    jax.tree.map(lambda leaf, where: where.shard_shape(leaf.shape), moments, placed)


def test_abstract_params_carry_shapes_and_shardings():
    mesh = mesh_of(fsdp=4, tensor=2)
    abstract = sharding.abstract_params(model.init, MODEL, mesh)
    query = abstract["layers"]["attention"]["query"]
    assert query.shape == (2, 32, 4, 8) and query.sharding.shard_shape(query.shape) == (2, 8, 2, 8)
    assert abstract["final_norm"].sharding.is_fully_replicated


def test_rows_are_split_over_data_and_fsdp():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert sharding.batch_sharding(mesh).shard_shape((8, 16)) == (2, 16)
    assert sharding.replicated(mesh).shard_shape((8, 16)) == (8, 16)
