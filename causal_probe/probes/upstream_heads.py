"""Which earlier heads make a head attend where it does? Back from source to source, each arrow confirmed by an ablation.

A source reaches a head's scores through its query and through its key. What it writes there is ablated *in that place alone*: the
head's key (or query) without the source's part is put in, everything else of the forward stays, and the attention on the edges is
taken again. That tells a use from a coincidence: a source whose part is large but points nowhere changes little, and so do the
*matched controls*, heads that write about as much into the same place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import networkx as nx
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causal_probe.arguments import BatchSize, Count
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.moments import Moments
from causal_probe.hooks.record import each_batch
from causal_probe.hooks.values import read_values
from causal_probe.hooks.visible import seen_in
from causal_probe.probes.p_values import corrected, t_p_value
from causal_probe.probes.qk_terms import TermReader, Terms, head_of, term_reader
from causal_probe.probes.scored_rows import contrast, micro_batches, scored_batches
from causal_probe.probes.templates import TEMPLATES, Template, find_templates, from_graph
from causal_probe.results import Result, Table
from causal_probe.results.lazy import pandas as pd

__all__ = ["Arrow", "Upstream", "upstream"]

#: An arrow is confirmed if it passes its tests at this level (family-wise over the arrows that are tested into one head) ...
LEVEL = 0.001
#: ... and if ablating the source takes away at least this much of the head's attention on the edges.
LEAST = 0.1
#: A head that feeds another attends *somewhere* on a row if it gives one key, other than position 0, at least this much.
SOMEWHERE = 0.3
#: A known template describes a head if it holds at least this much of its attention.
DESCRIBED = 0.5
KNOWN = tuple(template for template in TEMPLATES.values() if template.kind == "repeated")
SIDES = ("query", "key")


class Arrow(NamedTuple):
    """One source's way into a head, and what became of its test.

    Attributes
    ----------
    source, target
        Heads, as ``L0H0``.
    side
        ``"query"`` or ``"key"``.
    edges
        The edges of the target on which it was tested.
    contribution
        The source's part of the score on the edges, less its mean part on the other visible keys.
    drop
        By how much the target's attention on the edges falls when the source's part of that side is replaced by its mean, in
        [-1, 1], mean over sequences.
    stderr
        Its standard error.
    largest_control
        The largest drop among the matched controls; None where there is no other head.
    controls
        Their number.
    p_value
        The larger of two: of the drop being positive (one-sided paired t-test, Holm-corrected over the arrows tested into this head),
        and of its being larger than each control's drop (the largest of the one-sided paired p-values).
    confirmed
        Whether the p-value is at most 0.001 and the drop at least 0.1.
    """

    source: str
    target: str
    side: str
    edges: str
    contribution: float
    drop: float
    stderr: float
    largest_control: float | None
    controls: int
    p_value: float
    confirmed: bool


@dataclass(frozen=True, eq=False, repr=False)
class Upstream(Result):
    """The result of :func:`upstream`.

    Attributes
    ----------
    head
        Where it started, as ``L1H0``.
    edges
        The edges there.
    arrows
        Every way that was tested, by target, then drop.
    roles
        By head on the way: what it attends to on the rows that matter, with its attention there: (template, attention); the
        template is None where none of the known ones describes it.
    """

    KIND = "upstream"
    WORKS = ("elhage2021",)

    head: str
    edges: str
    arrows: tuple[Arrow, ...]
    roles: Mapping[str, tuple[str | None, float]]

    @property
    def graph(self) -> nx.DiGraph:
        """The confirmed arrows, source -> target, with the fields of :class:`Arrow`; nodes carry ``role`` and ``attention``."""
        graph = nx.DiGraph()
        graph.add_node(self.head)
        for arrow in self.arrows:
            if arrow.confirmed:
                known = graph.get_edge_data(arrow.source, arrow.target)
                if known is None or arrow.drop > known["drop"]:
                    graph.add_edge(arrow.source, arrow.target, **arrow._asdict())
        for node in graph:
            role, attention = self.roles.get(node, (None, None))
            graph.nodes[node].update(role=role, attention=attention)
        return graph

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Heads that feed {self.head} in {self.provenance['model']} were found by the contribution of what they write to its scores "
            f"on the edges ({self.edges}), and confirmed by replacing that contribution, in the head's query or key alone, by its "
            f"mean, against {self.settings['controls']} matched heads ({self.measured_with})."
        )

    @property
    def too_few(self) -> tuple[Arrow, ...]:
        """The arrows that are not confirmed though the source's drop is large enough, and larger than every control's: more sequences may tell."""
        return tuple(
            arrow
            for arrow in self.arrows
            if not arrow.confirmed and arrow.drop >= LEAST and arrow.drop > (arrow.largest_control or 0.0)
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per arrow that was tested, the columns those of :class:`Arrow`."""
        return pd.DataFrame(self.arrows, columns=list(Arrow._fields))

    def table(self) -> Table:
        """One row per arrow that was tested; below, what the heads on the way attend to.

        ``confirmed`` says "too few sequences" where the drop is large enough and no test could say so surely (:attr:`too_few`).
        """
        roles = (f"{head} {role or 'no known template'} {value:.2f}" for head, (role, value) in self.roles.items())
        few = self.too_few
        said = [
            (*arrow[:-1], "too few sequences" if arrow in few else "yes" if arrow.confirmed else "no")
            for arrow in self.arrows
        ]
        return Table(
            f"Upstream of {self.head} of {self.provenance['model']} on {self.edges}: {self.settings['n_sequences']} sequences",
            Arrow._fields,
            said,
            [f"attention: {', '.join(roles)}"],
        )


