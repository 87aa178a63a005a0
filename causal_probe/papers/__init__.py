"""The figures of the papers whose mechanisms are known here, done again: our numbers beside theirs.

``papers.reproduce(name)`` and ``causal-probe reproduce NAME`` do one. To add one: a function ``(run: Run) -> Reproduction`` that does all that
takes long in ``run.part(...)`` and little of it if ``run.quick``, under ``@reproduction(name, about, minutes=...)``, in a module of this folder
that is imported below.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from causal_probe.arguments import near
from causal_probe.errors import CausalProbeError
from causal_probe.options import takes
from causal_probe.options.studies import ReproduceOptions
from causal_probe.papers import (  # noqa: F401 - each enters its own
    binding,
    circuits,
    copying,
    descent,
    evidence,
    forests,
    mesa,
    out_of_distribution,
    phases,
    residual,
    selective,
    sequences_needed,
    standard,
    trees,
    two_parents,
    waves,
)
from causal_probe.papers.base import REGISTERED, Reproduction, Run, Study
from causal_probe.results import hold

__all__ = ["REPRODUCTIONS", "reproduce"]

#: Every reproduction by its name, with its subject and its expected minutes.
REPRODUCTIONS: Mapping[str, Study] = dict(sorted(REGISTERED.items()))


def list_reproductions() -> str:
    """Every name with its subject and its expected minutes on one CPU core, quick and whole.

    >>> print(list_reproductions().splitlines()[1])
    copy                     With separate tokens, the first softmax layer copies neighbours (1 and 3 minutes)
    """
    return "\n".join(
        f"{name:<24} {its.about} ({its.minutes[0]:g} and {its.minutes[1]:g} minutes)"
        for name, its in REPRODUCTIONS.items()
    )


def __dir__() -> list[str]:
    return [*__all__]


@takes(ReproduceOptions)
def reproduce(o: ReproduceOptions) -> Reproduction:
    """Do a paper's experiment again.

    Parts that an interrupted run of the same name and settings has finished in the folder ``out`` are not done again. Where the experiment
    has several seeds, ``seed`` is the first.

    Raises
    ------
    CausalProbeError
        If there is no such reproduction, or ``out`` can't be written or holds something else.
    """
    if o.name not in REPRODUCTIONS:
        guess = near(o.name, REPRODUCTIONS, quote=repr)
        raise CausalProbeError(f"There is no reproduction {o.name!r}{guess} There are: {', '.join(REPRODUCTIONS)}.")
    with contextlib.nullcontext() if o.out is None else hold(o.out):
        run = Run(
            quick=o.quick, seed=o.seed, progress=o.progress, folder=o.out, settings=o.settings(), overwrite=o.overwrite
        )
        result = REPRODUCTIONS[o.name].function(run)
        if o.out is not None:
            result.write(o.out, page=o.page)
    return result
