"""What evaluations and generation read, and how."""

import dataclasses

from fot.config.checks import not_negative, one_of, positive, require
from fot.config.model import DTYPES

READER_NAMES = ("dense", "knn", "approximate", "clustered", "host", "host_lists", "sharded_dense", "sharded_knn")
MEMORY_DTYPES = ("compute", *DTYPES, "float16")
MEMORY_MODES = ("single_doc", "multi_doc")
OVERFLOWS = ("drop_oldest", "refuse")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What evaluations of a trained model read and measure (FoT, sections 3.3 and 4, Appendix D).

    Attributes:
      memory: memory lengths to compare, in tokens per row, 0 being no memory.
      readers: entries of `fot.readers.table.READERS` to evaluate.
      neighbours: entries that a reader retrieves per query and head, k; dense ones read all.
      block: memory slots scored at once, in tokens; bounds memory, changes no result.
      recall_target: share of the k nearest entries that the reader "approximate" is to find, between 0 and 1.
      list_size: entries of a list of the reader "clustered" at the most; there is about a centroid for twice as many
        slots. Of "host_lists" it is the mean.
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
        On a CPU, where XLA copies a whole bfloat16 memory at each write, "float16" is the half precision to take.
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
    list_size: int = 256
    probes: int = 64
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
        positive(self, "neighbours", "block", "windows", "batch_size", "query_windows", "inspected", "retrieved")
        positive(self, "questions", "plain_tokens", "list_size", "probes", "refresh", "trials")
        require(0 < self.recall_target < 1, f"recall_target={self.recall_target} must lie between 0 and 1")
        one_of(self, "overflow", OVERFLOWS)
        one_of(self, "memory_dtype", MEMORY_DTYPES)
        not_negative(self, "max_documents", "max_tokens", "surroundings")
        require(
            len(self.memory) > 0 and all(m >= 0 for m in self.memory) and list(self.memory) == sorted(set(self.memory)),
            f"memory={self.memory} must be ascending lengths in tokens",
        )
        for name in self.readers:
            require(name in READER_NAMES, f"readers: {name!r} is not one of {', '.join(READER_NAMES)}")
        for name in self.modes:
            require(name in MEMORY_MODES, f"modes: {name!r} is not one of {', '.join(MEMORY_MODES)}")
        require(
            len(self.position_bins) > 0 and list(self.position_bins) == sorted(set(self.position_bins)),
            f"position_bins={self.position_bins} must be ascending",
        )
        require(
            len(self.contexts) > 0 and min(self.contexts) > 0 and list(self.contexts) == sorted(set(self.contexts)),
            f"contexts={self.contexts} must be ascending numbers of contexts above 0",
        )
        require(
            len(self.lengths) > 0 and min(self.lengths) > 0 and list(self.lengths) == sorted(set(self.lengths)),
            f"lengths={self.lengths} must be ascending lengths in tokens above 0",
        )
        require(
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
      memory_dtype: dtype of the keys and values in memory; "compute" is `model.compute_dtype`. See `evaluate`.
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
        positive(self, "last_context_length", "memory_block", "windows")
        not_negative(self, "max_new_tokens", "temperature", "top_k", "seed")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be above 0, and 1 at the most")
        one_of(self, "reader", READER_NAMES)
        one_of(self, "memory_dtype", MEMORY_DTYPES)
