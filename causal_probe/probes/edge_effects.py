"""Which edges a head needs: the loss when a child's attention is spread evenly, against all of it on one parent.

A trained root may attend to anything: its row has hardly any bearing on the loss, and may saturate on some node. So neither
attention nor cutting the row tells a root from a child. (Cutting a saturated root row can cost as much as cutting the weakest
true edge.) Two questions do, and an edge is confirmed where both are answered yes:

1. *Does it help to put the whole row on this one parent, rather than evenly on the past?* (the **gain**) For an edge it does,
   because a later layer reads the parent's token at the child.
2. *Is it this parent, and not another or none?* (the **margin**) With the row on the parent: is the loss lower for the token that the child
   has than for a token that it would have as a root, or as the child of any other earlier node? Each of these is a null hypothesis of its own,
   under which the child's token is one draw from a known law; so the loss with that token, and its mean over the tokens that the law draws, are
   equal in the mean, for any model whatever. Only sequences count that ask for what follows the parent's token, and not the rival's: in the
   others the pair says nothing, and a token that the rival's law draws can be worth more to the prediction than the child's own. All later nodes are drawn anew in either case, so nothing has to be known of what descends
   from the child. Exactly one of the hypotheses is true; an edge that rejects all but its own names the right parent, up to the level.

Where data can't be redrawn, as of an unknown law, the second question is asked of the model alone: is the loss higher with the row on any other
earlier node? Roots can't be told so: for none is there a parent.

Children of one parent can stand in for each other: the later layer learns the same from each of their pairs. An edge that is not confirmed
is therefore asked again while the rows of the other candidate children of its parent are spread evenly. What is confirmed only so is
**redundant**: it names the right parent, and alone it is not needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
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
from causal_probe.probes.edge_tests import Again, EdgeEffects

__all__ = ["Redraw", "edge_effects"]

#: Draws sequences anew from a child on: ``redraw(batch, child, edges)`` has ``states`` [batch], the state that the child has; ``laws``
#: [batch, 1 + child, state], the probability of each, given the earlier nodes, if the child is a root, or a child of node 0, 1, ...; ``asked``
#: [batch, child], whether the loss asks for what follows the state of that node; and ``draw(rows)``, one batch that holds the sequences of these
#: numbers once for each state, state after state: the child has it, and every later node is drawn anew along ``edges`` (with the same random
#: numbers).
#: :class:`causal_probe.tasks.Redrawn` is such an object.
Redraw: TypeAlias = Callable[[Any, int, nx.DiGraph], Any]

#: ``losses_by_rows(model, batch, queries, rows)``: the losses [row, batch], in nats, if the head attended at each query as the row says,
#: [row, key].
LossesByRows: TypeAlias = Callable[[Any, Any, Tensor, Tensor], Tensor]

#: How far a short cut may be from the model that is run with its hooks, in units of the rounding of a loss.
SHORT_CUT = 1e3


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
    rival_sequences: int | None = None,
    losses_by_rows: LossesByRows | None = None,
) -> EdgeEffects:
    """Test which edges parent -> child a head needs, and so tell children from roots.

    Definition. For a candidate edge, on one sequence, in nats::

        gain   = loss(the child's pattern row spread evenly over keys 0..child) - loss(the row wholly on the parent)
        margin = mean loss over the tokens that the child would have as a root, or as a child of a rival - loss, the row wholly on the parent;
                 0 unless the sequence asks for what follows the parent's token and not the rival's
        margin = loss(the row wholly on a rival) - loss(the row wholly on the parent)                   where data can't be redrawn
        cut    = loss(the child's pattern row spread evenly over keys 0..child) - loss(the model as it is)

    An edge is confirmed when the mean gain over sequences is positive and its mean margin over every rival as well, rivals being all other
    earlier nodes and, with ``redraw``, having no parent: by paired one-sided tests at the family-wise ``level``. The null hypotheses are "the gain
    is at most 0" (Holm's correction over all tested pairs) and, for each rival, "the rival is the parent" (all must be rejected, so
    there is no correction for their number; Bonferroni's over all tested pairs). The unit of replication is a sequence. Where several
    candidates share a parent, an edge that is not confirmed is tested again with the others' rows spread evenly, at half the level each.

    Row 0 can't be tested: with one key there is nothing to spread. A batch costs one run of the model as it is, one for each child and one for
    each candidate; for each candidate with a positive gain one for each state with ``redraw``, on the sequences that count, else one for each
    rival; two for those that are tested again, and as many again for those of them with a positive gain.

    Parameters
    ----------
    model
        A TransformerLens model, or any HookedRootModule with hook points ``blocks.{layer}.attn.hook_pattern``. It is run in
        evaluation mode without gradients, with the caller's own hooks, and is left as it was.
    tokens
        Tokens [batch, pos], or an iterable of batches that ``loss`` understands. (A tensor, or one object with ``.tokens``, is one batch.) They are
        kept, for they are gone through several times.
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
        ``redraw(batch, child, edges)`` draws sequences anew from a child on, see :data:`Redraw`. Use it where the data come from a known
        process: without it the level says nothing of roots, and of the truth only what the model's losses do.
    rival_sequences
        Without ``redraw``: on how many sequences, at least, rivals are tested; by default on all.
    losses_by_rows
        A faster way to the same losses under many rows of the head, where the model has one, as
        :meth:`causal_probe.models.DisentangledTransformer.predict_by_rows` has: see :data:`LossesByRows`. It is compared with the
        hooks on the first batch.

    Raises
    ------
    CausalProbeError
        If a candidate can't be tested (row 0, a parent that does not come before its child, a pair given twice), the head or a
        row does not exist, the loss does not depend on the head's pattern (a dead hook), a loss is not one finite number per
        sequence, there are no batches, ``redraw`` makes something else, or ``losses_by_rows`` has other losses.

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
    require_hooks(model, ())
    layer, head = parse_head(layer, head)
    layer = find_layer(int(model.cfg.n_layers), layer)
    name = attention_hook(layer, "pattern")
    require_hooks(model, [name])
    editing = Editing(model, loss, layer, head, losses_by_rows)

    parameters: Iterable[Tensor] = getattr(model, "parameters", tuple)()
    epsilon = max((torch.finfo(p.dtype).eps for p in parameters if p.is_floating_point()), default=0.0)
    total: dict[str, Any] = {}
    with undisturbed(model):
        batches = list(each_batch(tokens))
        for batch in batches:
            if not total and not is_live(model, name, partial(loss, model, batch)):
                raise CausalProbeError(
                    f"The loss does not depend on the pattern at {name}: nothing reads that hook's value, or the loss does not run "
                    "this model. An edit there would change nothing. Load a Hugging Face model with eager attention; the "
                    "patterns of encoder bridges (BERT) can't be edited."
                )
            clean = editing.losses(batch)
            epsilon = max(epsilon, torch.finfo(clean.dtype).eps)
            if not total:
                editing.try_short_cut(batch, next(iter(parents)), epsilon)
            even, gains = editing.even_and_gains(batch, parents)
            new = {"gains": gains, "cuts": even - clean[:, None], "losses": clean}
            total = merged(total, {name: Moments.of(values) for name, values in new.items()})
        if not total:
            raise CausalProbeError("There are no batches to measure the loss on.")
        effects = EdgeEffects(
            edges=tuple((parent, child) for child, its in parents.items() for parent in its),
            layer=layer,
            head=head,
            level=level,
            **total,
            margins={},
            redrawn=redraw is not None,
            again={},
            epsilon=epsilon,
            provenance=describe(model),
        )
        rivals = Rivals(editing, batches, redraw, _mechanism(parents), rival_sequences)
        margins = {edge: margin for edge in effects.gaining if (margin := rivals.margins(edge)) is not None}
        effects = replace(effects, margins=margins)
        again = {}
        for edge, confirmed in zip(effects.edges, effects.confirmed, strict=True):
            if (siblings := effects.siblings(edge)) and effects.rivals(edge) and not confirmed:
                others = [replace_row(layer, head, query=child, row=uniform_row(child)) for child in siblings]
                gain = rivals.gain(edge, others)
                if effects.gains_again(edge, gain) and (margin := rivals.margins(edge, others)) is not None:
                    again[edge] = Again(gain, margin)
        return replace(effects, again=again)


@dataclass(frozen=True)
class Editing:
    """Losses per sequence under edits of one head's pattern."""

    model: HookedModel
    loss: Callable[[Any, Any], Tensor]
    layer: int
    head: int
    by_rows: LossesByRows | None = None

    def even_and_gains(
        self, batch: Any, parents: Mapping[int, Sequence[int]], others: Sequence[Edit] = ()
    ) -> tuple[Float[Tensor, "batch edge"], Float[Tensor, "batch edge"]]:
        """By edge, child after child: the loss with the child's row spread evenly, and what the parent gains over it."""
        edges = [(parent, child) for child, its in parents.items() for parent in its]
        rows = [(child, uniform_row(child)) for child in parents] + [
            (child, one_hot_row(parent)) for parent, child in edges
        ]
        losses = self.with_rows(batch, rows, others)
        even, routed = losses[:, : len(parents)], losses[:, len(parents) :]
        children = list(parents)
        even = even[:, [children.index(child) for _, child in edges]]
        return even, even - routed

    def with_rows(
        self, batch: Any, rows: Sequence[tuple[int, Float[Tensor, " _key"]]], others: Sequence[Edit] = ()
    ) -> Float[Tensor, "batch row"]:
        """The losses with each of the rows, (query, attention), in the place of the head's own."""
        if self.by_rows is None:
            edits = [replace_row(self.layer, self.head, query=query, row=row) for query, row in rows]
            return torch.stack([self.losses(batch, edit, *others) for edit in edits], 1)
        queries = torch.tensor([query for query, _ in rows])
        padded = torch.nn.utils.rnn.pad_sequence([row for _, row in rows], batch_first=True)
        with edited(self.model, *others):
            values = self.by_rows(self.model, batch, queries, padded)
        if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(rows):
            found = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise CausalProbeError(
                f"losses_by_rows must return losses [row, batch], here {len(rows)} rows; it returned {found}."
            )
        return _checked(values.flatten()).view_as(values).T

    def try_short_cut(self, batch: Any, child: int, epsilon: float) -> None:
        """Raise where the fast losses are not those of the model with hooks."""
        if self.by_rows is None:
            return
        rows = [(child, uniform_row(child)), (child, one_hot_row(0))]
        fast, slow = self.with_rows(batch, rows), replace(self, by_rows=None).with_rows(batch, rows)
        if fast.shape != slow.shape or not torch.allclose(
            fast, slow, rtol=SHORT_CUT * epsilon, atol=SHORT_CUT * epsilon
        ):
            raise CausalProbeError(
                "losses_by_rows has other losses than the model with its hooks: by up to "
                f"{float((fast - slow).abs().max()):.3g} nats. Leave it out, or mend it."
                if fast.shape == slow.shape
                else f"losses_by_rows returned losses {list(fast.T.shape)} where the model with its hooks has {list(slow.T.shape)}."
            )

    def losses(self, batch: Any, *edits: Edit) -> Float[Tensor, " batch"]:
        with edited(self.model, *edits):
            values = self.loss(self.model, batch)
        if not isinstance(values, Tensor) or values.ndim != 1 or not values.is_floating_point():
            found = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise CausalProbeError(
                f"loss(model, batch) must return one loss per sequence, a tensor [batch]; it returned {found}."
            )
        return _checked(values)


def _checked(values: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    if not values.isfinite().all():
        raise CausalProbeError(
            f"The loss is not finite for {int((~values.isfinite()).sum())} of {len(values)} sequences: no effect can be measured."
        )
    return values.detach()


@dataclass(frozen=True)
class Rivals:
    """The second question, edge by edge."""

    editing: Editing
    batches: Sequence[Any]
    redraw: Redraw | None
    mechanism: nx.DiGraph
    n_sequences: int | None = None

    def margins(self, edge: tuple[int, int], others: Sequence[Edit] = ()) -> Moments | None:
        """Moments of the margin over each rival: no parent first, where data can be redrawn, then the other earlier nodes; None without any."""
        parent, child = edge
        total: Moments | None = None
        for batch in self.batches:
            if self.redraw is not None:
                values = self._redrawn(batch, parent, child, others)
            elif child > 1:
                losses = self.editing.with_rows(batch, [(child, one_hot_row(node)) for node in range(child)], others)
                values = losses - losses[:, [parent]]
                values = torch.cat([values[:, :parent], values[:, parent + 1 :]], 1)
            else:
                return None
            new = Moments.of(values)
            total = new if total is None else total.merge(new)
            if self.redraw is None and self.n_sequences is not None and total.count >= self.n_sequences:
                break
        return total

    def gain(self, edge: tuple[int, int], others: Sequence[Edit]) -> Moments:
        """Moments of the gain with other rows edited as well."""
        parent, child = edge
        each = (self.editing.even_and_gains(batch, {child: [parent]}, others)[1][:, 0] for batch in self.batches)
        return reduce(Moments.merge, map(Moments.of, each))

    def _redrawn(self, batch: Any, parent: int, child: int, others: Sequence[Edit]) -> Float[Tensor, "batch rival"]:
        if self.redraw is None:
            raise CausalProbeError("Nothing can be redrawn.")
        drawn = self.redraw(batch, child, self.mechanism)
        if missing := [name for name in ("states", "laws", "asked", "draw") if not hasattr(drawn, name)]:
            raise CausalProbeError(
                f"redraw must return an object with states, laws, asked and draw, as tasks.Redrawn is; a {type(drawn).__name__} has no {missing[0]}."
            )
        n, n_states = len(drawn.states), drawn.laws.shape[-1]
        if drawn.laws.shape != (n, 1 + child, n_states) or drawn.asked.shape != (n, child):
            raise CausalProbeError(
                f"redraw must return laws [batch, {1 + child}, state] and asked [batch, {child}]; of {n} sequences it made laws "
                f"{list(drawn.laws.shape)}, and asked {list(drawn.asked.shape)}."
            )
        rivals_asked = torch.nn.functional.pad(drawn.asked, (1, 0))  # a root has no rival that could be asked for
        counts = drawn.asked[:, parent, None] & ~rivals_asked
        counts = torch.cat([counts[:, : 1 + parent], counts[:, 2 + parent :]], 1)
        margins = torch.zeros(counts.shape, dtype=torch.float64, device=counts.device)
        rows = counts.any(1).nonzero()[:, 0]
        if not len(rows):
            return margins
        losses = self.editing.with_rows(drawn.draw(rows), [(child, one_hot_row(parent))], others)[:, 0]
        if len(losses) != n_states * len(rows):
            raise CausalProbeError(
                f"draw(rows) must return {len(rows)} sequences for each of {n_states} states, {n_states * len(rows)} in all; it returned "
                f"{len(losses)}."
            )
        by_state = losses.double().view(n_states, len(rows)).T
        laws = drawn.laws[rows].double()
        laws = torch.cat([laws[:, : 1 + parent], laws[:, 2 + parent :]], 1)
        mean = (laws / laws.sum(-1, keepdim=True) * by_state[:, None]).sum(-1)
        margins[rows] = (mean - by_state.gather(1, drawn.states[rows, None])) * counts[rows]
        return margins


def _mechanism(parents: dict[int, list[int]]) -> nx.DiGraph:
    """What later nodes are drawn along: the nearest candidate of each. The test is exact whatever it is; it has more power on likely sequences."""
    graph = nx.empty_graph(1 + max(parents), create_using=nx.DiGraph)
    graph.add_edges_from((its[-1], child) for child, its in parents.items())
    return nx.freeze(graph)


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
