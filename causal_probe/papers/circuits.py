"""Gupta et al. 2024, InterpBench, with models of our own: which method finds a circuit that is known, how often do its claims lie, and what does it cost?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from causal_probe import viz
from causal_probe.circuits import KnownCircuit, check_truth, find_circuit, known_circuit
from causal_probe.circuits.compiled import has_tracr
from causal_probe.circuits.edge_methods import EDGE_METHODS, run_of
from causal_probe.circuits.handset import HAND_SET
from causal_probe.circuits.rasp_programs import PROGRAMS
from causal_probe.circuits.trained import TRAINED, trained_circuit
from causal_probe.experiments.judged_methods import Claimed, JudgedMethods, MethodRow
from causal_probe.experiments.known_circuits import FEW, known_circuits
from causal_probe.hooks.check import undisturbed
from causal_probe.papers.base import Line, Reproduction, Run, reproduction
from causal_probe.papers.shared import quick_note

__all__ = ["circuits"]

#: Sequences for each method.
PROMPTS = {True: 32, False: 96}
#: Drawn after all methods were settled.
PLANTED = range(500, 700)
#: On so many planted circuits greedy pruning is run: it takes as many forwards as edges, thrice.
PRUNED = 20
SLOW = ("ACDC", "ACDC, resample")
#: The methods of a quick run's planted circuits.
QUICK = ("EAP", "EAP-IG", "EAP-IG, resample", "ablation, resample", "path patching", "attention", "score gradients", "QK attributions", "upstream", "circuit", "random")  # fmt: skip
#: Power: circuits, and sequences.
POWER, SIZES = {True: range(700, 701), False: range(700, 720)}, {True: (48,), False: (48, 96, 192, 384)}
#: Intervals: circuits, how often each is asked, and the sequences from which an effect is taken for true.
ASKED = {True: ("key-composition",), False: ("key-composition", "value-composition", "mlp-between", "duplicate-token", *(f"planted-{seed}" for seed in range(720, 722)))}  # fmt: skip
REPEATS, ESTIMAND, CHUNK = {True: 4, False: 25}, {True: 2_000, False: 100_000}, 2_000
#: The programs of which position-wise contrasts are shown to miss what positions carry.
FIVE = ("induction", "induction-two-back", "sum-of-two-lags", "share-of-a", "balance")
#: Effects outside a trained circuit, as a share of ablating everything.
TRAINED_LITTLE = 0.05


def names(quick: bool) -> list[str]:
    """The circuits that methods are judged on."""
    if quick:
        return [*FEW]
    compiled = [f"tracr-{name}" for name in PROGRAMS] if has_tracr() else []
    return [*HAND_SET, *compiled, *(f"planted-{seed}" for seed in PLANTED)]


def asked_of(name: str, quick: bool) -> list[str]:
    """The methods for one circuit."""
    if not name.startswith("planted-"):
        return [*EDGE_METHODS]
    slow = int(name.removeprefix("planted-")) >= PLANTED.start + PRUNED
    return [*QUICK] if quick else [each for each in EDGE_METHODS if not (slow and each in SLOW)]


def judged(name: str | KnownCircuit, quick: bool, seed: int) -> dict[str, Any]:
    """The rows of one circuit, as plain values."""
    circuit = known_circuit(name) if isinstance(name, str) else name
    found = known_circuits([circuit], asked_of(circuit.name, quick), n_prompts=PROMPTS[quick], seed=seed + 1)
    return {"rows": [dataclasses.asdict(row) for row in found.rows], "refused": found.refused}


def table_of(parts: Sequence[dict[str, Any]], settings: dict[str, Any]) -> JudgedMethods:
    """The rows of all circuits together."""
    rows = [
        MethodRow(**{**row, "claims": tuple(Claimed(**each) for each in row["claims"])})
        for part in parts
        for row in part["rows"]
    ]
    return JudgedMethods(tuple(rows), {k: v for part in parts for k, v in part["refused"].items()}, settings=settings)


# ------------------------------------------------------------------------------------------------ what each part computes


def of_trained(name: str, quick: bool, seed: int) -> dict[str, Any]:
    """A trained circuit judged, how far its truth holds, and that of a control without strict training."""
    found: dict[str, Any] = {}
    for strict in (True, False):
        circuit = trained_circuit(name, strict=strict, seed=seed)
        checked = check_truth(circuit, seed=seed + 1, tolerance=TRAINED_LITTLE)
        tokens = circuit.sample(512, torch.Generator().manual_seed(seed + 2))
        with torch.no_grad():
            right = float((circuit.metric(circuit.model(tokens), tokens) > 0).double().mean())
        found["strict" if strict else "control"] = {
            "others": checked.others / checked.baseline,
            "least": min(checked.effects.values()) / checked.baseline,
            "right": right,
        }
        if strict:
            found |= judged(circuit, quick, seed)
    return found


def power(seed: int, n: int) -> dict[str, Any]:
    """Of one planted circuit, the true edges that are confirmed, and others that are."""
    circuit = known_circuit(f"planted-{seed}")
    found = find_circuit(circuit.model, circuit.sample(n, torch.Generator().manual_seed(seed)), circuit.metric, sizes=1)
    true = set(circuit.edges())
    return {"found": len(true & set(found.confirmed)), "true": len(true), "false": len(set(found.confirmed) - true)}


def intervals(name: str, quick: bool, seed: int) -> dict[str, Any]:
    """Of one circuit's true edges, how often the interval of ``circuit`` holds the mean effect over many sequences, and by how much estimates miss it."""
    circuit = known_circuit(name)
    edges = circuit.edges()
    total, count = np.zeros(len(edges)), 0
    with undisturbed(circuit.model):
        for chunk in range(max(1, ESTIMAND[quick] // CHUNK)):
            tokens = circuit.sample(CHUNK, torch.Generator().manual_seed(10_000 + 1_000 * seed + chunk))
            run = run_of(circuit.model, tokens, circuit.metric, "resample", seed=chunk)
            total, count = total + run.effects(edges).sum(1).numpy(), count + CHUNK
    truth = dict(zip(edges, (total / count).tolist(), strict=True))
    held, errors, again = [], [], []
    for repeat in range(REPEATS[quick]):
        tokens = circuit.sample(PROMPTS[False], torch.Generator().manual_seed(20_000 + 1_000 * seed + repeat))
        found = find_circuit(circuit.model, tokens, circuit.metric, sizes=1, seed=repeat)
        for edge in found.edges:
            if (wanted := truth.get((edge.source, edge.receiver))) is not None:
                held.append(edge.low <= wanted <= edge.high)
                if edge.stderr > 0:
                    errors.append((edge.effect - wanted) / edge.stderr)
                if edge.status == "confirmed" and edge.again is not None and edge.again_stderr:
                    again.append((edge.again - wanted) / edge.again_stderr)
    return {"held": sum(held), "of": len(held), "error": float(np.mean(errors)), "again": float(np.mean(again))}


def five(name: str) -> dict[str, Any]:
    """AUROC of edges into queries, keys, values and MLPs against the truth of all contrasts, beside what missing the positional ones would give."""
    circuit = known_circuit(f"tracr-{name}")
    tokens = circuit.sample(128, torch.Generator().manual_seed(1))
    edges = [edge for edge in circuit.candidates() if edge[1] != "logits" and edge not in circuit.constant]
    true = [edge for edge in edges if edge in circuit.truth.edges]
    positional = sum(circuit.truth.edges[edge]["kind"] == "positional" for edge in true)
    found: dict[str, Any] = {"edges": len(edges), "true": len(true), "expected": 1 - positional / (2 * len(true))}
    for method in ("EAP", "distance, mean by position", "distance, mean", "distance, resample"):
        scores = EDGE_METHODS[method](circuit.model, tokens, circuit.metric).scores
        ranks = stats.rankdata([round(scores[edge], 9) for edge in edges])
        wins = sum(rank for edge, rank in zip(edges, ranks, strict=True) if edge in circuit.truth.edges)
        found[method] = (wins - len(true) * (len(true) + 1) / 2) / (len(true) * (len(edges) - len(true)))
    return found


def cost(name: str, quick: bool) -> dict[str, Any]:
    """By method, the floating-point operations, over those of one forward pass of the same sequences."""
    circuit = known_circuit(name)
    tokens = circuit.sample(PROMPTS[quick], torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as one, torch.no_grad():
        circuit.model(tokens)
    found = {}
    for method in EDGE_METHODS:
        with FlopCounterMode(display=False) as counted:
            EDGE_METHODS[method](circuit.model, tokens, circuit.metric)
        found[method] = counted.get_total_flops() / one.get_total_flops()
    return found


# --------------------------------------------------------------------------------------------------------- the reproduction


@reproduction("circuits", "Which method finds a known circuit, and how often do its claims lie?", minutes=(1, 75))
def circuits(run: Run) -> Reproduction:
    """Every method of the package on circuits set by hand, compiled, planted and trained."""
    quick, seed = run.quick, run.seed
    parts = [run.part(f"judged-{name}", partial(judged, name, quick, seed)) for name in names(quick)]
    taught = {} if quick else {name: run.part(f"trained-{name}", partial(of_trained, name, quick, seed)) for name in TRAINED}  # fmt: skip
    settings = {"n_prompts": PROMPTS[quick], "seed": seed + 1, "methods": [*EDGE_METHODS]}
    table = table_of([*parts, *taught.values()], settings)
    powers = {
        n: [run.part(f"power-{n}-{each}", partial(power, each, n)) for each in POWER[quick]] for n in SIZES[quick]
    }
    covered = {name: run.part(f"intervals-{name}", partial(intervals, name, quick, seed)) for name in ASKED[quick]}
    positions = {} if quick or not has_tracr() else {name: run.part(f"five-{name}", partial(five, name)) for name in FIVE}  # fmt: skip
    costs = run.part("cost", partial(cost, "mlp-between", quick))
    best = table.summary()
    lines = [*_scores(best, costs), *_claims(table), *_intervals(covered), *_power(powers), *_five(positions), *_trained(taught)]  # fmt: skip
    false = table.false_claims()
    own = false[false["method"] == "circuit"]
    summary = (
        f"{len({row.circuit for row in table.rows})} circuits, {len(EDGE_METHODS)} methods. Of {int(own[own.level == 0.05]['claimed'].sum())} edges that circuit confirms at level 0.05, "
        f"{int(own[own.level == 0.05]['false'].sum())} are not true."
    )
    return Reproduction(
        name="circuits",
        title="Methods that find circuits, on circuits that are known",
        paper=("gupta2024", "lindner2023", "conmy2023", "syed2023", "hanna2024", "wang2023", "geiger2022"),
        summary=summary,
        lines=tuple(lines),
        figures={"auroc": _picture(table.grid(), "circuits"), "edges": _picture(table.grid("edges"), "edges")},
        captions={
            "auroc": "AUROC against the truth of each method's own contrast, mean over circuits; 0.5 is chance.",
            "edges": "The same by kind of edge: edges into such receivers alone, and true edges that carry tokens or positions among all false ones.",
        },
        notes=(
            "All methods are this package's, as described in circuits.edge_methods, on one definition of an edge: a source's part of one receiver's input. Corrupted prompts are other sequences of the same "
            "circuit, position by position. So a number here is of a method under one contrast and not of its authors' program; ACDC prunes by the metric's fall, at three thresholds, on 32 sequences, "
            f"and on {PRUNED} of the planted circuits only.",
            "A method is held to the truth of its own contrast. What a position-wise contrast can't see, positional edges, is not in its truth; the column against all contrasts counts it.",
            "attention, QK attributions and upstream say what a head reads and not whether the metric needs that head: edges into the circuit's own receivers are compared.",
            "On planted circuits, which have norms, only resample is exact: a mean or zero in the place of a part changes the norm's scale, and with it what all others say. Edges outside "
            "the truth then have true effects, small ones.",
            *quick_note(run, "few circuits, none compiled or trained, fewer sequences, and half of the methods on planted ones."),
        ),
        method="Scores of edges between components were compared with the truth of models of known circuit, each method held to the truth of its own contrast.",
        arrays={},
        settings={**run.settings, "n_prompts": PROMPTS[quick], "estimand_sequences": ESTIMAND[quick], "repeats": REPEATS[quick]},
    )  # fmt: skip


def _scores(best: pd.DataFrame, costs: dict[str, Any]) -> Iterator[Line]:
    for method, its in best.groupby("method", sort=False):
        means = {row.kind: row for row in its.itertuples()}
        planted = means.get("planted", next(iter(means.values())))
        others = ", ".join(f"{kind} {row.auroc:.3f}" for kind, row in means.items() if row is not planted)
        note = f"{planted.kind}, {planted.circuits} circuits; {others}; average precision {planted.average_precision:.2f}; against all contrasts {planted.auroc_all:.2f}"
        yield Line(f"{method}: AUROC", float(planted.auroc), _or_none(planted.auroc_stderr), None, f"truth of {planted.contrast}", None, f"{note}; costs {costs[method]:.0f} forwards of mlp-between")  # fmt: skip


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _claims(table: JudgedMethods) -> Iterator[Line]:
    for row in table.false_claims().itertuples():
        exact = row.kind != "trained"
        yield Line(
            f"{row.method}, level {row.level:g}, {row.kind}: circuits with a false claim",
            int(row.circuits_with_false),
            None,
            None,
            f"at most {row.bound} of {row.circuits}: one-sided 99% binomial bound of the level",
            bool(row.circuits_with_false <= row.bound) if exact else None,
            f"{row.false} of {row.claimed} claims{'' if exact else '; a trained circuit has small effects outside its truth'}",
        )


def _intervals(covered: dict[str, dict[str, Any]]) -> Iterator[Line]:
    held, of = (sum(each[name] for each in covered.values()) for name in ("held", "of"))
    each = [its["held"] / its["of"] for its in covered.values()]
    spread = float(np.std(each, ddof=1) / math.sqrt(len(each))) if len(each) > 1 else None
    yield Line("circuit: intervals of 0.9 that hold the edge's mean effect", held / of, spread, None, "mean effect over many other sequences", None, f"{of} intervals of {len(covered)} circuits' true edges, 32 sequences each")  # fmt: skip
    for name, what in (("error", "as tested"), ("again", "of confirmed edges, on the prompts of the report")):
        values = [its[name] for its in covered.values()]
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        yield Line(f"circuit: mean error of effects {what}, in standard errors", float(np.mean(values)), error, None, "0 without bias", None, f"{len(values)} circuits")  # fmt: skip


def _power(powers: dict[int, list[dict[str, Any]]]) -> Iterator[Line]:
    for n, its in powers.items():
        shares = [each["found"] / each["true"] for each in its]
        error = float(np.std(shares, ddof=1) / math.sqrt(len(shares))) if len(shares) > 1 else None
        yield Line(f"circuit: true edges confirmed with {n} sequences", float(np.mean(shares)), error, None, "", None, f"{len(its)} planted circuits, a third of the sequences in the test; {sum(each['false'] for each in its)} false")  # fmt: skip


def _five(positions: dict[str, dict[str, Any]]) -> Iterator[Line]:
    for name, its in positions.items():
        found, wanted = its["distance, mean by position"], its["expected"]
        others = ", ".join(f"{method} {its[method]:.2f}" for method in ("EAP", "distance, mean", "distance, resample"))
        yield Line(f"{name}, squared distance, mean by position: AUROC of edges into queries, keys, values and MLPs", found, None, wanted, "1 - p / 2n: p of n true edges are positional and have no effect", abs(found - wanted) <= 0.02, f"{its['true']} of {its['edges']} edges true under some contrast; {others}")  # fmt: skip


def _trained(taught: dict[str, dict[str, Any]]) -> Iterator[Line]:
    for name, its in taught.items():
        strict, control = its["strict"], its["control"]
        yield Line(f"trained to {name}: largest change when all edges outside the circuit are ablated", strict["others"], None, None, "share of ablating everything", strict["others"] <= TRAINED_LITTLE and strict["least"] > TRAINED_LITTLE, f"at most {TRAINED_LITTLE} and every true edge more ({strict['least']:.2f}); without strict training {control['others']:.2f}; right answers {strict['right']:.3f} and {control['right']:.3f}")  # fmt: skip


def _picture(grid: pd.DataFrame, columns: str) -> Figure:
    return viz.table_map(grid, value_name="AUROC", row_name="method", column_name=columns, limit=1.0)
