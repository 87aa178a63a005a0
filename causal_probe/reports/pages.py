"""One page for each kind of result: the function that every kind registers with."""

from __future__ import annotations

import functools
from typing import Any

from causal_probe.errors import CausalProbeError
from causal_probe.viz import Report

__all__ = ["report"]


@functools.singledispatch
def report(result: Any) -> Report:
    """The page on a result, to be shown in a notebook or written as one offline HTML file.

    Parameters
    ----------
    result
        What a study returned.

    Raises
    ------
    CausalProbeError
        If there is no page for results of this kind.

    Examples
    --------
    >>> from causal_probe import experiments
    >>> found = experiments.recover("chain", positions=5, steps=20, batch_size=64, probe_sequences=512)
    >>> report(found).title
    'Recovery of chain'
    """
    kinds = sorted(kind.__name__ for kind in report.registry if kind is not object)
    raise CausalProbeError(f"There is no page for a {type(result).__name__}. There are pages for {', '.join(kinds)}.")
