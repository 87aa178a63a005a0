"""Ask a transformer which causal structure it has learnt, and test the answer.

The subpackages, from the ground up:

================  =====================================================================
`options`         what each study may be told
`graphs`          directed graphs over positions: families, files, comparison
`discovery`       causal discovery: from tests of independence to a mixed graph
`tasks`           data whose causal graph is known
`models`          transformers whose mechanism is known
`training`        fitting those models
`hooks`           what is done at a hook point: record, edit
`probes`          the questions, asked of any TransformerLens model and any tokens
`viz`             pictures and the parts of a page
`first_gradient`  from data to a graph, without a trained model
`mechanisms`      from a model and a task to numbers: descent, mesa, weights, learning
`syntax`          dependency trees, asked of heads
`circuits`        models whose every edge is known
`experiments`     whole studies: a task, a model, training, probes and a comparison
`papers`          figures of the papers, reproduced
`sweep`           large work: many studies, on many processes
`reports`         the pages over results
================  =====================================================================

Above them stand ``report(result)``, the page on a result, ``save(result, folder)``, its numbers, tables and page, and ``load(path)``.

``import causal_probe`` is light: a subpackage is imported when it is first named.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from importlib.machinery import PathFinder
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from causal_probe.errors import CausalProbeError

if TYPE_CHECKING:
    from causal_probe import (
        circuits,
        discovery,
        errors,
        experiments,
        first_gradient,
        graphs,
        hooks,
        mechanisms,
        models,
        options,
        papers,
        probes,
        reports,
        results,
        sweep,
        syntax,
        tasks,
        training,
        viz,
    )
    from causal_probe.reports import load, report, save

__all__ = [
    "CausalProbeError",
    "circuits",
    "discovery",
    "errors",
    "experiments",
    "first_gradient",
    "graphs",
    "hooks",
    "load",
    "mechanisms",
    "models",
    "options",
    "papers",
    "probes",
    "report",
    "reports",
    "results",
    "save",
    "sweep",
    "syntax",
    "tasks",
    "training",
    "viz",
]

#: What stands above all rooms: the page on a result, its folder, and what was saved.
_ABOVE = ("load", "report", "save")

__version__ = "0.2.0"


def _unmet_requirement() -> str | None:
    """One line on what keeps the package from working here, or None. Cheap: nothing heavy is imported."""
    if PathFinder.find_spec(f"{__name__}.hooks", __path__) is None:
        return (
            "causal_probe/hooks must be a link to the folder hooks/ and is not: git has checked the link out as a text "
            "file, as Git for Windows does by default. Run `git config core.symlinks true`, delete the file "
            "causal_probe/hooks, and check it out again with `git checkout -- causal_probe/hooks`."
        )
    try:
        found = importlib.metadata.version("transformer-lens")
    except importlib.metadata.PackageNotFoundError:
        return "causal-probe needs TransformerLens 3.9 or newer, and none was found: pip install 'transformer-lens>=3.9,<5'"
    release = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if release < (3, 9):
        return (
            f"causal-probe needs TransformerLens 3.9 or newer, and {found} was found: "
            "pip install 'transformer-lens>=3.9,<5'"
        )
    return None


if _problem := _unmet_requirement():
    # The command imports the package before any code of its own runs, so it is here that it is spared the traceback.
    if sys.argv and PurePath(sys.argv[0]).stem == "causal-probe":
        sys.stderr.write(f"Error: {_problem}\n")
        raise SystemExit(2)
    raise ImportError(_problem)


def __getattr__(name: str) -> Any:
    if name in (*_ABOVE, "plot"):  # plot: what results.Result.plot asks for
        return getattr(importlib.import_module(f"{__name__}.reports"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
