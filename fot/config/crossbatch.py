"""Which contexts memory layers see in training."""

import dataclasses

from fot.config.checks import not_negative, one_of, positive, require

CROSSBATCH_VARIANTS = ("none", "previous", "segments", "released")
LOSS_ROWS = ("all", "last")
D_SCHEDULES = ("constant", "steps", "accuracy", "random")


@dataclasses.dataclass(frozen=True)
class CrossbatchConfig:
    """Which contexts the memory layers see in training (FoT, section 3.2 and Appendix A).

    A pack is `packing` consecutive rows of one document stream; rows are numbered pack by pack.

    Attributes:
      variant: "none", "previous" (the paper's d and w), "segments" (LongLLaMA's (p, n)), or "released"
        (range, stepping and packing of the released LongLLaMA code).
      packing: consecutive rows that continue one document, K.
      groups: equal groups of consecutive packs in a microbatch; a row sees rows of its own group alone, as if each
        group were a batch of its own. A multiple of the mesh's data × fsdp needs no communication for contexts,
        a multiple of the TPU slices none between them.
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
    groups: int = 1
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
        one_of(self, "variant", CROSSBATCH_VARIANTS)
        one_of(self, "loss_rows", LOSS_ROWS)
        one_of(self, "d_schedule", D_SCHEDULES)
        positive(self, "packing", "groups", "w", "range")
        not_negative(self, "d_after")
        require(len(self.d) > 0 and all(d > 0 for d in self.d), f"d={self.d} must name at least one d, each above 0")
        if self.variant == "previous":
            require(
                self.w < self.packing,
                f"w={self.w} previous contexts need packing={self.packing} to be at least {self.w + 1}",
            )
        if self.variant == "segments":
            require(
                len(self.segments) == self.packing,
                f"segments has {len(self.segments)} places but packing={self.packing}: they must be equal",
            )
            for place, segment in enumerate(self.segments):
                require(
                    len(segment) == 2 and 0 <= segment[0] <= place and segment[1] >= 0,
                    f"segments[{place}]={segment} must be (positives, negatives) with at most {place} positives",
                )
        if self.d_schedule == "constant":
            require(len(self.d) == 1, f"d={self.d} has several phases: set d_schedule to steps, accuracy or random")
        if self.d_schedule == "steps":
            require(
                len(self.d_steps) == len(self.d) - 1 and list(self.d_steps) == sorted(set(self.d_steps)),
                f"d_steps={self.d_steps} must be {len(self.d) - 1} ascending steps, one less than the phases of d",
            )
        require(0 < self.d_accuracy <= 1, f"d_accuracy={self.d_accuracy} must be in (0, 1]")