@probe
def upstream(
    model: HookedModel,
    tokens: Any,
    layer: Any,
    head: Any = None,
    *,
    edges: str | Template | nx.DiGraph,
    depth: Count = 2,
    width: Count = 3,
    controls: Count = 20,
    batch_size: BatchSize = None,
) -> Upstream:
    """Follow a head's attention back to the heads that make it, and confirm each step.

    For the head, the ``width`` earlier heads of the largest positive contribution through its query, and as many through its key, are
    tested. Each confirmed one is then asked the same about its own attention on the rows where it was read (for a key: the
    positions that the edges start from; for a query: the rows that have an edge), where it attends to one key with 0.3 or more.

    Parameters
    ----------
    model, tokens, layer, head, edges, batch_size
        As in :func:`~causal_probe.probes.qk_attributions`; two sequences or more.
    depth
        How many steps back.
    width
        How many heads to test on either side of a head.
    controls
        So many heads are ablated in the same place for comparison: of those that aren't tested, the ones whose parts there are
        nearest in size (root mean square over positions, about the mean).

    Raises
    ------
    CausalProbeError
        As :func:`~causal_probe.probes.qk_attributions` does; or a number is out of range.

    References
    ----------
    Elhage et al., "A Mathematical Framework for Transformer Circuits", Transformer Circuits Thread, 2021.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=6, n_positions=12, heads=[2, 1])
    >>> _ = model.block(0, 1, query="position", key="position").diagonal(-1).fill_(30)   # L0H1 looks one back
    >>> _ = model.block(1, 0, query="token", key="L0H1.token").diagonal().fill_(30)      # L1H0 reads what it copied
    >>> generator = torch.Generator().manual_seed(0)
    >>> tokens = torch.stack([torch.randperm(6, generator=generator).repeat(2) for _ in range(8)])
    >>> found = upstream(model.to_transformer_lens(), tokens, 1, 0, edges="induction")
    >>> sorted(found.graph.edges(data="side")), found.roles["L0H1"][0]
    ([('L0H1', 'L1H0', 'key')], 'previous-token')
    """
    template = from_graph(edges) if isinstance(edges, nx.DiGraph) else find_templates(edges)[0]
    tokens = list(each_batch(tokens))  # they are gone through at each step
    first = term_reader(model, layer, head)
    start = f"L{first.layer}H{first.head}"
    batches = micro_batches(first, tokens, batch_size)
    n_sequences = sum(map(len, batches))
    if n_sequences < 2:
        raise CausalProbeError("An arrow is tested over sequences: give two or more.")
    template = _within(first, template, batches[0])
    roles: dict[str, tuple[str | None, float]] = {}
    arrows: list[Arrow] = []
    waiting: list[tuple[str, Template]] = [(start, template)]
    for step in range(depth):
        following: list[tuple[str, Template]] = []
        for name, wanted in waiting:
            reader = first if name == start else term_reader(model, *_place(name))
            batches = micro_batches(reader, tokens, batch_size)
            found = _Survey.of(reader, batches, wanted)
            if name == start:
                roles[start] = (template.name, found.attention)
            tested = tuple(_test(reader, batches, wanted, found, width, controls, name))
            arrows += tested
            for arrow in tested:
                if arrow.confirmed and arrow.source not in roles:
                    roles[arrow.source] = _role(model, arrow.source, wanted, arrow.side, batches)
                    own = _own_edges(model, arrow.source, wanted, arrow.side)
                    if any(bool(contrast(own, batch)[0].any()) for batch in batches):
                        following.append((arrow.source, own))
        waiting = following if step + 1 < depth else []
    settings = {
        "depth": depth, "width": width, "controls": controls, "level": LEVEL, "least_drop": LEAST, "n_sequences": n_sequences,
    }  # fmt: skip
    return Upstream(start, template.name, tuple(arrows), roles, settings=settings, provenance=describe(model))


