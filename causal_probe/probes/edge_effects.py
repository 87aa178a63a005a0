"""Which edges a head needs: the loss when a child's attention is spread evenly, against all of it on one parent.

A trained root may attend to anything: its row has hardly any bearing on the loss, and may saturate on some node. So neither
attention nor cutting the row tells a root from a child. (Cutting a saturated root row can cost as much as cutting the weakest
true edge.) Two questions do, and an edge is confirmed where both are answered yes:

1. *Does it help to put the whole row on this one parent, rather than evenly on the past?* (the **gain**) For an edge it does,
   because a later layer reads the parent's token at the child. For a root it hardly ever does, whichever node is tried: none is
   its parent, and the later layer is made to count a pair that the data never drew.
2. *Does it help more than it would if the child were a root?* (the **margin**) Zero is not exactly what a root gains. The even
   row holds the child itself, which may harm; training has put the row where it harmed least; a model may be too sure of
   itself. So the same gain is measured again on the same sequences with the child redrawn as a root, and all that descends
   from it redrawn accordingly. If the child *is* a root, both are equal in law, for any model whatever, and their mean
   difference is zero. It needs data that can be redrawn, as of a known task; without it the first question is asked alone.

The children are redrawn from the last to the first, so that what descends from a child is known when its turn comes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import networkx as nx
import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import Level
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, edited, one_hot_row, replace_row, uniform_row
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe, is_live, require_hooks, undisturbed
from causal_probe.hooks.edit import Edit
from causal_probe.hooks.heads import find_layer, parse_head
from causal_probe.hooks.moments import Moments, merged
from causal_probe.hooks.record import each_batch
from causal_probe.probes.edge_tests import EdgeEffects

__all__ = ["Redraw", "edge_effects"]

#: Draws a child as a root: ``redraw(batch, child, edges)`` is the batch of the same sequences in which the child's token is
#: drawn from what a root's would be, independently of all earlier ones, and every descendant of the child along ``edges`` (a graph
#: of the edges found so far, which holds those into later children) is drawn anew, parents before children.
Redraw: TypeAlias = Callable[[Any, int, nx.DiGraph], Any]


@probe
def edge_effects(
    model: HookedModel,
    tokens: Any,
    loss: Callable[[Any, Any], Tensor],
    *,
    layer: Any,
    head: Any = None,
    candidates: nx.DiGraph | Iterable[tuple[int, int]],
    level: Level = 1e-3,
    redraw: Redraw | None = None,
) -> EdgeEffects:
    """Test which edges parent -> child a head needs, and so tell children from roots.

    Definition. For a candidate edge, on one sequence, in nats::

        gain   = loss(the child's pattern row spread evenly over keys 0..child) - loss(the row wholly on the parent)
        margin = gain - gain on the same sequence with the child redrawn as a root
        cut    = loss(the child's pattern row spread evenly over keys 0..child) - loss(the model as it is)

    An edge is confirmed when the mean gain over sequences is positive and, if ``redraw`` is given, the mean margin as well: by
    paired one-sided tests over all tested pairs at the family-wise ``level``. Chance is close to 0 for the gain, and exactly 0
    for the margin if the child is a root. Why attention and the cut don't tell a root from a child, and these two do, is said at
    the head of this module. Row 0 can't be tested: with one key there is nothing to spread.

    All candidates are measured in one pass, in which a batch costs one run of the model as it is, one for each child and one for
    each candidate. With ``redraw`` it costs one more for each child with a positive gain, and one for each such candidate; the
    gains of all sequences are then kept, [sequence, edge].

    Parameters
    ----------
    model
        A TransformerLens model, or any HookedRootModule with hook points ``blocks.{layer}.attn.hook_pattern``. It is run in
        evaluation mode without gradients, with the caller's own hooks, and is left as it was.
    tokens
        Tokens [batch, pos], or an iterable of batches that ``loss`` understands. (A tensor, or one object with ``.tokens``, is one batch.) With ``redraw`` they are gone
        through several times: give a list, or anything that can be iterated over again.
    loss
        ``loss(model, batch)`` runs the model and returns one loss per sequence, [batch], in nats.
    layer, head
        Whose pattern is edited, counted from 0; or the head alone, as ``layer="L0H3"``.
    candidates
        Pairs (parent, child) or a graph, such as ``head_graphs(...).graph(layer, head, claim=0)``. They should be chosen
        without looking at these gains.
    level
        Family-wise level in (0, 1), one-sided.
    redraw
        ``redraw(batch, child, edges)`` is the batch with the child redrawn as a root, see :data:`Redraw`. Use it where the data
        come from a known process: without it a root whose row harms least on its candidate may be confirmed.

    Raises
    ------
    CausalProbeError
        If a candidate can't be tested (row 0, a parent that does not come before its child, a pair given twice), the head or a
        row does not exist, the loss does not depend on the head's pattern (a dead hook), a loss is not one finite number per
        sequence, there are no batches, or ``redraw`` is given with batches that can be gone through only once.

    References
    ----------
    The mechanism that it tests, a layer 0 that copies the parent's token to the child for layer 1 to match, is that of
    Nichani, Damian & Lee, "How Transformers Learn Causal Structure with Gradient Descent", ICML 2024 (arXiv 2402.14735). The
    correction: S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979.

    Examples
    --------
    >>> from causal_probe import graphs, models, tasks, training
    >>> task = tasks.InContextMarkov(graphs.chain(7), d_vocab=3, concentration=0.1)
    >>> model = models.hand_set(graphs.chain(7), 3, match_scale=8.0, output_scale=4.0)
    >>> batches = [task.sample(4096, tasks.generator(0, "probe"))]
    >>> def loss(model, batch):
    ...     return training.task_loss(model.predict(batch.tokens), batch.target)
    >>> found = edge_effects(model, batches, loss, layer=0, head=0, candidates=[(2, 3), (0, 3)])
    >>> [(parent, child) for parent, child in found.graph(nodes=7).edges]
    [(2, 3)]
    """
    parents = _check_candidates(candidates)
    if redraw is not None and isinstance(tokens, Iterator):
        raise CausalProbeError(
            "Redrawing goes through the batches several times, and these can be read once. Give a list."
        )
    require_hooks(model, ())
    layer, head = parse_head(layer, head)
    layer = find_layer(int(model.cfg.n_layers), layer)
    name = attention_hook(layer, "pattern")
    require_hooks(model, [name])
    editing = _Editing(model, loss, layer, head)

    parameters: Iterable[Tensor] = getattr(model, "parameters", tuple)()
    epsilon = max((torch.finfo(p.dtype).eps for p in parameters if p.is_floating_point()), default=0.0)
    total: dict[str, Any] = {}
    measured: list[Tensor] = []  # [sequence, edge] by batch: what the gains of redrawn batches are paired with
    with undisturbed(model):
        for batch in each_batch(tokens):
            if not total and not is_live(model, name, partial(loss, model, batch)):
                raise CausalProbeError(
                    f"The loss does not depend on the pattern at {name}: nothing reads that hook's value, or the loss does not run "
                    "this model. An edit there would change nothing. Load a Hugging Face model with eager attention; the "
                    "patterns of encoder bridges (BERT) can't be edited."
                )
            clean = editing.losses(batch)
            epsilon = max(epsilon, torch.finfo(clean.dtype).eps)
            gains, cuts = [], []
            for child, its in parents.items():
                even, gain = editing.even_and_gain(batch, child, its)
                gains.append(gain)
                cuts.append((even - clean)[:, None].expand_as(gain))
            if redraw is not None:
                measured.append(torch.cat(gains, 1))
            new = {"gains": torch.cat(gains, 1), "cuts": torch.cat(cuts, 1), "losses": clean}
            total = merged(total, {name: Moments.of(values) for name, values in new.items()})
        if not total:
            raise CausalProbeError("There are no batches to measure the loss on.")
        effects = EdgeEffects(
            edges=tuple((parent, child) for child, its in parents.items() for parent in its),
            layer=layer,
            head=head,
            level=level,
            **total,
            margins=None,
            epsilon=epsilon,
            provenance=describe(model),
        )
        if redraw is None:
            return effects
        return replace(effects, margins=_margins(editing, tokens, measured, effects, redraw))


@dataclass(frozen=True)
class _Editing:
    """Losses per sequence under edits of one head's pattern."""

    model: HookedModel
    loss: Callable[[Any, Any], Tensor]
    layer: int
    head: int

    def even_and_gain(
        self, batch: Any, child: int, parents: list[int]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch parent"]]:
        """The loss with the child's row spread evenly, and what each parent gains over it."""
        even = self.losses(batch, replace_row(self.layer, self.head, query=child, row=uniform_row(child)))
        routed = [
            self.losses(batch, replace_row(self.layer, self.head, query=child, row=one_hot_row(parent)))
            for parent in parents
        ]
        return even, torch.stack([even - loss for loss in routed], dim=1)

    def losses(self, batch: Any, *edits: Edit) -> Float[Tensor, " batch"]:
        with edited(self.model, *edits):
            values = self.loss(self.model, batch)
        if not isinstance(values, Tensor) or values.ndim != 1 or not values.is_floating_point():
            found = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise CausalProbeError(
                f"loss(model, batch) must return one loss per sequence, a tensor [batch]; it returned {found}."
            )
        if not values.isfinite().all():
            raise CausalProbeError(
                f"The loss is not finite for {int((~values.isfinite()).sum())} of {len(values)} sequences: no effect can be "
                "measured."
            )
        return values.detach()


def _margins(
    editing: _Editing, tokens: Any, gains: list[Tensor], effects: EdgeEffects, redraw: Redraw
) -> dict[tuple[int, int], Moments]:
    """The second question, for the edges that have passed the first; children are decided from the last to the first."""
    gaining = effects.graph(1 + max(child for _, child in effects.edges), max_parents=None)
    found = nx.empty_graph(gaining, create_using=nx.DiGraph)
    margins: dict[tuple[int, int], Moments] = {}
    for child in sorted(gaining, reverse=True):
        parents = sorted(gaining.predecessors(child), key=lambda parent: -gaining.edges[parent, child]["gain"])
        if not parents:
            continue
        columns = [effects.edges.index((parent, child)) for parent in parents]
        total: Moments | None = None
        for batch, measured in zip(each_batch(tokens), gains, strict=False):
            gain = measured[:, columns]
            _, as_root = editing.even_and_gain(redraw(batch, child, nx.freeze(found.copy())), child, parents)
            if gain.shape != as_root.shape:
                raise CausalProbeError(
                    f"redraw must return a batch of the same sequences; of {len(gain)} it made {len(as_root)}."
                )
            new = Moments.of(gain - as_root)
            total = new if total is None else total.merge(new)
        if total is None:
            raise CausalProbeError(
                "Redrawing goes through the batches several times, and these were gone after the first."
            )
        for index, parent in enumerate(parents):
            moments = Moments(total.count, total.sums[index], total.squares[index])
            margins[parent, child] = moments
            p = effects.p_value_of(moments)
            # One head copies one parent: of several, the child is redrawn along the one that gains most.
            if p is not None and p * len(effects.edges) <= effects.level and not any(found.predecessors(child)):
                found.add_edge(parent, child)
    return margins


def _check_candidates(candidates: nx.DiGraph | Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """The candidate parents of each child, ascending; all that is wrong with them is said at once."""
    pairs = list(candidates.edges if isinstance(candidates, nx.DiGraph) else candidates)
    problems = []
    if not pairs:
        problems.append("there are none")
    if into_root := [pair for pair in pairs if pair[1] == 0]:
        problems.append(f"row 0 has one key only and can't be tested: {_listing(into_root)}")
    if backward := [pair for pair in pairs if pair[1] != 0 and not 0 <= pair[0] < pair[1]]:
        problems.append(f"a parent must come before its child: {_listing(backward)}")
    if repeated := [pair for pair, times in Counter(pairs).items() if times > 1]:
        problems.append(f"given twice: {_listing(repeated)}")
    if problems:
        raise CausalProbeError(f"The candidate edges can't be tested: {'; '.join(problems)}.")
    children = sorted({int(child) for _, child in pairs})
    return {child: sorted(int(parent) for parent, its in pairs if its == child) for child in children}


def _listing(edges: list[tuple[int, int]]) -> str:
    return ", ".join(f"{parent} -> {child}" for parent, child in edges)
