"""Which causal structures can a model read in its context? Several models, several graphs, one table."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from tqdm.auto import tqdm

from causal_probe.errors import CausalProbeError
from causal_probe.experiments.in_context_graph import InContextGraph, how_it_was_read, in_context_graph
from causal_probe.experiments.opening import is_named, open_model
from causal_probe.experiments.saving import kept
from causal_probe.graphs.choice import choose_graph
from causal_probe.hooks import to_hooked
from causal_probe.hooks.check import describe
from causal_probe.options import takes
from causal_probe.options.base import GIVEN
from causal_probe.options.recover import InContextOptions
from causal_probe.options.studies import LeaderboardOptions
from causal_probe.results import Result, Table, merge_provenance

__all__ = ["GRAPHS", "Leaderboard", "leaderboard"]

#: The default graphs.
GRAPHS = ("chain", "pairs", "lag-2", "lag-3")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Leaderboard(Result):
    """The result of :func:`leaderboard`: a reading for each model and graph, in that order.

    Attributes
    ----------
    readings
        One :class:`~causal_probe.experiments.in_context_graph.InContextGraph` each.
    names
        The name of each reading's model: its own, or that of its folder; with a number where several are the same.
    """

    KIND = "leaderboard"
    WORKS = ("nichani2024",)
    RESULT: ClassVar[str] = "leaderboard.json"

    readings: tuple[InContextGraph, ...]
    names: tuple[str, ...]

    def to_pandas(self) -> pd.DataFrame:
        """One row for each model and graph: the best head, its excess, the losses, gain and skill, and the verdict."""
        return pd.DataFrame(self._rows())

    def by_graph(self, value: str = "skill") -> pd.DataFrame:
        """One figure by model and graph.

        Parameters
        ----------
        value
            ``"excess"`` of the best head, ``"skill"`` of the answer, or any other column of :meth:`to_pandas` that holds numbers.

        Raises
        ------
        CausalProbeError
            If there is no such column of numbers.
        """
        frame = self.to_pandas()
        known = [name for name in frame.columns if pd.api.types.is_numeric_dtype(frame[name])]
        if value not in known:
            raise CausalProbeError(f"There is no figure {value!r}; there are {', '.join(known)}.")
        order = {name: list(dict.fromkeys(frame[name])) for name in ("model", "graph")}
        return frame.pivot(index="model", columns="graph", values=value).loc[order["model"], order["graph"]]

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        models = "models" if GIVEN in self.settings["models"] else repr(self.settings["models"])
        return LeaderboardOptions.call("leaderboard", self.settings, models)

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        models = ", ".join(dict.fromkeys(self.names))
        said = how_it_was_read(models, f"each of the graphs {', '.join(self.settings['graphs'])}", self.settings)
        return f"{said} ({self.measured_with})."

    def table(self) -> Table:
        """:meth:`to_pandas` without the standard errors."""
        shown = self.to_pandas().drop(columns=["excess_stderr", "loss_stderr", "gain", "gain_stderr"]).astype(object)
        return Table(
            f"Leaderboard: {_number(len(set(self.names)), 'model')}, {_number(len(self.settings['graphs']), 'graph')}; losses in nats",
            tuple(shown.columns),
            shown.where(shown.notna(), None).to_numpy().tolist(),
        )

    def write_data(self, folder: Path) -> None:
        """Write ``leaderboard.csv`` beside the JSON."""
        self.save(folder / "leaderboard.csv")

    def _rows(self) -> Iterator[dict[str, Any]]:
        for each, name in zip(self.readings, self.names, strict=True):
            best = each.best
            yield {
                "model": name,
                "graph": each.settings["graph"],
                "best head": f"L{best.layer}H{best.head}",
                "excess": best.excess,
                "excess_stderr": best.excess_stderr,
                "heads": len(each.carriers),
                **{name: each.losses[name].value for name in ("uniform", "in-context unigram", "known-graph")},
                "loss": each.losses["model"].value,
                "loss_stderr": each.losses["model"].stderr,
                "gain": each.gain.value,
                "gain_stderr": each.gain.stderr,
                "skill": each.skill,
                "verdict": each.verdict,
            }


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


@takes(LeaderboardOptions)
def leaderboard(models: Sequence[Any], o: LeaderboardOptions) -> Leaderboard:
    """Ask several models to read several causal graphs in their context, each as :func:`in_context_graph` does.

    Models that are named are loaded one after the other.

    Raises
    ------
    CausalProbeError
        As :func:`in_context_graph`; or there is no model or no graph, or one is named twice.

    Examples
    --------
    >>> from causal_probe import graphs, models
    >>> model = models.hand_set(graphs.chain(11), 3, match_scale=12.0, output_scale=4.0)
    >>> leaderboard([model], ["chain"], states=3, n_sequences=4).by_graph("excess").columns.tolist()
    ['chain']
    """
    if not models:
        raise CausalProbeError("A leaderboard needs a model at least.")
    named = [os.fspath(model) if is_named(model) else None for model in models]
    if twice := next((name for name in named if name and named.count(name) > 1), None):
        raise CausalProbeError(f"The model {twice} was named twice. Name it once.")
    with warnings.catch_warnings():  # before a model is loaded; what is odd about a graph is said when it is used
        warnings.simplefilter("ignore")
        for graph in o.graphs:
            choose_graph(graph, n_positions=o.n_positions, root_probability=o.root_probability, seed=o.seed)
    settings = o.settings(models=[name or GIVEN for name in named])
    options = o.shared(InContextOptions, verify=False, out=None, progress=False)
    with kept(o, settings, Leaderboard) as saved:
        readings: list[InContextGraph] = []
        labels: list[str] = []
        with contextlib.ExitStack() as stack:
            bar: Any = None  # until there is a model to read in: an error stands alone
            for model in models:
                if is_named(model):
                    hooked, loaded = open_model(model, dtype=o.dtype, device=o.device)
                    # causal-probe recover writes its model into a folder of that name: the folder above says which
                    name = Path(model).resolve().parent.name if loaded.name == "model" else loaded.name
                else:
                    hooked = to_hooked(model)
                    name = str(describe(hooked)["model"])
                copies = sum(known == name or known.startswith(f"{name} (") for known in dict.fromkeys(labels))
                name = f"{name} ({copies + 1})" if copies else name
                if bar is None:
                    total = len(models) * len(o.graphs)
                    bar = stack.enter_context(tqdm(total=total, disable=not o.progress, desc="reading"))
                for graph in o.graphs:
                    labels.append(name)
                    readings.append(in_context_graph(hooked, graph, **options))
                    bar.update()
        measured = merge_provenance(*(each.provenance for each in readings))
        return saved(Leaderboard(tuple(readings), tuple(labels), settings=settings, provenance=measured))
