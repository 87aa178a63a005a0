"""Explain a decision by small sets of tokens (CLEANN): which tokens, if replaced, would have changed it?

A *decision* is the largest output of a model on one input: the next token, the token at a mask, the class of a sequence, the item
that a recommender puts first. A set of tokens *explains* it if the decision is another one once they are replaced: the model itself
is the judge. What differs between methods is which sets are tried, and in which order.

References
----------
.. [1] R. Y. Rohekar, Y. Gurwicz, S. Nisimov. Causal interpretation of self-attention in pre-trained Transformers. NeurIPS 2023,
   section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import scipy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import Count, Position, checked, shown
from causal_probe.discovery.marks import Marks
from causal_probe.discovery.possible_d_sep import possible_d_sep
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import token_faults
from causal_probe.hooks.check import HookedModel, undisturbed
from causal_probe.probes.discovered_graphs import AttentionGraph, Discovery
from causal_probe.results import Result, Table, merge_provenance
from causal_probe.results.lazy import pandas as pd

__all__ = ["Explanation", "ExplanationSummary", "Outputs", "explain", "outputs_of", "summarise"]

#: From tokens [batch, pos] to outputs [batch, choice]; the decision is the largest.
Outputs: TypeAlias = Callable[[Tensor], Tensor]

METHODS = ("cleann", "attention", "gradient", "leave-one-out")


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Result):
    """The explanation of one decision, by one method.

    Attributes
    ----------
    method
        ``cleann``; or a baseline, which ranks the tokens and replaces the first one, two, three, ... until the decision changes:
        ``attention`` (attention from the target to the token), ``gradient`` (absolute value of gradient times input of the decision's
        output), ``leave-one-out`` (fall of that output when the token alone is replaced).
    target
        The node that the decision is read from.
    decision
        The model's decision: an index into its outputs.
    sets
        All sets of the smallest size that change the decision, as nodes, nearest first; one for a baseline; none if no set that the
        method tried does.
    changed_to
        Its decision with each set replaced.
    ranks
        The rank of that among the original outputs: 1 is the decision itself, so 2 is the most specific change. Called the
        replacement rank.
    tested
        How many sets were put to the model.
    """

    KIND = "explanation"
    WORKS = ("rohekar2023",)

    method: str
    target: int
    decision: int
    sets: tuple[tuple[int, ...], ...]
    changed_to: tuple[int, ...]
    ranks: tuple[int, ...]
    tested: int

    @property
    def size(self) -> int | None:
        """Tokens in a set; None if there is none."""
        return len(self.sets[0]) if self.sets else None

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Decisions were explained by the smallest sets of tokens whose replacement changes them ({self.method}; "
            f"{self.measured_with})."
        )

    def table(self) -> Table:
        """One row for each set."""
        nodes = (", ".join(map(str, each)) for each in self.sets)
        return Table(
            f"Explanation by {self.method}: sets whose replacement changes decision {self.decision} at node {self.target}; {self.tested} were tried",
            ("nodes", "decision then", "its rank before"),
            list(zip(nodes, self.changed_to, self.ranks, strict=True)),
        )


@checked
def explain(
    discovery: Discovery,
    outputs: Outputs,
    *,
    target: int,
    replacement: Position,
    methods: Sequence[str] = ("cleann",),
    head: int | str | None = None,
    fixed: Iterable[int] = (),
    max_size: int | None = None,
    max_tested: int = 2000,
    pattern: Any = None,
    model: Any = None,
    batch_size: Count = 64,
) -> dict[str, Explanation]:
    """Explain the decision of a model on the input of a :class:`~causal_probe.discovery.Discovery`.

    CLEANN tries the legal subsets of the target's tree of possible d-separation (those whose every node is reached through the set),
    by size, then by the sum of distances, and returns all of the smallest size that change the decision.

    Parameters
    ----------
    discovery
        The graphs over the tokens.
    outputs
        From tokens [batch, pos] to outputs [batch, choice]; :func:`outputs_of` makes it for common decisions.
    target
        The node from which the decision is read: the last token of a causal model, the mask, [CLS].
    replacement
        The token that replaces others: the mask token, padding, an unknown token. Without one of those, what counts as "replaced"
        is a choice that the result depends on.
    methods
        Of ``cleann``, ``attention``, ``gradient``, ``leave-one-out``.
    head
        Whose graph CLEANN searches, by number or name (``"L5H3"``); ``"any"``: sets that are legal in any of the graphs. By default the only graph there is.
    fixed
        Nodes that are not replaced, such as special tokens. The target never is.
    max_size
        The largest set that is tried, by any method; by default all.
    max_tested
        CLEANN stops before a size for which it would have put more sets than this to the model in all.
    pattern
        For ``attention``: [query, key] over positions.
    model
        For ``gradient``: the model whose embedding is differentiated; ``outputs`` must run it.
    batch_size
        Inputs in a forward pass.

    Returns
    -------
    dict
        An :class:`Explanation` for each method.

    Raises
    ------
    CausalProbeError
        If an argument is out of range, or a method lacks what it needs.

    References
    ----------
    Rohekar, Gurwicz & Nisimov, "Causal interpretation of self-attention in pre-trained Transformers", NeurIPS 2023, section 4.3.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import models, probes
    >>> model = models.DisentangledTransformer(d_vocab=5, n_positions=6, heads=(1,))
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(3)
    >>> tokens = torch.tensor([0, 1, 2, 3, 4, 0])
    >>> found = probes.discover_from_attention(model, tokens, layer=0, samples=1000)
    >>> explained = explain(found, probes.outputs_of(model, "next"), target=5, replacement=1, head=0, max_size=1)
    >>> explained["cleann"].sets  # an untrained model decides the same whatever is replaced
    ()
    """
    n = len(discovery.groups)
    if unknown := [method for method in methods if method not in METHODS]:
        raise CausalProbeError(f"The methods {', '.join(unknown)} were asked for; there are {', '.join(METHODS)}.")
    if not 0 <= target < n:
        raise CausalProbeError(f"Target {target} was asked for; the nodes are 0..{n - 1}.")
    free = [node for node in range(n) if node != target and node not in set(fixed)]
    judge = _Judge(discovery, outputs, replacement, batch_size)
    limit = len(free) if max_size is None else min(max_size, len(free))
    found = {}
    for method in methods:
        if method == "cleann":
            sizes: Iterable[list[tuple[int, ...]]] = _legal_sets(
                _graphs(discovery, head), target, free, limit, max_tested
            )
        else:
            scores = _scores(method, judge, discovery, target, free, pattern, model)
            ranking = sorted(free, key=lambda node: (-scores[node], node))
            sizes = ([tuple(sorted(ranking[:size]))] for size in range(1, limit + 1))
        found[method] = judge.first_that_change(method, target, sizes)
    return found


class _Judge:
    """The model: does the decision change if these nodes are replaced?"""

    def __init__(self, discovery: Discovery, outputs: Outputs, replacement: int, batch_size: int) -> None:
        self.tokens = torch.tensor([discovery.settings["tokens"]])
        self.groups, self.replacement, self.batch_size = discovery.groups, replacement, batch_size
        # The model runs here and now, wherever the graphs are from.
        self.about = {
            name: value for name, value in discovery.provenance.items() if name not in ("versions", "threads")
        }
        self._outputs = outputs
        self.original = self.run([()])[0]
        self.decision = int(self.original.argmax())

    def run(self, sets: Sequence[tuple[int, ...]]) -> Float[np.ndarray, "set choice"]:
        """The outputs with each set of nodes replaced."""
        rows = self.tokens.repeat(len(sets), 1)
        for row, nodes in zip(rows, sets, strict=True):
            row[[position for node in nodes for position in self.groups[node]]] = self.replacement
        with torch.no_grad():
            parts = [self._outputs(part) for part in torch.split(rows, self.batch_size)]
        values = torch.cat(parts).double().cpu().numpy()
        if values.ndim != 2 or len(values) != len(sets) or not np.isfinite(values).all():
            raise CausalProbeError(
                f"outputs must give finite numbers [batch, choice]; for {len(sets)} inputs it gave the shape {list(values.shape)}."
            )
        return np.asarray(values)

    def first_that_change(self, method: str, target: int, sizes: Iterable[list[tuple[int, ...]]]) -> Explanation:
        """Those sets of the first size, of which any does, that change the decision."""
        tested, changed = 0, list[tuple[tuple[int, ...], int]]()
        for sets in sizes:
            if not sets:
                continue
            tested += len(sets)
            choices = self.run(sets).argmax(axis=1)
            changed = [
                (nodes, int(choice)) for nodes, choice in zip(sets, choices, strict=True) if choice != self.decision
            ]
            if changed:
                break
        after = tuple(choice for _, choice in changed)
        ranks = tuple(1 + int((self.original > self.original[choice]).sum()) for choice in after)
        nodes = tuple(nodes for nodes, _ in changed)
        return Explanation(method, target, self.decision, nodes, after, ranks, tested, provenance=self.about)


def _graphs(discovery: Discovery, head: int | str | None) -> tuple[AttentionGraph, ...]:
    if head == "any" or (head is None and len(discovery.graphs) == 1):
        return discovery.graphs
    if head is None and not any(each.head is None for each in discovery.graphs):
        raise CausalProbeError(f"There are {len(discovery.graphs)} graphs here. Say which with head, or head='any'.")
    return (discovery.of(head),)


def _legal_sets(
    graphs: Sequence[AttentionGraph], target: int, free: list[int], limit: int, max_tested: int
) -> Iterable[list[tuple[int, ...]]]:
    trees = [possible_d_sep(Marks.from_networkx(each.graph), target) for each in graphs]
    within = sum(1 << node for node in free)
    left = max_tested
    for size in range(1, limit + 1):
        distance: dict[tuple[int, ...], int] = {}
        try:
            for tree in trees:
                for nodes in tree.legal_sets(size, within, limit=left):
                    distance[nodes] = min(distance.get(nodes, 1 << 30), tree.total_distance(nodes))
        except OverflowError:
            return
        left -= len(distance)
        if left < 0:
            return
        yield sorted(distance, key=lambda nodes: (distance[nodes], nodes))


# ------------------------------------------------------------------------------------------------------------------ baselines


def _scores(
    method: str, judge: _Judge, discovery: Discovery, target: int, free: list[int], pattern: Any, model: Any
) -> Mapping[int, float]:
    if method == "leave-one-out":
        alone = judge.run([(node,) for node in free])[:, judge.decision]
        return {node: float(judge.original[judge.decision] - value) for node, value in zip(free, alone, strict=True)}
    if method == "attention":
        if pattern is None:
            raise CausalProbeError("The method 'attention' ranks tokens by attention: give pattern [query, key].")
        n_positions = judge.tokens.shape[1]
        try:
            given = torch.as_tensor(pattern).detach().cpu()
            its = np.zeros(0) if given.is_complex() else np.asarray(given.double())
        except (TypeError, ValueError, RuntimeError):
            its = np.zeros(0)
        if its.shape != (n_positions, n_positions) or not np.isfinite(its).all():
            raise CausalProbeError(
                f"pattern is finite numbers [query, key] over {n_positions} positions; found {shown(pattern)}."
            )
        rows = its[list(discovery.groups[target])].mean(axis=0)
        return {node: float(rows[list(discovery.groups[node])].sum()) for node in free}
    if model is None:
        raise CausalProbeError("The method 'gradient' differentiates at the embedding: give the model.")
    per_position = _gradient_times_input(model, judge)
    return {node: float(abs(per_position[list(discovery.groups[node])].sum())) for node in free}


def _gradient_times_input(model: Any, judge: _Judge) -> Float[np.ndarray, " pos"]:
    """D output / d embedding times embedding, summed over its dimensions, at each position."""
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.detach().clone().requires_grad_(True))
        return kept[-1]

    with ExitStack() as stack:
        if isinstance(model, HookedModel):
            stack.enter_context(undisturbed(model))
            stack.enter_context(model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: keep(value))]))
        else:
            handle = model.get_input_embeddings().register_forward_hook(lambda *passed: keep(passed[2]))
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        output = judge._outputs(judge.tokens)[0, judge.decision]
        if not kept or not output.requires_grad:
            raise CausalProbeError(
                "The decision does not depend on this model's embedding: outputs must run the model that is given."
            )
        (gradient,) = torch.autograd.grad(output, kept[-1])
    scores: Float[np.ndarray, " pos"] = (gradient * kept[-1]).sum(-1)[0].detach().double().cpu().numpy()
    return scores


# ------------------------------------------------------------------------------------------------------------------- decisions


@checked
def outputs_of(model: Any, decision: str, *, position: int | None = None) -> Outputs:
    """The outputs from which a model's decision is read.

    Parameters
    ----------
    model
        A TransformerLens model, or a Hugging Face one.
    decision
        ``"next"``: the token after the last; ``"masked"``: the token at ``position``; ``"class"``: that of a sequence classifier.
    position
        Of a masked decision, counted from 0 (negative: from the end).

    Returns
    -------
    callable
        From tokens [batch, pos] to the logits [batch, choice].

    Raises
    ------
    CausalProbeError
        If the decision is unknown, or a masked one has no position.

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> outputs_of(DisentangledTransformer(d_vocab=3, n_positions=4), "next")(torch.tensor([[0, 1, 2, 0]])).shape
    torch.Size([1, 3])
    """
    if decision not in ("next", "masked", "class"):
        raise CausalProbeError(f"The decision {decision!r} was asked for; there are next, masked and class.")
    if decision == "masked" and position is None:
        raise CausalProbeError("A masked decision is read at a position: give it.")

    def outputs(tokens: Int[Tensor, "batch pos"]) -> Tensor:
        for kind, fault in token_faults(model, tokens) if isinstance(model, HookedModel) else ():
            if kind != "padding":  # which may be what replaces others
                raise CausalProbeError(fault)
        found = model(tokens) if isinstance(model, HookedModel) else model(input_ids=tokens.to(model.device))
        logits: Tensor = getattr(found, "logits", found)
        if decision == "class":
            return logits
        return logits[:, -1 if decision == "next" else position]

    return outputs


# ------------------------------------------------------------------------------------------------------------------- many inputs


@dataclass(frozen=True, eq=False, repr=False)
class ExplanationSummary(Result):
    """How methods compare over many inputs.

    Attributes
    ----------
    by_method
        By method: ``inputs``; ``success``, the share of inputs that a set was found for, with ``success_low`` and ``success_high``, its
        95% interval (Wilson); ``size`` of the sets and ``rank``, the replacement rank of the first set, means over the inputs on which
        *every* method succeeded (``compared`` of them), with ``size_low``, ... their 95% intervals (Student's t, cut at 1, the least size and rank); ``tested``, the mean
        number of sets put to the model. Where too few inputs are compared the value is None.
    """

    KIND = "explanation summary"
    WORKS = ("rohekar2023",)

    by_method: Mapping[str, Mapping[str, int | float | None]]

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Decisions were explained by the smallest sets of tokens whose replacement changes them ({', '.join(self.by_method)}), and the "
            f"methods compared on the inputs for which all of them found a set ({self.measured_with})."
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row for each method, which is the index."""
        return pd.DataFrame.from_dict(self.by_method, orient="index")

    def table(self) -> Table:
        """One row for each method."""
        rows = [(method, *row.values()) for method, row in self.by_method.items()]
        columns = ("method", *next(iter(self.by_method.values())))
        return Table("ExplanationSummary: means and 95% intervals", columns, rows)


def summarise(explanations: Sequence[Mapping[str, Explanation]]) -> ExplanationSummary:
    """Compare methods over many inputs: what :func:`explain` returned for each, always for the same methods.

    Raises
    ------
    CausalProbeError
        If there are no inputs, or their methods differ.

    Examples
    --------
    >>> from causal_probe.probes.explain import Explanation
    >>> one = {"cleann": Explanation("cleann", 3, 7, ((1,),), (5,), (2,), 1)}
    >>> summarise([one, one]).to_pandas().loc["cleann", ["inputs", "success", "size"]].tolist()
    [2.0, 1.0, 1.0]
    """
    if not explanations or len({frozenset(each) for each in explanations}) != 1:
        raise CausalProbeError("Explanations of one input at least are compared, of the same methods for each.")
    together = [each for each in explanations if all(found.sets for found in each.values())]
    rows: dict[str, dict[str, int | float | None]] = {}
    for method in explanations[0]:
        won = sum(bool(each[method].sets) for each in explanations)
        interval = scipy.stats.binomtest(won, len(explanations)).proportion_ci(method="wilson")
        row: dict[str, int | float | None] = {
            "inputs": len(explanations),
            "success": won / len(explanations),
            "success_low": float(interval.low),
            "success_high": float(interval.high),
            "compared": len(together),
        }
        row |= _with_interval("size", [len(each[method].sets[0]) for each in together])
        row |= _with_interval("rank", [each[method].ranks[0] for each in together])
        row["tested"] = float(np.mean([each[method].tested for each in explanations]))
        rows[method] = row
    measured = [found.provenance for each in explanations for found in each.values()]
    return ExplanationSummary(rows, provenance=merge_provenance(*measured))


def _with_interval(name: str, values: Sequence[int]) -> dict[str, int | float | None]:
    if len(values) < 2:
        return {name: float(values[0]) if values else None, f"{name}_low": None, f"{name}_high": None}
    mean = float(np.mean(values))
    reach = float(scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1))
    return {
        name: mean,
        f"{name}_low": max(1.0, mean - reach),
        f"{name}_high": mean + reach,
    }  # sizes and ranks begin at 1