# ------------------------------------------------------------------------------------------------------------- who is tested


@dataclass(frozen=True, eq=False)
class _Survey:
    """Over all sequences: each source's contribution by side, the mean of its part before rotation, and its size about the mean."""

    contribution: dict[str, Float[Tensor, " source"]]
    mean: dict[str, Float[Tensor, "source d_head"]]
    size: dict[str, Float[Tensor, " source"]]
    attention: float

    @classmethod
    def of(cls, reader: TermReader, batches: list[Tensor], template: Template) -> _Survey:
        sums: dict[str, Any] = defaultdict(int)
        for terms, targets, weights, n_rows, used in scored_batches(reader, batches, template):
            sums["sequences"] += int(used.sum())
            sums["positions"] += weights.shape[0] * weights.shape[1]
            for side, part in (("query", terms.unrotated_query), ("key", terms.unrotated_key)):
                sums[f"{side} mean"] += part.double().sum((1, 2))
                sums[f"{side} square"] += part.double().square().sum((1, 2, 3))
            if used.any():
                rows = n_rows[used].double()
                weights = weights[used].to(terms.key)
                seen_by = weights @ terms.key.sum(0)[used]
                asks = weights.mT @ terms.query.sum(0)[used]
                for side, part, meets in (("query", terms.query, seen_by), ("key", terms.key, asks)):
                    through = (part[:, used] * meets).sum((-2, -1)).double() / rows
                    sums[f"{side} contribution"] += through.sum(1)
                sums["attention"] += float(((terms.pattern[used] * targets[used]).sum((-2, -1)).double() / rows).sum())
        mean = {side: sums[f"{side} mean"] / sums["positions"] for side in SIDES}
        square = {side: sums[f"{side} square"] / sums["positions"] for side in SIDES}
        return cls(
            contribution={side: sums[f"{side} contribution"] / sums["sequences"] for side in SIDES},
            mean=mean,
            size={side: (square[side] - mean[side].square().sum(-1)).clamp(min=0).sqrt() for side in SIDES},
            attention=sums["attention"] / sums["sequences"],
        )


def _test(
    reader: TermReader,
    batches: list[Tensor],
    template: Template,
    found: _Survey,
    width: int,
    n_controls: int,
    target: str,
) -> Iterator[Arrow]:
    heads = [number for number, source in enumerate(reader.sources) if head_of(source)]
    chosen: dict[tuple[str, int], list[int]] = {}
    for side in SIDES:
        contribution, size = found.contribution[side], found.size[side]
        candidates = sorted((h for h in heads if contribution[h] > 0), key=lambda h: -float(contribution[h]))[:width]
        others = [h for h in heads if h not in candidates]
        for candidate in candidates:
            nearest = sorted(others, key=lambda h: abs(float(size[h] - size[candidate])))
            chosen[side, candidate] = nearest[:n_controls]
    if not chosen:
        return
    ablated = sorted({(side, h) for (side, candidate), controls in chosen.items() for h in (candidate, *controls)})
    drops: dict[tuple[str, int], list[Tensor]] = {key: [] for key in ablated}
    for terms, targets, _, n_rows, used in scored_batches(reader, batches, template):
        before = _on_edges(terms.attention(terms.scores), targets, n_rows)
        for side, source in ablated:
            scores = _without(terms, side, source, found.mean[side][source])
            after = _on_edges(terms.attention(scores), targets, n_rows)
            drops[side, source].append((before - after)[used])
    measured = {key: torch.cat(values) for key, values in drops.items()}
    if len(next(iter(measured.values()))) < 2:
        raise CausalProbeError("An arrow is tested over sequences that have an edge: give two or more.")
    means = {key: _mean(values) for key, values in measured.items()}
    own = corrected({key: means[key] for key in chosen}, above=0.0)
    for (side, source), drop in sorted(own.items(), key=lambda item: -item[1].value):
        controls = chosen[side, source]
        versus = [t_p_value(*_mean(measured[side, source] - measured[side, control])) for control in controls]
        p_value = max([drop.p_value, *versus])
        yield Arrow(
            source=reader.sources[source],
            target=target,
            side=side,
            edges=template.name,
            contribution=float(found.contribution[side][source]),
            drop=drop.value,
            stderr=drop.stderr,
            largest_control=max((means[side, control][0] for control in controls), default=None),
            controls=len(controls),
            p_value=p_value,
            confirmed=p_value <= LEVEL and drop.value >= LEAST,
        )


