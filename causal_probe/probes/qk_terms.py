"""A head's attention scores as a sum over pairs of sources: who wrote what the query holds, and who what the key holds.

A layer reads the residual stream x through its normalization. With the scale of a forward pass held fixed, that is linear:

    query_i = (sum_s x_s,i) G W_Q / scale_i + b_Q     x_s: what source s has written (an embedding, a head, an MLP)
    key_j   = (sum_t x_t,j) G W_K / scale_j + b_K     G: the normalization's gain, and for LayerNorm the subtraction of the mean

A rotary embedding multiplies both by matrices that depend on the position alone, R_i and R_j. So the score is bilinear in the
sources, and the sum is exact:

    score_ij = c sum_s sum_t (query_s,i R_i) . (key_t,j R_j)

No family of models is assumed. Each step is checked against what passes the hook points, and a model for which the sum does not
give the score (one that normalizes queries and keys, caps its scores, or adds a bias to them) is refused.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.hooks.check import HookedModel, require_hooks
from causal_probe.hooks.heads import find_head
from causal_probe.hooks.values import read_values
from causal_probe.probes.circuit_weights import circuit_weights

__all__ = ["BIAS", "TermReader", "Terms", "head_of", "term_reader"]

#: The source that holds what depends on no token: the biases of queries and keys, and those of the heads' outputs below.
BIAS = "bias"
#: A sum may miss what it must give by so many times the largest value, in these precisions. (Hugging Face's RMSNorm computes
#: in single precision in a model of double precision, too.)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
#: In half precision the model itself rounds as coarsely as this.
COARSE = 0.1


@dataclass(frozen=True, eq=False)
class Terms:
    """What each source gives to a head's queries and keys, on one batch.

    Attributes
    ----------
    query, key
        By source, its part of the queries and of the keys, as they meet in the scores: rotated, and the factor c in the query.
        ``scores[i, j]`` is the sum over all pairs of sources of ``query[s, i] . key[t, j]``.
    unrotated_query, unrotated_key
        The same before the rotation, and without c.
    factor
        c.
    rotation
        R by position; None where nothing is rotated.
    pattern
        The head's attention.
    error
        By how much the scores that the model uses differ from the sums, at most, after each row's mean difference was taken away
        (what is added to all scores of a row does not change its attention).
    """

    query: Float[Tensor, "source batch pos d_head"]
    key: Float[Tensor, "source batch pos d_head"]
    unrotated_query: Float[Tensor, "source batch pos d_head"]
    unrotated_key: Float[Tensor, "source batch pos d_head"]
    factor: float
    rotation: Float[Tensor, "pos d_head d_head"] | None
    pattern: Float[Tensor, "batch pos pos"]
    error: float

    @property
    def scores(self) -> Float[Tensor, "batch pos pos"]:
        """The sum over all pairs of sources, of every query with every key, future ones too."""
        return self.query.sum(0) @ self.key.sum(0).mT

    def rotate(self, vectors: Float[Tensor, "*any pos d_head"]) -> Float[Tensor, "*any pos d_head"]:
        """Vectors, one at each position, as they meet in the scores."""
        return vectors if self.rotation is None else einsum(vectors, self.rotation, "... pos d, pos d e -> ... pos e")


class TermReader(ABC):
    """One head of one model, ready to be taken apart on any tokens.

    Attributes
    ----------
    sources
        Names of the sources, in the order in which they write: ``embed``, ``pos_embed``, ``L0H0``, ``L0.mlp``, ..., ``bias``.
    d_head
        Width of a term.
    """

    sources: tuple[str, ...]
    d_head: int

    def __init__(self, model: Any, layer: int, head: int) -> None:
        self.model, self.layer, self.head = model, layer, head

    @abstractmethod
    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Terms:
        """The terms on one batch."""


def term_reader(model: HookedModel, layer: Any, head: Any = None) -> TermReader:
    """Take one head's scores apart.

    Parameters
    ----------
    model
        A TransformerLens model; or one whose stream is a concatenation of named parts, as that of a
        :class:`~causal_probe.models.DisentangledTransformer`, where the parts are the sources.
    layer, head
        A layer and a head, counted from 0; or the head alone, as ``"L18H6"`` or ``(18, 6)``.

    Raises
    ------
    CausalProbeError
        If there is no such head, its scores are no sum over pairs of sources, or the weights can't be read. Reading raises
        it if the sum misses the scores that the model uses.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=2, n_positions=3)
    >>> model.block(0, 0, query="token", key="token")[1, 1] = 7
    >>> read = term_reader(model, 0, 0)
    >>> read.sources
    ('token', 'position')
    >>> terms = read(torch.tensor([[1, 0, 1]]))
    >>> (terms.query[0] @ terms.key[0].mT)[0, 2]   # tokens alone: the last query against all keys
    tensor([7., 0., 7.])
    """
    require_hooks(model, [])
    known: Any = model
    concatenated = hasattr(model, "named_blocks") and hasattr(model, "subspaces")
    heads = known.heads if concatenated else (int(model.cfg.n_heads),) * int(model.cfg.n_layers)
    layer, head = find_head(dict(enumerate(heads)), layer, head)
    require_hooks(model, [attention_hook(layer, "pattern")])
    return (_Concatenated if concatenated else _Summed)(model, layer, head)


def head_of(source: str) -> tuple[int, int] | None:
    """(layer, head) of a source that a head has written: all of it, or a part of it in a concatenated stream.

    >>> head_of("L3H11"), head_of("L1H0.L0H2.token"), head_of("L3.mlp"), head_of("embed")
    ((3, 11), (1, 0), None, None)
    """
    match = re.fullmatch(r"L(\d+)H(\d+)(\..+)?", source)
    return None if match is None else (int(match[1]), int(match[2]))


# ------------------------------------------------------------------------------------------------------------ ordinary models


class _Summed(TermReader):
    """A model whose sources add to one stream."""

    def __init__(self, model: HookedModel, layer: int, head: int) -> None:
        if getattr(model.cfg, "attention_dir", "causal") != "causal":
            raise CausalProbeError("Attention is bidirectional; only scores of causal attention are taken apart.")
        positions = getattr(model.cfg, "positional_embedding_type", None)
        if positions in ("alibi", "shortformer"):
            raise CausalProbeError(
                f"The model's positions ({positions}) enter the scores from outside the stream: no source has written them, and the "
                "scores are no sum over pairs of sources."
            )
        super().__init__(model, layer, head)
        with circuit_weights(model) as (_, weights):
            self.n_heads = len(weights.W_Q[layer])
        self.W = {"q": weights.W_Q[layer][head], "k": weights.W_K[layer][head]}
        embeddings = {"embed": "hook_embed"} | ({"pos_embed": "hook_pos_embed"} if positions == "standard" else {})
        mlps = (
            {}
            if getattr(model.cfg, "attn_only", False)
            else {f"L{n}.mlp": f"blocks.{n}.hook_mlp_out" for n in range(layer)}
        )
        #: Sources whose writing passes a hook point as it is.
        self.streams = {name: hook for name, hook in (embeddings | mlps).items() if hook in model.hook_dict}
        #: What takes a head's z to the query or the key: W_O G W, so that nothing of the stream's width is held for each head.
        self.through = {
            what: {f"L{n}H{h}": W_O @ W for n in range(layer) for h, W_O in enumerate(weights.W_O[n])}
            for what, W in self.W.items()
        }
        below = [[*(f"L{n}H{h}" for h in range(len(weights.W_O[n]))), f"L{n}.mlp"] for n in range(layer)]
        ordered = [*embeddings, *(source for names in below for source in names)]
        known = self.streams.keys() | self.through["q"].keys()
        self.sources = (*(source for source in ordered if source in known), BIAS)
        self.d_head = int(self.W["q"].shape[1])
        self._rotations: dict[int, Tensor | None] = {}

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Terms:
        """The terms on one batch."""
        here = {what: attention_hook(self.layer, what) for what in ("q", "k", "attn_scores", "pattern")}
        scale = f"blocks.{self.layer}.ln1.hook_scale"
        z = [attention_hook(layer, "z") for layer in range(self.layer)]
        names = [*here.values(), scale, *self.streams.values(), *z]
        found = read_values(self.model, tokens, names, n_layers=self.layer + 1)
        normalized = getattr(self.model.cfg, "normalization_type", None) is not None
        needed = [here["q"], here["k"], here["pattern"], *self.streams.values(), *z, *([scale] if normalized else [])]
        if silent := [name for name in needed if name not in found]:
            raise CausalProbeError(
                f"{silent[0]} does not fire, so the scores can't be taken apart. Load the model with eager attention."
            )
        inverse = 1 / found[scale].to(self.W["q"]) if normalized else torch.ones(1).to(self.W["q"])
        query, key = (self._terms(what, found, inverse) for what in ("q", "k"))
        rotation = self._rotation(tokens)
        return _checked(query, key, rotation, found, here, self.head)

    def _terms(
        self, what: str, found: Mapping[str, Tensor], inverse: Tensor
    ) -> Float[Tensor, "source batch pos d_head"]:
        W = self.W[what]
        carried = found[attention_hook(self.layer, what)]
        hooked = carried[:, :, self.head * carried.shape[2] // self.n_heads].to(W)  # queries of a group share a key
        terms = torch.empty(len(self.sources), *hooked.shape, dtype=W.dtype, device=W.device)
        for number, source in enumerate(self.sources[:-1]):
            if place := head_of(source):
                z = found[attention_hook(place[0], "z")][:, :, place[1]].to(W)
                terms[number] = z @ self.through[what][source] * inverse
            else:
                terms[number] = found[self.streams[source]].to(W) @ W * inverse
        terms[-1] = hooked - terms[:-1].sum(0)
        # What is left must be made of biases: one vector, and one vector of the stream over the scale.
        over_scale = inverse.expand_as(hooked[..., :1]).reshape(-1, 1).double()
        basis = torch.cat([torch.ones_like(over_scale), over_scale], 1)
        left = terms[-1].reshape(-1, self.d_head).double()
        misfit = left - basis @ (torch.linalg.pinv(basis, rtol=1e-6) @ left)
        _require_small(
            float(misfit.abs().max()),
            of=float(hooked.abs().max()),
            like=carried,  # as precise as the model is, not as what it is converted to
            what="queries" if what == "q" else "keys",
        )
        return terms

    def _rotation(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "pos d_head d_head"] | None:
        """What a query is multiplied by at each position, read off by putting unit vectors in the queries' place."""
        before, after, *angle = (attention_hook(self.layer, what) for what in ("q", "rot_q", "cos", "sin"))
        length = tokens.shape[1]
        if length not in self._rotations:
            rows = tokens[:1].expand(math.ceil(self.d_head / self.n_heads), -1)

            def units(query: Float[Tensor, "row pos head d_head"]) -> Float[Tensor, "row pos head d_head"]:
                # Every head of every row carries another one.
                eye = torch.eye(self.d_head, dtype=query.dtype, device=query.device).repeat(2, 1)
                return eye[: len(rows) * self.n_heads].reshape(len(rows), 1, self.n_heads, -1).expand_as(query).clone()

            found = read_values(self.model, rows, [after, *angle], n_layers=self.layer + 1, edits={before: units})
            if after in found:
                turned = found[after].transpose(1, 2).flatten(0, 1)[: self.d_head]  # [unit vector, pos, d_head]
                self._rotations[length] = turned.transpose(0, 1).to(self.W["q"]).contiguous()
            elif all(name in found for name in angle):  # some bridges show the angles alone
                cos, sin = (found[name].to(self.W["q"]).reshape(-1, length, found[name].shape[-1])[0] for name in angle)
                self._rotations[length] = _half_turns(cos, sin, self.d_head)
            else:
                self._rotations[length] = None
        return self._rotations[length]


