"""Confidence intervals of head scores by resampling sequences."""

from __future__ import annotations

from typing import Any

import numpy as np

from causal_probe.errors import CausalProbeError
from causal_probe.probes.head_scores import HeadScores
from causal_probe.results.lazy import pandas as pd

__all__ = ["bootstrap_intervals"]

#: So many numbers of a resample's weights are held at once (32 MiB).
HELD = 2**22
LIMITS = ("score_low", "score_high", "excess_low", "excess_high")


def bootstrap_intervals(
    scores: HeadScores, *, resamples: int = 2000, coverage: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Percentile intervals of each head's score and excess: the bootstrap over sequences (Efron, Annals of Statistics 7, 1979).

    A resample draws as many of the scored sequences as there are, with replacement, the same for all heads; its score is the mean over
    them, its excess (score - chance) / (1 - chance) with its own chance. The interval is between the (1 - coverage) / 2 and
    (1 + coverage) / 2 quantiles of the resamples. Sequences count as independent: those of one document are less so, and the true
    interval is then wider.

    Returns
    -------
    pandas.DataFrame
        One row for each head and template: ``layer``, ``head``, ``template``, ``score``, ``score_low``, ``score_high``, ``excess``,
        ``excess_low``, ``excess_high``, ``n_sequences``. Missing where fewer than two sequences have a scored row.

    Raises
    ------
    CausalProbeError
        If there are fewer than 100 resamples, or the coverage is not between 0 and 1.

    Examples
    --------
    >>> from causal_probe import probes
    >>> from causal_probe.models import DisentangledTransformer
    >>> scores = probes.scan(DisentangledTransformer(d_vocab=12, n_positions=24), templates="induction", n_sequences=4)
    >>> bootstrap_intervals(scores, resamples=100).columns.tolist()
    ['layer', 'head', 'template', 'score', 'score_low', 'score_high', 'excess', 'excess_low', 'excess_high', 'n_sequences']
    """
    if resamples < 100 or not 0 < coverage < 1:
        raise CausalProbeError(
            f"Intervals need 100 resamples or more and a coverage between 0 and 1; there are {resamples} and {coverage:g}."
        )
    ends = [(1 - coverage) / 2, (1 + coverage) / 2]
    rows: list[dict[str, Any]] = []
    for name in scores.names:
        sums = scores.sums[name]
        layers_of: dict[bytes, list[int]] = {}  # layers that score the same sequences are resampled together
        for layer in range(len(sums.attention)):
            layers_of.setdefault((sums.of_layer(layer)[0] > 0).tobytes(), []).append(layer)
        for layers in layers_of.values():
            heads = [one._asdict() for one in scores if one.template == name and one.layer in layers]
            used = sums.of_layer(layers[0])[0] > 0
            if (n := int(used.sum())) < 2:
                rows += heads
                continue
            # [sequence, head]: all layers side by side, and behind them their chances
            by_layer = [
                (sums.attention[layer][used], *(its[used, None] for its in sums.of_layer(layer))) for layer in layers
            ]
            chances = [chance / its for _, its, chance in by_layer]
            differ = any(not np.array_equal(chance, chances[0]) for chance in chances)
            each = [attention / its for attention, its, _ in by_layer]
            values = np.concatenate([*each, *(chances if differ else chances[:1])], axis=1)
            values = values[
                np.lexsort(values.T)
            ]  # the order of the sequences, or how shards were merged, decides nothing
            source = np.random.default_rng(seed)
            drawn = []
            for start in range(0, resamples, step := max(1, HELD // n)):
                counts = source.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
                drawn.append(counts @ values / n)
            means = np.concatenate(drawn)
            score = means[:, : len(heads)]
            of_head = np.repeat(
                np.arange(len(layers)) if differ else np.zeros(len(layers), int), [one.shape[1] for one in each]
            )
            chance = means[:, len(heads) :][:, of_head]
            limits = np.quantile(
                np.stack([score, (score - chance) / (1 - chance)]), ends, axis=1
            )  # [end, score or excess, head]
            for one, low_high in zip(heads, limits.transpose(2, 1, 0).reshape(-1, 4).tolist(), strict=True):
                rows.append(one | dict(zip(LIMITS, low_high, strict=True)))
    columns = ["layer", "head", "template", "score", *LIMITS[:2], "excess", *LIMITS[2:], "n_sequences"]
    table = pd.DataFrame(rows).reindex(columns=columns)
    return table.sort_values(["layer", "head"], kind="stable", ignore_index=True)
