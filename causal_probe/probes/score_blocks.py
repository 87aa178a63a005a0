"""Which block of a head's scores makes it attend where it does? The disentangled transformer's picture, for any model.

The score of a query with a key is a sum over pairs of sources (:mod:`~causal_probe.probes.score_terms`). Attention is decided by
differences of scores, so what counts of a pair is its *contribution*: its part of the score on the given edges, less its mean part on
the other visible keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import GraphComparison, compare
from causal_probe.hooks import HookedModel, Moments, context_length, describe
from causal_probe.hooks.record import token_batches
from causal_probe.probes.score_terms import TermReader, head_of, term_reader
from causal_probe.probes.templates import Template, find_templates, from_graph
from causal_probe.results import Citation, cite, escape, to_jsonable, versions

__all__ = ["Blocks", "PairGraph", "blocks", "contrast", "micro_batches"]

#: As many sequences are taken apart at once as make so many numbers (128 MiB in single precision).
NUMBERS = 2**25
#: A repr shows so many pairs.
SHOWN = 10

#: How sources may be put together, by name.
GROUPS: Mapping[str, Callable[[str], str]] = {
    "split": lambda source: source,
    "layers": lambda source: f"{source.partition('H')[0]}.heads" if head_of(source) else source,
    "kinds": lambda source: "heads" if head_of(source) else "MLPs" if source.endswith(".mlp") else source,
}


@dataclass(frozen=True, eq=False)
class PairGraph:
    """What one pair of sources alone would have the head attend to.

    Attributes
    ----------
    query, key
        The sources.
    hits
        Share of the rows whose largest score, of this pair alone, is on an edge: in [0, 1], mean over rows, then sequences.
    stderr
        Its standard error over sequences; None for one.
    scores
        The pair's score from query to key, mean over sequences; minus infinity above the diagonal.
    queries
        The rows that have an edge in some sequence.
    """

    query: str
    key: str
    hits: float
    stderr: float | None
    scores: Float[np.ndarray, "pos pos"]
    queries: tuple[int, ...]

    @property
    def graph(self) -> nx.DiGraph:
        """Key -> query for the largest mean score of each row in ``queries``."""
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(self.scores)))
        graph.add_edges_from((int(self.scores[query].argmax()), query) for query in self.queries)
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))
        return graph

    def compare(self, truth: nx.DiGraph) -> GraphComparison:
        """:func:`causal_probe.graphs.compare` of :attr:`graph` with a graph over the same positions, for the rows in ``queries``."""
        return compare(self.graph, truth, children=list(self.queries))


@dataclass(frozen=True, eq=False, repr=False)
class Blocks:
    """What :func:`blocks` found. Contributions are in units of the attention score, a natural logarithm of attention.

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
    by_query, by_key
        By source, the sum over the other side and its standard error: [source, 2] (the latter is NaN for one sequence).
    score, chance
        The head's attention on the edges, and even attention's, as :func:`~causal_probe.probes.scan` has them.
    pairs
        What the pairs of the largest contribution would attend to alone.
    rows, sequences
        Number of scored rows, and of sequences that have one.
    error
        By how much the sums missed the scores that the model uses, at most.
    settings, provenance
        How it was measured; the model's name, dtype and device, and the versions of the packages.
    """

    layer: int
    head: int
    edges: str
    sources: tuple[str, ...]
    contribution: Float[np.ndarray, "source source"]
    stderr: Float[np.ndarray, "source source"] | None
    total: float
    total_stderr: float | None
    by_query: Float[np.ndarray, "source 2"]
    by_key: Float[np.ndarray, "source 2"]
    score: float
    chance: float
    pairs: tuple[PairGraph, ...]
    rows: int
    sequences: int
    error: float
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]

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

    def to_pandas(self) -> pd.DataFrame:
        """One row per pair, largest contribution first: query, key, contribution, stderr, share (of the total)."""
        n = len(self.sources)
        query, key = np.divmod(np.argsort(-self.contribution, axis=None, kind="stable"), n)
        found = self.contribution[query, key]
        return pd.DataFrame(
            {
                "query": [self.sources[number] for number in query],
                "key": [self.sources[number] for number in key],
                "contribution": found,
                "stderr": np.full(n * n, np.nan) if self.stderr is None else self.stderr[query, key],
                "share": found / self.total if self.total else np.full(n * n, np.nan),
            }
        )

    def margin(self, side: str) -> pd.DataFrame:
        """One row per source, largest first: its contribution through the head's ``"query"`` or ``"key"``, summed over the other.

        Raises
        ------
        CausalProbeError
            If the side is none of the two.
        """
        if side not in ("query", "key"):
            raise CausalProbeError(f"A score has two sides, 'query' and 'key'; found {side!r}.")
        values = self.by_query if side == "query" else self.by_key
        table = pd.DataFrame({"source": self.sources, "contribution": values[:, 0], "stderr": values[:, 1]})
        return table.sort_values("contribution", ascending=False, kind="stable").reset_index(drop=True)

    def heatmap(self, k: int = 12) -> pd.DataFrame:
        """The contributions between the ``k`` sources that matter most on either side: rows query, columns key."""
        weight = np.abs(self.contribution)
        kept = np.sort(np.argsort(-np.maximum(weight.max(0), weight.max(1)), kind="stable")[:k])
        names = [self.sources[number] for number in kept]
        return pd.DataFrame(self.contribution[np.ix_(kept, kept)], index=names, columns=names)

    def to_dict(self) -> dict[str, Any]:
        """All numbers in plain JSON types."""
        skipped = ("pairs",)
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in skipped}
        pairs = [{"query": p.query, "key": p.key, "hits": p.hits, "stderr": p.stderr} for p in self.pairs]
        for name in ("by_query", "by_key"):
            fields[name] = [
                {"source": source, "contribution": float(value), "stderr": None if np.isnan(error) else float(error)}
                for source, (value, error) in zip(self.sources, fields[name], strict=True)
            ]
        return dict(to_jsonable({**fields, "pairs": pairs}))

    def cite(self) -> Citation:
        """Where the decomposition comes from, and one sentence for a methods section."""
        number_of = self.provenance["versions"]
        return cite(
            "elhage2021",
            methods=(
                f"The attention scores of L{self.layer}H{self.head} in {self.provenance['model']} were split into contributions of pairs "
                "of sources, with the normalization's scales of the forward pass held fixed; a pair's contribution is its score on "
                f"the edges ({self.edges}) less its mean score on the other visible keys, averaged over {self.rows} rows of "
                f"{self.sequences} sequences (causal-probe {number_of.get('causal-probe', 'from source')}, TransformerLens "
                f"{number_of['transformer-lens']}; largest error of the sum {self.error:.1g})."
            ),
        )

    def __repr__(self) -> str:
        table = self.top(SHOWN).to_string(index=False, float_format="{:.3f}".format, na_rep="")
        return f"{self._title()}\n{table}"

    def _repr_html_(self) -> str:
        table = self.top(SHOWN).to_html(index=False, float_format="{:.3f}".format, na_rep="", border=0)
        return f"<p>{escape(self._title())}</p>{table}"

    def _title(self) -> str:
        spread = "" if self.total_stderr is None else f" ± {self.total_stderr:.2f}"
        return (
            f"Blocks of L{self.layer}H{self.head} of {self.provenance['model']} on {self.edges}: attention {self.score:.3f} (chance "
            f"{self.chance:.3f}), score on edges less others {self.total:.2f}{spread}, {self.rows} rows of {self.sequences} sequences"
        )


def blocks(
    model: HookedModel,
    tokens: Any,
    layer: int,
    head: int,
    *,
    edges: str | Template | nx.DiGraph,
    sources: str | Callable[[str], str] = "split",
    pairs: int = 3,
    batch_size: int | None = None,
) -> Blocks:
    """Say which sources, in the query and in the key, make a head attend along given edges.

    Nothing of the size (source pairs x positions x positions) is formed; what grows is sources x positions x d_head for one
    micro-batch, and one table of source pairs.

    Parameters
    ----------
    model
        A TransformerLens model with one residual stream that is normalized before it is read (GPT-2, NeoX, Llama and the like); or
        a :class:`~causal_probe.models.DisentangledTransformer`, whose sources are the parts of its stream.
    tokens
        Tokens [batch, pos], or several such batches of one length.
    layer, head
        The head; in the first layer the embeddings are the only sources.
    edges
        Where to: a template or its name (key -> query by the tokens), or a graph over positions, parent -> child.
    sources
        ``"split"``: every embedding, head and MLP by itself. ``"layers"``: a layer's heads together. ``"kinds"``: all heads, all MLPs.
        Or a function from a source's name to that of its group.
    pairs
        Of so many pairs, those of the largest contribution, say also what they alone would attend to; it costs a second pass.
    batch_size
        Sequences at once; by default as many as keep the terms within 128 MiB.

    Raises
    ------
    CausalProbeError
        If there is no such head, no row has an edge and another visible key, the scores of the model are no sum over pairs of sources
        (ALiBi, normalized queries, capped scores, bidirectional attention), or an argument is out of range.

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
    >>> found = blocks(model, tokens, 1, 0, edges="induction", pairs=1)
    >>> found.top(2)[["query", "key", "contribution", "share"]]
       query         key  contribution  share
    0  token  L0H0.token     29.166667    1.0
    1  token       token      0.000000    0.0
    >>> round(found.pairs[0].hits, 3)
    0.833

    Not 30, and not 1, for the row whose token is that of position 0: there layer 0 has nothing before it to copy and copies the
    token itself, a second match, which lowers one row in six by 30 / 6.
    """
    if pairs < 0:
        raise CausalProbeError(f"The number of pairs to look at alone can't be negative; it is {pairs}.")
    template = from_graph(edges) if isinstance(edges, nx.DiGraph) else find_templates(edges)[0]
    group = GROUPS.get(sources) if isinstance(sources, str) else sources
    if group is None:
        raise CausalProbeError(
            f"Sources can't be put together by {sources!r}; choose {', '.join(GROUPS)}, or give a function."
        )
    reader = term_reader(model, layer, head)
    names, members = _groups(reader.sources, group)
    batches = micro_batches(model, reader, tokens, batch_size)

    found: dict[str, Moments] = {}
    rows = sequences = 0
    error = 0.0
    for batch in batches:
        terms = reader(batch)
        error = max(error, terms.error)
        targets, weights = contrast(template, batch)
        n_rows = targets.any(-1).sum(-1)
        used = n_rows > 0
        rows, sequences = rows + int(n_rows.sum()), sequences + int(used.sum())
        if not used.any():
            continue
        query, key = (_together(x[:, used], members, len(names)) for x in (terms.query, terms.key))
        seen_by = einsum(weights[used].to(key), key, "b q k, s b k d -> s b q d")
        table = einsum(query.double(), seen_by.double(), "s b q d, t b q d -> b s t") / n_rows[used, None, None]
        on_edges = (terms.pattern[used].double() * targets[used]).sum((-2, -1)) / n_rows[used]
        share = targets[used].sum(-1) / torch.arange(1, batch.shape[1] + 1, device=batch.device)
        measured = {
            "table": table,
            "total": table.sum((1, 2)),
            "query": table.sum(2),
            "key": table.sum(1),
            "score": on_edges,
            "chance": share.sum(-1).double() / n_rows[used],
        }
        for name, values in measured.items():
            moments = Moments.of(values)
            found[name] = found[name].merge(moments) if name in found else moments
    if not found:
        raise CausalProbeError(
            f"No row of these sequences has an edge of {template.name!r} and another visible key, so there is nothing to take apart. Give "
            "sequences in which the edges occur."
        )
    contribution = found["table"].mean.cpu().numpy()
    largest = np.argsort(-contribution, axis=None, kind="stable")[: min(pairs, contribution.size)]
    chosen = [(int(number) // len(names), int(number) % len(names)) for number in largest]
    stderr = found["table"].stderr
    return Blocks(
        layer=layer,
        head=head,
        edges=template.name,
        sources=names,
        contribution=contribution,
        stderr=None if stderr is None else stderr.cpu().numpy(),
        total=float(found["total"].mean),
        total_stderr=None if (spread := found["total"].stderr) is None else float(spread),
        by_query=_with_stderr(found["query"]),
        by_key=_with_stderr(found["key"]),
        score=float(found["score"].mean),
        chance=float(found["chance"].mean),
        pairs=tuple(_alone(reader, batches, template, names, members, chosen)) if chosen else (),
        rows=rows,
        sequences=sequences,
        error=error,
        settings={"edges": template.name, "sources": sources if isinstance(sources, str) else "a function"},
        provenance={**describe(model), "versions": versions()},
    )


# ------------------------------------------------------------------------------------------------------------------ the parts


def micro_batches(
    model: HookedModel, reader: TermReader, tokens: Any, batch_size: int | None
) -> list[Int[Tensor, "batch pos"]]:
    """The sequences, on the model's device, in pieces that can be taken apart at once.

    Raises
    ------
    CausalProbeError
        If there are none, they are not tokens of one length, or longer than the model's context: one with rotary positions would run
        on them all the same.
    """
    device = describe(model)["device"] or "cpu"
    batches = [batch.to(device) for batch in token_batches(tokens, batch_size)]
    if not sum(map(len, batches)):
        raise CausalProbeError("There are no sequences. Give tokens [batch, pos], or batches of them.")
    if lengths := {batch.shape[1] for batch in batches} - {batches[0].shape[1]}:
        raise CausalProbeError(
            f"Sequences must be of one length; theirs are {sorted({batches[0].shape[1], *lengths})}."
        )
    longest = context_length(model)
    if longest is not None and batches[0].shape[1] > longest:
        raise CausalProbeError(
            f"The sequences have {batches[0].shape[1]} tokens, and the model's context holds {longest}: shorten them."
        )
    if batch_size is not None:
        return batches
    size = max(1, NUMBERS // (4 * len(reader.sources) * batches[0].shape[1] * reader.d_head))
    return [piece for batch in batches for piece in torch.split(batch, size)]


def contrast(
    template: Template, tokens: Int[Tensor, "batch pos"]
) -> tuple[Bool[Tensor, "batch query key"], Float[Tensor, "batch query key"]]:
    """The targets on the scored rows, and the weights with which a row's scores make "on an edge less on the others".

    A row is scored if it has a target and sees a key that is none. The weights of a scored row sum to 0, those of another are 0.

    >>> from causal_probe.probes import template
    >>> contrast(template("previous-token"), torch.tensor([[5, 6, 7]]))[1][0].tolist()
    [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [-0.5, 1.0, -0.5]]
    """
    targets = template(tokens)
    visible = torch.ones_like(targets).tril()
    others = visible & ~targets
    scored = (targets.any(-1) & others.any(-1))[..., None]
    targets, others = targets & scored, others & scored
    weights = targets / targets.sum(-1, keepdim=True).clamp(min=1) - others / others.sum(-1, keepdim=True).clamp(min=1)
    return targets, weights


def _groups(sources: tuple[str, ...], group: Callable[[str], str]) -> tuple[tuple[str, ...], list[int]]:
    """The groups' names, in the order of their first members, and each source's group."""
    of = [group(source) for source in sources]
    if strangers := [name for name in of if not isinstance(name, str) or not name]:
        raise CausalProbeError(f"A group's name must be text; the function gave {strangers[0]!r}.")
    names = tuple(dict.fromkeys(of))
    return names, [names.index(name) for name in of]


def _together(
    terms: Float[Tensor, "source batch pos d"], members: list[int], n: int
) -> Float[Tensor, "group batch pos d"]:
    if n == len(members):
        return terms
    index = torch.tensor(members, device=terms.device)
    return terms.new_zeros(n, *terms.shape[1:]).index_add_(0, index, terms)


def _alone(
    reader: TermReader,
    batches: Iterable[Tensor],
    template: Template,
    names: tuple[str, ...],
    members: list[int],
    chosen: list[tuple[int, int]],
) -> Iterator[PairGraph]:
    hits: dict[tuple[int, int], list[Tensor]] = {pair: [] for pair in chosen}
    sums: dict[tuple[int, int], Tensor] = {}
    queries: Tensor | None = None
    count = 0
    for batch in batches:
        terms = reader(batch)
        targets, _ = contrast(template, batch)
        scored = targets.any(-1)
        queries = scored.any(0) if queries is None else queries | scored.any(0)
        used, count = scored.any(-1), count + len(batch)
        query, key = (_together(x, members, len(names)) for x in (terms.query, terms.key))
        future = torch.ones(batch.shape[1], batch.shape[1], dtype=torch.bool, device=batch.device).triu(1)
        for pair in chosen:
            scores = (query[pair[0]] @ key[pair[1]].mT).masked_fill(future, -torch.inf)
            best = targets.gather(-1, scores.argmax(-1, keepdim=True))[..., 0]
            hits[pair].append(((best & scored).sum(-1) / scored.sum(-1))[used].double())
            sums[pair] = sums.get(pair, 0) + scores.sum(0).double()
    assert queries is not None
    for pair in chosen:
        moments = Moments.of(torch.cat(hits[pair]))
        yield PairGraph(
            query=names[pair[0]],
            key=names[pair[1]],
            hits=float(moments.mean),
            stderr=None if moments.stderr is None else float(moments.stderr),
            scores=(sums[pair] / count).cpu().numpy(),
            queries=tuple(queries.nonzero().flatten().tolist()),
        )


def _with_stderr(moments: Moments) -> Float[np.ndarray, "source 2"]:
    stderr = torch.full_like(moments.mean, torch.nan) if moments.stderr is None else moments.stderr
    return np.asarray(torch.stack([moments.mean, stderr], -1).cpu().numpy())
