"""Documents, tokenizer and batch."""

import dataclasses

from fot.config.checks import nearest, not_negative, one_of, positive, require
from fot.errors import ConfigError

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
                raise ConfigError(f"task={task!r} is not one of {', '.join(TASKS)}{nearest(task, TASKS)}")
        one_of(self, "tokenizer", TOKENIZERS)
        one_of(self, "packing", PACKINGS)
        one_of(self, "weight_unit", WEIGHT_UNITS)
        one_of(self, "bad_documents", BAD_DOCUMENTS)
        positive(self, "context", "batch_size", "workers")
        not_negative(self, "seed")
        require(0 < self.held_out_fraction < 1, f"held_out_fraction={self.held_out_fraction} must be between 0 and 1")
        require(
            self.tokenizer != "file" or self.tokenizer_file != "",
            "tokenizer_file is empty: name a SentencePiece model or a tokenizer.json, or set tokenizer=trained",
        )
        count = max(len(getattr(self, name)) for name in _PER_SOURCE)
        for_each = f", or {count}: one for each source" if count > 1 else ""
        for name in _PER_SOURCE:
            given = len(getattr(self, name))
            require(given in (1, count), f"{name} has {given} entries: give 1{for_each}")
        for source in self.sources:
            require(
                source.task not in TASKS_THAT_NAME_FILES or source.files != "",
                f"files is empty: name {'a registered task' if source.task == 'seqio' else 'a glob of files'} "
                f"for task={source.task}",
            )
            require(
                source.task not in GENERATED_TASKS or count == 1,
                f"task={self.task}: {source.task} has a vocabulary of its own, so it can't be mixed with other sources",
            )
            require(source.weight > 0, f"weights={self.weights} must be greater than 0")
            require(source.min_document_tokens >= 0, "min_document_tokens must be 0 or greater")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of documents, in order."""
        columns = [getattr(self, name) for name in _PER_SOURCE]
        count = max(map(len, columns))
        return tuple(
            SourceConfig(*row) for row in zip(*(column * (count // len(column)) for column in columns), strict=True)
        )
