"""Scans of the shards of a corpus, made by several processes, as the scan of the whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from causal_probe.errors import CausalProbeError
from causal_probe.experiments.model_scan import SCORES, ModelScan
from causal_probe.experiments.saving import Clock, kept
from causal_probe.hooks.corpus import missing_shards
from causal_probe.options import takes
from causal_probe.options.scan import MergeOptions
from causal_probe.probes.bootstrap import bootstrap_intervals
from causal_probe.probes.head_scores import HeadScores

__all__ = ["merge_scans"]


@takes(MergeOptions)
def merge_scans(shards: Sequence[str | os.PathLike[str]], o: MergeOptions) -> ModelScan:
    """Put the scans of a corpus' shards together: the sums of each sequence stand side by side, so it is the scan of the whole.

    Parts that need the model (graphs, patterns, verdicts) are missing.

    Raises
    ------
    CausalProbeError
        If a file is missing or damaged, the scans don't belong together (:meth:`~causal_probe.probes.HeadScores.merge`), a shard is
        there twice or, without ``partial``, missing.
    """
    clock = Clock()
    if not shards:
        raise CausalProbeError("There is nothing to merge. Name the folders of two scans or more.")
    files = [Path(each) / SCORES if os.path.isdir(each) else Path(each) for each in shards]
    if absent := [os.fspath(each) for each, file in zip(shards, files, strict=True) if not os.path.isfile(file)]:
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
    if missing and not o.partial:
        raise CausalProbeError(
            f"Of the corpus, {len(missing)} of its shards are missing: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. Scan "
            "them, or say that a part is enough with `partial=True`."
        )
    reading = readings[0]
    settings = o.settings(
        model=scores.provenance["model"],
        source="merged",
        merged=[os.fspath(each) for each in shards],
        templates=list(scores.names),
        bos=reading["bos"],
        seed=0,
        verify=False,
        attributions=False,
        corpus=reading["source"],
        **{name: reading[name] for name in ("length", "separator", "field")},
    )
    with kept(o, settings, ModelScan) as saved:
        return saved(
            ModelScan(
                scores,
                intervals=bootstrap_intervals(scores),
                timings=clock.timings,
                settings=settings,
                provenance=scores.provenance,
            )
        )
