"""Asking one model all questions about structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from causal_probe.arguments import Help
from causal_probe.errors import CausalProbeError
from causal_probe.options.base import Subject
from causal_probe.options.common import MODEL, Bos, LoadingOptions, PathName, SavingOptions, SeedOption

__all__ = ["StructureOptions"]


@dataclass(frozen=True, kw_only=True)
class StructureOptions(SeedOption, LoadingOptions, SavingOptions):
    """Options of :func:`causal_probe.experiments.model_structure`."""

    subject: ClassVar[Subject | None] = MODEL

    conllu: Annotated[
        PathName | None,
        Help(
            "A treebank, FILE.conllu; its sentences serve all questions.", none="sentences of a small English grammar"
        ),
    ] = None
    n_sentences: Annotated[
        int, Help("How many sentences are read, or made: half choose heads, half report.", least=8, most=10**5)
    ] = 100
    n_sequences: Annotated[
        int,
        Help("How many stretches of these sentences are permuted, and their scores taken apart.", least=4, most=10**5),
    ] = 32
    length: Annotated[int, Help("Tokens of a stretch, besides what texts start with.", least=4, most=512)] = 12
    n_components: Annotated[
        int, Help("Components of the scores; at most half of the stretches, less one.", least=1, most=64)
    ] = 8
    bos: Bos = "auto"

    def check(self) -> None:
        """Stretches enough for the components."""
        if self.n_sequences < 2 * self.n_components + 2:
            raise CausalProbeError(
                f"`n_sequences` is {self.n_sequences}, and `n_components` is {self.n_components}: half of the stretches hold more than that many. Give {2 * self.n_components + 2} or more."
            )
