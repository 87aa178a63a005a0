"""Causal graphs in files: networkx's node-link JSON, GraphML and edge lists.

A file may come from anywhere, so nothing in it is trusted: nodes are known by the names that the file gives them (integers
or integer strings), never by their position in a list; what networkx would repair silently (an edge to a node that the
file does not list, a node without a name, a node listed twice) is an error; XML entities are refused, because a few of
them expand to gigabytes.
"""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from xml.parsers import expat

import networkx as nx

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError, show_path
from causal_probe.graphs.check import (
    RULE,
    check_graph,
    check_size,
    data_problems,
    find_problems,
    is_integer,
    listing,
    show_edge,
    show_node,
)
from causal_probe.results import seal, to_jsonable, write_json
from causal_probe.results.files import is_whole, no_key_twice

__all__ = ["file_form", "read_graph", "write_graph"]

#: Bytes of the largest file that is read. A graph over 1,000 positions with all its 499,500 edges takes 27 MB of JSON.
LARGEST_FILE = 2**26

#: Suffixes of GraphML files.
GRAPHML = (".graphml", ".xml")

#: Suffixes of other formats, whose text may look like an edge list.
OTHER_FORMS = {
    ".dot": "DOT",
    ".gv": "DOT",
    ".csv": "a table",
    ".tsv": "a table",
    ".parquet": "a table",
    ".npy": "an array",
    ".npz": "an array",
    ".gml": "GML",
    ".gexf": "GEXF",
    ".adjlist": "an adjacency list",
    ".net": "Pajek's form",
    ".graph6": "graph6",
    ".g6": "graph6",
    ".yaml": "YAML",
    ".yml": "YAML",
    ".jsonl": "JSON lines",
    ".pkl": "a pickle",
}
OTHER_STARTS = {
    "DOT": re.compile(r"(strict\s+)?(di)?graph\b(?!\s*\[)", re.ASCII | re.IGNORECASE),
    "GML": re.compile(r"(creator\b.*\s+)?graph\s*\[", re.ASCII | re.IGNORECASE),
    "a table": re.compile(r"[^\s#]*[,;][^\n]*$", re.MULTILINE),
}

#: How deep elements of a file may lie in each other; a graph's lie four deep.
DEEPEST = 100

#: Characters of the longest data of an edge in an edge list. Python's parser takes no harm from so few, whatever they are.
LONGEST_DATA = 1000

#: Integers as Python and networkx write them: no leading zeros, signs, spaces or underscores, so no two spell one node.
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}", re.ASCII)


@checked
def read_graph(path: str | os.PathLike[str], *, nodes: int | None = None) -> nx.DiGraph:
    """Read a causal graph, edges parent -> child, and check it.

    Parameters
    ----------
    path
        ``.json`` is networkx's node-link form, its edges under the key ``edges`` or ``links``; ``.graphml`` and ``.xml``
        are GraphML. Any other file is one of the two if it begins like it, and an edge list otherwise: a line
        ``parent child`` per edge, then optionally a weight or a dict of data, then optionally a ``#`` comment.
        Nodes are named by integers or integer strings. JSON that does not say ``directed`` is read as directed.
    nodes
        The number of nodes. An edge list needs it, and the nodes that it does not mention are roots. JSON and GraphML
        list their nodes, and a number that disagrees is an error. An edge list without any edge is refused: a file that is empty by
        mistake looks like that.

    Returns
    -------
    networkx.DiGraph
        Its nodes are the integers ``0..n-1`` in their order, and its edges are in order too. The data of nodes, edges
        and (from JSON) the graph is kept.

    Raises
    ------
    CausalProbeError
        If the file can't be read, is not in one of the three forms, or holds something that is not a causal graph (see
        :func:`~causal_probe.graphs.check_graph`); with the offending lines, nodes or edges named.

    See Also
    --------
    networkx.node_link_data, networkx.write_graphml, networkx.write_edgelist : write what this reads.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from causal_probe.graphs import chain
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_graph(chain(4), Path(folder) / "chain.json")
    ...     sorted(read_graph(Path(folder) / "chain.json").edges)
    [(0, 1), (1, 2), (2, 3)]
    """
    content = _read_bytes(path)
    try:
        form = _form(path, content)
        if form == "JSON":
            return _build(_parse_json(content), expected=nodes)
        if form == "GraphML":
            return _build(_parse_graphml(content), expected=nodes)
        return _build(_parse_edge_list(content, nodes))
    except _Unfit as unfit:
        raise CausalProbeError(f"{show_path(path)} can't be used as a graph: {unfit}") from unfit.__cause__


