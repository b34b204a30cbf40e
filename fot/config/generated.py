"""Documents that are made as they are read."""

import dataclasses

from fot.config.checks import one_of, positive, require

DICTIONARY_FILLS = ("repeat", "pad")
DICTIONARY_MARKS = 4  # tokens that are no symbol: <pad>, <k>, <v>, <q>


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
        positive(self, "symbols", "key_tokens", "value_tokens", "document", "window", "confusable_documents")
        one_of(self, "fill", DICTIONARY_FILLS)
        require(
            self.window_records > 0,
            f"window={self.window} tokens can't hold a record of {self.record_tokens}: raise window",
        )
        require(
            self.document % self.window == 0 and self.document > self.window,
            f"document={self.document} must be a multiple of window={self.window}, at least 2 windows",
        )
        most = self.window_records * (self.document // self.window - 1)
        require(
            self.symbols**self.key_tokens >= most,
            f"symbols={self.symbols} and key_tokens={self.key_tokens} make {self.symbols**self.key_tokens} keys but a "
            f"document defines {most}: raise one of them",
        )
        require(
            len(self.records) > 0 and all(0 <= count <= most for count in self.records),
            f"records={self.records} must be 0 to {most}, what a document has room for",
        )
        require(
            len(self.records_steps) == len(self.records) - 1
            and list(self.records_steps) == sorted(set(self.records_steps)),
            f"records_steps={self.records_steps} must be {len(self.records) - 1} ascending steps, one less than the "
            "phases of records",
        )
        require(0 <= self.confusable <= 1, f"confusable={self.confusable} must be in [0, 1]")
        require(
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
        positive(self, "digits", "document")
        require(self.digits <= 18, f"digits={self.digits} must be at most 18")
        phases = len(self.phase_steps) + 1
        require(
            list(self.phase_steps) == sorted(set(self.phase_steps)), f"phase_steps={self.phase_steps} must be ascending"
        )
        for name in ("tokens", "documents_per_key"):
            values = getattr(self, name)
            require(
                len(values) == phases and min(values) > 0,
                f"{name}={values} must have {phases} entries above 0, one more than phase_steps",
            )
        require(
            max(self.tokens) <= self.document,
            f"tokens={self.tokens} must be at most document={self.document}",
        )
