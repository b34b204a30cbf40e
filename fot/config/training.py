"""Optimizer, mesh, and the length and habits of a run."""

import dataclasses

from fot.config.checks import not_negative, one_of, positive, require

OPTIMIZERS = ("adamw", "adafactor")
LR_SCHEDULES = ("constant", "cosine", "rsqrt")


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
        one_of(self, "name", OPTIMIZERS)
        one_of(self, "schedule", LR_SCHEDULES)
        positive(self, "learning_rate", "epsilon")
        not_negative(self, "min_learning_rate", "warmup_steps", "weight_decay", "clip_norm")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be in [0, 1)")
        require(
            self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate={self.min_learning_rate} must not be above learning_rate={self.learning_rate}",
        )
        require(
            self.schedule != "rsqrt" or self.warmup_steps > 0,
            "warmup_steps=0: the rsqrt schedule is scaled by its warm-up, give it at least 1 step",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, all the devices that are left.

    Of several TPU slices, `data` leads from slice to slice if they divide it, else `fsdp` must.

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
        require(all(size == -1 or size > 0 for size in sizes), f"axis sizes {sizes} must be -1 or above 0")
        require(sizes.count(-1) <= 1, f"axis sizes {sizes}: only one axis may be -1")


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
      stuck_seconds: seconds without a new line of metrics after which several processes end, with 42, and say which
        of them holds the others up: not before 20 × the usual, and after four times as many in compilations,
        evaluations and saves, and before it is known what is usual. 0 is never, as with one process.
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
    stuck_seconds: int = 900

    def __post_init__(self):
        positive(self, "steps", "accumulation", "log_every", "evaluate_batches", "checkpoint_every", "keep_last")
        positive(self, "max_skipped")
        not_negative(self, "seed", "evaluate_every", "keep_every", "stuck_seconds")
