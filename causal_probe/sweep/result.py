"""The result of a sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from causal_probe.errors import CausalProbeError
from causal_probe.mechanisms.dynamics import Dynamics, dynamics
from causal_probe.results import BINARY, Result, Table
from causal_probe.sweep.merging import merge_shards
from causal_probe.sweep.plan import Cell
from causal_probe.sweep.store import Store

__all__ = ["Sweep"]

#: The works that a sweep's probes rest on.
WORKS = {"recover": "nichani2024", "gradient": "nichani2024", "scan": "olsson2022", "head_graphs": "nichani2024"}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sweep(Result):
    """The result of :func:`sweep`: cells, most of them finished.

    Attributes
    ----------
    folder
        Where the results are; ``pandas.read_parquet(folder / "cells")`` reads them without this class.
    cells
        The cells that the spec asks for, in its order.
    failed
        By key, the error of each cell that failed. It is tried again when the sweep is started again.
    spec
        The spec as it was given.
    """

    KIND = "sweep"
    DERIVED = ("n_cells", "finished", "points")

    folder: Path
    cells: tuple[Cell, ...] = dataclasses.field(metadata=BINARY)
    failed: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        """Whether no cell has failed."""
        return not self.failed

    @property
    def n_cells(self) -> int:
        """How many cells were asked for."""
        return len(self.cells)

    @property
    def finished(self) -> int:
        """How many of them are there."""
        return len(self.cells) - len(self.failed)

    @property
    def points(self) -> list[dict[str, Any]]:
        """:meth:`summary` in plain types, what is missing as None."""
        return [{k: None if pd.isna(v) else v for k, v in row.items()} for row in self.summary().to_dict("records")]

    def to_pandas(self) -> pd.DataFrame:
        """One row for each head or edge of each finished cell, in the order of the cells.

        The columns are those of :data:`~causal_probe.sweep.store.COLUMNS`. What a probe doesn't measure is missing.

        Raises
        ------
        CausalProbeError
            If a file is damaged, or of a newer format.
        """
        keys = [cell.key for cell in self.cells if cell.key not in self.failed]
        return Store(self.folder).read(keys).to_pandas()

    def summary(self) -> pd.DataFrame:
        """One row for each cell: its options, how many rows it has, its metrics, and its error if it failed."""
        store = Store(self.folder)
        rows = []
        for cell in self.cells:
            row: dict[str, Any] = {"cell": cell.key, "probe": cell.probe, "seed": cell.seed, **cell.options}
            if cell.key in self.failed:
                row |= {"status": "failed", "error": self.failed[cell.key]}
            else:
                about = store.about(cell.key)
                row |= {"status": "finished", "rows": about["rows"], **about["metrics"]}
            rows.append({name: str(v) if isinstance(v, (list, dict)) else v for name, v in row.items()})
        return pd.DataFrame(rows)

    def merged(self) -> pd.DataFrame:
        """The scans of corpora, all shards of each put together: one row for each corpus, model, seed, head and template.

        Sums are added up, not means averaged; so scores, standard errors and all else are those of one pass over the whole, to
        rounding. (Bootstrap intervals take every sequence: :func:`~causal_probe.experiments.merge_scans`.)

        Raises
        ------
        CausalProbeError
            If there are no scans of corpora, or a shard is missing or failed.
        """
        return merge_shards(self.cells, self.failed, self.to_pandas())

    def dynamics(self, template: str, *, value: str = "excess", models: str | None = None) -> Dynamics:
        """Each head's score against training step, and its change-point: the scans of checkpoints of one training run.

        Where there are several seeds, their mean. For the definition of a change-point and its interval see
        :mod:`causal_probe.mechanisms.dynamics`. The series are named ``"L0H0"``, ...

        Parameters
        ----------
        template
            Such as ``"induction"``.
        value
            ``"excess"``, ``"score"`` or ``"sink"``.
        models
            Where the sweep holds several runs: what the names of this run's models begin with.

        Raises
        ------
        CausalProbeError
            If there are fewer than four checkpoints whose step is known, a score is undefined, or two checkpoints have the
            same step.
        """
        table = self.to_pandas()
        table = table[(table["probe"] == "scan") & (table["template"] == template) & table["step"].notna()]
        if models is not None:
            table = table[table["model"].str.startswith(models)]
        checkpoints = table[["model", "revision", "step"]].drop_duplicates()
        if checkpoints["step"].duplicated().any():
            twice = checkpoints[checkpoints["step"].duplicated(keep=False)]
            raise CausalProbeError(
                f"Several checkpoints have the same step ({', '.join(twice['model'].astype(str).unique()[:4])}): say which run by "
                "models=..., what the names of its models begin with."
            )
        if len(checkpoints) < 4:
            raise CausalProbeError(
                f"A change-point needs scans of {template!r} at four checkpoints or more, each with its training step; there are "
                f"{len(checkpoints)}. The step is the number at the end of a checkpoint's name, or the option step."
            )
        series = table.pivot_table(index="step", columns=["layer", "head"], values=value, aggfunc="mean", dropna=False)
        if series.isna().any().any():
            raise CausalProbeError(
                f"The {value} of {template!r} is undefined at some checkpoint, or a head is missing there."
            )
        values = {f"L{int(layer)}H{int(head)}": its.to_numpy() for (layer, head), its in series.items()}
        return dynamics([int(step) for step in series.index], values)

    @property
    def works(self) -> tuple[str, ...]:
        """The works that the probes rest on."""
        return tuple(dict.fromkeys(WORKS[cell.probe] for cell in self.cells if cell.probe in WORKS))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        probes = dict.fromkeys(cell.probe for cell in self.cells)
        return (
            f"{len(self.cells)} runs ({', '.join(probes)}), of which {len(self.failed)} failed, were each seeded by a hash of its settings and "
            f"done with a fixed number of threads ({self.measured_with})."
        )

    def table(self) -> Table:
        """The cells, those that failed first."""
        ordered = sorted(self.cells, key=lambda cell: cell.key not in self.failed)
        rows = [
            (cell.probe, str(dict(cell.options)), cell.seed, self.failed.get(cell.key, "finished")) for cell in ordered
        ]
        return Table(
            f"Sweep in {self.folder}: {self.finished} of {len(self.cells)} cells finished, {len(self.failed)} failed",
            ("probe", "options", "seed", "status"),
            rows,
            ("metrics: summary(); rows: to_pandas(); errors in full: failed/",),
        )
