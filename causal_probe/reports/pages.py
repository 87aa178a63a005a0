"""One page for each kind of result: the function that every kind registers with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from causal_probe.errors import CausalProbeError
from causal_probe.viz import Report
from causal_probe.viz.report import Section

__all__ = ["made", "plus_minus", "report", "signed"]


@functools.singledispatch
def report(result: Any) -> Report:
    """The page on a result, to be shown in a notebook or written as one offline HTML file.

    Parameters
    ----------
    result
        The result of a study.

    Raises
    ------
    CausalProbeError
        If there is no page for results of this kind.

    Examples
    --------
    >>> from causal_probe import experiments
    >>> found = experiments.recover("chain", n_positions=5, steps=20, batch_size=64, probe_sequences=512)
    >>> report(found).title
    'A causal graph, recovered from a transformer'
    """
    kinds = sorted(kind.__name__ for kind in report.registry if kind is not object)
    raise CausalProbeError(f"There is no page for a {type(result).__name__}. There are pages for {', '.join(kinds)}.")


def made(result: Any, title: str, summary: str, sections: Sequence[Section], **instead: Any) -> Report:
    """A page with what every result says of itself at its end: settings, the versions that it was measured with, the call, the citation.

    ``instead`` replaces its settings or its call.
    """
    about = {"settings": result.settings, "call": instead.get("call") or result.call, **instead}
    return Report(
        title, sections, versions=result.provenance["versions"], summary=summary, citation=result.cite(), **about
    )


def signed(text: str) -> str:
    """With minus signs instead of hyphens, and in one line.

    >>> signed("-0.5 ± 0.1").split()
    ['−0.5', '±', '0.1']
    """
    return text.replace("-", "\N{MINUS SIGN}").replace(" ", "\N{NO-BREAK SPACE}")


def plus_minus(value: float | None, stderr: float | None, *, digits: int = 3, times: float = 1) -> str | None:
    """A value and its standard error, where it has one; None of no value.

    >>> plus_minus(0.0012, None, digits=1, times=1000)
    '1.2'
    """
    if value is None:
        return None
    spread = "" if stderr is None or stderr != stderr else f" ± {times * stderr:.{digits}f}"
    return signed(f"{times * value:.{digits}f}{spread}")
