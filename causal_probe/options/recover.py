"""Recovering a known graph: by training a model, from gradients of an untrained one, from tokens, and by asking a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, Literal

from causal_probe.arguments import Help
from causal_probe.errors import CausalProbeError
from causal_probe.options.base import Subject
from causal_probe.options.common import (
    GRAPH,
    MODEL,
    Bos,
    Concentration,
    DeltaOption,
    DeviceOption,
    DVocab,
    GraphName,
    LoadingOptions,
    NPositions,
    ProgressOption,
    RootProbability,
    SavingOptions,
    SeedOption,
)

__all__ = [
    "GradientOptions",
    "InContextOptions",
    "Optimizer",
    "PlanOptions",
    "RecoverOptions",
    "SequencesOptions",
    "TaskOptions",
    "TokensOptions",
    "Training",
]

Training = Literal["staged", "joint"]
Optimizer = Literal["sgd", "adamw"]

#: Of joint training, or of the second stage: what None stands for.
_STAGE = "Of joint training, or of the second stage: "


@dataclass(frozen=True)
class TaskOptions(SeedOption):
    """The in-context Markov task over a known graph."""

    graph: Annotated[GraphName, GRAPH] = "forest"
    _: KW_ONLY
    n_positions: NPositions = None
    d_vocab: DVocab = 3
    concentration: Concentration = 0.1
    root_probability: RootProbability = 0.5


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(DeviceOption):
    """How a model is trained."""

    heads: Annotated[Sequence[int], Help("Heads per layer, from the first to the last.", least=1)] = (1, 1)
    training: Annotated[
        Training,
        Help(
            "staged: the comparison in the last layer is given, the graph is learnt first, then the rest. joint: nothing given, all weights "
            "move together, from zero (from small noise where a layer has several heads)."
        ),
    ] = "staged"
    optimizer: Annotated[Optimizer | None, Help(f"{_STAGE}sgd or adamw.", none="sgd joint, adamw staged")] = None
    learning_rate: Annotated[
        float | None, Help(f"{_STAGE}its learning rate.", none="0.03 staged; joint: 1 sgd, 0.01 adamw", above=0)
    ] = None
    steps: Annotated[
        int | None, Help(f"{_STAGE}how many steps.", none="500 staged; joint: 384 sgd, 1024 adamw", least=0)
    ] = None
    batch_size: Annotated[
        int | None, Help(f"{_STAGE}sequences per step.", none="512 staged; joint: 4096 sgd, 1024 adamw", least=1)
    ] = None
    probe_sequences: Annotated[
        int | None,
        Help(
            "Fresh sequences on which each candidate edge is tested.",
            none="32,768, times T / 16 for longer sequences, because one edge among more weighs less",
            least=2,
        ),
    ] = None
    compiled: Annotated[
        bool,
        Help(
            "Compile the training step with torch.compile. It takes a C++ compiler and some seconds, and pays from some thousand steps, as with "
            "several parents; results are the same to rounding."
        ),
    ] = False


@dataclass(frozen=True)
class RecoverOptions(TaskOptions, TrainingOptions, SavingOptions, ProgressOption):
    """Options of :func:`causal_probe.experiments.recover`."""

    #: In Python also any :class:`causal_probe.tasks.Task`, which has its own graph and law.
    graph: Annotated[GraphName | Any, GRAPH] = "forest"


@dataclass(frozen=True)
class GradientOptions(TaskOptions, SavingOptions):
    """Options of :func:`causal_probe.experiments.recover_by_gradient`."""

    _: KW_ONLY
    n_sequences: Annotated[
        int | None,
        Help(
            "How many sequences the gradient is taken over.",
            none="32768; 131072 where nodes have several parents",
            least=2,
            most=10**9,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SequencesOptions(SeedOption, SavingOptions):
    """Options of :func:`causal_probe.experiments.graph_from_file`."""

    subject: ClassVar[Subject | None] = Subject(
        "data",
        "Token sequences of your own: a .npy, .csv or .parquet file of whole numbers [sequence, column], columns in causal order. Every column is a node; "
        "its verdict is an edge, a root, undecided or not identifiable.",
        path=True,
    )

    level: Annotated[
        float, Help("Probability of any wrong claim about the sequences' graph.", least=1e-4, most=0.5)
    ] = 0.05
    max_lag: Annotated[
        int | None,
        Help(
            "The file holds one stream (or streams of one length) without fixed positions: which lags up to this matter in context?",
            none="columns are fixed positions",
            least=1,
            most=64,
        ),
    ] = None
    max_memory: Annotated[int, Help("Most memory to take, in MiB.", least=1)] = 2048
    train: Annotated[
        bool,
        Help("Train the disentangled transformer on the same sequences, and show where it attends beside the graph."),
    ] = False
    beside: Annotated[
        str | None,
        Help(
            "A model of your own to put beside the graph, by folder or name: where do its heads attend on these tokens?",
            none="no model",
        ),
    ] = None

    def check(self) -> None:
        """Lags have no columns to put a model beside."""
        if self.max_lag is not None and (self.train or self.beside is not None):
            raise CausalProbeError(
                "`max_lag` asks for lags, and `train` and `beside` are about columns. Leave one out."
            )


Prior = Literal["iid", "diagonal", "asymmetric"]


@dataclass(frozen=True, kw_only=True)
class PlanOptions(SeedOption):
    """Options of :func:`causal_probe.experiments.plan_sequences`."""

    n_positions: Annotated[Sequence[int], Help("Numbers of columns, T.", least=3, most=128)] = (10, 20)
    d_vocab: Annotated[Sequence[int], Help("Numbers of states S.", least=2, most=64)] = (3,)
    concentration: Annotated[Sequence[float], Help("Dirichlet concentrations of a matrix's entries.", above=0)] = (
        0.1,
        1.0,
    )
    prior: Annotated[
        Sequence[Prior],
        Help(
            "Laws of the matrices: iid rows; diagonal, with four times the concentration there; asymmetric, each state half as frequent as the one before."
        ),
    ] = ("iid",)
    n_sequences: Annotated[Sequence[int], Help("Numbers of sequences N.", least=2, most=100_000)] = (250, 1000, 4000)
    forests: Annotated[int, Help("Random forests for each line of the table.", least=1, most=1000)] = 4
    root_probability: RootProbability = 0.3
    level: Annotated[float, Help("Probability of any wrong claim.", least=1e-4, most=0.5)] = 0.05


@dataclass(frozen=True, kw_only=True)
class TokensOptions(SavingOptions):
    """Options of :func:`causal_probe.experiments.recover_from_tokens`."""

    subject: ClassVar[Subject | None] = Subject(
        "data",
        "With --method gradient: a .npy file of whole numbers [sequence, T + 1], the last token being the successor of the one before it. Each position's "
        "candidate parent is found by gradient; whether it has one is not tested.",
        path=True,
    )

    d_vocab: Annotated[int | None, Help("Number of states.", none="the largest token plus one", least=2)] = None


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(SeedOption, LoadingOptions):
    """How a model is asked to read a graph in its context."""

    n_positions: Annotated[
        int | None,
        Help(
            "Tokens that the model sees, T.",
            none="those of a file's graph, else 64 or what the context holds",
            least=2,
            most=2**14,
        ),
    ] = None
    root_probability: RootProbability = 0.5
    states: Annotated[int, Help("Number of states, each a word of the model's vocabulary.", least=2)] = 8
    concentration: Concentration = 0.1
    n_sequences: Annotated[int, Help("How many sequences of each graph.", least=2, most=10**9)] = 64
    bos: Bos = "auto"


@dataclass(frozen=True)
class InContextOptions(ReadingOptions, DeltaOption, SavingOptions, ProgressOption):
    """Options of :func:`causal_probe.experiments.in_context_graph`."""

    subject: ClassVar[Subject | None] = MODEL

    graph: Annotated[GraphName, GRAPH] = "forest"
    _: KW_ONLY
    words: Annotated[Sequence[str] | None, Help("A word for each state.", none="every sequence draws its own")] = None
    verify: Annotated[
        bool,
        Help(
            "Ablate the heads that see the graph (an excess surely above 0.25): does the loss rise? Some hundred forward passes."
        ),
    ] = True
