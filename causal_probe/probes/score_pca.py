"""In how few directions do a head's attention scores vary from input to input?

A head's score matrix of one input is one vector: its lower triangle, T (T + 1) / 2 numbers for inputs of one length T. Over inputs their principal components
follow; ``explained[k - 1]`` = (l_1 + ... + l_k) / (sum of all l), l the eigenvalues of the covariance over inputs. If each input's scores are a mean field and
a mixture of r fields that are the same for all inputs, explained(r) = 1. A W_QK of rank r does not make it so.

Chance is not 0: n inputs span at most n - 1 directions. So the components are fitted on the first half of the inputs, and ``held_out`` says what they
explain on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import BatchSize, Count, checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.record import Rows, record
from causal_probe.results import BINARY, Result, Table

__all__ = ["ScorePCA", "score_pca"]

#: Most bytes that the scores of all inputs and heads may take.
MOST = 2**31
#: A score below this is a mask's.
HIDDEN = -1e30
#: Numbers of pairs, as multiples of the number of components, from which a score matrix is rebuilt.
MULTIPLES = (1, 2, 4, 8)


@dataclass(frozen=True, eq=False, repr=False)
class ScorePCA(Result):
    """The result of :func:`score_pca`. Numbers run over heads in the order of ``heads``.

    Attributes
    ----------
    heads
        (layer, head), from 0.
    constant
        Those whose scores are the same for all inputs: there is no variance to explain, and their figures are 0.
    explained
        [head, k]: share of the variance over all inputs in the first k + 1 components; 1 at the latest at n - 1.
    held_out
        [head, k]: share of the second half's variance (about the first half's mean) in the first k + 1 components of the first half.
    row_explained
        [head, k]: as ``explained``, of the last row of the scores alone.
    overlap
        [head, other head]: ||U' V||^2 / K of the first K components of both, in [0, 1]; two random K-dimensional spaces have K / D on average.
    chance
        That K / D, D = T (T + 1) / 2.
    components
        [head, component, pair]: the first half's components, orthonormal, over the pairs (query, key) of the lower triangle, row by row.
    pairs, rebuilt
        So many randomly chosen pairs of positions, and [head, number of pairs] the relative squared error of the second half's score matrices (about the
        first half's mean), rebuilt from these pairs alone by least squares in the first half's first K components.
    n_inputs
        Number of inputs.
    """

    KIND = "score PCA"
    WORKS = ("bhojanapalli2021",)

    heads: tuple[tuple[int, int], ...]
    constant: tuple[tuple[int, int], ...]
    explained: Float[np.ndarray, "head component"]
    held_out: Float[np.ndarray, "head component"]
    row_explained: Float[np.ndarray, "head component"]
    overlap: Float[np.ndarray, "head head"]
    components: Float[np.ndarray, "head component pair"] = field(metadata=BINARY)
    chance: float
    pairs: tuple[int, ...]
    rebuilt: Float[np.ndarray, "head number"]
    n_inputs: int

    @property
    def overlap_by_layer(self) -> Float[np.ndarray, "_layer _layer"]:
        """Mean overlap of a layer's heads with another layer's; within a layer, of its different heads (NaN where it has one)."""
        layers = np.array([layer for layer, _ in self.heads])
        names = np.unique(layers)
        different = ~np.eye(len(layers), dtype=bool)
        found = np.full((len(names), len(names)), np.nan)
        for i, one in enumerate(names):
            for j, two in enumerate(names):
                chosen = different & (layers == one)[:, None] & (layers == two)[None]
                if chosen.any():
                    found[i, j] = self.overlap[chosen].mean()
        return found

    @checked
    def overlap_with(self, other: ScorePCA) -> Float[np.ndarray, "head other"]:
        """||U' V||^2 / K of this result's heads with another's, such as those of another model on as many positions; in [0, 1], by chance :attr:`chance`.

        Raises
        ------
        CausalProbeError
            If the inputs differ in length, or the numbers of components differ.
        """
        for name in ("n_positions", "n_components"):
            if self.settings[name] != other.settings[name]:
                raise CausalProbeError(
                    f"`{name}` is {self.settings[name]} here and {other.settings[name]} there; directions are compared on equal terms. Take both anew with the same."
                )
        found: np.ndarray = _overlap(self.components, other.components)
        return found

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Principal components of the attention scores (lower triangles) of {len(self.heads)} heads of {self.provenance['model']} over {self.n_inputs} inputs of "
            f"{self.settings['n_positions']} tokens; held-out figures are those of components fitted on the first half ({self.measured_with})."
        )

    def table(self) -> Table:
        """One row per head."""
        k = self.explained.shape[1]
        return Table(
            f"ScorePCA of {self.provenance['model']}: {self.n_inputs} inputs of {self.settings['n_positions']} tokens",
            (
                "head",
                "1 component",
                f"{k} components",
                f"{k} held out",
                f"last row, {k}",
                f"rebuilt from {self.pairs[-1]} pairs, error",
            ),
            [
                (f"L{layer}H{head}", *map(float, (e[0], e[-1], h[-1], r[-1], b[-1])))
                for (layer, head), e, h, r, b in zip(
                    self.heads, self.explained, self.held_out, self.row_explained, self.rebuilt, strict=True
                )
            ],
            (
                "shares of the variance over inputs",
                *(f"L{layer}H{head}: its scores are the same for all inputs" for layer, head in self.constant),
            ),
        )


@probe
def score_pca(model: HookedModel, tokens: Any, *, n_components: Count = 4, batch_size: BatchSize = None) -> ScorePCA:
    """Principal components of every head's attention scores over inputs: variance explained, overlap between heads, rebuilding from few pairs.

    Parameters
    ----------
    model
        Any model with TransformerLens' hook points ``blocks.{layer}.attn.hook_attn_scores``.
    tokens
        Tokens [batch, pos] of one length, or batches of them: at least two inputs more than twice ``n_components``.
    n_components
        K, how many components are looked at.
    batch_size
        Sequences in a forward pass.

    Raises
    ------
    CausalProbeError
        If there are too few inputs, scores aren't finite below the diagonal (a sliding window: give shorter inputs), or they don't fit into 2 GiB.

    References
    ----------
    Bhojanapalli et al., "Eigen analysis of self-attention and its reconstruction from partial computation", 2021.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=6, heads=(1,))
    >>> _ = model.block(0, 0, query="token", key="token").diagonal().fill_(5)
    >>> found = score_pca(model, torch.randint(3, (64, 6), generator=torch.Generator().manual_seed(0)), n_components=2)
    >>> found.explained.shape, bool(found.explained[0, 0] < found.explained[0, 1] < 1)
    ((1, 2), True)
    """
    rows = record(model, tokens, _Triangles(), points=("attn_scores",), batch_size=batch_size)
    arrays = rows.arrays()
    n = len(next(iter(arrays.values())))
    if n < 2 * n_components + 2:
        raise CausalProbeError(
            f"{n_components} components are fitted on one half of the inputs and tried on the other, which takes {2 * n_components + 2}; {n} were given."
        )
    pos, size = rows.pos, rows.pos * (rows.pos + 1) // 2
    if size <= n_components or pos <= n_components:
        raise CausalProbeError(f"Inputs of {pos} tokens have too few scores for {n_components} components.")
    pairs = tuple(min(size, multiple * n_components) for multiple in MULTIPLES)
    shown = np.random.default_rng(0).permutation(size)
    heads, bases, numbers = [], [], []
    for layer in sorted(layer for _, layer in arrays):
        for head, scores in enumerate(arrays["scores", layer].transpose(1, 0, 2)):
            basis, found = _components(scores.astype(np.float64), pos, n_components, [shown[:many] for many in pairs])
            heads.append((layer, head))
            bases.append(basis)
            numbers.append(found)
    stacked = np.stack(bases)
    return ScorePCA(
        heads=tuple(heads),
        constant=tuple(head for head, found in zip(heads, numbers, strict=True) if not found["explained"].any()),
        **{name: np.stack([each[name] for each in numbers]) for name in numbers[0]},
        overlap=_overlap(stacked, stacked),
        components=stacked,
        chance=n_components / size,
        pairs=pairs,
        n_inputs=n,
        settings={"n_components": n_components, "n_positions": pos},
        provenance=describe(model),
    )


def _overlap(
    one: Float[np.ndarray, "head component pair"], two: Float[np.ndarray, "other component pair"]
) -> Float[np.ndarray, "head other"]:
    found: np.ndarray = np.square(np.einsum("akd, bld -> abkl", one, two)).sum((2, 3)) / one.shape[1]
    return found


class _Triangles(Rows):
    """The lower triangle of every head's scores."""

    pos = 0
    held = 0

    def reduce(self, layer: int, *values: Tensor) -> Mapping[str, Any]:
        """[sequence, head, pair]."""
        (scores,) = values
        self.pos = scores.shape[-1]
        query, key = torch.tril_indices(self.pos, self.pos, device=scores.device)
        its = scores[:, :, query, key].float()
        if not ((its > HIDDEN) & its.isfinite()).all():
            raise CausalProbeError(
                f"Layer {layer}: a score below the diagonal is no number or that of a hidden key, as with a sliding window or padding. Give inputs no longer than the window."
            )
        self.held += its.numel() * its.element_size()
        if self.held > MOST:
            raise CausalProbeError(
                f"The scores take more than {MOST // 2**30} GiB. Give fewer or shorter inputs: each takes 2 T (T + 1) bytes a head."
            )
        return {"scores": its.cpu().numpy()}


