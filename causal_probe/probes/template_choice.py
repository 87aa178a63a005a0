"""The templates that a command names: shipped ones, those of a known graph in a file, and a user's own."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import read_graph
from causal_probe.probes.templates import Template, find_templates, from_graph, successor_of_parent

__all__ = ["choose_templates"]

#: Templates that are made from a graph in a file.
OF_A_GRAPH: Mapping[str, Callable[[nx.DiGraph], Template]] = {
    "graph": from_graph,
    "successor-of-parent": successor_of_parent,
}


def choose_templates(given: str | Template | Iterable[str | Template]) -> tuple[Template, ...]:
    """Templates, each given by itself or by a text.

    Parameters
    ----------
    given
        A text is the name of a shipped template; ``graph:FILE`` or ``successor-of-parent:FILE``, with a graph over positions in
        node-link JSON or GraphML; or ``FILE.py:NAME``, a :class:`~causal_probe.probes.Template` in a Python file of your
        own, or a function from tokens [batch, pos] to targets [batch, query, key]. The file is run.

    Raises
    ------
    CausalProbeError
        If a name is unknown, a file can't be read, or it does not hold what was asked for.

    Examples
    --------
    >>> [template.name for template in choose_templates("induction,offset-3".split(","))]
    ['induction', 'offset-3']
    """
    listed = [given] if isinstance(given, (str, Template)) else list(given)
    return find_templates([_from_file(each) if isinstance(each, str) and ":" in each else each for each in listed])


def _from_file(text: str) -> Template:
    before, after = text.split(":", 1) if text.split(":", 1)[0] in OF_A_GRAPH else text.rsplit(":", 1)
    if before in OF_A_GRAPH:
        return OF_A_GRAPH[before](read_graph(after))
    if not before.endswith(".py") or not Path(before).is_file():
        raise CausalProbeError(
            f"The template {text!r} names no file: there are graph:FILE and successor-of-parent:FILE, with a graph, and FILE.py:NAME, "
            "with a function of your own."
        )
    try:
        found: Any = runpy.run_path(before).get(after)
    except Exception as error:  # the user's code raises what it likes
        raise CausalProbeError(f"{before} can't be run: {type(error).__name__}: {error}") from error
    if isinstance(found, Template):
        return found
    if not callable(found):
        raise CausalProbeError(f"{before} holds no template or function {after!r}.")
    name = re.sub(r"[^a-z0-9]+", "-", after.lower()).strip("-")
    return Template(name, found, f"{after} in {Path(before).name}")
