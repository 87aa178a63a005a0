"""Studies of models and of kinds of evidence, with fewer options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, Literal

from causal_probe.arguments import Help
from causal_probe.errors import CausalProbeError
from causal_probe.options.base import Subject
from causal_probe.options.common import (
    MODEL,
    DVocab,
    LoadingOptions,
    PageOption,
    PathName,
    ProgressOption,
    SavingOptions,
    SeedOption,
)
from causal_probe.options.recover import ReadingOptions

__all__ = [
    "CheckOptions",
    "EvidenceOptions",
    "LeaderboardOptions",
    "MeasureOptions",
    "ReproduceOptions",
    "SentimentOptions",
    "SessionsOptions",
    "SweepOptions",
]


@dataclass(frozen=True, kw_only=True)
class CheckOptions(LoadingOptions):
    """Options of :func:`causal_probe.experiments.check_model`."""

    subject: ClassVar[Subject | None] = MODEL


@dataclass(frozen=True)
class LeaderboardOptions(ReadingOptions, SavingOptions, ProgressOption):
    """Options of :func:`causal_probe.experiments.leaderboard`."""

    subject: ClassVar[Subject | None] = Subject("models", f"Each: {MODEL.text}", MODEL.python, several=True)

    graphs: Annotated[
        Sequence[Any], Help("Graphs: chain, pairs, lag-2 (any number), forest, or files.", "Or graphs.")
    ] = ("chain", "pairs", "lag-2", "lag-3")

    def check(self) -> None:
        """A graph at least, and none twice."""
        _some("graph", self.graphs)


def _some(what: str, given: Sequence[Any]) -> None:
    if not given:
        raise CausalProbeError(f"`{what}s` is empty; it needs a {what} at least.")
    names = [str(each) for each in given]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CausalProbeError(f"The {what} {twice} was named twice in `{what}s`. Name it once.")


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(SeedOption):
    """Options of :func:`causal_probe.experiments.measure_evidence`, for one model on one task."""

    inputs: Annotated[
        int,
        Help(
            "On how many inputs, one at a time, the graph is discovered from attention; its figures are means over them.",
            least=1,
        ),
    ] = 16
    n_sequences: Annotated[
        int, Help("How many sequences the other kinds of evidence take their means over.", least=2, most=10**9)
    ] = 4096
    level: Annotated[float, Help("Level of the tests of independence of causal discovery.", above=0, below=1)] = 0.01


Model = Literal["trained", "copy parents", "step to children"]


@dataclass(frozen=True)
class EvidenceOptions(MeasureOptions, SavingOptions, ProgressOption):
    """Options of :func:`causal_probe.experiments.compare_evidence`."""

    graphs: Annotated[Sequence[str], Help("Families of graphs, or files, as in recover.")] = (
        "chain",
        "pairs",
        "forest",
        "two-parent",
    )
    _: KW_ONLY
    models: Annotated[
        Sequence[Model],
        Help(
            "trained: a disentangled transformer after staged training; copy parents and, on trees, step to children: set by hand."
        ),
    ] = ("trained", "copy parents", "step to children")
    n_positions: Annotated[int, Help("Tokens that a model sees, T.", least=2, most=2**14)] = 12
    d_vocab: DVocab = 4

    def check(self) -> None:
        """A graph and a model at least."""
        _some("graph", self.graphs)
        _some("model", self.models)


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(SeedOption):
    """Options that the studies of explanations share."""

    inputs: Annotated[int, Help("How many inputs are explained.", least=1)] = 200
    max_size: Annotated[int, Help("The largest set that is tried.", least=1)] = 3


@dataclass(frozen=True, kw_only=True)
class SentimentOptions(ExplainOptions):
    """Options of :func:`causal_probe.experiments.explain_sentiment`."""

    subject: ClassVar[Subject | None] = Subject(
        "encoder", "A folder with a BERT encoder in Hugging Face form.", path=True
    )


@dataclass(frozen=True, kw_only=True)
class SessionsOptions(ExplainOptions):
    """Options of :func:`causal_probe.experiments.explain_sessions`."""

    ratings: Annotated[
        PathName | None,
        Help(
            "A ratings file in MovieLens-100k's format (user, item, rating, time, between tabs): a session is a user's last items.",
            none="synthetic sessions of nine noise items and a cause, whose effect is the last item",
        ),
    ] = None
    steps: Annotated[int, Help("Training steps, of 128 sessions.", least=0)] = 600


@dataclass(frozen=True)
class ReproduceOptions(SeedOption, SavingOptions, ProgressOption):
    """Options of :func:`causal_probe.papers.reproduce`."""

    name: Annotated[str, Help("Which experiment: a name in REPRODUCTIONS.")]
    _: KW_ONLY
    quick: Annotated[bool, Help("A smaller one: less than five minutes on two CPU cores, and larger errors.")] = False


@dataclass(frozen=True, kw_only=True)
class SweepOptions(PageOption, ProgressOption):
    """Options of :func:`causal_probe.sweep`."""

    subject: ClassVar[Subject | None] = Subject(
        "spec",
        "A YAML file: probes (recover, gradient, scan, head_graphs), a grid of values by option or a list of cells, "
        "settings that all share, threads.",
        "Or a mapping.",
        path=True,
    )

    out: Annotated[
        PathName,
        Help(
            "Folder for cells/ (Parquet), failed/, summary.csv and report.html. What is finished there is not run again.",
            setting=False,
        ),
    ]
    jobs: Annotated[int, Help("Worker processes; with a scheduler the cluster decides.", least=1)] = 1
    backend: Annotated[Literal["loky", "dask"], Help("loky: processes on this machine. dask: a Dask cluster.")] = "loky"
    scheduler: Annotated[
        str | None,
        Help("Address of a running Dask scheduler, such as tcp://host:8786.", none="a cluster on this machine"),
    ] = None
    probes: Annotated[
        Any,
        Help(
            "Probes of your own by name: functions of keyword arguments, seed among them, that return an Outcome. A cell knows its probe by name: "
            "give a changed one another name.",
            none="the shipped ones alone",
            setting=False,
            in_command=False,
        ),
    ] = None

    def check(self) -> None:
        """A scheduler is Dask's."""
        if self.scheduler is not None and self.backend != "dask":
            raise CausalProbeError(
                f"`scheduler` is {self.scheduler!r}, and only Dask has one: say backend dask, or leave it out."
            )
