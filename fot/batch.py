"""What data hands to training and evaluation."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows of tokens, all [R, T].

    Attributes:
      tokens: int32 token ids; 0 where there is no token.
      targets: int32, the token that follows; 0 where none does.
      weights: float32, 1 where the target counts: 0 at the last token of a document and where there is no token.
      documents: int32, names an occurrence of a document: its ordinal (training) or its index in the corpus
        (evaluation); -1 where there is no token.
      positions: int32, index of the token in its document; 0 where there is no token.
    """

    tokens: Any
    targets: Any
    weights: Any
    documents: Any
    positions: Any
