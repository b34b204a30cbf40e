"""Configs: there and back, hashable, and every wrong value one line that names the field."""

import dataclasses
import json

import pytest

from fot import config as config_lib
from fot.config import ExperimentConfig
from fot.errors import ConfigError


def changed(changes: dict) -> dict:
    """Returns the default values with {dotted name: value} replaced."""
    values = config_lib.to_dict(ExperimentConfig())
    for name, value in changes.items():
        *groups, field = name.split(".")
        group = values
        for each in groups:
            group = group[each]
        group[field] = value
    return values


def test_dict_round_trip(tiny_config):
    assert config_lib.from_dict(config_lib.to_dict(tiny_config)) == tiny_config


def test_json_round_trip(tiny_config):
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(tiny_config)))) == tiny_config


def test_equal_configs_hash_equal(tiny_config):
    again = config_lib.from_dict(config_lib.to_dict(tiny_config))
    assert hash(again) == hash(tiny_config)
    assert again is not tiny_config


def test_configs_are_frozen(tiny_config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config.model.layers = 3


def test_whole_numbers_become_floats():
    config = config_lib.from_dict(changed({"optimizer.learning_rate": 1}))
    assert isinstance(config.optimizer.learning_rate, float)


def test_differences_name_the_field_and_both_values(tiny_config):
    other = dataclasses.replace(tiny_config, model=dataclasses.replace(tiny_config.model, memory_layers=(1, 2)))
    assert config_lib.differences(tiny_config, other) == ["model.memory_layers: (2,) → (1, 2)"]
    assert config_lib.differences(tiny_config, tiny_config) == []


def test_unknown_field_names_the_nearest():
    assert config_lib.unknown_field("model.dims") == "unknown config field model.dims; did you mean 'model.dim'?"


def test_missing_field():
    values = changed({})
    del values["train"]["steps"]
    with pytest.raises(ConfigError, match=r"^config field train\.steps is missing$"):
        config_lib.from_dict(values)


# Each: what is changed, and what the one line must say.
WRONG = [
    # Unknown fields and wrong types.
    ({"model.dims": 3}, "unknown config field model.dims; did you mean 'dim'?"),
    ({"optimiser": 3}, "unknown config field optimiser; did you mean 'optimizer'?"),
    ({"model": 3}, "model must be a group of fields"),
    ({"model.layers": "4"}, "model.layers='4' must be of type int"),
    ({"model.layers": 4.0}, "model.layers=4.0 must be of type int"),
    ({"model.layers": True}, "model.layers=True must be of type int"),
    ({"model.layers": None}, "model.layers=None must be of type int"),
    ({"model.qk_norm": 1}, "model.qk_norm=1 must be of type bool"),
    ({"optimizer.epsilon": True}, "optimizer.epsilon=True must be of type float"),
    ({"model.memory_layers": 2}, "model.memory_layers=2 must be a tuple"),
    ({"model.memory_layers": (2.0,)}, "model.memory_layers=2.0 must be of type int"),
    ({"evaluate.readers": "dense"}, "evaluate.readers='dense' must be a tuple"),
    ({"crossbatch.segments": ((0, 0, 0),)}, "crossbatch.segments=(0, 0, 0) must have 2 elements"),
    # Model.
    ({"model.dim": 0}, "model.dim=0 must be greater than 0"),
    ({"model.mlp": "gulu"}, "model.mlp='gulu' is not one of swiglu, gelu; did you mean 'gelu'?"),
    ({"model.memory_positions": "one"}, "model.memory_positions='one' is not one of"),
    ({"model.compute_dtype": "float16"}, "model.compute_dtype='float16' is not one of"),
    ({"model.remat": "all"}, "model.remat='all' is not one of"),
    ({"model.head_dim": 31}, "model.head_dim=31 must be even"),
    ({"model.kv_heads": 3}, "model.heads=4 must be a multiple of kv_heads=3"),
    ({"model.memory_layers": (2, 1)}, "model.memory_layers=(2, 1) must be ascending"),
    ({"model.memory_layers": (1, 1)}, "model.memory_layers=(1, 1) must be ascending"),
    ({"model.memory_layers": (4,)}, "model.memory_layers=(4,): layer 4 does not exist, layers=4 are numbered 0 to 3"),
    ({"model.memory_layers": (-1,)}, "model.memory_layers=(-1,): layer -1 does not exist"),
    ({"model.memory_layers": ()}, "model.memory_layers is empty"),
    # Crossbatch.
    ({"crossbatch.variant": "segment"}, "crossbatch.variant='segment' is not one of"),
    ({"crossbatch.loss_rows": "first"}, "crossbatch.loss_rows='first' is not one of"),
    ({"crossbatch.packing": 3}, "data.batch_size=8 must be a multiple of crossbatch.packing × train.accumulation = 3"),
    ({"crossbatch.packing": 0}, "crossbatch.packing=0 must be greater than 0"),
    ({"crossbatch.d": ()}, "crossbatch.d=() must name at least one d"),
    ({"crossbatch.d": (0,)}, "crossbatch.d=(0,) must name at least one d, each above 0"),
    ({"crossbatch.d": (5,)}, "crossbatch.d=(5,): 8 rows"),
    ({"crossbatch.d": (4,), "train.accumulation": 2}, "so d can be at most 2"),
    ({"crossbatch.groups": 0}, "crossbatch.groups=0 must be greater than 0"),
    ({"crossbatch.groups": 3}, "crossbatch.groups=3 must divide the 4 packs of a microbatch"),
    ({"crossbatch.groups": 4, "train.accumulation": 2}, "crossbatch.groups=4 must divide the 2 packs"),
    ({"crossbatch.groups": 2, "crossbatch.d": (3,)}, "so d can be at most 2"),
    ({"crossbatch.d": (1, 2)}, "crossbatch.d=(1, 2) has several phases"),
    ({"crossbatch.d": (1, 2), "crossbatch.d_schedule": "steps"}, "crossbatch.d_steps=() must be 1 ascending steps"),
    (
        {"crossbatch.d": (1, 2, 4), "crossbatch.d_schedule": "steps", "crossbatch.d_steps": (9, 3)},
        "crossbatch.d_steps=(9, 3) must be 2 ascending steps",
    ),
    ({"crossbatch.d_schedule": "linear"}, "crossbatch.d_schedule='linear' is not one of"),
    ({"crossbatch.d_accuracy": 0.0}, "crossbatch.d_accuracy=0.0 must be in (0, 1]"),
    ({"crossbatch.w": 2}, "crossbatch.w=2 previous contexts need packing=2 to be at least 3"),
    ({"crossbatch.variant": "segments"}, "crossbatch.segments has 4 places but packing=2"),
    (
        {"crossbatch.variant": "segments", "crossbatch.segments": ((1, 0), (1, 1))},
        "crossbatch.segments[0]=(1, 0) must be (positives, negatives) with at most 0 positives",
    ),
    (
        {"crossbatch.variant": "segments", "crossbatch.segments": ((0, 0), (1, 7))},
        "crossbatch.segments wants 7 negatives but only 6 rows",
    ),
    ({"crossbatch.variant": "released", "crossbatch.range": 8}, "crossbatch.range=8 must be below the 8 rows"),
    # Data.
    ({"data.task": "files"}, "data.task='files' must be a tuple"),
    ({"data.task": ("file",)}, "data.task='file' is not one of python_stdlib, files, directories, "),
    ({"data.task": ("file",)}, "; did you mean 'files'?"),
    ({"data.task": ("files",)}, "data.files is empty: name a glob of files for task=files"),
    ({"data.task": ("isabelle",)}, "data.files is empty: name a glob of files for task=isabelle"),
    ({"data.task": ("seqio",)}, "data.files is empty: name a registered task for task=seqio"),
    ({"data.task": ()}, "data.task has 0 entries: give 1"),
    (
        {"data.task": ("sympy", "books"), "data.weights": (1, 2, 3)},
        "data.task has 2 entries: give 1, or 3: one for each source",
    ),
    ({"data.weights": (1.0, 0.0)}, "data.weights=(1.0, 0.0) must be greater than 0"),
    ({"data.min_document_tokens": (-1,)}, "data.min_document_tokens must be 0 or greater"),
    ({"data.weight_unit": "bytes"}, "data.weight_unit='bytes' is not one of tokens, documents"),
    ({"data.bad_documents": "keep"}, "data.bad_documents='keep' is not one of skip, refuse"),
    ({"data.workers": 0}, "data.workers=0 must be greater than 0"),
    ({"data.tokenizer": "byte"}, "data.tokenizer='byte' is not one of"),
    ({"data.tokenizer": "file"}, "data.tokenizer_file is empty"),
    ({"data.context": 0}, "data.context=0 must be greater than 0"),
    ({"data.batch_size": 7}, "data.batch_size=7 must be a multiple of"),
    ({"data.held_out_fraction": 1.0}, "data.held_out_fraction=1.0 must be between 0 and 1"),
    ({"data.seed": -1}, "data.seed=-1 must be 0 or greater"),
    # Optimizer.
    ({"optimizer.name": "adam"}, "optimizer.name='adam' is not one of adamw, adafactor; did you mean 'adamw'?"),
    ({"optimizer.schedule": "cosin"}, "did you mean 'cosine'?"),
    ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate=0.0 must be greater than 0"),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan must be greater than 0"),
    ({"optimizer.clip_norm": -1.0}, "optimizer.clip_norm=-1.0 must be 0 or greater"),
    ({"optimizer.beta2": 1.0}, "optimizer.beta2=1.0 must be in [0, 1)"),
    ({"optimizer.schedule": "rsqrt", "optimizer.warmup_steps": 0}, "optimizer.warmup_steps=0: the rsqrt schedule"),
    # Mesh, train, evaluate.
    ({"mesh.data": 0}, "mesh.axis sizes (0, -1, 1, 1) must be -1 or above 0"),
    ({"mesh.data": -1}, "only one axis may be -1"),
    ({"train.steps": 0}, "train.steps=0 must be greater than 0"),
    ({"train.evaluate_every": -1}, "train.evaluate_every=-1 must be 0 or greater"),
    ({"evaluate.memory": ()}, "evaluate.memory=() must be ascending lengths"),
    ({"evaluate.memory": (256, 0)}, "evaluate.memory=(256, 0) must be ascending lengths"),
    ({"evaluate.readers": ("faiss",)}, "evaluate.readers: 'faiss' is not one of dense, knn"),
    ({"evaluate.modes": ("one_doc",)}, "evaluate.modes: 'one_doc' is not one of"),
    ({"evaluate.position_bins": (9, 3)}, "evaluate.position_bins=(9, 3) must be ascending"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_wrong_values_are_one_line_naming_the_field(changes, message):
    with pytest.raises(ConfigError) as caught:
        config_lib.from_dict(changed(changes))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


RIGHT = [
    {"crossbatch.d": (4,)},
    {"crossbatch.d": (2,), "train.accumulation": 2},
    {"crossbatch.d": (1, 4), "crossbatch.d_schedule": "steps", "crossbatch.d_steps": (10,)},
    {"crossbatch.d": (1, 4), "crossbatch.d_schedule": "random"},
    {"crossbatch.d": (2,), "crossbatch.groups": 2},
    {"crossbatch.packing": 4, "crossbatch.w": 3},
    {"crossbatch.packing": 4, "crossbatch.variant": "segments"},
    {"crossbatch.variant": "released", "crossbatch.range": 7},
    {"crossbatch.variant": "none", "model.memory_layers": ()},
    {"data.task": ("sympy", "files"), "data.files": ("a/*.txt",), "data.weights": (1.0, 2.0)},
    {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
]


@pytest.mark.parametrize("changes", RIGHT, ids=[str(index) for index in range(len(RIGHT))])
def test_values_at_the_limits_are_accepted(changes):
    config = config_lib.from_dict(changed(changes))
    found = dict(config_lib.fields(config_lib.to_dict(config)))
    assert {name: found[name] for name in changes} == changes
