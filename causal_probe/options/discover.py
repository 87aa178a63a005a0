"""Causal discovery from the attention to one text."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, ClassVar, Literal

from causal_probe.arguments import Help
from causal_probe.errors import CausalProbeError
from causal_probe.options.base import Subject
from causal_probe.options.common import LoadingOptions, SavingOptions

__all__ = ["DiscoverOptions"]


@dataclass(frozen=True)
class DiscoverOptions(LoadingOptions, SavingOptions):
    """Options of :func:`causal_probe.experiments.discover_in_text`."""

    subject: ClassVar[Subject | None] = Subject(
        "model",
        "A folder of a Hugging Face model (encoders and classifiers too), a GGUF file, or a name on the hub.",
        "Or a model.",
    )

    text: Annotated[str, Help("The text whose tokens are the nodes.")]
    _: KW_ONLY
    layer: Annotated[int, Help("Counted from 0; negative from the end.")] = -1
    head: Annotated[int | Literal["all", "mean"], Help("all, a number, or mean (the average of all heads).")] = "all"
    algorithm: Annotated[
        Literal["pc", "fci", "icd", "ordered-icd"] | None,
        Help("The learner.", none="ordered-icd where no token attends to a later one, else icd"),
    ] = None
    level: Annotated[float, Help("Level of the tests of independence.", above=0, below=1)] = 0.01
    samples: Annotated[
        int | Literal["auto"], Help("What the correlations count as; auto: the model's width.", least=4)
    ] = "auto"
    source: Annotated[
        Literal["attention", "values"], Help("Correlations from attention alone, or from the heads' outputs.")
    ] = "attention"
    residual: Annotated[
        float,
        Help(
            "Share of each token's own value that is counted beside attention; 0: the paper's reading.",
            least=0,
            below=1,
        ),
    ] = 0.0
    words: Annotated[bool, Help("Merge tokens into words.")] = False
    explain: Annotated[
        str | int | None,
        Help(
            "Explain the decision at this token: a text that occurs once among the nodes, or a node's number (negative from the end).",
            none="no decision is explained",
        ),
    ] = None
    max_size: Annotated[int, Help("The largest explaining set that is tried.", least=1)] = 3
    tokenizer: Annotated[
        Any, Help("Of a Hugging Face model that is given as an object.", setting=False, in_command=False)
    ] = None

    def check(self) -> None:
        """There must be words."""
        if not self.text.strip():
            raise CausalProbeError("The text is empty. Give some words.")
