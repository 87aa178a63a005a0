"""The result of comparing kinds of evidence: a row for each, its agreement with the truth and its cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import pandas as pd

from causal_probe import graphs
from causal_probe.options.studies import EvidenceOptions
from causal_probe.results import Result, Table

__all__ = ["Agreement", "EvidenceRow", "EvidenceTable"]

#: The columns that identify a row of the summary.
KEYS = ("evidence", "model", "layer")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How one kind of evidence agrees with the truth: means over its readings of :func:`causal_probe.graphs.compare`.

    Attributes
    ----------
    f1
        In [0, 1]; 0 where a reading has no edge. Chance is that of the row ``every pair``.
    f1_stderr
        Its standard error over readings; None for one reading, and for readings of one pattern (which is no spread at all) it is 0.
    precision
        In [0, 1], over the readings that have an edge; None if none has.
    recall
        In [0, 1].
    shd
        Structural Hamming distance.
    exact
        Share of the readings that are right everywhere, in [0, 1].
    """

    f1: float
    f1_stderr: float | None
    precision: float | None
    recall: float
    shd: float
    exact: float

    @classmethod
    def of(cls, found: Sequence[nx.DiGraph], truth: nx.DiGraph, mode: str) -> Agreement:
        """Of graphs with a truth that has an edge, in a mode of :func:`causal_probe.graphs.compare`."""
        compared = [graphs.compare(graph, truth, mode=mode) for graph in found]
        f1 = [each.f1 or 0.0 for each in compared]
        precision = [each.precision for each in compared if each.precision is not None]
        return cls(
            float(np.mean(f1)),
            float(np.std(f1, ddof=1) / len(f1) ** 0.5) if len(f1) > 1 else None,
            float(np.mean(precision)) if precision else None,
            float(np.mean([each.recall or 0.0 for each in compared])),
            float(np.mean([each.shd for each in compared])),
            float(np.mean([each.shd == 0 for each in compared])),
        )


@dataclasses.dataclass(frozen=True)
class EvidenceRow:
    """One kind of evidence, on one model of one graph.

    Attributes
    ----------
    graph, model
        By name; the model is ``none`` where none is needed.
    evidence
        ``discovery``, ``attention``, ``gradient``, ``ablation``; without a model ``every pair``, ``perfect test``, ``first gradient``.
    algorithm, source, samples
        Of discovery; None elsewhere. The source is ``attention``, ``values``, or ``residual``: attention beside half a residual stream.
    layer
        The layer that was read, from 0.
    readings
        How many graphs were found, each from one input; 1 where the evidence is a mean over sequences.
    skeleton, arrowheads
        Agreement with the truth.
    sequences
        How many sequences went through the model, for all readings together; those of a first gradient went through a reduced one.
    seconds
        Wall-clock time of one reading.
    """

    graph: str
    model: str
    evidence: str
    algorithm: str | None
    source: str | None
    samples: int | str | None
    layer: int | None
    readings: int
    skeleton: Agreement
    arrowheads: Agreement
    sequences: int
    seconds: float

    @property
    def how(self) -> str:
        """The options of a discovery in words."""
        return ", ".join(str(part) for part in (self.algorithm, self.source, self.samples) if part is not None)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EvidenceTable(Result):
    """Kinds of evidence side by side.

    Attributes
    ----------
    rows
        One for each graph, model, layer and kind of evidence, discovery with all its options.
    """

    RESULT: ClassVar[str] = "evidence.json"

    KIND = "comparison of evidence"
    WORKS = ("rohekar2023", "nichani2024")

    rows: tuple[EvidenceRow, ...]

    def to_pandas(self) -> pd.DataFrame:
        """One row for each; agreement as ``skeleton_f1``, ``arrowheads_recall``, ..."""
        return pd.DataFrame([_flat(row) for row in self.rows])

    def summary(self) -> pd.DataFrame:
        """By evidence, model and layer: F1 and share of exact readings, cost, means over the graphs.

        Of discovery the options are those with the best mean F1 of the skeleton (of equal ones, of the arrowheads), chosen with the truth in hand: what it does at
        best. They stand in ``how``.
        """
        frame = self.to_pandas().fillna({"layer": -1})
        frame["how"] = [row.how for row in self.rows]
        shown = [
            "skeleton_f1", "skeleton_precision", "skeleton_recall", "skeleton_exact",
            "arrowheads_f1", "arrowheads_exact", "sequences", "seconds",
        ]  # fmt: skip
        each = frame.groupby([*KEYS, "how"], sort=False, dropna=False)
        means = each[shown].mean().join(each.size().rename("graphs")).reset_index()
        # Of equal skeletons the one with the better arrowheads.
        order = means.sort_values(["skeleton_f1", "arrowheads_f1"], ascending=False, kind="stable")
        best = order.drop_duplicates(list(KEYS)).sort_index()
        best = best.astype({"layer": "Int64"})
        best["layer"] = best["layer"].mask(best["layer"] < 0)
        return best.reset_index(drop=True)

    def by_graph(self) -> pd.DataFrame:
        """F1 of the skeleton: a row for each of :meth:`summary`, in its order, and a column for each graph."""
        best = self.summary()
        found = {(row.graph, row.evidence, row.model, row.layer, row.how): row.skeleton.f1 for row in self.rows}
        names, values = [], []
        for row in best.itertuples():
            layer = None if pd.isna(row.layer) else int(row.layer)
            names.append(row.evidence if layer is None else f"{row.evidence}, {row.model}, layer {layer}")
            key = (row.evidence, row.model, layer, row.how)
            values.append([found.get((graph, *key), np.nan) for graph in self.settings["graphs"]])
        return pd.DataFrame(values, index=names, columns=list(self.settings["graphs"]))

    def deepest(self) -> pd.DataFrame:
        """Is the deepest layer best for discovery? F1 of the skeleton by graph, model and layer, with the best options in each."""
        frame = self.to_pandas()
        frame = frame[frame["evidence"] == "discovery"]
        return frame.pivot_table(
            index=["graph", "model"], columns="layer", values="skeleton_f1", aggfunc="max", sort=False
        )

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        return EvidenceOptions.call("compare_evidence", self.settings)

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            "Graphs over tokens were read from attention by causal discovery (ABCD), from mean attention, score gradients and ablation, on "
            f"in-context tasks of known graph, and compared with the truth by skeleton and arrowheads ({self.measured_with})."
        )

    def table(self) -> Table:
        """:meth:`summary`."""
        shown = self.summary().astype(object)
        return Table(
            f"Evidence on {len(self.settings['graphs'])} graphs",
            [name.replace("skeleton_", "skeleton ").replace("arrowheads_", "arrows ") for name in shown.columns],
            shown.where(shown.notna(), None).to_numpy().tolist(),
        )

    def write_data(self, folder: Path) -> None:
        """Write ``evidence.csv`` beside the JSON."""
        self.save(folder / "evidence.csv")


def _flat(row: EvidenceRow) -> dict[str, Any]:
    plain = dataclasses.asdict(row)
    for mode in ("skeleton", "arrowheads"):
        plain |= {f"{mode}_{name}": value for name, value in plain.pop(mode).items()}
    return plain
