"""What data hands to training and evaluation."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows of tokens, all [R, T].

    Attributes:
      tokens: int32 token ids; 0 where there is no token.
      targets: int32, the token that follows; 0 where none does.
      weights: float32, 1 where the target counts: 0 at the last token of a document and where there is no token.
      documents: int32, number of the document in the corpus; -1 where there is no token. Equal numbers are the same
        text, wherever in the batch: what comes earlier in it is never a negative, whichever pack holds it. So they
        also tell how much of a previous context belongs to the document that goes on.
      positions: int32, index of the token in its document; 0 where there is no token.
    """

    tokens: Any
    targets: Any
    weights: Any
    documents: Any
    positions: Any
