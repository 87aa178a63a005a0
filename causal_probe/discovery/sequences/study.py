"""The whole study: search, test for structure, tell fixed from new, judge every column."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy

from causal_probe.arguments import Seed, checked
from causal_probe.discovery.sequences.agreement import starts
from causal_probe.discovery.sequences.codes import Codes, code, stated_memory
from causal_probe.discovery.sequences.counts import CONCENTRATIONS, ROOT, Counts, polya
from causal_probe.discovery.sequences.models import Gain, chow_liu, compare_models, one_matrix
from causal_probe.discovery.sequences.order import IN_ORDER, causal_order
from causal_probe.discovery.sequences.result import SequenceGraph
from causal_probe.discovery.sequences.search import Found, ascend, search
from causal_probe.discovery.sequences.swaps import SwapTest, swap_test
from causal_probe.discovery.sequences.verdicts import (
    Assumption,
    HubRival,
    Node,
    check_assumptions,
    hub_rivals,
    judge,
    one_matrix_for_all,
    rejections,
    root_concentration,
)
from causal_probe.errors import CausalProbeError

__all__ = [
    "Measured",
    "check_level",
    "decide",
    "graph_from_sequences",
    "kind_of_structure",
    "measure",
    "structure_tests",
]

LEVEL = 0.05
MAX_MEMORY = 2**31
#: Sequences of either half that search, held-out comparison and swap test use at most; the verdicts use all.
SEARCHED = 4000
#: A part of the gain below this share is not named beside the other.
LEAST_SHARE = 0.05
#: How much likelier a token is to follow itself in the other laws that are tried, and by how many nats over all sequences one must be better.
DIAGONALS = (4.0, 0.25)
WORTH = 5.0
#: A level below this can't be reached by the Monte Carlo test for structure.
LEAST_LEVEL = 1e-4


@checked
def graph_from_sequences(
    tokens: Any,
    *,
    level: float = LEVEL,
    order: Literal["columns"] | None = "columns",
    seed: Seed = 0,
    max_memory: int = MAX_MEMORY,
) -> SequenceGraph:
    """The causal graph of token sequences whose transitions are new in each sequence, as far as the sequences tell.

    Parameters
    ----------
    tokens
        Whole numbers [n_sequences, n_columns], of any vocabulary; an array, a tensor, nested lists or an iterable of batches. Sequences must be
        independent of each other (windows of one stream must not overlap).
    level
        Probability of any wrong claim, from 0.0001 to 0.5.
    order
        ``"columns"``: a column's parent stands before it. ``None``: the order isn't known; refused, for candidates are searched among earlier columns only
        (the result's ``skeleton`` has no direction, but the same assumption).
    seed
        Of the random redrawing in the test for structure.
    max_memory
        Most bytes to take.

    Returns
    -------
    SequenceGraph
        With a verdict for each column, every test's p-value, and what can't be known.

    Raises
    ------
    CausalProbeError
        For any argument that can't be worked with.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import graphs, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(7), d_vocab=3)
    >>> tokens = task.sample(1000, torch.Generator().manual_seed(0)).tokens[:, :-1]
    >>> found = graph_from_sequences(tokens)
    >>> found.structure, found.edges
    ('in-context', ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)))
    """
    check_level(level)
    if order != "columns":
        raise CausalProbeError(
            f"order is {order!r}. Without an order of the columns neither directions nor a skeleton are found: give the columns in causal order "
            "(order='columns')."
        )
    return decide(measure(code(tokens, max_memory=max_memory), seed=seed), level=level)


def check_level(level: float) -> None:
    """Refuse a level that no test here can have."""
    if not isinstance(level, (int, float)) or not LEAST_LEVEL <= level <= 0.5:
        raise CausalProbeError(f"`level` is {level!r}. It must be a number from {LEAST_LEVEL:g} to 0.5.")


@dataclass(frozen=True)
class Measured:
    """All that doesn't depend on the level."""

    codes: Codes
    best: Found
    p_values: list[dict[int, float]]
    hubs: list[HubRival]
    tests: tuple[SwapTest, SwapTest]
    gains: dict[str, Gain]
    assumptions: tuple[Assumption, ...]
    seed: Seed


