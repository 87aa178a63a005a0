"""Scans of shards as the scan of the whole, from counts, means and (co)variances: sums over sequences are added up.

A row of a scan holds, over its n sequences, the means s of the scores and c of the chances, the variance of either mean, and their
covariance. So the sums over the sequences i of s_i, c_i and, about means A and B of the whole, of the products are known: where two means
a and b have the covariance v, the sum of (a_i - A)(b_i - B) is n (n - 1) v + n (a - A)(b - B). Sums are added up over the shards,
and the numbers of the whole follow. The excess is e = (s - c) / (1 - c), and its standard error that of s - c - e (1 - c), over 1 - c.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.corpus import missing_shards, read_shard
from causal_probe.probes.head_scores import CALLED, SURELY
from causal_probe.sweep.plan import Cell

__all__ = ["merge_shards"]

#: What may differ between shards, and what tells rows of a cell apart.
OF_A_CELL = ("cell", "shard", "options", "derived_seed", "inputs", "versions")
PLACE = ("layer", "head", "template")
MEASURED = (
    "score", "chance", "stderr", "chance_variance", "covariance", "excess", "excess_stderr", "sink", "nothing", "measured_rows", "n_sequences", "found",
)  # fmt: skip


def merge_shards(cells: Sequence[Cell], failed: Mapping[str, str], table: pd.DataFrame) -> pd.DataFrame:
    """See :meth:`Sweep.merged`.

    Parameters
    ----------
    cells, failed
        Of the sweep.
    table
        Its rows.
    """
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.probe == "scan" and cell.options.get("corpus") is not None:
            options = {name: value for name, value in cell.options.items() if name != "shard"}
            groups[Cell(cell.probe, cell.seed, options, cell.threads, cell.inputs).key].append(cell)
    if not groups:
        raise CausalProbeError("This sweep holds no scan of a corpus, so there are no shards to merge.")
    found = [_merged(its, failed, table[table["cell"].isin([cell.key for cell in its])]) for its in groups.values()]
    return pd.concat(found, ignore_index=True)


def _merged(cells: Sequence[Cell], failed: Mapping[str, str], table: pd.DataFrame) -> pd.DataFrame:
    corpus = str(cells[0].options["corpus"])
    shards = [read_shard(cell.options.get("shard", "0/1")) for cell in cells if cell.key not in failed]
    missing = missing_shards({"source": corpus, "shards": shards}) if shards else ("all",)
    if missing:
        raise CausalProbeError(
            f"Of {corpus}, the shards {', '.join(missing[:8])} failed or are not in the sweep, so what is there is not the whole."
        )
    documents = sum(1 / n for _, n in shards)
    if documents > 1 + 1e-9:
        raise CausalProbeError(f"Of {corpus}, shards of the sweep share documents, which would count twice.")
    rest = [name for name in table.columns if name not in (*OF_A_CELL, *PLACE, *MEASURED)]
    rows = [
        {**its.iloc[0][rest].to_dict(), **dict(zip(PLACE, place, strict=True)), **_pooled(its)}
        for place, its in table.groupby(list(PLACE), sort=False)
    ]
    ordered = [name for name in table.columns if name not in OF_A_CELL]
    return pd.DataFrame(rows, columns=["shards", *ordered]).assign(shards=len(cells))


def _pooled(rows: pd.DataFrame) -> dict[str, Any]:
    """The measured columns of the whole, from those of its shards for one head and template."""
    counts = {"measured_rows": int(rows["measured_rows"].sum()), "n_sequences": int(rows["n_sequences"].sum())}
    rows = rows[rows["n_sequences"] > 0]
    n, total = rows["n_sequences"].to_numpy(float), counts["n_sequences"]
    if not total:
        return {**dict.fromkeys(MEASURED), **counts, "found": False}
    s, c, sink, nothing = (rows[name].to_numpy(float) for name in ("score", "chance", "sink", "nothing"))
    score, chance = float(n @ s / total), float(n @ c / total)
    excess = (score - chance) / (1 - chance)
    pooled: dict[str, Any] = {
        "score": score,
        "chance": chance,
        "excess": excess,
        "sink": float(n @ sink / total),
        "nothing": float(n @ nothing / total),
    }
    pooled |= {**dict.fromkeys(("stderr", "chance_variance", "covariance", "excess_stderr")), "found": False}
    if total > 1:
        within = {
            "score": (rows["stderr"] ** 2, s - score, s - score),
            "chance_variance": (rows["chance_variance"], c - chance, c - chance),
            "covariance": (rows["covariance"], s - score, c - chance),
        }
        v = {
            name: float((n * (n - 1) * its.fillna(0).to_numpy(float) + n * a * b).sum() / (total * (total - 1)))
            for name, (its, a, b) in within.items()
        }
        # s - c - e (1 - c) = s - (1 - e) c - e
        residual = v["score"] - 2 * (1 - excess) * v["covariance"] + (1 - excess) ** 2 * v["chance_variance"]
        pooled["stderr"] = float(np.sqrt(max(v["score"], 0)))
        pooled["excess_stderr"] = float(np.sqrt(max(residual, 0)) / (1 - chance))
        pooled |= {"chance_variance": v["chance_variance"], "covariance": v["covariance"]}
        pooled["found"] = bool(excess - SURELY * pooled["excess_stderr"] > CALLED)
    return {**pooled, **counts}
