"""A whole run, and what its groups ask of each other."""

import dataclasses

from fot.config.checks import require
from fot.config.crossbatch import CrossbatchConfig
from fot.config.data import DataConfig
from fot.config.generated import DICTIONARY_MARKS, DictionaryConfig, PasskeyConfig
from fot.config.inference import EvaluateConfig, GenerateConfig
from fot.config.model import ModelConfig
from fot.config.training import MeshConfig, OptimizerConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A whole run. `from_dict` builds and validates it, `to_dict` is its inverse."""

    model: ModelConfig = ModelConfig()
    crossbatch: CrossbatchConfig = CrossbatchConfig()
    data: DataConfig = DataConfig()
    dictionary: DictionaryConfig = DictionaryConfig()
    passkey: PasskeyConfig = PasskeyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()

    def __post_init__(self):
        crossbatch, rows = self.crossbatch, self.data.batch_size
        divisor = crossbatch.packing * self.train.accumulation
        require(
            rows % divisor == 0,
            f"data.batch_size={rows} must be a multiple of crossbatch.packing × train.accumulation = {divisor}",
        )
        packs = rows // divisor
        require(
            packs % crossbatch.groups == 0,
            f"crossbatch.groups={crossbatch.groups} must divide the {packs} packs of a microbatch "
            "(data.batch_size / train.accumulation / crossbatch.packing)",
        )
        packs = packs // crossbatch.groups
        rows = packs * crossbatch.packing
        if crossbatch.variant == "previous":
            require(
                max(crossbatch.d) <= packs,
                f"crossbatch.d={crossbatch.d}: {rows} rows (data.batch_size / train.accumulation / crossbatch.groups) "
                f"in packs of {crossbatch.packing} hold {packs} documents, so d can be at most {packs}",
            )
        if crossbatch.variant == "segments":
            negatives = max(n for _, n in crossbatch.segments)
            require(
                negatives <= rows - crossbatch.packing,
                f"crossbatch.segments wants {negatives} negatives but only {rows - crossbatch.packing} rows belong "
                "to other packs of a group: raise data.batch_size or lower crossbatch.groups",
            )
        if crossbatch.variant == "released":
            require(
                crossbatch.range < rows,
                f"crossbatch.range={crossbatch.range} must be below the {rows} rows of a group",
            )
        require(
            crossbatch.variant == "none" or len(self.model.memory_layers) > 0,
            "model.memory_layers is empty: crossbatch needs a memory layer, or set crossbatch.variant=none",
        )
        if "dictionary" in self.data.task:
            self._check_dictionary()
        if "passkey" in self.data.task:
            self._check_passkey(packs)

    def _check_passkey(self, packs: int) -> None:
        passkey, crossbatch = self.passkey, self.crossbatch
        require(
            self.data.context * crossbatch.packing == passkey.document,
            f"data.context={self.data.context} × crossbatch.packing={crossbatch.packing} must be passkey.document="
            f"{passkey.document}: a pack is a document",
        )
        require(
            self.data.packing == "strided",
            f"data.packing={self.data.packing} gives packs other documents than their own: set it to strided",
        )
        steps = crossbatch.d_steps if crossbatch.d_schedule == "steps" else ()
        for step in sorted({0, *passkey.phase_steps, *steps}) if crossbatch.variant == "previous" else ():
            seen = crossbatch.d[sum(step >= first for first in steps)] if steps else max(crossbatch.d)
            each = passkey.documents_per_key[sum(step >= first for first in passkey.phase_steps)]
            require(
                seen <= each and packs % each == 0,
                f"passkey.documents_per_key={passkey.documents_per_key}: at step {step} it is {each}, which must be at "
                f"least crossbatch.d, {seen}, and divide the {packs} documents of a group",
            )

    def _check_dictionary(self) -> None:
        dictionary, context = self.dictionary, self.data.context
        require(
            dictionary.symbols + DICTIONARY_MARKS <= self.model.vocab_size,
            f"dictionary.symbols={dictionary.symbols} and {DICTIONARY_MARKS} marks need model.vocab_size="
            f"{self.model.vocab_size} to be at least {dictionary.symbols + DICTIONARY_MARKS}",
        )
        require(
            context * self.crossbatch.packing == dictionary.document,
            f"data.context={context} × crossbatch.packing={self.crossbatch.packing} must be dictionary.document="
            f"{dictionary.document}: a pack is a document",
        )
        require(
            context % dictionary.window == 0,
            f"data.context={context} must be a multiple of dictionary.window={dictionary.window}",
        )