def measure(codes: Codes, *, seed: Seed = 0) -> Measured:
    """Search on one half of the sequences, test for structure on the other, improve and measure every column on all."""
    shuffled = np.random.default_rng(seed).permutation(len(codes.local))
    first, second = (codes.take(half[:SEARCHED]) for half in np.array_split(shuffled, 2))
    found = search(first)
    tree, _ = chow_liu(first.shared)
    concentration = found.concentration or float(CONCENTRATIONS[-1])
    tests = structure_tests(first, second, found.parents, concentration, tree, seed=seed)
    # Each half's search ends in a local optimum; the better of the two on all sequences is judged, the other is one more rival.
    other, best = sorted((_polish(codes, each) for each in (found, search(second))), key=lambda each: each.score)
    counts = Counts(codes, best.parents)
    p_values = rejections(counts, best.concentration)
    hubs = hub_rivals(codes, best.parents, best.concentration, other.parents)
    hubs += [HubRival(each, 1.0) for each in _other_law(codes, first, best)]
    nodes = judge(best.parents, p_values, hubs, n_sequences=len(codes.local), level=LEVEL)
    sure = [best.parents[node.column] if node.verdict == "edge" else ROOT for node in nodes]
    gains = compare_models(first, second, found.parents, tree, sure, seed=seed + 2)
    return Measured(
        codes=codes,
        best=best,
        p_values=p_values,
        hubs=hubs,
        tests=tests,
        gains=gains,
        assumptions=(
            *check_assumptions(codes, counts, best.concentration),
            causal_order(codes, first, second, best),
            one_matrix_for_all(first, second, best.parents),
        ),
        seed=seed,
    )


def structure_tests(
    first: Codes, second: Codes, parents: Sequence[int], concentration: float, tree: Sequence[int], *, seed: Seed
) -> tuple[SwapTest, SwapTest]:
    """Dependence along ``parents`` with transitions new in each sequence, and along ``tree`` with one matrix fitted on ``first``; both on ``second``."""
    fixed = None if first.ranked else one_matrix(first, tree)
    new_test, fixed_test = swap_test(
        second,
        [
            lambda some: polya(some, parents, concentration),
            lambda some: np.zeros(len(some.local)) if fixed is None else fixed.log_q(some, tree).sum(1),
        ],
        seed=seed + 1,
    )
    return new_test, fixed_test


def decide(measured: Measured, *, level: float) -> SequenceGraph:
    """The claims at a level."""
    codes, best = measured.codes, measured.best
    n, columns = codes.local.shape
    structure, kind_decided = kind_of_structure(measured.gains, measured.tests, level)
    nodes = judge(best.parents, measured.p_values, measured.hubs, n_sequences=n, level=level)
    rejected = [a.name for a in measured.assumptions if not a.holds]
    withheld = _withheld(structure, kind_decided, rejected)
    first = nodes[0]
    if IN_ORDER in rejected:  # its parent may stand behind it
        everything = (ROOT, *range(1, columns))
        reason = f"assumption rejected: {IN_ORDER}"
        first = dataclasses.replace(first, verdict="undecided", reason=reason, confidence_set=everything)
    if withheld:
        nodes = [
            first,
            *(node if node.verdict == "not identifiable" else _withhold(node, withheld) for node in nodes[1:]),
        ]
    constant = [bool((column == column[0]).all()) for column in codes.shared.T]
    nodes = [
        dataclasses.replace(node, verdict="not identifiable", reason="this column is constant")
        if constant[node.column]
        else node
        for node in nodes
    ]
    tree: list[int] = chow_liu(codes.shared)[0] if structure in ("fixed", "both") else []
    return SequenceGraph(
        structure=structure,
        nodes={node.column: node for node in nodes},
        candidates=tuple(best.parents),
        fixed_tree=tuple((parent, child) for child, parent in enumerate(tree) if parent != ROOT),
        in_context_test=measured.tests[0],
        fixed_test=measured.tests[1],
        gains=measured.gains,
        assumptions=measured.assumptions,
        concentration=best.concentration,
        score=best.score,
        reached=best.reached,
        tried=best.tried,
        level=float(level),
        n_sequences=n,
        d_vocab=codes.d_vocab,
        notes=tuple(_notes(codes, structure, kind_decided, measured.assumptions)),
        settings={
            "level": float(level),
            "order": "columns",
            "seed": measured.seed,
            "memory": stated_memory(n, columns, int(codes.local.max()) + 1),
        },
    )


