"""Which method tells the truth about a circuit, and how often? Every method on models whose every edge is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm.auto import tqdm

from causal_probe.arguments import Count, Seed, checked, near
from causal_probe.circuits import KnownCircuit, known_circuit
from causal_probe.circuits.edge_methods import EDGE_METHODS, EdgeMethod, Scores
from causal_probe.circuits.handset import HAND_SET
from causal_probe.circuits.known import Edge
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.judged_methods import Claimed, JudgedMethods, MethodRow

__all__ = ["FEW", "known_circuits"]

#: A small run: programs of one idea each, and planted circuits.
FEW = (
    *("key-composition", "mlp-between", "or-gate", "duplicate-token"),
    *(f"planted-{seed}" for seed in range(500, 510)),
)
#: By what stands before a circuit's name.
KINDS = {"tracr-": "compiled", "planted-": "planted", "trained-": "trained"}
#: Scores that are equal to so many digits of the largest are equal: what is 0 but for rounding is as good as 0.
SAME = 6
SIDES = {"q": "query", "k": "key", "v": "value", "mlp": "MLP", "logits": "output"}


@checked
def known_circuits(
    circuits: Sequence[str | KnownCircuit] = FEW,
    methods: Sequence[str] | None = None,
    own: Mapping[str, Callable[..., Any]] | None = None,
    *,
    n_prompts: Count = 96,
    seed: Seed = 1,
    progress: bool = False,
) -> JudgedMethods:
    """Judge methods on models of known circuit, all on the same sequences.

    Scores are compared to a millionth of the largest: less is rounding. Each method is held to the truth of its own contrast (:class:`~causal_probe.circuits.edge_methods.EdgeMethod`), and to that of all contrasts. Edges that carry a constant are set
    aside; in an OR gate no edge has an effect alone, and a method of single edges misses them.

    Parameters
    ----------
    circuits
        Names of :func:`~causal_probe.circuits.known_circuit`, or circuits of yours.
    methods
        Names of :data:`~causal_probe.circuits.edge_methods.EDGE_METHODS`; None for all.
    own
        Methods of yours, by name: ``(model, tokens, metric) -> {(source, receiver): score}``, or an :class:`~causal_probe.circuits.edge_methods.EdgeMethod`, which says its
        contrast.
    n_prompts
        Sequences for each method, drawn from the circuit's own.
    seed
        Of the sequences.
    progress
        Show a bar on standard error.

    Raises
    ------
    CausalProbeError
        If there is no such circuit or method, or a method of yours gives no scores.

    Examples
    --------
    >>> def by_name(model, tokens, metric):
    ...     return {("embed", "L0H0.v"): 2.0, ("embed", "L0H0.q"): 1.0}
    >>> found = known_circuits(["key-composition"], ["ablation, resample"], own={"by name": by_name})
    >>> found.to_pandas()[["method", "edges", "true", "auroc"]].values.tolist()
    [['ablation, resample', 19, 9, 1.0], ['by name', 2, 1, 1.0]]
    """
    asked = [*EDGE_METHODS] if methods is None else [*methods]
    for name in asked:
        if name not in EDGE_METHODS:
            raise CausalProbeError(f"There is no method {name!r}{near(name, EDGE_METHODS, quote=repr)} There are: {', '.join(EDGE_METHODS)}.")  # fmt: skip
    if not circuits:
        raise CausalProbeError("There is no circuit to judge methods on; give at least one name.")
    for name, each in (own or {}).items():
        if name in asked or not callable(each):
            why = "is a method of the package, too" if name in asked else f"is a {type(each).__name__}"
            raise CausalProbeError(
                f"Your method {name!r} {why}; give a function (model, tokens, metric) -> scores under a name of its own."
            )
    those = [EDGE_METHODS[name] for name in asked]
    those += [
        each if isinstance(each, EdgeMethod) else EdgeMethod(name, "", each) for name, each in (own or {}).items()
    ]
    rows: list[MethodRow] = []
    refused: dict[str, str] = {}
    with tqdm(total=len(circuits) * len(those), desc="methods", disable=not progress) as bar:
        for which in circuits:
            circuit = which if isinstance(which, KnownCircuit) else known_circuit(which)
            tokens = circuit.sample(n_prompts, torch.Generator().manual_seed(seed))
            for method in those:
                started = time.process_time()
                try:
                    found = method(circuit.model, tokens, circuit.metric)
                except CausalProbeError as error:
                    if own and method.name in own:
                        raise
                    refused[f"{method.name}, {circuit.name}"] = str(error)
                else:
                    rows.append(judge(circuit, method, found, time.process_time() - started))
                bar.update()
    if not those:
        raise CausalProbeError("There is no method to judge; name one in `methods`, or give one of yours in `own`.")
    settings = {"n_prompts": n_prompts, "seed": seed, "methods": [each.name for each in those]}
    return JudgedMethods(tuple(rows), refused, settings=settings)


def judge(circuit: KnownCircuit, method: EdgeMethod, found: Scores, seconds: float) -> MethodRow:
    """What a method says of a circuit, beside the truth.

    Raises
    ------
    CausalProbeError
        If it scores an edge that the model doesn't have.
    """
    true, any_contrast = set(circuit.edges(method.contrast)), set(circuit.truth.edges)
    every = set(circuit.candidates())
    if strange := [edge for edge in (*found.scores, *(e for its in found.claims.values() for e in its)) if edge not in every]:  # fmt: skip
        raise CausalProbeError(
            f"{method.name} speaks of {strange[0]}, which is no edge of {circuit.name}. Its edges go from {', '.join(dict.fromkeys(s for s, _ in circuit.candidates()))} to "
            f"{', '.join(dict.fromkeys(r for _, r in circuit.candidates()))}."
        )
    within = {receiver for _, receiver in any_contrast}
    aside = set(circuit.constant)

    def counts(edge: Edge) -> bool:
        return edge not in aside and (method.of == "metric" or edge[1] in within)

    edges = [edge for edge in found.scores if counts(edge)]
    largest = max((abs(found.scores[edge]) for edge in edges), default=0.0) or 1.0
    scores = [round(found.scores[edge] / largest, SAME) for edge in edges]
    auroc, precision = _ranked([edge in true for edge in edges], scores)
    auroc_all, precision_all = _ranked([edge in any_contrast for edge in edges], scores)
    claims = []
    for level, claimed in sorted(found.claims.items(), reverse=True):
        its = {edge for edge in claimed if counts(edge)}
        claims.append(Claimed(level, len(its), len(its - true)))
    by_hand = "set by hand" if circuit.name in HAND_SET else "own"
    kind = next((its for start, its in KINDS.items() if circuit.name.startswith(start)), by_hand)
    return MethodRow(
        circuit.name,
        kind,
        method.name,
        method.contrast,
        len(edges),
        sum(edge in true for edge in edges),
        auroc,
        precision,
        auroc_all,
        precision_all,
        dict(_by_kind(circuit, edges, scores, true)),
        tuple(claims),
        seconds,
    )


def _ranked(truth: Sequence[bool], scores: Sequence[float]) -> tuple[float | None, float | None]:
    if len(set(truth)) < 2:
        return None, None
    return float(roc_auc_score(truth, scores)), float(average_precision_score(truth, scores))


def _by_kind(
    circuit: KnownCircuit, edges: Sequence[Edge], scores: Sequence[float], true: set[Edge]
) -> Iterator[tuple[str, float]]:
    """AUROC of edges into each kind of receiver, and of true edges of each kind among all that are false."""
    pairs = list(zip(edges, scores, strict=True))
    for side, name in SIDES.items():
        its = [(edge in true, score) for edge, score in pairs if edge[1].rpartition(".")[2] == side]
        if len({each for each, _ in its}) == 2:
            yield name, float(roc_auc_score(*zip(*its, strict=True)))
    for kind in ("token", "positional"):
        its = [
            (edge in true, score)
            for edge, score in pairs
            if edge not in true or circuit.truth.edges[edge]["kind"] == kind
        ]
        if len({each for each, _ in its}) == 2:
            yield kind, float(roc_auc_score(*zip(*its, strict=True)))