def file_form(path: str | os.PathLike[str]) -> Literal["JSON", "GraphML", "an edge list"]:
    r"""The form in which :func:`read_graph` would read a file: only an edge list doesn't say how many nodes there are.

    Raises
    ------
    CausalProbeError
        If the file can't be read.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "mine.txt").write_text("0 1\n1 2\n")
    ...     file_form(Path(folder) / "mine.txt")
    'an edge list'
    """
    return _form(path, _read_bytes(path))


@checked
def write_graph(graph: nx.DiGraph, path: str | os.PathLike[str]) -> None:
    """Write a causal graph as node-link JSON with the key ``edges``, atomically; :func:`read_graph` gives it back.

    Nodes and edges are written in order, so equal graphs make equal files. A checksum is written too: who changes the file by hand
    removes it.

    Raises
    ------
    CausalProbeError
        If :func:`~causal_probe.graphs.check_graph` refuses the graph, if its data has no plain JSON form (NaN has none),
        or if the file can't be written or is named as GraphML, as which it would be read.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from causal_probe.graphs import chain
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_graph(chain(3), Path(folder) / "chain.json")
    ...     "edges" in (Path(folder) / "chain.json").read_text()
    True
    """
    check_graph(graph)
    if (suffix := Path(path).suffix).lower() in GRAPHML:
        raise CausalProbeError(
            f"Can't write {os.fspath(path)}: graphs are written as JSON, and {suffix} says GraphML. Name a .json file, or use "
            "networkx.write_graphml."
        )
    if os.path.isdir(path):
        raise CausalProbeError(f"Can't write {os.fspath(path)}: it is a folder. Name a file.")
    write_json(path, seal(to_jsonable(_in_order(graph))))


#: Messages for known formats that are not read.
NOT_READ = (
    "it is {}, a form that isn't read. Read it with networkx and give the graph, or write it with networkx.node_link_data as JSON, "
    "networkx.write_graphml or networkx.write_edgelist."
)


class _Unfit(Exception):
    """A problem of a file; the message continues after the file's name."""


