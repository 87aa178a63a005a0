"""Tests that make edges of evidence: what may be claimed of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from jaxtyping import Bool

from causal_probe.arguments import Count, Level, checked
from causal_probe.errors import CausalProbeError

__all__ = ["AboveZero"]


@checked
@dataclass(frozen=True)
class AboveZero:
    """A claim: the edge's value is above zero, by a one-sided z-test over sequences.

    Attributes
    ----------
    level
        Family-wise level, in (0, 1).
    n_tests
        Bonferroni's number of tests. By default all pairs parent < child of the nodes, in all heads of the layer.
    """

    level: Level = 1e-3
    n_tests: Count | None = None

    def __call__(self, evidence: Any, layer: int, head: int, nodes: Sequence[int]) -> Bool[np.ndarray, "child parent"]:
        """Which pairs pass."""
        z = evidence.z_values(layer, head)
        if z is None:
            raise CausalProbeError("One sequence has no standard error to test with. Give two or more, or a threshold.")
        n_tests = self.n_tests or evidence.heads[layer] * len(nodes) * (len(nodes) - 1) / 2
        return np.asarray(z > float(scipy.stats.norm.isf(self.level / n_tests)))
