"""Every field of an experiment: its type, its default, and the checks that a run passes before it starts.

Configs are frozen, hashable dataclasses. `configs/*.py` hold them as `ml_collections.ConfigDict`s, so that
every field can be overridden on the command line; `from_dict` freezes and validates them. Code below this
file never supplies a default of its own.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from fot.errors import ConfigError

MLPS = ("swiglu", "gelu")
MEMORY_POSITIONS = ("none", "zero")
ROPE_SCALINGS = ("none", "linear", "llama3")
REMATS = ("none", "elementwise", "mlp", "full")
DTYPES = ("float32", "bfloat16")
CROSSBATCH_VARIANTS = ("none", "previous", "segments", "released")
LOSS_ROWS = ("all", "last")
D_SCHEDULES = ("constant", "steps", "accuracy", "random")
OPTIMIZERS = ("adamw", "adafactor")
LR_SCHEDULES = ("constant", "cosine", "rsqrt")
READER_NAMES = ("dense", "knn", "approximate", "clustered", "host", "host_lists", "sharded_dense", "sharded_knn")
TASKS = (
    *("python_stdlib", "files", "directories", "repositories", "isabelle", "sympy", "books", "hol_light"),
    *("seqio", "c4", "pg19"),
    *("dictionary", "passkey"),
)
GENERATED_TASKS = ("dictionary", "passkey")  # made as they are read: no files, no tokenizer
TASKS_THAT_NAME_FILES = ("files", "directories", "repositories", "isabelle", "seqio")
WEIGHT_UNITS = ("tokens", "documents")
BAD_DOCUMENTS = ("skip", "refuse")
TOKENIZERS = ("bytes", "trained", "file")
PACKINGS = ("strided", "released")
MEMORY_DTYPES = ("compute", *DTYPES)
MEMORY_MODES = ("single_doc", "multi_doc")
DICTIONARY_FILLS = ("repeat", "pad")
DICTIONARY_MARKS = 4  # tokens that are no symbol: <pad>, <k>, <v>, <q>
OVERFLOWS = ("drop_oldest", "refuse")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{name}={value} must be greater than 0")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 0, f"{name}={value} must be 0 or greater")


def _one_of(config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}{_nearest(str(value), choices)}")


def _nearest(name: str, names: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary frequencies are stretched for contexts longer than a checkpoint was first trained on.

    Attributes:
      kind: "none", "linear" (all divided by `factor`) or "llama3" (LLaMA 3.1: only those that turn slowly).
      factor: what frequencies are divided by.
      low_factor: for "llama3": those with fewer turns than this in the original context are divided by all of `factor`.
      high_factor: for "llama3": those with more turns than this stay as they are; between the two it is gradual.
      original_context: for "llama3": tokens of the context that the checkpoint was first trained on.
    """

    kind: str = "none"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        _one_of(self, "kind", ROPE_SCALINGS)
        _positive(self, "factor", "low_factor", "original_context")
        _require(
            self.high_factor > self.low_factor,
            f"high_factor={self.high_factor} must be greater than low_factor={self.low_factor}",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The Transformer (FoT, Appendix A). Data, not subclasses, tells the paper's models from LLaMA ones.

    Attributes:
      vocab_size: rows of the embedding; a tokenizer may have fewer pieces.
      layers: number of layers.
      dim: width of the residual stream.
      heads: query heads.
      kv_heads: key and value heads; fewer than `heads` is grouped-query attention.
      head_dim: width of a head.
      mlp_dim: width of the feed-forward layer.
      mlp: "swiglu" (LLaMA) or "gelu" (the paper's small models).
      tied_embeddings: the output head is the embedding, transposed.
      qkv_bias: queries, keys and values have a bias (Qwen2).
      rope_theta: base of the rotary frequencies, θ.
      rope_scaling: how the rotary frequencies are stretched.
      norm_epsilon: ε of RMSNorm.
      memory_layers: indices (from 0) of the layers that see other contexts or a memory, ascending.
      memory_positions: "none": memory layers have no positional encoding (the paper's small models); "zero": RoPE
        inside the local context, keys from elsewhere encoded at position 0 (LongLLaMA).
      qk_norm: L2-normalised queries and keys with a learnable temperature per head (the paper's small models).
      qk_scale: for qk_norm: what the inner products are multiplied by at first, 1/τ; about log2 of the square of the
        keys in view (Henry et al., 2020).
      memory_gate: combine local and memory attention by a learned gate per head (Memorizing Transformer) and not
        in one softmax.
      compute_dtype: dtype of activations and matrix products; parameters are stored in float32.
      remat: what the backward pass computes again instead of keeping it: "none", "elementwise" (norms, activations
        and attention's output projection), "mlp" (that, and the feed-forward layer), "full" (whole layers); each takes
        less memory and more time than the one before.
      attention_block: queries per block of attention logits, in tokens; bounds memory, changes no result.
      loss_block: positions of each row whose output logits exist at once in training; bounds memory, changes no result.
      unroll: layers unrolled in each iteration of the scan over layers; more compiles longer and may run faster.
    """

    vocab_size: int = 512
    layers: int = 4
    dim: int = 128
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 512
    mlp: str = "gelu"
    memory_layers: tuple[int, ...] = (2,)
    memory_positions: str = "none"
    qk_norm: bool = True
    qk_scale: float = 12.0
    memory_gate: bool = False
    tied_embeddings: bool = True
    qkv_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    norm_epsilon: float = 1e-6
    compute_dtype: str = "float32"
    remat: str = "none"
    attention_block: int = 128
    loss_block: int = 128
    unroll: int = 1

    def __post_init__(self):
        _positive(self, "unroll", "vocab_size", "layers", "dim", "heads", "kv_heads", "head_dim", "mlp_dim")
        _positive(self, "rope_theta", "norm_epsilon", "attention_block", "loss_block", "qk_scale")
        _one_of(self, "mlp", MLPS)
        _one_of(self, "memory_positions", MEMORY_POSITIONS)
        _one_of(self, "compute_dtype", DTYPES)
        _one_of(self, "remat", REMATS)
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        _require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}",
        )
        _require(
            tuple(sorted(set(self.memory_layers))) == self.memory_layers,
            f"memory_layers={self.memory_layers} must be ascending without repeats",
        )
        for layer in self.memory_layers:
            _require(
                0 <= layer < self.layers,
                f"memory_layers={self.memory_layers}: layer {layer} does not exist, "
                f"layers={self.layers} are numbered 0 to {self.layers - 1}",
            )


@dataclasses.dataclass(frozen=True)
class CrossbatchConfig:
    """Which contexts the memory layers see in training (FoT, section 3.2 and Appendix A).

    A pack is `packing` consecutive rows of one document stream; rows are numbered pack by pack.

    Attributes:
      variant: "none", "previous" (the paper's d and w), "segments" (LongLLaMA's (p, n)), or "released"
        (range, stepping and packing of the released LongLLaMA code).
      packing: consecutive rows that continue one document, K.
      d: for "previous", documents whose contexts a row sees, its own included, for each phase of the schedule.
      w: for "previous", how many previous contexts of each document a row sees at most.
      segments: for "segments", (positives, negatives) for each place in the pack; sets K.
      range: for "released", how many rows before its own a row sees at most.
      stepping: for "released", grow what a row sees with its place in the pack.
      loss_rows: "all" rows of a pack, or only the "last" (the paper's C_curr), the others being context alone.
      mask_documents: hide what belongs to no positive or negative: other documents inside a row or its previous
        contexts, and later parts of the own document. False reproduces the released code.
      d_schedule: "constant", "steps", "accuracy" or "random", over the phases of `d`.
      d_steps: for "steps", the steps at which the next phase of `d` begins.
      d_accuracy: for "accuracy", the training accuracy at which the next phase begins.
      d_after: for "accuracy", the step before which no accuracy counts, as when the documents are still easy.
    """

    variant: str = "previous"
    packing: int = 2
    d: tuple[int, ...] = (1,)
    w: int = 1
    segments: tuple[tuple[int, int], ...] = ((0, 0), (1, 1), (2, 1), (3, 0))
    range: int = 3
    stepping: bool = True
    loss_rows: str = "all"
    mask_documents: bool = True
    d_schedule: str = "constant"
    d_steps: tuple[int, ...] = ()
    d_accuracy: float = 0.98
    d_after: int = 0

    def __post_init__(self):
        _one_of(self, "variant", CROSSBATCH_VARIANTS)
        _one_of(self, "loss_rows", LOSS_ROWS)
        _one_of(self, "d_schedule", D_SCHEDULES)
        _positive(self, "packing", "w", "range")
        _not_negative(self, "d_after")
        _require(len(self.d) > 0 and all(d > 0 for d in self.d), f"d={self.d} must name at least one d, each above 0")
        if self.variant == "previous":
            _require(
                self.w < self.packing,
                f"w={self.w} previous contexts need packing={self.packing} to be at least {self.w + 1}",
            )
        if self.variant == "segments":
            _require(
                len(self.segments) == self.packing,
                f"segments has {len(self.segments)} places but packing={self.packing}: they must be equal",
            )
            for place, segment in enumerate(self.segments):
                _require(
                    len(segment) == 2 and 0 <= segment[0] <= place and segment[1] >= 0,
                    f"segments[{place}]={segment} must be (positives, negatives) with at most {place} positives",
                )
        if self.d_schedule == "constant":
            _require(len(self.d) == 1, f"d={self.d} has several phases: set d_schedule to steps, accuracy or random")
        if self.d_schedule == "steps":
            _require(
                len(self.d_steps) == len(self.d) - 1 and list(self.d_steps) == sorted(set(self.d_steps)),
                f"d_steps={self.d_steps} must be {len(self.d) - 1} ascending steps, one less than the phases of d",
            )
        _require(0 < self.d_accuracy <= 1, f"d_accuracy={self.d_accuracy} must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of documents: the entries of one place in the tuples of `DataConfig`, where they are explained."""

    task: str
    files: str
    field: str
    weight: float
    min_document_tokens: int


_PER_SOURCE = ("task", "files", "field", "weights", "min_document_tokens")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Documents, tokenizer and batch (FoT, Appendix A.4).

    The fields `task`, `files`, `field`, `weights` and `min_document_tokens` have an entry for each source of documents;
    a single entry holds for all of them.

    Attributes:
      task: entries of `fot.data.tasks.TASKS`; or "dictionary" or "passkey", alone: see the fields of
        `dictionary` and `passkey`.
      files: glob of text or JSONL files, plain, .gz or .zst, for the tasks that read files; for task "seqio" the name
        of a registered task, or "module:name"; for "c4" and "pg19" the data folder of TensorFlow Datasets.
      field: for JSONL files and task "seqio": the field that holds the text; "a.b" is field b of field a.
      weights: share of each source in the stream, in units of `weight_unit`; they need not add up to 1.
      weight_unit: "tokens" or "documents".
      min_document_tokens: shorter documents are left out.
      bad_documents: what to do with a document that can't be read: "skip" (and count) or "refuse".
      tokenizer: "bytes"; "trained": a SentencePiece BPE model of `model.vocab_size` trained once on the run's
        training documents and cached; "file": the model in `tokenizer_file`.
      tokenizer_file: for tokenizer "file": a SentencePiece model, or a Hugging Face tokenizer.json.
      context: tokens of a row, the local context T.
      batch_size: rows of a batch; a multiple of `crossbatch.packing`.
      packing: which document a pack takes when it has read one to its end: "strided", every B-th of the stream, for B
        packs in a batch; "released", the first that no pack has taken (the released LongLLaMA code).
      held_out_fraction: share of the documents held out from training, chosen by document.
      cache_dir: where downloads, tokenizers and tokenized documents are cached; "" is the user's cache folder.
      workers: processes that tokenize; 1 is the run's own.
      seed: of the order of documents.
    """

    task: tuple[str, ...] = ("python_stdlib",)
    files: tuple[str, ...] = ("",)
    field: tuple[str, ...] = ("text",)
    weights: tuple[float, ...] = (1.0,)
    weight_unit: str = "tokens"
    min_document_tokens: tuple[int, ...] = (256,)
    bad_documents: str = "skip"
    tokenizer: str = "trained"
    tokenizer_file: str = ""
    context: int = 128
    batch_size: int = 8
    packing: str = "strided"
    held_out_fraction: float = 0.05
    cache_dir: str = ""
    workers: int = 1
    seed: int = 0

    def __post_init__(self):
        for task in self.task:
            if task not in TASKS:
                raise ConfigError(f"task={task!r} is not one of {', '.join(TASKS)}{_nearest(task, TASKS)}")
        _one_of(self, "tokenizer", TOKENIZERS)
        _one_of(self, "packing", PACKINGS)
        _one_of(self, "weight_unit", WEIGHT_UNITS)
        _one_of(self, "bad_documents", BAD_DOCUMENTS)
        _positive(self, "context", "batch_size", "workers")
        _not_negative(self, "seed")
        _require(0 < self.held_out_fraction < 1, f"held_out_fraction={self.held_out_fraction} must be between 0 and 1")
        _require(
            self.tokenizer != "file" or self.tokenizer_file != "",
            "tokenizer_file is empty: name a SentencePiece model or a tokenizer.json, or set tokenizer=trained",
        )
        count = max(len(getattr(self, name)) for name in _PER_SOURCE)
        for_each = f", or {count}: one for each source" if count > 1 else ""
        for name in _PER_SOURCE:
            given = len(getattr(self, name))
            _require(given in (1, count), f"{name} has {given} entries: give 1{for_each}")
        for source in self.sources:
            _require(
                source.task not in TASKS_THAT_NAME_FILES or source.files != "",
                f"files is empty: name {'a registered task' if source.task == 'seqio' else 'a glob of files'} "
                f"for task={source.task}",
            )
            _require(
                source.task not in GENERATED_TASKS or count == 1,
                f"task={self.task}: {source.task} has a vocabulary of its own, so it can't be mixed with other sources",
            )
            _require(source.weight > 0, f"weights={self.weights} must be greater than 0")
            _require(source.min_document_tokens >= 0, "min_document_tokens must be 0 or greater")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of documents, in order."""
        columns = [getattr(self, name) for name in _PER_SOURCE]
        count = max(map(len, columns))
        return tuple(
            SourceConfig(*row) for row in zip(*(column * (count // len(column)) for column in columns), strict=True)
        )


@dataclasses.dataclass(frozen=True)
class DictionaryConfig:
    """Dictionary lookup, for `data.task=dictionary` (FoT, Appendix D).

    A document defines records, `<k> key <v> value`, and then asks for them, `<q> key <v> value`; the loss counts values
    that were asked for, alone. Documents are made as they are read; each batch has new ones.

    Attributes:
      symbols: different tokens that keys and values are made of; <pad>, <k>, <v> and <q> come
        before them in the vocabulary.
      key_tokens: tokens of a key.
      value_tokens: tokens of a value.
      document: tokens of a training document; `data.context` × `crossbatch.packing`, so that a pack is a document.
      window: tokens that hold whole records, the rest being <pad>; the last window of a document asks, those before it
        define.
      records: different records of a training document, for each phase of the curriculum; 0 is as many as fit.
      records_steps: the steps at which the next phase begins.
      fill: what takes the places that fewer records leave: "repeat" (they are defined and asked for again) or "pad".
      confusable: share of the keys of a training document that have all tokens but one in common with a key of each
        neighbouring document.
      confusable_documents: consecutive documents that are neighbours.
    """

    symbols: int = 60
    key_tokens: int = 4
    value_tokens: int = 4
    document: int = 512
    window: int = 256
    records: tuple[int, ...] = (0,)
    records_steps: tuple[int, ...] = ()
    fill: str = "repeat"
    confusable: float = 0.0
    confusable_documents: int = 32

    def __post_init__(self):
        _positive(self, "symbols", "key_tokens", "value_tokens", "document", "window", "confusable_documents")
        _one_of(self, "fill", DICTIONARY_FILLS)
        _require(
            self.window_records > 0,
            f"window={self.window} tokens can't hold a record of {self.record_tokens}: raise window",
        )
        _require(
            self.document % self.window == 0 and self.document > self.window,
            f"document={self.document} must be a multiple of window={self.window}, at least 2 windows",
        )
        most = self.window_records * (self.document // self.window - 1)
        _require(
            self.symbols**self.key_tokens >= most,
            f"symbols={self.symbols} and key_tokens={self.key_tokens} make {self.symbols**self.key_tokens} keys but a "
            f"document defines {most}: raise one of them",
        )
        _require(
            len(self.records) > 0 and all(0 <= count <= most for count in self.records),
            f"records={self.records} must be 0 to {most}, what a document has room for",
        )
        _require(
            len(self.records_steps) == len(self.records) - 1
            and list(self.records_steps) == sorted(set(self.records_steps)),
            f"records_steps={self.records_steps} must be {len(self.records) - 1} ascending steps, one less than the "
            "phases of records",
        )
        _require(0 <= self.confusable <= 1, f"confusable={self.confusable} must be in [0, 1]")
        _require(
            self.confusable == 0 or self.confusable_documents <= self.symbols,
            f"confusable_documents={self.confusable_documents} differ in one token of symbols={self.symbols}: lower it",
        )

    @property
    def record_tokens(self) -> int:
        """Tokens of a definition, or of a question with its answer."""
        return self.key_tokens + self.value_tokens + 2

    @property
    def window_records(self) -> int:
        """Whole records that a window holds."""
        return self.window // self.record_tokens


@dataclasses.dataclass(frozen=True)
class PasskeyConfig:
    """Passkey retrieval, for `data.task=passkey` and the evaluation of any model (FoT, section 5).

    A document hides a number in filler and then asks for it; the loss counts the answer alone. Documents are made as
    they are read; each batch has new ones.

    Attributes:
      digits: of a pass key; the first is not 0.
      document: tokens of a training document, <pad> included; `data.context` × `crossbatch.packing`, so that a pack is
        a document.
      tokens: tokens of its text at the most, for each phase of the curriculum; texts are of all lengths below.
      documents_per_key: for each phase, of so many consecutive documents the first has a key and a question, the others
        are filler alone. A question must see no other key, as nothing tells one document's from another's:
        `crossbatch.d` can be at most this.
      phase_steps: the steps at which the next phase begins.
    """

    digits: int = 5
    document: int = 512
    tokens: tuple[int, ...] = (512,)
    documents_per_key: tuple[int, ...] = (1,)
    phase_steps: tuple[int, ...] = ()

    def __post_init__(self):
        _positive(self, "digits", "document")
        _require(self.digits <= 18, f"digits={self.digits} must be at most 18")
        phases = len(self.phase_steps) + 1
        _require(
            list(self.phase_steps) == sorted(set(self.phase_steps)), f"phase_steps={self.phase_steps} must be ascending"
        )
        for name in ("tokens", "documents_per_key"):
            values = getattr(self, name)
            _require(
                len(values) == phases and min(values) > 0,
                f"{name}={values} must have {phases} entries above 0, one more than phase_steps",
            )
        _require(
            max(self.tokens) <= self.document,
            f"tokens={self.tokens} must be at most document={self.document}",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning rate (FoT, Appendix A).

    Attributes:
      name: "adamw" (LongLLaMA) or "adafactor" (the paper's small models).
      learning_rate: peak learning rate.
      min_learning_rate: where "cosine" ends and below which "rsqrt" does not go.
      beta1: decay of the first moment.
      beta2: decay of AdamW's second moment.
      epsilon: AdamW's ε.
      schedule: "constant", "cosine" (down to `min_learning_rate` at the last step), or "rsqrt"
        (peak·sqrt(warmup/step), never below `min_learning_rate`), each after a linear warm-up.
      warmup_steps: steps from 0 to `learning_rate`.
      clip_norm: largest global gradient norm; 0 is no clipping.
      weight_decay: decoupled; spares norms, biases, temperatures and gates.
    """

    name: str = "adamw"
    learning_rate: float = 4e-3
    min_learning_rate: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self):
        _one_of(self, "name", OPTIMIZERS)
        _one_of(self, "schedule", LR_SCHEDULES)
        _positive(self, "learning_rate", "epsilon")
        _not_negative(self, "min_learning_rate", "warmup_steps", "weight_decay", "clip_norm")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be in [0, 1)")
        _require(
            self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate={self.min_learning_rate} must not be above learning_rate={self.learning_rate}",
        )
        _require(
            self.schedule != "rsqrt" or self.warmup_steps > 0,
            "warmup_steps=0: the rsqrt schedule is scaled by its warm-up, give it at least 1 step",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, all the devices that are left.

    Attributes:
      data: rows are split, parameters replicated.
      fsdp: rows are split, parameters too.
      tensor: heads, feed-forward and vocabulary are split.
      sequence: the slots of a memory are split, for the readers sharded_*; everything else is replicated.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        _require(all(size == -1 or size > 0 for size in sizes), f"axis sizes {sizes} must be -1 or above 0")
        _require(sizes.count(-1) <= 1, f"axis sizes {sizes}: only one axis may be -1")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and habits of a run, counted in optimizer steps.

    Attributes:
      steps: optimizer steps of the run.
      seed: of the parameters and of random draws of d.
      init_from: workdir of another run whose newest checkpoint gives the first parameters; "" draws them.
      accumulation: microbatches whose gradients are added up before one optimizer step.
      log_every: steps between two lines of metrics.
      evaluate_every: steps between two losses on held-out documents; 0 is never.
      evaluate_batches: batches of held-out documents in such a loss.
      checkpoint_every: steps between two checkpoints (the last step is always saved).
      keep_last: how many of the newest checkpoints are kept.
      keep_every: checkpoints at multiples of this step are kept for good; 0 is none.
      max_skipped: how many steps in a row may be skipped for non-finite gradients before the run stops.
    """

    steps: int = 1000
    init_from: str = ""
    accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 200
    evaluate_batches: int = 8
    checkpoint_every: int = 200
    keep_last: int = 2
    keep_every: int = 0
    max_skipped: int = 10

    def __post_init__(self):
        _positive(self, "steps", "accumulation", "log_every", "evaluate_batches", "checkpoint_every", "keep_last")
        _positive(self, "max_skipped")
        _not_negative(self, "seed", "evaluate_every", "keep_every")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What evaluations of a trained model read and measure (FoT, sections 3.3 and 4, Appendix D).

    Attributes:
      memory: memory lengths to compare, in tokens per row, 0 being no memory.
      readers: entries of `fot.readers.table.READERS` to evaluate.
      neighbours: entries that a reader retrieves per query and head, k; dense ones read all.
      block: memory slots scored at once, in tokens; bounds memory, changes no result.
      recall_target: share of the k nearest entries that the reader "approximate" is to find, between 0 and 1.
      list_size: entries of a list of the reader "clustered" at the most; there is about a centroid for so many slots.
        Of "host_lists" it is the mean.
      probes: lists that "clustered" and "host_lists" read per query and head.
      refresh: tokens per row between two updates of these lists; what is in none is read exactly.
      overflow: when a row's memory is full, "drop_oldest" or "refuse" to go on.
      windows: windows of a row read at once while a memory is filled, with one memory layer; changes no result.
      modes: "single_doc": a query sees only its own document's entries; "multi_doc": every entry.
      batch_size: documents read side by side.
      max_documents: evaluate on this many held-out documents at the most; 0 is all.
      max_tokens: read this many tokens of a document at the most; 0 is all.
      position_bins: upper ends, in tokens, of the bins of the table by position in the document.
      contexts: for distraction, the numbers d of previous contexts in view, ascending.
      query_windows: for distraction, windows of queries to average over, as far as there are documents for them.
      inspected: for retrieval, how many tokens are shown where none are named.
      retrieved: for retrieval, memory tokens shown for each of them, per layer and head.
      surroundings: for retrieval, how many tokens are shown before and after each memory token.
      memory_dtype: dtype of the keys and values that a dictionary's memory holds; "compute" is `model.compute_dtype`.
      questions: windows of questions put to a dictionary at each memory length.
      lengths: for passkey, lengths of the prompts in tokens, ascending.
      depths: for passkey, shares of the filler that come before the key, ascending.
      trials: for passkey, prompts of each length and depth.
      plain_tokens: definitions that a plain transformer reads at the most, in tokens: its time grows with their square.
    """

    memory: tuple[int, ...] = (0, 256, 1024, 4096, 16384)
    readers: tuple[str, ...] = ("dense", "knn")
    neighbours: int = 128
    block: int = 1024
    overflow: str = "drop_oldest"
    windows: int = 4
    recall_target: float = 0.95
    list_size: int = 512
    probes: int = 48
    refresh: int = 4096
    modes: tuple[str, ...] = ("single_doc", "multi_doc")
    batch_size: int = 8
    max_documents: int = 0
    max_tokens: int = 0
    position_bins: tuple[int, ...] = (128, 512, 2048, 8192, 32768)
    contexts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    query_windows: int = 128
    inspected: int = 6
    retrieved: int = 4
    surroundings: int = 8
    memory_dtype: str = "compute"
    questions: int = 16
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 8
    plain_tokens: int = 16384

    def __post_init__(self):
        _positive(self, "neighbours", "block", "windows", "batch_size", "query_windows", "inspected", "retrieved")
        _positive(self, "questions", "plain_tokens", "list_size", "probes", "refresh", "trials")
        _require(0 < self.recall_target < 1, f"recall_target={self.recall_target} must lie between 0 and 1")
        _one_of(self, "overflow", OVERFLOWS)
        _one_of(self, "memory_dtype", MEMORY_DTYPES)
        _not_negative(self, "max_documents", "max_tokens", "surroundings")
        _require(
            len(self.memory) > 0 and all(m >= 0 for m in self.memory) and list(self.memory) == sorted(set(self.memory)),
            f"memory={self.memory} must be ascending lengths in tokens",
        )
        for name in self.readers:
            _require(name in READER_NAMES, f"readers: {name!r} is not one of {', '.join(READER_NAMES)}")
        for name in self.modes:
            _require(name in MEMORY_MODES, f"modes: {name!r} is not one of {', '.join(MEMORY_MODES)}")
        _require(
            len(self.position_bins) > 0 and list(self.position_bins) == sorted(set(self.position_bins)),
            f"position_bins={self.position_bins} must be ascending",
        )
        _require(
            len(self.contexts) > 0 and min(self.contexts) > 0 and list(self.contexts) == sorted(set(self.contexts)),
            f"contexts={self.contexts} must be ascending numbers of contexts above 0",
        )
        _require(
            len(self.lengths) > 0 and min(self.lengths) > 0 and list(self.lengths) == sorted(set(self.lengths)),
            f"lengths={self.lengths} must be ascending lengths in tokens above 0",
        )
        _require(
            len(self.depths) > 0
            and list(self.depths) == sorted(set(self.depths))
            and 0 <= self.depths[0] <= self.depths[-1] <= 1,
            f"depths={self.depths} must be ascending shares from 0 to 1",
        )


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How a text is read and continued (FoT, section 3.1; the released LongLLaMA code).

    `data.context` is the window in which it is read, and the most that the local context holds. How a reader reads is
    in `evaluate`: `neighbours`, `block`, `recall_target`, `list_size`, `probes`.

    Attributes:
      last_context_length: tokens at the end of a prompt that stay in the local context; what is before is in memory.
      max_new_tokens: tokens to generate at the most.
      temperature: what logits are divided by; 0 takes the likeliest token.
      top_k: draw from this many likeliest tokens; 0 is all.
      top_p: draw from the likeliest tokens that have this probability together; 1 is all.
      seed: of the draws.
      reader: entry of `fot.readers.table.READERS`.
      memory_dtype: dtype of the keys and values in memory; "compute" is `model.compute_dtype`.
      memory_block: entries by which memories differ in size and grow; larger compiles more rarely and wastes more.
      windows: windows of a prompt read at once, see `evaluate.windows`; changes no result.
    """

    last_context_length: int = 1024
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    reader: str = "dense"
    memory_dtype: str = "compute"
    memory_block: int = 8192
    windows: int = 1

    def __post_init__(self):
        _positive(self, "last_context_length", "memory_block", "windows")
        _not_negative(self, "max_new_tokens", "temperature", "top_k", "seed")
        _require(0 < self.top_p <= 1, f"top_p={self.top_p} must be above 0, and 1 at the most")
        _one_of(self, "reader", READER_NAMES)
        _one_of(self, "memory_dtype", MEMORY_DTYPES)


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
        _require(
            rows % divisor == 0,
            f"data.batch_size={rows} must be a multiple of crossbatch.packing × train.accumulation = {divisor}",
        )
        rows = rows // self.train.accumulation
        packs = rows // crossbatch.packing
        if crossbatch.variant == "previous":
            _require(
                max(crossbatch.d) <= packs,
                f"crossbatch.d={crossbatch.d}: {rows} rows (data.batch_size / train.accumulation) in packs of "
                f"{crossbatch.packing} hold {packs} documents, so d can be at most {packs}",
            )
        if crossbatch.variant == "segments":
            negatives = max(n for _, n in crossbatch.segments)
            _require(
                negatives <= rows - crossbatch.packing,
                f"crossbatch.segments wants {negatives} negatives but only {rows - crossbatch.packing} rows belong "
                "to other packs: raise data.batch_size",
            )
        if crossbatch.variant == "released":
            _require(
                crossbatch.range < rows,
                f"crossbatch.range={crossbatch.range} must be below the {rows} rows of a microbatch",
            )
        _require(
            crossbatch.variant == "none" or len(self.model.memory_layers) > 0,
            "model.memory_layers is empty: crossbatch needs a memory layer, or set crossbatch.variant=none",
        )
        if "dictionary" in self.data.task:
            self._check_dictionary()
        if "passkey" in self.data.task:
            self._check_passkey(packs)

    def _check_passkey(self, packs: int) -> None:
        passkey, crossbatch = self.passkey, self.crossbatch
        _require(
            self.data.context * crossbatch.packing == passkey.document,
            f"data.context={self.data.context} × crossbatch.packing={crossbatch.packing} must be passkey.document="
            f"{passkey.document}: a pack is a document",
        )
        _require(
            self.data.packing == "strided",
            f"data.packing={self.data.packing} gives packs other documents than their own: set it to strided",
        )
        steps = crossbatch.d_steps if crossbatch.d_schedule == "steps" else ()
        for step in sorted({0, *passkey.phase_steps, *steps}) if crossbatch.variant == "previous" else ():
            seen = crossbatch.d[sum(step >= first for first in steps)] if steps else max(crossbatch.d)
            each = passkey.documents_per_key[sum(step >= first for first in passkey.phase_steps)]
            _require(
                seen <= each and packs % each == 0,
                f"passkey.documents_per_key={passkey.documents_per_key}: at step {step} it is {each}, which must be at "
                f"least crossbatch.d, {seen}, and divide the {packs} documents of a microbatch",
            )

    def _check_dictionary(self) -> None:
        dictionary, context = self.dictionary, self.data.context
        _require(
            dictionary.symbols + DICTIONARY_MARKS <= self.model.vocab_size,
            f"dictionary.symbols={dictionary.symbols} and {DICTIONARY_MARKS} marks need model.vocab_size="
            f"{self.model.vocab_size} to be at least {dictionary.symbols + DICTIONARY_MARKS}",
        )
        _require(
            context * self.crossbatch.packing == dictionary.document,
            f"data.context={context} × crossbatch.packing={self.crossbatch.packing} must be dictionary.document="
            f"{dictionary.document}: a pack is a document",
        )
        _require(
            context % dictionary.window == 0,
            f"data.context={context} must be a multiple of dictionary.window={dictionary.window}",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the config as nested dicts of plain values; tuples stay tuples."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(config)
        for value in (getattr(config, field.name),)
    }


def from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Freezes nested mappings (a ConfigDict, or parsed JSON) to a validated `ExperimentConfig`.

    Raises:
      ConfigError: one line naming the field, for an unknown or missing field, a wrong type or an invalid value.
    """
    return _build(ExperimentConfig, values, "")


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    types_by_name = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in types_by_name]
    if unknown:
        raise ConfigError(f"unknown config field {path}{unknown[0]}{_nearest(unknown[0], types_by_name)}")
    missing = [name for name in types_by_name if name not in values]
    if missing:
        raise ConfigError(f"config field {path}{missing[0]} is missing")
    fields = {name: _convert(kind, values[name], path + name) for name, kind in types_by_name.items()}
    try:
        return cls(**fields)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Checks that `value` has the type `kind`; lists (as JSON gives them) become tuples, ints become floats."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a group of fields, not {value!r}")
        return _build(kind, value, path + ".")
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}={value!r} must be a tuple, such as {path}=1,2")
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise ConfigError(f"{path}={value!r} must have {len(kinds)} elements")
        return tuple(_convert(k, v, path) for k, v in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path}={value!r} must be of type {kind.__name__}")
    return value


def fields(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of every field of a nested mapping."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from fields(value, f"{path}{name}.")
        else:
            yield path + name, value


def unknown_field(name: str) -> str:
    """Returns the one line to print for a dotted field name that no config has."""
    names = [known for known, _ in fields(to_dict(ExperimentConfig()))]
    return f"unknown config field {name}{_nearest(name, names)}"


def differences(left: ExperimentConfig, right: ExperimentConfig) -> list[str]:
    """Returns 'name: left → right' for every field in which two configs differ."""
    right_values = dict(fields(to_dict(right)))
    return [
        f"{name}: {value!r} → {right_values[name]!r}"
        for name, value in fields(to_dict(left))
        if value != right_values[name]
    ]
