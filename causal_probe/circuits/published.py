"""Circuits as papers describe them, to be compared with one that was found: components with their roles, and the edges that the text names.

A paper names heads by their role and says which feeds which; it gives no test of each edge, and no edge that it doesn't name is thereby false. Where a text leaves open whether keys or values are meant, both
are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import networkx as nx

from causal_probe.arguments import checked, near
from causal_probe.errors import CausalProbeError
from causal_probe.probes.qk_stream import layer_of

__all__ = ["published"]

#: By role, its components; and connections: role, what of the next is read ("" for an MLP or the logits), role.
Roles = Mapping[str, Sequence[str]]
Connections = Sequence[tuple[str, str, str]]


def _ioi() -> tuple[str, str, Roles, Connections]:
    """Wang et al. 2023, https://arxiv.org/abs/2211.00593, Figure 2 and section 3: who is given the drink?"""
    roles = {
        "previous token": ["L2H2", "L4H11"],
        "duplicate token": ["L0H1", "L0H10", "L3H0"],
        "induction": ["L5H5", "L5H8", "L5H9", "L6H9"],
        "S-inhibition": ["L7H3", "L7H9", "L8H6", "L8H10"],
        "name mover": ["L9H6", "L9H9", "L10H0"],
        "negative name mover": ["L10H7", "L11H10"],
        "backup name mover": ["L9H0", "L9H7", "L10H1", "L10H2", "L10H6", "L10H10", "L11H2", "L11H9"],
    }
    movers = ("name mover", "negative name mover", "backup name mover")
    connections = [
        *(("embed", side, role) for role in ("previous token", "duplicate token") for side in "qkv"),
        *(("previous token", side, "induction") for side in "kv"),
        *((role, side, "S-inhibition") for role in ("induction", "duplicate token") for side in "kv"),
        *(("S-inhibition", "q", role) for role in movers),
        *(("embed", side, role) for role in movers for side in "kv"),
        *((role, "", "logits") for role in movers),
    ]
    return "gpt2", "wang2023", roles, connections


def _greater_than() -> tuple[str, str, Roles, Connections]:
    """Hanna et al. 2023, https://arxiv.org/abs/2305.00586, sections 3.1 and 3.2: a year after 17YY. Late heads read the year, late MLPs raise what is greater."""
    roles = {
        "reads the year": ["L5H5", "L6H1", "L6H9", "L7H10", "L8H11", "L9H1"],
        "greater than": ["L8.mlp", "L9.mlp", "L10.mlp", "L11.mlp"],
    }
    connections = [
        ("embed", "v", "reads the year"),
        ("reads the year", "", "greater than"),
        ("reads the year", "", "logits"),
        ("greater than", "", "greater than"),
        ("greater than", "", "logits"),
    ]
    return "gpt2", "hanna2023", roles, connections


CIRCUITS: Mapping[str, Callable[[], tuple[str, str, Roles, Connections]]] = {"ioi": _ioi, "greater-than": _greater_than}


@checked
def published(name: str) -> nx.DiGraph:
    """A circuit as a paper describes it.

    Parameters
    ----------
    name
        ``"ioi"`` (Wang et al. 2023) or ``"greater-than"`` (Hanna et al. 2023), both of GPT-2 small.

    Returns
    -------
    nx.DiGraph
        source -> receiver, for :meth:`~causal_probe.circuits.Circuit.compare`. Edges have ``roles``, that of the source and of the receiver; the graph has ``model``, ``work`` (a key of the
        bibliography) and ``roles``, components by role.

    Raises
    ------
    CausalProbeError
        If there is none of that name.

    Examples
    --------
    >>> ioi = published("ioi")
    >>> ioi.graph["roles"]["S-inhibition"], ("L5H5", "L7H3.v") in ioi.edges, ("L9H9", "logits") in ioi.edges
    (('L7H3', 'L7H9', 'L8H6', 'L8H10'), True, True)
    """
    if name not in CIRCUITS:
        raise CausalProbeError(f"There is no published circuit {name!r}{near(name, CIRCUITS, quote=repr)} There are: {', '.join(CIRCUITS)}.")  # fmt: skip
    model, work, roles, connections = CIRCUITS[name]()
    graph = nx.DiGraph(model=model, work=work, roles={role: tuple(its) for role, its in roles.items()})
    for first, side, second in connections:
        for source, component in itertools.product(roles.get(first, [first]), roles.get(second, [second])):
            if _before(source, component):
                graph.add_edge(source, f"{component}.{side}" if side else component, roles=(first, second))
    return graph


def _before(source: str, component: str) -> bool:
    """Whether one writes before the other reads; an MLP reads its own layer's heads."""
    if source == "embed" or component == "logits":
        return True
    first, second = map(layer_of, (source, component))
    return first < second or (first == second and component.endswith(".mlp") and not source.endswith(".mlp"))
