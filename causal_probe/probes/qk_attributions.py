"""Which sources, in the query and in the key, make a head attend where it does? The disentangled transformer's picture, for any model.

The score of a query with a key is a sum over pairs of sources (:mod:`~causal_probe.probes.qk_terms`). Attention is decided by
differences of scores, so what counts of a pair is its *contribution*: its part of the score on the given edges, less its mean part on
the other visible keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

import networkx as nx
import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.arguments import BatchSize, Help
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.moments import Moments, merged
from causal_probe.probes.qk_pairs import PairGraph, pair_graphs, together
from causal_probe.probes.qk_split import Parts, grouped
from causal_probe.probes.qk_terms import Terms, head_of, term_reader
from causal_probe.probes.scored_rows import micro_batches, scored_batches
from causal_probe.probes.templates import Template, find_templates, from_graph
from causal_probe.results import Result, Table
from causal_probe.results.lazy import pandas as pd

__all__ = ["PairGraph", "QKAttributions", "qk_attributions"]

#: Where the path from even attention to a head's is looked at: exact to 1e-6 for scores that differ by some hundred.
NODES = 48
#: How sources may be put together, by name.
GROUPS: Mapping[str, Callable[[str], str]] = {
    "split": lambda source: source,
    "layers": lambda source: f"{source.partition('H')[0]}.heads" if head_of(source) else source,
    "kinds": lambda source: (
        "heads" if head_of(source) else {"mlp": "MLPs", "mixer": "mixers"}.get(source.rpartition(".")[2], source)
    ),
}


@dataclass(frozen=True, eq=False, repr=False)
class QKAttributions(Result):
    """The result of :func:`qk_attributions`. Contributions are in units of the attention score, a natural logarithm of attention.

    Attributes
    ----------
    layer, head, edges
        The head, and the name of the edges.
    sources
        The sources: the two axes of the table.
    contribution
        By pair [query source, key source]: its score on an edge less its mean score on the other visible keys; mean over the edges of a
        row, over the rows that have an edge and another visible key, and over sequences. Any sign; 0 for a pair that does not
        tell edges from other keys. The sum over all pairs is the same difference of the head's scores.
    stderr
        Standard error over sequences, by pair; None for one sequence.
    total, total_stderr
        The sum over all pairs.
    capped
        The same difference of the scores as the softmax gets them, behind a soft cap (Gemma 2): what is left of ``total``. None without a cap.
    attention
        By pair, its contribution to the log of the attention on the edges, in competition with all visible keys: along the path from even
        attention (all scores 0; a sink keeps its logit) to the head's, the pairs growing together, what each adds. Mean as
        ``contribution``. So a pair that raises other keys counts against the edges. The sum over all pairs is the log of the attention on an
        edge less that of even attention, mean over the edges of a row. None unless ``competition`` was asked for.
    first_order
        The same at the end of the path alone: by how much the log of the attention would fall for each unit of the pair, were it
        only a little weaker, times the pair. It is 0 where a head attends to one key in any case.
    by_query, by_key
        By source, the sum over the other side: :class:`~causal_probe.hooks.moments.Moments` over sequences.
    score, chance
        The head's attention on the edges, and even attention's, as :func:`~causal_probe.probes.scan` has them.
    pairs
        The pairs of the largest contribution, one by one: what each would attend to alone, and its ``intervened`` contribution, by taking its
        sources out of the stream with every norm computed anew, beside the ``predicted`` one, whose norms are held.
    rows, n_sequences
        Number of scored rows, and of sequences that have one.
    error
        By how much the sums missed the scores that the model uses, at most.
    """

    KIND = "QK attributions"
    WORKS = ("elhage2021",)

    layer: int
    head: int
    edges: str
    sources: tuple[str, ...]
    contribution: Float[np.ndarray, "source source"]
    stderr: Float[np.ndarray, "source source"] | None
    total: float
    total_stderr: float | None
    capped: float | None
    attention: Float[np.ndarray, "source source"] | None
    first_order: Float[np.ndarray, "source source"] | None
    by_query: Moments
    by_key: Moments
    score: float
    chance: float
    pairs: tuple[PairGraph, ...]
    rows: int
    n_sequences: int
    error: float

    def of(self, query: str, key: str) -> float:
        """The contribution of one pair.

        Raises
        ------
        CausalProbeError
            If there is no such source.
        """
        for source in (query, key):
            if source not in self.sources:
                raise CausalProbeError(f"There is no source {source!r}; there are {', '.join(self.sources)}.")
        return float(self.contribution[self.sources.index(query), self.sources.index(key)])

    def top(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` pairs of the largest contribution."""
        return self.to_pandas().head(k)

    def margin(self, side: str) -> pd.DataFrame:
        """One row per source, largest first: its contribution through the head's ``"query"`` or ``"key"``, summed over the other.

        Raises
        ------
        CausalProbeError
            If the side is none of the two.
        """
        if side not in ("query", "key"):
            raise CausalProbeError(f"A score has two sides, 'query' and 'key'; found {side!r}.")
        sums = self.by_query if side == "query" else self.by_key
        stderr = torch.full_like(sums.mean, torch.nan) if sums.stderr is None else sums.stderr
        values = {"contribution": sums.mean.cpu().numpy(), "stderr": stderr.cpu().numpy()}
        table = pd.DataFrame({"source": self.sources, **values})
        return table.sort_values("contribution", ascending=False, kind="stable").reset_index(drop=True)

    def heatmap(self, k: int = 12) -> pd.DataFrame:
        """The contributions between the ``k`` sources that matter most on either side: rows query, columns key."""
        weight = np.abs(self.contribution)
        kept = np.sort(np.argsort(-np.maximum(weight.max(0), weight.max(1)), kind="stable")[:k])
        names = [self.sources[number] for number in kept]
        return pd.DataFrame(self.contribution[np.ix_(kept, kept)], index=names, columns=names)

    @property
    def undefined(self) -> dict[str, str]:
        """Why what is None has no value."""
        reasons = {
            "stderr": "a standard error needs two sequences or more",
            "capped": "the scores have no soft cap",
            "attention": "competition=True was not asked for",
        }
        silent = [f"{pair.query} and {pair.key}" for pair in self.pairs if pair.intervened is None]
        outside = {"intervened": f"a source is not in the stream: {'; '.join(silent)}"} if silent else {}
        return {name: reason for name, reason in reasons.items() if getattr(self, name) is None} | outside

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The attention scores of L{self.layer}H{self.head} in {self.provenance['model']} were split into contributions of pairs "
            "of sources, with the normalization's scales of the forward pass held fixed; a pair's contribution is its score on "
            f"the edges ({self.edges}) less its mean score on the other visible keys, averaged over {self.rows} rows of "
            f"{self.n_sequences} sequences (largest error of the sum {self.error:.1g}; {self.measured_with})."
        )

    def table(self) -> Table:
        """One row per pair, largest contribution first: query, key, contribution, stderr, share (of the total), attention, and, of :attr:`pairs`,
        the contribution by intervention, with every norm computed anew.
        """
        spread = "" if self.total_stderr is None else f" ± {self.total_stderr:.2f}"
        behind = "" if self.capped is None else f" ({self.capped:.2f} behind the soft cap)"
        errors = np.full(self.contribution.shape, None) if self.stderr is None else self.stderr
        pairs = zip(
            product(self.sources, repeat=2), self.contribution.ravel().tolist(), errors.ravel().tolist(), strict=True
        )
        logs = [None] * self.contribution.size if self.attention is None else self.attention.ravel().tolist()
        intervened = {(pair.query, pair.key): pair.intervened for pair in self.pairs}
        rows = [
            (*pair, found, error, found / self.total if self.total else None, log, intervened.get((pair[0], pair[1])))
            for (pair, found, error), log in zip(pairs, logs, strict=True)
        ]
        rows.sort(key=lambda row: -row[2])
        return Table(
            f"QKAttributions of L{self.layer}H{self.head} of {self.provenance['model']} on {self.edges}: attention {self.score:.3f} "
            f"(chance {self.chance:.3f}), score on edges less others {self.total:.2f}{spread}{behind}, {self.rows} rows of {self.n_sequences} sequences",
            ("query", "key", "contribution", "stderr", "share", "attention", "intervened"),
            rows,
        )


