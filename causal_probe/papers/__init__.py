"""The figures of the papers whose mechanisms are known here, done again: our numbers beside theirs.

``papers.reproduce(name)`` and ``causal-probe reproduce NAME`` do one. To add one: a module in this folder, one for each
figure, with a function ``(run: Run) -> Reproduction`` that does all that takes long in ``run.part(...)`` and little of it if
``run.quick``, and a line in :data:`REPRODUCTIONS`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping

from causal_probe.errors import CausalProbeError
from causal_probe.options import ReproduceOptions, takes
from causal_probe.options.base import near
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

__all__ = ["PARTS", "REPRODUCTIONS", "Line", "Reproduction", "Run", "list_reproductions", "reproduce"]

#: Every reproduction by the name by which it is asked for, in the order in which they are listed; a docstring says what it is about.
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
        result = REPRODUCTIONS[o.name](run)
        if o.out is not None:
            result.save(o.out, page=o.page)
    return result


def list_reproductions() -> str:
    """Every name, with what it is about: the first line of its function's docstring."""
    about = {name: (inspect.getdoc(function) or "").partition("\n")[0] for name, function in REPRODUCTIONS.items()}
    return "\n".join(f"{name:<24} {text}".rstrip() for name, text in about.items())
