"""Attributions and heads as an attribution graph in the JSON that circuit-tracer and Neuronpedia show.

That format has nodes at a layer and a position of a prompt, and weighted links between them. A contribution to attention belongs to a *pair* of
sources, which no link holds; so each pair is a node of its own, fed by its two sources, that feeds the head.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.probes.qk_attributions import QKAttributions
from causal_probe.probes.qk_split import REST
from causal_probe.probes.upstream_heads import Upstream
from causal_probe.results import read_json, write_json

__all__ = ["attribution_graph"]

#: The file beside the graphs in which circuit-tracer's server looks for what there is.
INDEX = "graph-metadata.json"
#: The format's names for nodes: what is drawn as a feature, as what is left over, as a token, and at the top.
FEATURE, LEFT, TOKEN, TOP = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"


@checked
def attribution_graph(
    result: QKAttributions | Upstream,
    path: str | os.PathLike[str] | None = None,
    *,
    prompt: Sequence[str] = ("key", "query"),
    at: tuple[int, int] = (1, 0),
    k: int = 30,
) -> dict[str, Any]:
    """A result as the attribution graph of circuit-tracer, for its viewer and for Neuronpedia's.

    Of QK attributions the links into the head's node sum to :attr:`~causal_probe.probes.qk_attributions.QKAttributions.total`: a link from each of the ``k``
    pairs of the largest contribution, of either sign, with that contribution as its weight, and one from "all other pairs". The two links into a
    pair's node, from its source in the query (at the query's position) and in the key (at the key's), have the pair's contribution
    as well: both sources are needed, and the number isn't to be added up over them. Of :func:`~causal_probe.probes.upstream` each tested arrow is a link, whose weight is
    its drop in attention, and the label says whether it was confirmed.

    Parameters
    ----------
    result
        What to write.
    path
        Where, a file ``NAME.json``; the graph is also entered in ``graph-metadata.json`` beside it, as circuit-tracer's server wants. None: nowhere.
    prompt
        The tokens along the axis of positions, two or more. A result is a mean over rows, so by default there are two: the key and the query. Of one
        sequence and one edge, give the sequence's own tokens.
    at
        The positions of the query and of the key among them.
    k
        So many pairs, one or more.

    Returns
    -------
    dict
        ``metadata``, ``qParams``, ``nodes`` and ``links``.

    Raises
    ------
    CausalProbeError
        If positions are not in the prompt, an argument is out of range, or the file can't be written.

    References
    ----------
    The format is that of https://github.com/safety-research/circuit-tracer. Ameisen et al., "Circuit Tracing", Transformer Circuits Thread, 2025.

    Examples
    --------
    >>> from causal_probe import models, probes
    >>> import torch
    >>> model = models.DisentangledTransformer(d_vocab=6, n_positions=12)
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    >>> _ = model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)
    >>> found = probes.qk_attributions(model, torch.tensor([[0, 1, 2, 0, 1, 2]]), 1, 0, edges="induction")
    >>> graph = attribution_graph(found, k=1)
    >>> [(link["source"], link["target"], round(link["weight"])) for link in graph["links"] if link["weight"]]
    [('0_2_0', '1_4_1', 27), ('E_0_1', '1_4_1', 27), ('1_4_1', '2_0_1', 27)]
    """
    prompt = list(prompt)
    if len(prompt) < 2 or not all(0 <= position < len(prompt) for position in at) or at[0] == at[1]:
        raise CausalProbeError(
            f"at={at} of a prompt of {len(prompt)} tokens: give two tokens or more, and two different positions among them, the query's and the key's."
        )
    if k < 1:
        raise CausalProbeError(f"`k` is {k}. It must be a whole number of at least 1.")
    made = _of_pairs(result, at, k) if isinstance(result, QKAttributions) else _of_arrows(result, at)
    nodes, links, top = made
    slug = Path(path).stem if path is not None else re.sub(r"[^\w-]+", "-", f"{top} {result.KIND}").lower()
    version = result.provenance["versions"]["causal-probe"]
    metadata = {
        "slug": slug,
        "scan": str(result.provenance["model"]),
        "transcoder_list": [],
        "prompt_tokens": prompt,
        "prompt": "".join(prompt),
        "node_threshold": None,
        "generator": {"name": "causal-probe", "version": version},
    }
    shown = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": top, "sg_pos": ""}
    graph = {"metadata": metadata, "qParams": shown, "nodes": nodes, "links": links}
    if path is not None:
        _write(Path(path), graph)
    return graph


def _write(path: Path, graph: dict[str, Any]) -> None:
    if path.suffix != ".json":
        raise CausalProbeError(f"An attribution graph can't be written as {os.fspath(path)!r}: its name ends in .json.")
    index = path.with_name(INDEX)
    known: Any = read_json(index) if index.exists() else {"graphs": []}
    if not isinstance(known, dict) or not isinstance(known.get("graphs"), list):
        raise CausalProbeError(f"{index} is no list of attribution graphs. Choose another folder.")
    others = [each for each in known["graphs"] if not isinstance(each, dict) or each.get("slug") != path.stem]
    write_json(path, graph)
    write_json(index, {**known, "graphs": [*others, graph["metadata"]]})


def _of_pairs(result: QKAttributions, at: tuple[int, int], k: int) -> tuple[list[Any], list[Any], str]:
    sources, layer = result.sources, result.layer
    flat = [(float(value), divmod(number, len(sources))) for number, value in enumerate(result.contribution.ravel())]
    chosen = sorted(flat, key=lambda each: -abs(each[0]))[:k]
    layers = [_layer(source, layer) for source in sources]
    on_query, on_key = (sorted({pair[side] for _, pair in chosen}) for side in (0, 1))
    nodes = [
        _node(layers[number], number, position, sources[number])
        for position, side in ((at[1], on_key), (at[0], on_query))
        for number in side
    ]
    said = f"L{layer}H{result.head} on {result.edges} (p={result.score:.3f})"
    top = _node(str(layer + 1), result.head, at[0], said, kind=TOP, token_prob=result.score, is_target_logit=True)
    links = []
    for rank, (value, (query, key)) in enumerate(chosen):
        pair = _node(str(layer), len(sources) + rank, at[0], f"{sources[query]} (query) with {sources[key]} (key)")
        nodes.append(pair)
        links += [
            _link(f"{layers[key]}_{key}_{at[1]}", pair["node_id"], value),
            _link(f"{layers[query]}_{query}_{at[0]}", pair["node_id"], value),
            _link(pair["node_id"], top["node_id"], value),
        ]
    others = _node(str(layer), len(sources) + len(chosen), at[0], "all other pairs", kind=LEFT)
    links.append(_link(others["node_id"], top["node_id"], result.total - sum(value for value, _ in chosen)))
    return [*nodes, others, top], links, str(top["node_id"])


def _of_arrows(result: Upstream, at: tuple[int, int]) -> tuple[list[Any], list[Any], str]:
    place = {"query": at[0], "key": at[1]}
    layer, head = _place(result.head)
    role, attention = result.roles[result.head]
    said = f"{result.head} on {role or result.edges} (p={attention:.3f})"
    top = _node(str(layer + 1), head, at[0], said, kind=TOP, token_prob=attention, is_target_logit=True)
    nodes: dict[tuple[str, str], Any] = {}
    for arrow in result.arrows:
        confirmed = "confirmed" if arrow.confirmed else "not confirmed"
        of, number = _place(arrow.source)
        role = result.roles.get(arrow.source, (None, 0.0))[0]
        label = f"{arrow.source} through the {arrow.side}{f', {role}' if role else ''}, {confirmed}"
        nodes.setdefault((arrow.source, arrow.side), _node(str(of), number, place[arrow.side], label))
    links = []
    for arrow in result.arrows:
        source = nodes[arrow.source, arrow.side]["node_id"]
        targets = [node["node_id"] for (name, _), node in nodes.items() if name == arrow.target]
        targets = [top["node_id"]] if arrow.target == result.head else targets
        links += [_link(source, target, arrow.drop) for target in targets]
    return [*nodes.values(), top], links, str(top["node_id"])


def _layer(source: str, last: int) -> str:
    """The layer at which a source is drawn: that which wrote it; of embeddings and biases none, which the format calls E."""
    match = re.match(r"(?:L|stream)(\d+)", source)
    return "E" if match is None and source in ("embed", "token") else str(min(int(match[1]), last)) if match else "0"


def _place(head: str) -> tuple[int, int]:
    layer, _, number = head[1:].partition("H")
    return int(layer), int(number)


def _node(
    layer: str, feature: int, position: int, label: str, *, kind: str | None = None, **more: Any
) -> dict[str, Any]:
    kind = kind or (LEFT if label.endswith(f".{REST}") else TOKEN if layer == "E" else FEATURE)
    name = f"{layer}_{feature}_{position}"
    return {
        "node_id": name,
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{feature}-{position}",
        "clerp": label,
        "influence": None,
        "activation": None,
        **more,
    }


def _link(source: str, target: str, weight: float) -> dict[str, Any]:
    return {"source": source, "target": target, "weight": weight}