def _mean(values: Float[Tensor, " sequence"]) -> tuple[float, float, int]:
    """Of two or more: the mean, its standard error, and their number."""
    moments = Moments.of(values)
    return float(moments.mean), 0.0 if moments.stderr is None else float(moments.stderr), moments.count


def _without(terms: Terms, side: str, source: int, mean: Float[Tensor, " d_head"]) -> Float[Tensor, "batch pos pos"]:
    """The scores with one source's part of one side replaced by its mean."""
    if side == "key":
        change = terms.turns[1](mean.to(terms.key) - terms.unrotated_key[source])
        return terms.scores + terms.query.sum(0)[..., : change.shape[-1]] @ change.mT
    change = terms.factor * terms.turns[0](mean.to(terms.query) - terms.unrotated_query[source])
    return terms.scores + change @ terms.key.sum(0)[..., : change.shape[-1]].mT


def _on_edges(
    pattern: Float[Tensor, "batch pos pos"], targets: Bool[Tensor, "batch pos pos"], n_rows: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Attention on the targets, mean over the scored rows."""
    return (pattern * targets).sum((-2, -1)).double() / n_rows


# -------------------------------------------------------------------------------------------------------- where a source looks


def _within(reader: TermReader, template: Template, batch: Int[Tensor, "batch pos"]) -> Template:
    """The template's edges that the head's layer shows; the template itself where that is all of the past."""
    seen = reader(batch[:2]).seen
    if bool((seen != seen[:1]).any()):
        raise CausalProbeError(
            f"Which keys L{reader.layer}H{reader.head} sees depends on the sequence (sparse attention); upstream is for layers that see a window, "
            "or all of the past."
        )
    if bool((seen[0] == torch.ones_like(seen[0]).tril()).all()):
        return template
    return replace(template, targets=lambda tokens: template(tokens) & seen[0].to(tokens.device))


def _own_edges(model: HookedModel, source: str, read_on: Template, side: str) -> Template:
    """Where an earlier head attends to on the rows on which it was read: one edge a row, if it attends to one key, not 0, at all."""

    def targets(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch query key"]:
        pattern, _ = _pattern(model, source, tokens)
        weight, key = pattern[..., 1:].max(-1)
        edges = torch.zeros_like(pattern, dtype=torch.bool).scatter_(-1, key[..., None] + 1, True)
        return edges & (_rows(read_on, side, tokens) & (weight >= SOMEWHERE))[..., None]

    return Template("l{}h{}-attends".format(*_place(source)), targets, f"where {source} attends to")


def _rows(read_on: Template, side: str, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Where a source is read: through a key, at the positions that edges start from; through a query, at the rows that have one."""
    targets, _ = contrast(read_on, tokens)
    return targets.any(-2 if side == "key" else -1)


def _role(
    model: HookedModel, source: str, read_on: Template, side: str, batches: list[Tensor]
) -> tuple[str | None, float]:
    """The known template that holds most of a head's attention where it is read, above chance; and how much it holds."""
    found: dict[str, list[Tensor]] = {known.name: [] for known in KNOWN}
    chance: dict[str, list[Tensor]] = {known.name: [] for known in KNOWN}
    for batch in batches:
        pattern, seen = _pattern(model, source, batch)
        rows = _rows(read_on, side, batch)
        for known in KNOWN:
            targets = known(batch) & seen
            found[known.name].append((pattern.double() * targets).sum(-1)[rows])
            chance[known.name].append((targets.sum(-1) / seen.sum(-1))[rows].double())
    score = {name: float(torch.cat(values).mean()) for name, values in found.items()}
    even = {name: float(torch.cat(values).mean()) for name, values in chance.items()}
    best = max(score, key=lambda name: (score[name] - even[name]) / max(1 - even[name], 1e-9))
    return (best, score[best]) if score[best] >= DESCRIBED else (None, score[best])


def _pattern(
    model: HookedModel, source: str, tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch query key"], Bool[Tensor, "batch query key"]]:
    """A head's attention, and the keys that it sees."""
    layer, head = _place(source)
    name, scores = (attention_hook(layer, what) for what in ("pattern", "attn_scores"))
    found = read_values(model, tokens, [name, scores], n_layers=layer + 1)
    return found[name][:, head], seen_in(found.get(scores), found[name])


def _place(source: str) -> tuple[int, int]:
    place = head_of(source)
    assert place is not None
    return place
