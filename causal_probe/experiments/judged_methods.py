"""The result of judging methods on known circuits: a row for each circuit and method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import pandas as pd
from scipy import stats

from causal_probe.results import Result, Table

__all__ = ["Claimed", "JudgedMethods", "MethodRow"]


@dataclasses.dataclass(frozen=True)
class Claimed:
    """What a method claims of one circuit, at a level.

    Attributes
    ----------
    level
        Of its tests.
    edges, false
        How many are claimed, and how many of these are in no truth of its contrast and not constant.
    """

    level: float
    edges: int
    false: int


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """One method on one circuit.

    Attributes
    ----------
    circuit, kind
        The circuit, and its kind: ``"set by hand"``, ``"compiled"``, ``"planted"``, ``"trained"``, ``"own"``.
    method, contrast
        Its name, and the contrast of the truth that it is held to.
    edges, true
        How many edges are compared: those that it scores, without constant ones; and how many of these are true.
    auroc, average_precision
        Of its scores against the truth of its own contrast, in [0, 1]; chance is 0.5, and ``true / edges``. None where all edges or none are true.
    auroc_all, average_precision_all
        The same against the edges that are true under any contrast.
    by_kind
        AUROC by kind of edge: ``query``, ``key``, ``value``, ``MLP``, ``output``: edges into such receivers alone; ``token``, ``positional``: those true edges among all that
        are false.
    claims
        By level.
    seconds
        CPU time.
    """

    circuit: str
    kind: str
    method: str
    contrast: str
    edges: int
    true: int
    auroc: float | None
    average_precision: float | None
    auroc_all: float | None
    average_precision_all: float | None
    by_kind: Mapping[str, float]
    claims: tuple[Claimed, ...]
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class JudgedMethods(Result):
    """Methods that find circuits, on models whose circuit is known.

    Attributes
    ----------
    rows
        One for each circuit and method.
    refused
        What a method could not be asked for, and why.
    """

    RESULT: ClassVar[str] = "known-circuits.json"

    KIND = "methods on known circuits"
    WORKS = ("lindner2023", "gupta2024")

    rows: tuple[MethodRow, ...]
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_pandas(self) -> pd.DataFrame:
        """One row for each circuit and method; AUROC by kind of edge as ``auroc_query``, ..., claims as ``false_0.05`` and ``claimed_0.05``."""
        plain = []
        for row in self.rows:
            flat: dict[str, Any] = {**dataclasses.asdict(row), **{f"auroc_{k}": v for k, v in row.by_kind.items()}}
            for each in row.claims:
                flat |= {f"claimed_{each.level:g}": each.edges, f"false_{each.level:g}": each.false}
            plain.append({key: value for key, value in flat.items() if key not in ("by_kind", "claims")})
        return pd.DataFrame(plain)

    def summary(self) -> pd.DataFrame:
        """By kind of circuit and method: how many circuits, AUROC and average precision (mean over circuits, ``auroc_stderr`` its standard error), the same against all contrasts,
        and CPU seconds.
        """
        frame = self.to_pandas()
        each = frame.groupby(["kind", "method", "contrast"], sort=False)
        means = each[["auroc", "average_precision", "auroc_all", "average_precision_all", "seconds"]].mean()
        means.insert(0, "circuits", each["circuit"].nunique())
        means.insert(2, "auroc_stderr", each["auroc"].sem())
        return means.reset_index()

    def grid(self, by: str = "circuits") -> pd.DataFrame:
        """AUROC by method and, mean over circuits, by ``"circuits"`` (their kinds) or ``"edges"`` (kinds of edges)."""
        frame = self.to_pandas()
        if by == "circuits":
            return frame.pivot_table(index="method", columns="kind", values="auroc", sort=False)
        names = [name for name in frame.columns if name.startswith("auroc_") and not name.startswith("auroc_all")]
        means: pd.DataFrame = frame.groupby("method", sort=False)[names].mean()
        return means.rename(columns=lambda name: name.removeprefix("auroc_"))

    def false_claims(self) -> pd.DataFrame:
        """By method, level and kind of circuit: circuits, claims, false ones, the mean share of false ones among a circuit's claims, and how many circuits have any.

        The circuit is the unit. ``bound`` is the largest number of circuits with a false claim within the one-sided 99% binomial bound of the level: what holds of a test that keeps the
        probability of any false claim, and is stricter than what one that keeps the false discovery rate promises.
        """
        found = []
        plain = [(row, each) for row in self.rows for each in row.claims]
        for method, level, kind in dict.fromkeys((row.method, each.level, row.kind) for row, each in plain):
            its = [each for row, each in plain if (row.method, each.level, row.kind) == (method, level, kind)]
            shares = [each.false / max(1, each.edges) for each in its]
            found.append(
                {
                    "method": method,
                    "level": level,
                    "kind": kind,
                    "circuits": len(its),
                    "claimed": sum(each.edges for each in its),
                    "false": sum(each.false for each in its),
                    "false_share": sum(shares) / len(shares),
                    "circuits_with_false": sum(each.false > 0 for each in its),
                    "bound": int(stats.binom.ppf(0.99, len(its), level)),
                }
            )
        return pd.DataFrame(found)

    @property
    def undefined(self) -> dict[str, str]:
        """Why there is no value."""
        return {"auroc": "all compared edges are true, or none", **self.refused}

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        names = list(dict.fromkeys(row.circuit for row in self.rows))
        return f"from causal_probe import experiments\n\nexperiments.known_circuits({names!r}, n_prompts={self.settings['n_prompts']}, seed={self.settings['seed']})"

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        n = len({row.circuit for row in self.rows})
        return (
            f"Scores of edges between components were compared with the truth of {n} models of known circuit by AUROC and average precision, each method held to the truth of its own contrast, on "
            f"{self.settings['n_prompts']} sequences a model ({self.measured_with})."
        )

    def table(self) -> Table:
        """:meth:`summary`, and below what is claimed falsely."""
        shown = self.summary().astype(object)
        notes = [
            f"{row.method}, level {row.level:g}, {row.kind}: {row.false} of {row.claimed} claims false, in {row.circuits_with_false} of {row.circuits} circuits"
            for row in self.false_claims().itertuples()
        ]
        columns = ("kind", "method", "contrast", "circuits", "auroc", "auroc_stderr", "average_precision", "auroc_all", "seconds")  # fmt: skip
        rows = shown[[*columns]].where(shown[[*columns]].notna(), None).to_numpy().tolist()
        return Table("Methods on known circuits", columns, rows, [*notes, *map(": ".join, self.refused.items())])
