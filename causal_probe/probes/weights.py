"""What the weights say of each head before any token is seen: does it copy, does it look one back, whom does it read?

Notation: vectors are rows, so a head reads x W_Q, x W_K, x W_V and adds (pattern) x W_V W_O to the residual stream. Its two
circuits (Elhage et al. 2021) are

    W_OV = W_V W_O        what is moved, where it is attended to         [d_model, d_model], rank d_head at most
    W_QK = W_Q W_K^T      which key a query is drawn to                  [d_model, d_model], rank d_head at most

Neither is ever formed, and no matrix of the size d_vocab x d_vocab either: everything goes through products with d_head.

The linear part of a normalization belongs to the weights that read what it normalized: its gain, and for LayerNorm the
subtraction of the mean. A model whose normalization is folded already and one whose isn't have the same numbers. What depends
on the tokens, the division by the norm, is left out: it scales and does not turn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe, keep, require_hooks
from causal_probe.probes.circuit_weights import circuit_weights
from causal_probe.results import Result, Table
from causal_probe.results.lazy import pandas as pd

__all__ = ["Composition", "HeadWeights", "composition", "head_weights"]

#: The three ways in which a head can read what another wrote: through its queries, its keys, its values.
KINDS = ("q", "k", "v")

#: Scores of one head by layer; None where undefined.
ByHead = tuple[tuple[float | None, ...], ...]


# ----------------------------------------------------------------------------------------------------------- one head alone


@dataclass(frozen=True, eq=False, repr=False)
class HeadWeights(Result):
    """The result of :func:`head_weights`. Scores run over [layer][head]; None where undefined, for a reason given in ``undefined``.

    Attributes
    ----------
    copying
        OV copying score, in [-1, 1]: the sum of the eigenvalues of W_E W_OV W_U over the sum of their moduli. 1: attending to a
        token raises that token's logit, on the whole, as in a copying head; -1: it lowers it; a random head is near 0.
    previous_token
        QK previous-token score, in [0, 1]: the mean, over queries 1 to ``n_positions`` - 1, of the attention to the key just before
        that the head would pay if the stream held the position embeddings alone.
    previous_token_chance
        The same of even attention, the mean of 1 / (query + 1). None where ``previous_token`` is undefined for all.
    n_positions
        Length of the sequence that ``previous_token`` was measured on.
    undefined
        Reasons, by the name of a field (for all heads) or of a field and a head (``"copying L1H1"``).
    """

    KIND = "head weights"
    WORKS = ("elhage2021",)

    copying: ByHead
    previous_token: ByHead
    previous_token_chance: float | None
    n_positions: int | None
    undefined: Mapping[str, str]

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"A head's copying score in {self.provenance['model']} is the sum of the eigenvalues of W_E W_V W_O W_U over the "
            "sum of their moduli, with the normalization's linear part folded into the weights; its previous-token score is "
            "the mean attention to the preceding position with the residual stream replaced by the position embeddings "
            f"({self.measured_with})."
        )

    def table(self) -> Table:
        """One row for each head."""
        chance = self.previous_token_chance
        known = "" if chance is None else f": previous_token by chance {chance:.3f}, on {self.n_positions} positions"
        rows = [
            (layer, head, *scores)
            for layer, row in enumerate(zip(self.copying, self.previous_token, strict=True))
            for head, scores in enumerate(zip(*row, strict=True))
        ]
        return Table(
            f"HeadWeights of {self.provenance['model']}{known}",
            ("layer", "head", "copying", "previous_token"),
            rows,
            [f"{what}: {why}" for what, why in self.undefined.items()],
        )


@probe
def head_weights(model: HookedModel, *, n_positions: int | None = None) -> HeadWeights:
    """Score what each head does by its weights: copying (OV), and looking one position back (QK).

    Copying: W_E W_V W_O W_U is a matrix [d_vocab, d_vocab] of rank d_head at most; its eigenvalues other than zero are those of
    the matrix W_O (W_U W_E) W_V [d_head, d_head]. W_U is centred over the vocabulary, since a shift of all logits means nothing. W_E holds the token embeddings as they are: what the layers below make of
    them (in GPT-2 the first MLP makes much) is not in the score.

    Previous token: the model is run once with the residual stream before each layer replaced by the position embeddings, so the
    pattern is the head's own: its biases, scale and normalization included. Where there are no learned position embeddings
    (RoPE, ALiBi, none) the score is undefined: with RoPE what a query is drawn to depends on the content too.

    Grouped queries: query head h reads the key-value head h // (n_heads / n_key_value_heads).

    A :class:`~causal_probe.models.DisentangledTransformer`, which has no W_Q, W_K, W_V and W_O, is scored by its exact standard
    form, ``model.to_transformer_lens()``.

    Parameters
    ----------
    model
        A TransformerLens model, or any HookedRootModule with ``W_E``, ``W_V``, ``W_O``, ``W_U``. It is left as it was.
    n_positions
        Length of the sequence that the previous-token score is measured on, >= 2; by default 128, or the model's whole context
        where that is shorter.

    Raises
    ------
    CausalProbeError
        If the weights can't be read as one matrix for each head, or are not finite; or ``n_positions`` don't fit.

    References
    ----------
    Elhage et al., "A Mathematical Framework for Transformer Circuits", Transformer Circuits Thread, 2021.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=5, heads=[1, 1])
    >>> for i in range(1, 5):
    ...     model.block(0, 0, query="position", key="position")[i, i - 1] = 9.0
    >>> model.output_block("L1H0.token").fill_diagonal_(1.0).shape
    torch.Size([3, 3])
    >>> found = head_weights(model)
    >>> round(found.copying[1][0], 3), round(found.previous_token[0][0], 3)
    (1.0, 1.0)
    >>> found.undefined
    {'copying L0H0': 'its W_E W_V W_O W_U is zero'}
    """
    with circuit_weights(model) as (standard, weights):
        # A shift of all logits means nothing: W_U is centred over the vocabulary. [d_model, d_model], in place of [d_vocab, d_vocab].
        UE = (weights.W_U - weights.W_U.mean(-1, keepdim=True)) @ weights.W_E
        copying = tuple(
            tuple(_copying(W_V, W_O, UE) for W_V, W_O in zip(*layer, strict=True))
            for layer in zip(weights.W_V, weights.W_O, strict=True)
        )
        previous, chance, length, why = _previous_token(standard, n_positions, [len(layer) for layer in copying])
    undefined = {
        f"copying L{layer}H{head}": "its W_E W_V W_O W_U is zero"
        for layer, scores in enumerate(copying)
        for head, score in enumerate(scores)
        if score is None
    }
    if why is not None:
        undefined["previous_token"] = why
    return HeadWeights(copying, previous, chance, length, undefined, provenance=describe(model))


def _copying(
    W_V: Float[Tensor, "d_model d_head"], W_O: Float[Tensor, "d_head d_model"], UE: Float[Tensor, "d_model d_model"]
) -> float | None:
    # The eigenvalues of A B other than zero are those of B A: here A = W_E W_V and B = W_O W_U.
    eigenvalues = torch.linalg.eigvals(W_O @ UE @ W_V)
    moduli = float(eigenvalues.abs().sum())
    # Where a product should be zero, rounding leaves eigenvalues of the size eps; a score made of them would be noise.
    floor = torch.finfo(W_V.dtype).eps * float(W_O.norm() * UE.norm() * W_V.norm())
    return None if moduli <= floor else float(eigenvalues.sum().real) / moduli


def _previous_token(
    model: Any, n_positions: int | None, n_heads: Sequence[int]
) -> tuple[ByHead, float | None, int | None, str | None]:
    """Scores, chance, length; or None for each, and the reason."""
    nothing: ByHead = tuple((None,) * n for n in n_heads)
    kind = getattr(model.cfg, "positional_embedding_type", None)
    if kind != "standard" or "hook_pos_embed" not in model.hook_dict:
        return nothing, None, None, f"no position embeddings are added to the stream (the model's are {kind})"
    if getattr(model.cfg, "attention_dir", "causal") != "causal":
        return nothing, None, None, "attention is bidirectional"
    n_ctx = int(model.cfg.n_ctx)
    length = min(n_ctx, 128) if n_positions is None else n_positions
    if not 2 <= length <= n_ctx:
        raise CausalProbeError(
            f"The previous-token score was asked for on {length} positions; the model has {n_ctx}, and it takes two at least."
        )

    found: dict[str, Tensor] = {}
    names = [attention_hook(layer, "pattern") for layer in range(len(n_heads))]
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(len(n_heads))]
    require_hooks(model, ["hook_embed", streams[0], *names])

    def read(name: str, pattern: Float[Tensor, "1 head query key"], hook: Any) -> None:
        found[name] = pattern[0].double().diagonal(-1, 1, 2).mean(-1)

    # The stream before layer 0 is the position embeddings alone, the embedding of the tokens being zero.
    hooks: list[tuple[str, Any]] = [("hook_embed", lambda value, hook: torch.zeros_like(value))]
    hooks += [(streams[0], keep(found, "stream"))]
    hooks += [(name, lambda value, hook: found["stream"]) for name in streams[1:]]
    hooks += [(name, partial(read, name)) for name in names]
    with model.hooks(fwd_hooks=hooks):
        model(torch.zeros((1, length), dtype=torch.long, device=next(iter(model.parameters())).device))
    if missing := [name for name in names if name not in found]:
        raise CausalProbeError(f"{', '.join(missing)} did not fire. Load the model with eager attention.")
    chance = float(np.mean(1 / np.arange(2, length + 1)))
    return tuple(tuple(found[name].tolist()[:n]) for name, n in zip(names, n_heads, strict=True)), chance, length, None


# ------------------------------------------------------------------------------------------------------------- two heads


@dataclass(frozen=True, eq=False, repr=False)
class Composition(Result):
    """The result of :func:`composition`: for every two heads of different layers, how much the later reads what the earlier writes.

    Attributes
    ----------
    heads
        The heads (layer, head), by layer, then head: the two axes of the arrays.
    score
        By kind (``"q"``, ``"k"``, ``"v"``), [writer, reader], in [0, 1]. Zero where the writer's layer is not below the reader's.
    z
        By kind, [writer, reader]: by how many standard deviations the square of ``score`` differs from what it is in the mean over
        all random rotations of the stream between the two heads. Zero where the writer's layer is not below the reader's.
    baseline
        The root mean square of ``score`` over all random rotations, the same for every two heads: 1 / sqrt(dimension of the
        stream). It is exact.
    undefined
        Reasons, by head, for those that are in no pair of a kind.
    """

    KIND = "composition"
    WORKS = ("elhage2021",)

    heads: tuple[tuple[int, int], ...]
    score: Mapping[str, Float[np.ndarray, "head head"]]
    z: Mapping[str, Float[np.ndarray, "head head"]]
    baseline: float
    undefined: Mapping[str, str]

    def top(self, kind: str, k: int = 10) -> pd.DataFrame:
        """The ``k`` pairs that compose most, by ``score``.

        Raises
        ------
        CausalProbeError
            If the kind was not measured.
        """
        if kind not in self.score:
            raise CausalProbeError(
                f"Composition of the kind {kind!r} was not measured; there is {', '.join(self.score)}."
            )
        table = self.to_pandas()
        return table[table["kind"] == kind].head(k).reset_index(drop=True)

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Composition between heads of {self.provenance['model']} is the Frobenius norm of the product of the writer's W_OV "
            "with the reader's W_QK (q, k) or W_OV (v) over the product of their norms, and is compared with its exact mean "
            "square over random rotations of the residual stream between the two heads, "
            f"{self.baseline:.3f} squared ({self.measured_with})."
        )

    def table(self) -> Table:
        """One row for each kind and pair whose writer is in a layer below the reader's, largest ``score`` first."""
        names = ["L{}H{}".format(*head) for head in self.heads]
        rows: list[tuple[Any, ...]] = [
            (
                kind,
                names[w],
                names[r],
                float(scores[w, r]),
                float(scores[w, r]) - self.baseline,
                float(self.z[kind][w, r]),
            )
            for kind, scores in self.score.items()
            for w, writer in enumerate(self.heads)
            for r, reader in enumerate(self.heads)
            if writer[0] < reader[0]
            and not {f"{names[w]} writes", f"{names[r]} {'values' if kind == 'v' else 'scores'}"}
            & self.undefined.keys()
        ]
        rows.sort(key=lambda row: row[3], reverse=True)
        return Table(
            f"Composition of {len(self.heads)} heads of {self.provenance['model']}: baseline {self.baseline:.3f}",
            ("kind", "writer", "reader", "score", "excess", "z"),
            rows,
        )


