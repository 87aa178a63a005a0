"""Options that several studies share: each told once, with the default that all have, or as a type for those that differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from causal_probe.arguments import Help
from causal_probe.errors import CausalProbeError
from causal_probe.options.base import Options, Subject

if TYPE_CHECKING:
    import networkx as nx

__all__ = [
    "Bos",
    "Concentration",
    "CorpusOptions",
    "DVocab",
    "DeltaOption",
    "GraphName",
    "LoadingOptions",
    "MODEL",
    "NPositions",
    "PathName",
    "ProgressOption",
    "RootProbability",
    "PageOption",
    "SavingOptions",
    "SeedOption",
    "SequenceOptions",
    "ShardOption",
]

MODEL = Subject(
    "model",
    "A folder of a saved DisentangledTransformer or a Hugging Face model, a GGUF file, or a name on the hub.",
    "Or a model: hooked, or a Hugging Face one; it stays as and where it is.",
)

if TYPE_CHECKING:
    GraphName: TypeAlias = str | os.PathLike[str] | nx.DiGraph
else:  # networkx takes longer to import than --help may
    GraphName = Any
PathName: TypeAlias = str | os.PathLike[str]

GRAPH = Help(
    "chain, pairs, lag-2 (any number), forest, two-parent, or a file in node-link JSON, GraphML or edge-list form.",
    "Or a graph.",
)
DEVICE = Help("auto (a GPU if there is one), cpu, cuda, ....", in_call=False)
Bos: TypeAlias = Annotated[
    Literal["auto", "yes", "no"], Help("Whether a BOS token comes first; auto: what the tokenizer does by itself.")
]
NPositions: TypeAlias = Annotated[
    int | None, Help("Tokens that the model sees, T.", none="those of a file's graph, else 20", least=2, most=2**14)
]
DVocab: TypeAlias = Annotated[int, Help("Number of states.", least=2)]
Concentration: TypeAlias = Annotated[float, Help("Dirichlet concentration of the transition rows.", above=0)]
RootProbability: TypeAlias = Annotated[
    float, Help("Probability that a node of a random forest is a root.", least=0, most=1)
]


@dataclass(frozen=True, kw_only=True)
class DeltaOption(Options):
    """The least effect that counts."""

    delta: Annotated[
        float,
        Help(
            "The smallest effect of a head that counts, in nats: verdicts tell effects from this, and 0.05 is a change of the perplexity by 5%.",
            above=0,
        ),
    ] = 0.05


@dataclass(frozen=True, kw_only=True)
class PageOption(Options):
    """Who writes the page: the studies know none."""

    page: Annotated[
        Callable[..., Any] | None,
        Help(
            "What writes the page into that folder, from the result: causal_probe.reports.write_page.",
            none="numbers and tables alone",
            setting=False,
            in_command=False,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SavingOptions(PageOption):
    """Where the result goes."""

    out: Annotated[
        PathName | None,
        Help(
            "Folder for the result and its report.html. Whether it can be written is checked before any work.",
            none="nothing is written",
            setting=False,
        ),
    ] = None
    overwrite: Annotated[bool, Help("Replace a result of other settings in that folder.", setting=False)] = False


@dataclass(frozen=True, kw_only=True)
class ProgressOption(Options):
    """Whether a bar is shown."""

    progress: Annotated[bool, Help("Show a progress bar on standard error.", setting=False, in_command=False)] = False


@dataclass(frozen=True, kw_only=True)
class SeedOption(Options):
    """One seed for all random numbers."""

    seed: Annotated[int, Help("Seed of all random numbers; each purpose has a stream of its own.", least=0)] = 0


@dataclass(frozen=True, kw_only=True)
class DeviceOption(Options):
    """Where it runs."""

    device: Annotated[str, DEVICE] = "auto"


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(DeviceOption):
    """How a model is loaded; one that is given stays as and where it is."""

    dtype: Annotated[str | None, Help("float64, float32, float16 or bfloat16.", none="float32, or as it was saved")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class CorpusOptions(Options):
    """Text to read instead of generated sequences."""

    corpus: Annotated[
        Any,
        Help(
            "Text instead of random tokens: a text file, .jsonl, .parquet, or a folder of them. Intervals by bootstrap.",
            "Or documents, as hooks.corpus takes them.",
            none="random tokens",
        ),
    ] = None
    length: Annotated[
        int | None, Help("Of the corpus: tokens in a sequence.", none="128, or what the model can take", least=1)
    ] = None
    separator: Annotated[
        str | None, Help("Of the corpus: the line between two documents of a text file.", none="a file is one document")
    ] = None
    field: Annotated[str, Help("Of the corpus: where a line of JSON, or a row, has its text.")] = "text"

    def strays(self) -> dict[str, Any]:
        """The options given for a corpus when there is no corpus."""
        known = self.described()
        of_it = {name: getattr(self, name) for name in ("length", "separator", "field", "shard") if name in known}
        return {name: value for name, value in of_it.items() if value not in (known[name].default, (0, 1))}


@dataclass(frozen=True, kw_only=True)
class SequenceOptions(CorpusOptions):
    """The sequences that a model is asked on: repeated random tokens, or a corpus."""

    n_sequences: Annotated[
        int | None, Help("How many sequences.", none="32, more where they are short", least=1, most=10**9)
    ] = None
    period: Annotated[
        int | None, Help("Tokens before they repeat.", none="50, or what the model can take", least=1)
    ] = None
    bos: Bos = "auto"
    batch_size: Annotated[int | None, Help("Sequences in a forward pass.", none="what 256 MiB hold", least=1)] = None

    def check(self) -> None:
        """A corpus, or sequences that are made."""
        if self.corpus is None and (strays := self.strays()):
            raise CausalProbeError(
                f"{_about(strays)} about a corpus, and none was given. Give `corpus`, or leave it out."
            )
        made = {name: getattr(self, name) for name in ("n_sequences", "period") if getattr(self, name) is not None}
        if self.corpus is not None and made:
            raise CausalProbeError(
                f"{_about(made)} about sequences that are made, and `corpus` was given. To read a part of it, give a shard: 0/10 is a tenth "
                "of its documents."
            )


def _about(values: dict[str, Any]) -> str:
    return f"{', '.join(f'`{name}`' for name in values)} {'is' if len(values) == 1 else 'are'}"


@dataclass(frozen=True, kw_only=True)
class ShardOption(Options):
    """A part of a corpus."""

    shard: Annotated[
        str | Sequence[int],
        Help("Of the corpus: i/n, every n-th document from i. merge_scans puts them together.", "Or (i, n)."),
    ] = "0/1"
