"""The figures of the papers whose mechanisms are known here, done again: our numbers beside theirs.

``papers.reproduce(name)`` and ``causal-probe reproduce NAME`` do one. To add one: a module in this folder, one for each
figure, with a function ``(run: Run) -> Reproduction`` that does all that takes long in ``run.part(...)`` and little of it if
``run.quick``, and a line in :data:`REPRODUCTIONS`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Mapping
from typing import Any

from causal_probe.errors import CausalProbeError
from causal_probe.papers.base import PARTS, Line, Reproduction, Run
from causal_probe.papers.copying import copy
from causal_probe.papers.descent import gradient_descent, gradient_descent_layers
from causal_probe.papers.evidence import evidence
from causal_probe.papers.forests import figure_9
from causal_probe.papers.mesa import mesa, mesa_moments
from causal_probe.papers.out_of_distribution import ood
from causal_probe.papers.residual import figure_8
from causal_probe.papers.sequences_needed import sample_complexity
from causal_probe.papers.standard import softmax
from causal_probe.papers.trees import figure_2, figure_6
from causal_probe.papers.two_parents import figure_5, figure_7
from causal_probe.papers.waves import sine
from causal_probe.results import hold

__all__ = ["PARTS", "REPRODUCTIONS", "Line", "Reproduction", "Run", "reproduce"]

#: Every reproduction by the name by which it is asked for, in the order in which they are listed.
REPRODUCTIONS: Mapping[str, Callable[[Run], Reproduction]] = {
    "figure-2": figure_2,
    "figure-5": figure_5,
    "figure-6": figure_6,
    "figure-7": figure_7,
    "figure-8": figure_8,
    "figure-9": figure_9,
    "ood": ood,
    "sample-complexity": sample_complexity,
    "evidence": evidence,
    "gradient-descent": gradient_descent,
    "gradient-descent-layers": gradient_descent_layers,
    "sine": sine,
    "copy": copy,
    "softmax": softmax,
    "mesa": mesa,
    "mesa-moments": mesa_moments,
}


def reproduce(
    name: str,
    *,
    quick: bool = False,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Reproduction:
    """Do a paper's experiment again.

    Parameters
    ----------
    name
        One of :data:`REPRODUCTIONS`.
    quick
        A smaller one: less than five minutes on two CPU cores, and larger errors.
    seed
        Of all random numbers; where the experiment has several seeds, of the first.
    out
        Write the result into this folder (:meth:`Reproduction.save`). Parts that an interrupted run of the same name and
        settings has finished there are not done again.
    overwrite
        Replace what a run of other settings has left in that folder.
    progress
        Show progress bars on standard error.

    Raises
    ------
    CausalProbeError
        If there is no such reproduction, or ``out`` can't be written or holds something else.
    """
    if name not in REPRODUCTIONS:
        near = difflib.get_close_matches(name, REPRODUCTIONS, n=1)
        raise CausalProbeError(
            f"There is no reproduction {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} There are: "
            f"{', '.join(REPRODUCTIONS)}."
        )
    settings: dict[str, Any] = {"name": name, "quick": quick, "seed": seed}
    with contextlib.nullcontext() if out is None else hold(out):
        run = Run(quick=quick, seed=seed, progress=progress, folder=out, settings=settings, overwrite=overwrite)
        result = REPRODUCTIONS[name](run)
        if out is not None:
            result.save(out)
    return result
