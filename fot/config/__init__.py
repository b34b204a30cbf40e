"""Every field of an experiment: its type, its default, and the checks that a run passes before it starts.

Configs are frozen, hashable dataclasses. `configs/*.py` hold them as `ml_collections.ConfigDict`s, so that
every field can be overridden on the command line; `from_dict` freezes and validates them. Code below this
file never supplies a default of its own.
"""

from fot.config.crossbatch import CROSSBATCH_VARIANTS, D_SCHEDULES, LOSS_ROWS, CrossbatchConfig
from fot.config.data import (
    BAD_DOCUMENTS,
    GENERATED_TASKS,
    PACKINGS,
    TASKS,
    TASKS_THAT_NAME_FILES,
    TOKENIZERS,
    WEIGHT_UNITS,
    DataConfig,
    SourceConfig,
)
from fot.config.experiment import ExperimentConfig
from fot.config.generated import DICTIONARY_FILLS, DICTIONARY_MARKS, DictionaryConfig, PasskeyConfig
from fot.config.inference import MEMORY_DTYPES, MEMORY_MODES, OVERFLOWS, READER_NAMES, EvaluateConfig, GenerateConfig
from fot.config.model import (
    DTYPES,
    INDIFFERENT,
    MEMORY_POSITIONS,
    MLPS,
    REMATS,
    ROPE_SCALINGS,
    ModelConfig,
    RopeScalingConfig,
)
from fot.config.training import LR_SCHEDULES, OPTIMIZERS, MeshConfig, OptimizerConfig, TrainConfig
from fot.config.values import differences, fields, from_dict, to_dict, unknown_field
from fot.errors import ConfigError

__all__ = [
    "BAD_DOCUMENTS",
    "CROSSBATCH_VARIANTS",
    "ConfigError",
    "CrossbatchConfig",
    "DICTIONARY_FILLS",
    "DICTIONARY_MARKS",
    "DTYPES",
    "D_SCHEDULES",
    "DataConfig",
    "DictionaryConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "GENERATED_TASKS",
    "GenerateConfig",
    "INDIFFERENT",
    "LOSS_ROWS",
    "LR_SCHEDULES",
    "MEMORY_DTYPES",
    "MEMORY_MODES",
    "MEMORY_POSITIONS",
    "MLPS",
    "MeshConfig",
    "ModelConfig",
    "OPTIMIZERS",
    "OVERFLOWS",
    "OptimizerConfig",
    "PACKINGS",
    "PasskeyConfig",
    "READER_NAMES",
    "REMATS",
    "ROPE_SCALINGS",
    "RopeScalingConfig",
    "SourceConfig",
    "TASKS",
    "TASKS_THAT_NAME_FILES",
    "TOKENIZERS",
    "TrainConfig",
    "WEIGHT_UNITS",
    "differences",
    "fields",
    "from_dict",
    "to_dict",
    "unknown_field",
]
