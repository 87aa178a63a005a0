"""How fast causal discovery is, beside causal-learn and, where ``CAUSALITY_LAB`` names a clone of it, the authors' code.

``CAUSALITY_LAB=../causality-lab make bench ARGS="-k discovery -s"`` prints the ratios and the number of tests by order; all are
measured in the same run, on the same random softmax attention (sigma 2), at alpha 0.01 and 768 samples.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from causal_probe.discovery import FisherZ, icd, ordered_icd, pc
from causal_probe.discovery.fci import data_with_correlation
from causal_probe.probes.attention_correlation import attention_correlation

LEARNERS: dict[str, Any] = {"pc": pc, "icd": icd, "ordered-icd": ordered_icd}
SAMPLES = 768


def correlation(n: int) -> np.ndarray:
    weights = np.exp(np.random.default_rng(n).normal(size=(n, n)) * 2)
    return attention_correlation(weights / weights.sum(axis=1, keepdims=True)).matrix


def independence_test(matrix: np.ndarray) -> FisherZ:
    """As :func:`causal_probe.probes.discover_from_attention` makes it: no learner asks twice."""
    return FisherZ(matrix, samples=SAMPLES, remember=False)


def seconds(run: Callable[[], Any]) -> float:
    """CPU time: other work on the machine plays no part."""
    started = time.process_time()
    run()
    return time.process_time() - started


@pytest.mark.parametrize("n", [20, 40, 64, 128])
@pytest.mark.parametrize("name", LEARNERS)
def test_discovery(benchmark: Any, name: str, n: int) -> None:
    matrix = correlation(n)
    learned = benchmark.pedantic(lambda: LEARNERS[name](independence_test(matrix)), rounds=3 if n < 100 else 1)
    print(f"\n{name}, {n} tokens: tests by order", {count.order: count.tests for count in learned.by_order})


@pytest.mark.parametrize("n", [20, 40, 64])
def test_discovery_beside_others(n: int) -> None:
    matrix = correlation(n)
    ours = {
        name: min(seconds(lambda f=f: f(independence_test(matrix))) for _ in range(3 if n < 64 else 1))
        for name, f in LEARNERS.items()
    }  # type: ignore[misc]
    pytest.importorskip("causallearn")
    from causallearn.search.ConstraintBased.PC import pc as causal_learn_pc

    data = data_with_correlation(matrix, SAMPLES)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = seconds(lambda: causal_learn_pc(data, 0.01, "fisherz", show_progress=False))
    print(f"\n{n} tokens: PC {ours['pc']:.2f} s, causal-learn {theirs:.2f} s: {theirs / ours['pc']:.1f} times")
    clone = os.environ.get("CAUSALITY_LAB")
    if clone is None:
        return
    sys.path.insert(0, clone)
    from causal_discovery_algs.icd import LearnStructICD
    from causal_discovery_algs.pc import LearnStructPC
    from causal_discovery_utils.cond_indep_tests import CondIndepParCorr

    for name, learner in (("pc", LearnStructPC), ("icd", LearnStructICD)):
        test = CondIndepParCorr(
            threshold=0.01, dataset=None, num_records=SAMPLES, num_vars=n, count_tests=True, use_cache=True
        )
        test.correlation_matrix = matrix
        theirs = seconds(learner(set(range(n)), test).learn_structure)
        counts = {order: count for order, count in enumerate(test.test_counter) if count}
        print(
            f"  {name}: {ours[name]:.2f} s, the authors' {theirs:.2f} s: {theirs / ours[name]:.1f} times; their tests {counts}"
        )