def _half_turns(cos: Float[Tensor, "pos d_turned"], sin: Float[Tensor, "pos d_turned"], d_head: int) -> Tensor:
    """By position, the rotation of the first numbers of a head that pairs each one of their first half with one of the second."""
    half = cos.shape[1] // 2
    number = torch.arange(half, device=cos.device)
    turns = torch.eye(d_head, dtype=cos.dtype, device=cos.device).repeat(len(cos), 1, 1)
    turns[:, : 2 * half, : 2 * half] = torch.diag_embed(cos)
    turns[:, number + half, number] = -sin[:, :half]
    turns[:, number, number + half] = sin[:, half:]
    return turns


# ------------------------------------------------------------------------------------------------------- concatenated streams


class _Concatenated(TermReader):
    """A model whose stream is a concatenation of named parts, and whose query-key products are single matrices A."""

    def __init__(self, model: Any, layer: int, head: int) -> None:
        super().__init__(model, layer, head)
        self.parts: dict[str, slice] = model.subspaces(layer)
        self.sources = tuple(self.parts)
        self.d_head = max(part.stop for part in self.parts.values())

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Terms:
        """The terms on one batch."""
        here = {what: attention_hook(self.layer, what) for what in ("attn_scores", "pattern")}
        stream_hook = f"blocks.{self.layer}.hook_resid_pre"
        found = read_values(self.model, tokens, [*here.values(), stream_hook], n_layers=self.layer + 1)
        stream = found[stream_hook]
        A = self.model.A[self.layer][self.head].detach()
        query = torch.stack([stream[..., part] @ A[part] for part in self.parts.values()])
        key = torch.zeros_like(query)
        for number, part in enumerate(self.parts.values()):
            key[number, ..., part] = stream[..., part]
        return _checked(query, key, None, found, here, self.head)


