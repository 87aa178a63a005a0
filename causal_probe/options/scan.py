"""Scanning a model for head types, and putting scans together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from causal_probe.arguments import Help
from causal_probe.errors import CausalProbeError
from causal_probe.options.base import Subject
from causal_probe.options.common import (
    MODEL,
    DeltaOption,
    LoadingOptions,
    ProgressOption,
    SavingOptions,
    SeedOption,
    SequenceOptions,
    ShardOption,
)

__all__ = ["MergeOptions", "ScanOptions"]


@dataclass(frozen=True, kw_only=True)
class TopOption(SavingOptions):
    """How much of a scan is shown."""

    top: Annotated[int, Help("How many heads of a type are listed at most.", least=1)] = 10


@dataclass(frozen=True, kw_only=True)
class TemplatesOption(SequenceOptions):
    """Which head types are asked for."""

    templates: Annotated[
        Sequence[Any] | Any,
        Help(
            "Head types: previous-token, duplicate-token, induction, induction-2gram, current-token, first-token, offset-3; graph:FILE or "
            "successor-of-parent:FILE for a known graph; FILE.py:NAME for your own function.",
            "Or templates.",
            none="all but those that need a number or a file",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ScanOptions(TemplatesOption, ShardOption, SeedOption, LoadingOptions, DeltaOption, TopOption, ProgressOption):
    """Options of :func:`causal_probe.experiments.scan`."""

    subject: ClassVar[Subject | None] = MODEL

    verify: Annotated[
        bool, Help("Ablate the heads that stand out, on repeated random tokens: does the model use them?")
    ] = False
    exhaustive: Annotated[
        bool,
        Help(
            "With verify, ablate every head and every random set, whether or not a verdict hangs on it: several times as long."
        ),
    ] = False
    attributions: Annotated[
        bool, Help("Take the scores of each type's best head apart: which earlier heads make it attend there?")
    ] = False

    def check(self) -> None:
        """``exhaustive`` goes with ``verify``."""
        super().check()
        if self.exhaustive and not self.verify:
            raise CausalProbeError("`exhaustive` says how heads are verified. Give `verify` as well, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(TopOption):
    """Options of :func:`causal_probe.experiments.merge_scans`."""

    subject: ClassVar[Subject | None] = Subject(
        "shards",
        "Folders that scans of a corpus' shards were written into.",
        "Or files of HeadScores.save.",
        several=True,
        path=True,
    )

    partial: Annotated[bool, Help("Go on if shards are missing; they are named in the result.")] = False
