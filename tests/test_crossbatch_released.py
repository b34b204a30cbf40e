"""The released scheme against arrays made by running the released code."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fot import attention, crossbatch
from fot.config import CrossbatchConfig
from fot.contexts import attend_contexts
from fot.crossbatch import Table

GOLDEN = sorted((pathlib.Path(__file__).parent / "data").glob("crossbatch_*.npz"))


class Golden:
    """Arrays made by running the released code; q, k and their gradients in the layout of `attention.rope`."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        self.settings = json.loads(str(self.arrays["settings"]))
        self.q, self.k, self.dq, self.dk = (_half_split(self.arrays[name]) for name in ("q", "k", "dq", "dk"))
        self.v, self.dv, self.out = self.arrays["v"], self.arrays["dv"], self.arrays["out"]
        self.weight = self.arrays["loss_weight"]
        self.bias, self.positions = self.arrays["bias"], self.arrays["position_ids"]
        self.rows, self.length = self.positions.shape
        self.pos0 = np.zeros((self.rows, 1), np.int32) + np.reshape(self.settings["pos0"], (-1, 1))
        self.table = crossbatch.released(
            CrossbatchConfig(
                variant="released",
                packing=self.settings["dataset_packing"],
                range=self.settings["cross_batch_range"],
                stepping=self.settings["cross_batch_stepping"],
            ),
            self.rows,
            1,
        )

    def placed(self, q, k) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scaled queries, local keys, and keys as other rows see them."""
        theta = self.settings["rope_theta"]
        first = jnp.broadcast_to(self.pos0, self.positions.shape)
        q = attention.rope(q, self.positions, theta) / np.sqrt(q.shape[-1])
        return q, attention.rope(k, self.positions, theta), attention.rope(k, first, theta)

    def ours(self, q, k, v) -> jax.Array:
        """Attention as fot has it; locally, a padded key is no token, though its query sees the ones before it."""
        near_q, near_k, far_k = self.placed(q, k)
        whole = crossbatch.rows_as_documents(self.rows, self.length)
        keys = whole._replace(documents=jnp.where(self.arrays["attention_mask"] > 0, whole.documents, -1))
        itself = Table(np.arange(self.rows, dtype=np.int32)[:, None], np.zeros((self.rows, 1), bool))
        if (self.arrays["attention_mask"] == 0).any():
            local = attend_contexts(near_q, near_k, v, whole, keys, itself, 8)
        else:
            local = attention.attend_local(near_q, near_k, v, whole, 8)
        shown = crossbatch.without_documents(self.table)
        return attention.merge(local, attend_contexts(near_q, far_k, v, whole, whole, shown, 8)).out

    def theirs(self, q, k, v) -> jax.Array:
        """The released formula, -1e6 and all: contexts wrap around and are hidden by adding to their logits."""
        near_q, near_k, far_k = self.placed(q, k)
        reach = self.settings["cross_batch_range"]
        selector = np.arange(self.rows)[:, None] - np.arange(1 + reach)
        keys = jnp.concatenate([near_k[:, None], far_k[selector[:, 1:]]], axis=1)
        hidden = np.ones((self.rows, 1 + reach), bool)
        hidden[:, : self.table.contexts_BC.shape[1] + 1] = np.pad(self.table.contexts_BC < 0, ((0, 0), (1, 0)))
        s = jnp.einsum("bqhd,bckhd->bhqck", near_q, keys) + jnp.where(hidden, -1e6, 0.0)[:, None, None, :, None]
        s = s.at[:, :, :, 0].add(self.bias)
        p = jax.nn.softmax(s.reshape(*s.shape[:3], -1), -1).reshape(s.shape)
        return jnp.einsum("bhqck,bckhd->bqhd", p, v[selector])

    def lost(self) -> np.ndarray:
        """[B, T]: queries that see no key at all; the released code averages over the keys it meant to hide."""
        return ~(self.bias[:, 0] == 0).any(-1) & (self.table.contexts_BC < 0).all(1, keepdims=True)


def _half_split(x: np.ndarray) -> np.ndarray:
    """Interleaved pairs (2i, 2i + 1) of the head dimension → halves (i, i + H/2)."""
    return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


def close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


def out_and_gradients(f, golden: Golden, weight: np.ndarray):
    def loss(q, k, v):
        out = f(q, k, v)
        return (out * weight).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(golden.q, golden.k, golden.v)
    return out, gradients


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def check(golden: Golden):
    """Compares outputs and gradients, those of lost queries left out.

    What these add to the gradients of keys and values comes of the released formula's rounding at -1e6, and is taken
    from there.
    """
    found = ~golden.lost()[..., None, None]
    assert found.mean() > 0.5
    out, gradients = out_and_gradients(golden.ours, golden, golden.weight * found)
    if not found.all():
        _, rest = out_and_gradients(golden.theirs, golden, golden.weight * ~found)
        gradients = jax.tree.map(jnp.add, gradients, rest)
    close(np.where(found, out, 0), np.where(found, golden.out, 0))
    close(gradients, (golden.dq, golden.dk, golden.dv))


def test_golden_files_are_there():
    assert len(GOLDEN) >= 2


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_released_scheme_agrees_with_the_released_code(path):
    check(Golden(load(path)))


@pytest.mark.parametrize(("side", "pos0"), [("left", 0), ("right", 3)])
def test_padded_rows_agree_with_the_released_formula(side, pos0):
    arrays = load(GOLDEN[0])
    rows, length = arrays["attention_mask"].shape
    mask = np.ones((rows, length), np.int32)
    mask[[0, 1, 3], slice(0, 5) if side == "left" else slice(-5, None)] = 0
    arrays |= {
        "attention_mask": mask,
        "bias": np.where(np.tri(length) * mask[:, None, None] > 0, 0, -1e6).astype(np.float32),
        "position_ids": pos0 + np.maximum(np.cumsum(mask, axis=1) - 1, 0),
        "settings": json.dumps(json.loads(str(arrays["settings"])) | {"pos0": pos0}),
    }
    golden = Golden(arrays)
    golden.out, (golden.dq, golden.dk, golden.dv) = out_and_gradients(golden.theirs, golden, golden.weight)
    assert golden.lost().any() == (side == "left")
    check(golden)