@dataclass(frozen=True)
class _Listed:
    """A graph as its file lists it, names not yet interpreted."""

    nodes: list[tuple[Any, dict[str, Any]]]
    edges: list[tuple[Any, Any, dict[str, Any]]]
    data: dict[str, Any] = field(default_factory=dict)


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        name = os.path.expanduser(path)
        if os.path.exists(name) and not (os.path.isfile(name) or os.path.isdir(name)):
            raise OSError(None, "it is no file, and reading it might never end")  # a pipe, say
        with open(name, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or str(error)
        raise CausalProbeError(f"Can't read the graph file {show_path(path)!r}: {reason}.") from error
    if len(content) > LARGEST_FILE:
        raise CausalProbeError(
            f"The graph file {show_path(path)} is larger than {LARGEST_FILE // 2**20} MiB. A graph over positions is far smaller."
        )
    return content


def _form(path: str | os.PathLike[str], content: bytes) -> Literal["JSON", "GraphML", "an edge list"]:
    suffix = Path(path).suffix.lower()
    if suffix in OTHER_FORMS:
        raise CausalProbeError(f"{show_path(path)} can't be used as a graph: {NOT_READ.format(OTHER_FORMS[suffix])}")
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if suffix == ".json" or (suffix not in GRAPHML and start in (b"{", b"[")):
        return "JSON"
    return "GraphML" if suffix in GRAPHML or start == b"<" else "an edge list"


# ------------------------------------------------------------------------------------------------------------ three forms


def _parse_json(content: bytes) -> _Listed:
    try:
        document = json.loads(content, object_pairs_hook=no_key_twice)
    except (ValueError, RecursionError) as error:
        raise _Unfit(f"it is not JSON: {error}.") from error
    expected = "networkx's node-link form is an object with the keys 'nodes' and 'edges' (or 'links'), both lists"
    if not isinstance(document, dict):
        raise _Unfit(f"{expected}; it holds a {type(document).__name__}.")
    if "sha256" in document and not is_whole(document):
        raise _Unfit("its checksum differs: it is damaged, or was changed by hand. If it was, remove its 'sha256'.")
    keys = [key for key in ("edges", "links") if key in document]
    if len(keys) == 2:
        raise _Unfit("it has both 'edges' and 'links'. Keep the one that holds its edges.")
    if not keys or not all(isinstance(document.get(key), list) for key in ("nodes", *keys)):
        raise _Unfit(f"{expected}; it has the keys {listing(document, repr)}.")
    if not document.get("directed", True):
        raise _Unfit('it says "directed": false. A causal graph is directed, from parent to child.')
    if document.get("multigraph", False):
        raise _Unfit('it says "multigraph": true. A causal graph holds each edge once.')
    problems = [f"nodes[{i}] has no 'id'" for i, node in enumerate(document["nodes"]) if not _has(node, "id")]
    for i, edge in enumerate(document[keys[0]]):
        problems += [f"{keys[0]}[{i}] has no {end!r}" for end in ("source", "target") if not _has(edge, end)]
    if problems:
        raise _Unfit(f"{listing(problems)}.")
    data = document.get("graph")
    return _Listed(
        nodes=[(node["id"], _without(node, "id")) for node in document["nodes"]],
        edges=[(edge["source"], edge["target"], _without(edge, "source", "target")) for edge in document[keys[0]]],
        data=data if isinstance(data, dict) else {},
    )


def _has(item: Any, key: str) -> bool:
    return isinstance(item, dict) and item.get(key) is not None


def _without(item: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in keys}


def _parse_graphml(content: bytes) -> _Listed:
    names, n_graphs = _scan_xml(content)
    if n_graphs > 1:
        raise _Unfit(f"it holds {n_graphs} graphs. Keep one.")
    try:
        with warnings.catch_warnings():
            # networkx warns of ports and untyped keys, which don't touch the edges.
            warnings.simplefilter("ignore")
            graph = nx.read_graphml(BytesIO(content))
    # networkx lets most faults of a document surface as whatever Python raises on them.
    except (nx.NetworkXException, SyntaxError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Unfit(f"networkx can't read it as GraphML: {error}.") from error
    if not graph.is_directed():
        raise _Unfit('it does not say edgedefault="directed". A causal graph is directed, from parent to child.')
    # networkx merges nodes that are listed twice and adds those that are not listed: the names come from the scan.
    return _Listed(nodes=[(name, graph.nodes.get(name, {})) for name in names], edges=list(graph.edges(data=True)))


def _scan_xml(content: bytes) -> tuple[list[str], int]:
    """The ``id`` of every ``node`` element and the number of ``graph`` elements, once no entity is declared."""
    names: list[str] = []
    graphs: list[str] = []

    depth = 0

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1

    def element(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise _Unfit(f"its elements lie more than {DEEPEST} deep in each other; a graph's don't.")
        kind = tag.rpartition(":")[2]
        if kind == "graph":
            graphs.append(tag)
        elif kind == "node":
            names.append(attributes.get("id", "None"))  # as networkx names it

    def entity(name: str, *_: Any) -> None:
        raise _Unfit(f"it declares the XML entity {show_node(name)}, which a graph has no use for. Remove its DOCTYPE.")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = element, end
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise _Unfit(f"it is not XML: {error}.") from error
    return names, len(graphs)


def _parse_edge_list(content: bytes, nodes: int | None) -> _Listed:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unfit("it is neither JSON, GraphML nor an edge list: it is not UTF-8 text.") from error
    if "\0" in text:
        raise _Unfit("it is neither JSON, GraphML nor an edge list: it is a binary file.")
    for form, start in OTHER_STARTS.items():
        if start.match(text.lstrip()):
            raise _Unfit(NOT_READ.format(form))
    edges: list[tuple[Any, Any, dict[str, Any]]] = []
    wrong = []
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.partition("#")[0].split(maxsplit=2)
        if not fields:
            continue
        data = {} if len(fields) == 2 else _edge_data(fields[-1])
        if len(fields) == 1 or data is None:
            wrong.append((number, line))
        else:
            edges.append((fields[0], fields[1], data))
    if wrong:
        raise _Unfit(
            "a line of an edge list is 'parent child', then optionally a weight or a dict of data, "
            f"then optionally a # comment; {listing(wrong, _show_line)}."
        )
    if nodes is None:
        raise _Unfit("an edge list does not say how many nodes there are. Give their number too.")
    if not is_integer(nodes) or nodes < 1:
        raise _Unfit(f"the number of nodes is {nodes!r}. It must be an integer of at least 1.")
    if not edges:
        raise _Unfit(
            "it lists no edge. Is it empty by mistake? A graph of roots alone is said in JSON or GraphML, which list the nodes."
        )
    check_size(nodes)
    mentioned = {_node(end) for edge in edges for end in edge[:2]}
    beyond = sorted(node for node in mentioned if isinstance(node, int) and not 0 <= node < nodes)
    if beyond:
        raise _Unfit(f"of {nodes} nodes the last is {nodes - 1}, and it mentions {listing(beyond)}.")
    strangers = sorted(node for node in mentioned if isinstance(node, str))
    return _Listed(nodes=[(node, {}) for node in (*range(nodes), *strangers)], edges=edges)


def _show_line(numbered: tuple[int, str]) -> str:
    number, line = numbered
    return f"line {number} is {show_node(line.strip())}"


def _edge_data(text: str) -> dict[str, Any] | None:
    """A weight or a dict, as networkx writes it behind an edge; None for anything else."""
    if len(text) > LONGEST_DATA:
        return None
    try:
        if not text.startswith("{"):
            return {"weight": float(text)}
        data = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return data if isinstance(data, dict) and all(isinstance(key, str) for key in data) else None


# --------------------------------------------------------------------------------------------------------------- building


def _build(listed: _Listed, *, expected: int | None = None) -> nx.DiGraph:
    """The checked graph of what a file lists."""
    check_size(len(listed.nodes))
    check_size(len(listed.edges), what="edges")
    nodes = [_node(name) for name, _ in listed.nodes]
    edges = [(_node(parent), _node(child)) for parent, child, _ in listed.edges]
    graph = nx.DiGraph()
    graph.graph.update(listed.data)
    graph.add_nodes_from(zip(nodes, (data for _, data in listed.nodes), strict=True))
    unlisted = [node for edge in edges for node in edge if node not in graph]
    graph.add_edges_from((*edge, data) for edge, (_, _, data) in zip(edges, listed.edges, strict=True))

    problems = [
        f"{what} {listing(dict.fromkeys(found), show_node)}"
        for what, found in (
            ("listed twice: the nodes", _repeated(nodes)),
            ("edges to nodes that it does not list:", unlisted),
        )
        if found
    ]
    if repeated := _repeated(edges):
        problems.append(f"listed twice: the edges {listing(repeated, show_edge)}")
    problems += find_problems(graph, nodes=expected)
    if data := data_problems(graph):
        problems.append(f"not finite, or of no plain kind: {listing(data)}")
    if problems:
        raise _Unfit(f"{'; '.join(problems)}. {RULE}")
    return _in_order(graph)


def _node(name: Any) -> int | str:
    """The node that a file's name stands for: an integer where it is one; else a string, for the check to name."""
    if isinstance(name, str):
        return int(name) if INTEGER.fullmatch(name) else name
    # Not hashable, or equal to an integer without being one (true, 1.0).
    return name if type(name) is int else repr(name)


def _repeated(items: Iterable[Any]) -> list[Any]:
    return [item for item, count in Counter(items).items() if count > 1]


def _in_order(graph: nx.DiGraph) -> nx.DiGraph:
    """A copy with the nodes ``0..n-1`` in their order, as plain integers, and the edges in theirs."""
    ordered = nx.DiGraph()
    ordered.graph.update(graph.graph)
    ordered.add_nodes_from((node, graph.nodes[node]) for node in range(len(graph)))
    ordered.add_edges_from(
        (int(parent), int(child), graph.edges[parent, child]) for parent, child in sorted(graph.edges)
    )
    return ordered