def _components(
    scores: Float[np.ndarray, "input pair"], pos: int, k: int, shown: list[Any]
) -> tuple[Float[np.ndarray, "component pair"], dict[str, Float[np.ndarray, " number"]]]:
    """The first half's first components, and the figures of one head."""
    first, second = np.array_split(scores, 2)
    basis = np.linalg.svd(first - first.mean(0), full_matrices=False)[2][:k]
    away = second - first.mean(0)
    total = np.square(away).sum()
    held_out = np.cumsum(np.square(away @ basis.T).sum(0)) / (total or 1)
    errors = []
    for chosen in shown:
        weights = np.linalg.lstsq(basis[:, chosen].T, away[:, chosen].T, rcond=None)[0]
        errors.append(np.square(away - weights.T @ basis).sum() / (total or 1))
    figures = {
        "explained": _explained(scores, k),
        "held_out": held_out,
        "row_explained": _explained(scores[:, -pos:], k),
        "rebuilt": np.array(errors),
    }
    return basis, figures


def _explained(values: Float[np.ndarray, "input number"], k: int) -> Float[np.ndarray, " component"]:
    """Cumulative shares of the variance; 0 where there is none beyond rounding."""
    centred = values - values.mean(0)
    variance = np.square(np.linalg.svd(centred, compute_uv=False))
    total = variance.sum()
    if total <= np.finfo(np.float32).eps ** 2 * np.square(values).sum():
        return np.zeros(k)
    return np.asarray(np.cumsum(variance)[:k] / total)
