"""A head's attention scores as a sum over pairs of sources: who wrote what the query holds, and who what the key holds.

A layer reads the residual stream x through its normalization. With the scale of a forward pass held fixed, that is linear:

    query_i = (sum_s x_s,i) G W_Q / scale_i + b_Q     x_s: what source s has written (an embedding, a head, an MLP)
    key_j   = (sum_t x_t,j) G W_K / scale_j + b_K     G: the normalization's gain, and for LayerNorm the subtraction of the mean

What the model does to them next is linear too, with a number r_i for each position where it normalizes queries and keys, and
matrices R_i that depend on the position alone (:mod:`~causal_probe.probes.qk_sides`). So the score is bilinear in the sources, and
the sum is exact:

    score_ij = c sum_s sum_t (r_i query_s,i R_i) . (r_j key_t,j R_j)

A soft cap bends that sum, the layer's mask leaves keys out, and a sink takes a share of each row: attention is the softmax of
cap tanh(score / cap) over the visible keys and the sink.

No family of models is assumed. Each step is checked against what passes the hook points, and a model for which the sum does not
give the score, and the scores not the attention, is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.hooks.caught import is_catchable
from causal_probe.hooks.check import HookedModel, require_hooks
from causal_probe.hooks.heads import find_head
from causal_probe.hooks.skip import Skips
from causal_probe.hooks.values import read_values
from causal_probe.hooks.visible import heads_by_layer, seen_in, sink_of
from causal_probe.probes.circuit_weights import circuit_weights, norms_of_attention
from causal_probe.probes.qk_sides import Side, Turn, read, sides, turns
from causal_probe.probes.qk_split import Cut, Parts, covered, cut_stream
from causal_probe.probes.qk_stream import BIAS, StreamParts, StreamReader, head_of, require_small
from causal_probe.probes.qk_sums import Terms, checked_terms

__all__ = ["BIAS", "TermReader", "Terms", "head_of", "term_reader"]

#: The source of what a model adds to its scores by the distance alone; it meets itself in a number of its own.
ALIBI = "alibi"


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
        #: Of the widest numbers that are held for each source and position; 0 for no wider than a term.
        self.width = 0

    def cut(self, parts: Mapping[str, Parts], tokens: Int[Tensor, "batch pos"]) -> None:
        """Put parts of activations in the place of sources.

        Raises
        ------
        CausalProbeError
            If there is no such activation below the layer, or its parts are not of its shape.
        """
        raise CausalProbeError(
            "The sources of this model are the parts of a concatenated stream, and can't be cut further; give `parts` for a model whose sources add to one stream."
        )

    @abstractmethod
    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Terms:
        """The terms on one batch."""

    @abstractmethod
    def lost_without(
        self, tokens: Int[Tensor, "batch pos"], groups: Sequence[Sequence[str]], terms: Terms
    ) -> list[tuple[Tensor, Tensor] | None]:
        """By group of sources, what queries (with the factor c) and keys lose, as they meet in the scores, if the group is taken out of the stream that the
        layer reads, with every norm computed anew. None where a source is not in the stream.
        """


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
    heads = dict(enumerate(known.heads)) if concatenated else heads_by_layer(model)
    layer, head = find_head(heads, layer, head)
    require_hooks(model, [attention_hook(layer, "pattern")])
    return (_Concatenated if concatenated else _Summed)(model, layer, head)


# ------------------------------------------------------------------------------------------------------------ ordinary models


class _Summed(TermReader):
    """A model whose sources add to one stream."""

    def __init__(self, model: HookedModel, layer: int, head: int) -> None:
        if getattr(model.cfg, "attention_dir", "causal") != "causal":
            raise CausalProbeError("Attention is bidirectional; only scores of causal attention are taken apart.")
        positions = getattr(model.cfg, "positional_embedding_type", None)
        if positions == "shortformer":
            raise CausalProbeError(
                f"The model's positions ({positions}) enter queries and keys from outside the stream: no source has written them, and the "
                "scores are no sum over pairs of sources."
            )
        super().__init__(model, layer, head)
        with circuit_weights(model) as (standard, weights):
            heads = [len(W_O) for W_O in weights.W_O]
            behind = [norms_of_attention(block)[1] for block in standard.blocks]
            gains = [weights.gain(standard, block, name) for block, name in zip(standard.blocks, behind, strict=True)]
            before = norms_of_attention(standard.blocks[layer])[0]
        self.stream = StreamReader(model, layer, heads, gains)
        self.sides: dict[str, Side] = dict(zip("qk", sides(model, layer, heads[layer]), strict=True))
        self.W = {"q": weights.W_Q[layer][head], "k": weights.W_K[layer][head]}
        #: What takes a head's z to the query or the key: W_O G W, so that nothing of the stream's width is held for each head.
        self.through = {
            what: {f"L{n}H{h}": W_O @ W for n in range(layer) for h, W_O in enumerate(weights.W_O[n])}
            for what, W in self.W.items()
        }
        self.added = positions == "alibi"
        self.sources = (*self.stream.names, *([ALIBI] if self.added else []), BIAS)
        self.d_head = int(self.W["q"].shape[1])
        has_norm = before == "ln1" and getattr(model.cfg, "normalization_type", None) is not None
        self.scale = f"blocks.{layer}.ln1.hook_scale" if has_norm else None
        self.cap = _soft_cap(model, layer)
        self._cuts: list[Cut] = []
        self._kept: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}
        self._turns: dict[int, tuple[Turn, Turn]] = {}
        self._rows: dict[int, Tensor] = {}

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Terms:
        """The terms on one batch."""
        try:
            return self._read(tokens)
        except CausalProbeError:
            if self.sides["q"].caught or not is_catchable(self.model, self.layer):
                raise
            self._catch(True)
            try:
                return self._read(tokens)
            except CausalProbeError:
                self._catch(False)
            raise

    def _catch(self, whether: bool) -> None:
        for side in self.sides.values():
            side.caught = whether
        self._turns.clear()

    def _read(self, tokens: Int[Tensor, "batch pos"]) -> Terms:
        here = {what: attention_hook(self.layer, what) for what in ("attn_scores", "pattern")}
        carried = [name for side in self.sides.values() for name in side.carried]
        behind = [name for side in self.sides.values() for name in side.behind]
        scale = [] if self.scale is None else [self.scale]
        names = [*self.stream.hooks, *scale, *carried, *behind, *here.values()]
        both_sides = (self.sides["q"], self.sides["k"])
        found = read(self.model, tokens, names, both_sides)
        needed = [*carried, here["pattern"], *self.stream.needed, *scale]
        if silent := [name for name in needed if name not in found]:
            raise CausalProbeError(
                f"{silent[0]} does not fire, so the scores can't be taken apart. Load the model with eager attention."
            )
        W = self.W["q"]
        inverse = W.new_ones(1, 1, 1) if self.scale is None else 1 / found[self.scale].to(W)
        parts = self._parts(found)
        both = self._both_turns(tokens)
        terms = [self._terms(what, found, parts, inverse, turn) for what, turn in zip("qk", both, strict=True)]
        pattern = found[here["pattern"]][:, self.head].to(W)
        seen = seen_in(found.get(here["attn_scores"]), found[here["pattern"]])
        whole = Terms(
            terms[0],
            terms[1],
            terms[0],
            terms[1],
            1.0,
            both,
            pattern,
            seen,
            self.cap,
            sink_of(self.model, self.layer, self.head),
            0.0,
        )
        added = self._added(tokens) if self.added else None
        return checked_terms(whole, found.get(here["attn_scores"]), found[here["pattern"]], self.head, added)

    def cut(self, parts: Mapping[str, Parts], tokens: Int[Tensor, "batch pos"]) -> None:
        """Put parts of activations in the place of sources; these tokens show the parts' names."""
        for point, function in parts.items():
            name, replaced, value = covered(point, self.stream.names, self.layer)
            if twice := [source for cut in self._cuts for source in cut.replaced if source in replaced]:
                raise CausalProbeError(
                    f"{twice[0]} is in two activations that were to be cut into parts; leave one out."
                )
            self._cuts.append(Cut(name, replaced, value, function))
        self._kept = self._writers({source for cut in self._cuts if cut.point is None for source in cut.replaced})
        found = read_values(self.model, tokens[:1], self.stream.hooks, n_layers=self.layer + 1)
        new = tuple(self._parts(found).written)
        gone = {source: cut for cut in self._cuts for source in cut.replaced}
        names: list[str] = []
        for source in self.sources:
            if source not in gone:
                names.append(source)
            elif source == gone[source].replaced[0]:
                names += [name for name in new if name.startswith(f"{gone[source].name}.") and name not in self.sources]
        if len(set(names)) < len(names):
            raise CausalProbeError(f"Two parts have one name among {', '.join(names)}; choose other names.")
        self.sources = tuple(names)
        self.width = int(self.W["q"].shape[0])

    def _parts(self, found: Mapping[str, Tensor]) -> StreamParts:
        whole = self.stream(found)

        def value_of(cut: Cut) -> Tensor:
            if cut.point is not None:
                return found[cut.point]
            return whole.by(cut.replaced[0], self._kept.get(cut.replaced[0]))

        return cut_stream(whole, self._cuts, value_of) if self._cuts else whole

    def lost_without(
        self, tokens: Int[Tensor, "batch pos"], groups: Sequence[Sequence[str]], terms: Terms
    ) -> list[tuple[Tensor, Tensor] | None]:
        """What queries and keys lose without each group of sources."""
        stream, scale = self.stream.streams[-1], [] if self.scale is None else [self.scale]
        carried = [name for side in self.sides.values() for name in (*side.carried, *side.behind)]
        both_sides = (self.sides["q"], self.sides["k"])
        skips = Skips(self.model)
        with skips.learning():
            found = read(self.model, tokens, [*self.stream.hooks, *scale, *carried], both_sides)
        parts, whole = self._parts(found), self._both(found, terms)
        writers = self._writers({source for group in groups for source in group})
        lost: list[tuple[Tensor, Tensor] | None] = []

        def both_of(value: Tensor, start: int) -> list[Tensor]:
            # What the point shows is put there, not changed: a bridge may call a hook once for each of its names.
            edits = {stream: lambda shown: value.to(shown)}
            with skips.before(start):
                return self._both(read(self.model, tokens, carried, both_sides, edits=edits), terms)

        start = self._passed_over(whole, lambda: both_of(found[stream], self.layer))
        for group in groups:
            if {ALIBI, BIAS}.intersection(group):
                lost.append(None)
                continue
            left = found[stream].to(self.W["q"])
            for source in group:
                left = left - parts.by(source, writers.get(source)).to(left)
            without = both_of(left, start)
            each = [before - after for before, after in zip(whole, without, strict=True)]
            numbers = [self.sources.index(source) for source in group]
            if not any(part.any() for part in each) and bool(terms.unrotated_key[numbers].sum(0).any()):
                raise CausalProbeError(
                    f"An edit at {stream} doesn't reach layer {self.layer}'s attention, so sources can't be taken out. Give pairs=0."
                )
            lost.append((terms.factor * each[0], each[1]))
        return lost

    def _passed_over(self, whole: list[Tensor], again: Callable[[], list[Tensor]]) -> int:
        """How many layers can be passed over where the stream is put in: all before this one, if its own stream gives its own queries and keys; else none."""
        try:
            same = all(
                bool((new - old).abs().max() <= 1e-4 * old.abs().max()) for old, new in zip(whole, again(), strict=True)
            )
        except Exception:  # a model of another build: its layers are run, as slow as that is
            return 0
        return self.layer if same else 0

    def _both(self, found: Mapping[str, Tensor], terms: Terms) -> list[Float[Tensor, "batch pos d_head"]]:
        """Queries and keys as they meet in the scores, but for c."""
        both = []
        for side, turn in zip(self.sides.values(), terms.turns, strict=True):
            final = side.final(found, self.head) if turn.normed else turn(side.raw(found, self.head).to(self.W["q"]))
            assert final is not None  # turns have read it
            both.append(final.to(self.W["q"]))
        return both

    def _writers(self, sources: set[str]) -> dict[str, Float[Tensor, "_d_head d_model"]]:
        """What takes the z of the heads among the sources to the stream; read when it is asked for, and only then held."""
        places = {source: place for source in sources if (place := head_of(source)) and source in self.through["q"]}
        if not places.keys() <= self._held.keys():
            with circuit_weights(self.model) as (_, weights):
                self._held |= {source: weights.W_O[n][h] for source, (n, h) in places.items()}
        return {source: self._held[source] for source in places}

    def _added(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, " pos"]:
        """What the model adds to the scores of each key (ALiBi): what is left of them where the queries are zero."""
        length = tokens.shape[1]
        if length not in self._rows:
            scores = attention_hook(self.layer, "attn_scores")
            zero = dict.fromkeys(self.sides["q"].carried, torch.zeros_like)
            found = read_values(self.model, tokens[:1], [scores], n_layers=self.layer + 1, edits=zero)
            if scores not in found:
                raise CausalProbeError(f"{scores} does not fire, so what the model adds to its scores can't be read.")
            self._rows[length] = found[scores][0, self.head, -1].to(self.W["q"])  # the last query sees every key
        return self._rows[length]

    def _terms(
        self, what: str, found: Mapping[str, Tensor], parts: StreamParts, inverse: Tensor, turn: Turn
    ) -> Float[Tensor, "source batch pos d_head"]:
        W, side = self.W[what], self.sides[what]
        like = found[side.carried[0]]
        name = "The head's queries" if what == "q" else "The head's keys"
        raw = side.raw(found, self.head).to(W)
        final = side.final(found, self.head)
        norm = turn.factor(raw, None if final is None else final.to(W), like, name)
        stretches = [(numbers, scale * norm) for numbers, scale in side.scales(found, inverse, self.d_head)]
        scale = (
            torch.cat([each.expand(*raw.shape[:2], n.stop - (n.start or 0)) for n, each in stretches], -1)
            if len(stretches) > 1
            else stretches[0][1]
        )
        hooked = raw * norm
        terms = torch.empty(len(self.sources), *hooked.shape, dtype=W.dtype, device=W.device)
        for number, source in enumerate(self.sources[:-1]):
            if source == ALIBI:
                terms[number] = 0
            elif source not in parts.written and (place := head_of(source)):
                factor = parts.factor[place[0]]
                by = scale if factor is None else scale * factor.to(W)
                terms[number] = parts.z[place[0]][:, :, place[1]].to(W) @ self.through[what][source] * by
            else:
                terms[number] = parts.written[source].to(W) @ W * scale
        terms[-1] = hooked - terms[:-1].sum(0)
        factors = [factor.to(W) for factor in parts.factor.values() if factor is not None]
        for numbers, by in stretches:
            self._require_biases(terms[-1][..., numbers], norm, by, factors, like, name, of=float(hooked.abs().max()))
        return terms

    @staticmethod
    def _require_biases(
        left: Float[Tensor, "batch pos width"],
        norm: Tensor,
        scale: Tensor,
        factors: list[Tensor],
        like: Tensor,
        what: str,
        *,
        of: float,
    ) -> None:
        """What is left must be made of biases: a vector times what the norms have made of it at each position."""
        columns = [norm, scale, *(scale * factor for factor in factors)]
        columns += [scale / norm] if scale.shape[1] > 1 else []
        basis = torch.stack([column.expand(*left.shape[:2], 1).reshape(-1) for column in columns], 1).double()
        flat = left.reshape(len(basis), -1).double()
        misfit = flat - basis @ (torch.linalg.pinv(basis, rtol=1e-6) @ flat)
        require_small(float(misfit.abs().max()), of=of, like=like, what=what)

    def _both_turns(self, tokens: Int[Tensor, "batch pos"]) -> tuple[Turn, Turn]:
        length = tokens.shape[1]
        if length not in self._turns:
            both = (self.sides["q"], self.sides["k"])
            self._turns[length] = turns(self.model, tokens, both, self.head, self.W["q"])
        return self._turns[length]


def _soft_cap(model: Any, layer: int) -> float | None:
    attention = getattr(
        getattr(getattr(model, "blocks", [None] * (layer + 1))[layer], "attn", None), "original_component", None
    )
    cap = getattr(attention, "attn_logit_softcapping", None) or getattr(model.cfg, "attn_scores_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None


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
        pattern = found[here["pattern"]][:, self.head].to(query)
        seen = seen_in(found.get(here["attn_scores"]), found[here["pattern"]])
        terms = Terms(query, key, query, key, 1.0, (Turn(None), Turn(None)), pattern, seen, None, None, 0.0)
        return checked_terms(terms, found.get(here["attn_scores"]), found[here["pattern"]], self.head, None)

    def lost_without(
        self, tokens: Int[Tensor, "batch pos"], groups: Sequence[Sequence[str]], terms: Terms
    ) -> list[tuple[Tensor, Tensor] | None]:
        """The terms themselves: there are no norms, and each part of the stream is read by itself."""
        each = [[self.sources.index(source) for source in group] for group in groups]
        return [(terms.query[numbers].sum(0), terms.key[numbers].sum(0)) for numbers in each]