# -------------------------------------------------------------------------------------------------------------------- checks


def _checked(
    query: Float[Tensor, "source batch pos d_head"],
    key: Float[Tensor, "source batch pos d_head"],
    rotation: Float[Tensor, "pos d_head d_head"] | None,
    found: Mapping[str, Tensor],
    hooks: Mapping[str, str],
    head: int,
) -> Terms:
    """The terms with the factor c, once their sum has been seen to be the score that the model uses."""
    pattern = found[hooks["pattern"]][:, head].to(query)
    terms = Terms(query, key, query, key, 1.0, rotation, pattern, 0.0)
    turned_query, turned_key = terms.rotate(query), terms.rotate(key)
    sums = turned_query.sum(0) @ turned_key.sum(0).mT
    # Some bridges show the pattern in the scores' place. Its logarithm is the score, but for a number for each row.
    scores = found.get(hooks["attn_scores"])
    used = (
        pattern.log()
        if scores is None or bool((scores[:, head].to(pattern) == pattern).all())
        else scores[:, head].to(pattern)
    )
    seen = torch.ones_like(used, dtype=torch.bool).tril() & (pattern > torch.finfo(pattern.dtype).tiny)
    ours, theirs = (_less_row_mean(values, seen) for values in (sums, used))
    power = float((ours * ours).sum())
    c = float((ours * theirs).sum()) / power if power > 0 else 1.0
    error = float((theirs - c * ours).abs().max())
    _require_small(error, of=1 + float(theirs.abs().max()), like=found[hooks["pattern"]], what="scores")
    return Terms(c * turned_query, turned_key, query, key, c, rotation, pattern, error)


def _less_row_mean(values: Float[Tensor, "batch pos pos"], seen: Tensor) -> Float[Tensor, "batch pos pos"]:
    values = torch.where(seen, values, 0).double()
    mean = values.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(seen, values - mean, 0)


def _require_small(error: float, *, of: float, like: Tensor, what: str) -> None:
    limit = TOLERANCE.get(like.dtype, COARSE) * of
    if not error <= limit:
        raise CausalProbeError(
            f"The head's {what} are not the sum of what the sources below it have written: they differ by {error:.2g}, where {limit:.2g} "
            "would be rounding. The model does more than normalize the stream, multiply and rotate (it may normalize queries and "
            "keys or what a layer writes, cap its scores, or add to them), so its scores can't be taken apart exactly."
        )
