"""FCI, from causal-learn: a second opinion on the PAG, by other people's code.

causal-learn takes data, not correlations. So it is given data whose sample correlation is ours to rounding: orthonormal columns
times a square root of the matrix.

References
----------
.. [1] P. Spirtes, C. Meek, T. Richardson. Causal inference in the presence of latent variables and selection bias. UAI 1995.
.. [2] Y. Zheng and others. Causal-learn: causal discovery in Python. JMLR 25, 2024.
"""

# causal-learn carries no types.
# mypy: allow-untyped-calls

from __future__ import annotations

import contextlib
import io
from itertools import combinations

import numpy as np
from jaxtyping import Float

from causal_probe.arguments import Natural, checked
from causal_probe.discovery.independence import FisherZ, OrderCount
from causal_probe.discovery.marks import ARROW, CIRCLE, TAIL, Marks
from causal_probe.discovery.search import Evidence, Learned
from causal_probe.errors import CausalProbeError

__all__ = ["data_with_correlation", "fci"]


def data_with_correlation(
    correlation: Float[np.ndarray, "n n"], samples: int, *, seed: int = 0
) -> Float[np.ndarray, "samples n"]:
    """Data whose sample correlation matrix is the given one, to rounding.

    Raises
    ------
    CausalProbeError
        If there are not more samples than variables.

    Examples
    --------
    >>> data = data_with_correlation(np.array([[1, 0.3], [0.3, 1]]), 10)
    >>> np.corrcoef(data, rowvar=False).round(12).tolist()
    [[1.0, 0.3], [0.3, 1.0]]
    """
    n = len(correlation)
    if samples <= n:
        raise CausalProbeError(
            f"Data of {n} variables with given correlations needs more than {n} samples, not {samples}."
        )
    noise = np.random.default_rng(seed).standard_normal((samples, n))
    columns, _ = np.linalg.qr(noise - noise.mean(axis=0))
    values, vectors = np.linalg.eigh(correlation)
    data: Float[np.ndarray, "samples n"] = columns @ (vectors * np.sqrt(np.maximum(values, 0))).T
    return data


@checked
def fci(test: FisherZ, *, max_order: Natural | None = None) -> Learned:
    """Learn a PAG by causal-learn's FCI with its own Fisher z-test, on data with the test's correlations.

    Its p-values are not kept, and its sepsets are not exposed: ``evidence`` holds the marginal test of each pair, ``separating``
    is empty. ``max_order`` is the size of the largest conditioning set, by default without a limit. On nearly singular matrices its plain inverse is noise or fails.

    Raises
    ------
    CausalProbeError
        If causal-learn is not installed, or can't work with the matrix.

    Examples
    --------
    >>> from causal_probe import graphs
    >>> test = FisherZ(np.array([[1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 1]]), samples=1000)
    >>> found = fci(test).marks.to_networkx()
    >>> [graphs.mixed.show_mixed_edge(found, *edge) for edge in graphs.mixed.mixed_edges(found)]
    ['0 o-> 2', '1 o-> 2']
    """
    try:
        from causallearn.search.ConstraintBased.FCI import fci as causal_learn_fci
    except ImportError as error:
        raise CausalProbeError("FCI comes from causal-learn: pip install 'causal-probe[discovery]'.") from error
    n = test.n
    marks = Marks(n)
    try:
        if n < 2:  # causal-learn can't work with one variable
            endpoints = np.zeros((n, n), dtype=int)
        else:
            data = data_with_correlation(test.correlation, test.samples)
            depth = -1 if max_order is None else max_order
            with contextlib.redirect_stdout(io.StringIO()):  # it prints edges whatever it is told
                found, _ = causal_learn_fci(
                    data, "fisherz", test.level, depth=depth, verbose=False, show_progress=False
                )
            endpoints = found.graph
    except (ValueError, np.linalg.LinAlgError) as error:
        raise CausalProbeError(
            f"causal-learn's FCI can't work with this correlation matrix: {error} Take algorithm='icd', which can."
        ) from error
    # causal-learn: graph[v, u] is the mark at v: -1 tail, 1 arrow, 2 circle.
    names = {-1: TAIL, 1: ARROW, 2: CIRCLE}
    pairs = list(combinations(range(n), 2))
    for u, v in pairs:
        if endpoints[u, v] == 0:
            marks.remove(u, v)
        else:
            marks.put(u, v, names[int(endpoints[v, u])])
            marks.put(v, u, names[int(endpoints[u, v])])
    x, y = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
    p_values = test.p_values(x, y, np.empty((len(pairs), 0), dtype=np.intp))
    evidence = {pair: Evidence(float(p), ()) for pair, p in zip(pairs, p_values, strict=True)}
    counts: tuple[OrderCount, ...] = ()
    return Learned(marks, {}, evidence, counts, None)
