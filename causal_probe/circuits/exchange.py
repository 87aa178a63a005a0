"""Circuits in the formats of others: the graphs of EAP-IG and of the Mechanistic Interpretability Benchmark, written and read.

There a model has nodes ``input``, ``a0.h1`` (layer 0, head 1), ``m0`` (the MLP) and ``logits``; an edge is ``a0.h1->a5.h3<k>``, ``input->m0`` or ``m3->logits``, with a score and whether it is in the graph
(https://github.com/hannamw/EAP-IG). It knows one input, where we have embeddings and positions, and gives every head keys and values of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import networkx as nx

from causal_probe.arguments import checked
from causal_probe.circuits.found import Circuit
from causal_probe.errors import CausalProbeError
from causal_probe.results import read_json, write_json

__all__ = ["mib_graph", "read_mib_graph"]

EMBEDDINGS = ("embed", "pos_embed")
SOURCE = re.compile(r"input|a(?P<layer>\d+)\.h(?P<head>\d+)|m(?P<mlp>\d+)")
RECEIVER = re.compile(r"logits|a(?P<layer>\d+)\.h(?P<head>\d+)<(?P<side>[qkv])>|m(?P<mlp>\d+)")


@checked
def mib_graph(found: Circuit, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """A circuit as a graph of EAP-IG and of MIB's circuit track.

    Its score of an edge is the effect; in the graph are the circuit's :attr:`~causal_probe.circuits.Circuit.members`. Edges that were not tested have the score 0. Of keys and values that heads share, every
    head gets the edge; of embeddings and positions, their one input gets the larger effect.

    Parameters
    ----------
    path
        Where to write it, a file ``NAME.json``; None: nowhere.

    Returns
    -------
    dict
        ``cfg``, ``nodes`` and ``edges``.

    Raises
    ------
    CausalProbeError
        If the circuit is one of single positions, or of layers that the format doesn't have (without attention, or of different numbers of heads); or the file can't be written.

    Examples
    --------
    >>> import torch
    >>> from causal_probe import circuits
    >>> known = circuits.known_circuit("key-composition")
    >>> found = circuits.find_circuit(known.model, known.sample(48, torch.Generator().manual_seed(0)), known.metric)
    >>> graph = mib_graph(found)
    >>> [name for name, edge in graph["edges"].items() if edge["in_graph"]][:4]
    ['input->a0.h0<q>', 'input->a0.h0<k>', 'input->a0.h0<v>', 'input->a1.h0<q>']
    """
    if found.text:
        raise CausalProbeError(
            "This circuit has edges at single positions, which MIB's graphs don't have; write one of whole prompts."
        )
    shape: Any = found.settings["shape"]
    heads = set(shape["heads"])
    if len(heads) != 1 or 0 in heads:
        raise CausalProbeError(f"MIB's graphs have as many heads in every layer; this model has {shape['heads']}.")
    (n_heads,) = heads
    n_layers, members = len(shape["heads"]), set(found.members)
    edges = {name: {"score": 0.0, "in_graph": False} for name in _all_edges(n_layers, n_heads, shape["in_turn"])}
    for edge in found.edges:
        for name in _names(edge.source, edge.receiver, n_heads, shape["groups"]):
            if name in edges:
                own = edges[name]
                larger = edge.effect if abs(edge.effect) > abs(own["score"]) else own["score"]
                edges[name] = {"score": larger, "in_graph": own["in_graph"] or (edge.source, edge.receiver) in members}
    used = {end.partition("<")[0] for name, its in edges.items() if its["in_graph"] for end in name.split("->")}
    nodes = ["input", *(name for layer in range(n_layers) for name in (*(f"a{layer}.h{head}" for head in range(n_heads)), f"m{layer}")), "logits"]  # fmt: skip
    cfg = {"n_layers": n_layers, "n_heads": n_heads, "parallel_attn_mlp": not any(shape["in_turn"]), "d_model": shape["d_model"]}  # fmt: skip
    graph = {"cfg": cfg, "nodes": {name: {"in_graph": name in used} for name in nodes}, "edges": edges}
    if path is not None:
        write_json(path, graph)
    return graph


@checked
def read_mib_graph(path: str | os.PathLike[str]) -> nx.DiGraph:
    """The edges in a graph of EAP-IG and of MIB's circuit track, in our names, for :meth:`~causal_probe.circuits.Circuit.compare`.

    Returns
    -------
    nx.DiGraph
        source -> receiver, with ``score``; the input is ``embed``. ``graph.graph["cfg"]`` is the file's.

    Raises
    ------
    CausalProbeError
        If it is no such file.
    """
    given: Any = read_json(path)
    if not isinstance(given, dict) or not all(isinstance(given.get(key), dict) for key in ("cfg", "nodes", "edges")):
        raise CausalProbeError(f"{os.fspath(path)!r} is no graph of EAP-IG or MIB, which has cfg, nodes and edges.")
    graph = nx.DiGraph(cfg=given["cfg"])
    for name, its in given["edges"].items():
        first, _, second = name.partition("->")
        source, receiver = SOURCE.fullmatch(first), RECEIVER.fullmatch(second)
        score = its.get("score") if isinstance(its, dict) else None
        if source is None or receiver is None or not isinstance(score, int | float) or not isinstance(its.get("in_graph"), bool):  # fmt: skip
            raise CausalProbeError(
                f"{os.fspath(path)!r} has an edge {name!r}: {its!r}; one is 'a0.h1->a5.h3<k>' with a number `score` and true or false `in_graph`."
            )
        if its["in_graph"]:
            graph.add_edge(_own(source), _own(receiver), score=float(score))
    return graph


def _own(match: re.Match[str]) -> str:
    found = match.groupdict()
    if found["mlp"] is not None:
        return f"L{found['mlp']}.mlp"
    if found["layer"] is None:
        return "embed" if match[0] == "input" else "logits"
    return f"L{found['layer']}H{found['head']}" + (f".{found['side']}" if "side" in found else "")


def _names(source: str, receiver: str, n_heads: int, groups: Any) -> Iterator[str]:
    """The format's edges of one of ours; none where it has no such node."""
    first = "input" if source in EMBEDDINGS else _node(source)
    if first is None:
        return
    place, _, side = receiver.rpartition(".")
    if receiver == "logits" or side == "mlp":
        yield f"{first}->{_node(receiver) or 'logits'}"
        return
    layer, _, head = place[1:].partition("H")
    size = n_heads // groups[int(layer)]["qkv".index(side)]
    for each in range(int(head), int(head) + size):
        yield f"{first}->a{layer}.h{each}<{side}>"


def _node(name: str) -> str | None:
    if name.endswith(".mlp"):
        return f"m{name[1:-4]}"
    layer, _, head = name[1:].partition("H")
    return f"a{layer}.h{head}" if layer.isdigit() and head.isdigit() else None


def _all_edges(n_layers: int, n_heads: int, in_turn: Any) -> Iterator[str]:
    before = ["input"]
    for layer in range(n_layers):
        own = [f"a{layer}.h{head}" for head in range(n_heads)]
        for head in own:
            yield from (f"{source}->{head}<{side}>" for source in before for side in "qkv")
        yield from (f"{source}->m{layer}" for source in (*before, *(own if in_turn[layer] else ())))
        before += [*own, f"m{layer}"]
    yield from (f"{source}->logits" for source in before)