@probe
def qk_attributions(
    model: HookedModel,
    tokens: Any,
    layer: Any,
    head: Any = None,
    *,
    edges: str | Template | nx.DiGraph,
    sources: str | Callable[[str], str] | Mapping[str, Any] = "split",
    parts: Mapping[str, Parts] | None = None,
    pairs: Annotated[int, Help("", least=0)] = 3,
    competition: bool = False,
    batch_size: BatchSize = None,
) -> QKAttributions:
    """Say which sources, in the query and in the key, make a head attend along given edges.

    Nothing of the size (source pairs x positions x positions) is formed; what grows is sources x positions x d_head for one
    micro-batch, and one table of source pairs.

    Parameters
    ----------
    model
        A TransformerLens model of causal attention (GPT-2, Llama, Gemma, Qwen, DeepSeek, GPT-OSS and the like); or a
        :class:`~causal_probe.models.DisentangledTransformer`, whose sources are the parts of its stream. Norms of queries and keys and
        of what a layer writes are held at their scale of the forward pass; contributions are to the score before a soft cap; a layer
        without attention is one source, and so is what ALiBi adds.
    tokens
        Tokens [batch, pos], or several such batches of one length.
    layer, head
        A layer and a head, counted from 0 (a negative layer from the end); or the head alone, as ``"L18H6"`` or ``(18, 6)``. In
        layer 0 the embeddings are the only sources.
    edges
        Where to: a template or its name (key -> query by the tokens), or a graph over positions, parent -> child.
    sources
        ``"split"``: every embedding, head and MLP by itself, and what a layer without attention has in its place (``L0.mixer``).
        ``"layers"``: a layer's heads together. ``"kinds"``: all heads, all MLPs, all mixers.
        Or named groups, ``{"words": ["embed", "L0.mlp"]}``, one number each, where a source in none stands by itself; or a function from a
        source's name to that of its group.
    parts
        Sources of your own, instead of the model's: by the name of a source (``"embed"``, ``"L3.mlp"``, ``"L2H1"``) or a hook point of the stream
        (``"blocks.N.hook_resid_pre"``, all that was written before layer N; ``hook_attn_out``; ``hook_mlp_out``), a function from the activation there,
        [batch, pos, d_model], to a dict of named parts of its shape, such as a dictionary's features (:func:`~causal_probe.probes.qk_split.parts_along`
        makes one of directions). Each part is the source ``"L3.mlp.NAME"`` (of the stream ``"streamN.NAME"``), and what they don't sum to is one more,
        ``"L3.mlp.error"``, so that all still sum to the score. An activation is what the source adds to the stream, behind a norm that follows it.
    pairs
        Of so many pairs, those of the largest contribution, say also what they alone would attend to, and intervene on them
        (:class:`~causal_probe.probes.qk_pairs.PairGraph`); it costs a second pass, and a forward for each of their sources.
    competition
        Say also what each pair adds to the log of the attention, where keys compete: :attr:`QKAttributions.attention`.
    batch_size
        Sequences at once; by default as many as keep the terms within 128 MiB.

    Raises
    ------
    CausalProbeError
        If there is no such head, no row has an edge and another visible key, the scores of the model are no sum over pairs of sources
        (bidirectional attention, say), or an argument is out of range.

    Notes
    -----
    A contribution is a fact about a score, not yet about a cause: see :func:`~causal_probe.probes.upstream`, which ablates.

    References
    ----------
    Elhage et al., "A Mathematical Framework for Transformer Circuits", Transformer Circuits Thread, 2021.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=6, n_positions=12)
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    >>> _ = model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)
    >>> tokens = torch.randperm(6, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    >>> found = qk_attributions(model, tokens, 1, 0, edges="induction", pairs=1)
    >>> found.top(2)[["query", "key", "contribution", "share"]]
       query         key  contribution  share
    0  token  L0H0.token     29.166667    1.0
    1  token       token      0.000000    0.0
    >>> round(found.pairs[0].hits, 3)
    0.833

    Not 30, and not 1, for the row whose token is that of position 0: there layer 0 has nothing before it to copy and copies the
    token itself, a second match, which lowers one row in six by 30 / 6.

    What layer 0's head has written along the directions of two tokens, in the standard form of the same model:

    >>> from causal_probe.probes.qk_split import parts_along
    >>> standard = model.to_transformer_lens()
    >>> head = model.subspaces(1)["L0H0.token"]
    >>> ours = parts_along({f"token {n}": torch.eye(standard.cfg.d_model)[head.start + n] for n in (0, 1)})
    >>> found = qk_attributions(standard, tokens, 1, 0, edges="induction", parts={"L0H0": ours}, pairs=0)
    >>> [source for source in found.sources if source.startswith("L0H0")]
    ['L0H0.token 0', 'L0H0.token 1', 'L0H0.error']
    >>> round(found.of("embed", "L0H0.token 1"), 2)
    5.0
    """
    template = from_graph(edges) if isinstance(edges, nx.DiGraph) else find_templates(edges)[0]
    if isinstance(sources, str) and sources not in GROUPS:
        raise CausalProbeError(
            f"Sources can't be put together by {sources!r}; choose {', '.join(GROUPS)}, or give named groups or a function."
        )
    reader = term_reader(model, layer, head)
    batches = micro_batches(reader, tokens, batch_size)
    if parts:
        reader.cut(parts, batches[0])
        batches = micro_batches(reader, batches, batch_size)
    group = (
        grouped(sources, reader.sources)
        if isinstance(sources, Mapping)
        else GROUPS[sources]
        if isinstance(sources, str)
        else sources
    )
    names, members = _groups(reader.sources, group)

    found: dict[str, Moments] = {}
    rows, error, has_cap = 0, 0.0, False
    for terms, targets, weights, n_rows, used in scored_batches(reader, batches, template):
        error, has_cap = max(error, terms.error), terms.cap is not None
        if not used.any():
            continue
        rows += int(n_rows.sum())
        targets, n_rows = targets[used], n_rows[used]
        query, key = (together(x[:, used], members, len(names)) for x in (terms.query, terms.key))
        table = _weighted(query, key, weights[used], n_rows)
        measured = {
            "table": table,
            "total": table.sum((1, 2)),
            "query": table.sum(2),
            "key": table.sum(1),
            "score": (terms.pattern[used].double() * targets).sum((-2, -1)) / n_rows,
            "chance": (targets.sum(-1) / terms.seen[used].sum(-1)).sum(-1).double() / n_rows,
        }
        if competition:
            for name, by in zip(("first", "whole"), _against_others(terms, targets, used), strict=True):
                measured[name] = _weighted(query, key, by, n_rows)
        if has_cap:
            capped = terms.capped(terms.scores)[used].double()
            measured["capped"] = (weights[used].double() * capped).sum((-2, -1)) / n_rows
        found = merged(found, {name: Moments.of(values) for name, values in measured.items()})
    contribution = found["table"].mean.cpu().numpy()
    largest = np.argsort(-contribution, axis=None, kind="stable")[: min(pairs, contribution.size)]
    chosen = [divmod(int(number), len(names)) for number in largest]
    stderr, total_stderr = found["table"].stderr, found["total"].stderr
    return QKAttributions(
        layer=reader.layer,
        head=reader.head,
        edges=template.name,
        sources=names,
        contribution=contribution,
        stderr=None if stderr is None else stderr.cpu().numpy(),
        total=float(found["total"].mean),
        capped=float(found["capped"].mean) if has_cap else None,
        total_stderr=None if total_stderr is None else float(total_stderr),
        attention=found["whole"].mean.cpu().numpy() if competition else None,
        first_order=found["first"].mean.cpu().numpy() if competition else None,
        by_query=found["query"],
        by_key=found["key"],
        score=float(found["score"].mean),
        chance=float(found["chance"].mean),
        pairs=tuple(pair_graphs(reader, batches, template, names, members, chosen)) if chosen else (),
        rows=rows,
        n_sequences=found["total"].count,
        error=error,
        settings={
            "edges": template.name,
            "sources": _said(sources),
            **({"parts": sorted(parts)} if parts else {}),
            **({"competition": True} if competition else {}),
        },
        provenance=describe(model),
    )