@probe
def composition(model: HookedModel, *, kinds: Iterable[str] = KINDS) -> Composition:
    """How much each head reads what each head of an earlier layer writes: Q-, K- and V-composition, against a random baseline.

    Definition, with the Frobenius norm ``|.|``, writer 1 and reader 2::

        q = |W_OV1 W_QK2| / (|W_OV1| |W_QK2|)       through the reader's queries
        k = |W_OV1 W_QK2^T| / (|W_OV1| |W_QK2|)     through its keys
        v = |W_OV1 W_OV2| / (|W_OV1| |W_OV2|)       through its values

    Heads that have nothing to do with each other still score about 1 / sqrt(d_model), so the baseline is part of the result. It
    needs no sampling: put a random rotation R of the stream between the two (uniform over the orthogonal group). With
    A = W_OV1^T W_OV1 / |W_OV1|^2, B the same of the reader, and D the dimension of the stream, the square of the score,
    tr(A R B R^T), has over R

        mean      1 / D
        variance  2 (tr A^2 - 1/D) (tr B^2 - 1/D) / ((D - 1) (D + 2))

    D is d_model, or d_model - 1 with LayerNorm, which takes the mean away. The rotation R turns what is written relative to
    what is read; the singular values of both stay. A large ``z`` says that they are not turned at random: all heads of a
    trained model share directions, so compare heads with each other too.

    With RoPE, W_QK is that of a query and a key at the same position.

    Parameters
    ----------
    model
        A TransformerLens model, or any HookedRootModule with ``W_Q``, ``W_K``, ``W_V``, ``W_O``; a
        :class:`~causal_probe.models.DisentangledTransformer` by its exact standard form. It is left as it was.
    kinds
        Of ``"q"``, ``"k"``, ``"v"``. Each costs (heads x d_head)^2 x d_model multiplications.

    Raises
    ------
    CausalProbeError
        If a kind is unknown, or the weights can't be read as one matrix for each head, or are not finite.

    References
    ----------
    Elhage et al., "A Mathematical Framework for Transformer Circuits", Transformer Circuits Thread, 2021. The moments over
    rotations are those of the orthogonal group: traceless symmetric matrices are one irreducible representation of it.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=5, heads=[1, 1])
    >>> model.block(0, 0, query="position", key="position").fill_diagonal_(1.0).shape
    torch.Size([5, 5])
    >>> model.block(1, 0, query="token", key="L0H0.token").fill_diagonal_(1.0).shape
    torch.Size([3, 3])
    >>> composition(model).top("k", 1)   # L1H0's keys read 3 of the 8 dimensions that L0H0 writes
      kind writer reader     score    excess          z
    0    k   L0H0   L1H0  0.353553  0.176777  12.788735
    """
    kinds = tuple(kinds)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise CausalProbeError(f"There is no composition of the kind {unknown[0]!r}; there is {', '.join(KINDS)}.")
    with circuit_weights(model) as (_, weights):
        heads = tuple((layer, head) for layer, V in enumerate(weights.W_V) for head in range(len(V)))
    undefined: dict[str, str] = {}

    # |V O X Y^T| with V = (orthonormal) R and Y = (orthonormal) S is |(R O) (X S^T)|: [d_head, d_model] times [d_model, d_head].
    writers = [_unit(_triangle(W_V) @ W_O) for W_V, W_O in zip(weights.W_V, weights.W_O, strict=True)]
    readers = {
        "q": [_unit(W_Q @ _triangle(W_K).mT) for W_Q, W_K in zip(weights.W_Q, weights.W_K, strict=True)],
        "k": [_unit(W_K @ _triangle(W_Q).mT) for W_Q, W_K in zip(weights.W_Q, weights.W_K, strict=True)],
        "v": [_unit(W_V @ _triangle(W_O.mT).mT) for W_V, W_O in zip(weights.W_V, weights.W_O, strict=True)],
    }
    for what, factors in {"writes": writers, "scores": readers["q"], "values": readers["v"]}.items():
        each = [factor for layer in factors for factor in layer]
        undefined |= {
            f"L{layer}H{head} {what}": "its weights are zero"
            for (layer, head), factor in zip(heads, each, strict=True)
            if bool((factor == 0).all())
        }

    D = weights.dimension
    spread_of_writer = _spread(torch.cat([A @ A.mT for A in writers]), D)  # tr A^2 - 1 / D
    starts = np.cumsum([0, *(len(layer) for layer in writers)])
    score, z = {}, {}
    for kind in kinds:
        squares = np.zeros((len(heads), len(heads)))
        for reader in range(1, len(writers)):
            for writer in range(reader):
                product = einsum(writers[writer], readers[kind][reader], "w d_1 d_model, r d_model d_2 -> w r d_1 d_2")
                squares[starts[writer] : starts[writer + 1], starts[reader] : starts[reader + 1]] = (
                    product.square().sum((-2, -1)).cpu().numpy()
                )
        spread_of_reader = _spread(torch.cat([B.mT @ B for B in readers[kind]]), D)
        deviation = np.sqrt(2 * np.outer(spread_of_writer, spread_of_reader) / ((D - 1) * (D + 2)))
        below = np.array([[writer[0] < reader[0] for reader in heads] for writer in heads])
        with np.errstate(divide="ignore", invalid="ignore"):
            z[kind] = np.where(below & (deviation > 0), (squares - 1 / D) / deviation, 0.0)
        score[kind] = np.sqrt(squares)
    return Composition(heads, score, z, 1 / math.sqrt(D), undefined, provenance=describe(model))


def _triangle(X: Float[Tensor, "head m n"]) -> Float[Tensor, "head k n"]:
    """R of X = (orthonormal) R: what is left of X where only lengths count."""
    triangle: Tensor = torch.linalg.qr(X, mode="r").R
    return triangle


def _unit(X: Float[Tensor, "head m n"]) -> Float[Tensor, "head m n"]:
    """Each head's matrix over its norm; a zero matrix stays."""
    norm = torch.linalg.matrix_norm(X, keepdim=True)
    return X / torch.where(norm > 0, norm, 1)


def _spread(gram: Float[Tensor, "head d d"], dimension: int) -> Float[np.ndarray, " head"]:
    """By how much tr G^2 exceeds 1 / D, for G of trace one; zero, not rounding, where all D directions have the same share."""
    spread = gram.double().square().sum((-2, -1)) - 1 / dimension
    return np.asarray(torch.where(spread > 1e-9, spread, 0).cpu().numpy())
