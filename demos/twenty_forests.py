"""The paper's Figure 9 setting, twenty times: is every edge and every root of a random forest recovered?

Run ``python demos/twenty_forests.py`` (staged training, the default) or ``python demos/twenty_forests.py joint`` (plain SGD
from zero weights, nothing given). ``make reproduce`` runs both. One line per forest, then the means. Two numbers choose other
seeds: ``python demos/twenty_forests.py staged 20 50`` is seeds 20 to 49.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its idle threads must not spin

import numpy as np

from causal_probe import experiments


def main(training: str = "staged", first: str = "0", end: str = "20") -> None:
    """Recover the forests of seeds first to end - 1 (S = 3, T = 20, alpha = 0.1) and print what was found."""
    print(
        f"{training} training   seed  edges  SHD  attention  leading parents  all lead at step  loss    known graph  seconds"
    )
    found = []
    for seed in range(int(first), int(end)):
        result = experiments.recover("forest", seed=seed, training=training)
        found.append(result)
        edges = sum(result.truth.in_degree(child) for child in result.comparison.children)
        print(
            f"{seed:>22}  {edges:>5}  {result.comparison.shd:>3}  {result.mean_parent_attention:>9.4f}  "
            f"{result.argmax_parent_accuracy:>15.4f}  {result.steps_to_all_parents!s:>16}  {result.loss:.4f}  "
            f"{result.reference_losses['known-graph']:>11.4f}  {result.timings['total']:>7.1f}",
            flush=True,
        )
    attention = np.array([result.mean_parent_attention for result in found])
    spread = f"{attention.std(ddof=1):.4f}" if len(attention) > 1 else "undefined: one graph"
    print(
        f"exact on {sum(result.exact for result in found)} of {len(found)}; mean attention on the true parent "
        f"{attention.mean():.4f} (standard deviation over graphs {spread}); "
        f"{found[0].history.n_sequences:,} training sequences each"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
