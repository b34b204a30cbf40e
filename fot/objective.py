"""Next-token loss and its counts (FoT, section 3.2: the standard loss, nothing added)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fot import crossbatch, model
from fot.attention import Tokens
from fot.batch import Batch
from fot.config import ExperimentConfig, ModelConfig
from fot.crossbatch import Table
from fot.model import Params


class Sums(NamedTuple):
    """Sums over weighted target tokens; divide by `weight` for means.

    Attributes:
      nll: negative log-likelihood, in nats.
      correct: tokens whose most likely prediction was right.
      weight: total weight.
    """

    nll: jax.Array
    correct: jax.Array
    weight: jax.Array


def token_nll(params: Params, hidden: jax.Array, targets: jax.Array, config: ModelConfig) -> tuple:
    """Returns (nll in nats, whether the most likely token is the target) for each target, float32 and bool."""
    logits = model.unembed(params, hidden, config)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - picked, logits.argmax(-1) == targets


class Plan(NamedTuple):
    """What the rows of a microbatch are for: static.

    Attributes:
      table: the contexts that each row sees.
      keep: rows whose loss is taken.
      tokens_from_documents: whether masks follow documents, or rows (the released code).
    """

    table: Table
    keep: np.ndarray
    tokens_from_documents: bool


def plan(config: ExperimentConfig, d: int) -> Plan:
    """Returns the plan of a training microbatch at crossbatch dimension d."""
    rows = config.data.batch_size // config.train.accumulation
    table = crossbatch.make_table(config.crossbatch, rows, d)
    keep = crossbatch.loss_rows(config.crossbatch, rows)
    if config.crossbatch.mask_documents:
        return Plan(table, keep, True)
    return Plan(crossbatch.without_documents(table), keep, False)


def loss_sums(params: Params, batch: Batch, config: ModelConfig, plan: Plan) -> tuple[jax.Array, Sums]:
    """Returns the summed loss of a microbatch, to differentiate, and its sums.

    Args:
      params: float32 parameters.
      batch: rows [R, T].
      config: the model.
      plan: who sees whom and whose loss counts.
    """
    tokens = Tokens(batch.documents, batch.positions)
    if not plan.tokens_from_documents:
        tokens = crossbatch.rows_as_documents(*batch.tokens.shape)
    everything = len(plan.keep) == len(batch.tokens)
    keep = None if everything else plan.keep
    output = model.apply(params, batch.tokens, tokens, config, table=plan.table, keep=keep)
    nll, correct = token_nll(params, output.hidden, batch.targets[plan.keep], config)
    weights = batch.weights[plan.keep]
    sums = Sums((nll * weights).sum(), (correct * weights).sum(), weights.sum())
    return sums.nll, sums
