"""Scans of the shards of a corpus, made by several processes, as the scan of the whole."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from causal_probe.errors import CausalProbeError
from causal_probe.experiments.scan import RESULT, SCORES, ModelScan
from causal_probe.hooks import missing_shards
from causal_probe.probes import HeadScores, bootstrap_intervals
from causal_probe.results import check_results_folder

__all__ = ["merge_scans"]


def merge_scans(
    saved: Sequence[str | os.PathLike[str]],
    *,
    partial: bool = False,
    top: int = 10,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ModelScan:
    """Put the scans of a corpus' shards together: the sums of each sequence stand side by side, so it is the scan of the whole.

    What takes the model (graphs, patterns, verdicts) is not there.

    Parameters
    ----------
    saved
        Folders that :func:`~causal_probe.experiments.scan` has written of a corpus, or files of
        :meth:`~causal_probe.probes.HeadScores.save`.
    partial
        Take it that some of the shards are missing; they are named in the result.
    top
        How many heads of a template the tables show at most.
    out, overwrite
        Write the result into this folder (see :meth:`ModelScan.save`).

    Raises
    ------
    CausalProbeError
        If a file is missing or damaged, the scans don't belong together (:meth:`~causal_probe.probes.HeadScores.merge`), a shard is
        there twice or, without ``partial``, missing.
    """
    started = time.perf_counter()
    if not saved:
        raise CausalProbeError("There is nothing to merge. Name the folders of two scans or more.")
    if top < 1:
        raise CausalProbeError(f"One head of each template, or more, can be shown; top is {top}.")
    files = [Path(each) / SCORES if os.path.isdir(each) else Path(each) for each in saved]
    if absent := [os.fspath(each) for each, file in zip(saved, files, strict=True) if not file.is_file()]:
        raise CausalProbeError(
            f"No scan was saved in {', '.join(absent)}. Name folders that causal-probe scan --out has written."
        )
    first, *others = [HeadScores.load(file) for file in files]
    scores = first.merge(*others)
    readings = scores.settings["tokens"]
    if strangers := sorted({str(reading["kind"]) for reading in readings} - {"corpus"}):
        raise CausalProbeError(
            f"Scans of a corpus can be merged; these are of sequences that are {', '.join(strangers)}."
        )
    missing = [shard for reading in readings for shard in missing_shards(reading)]
    if missing and not partial:
        raise CausalProbeError(
            f"Of the corpus, {len(missing)} of its shards are missing: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. Scan "
            "them, or say that a part is enough (--partial)."
        )
    reading = readings[0]
    settings = {
        "model": scores.provenance["model"],
        "source": "merged",
        "merged": [os.fspath(each) for each in saved],
        "templates": list(scores.names),
        "bos": reading["bos"],
        "seed": 0,
        "verify": False,
        "blocks": False,
        "top": top,
        "corpus": reading["source"],
        **{name: reading[name] for name in ("length", "separator", "field")},
    }
    if out is not None:
        check_results_folder(out, settings=settings, overwrite=overwrite, result=RESULT)
    found = ModelScan(
        scores=scores,
        verification=None,
        leading=(),
        examples=(),
        graphs=(),
        circuits=(),
        no_circuits=None,
        intervals=bootstrap_intervals(scores),
        settings=settings,
        timings={"total": time.perf_counter() - started},
    )
    if out is not None:
        found.save(out, overwrite=overwrite)
    return found
