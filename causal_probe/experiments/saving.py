"""A study's folder: its report, its JSON, and whatever else belongs to it, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from causal_probe.results import claim, write_json
from causal_probe.viz import Report

__all__ = ["REPORT", "save_study"]

REPORT = "report.html"


@runtime_checkable
class Study(Protocol):
    """What a result must tell of itself to be saved."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it depends on."""

    def to_dict(self) -> dict[str, Any]:
        """Its content, in plain JSON types."""

    def report(self) -> Report:
        """Its report."""


@contextmanager
def save_study(
    study: Study,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool,
    result: str = "result.json",
    unfinished: str | None = None,
) -> Iterator[Path]:
    """Yield the staging folder of :meth:`~causal_probe.results.Claim.stage` for the study's own files (parameters and errors as there).

    When the block ends, the JSON ``result`` and the report are written beside them.
    """
    with (
        claim(folder, settings=study.settings, overwrite=overwrite, result=result, unfinished=unfinished) as claimed,
        claimed.stage(page=lambda staging: study.report().write(staging / REPORT)) as staging,
    ):
        yield staging
        write_json(staging / result, study.to_dict())