def _said(sources: str | Callable[[str], str] | Mapping[str, Any]) -> Any:
    if isinstance(sources, Mapping):
        return {name: [its] if isinstance(its, str) else list(its) for name, its in sources.items()}
    return sources if isinstance(sources, str) else "a function"


def _weighted(
    query: Float[Tensor, "source batch pos d"],
    key: Float[Tensor, "source batch pos d"],
    weights: Float[Tensor, "batch pos pos"],
    n_rows: Int[Tensor, " batch"],
) -> Float[Tensor, "batch source source"]:
    """By pair of sources, its scores times the weights of queries and keys, mean over the rows that count."""
    seen_by = einsum(weights.to(key), key, "b q k, s b k d -> s b q d")
    return einsum(query.double(), seen_by.double(), "s b q d, t b q d -> b s t") / n_rows[:, None, None]


def _against_others(
    terms: Terms, targets: Bool[Tensor, "batch pos pos"], used: Bool[Tensor, " all"]
) -> tuple[Float[Tensor, "batch pos pos"], Float[Tensor, "batch pos pos"]]:
    """The weights with which scores make the log of the attention on a row's edges: at the head's scores, and over the path to them.

    d log A_ij = dT_ij - sum_k A_ik dT_ik, with T the scores behind the cap; over the path that is integrated by Gauss and Legendre.
    """
    scores, edges = terms.scores, torch.zeros_like(terms.scores)
    edges[used] = (targets / targets.sum(-1, keepdim=True).clamp(min=1)).to(edges)
    scored = edges.sum(-1, keepdim=True)

    def at(a: float) -> Float[Tensor, "all pos pos"]:
        slope = 1.0 if terms.cap is None else 1 - (a * scores / terms.cap).tanh().square()
        return (slope * (edges - scored * terms.attention(a * scores))).masked_fill(~terms.seen, 0)

    nodes, shares = np.polynomial.legendre.leggauss(NODES)
    whole = torch.zeros_like(scores)
    for node, share in zip((nodes + 1) / 2, shares / 2, strict=True):
        whole += float(share) * at(float(node))
    return at(1.0)[used], whole[used]


def _groups(sources: tuple[str, ...], group: Callable[[str], str]) -> tuple[tuple[str, ...], list[int]]:
    """The groups' names, in the order of their first members, and each source's group."""
    of = [group(source) for source in sources]
    if strangers := [name for name in of if not isinstance(name, str) or not name]:
        raise CausalProbeError(f"A group's name must be text; the function gave {strangers[0]!r}.")
    names = tuple(dict.fromkeys(of))
    return names, [names.index(name) for name in of]