def _polish(codes: Codes, found: Found) -> Found:
    """The best graph of half of the sequences, improved on all."""
    if found.concentration is None:
        return found
    codes = dataclasses.replace(codes, diagonal=found.diagonal)
    counts = Counts(codes)
    fitted = ascend(counts, found.parents, found.concentration)
    if fitted is None:
        return dataclasses.replace(found, parents=list(counts.parents), concentration=None, score=0.0)
    # Columns whose parent shows only with the larger concentration of the test against "root".
    ascend(counts, counts.parents, root_concentration(fitted), fit=False, sweeps=3)
    parents = list(counts.parents)
    fitted = counts.fit() or fitted
    score = float(polya(codes, parents, fitted).mean())
    return dataclasses.replace(found, parents=parents, concentration=fitted, score=score)


def _other_law(codes: Codes, first: Codes, best: Found) -> list[tuple[tuple[int, int], ...]]:
    """In what the best graph is another if a token likes to follow itself, or shuns it; empty where the data ask for neither.

    Where tokens mostly follow themselves, rows that are alike may explain a wrong graph better than the true one. Of the other laws the best counts.
    """
    begin = starts(first)  # the same under every law
    laws = [_polish(codes, search(dataclasses.replace(first, diagonal=each), begin=begin)) for each in DIAGONALS]
    its = max(laws, key=lambda found: found.score)
    if its.concentration is None or len(codes.local) * (its.score - best.score) <= WORTH:
        return []
    columns = enumerate(zip(best.parents, its.parents, strict=True))
    return [tuple((column, new) for column, (old, new) in columns if new != old)]


def kind_of_structure(gains: Mapping[str, Gain], tests: tuple[SwapTest, SwapTest], level: float) -> tuple[str, bool]:
    """In-context, fixed, both or none, and whether the kind is decided.

    Dependence by the swap tests, each at half of the level; its kind by the held-out gains, also at half of the level.
    """
    in_context_p, fixed_p = (test.p_value for test in tests)
    if min(in_context_p, fixed_p) > level / 2:
        return "none", True
    limit = float(scipy.stats.norm.isf(level / 2))
    least = LEAST_SHARE * max(gains["one_matrix_a_sequence"].mean, gains["one_matrix"].mean)
    new = in_context_p <= level / 2 and gains["new_in_each"].z > limit and gains["new_in_each"].mean > least
    besides = gains["fixed_besides"].z > limit and gains["fixed_besides"].mean > least
    if new:
        return ("both" if besides else "in-context"), True
    if fixed_p <= level / 2 and gains["fixed_alone"].z > limit:
        return "fixed", True
    return ("in-context" if gains["new_in_each"].z > gains["fixed_alone"].z else "fixed"), False


def _withheld(structure: str, kind_decided: bool, rejected: list[str]) -> str:
    if structure == "none":
        return "no dependence beyond sequence and column effects"
    if not kind_decided:
        return "whether the dependence is fixed or new in each sequence is not decided"
    if structure == "fixed":
        return "dependence that is new in each sequence is not shown: see the tree of mutual information"
    if rejected:
        return f"assumption rejected: {'; '.join(rejected)}"
    return ""


def _withhold(node: Node, reason: str) -> Node:
    everything = (ROOT, *range(node.column))
    return dataclasses.replace(node, verdict="undecided", reason=reason, confidence_set=everything)


def _notes(codes: Codes, structure: str, kind_decided: bool, assumptions: tuple[Assumption, ...]) -> list[str]:
    notes = []
    if not kind_decided:
        notes.append(
            "There is dependence; whether it is fixed or new in each sequence isn't decided, so the structure named is the likelier one."
        )
    if codes.ranked:
        notes.append(
            f"{codes.d_vocab:,} symbols are too many to compare between sequences: fixed dependence isn't asked for, and column effects are those on a token's rank in its sequence."
        )
    if structure in ("fixed", "both"):
        notes.append(
            "Fixed dependence: the tree of mutual information (Chow & Liu) is given without direction; conditional independence tests such as causal-learn's PC ask further."
        )
    if structure == "both":
        notes.append(
            "Part of the dependence is the same in all sequences; the edges rest on the part that is new in each."
        )
    if int(codes.local.max()) == 1:
        notes.append(
            "There are two symbols: every matrix of two is reversible, so the data can't tell the order of the columns, and the directions of edges rest on it."
        )
    notes += [
        f"Rejected (p = {a.p_value:.2g}): {a.name}. {a.found[:1].upper()}{a.found[1:]}."
        for a in assumptions
        if not a.holds
    ]
    return notes
