"""Scan a model for head types, end to end: load it, score every head, read the leading heads' graphs, verify what was flagged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.model_scan import Example, HeadCircuit, HeadGraph, ModelScan
from causal_probe.experiments.opening import model_settings, open_model
from causal_probe.experiments.saving import Clock, kept
from causal_probe.experiments.scan_sequences import (
    MadeSequences,
    ScannedSequences,
    TextSequences,
    corpus_name,
    sequence_length,
)
from causal_probe.experiments.show_called import patterns_of, words_of
from causal_probe.hooks import corpus as open_corpus
from causal_probe.hooks.batches import OfText
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.corpus import read_shard
from causal_probe.hooks.preflight import context_length, require_measurable
from causal_probe.options import takes
from causal_probe.options.scan import ScanOptions
from causal_probe.probes import Rule, Template, head_graphs, verify
from causal_probe.probes.bootstrap import bootstrap_intervals
from causal_probe.probes.head_scores import HeadScores
from causal_probe.probes.scan import made_parts, read_corpus, scored
from causal_probe.probes.sequence_graphs import LargestParents
from causal_probe.probes.template_choice import choose_templates
from causal_probe.probes.templates import TEMPLATES, find_templates

__all__ = ["scan"]

#: Real text, with names and phrases that come back.
TEXT = (
    "The old keeper of the lighthouse wrote a letter to his sister. The letter said that the lighthouse was cold, that the sea "
    "was grey, and that the old keeper missed his sister."
)
#: Heads shown for each template, ...
SHOWN_HEADS = 3
#: ... and heads shown in total.
SHOWN_IN_ALL = 12
#: Sequences on which the model is checked before it is scanned.
CHECKED = 32
#: Sequences on which heads' scores are taken apart.
CIRCUIT_SEQUENCES = 8


@takes(ScanOptions)
def scan(model: Any, o: ScanOptions) -> ModelScan:
    """Score every head of a model against head types, read the leading heads' graphs, and verify what was flagged.

    :func:`causal_probe.probes.scan` with what surrounds it: the model is loaded and looked at first, and the result prints, and
    saves itself with a report. Made sequences are those of :func:`~causal_probe.probes.repeated_tokens`, a corpus is read by
    :func:`~causal_probe.hooks.corpus`; what was flagged is verified by :func:`causal_probe.probes.verify.verify`, and scores are taken
    apart by :func:`~causal_probe.probes.qk_attributions` and :func:`~causal_probe.probes.upstream`.

    Raises
    ------
    CausalProbeError
        For any argument that can't be worked with, and a model whose attention can't be measured, with every reason
        (:func:`causal_probe.hooks.preflight`). Nothing is written then.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=12, n_positions=24)
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    >>> [(row.name, row.called) for row in scan(model, templates="previous-token", n_sequences=4).rows("previous-token")]
    [('L0H0', True), ('L1H0', False)]
    """
    clock = Clock()
    wanted = None if o.templates is None else choose_templates(o.templates)
    i, n = read_shard(o.shard)
    hooked, about = model_settings(model, o)
    settings = o.settings(
        **about,
        templates=None if wanted is None else _texts(o.templates),
        corpus=corpus_name(o.corpus),
        shard=f"{i}/{n}",
    )
    with kept(o, settings, ModelScan) as saved:
        if hooked is None:
            hooked, _ = open_model(model, dtype=o.dtype, device=o.device)
        clock.spent_on("loading")
        checked = ("pattern", "z") if o.verify else ("pattern",)
        templates = find_templates(TEMPLATES if wanted is None else wanted)
        make: ScannedSequences
        if o.corpus is None:
            options = {"n_sequences": o.n_sequences, "period": o.period, "bos": o.bos, "seed": o.seed}
            parts = made_parts(hooked, templates, options, optional=wanted is None)
            make = MadeSequences(hooked, options, templates, parts)
            require_measurable(hooked, parts[0][1][:CHECKED], checked, edits=False)
            beside = {about["kind"]: LargestParents() for _, _, about in parts}
            scores = scored(hooked, templates, parts, batch_size=o.batch_size, progress=o.progress, beside=beside)
        else:
            reading: dict[str, Any] = {"bos": o.bos, "separator": o.separator, "field": o.field, "shard": (i, n)}
            text = open_corpus(hooked, o.corpus, length=sequence_length(hooked, o.length), **reading)
            make = TextSequences(text)
            if len(first := text.first(CHECKED)):
                require_measurable(hooked, first, checked, edits=False)
            beside = {"corpus": LargestParents()}
            scores = read_corpus(hooked, templates, text, batch_size=o.batch_size, progress=o.progress, beside=beside)
        leading = _leading(scores)
        shown = tuple(dict.fromkeys((layer, head) for layer, head, _ in leading))[:SHOWN_IN_ALL]
        found: dict[str, Any] = {
            "leading": shown,
            "graphs": tuple(_graphs(hooked, scores, make, leading, beside)),
            "intervals": None if o.corpus is None else bootstrap_intervals(scores),
            "examples": tuple(_examples(hooked, make, scores.settings["tokens"][0]["kind"], shown)),
        }
        if o.attributions:
            found["circuits"], found["no_circuits"] = _circuits(hooked, scores, make)
        clock.spent_on("scanning")
        if o.verify:
            # A head's output is also replaced by that in another sequence of its batch: there must be one.
            size = None if o.batch_size is None else max(2, o.batch_size)
            found["verification"] = verify(
                scores, hooked, rule=Rule(delta=o.delta), exhaustive=o.exhaustive, batch_size=size, progress=o.progress
            )
        clock.spent_on("verifying")
        return saved(ModelScan(scores, **found, timings=clock.timings, settings=settings, provenance=scores.provenance))


def _texts(templates: str | Template | Iterable[str | Template] | None) -> list[str]:
    listed = [templates] if isinstance(templates, (str, Template)) else list(templates or ())
    return [each.name if isinstance(each, Template) else each for each in listed]


# -------------------------------------------------------------------------------------------------------------- shown examples


def _leading(scores: HeadScores) -> list[tuple[int, int, str]]:
    """(layer, head, template): of each template the best heads that it describes, or the best one."""
    called = {found[:3] for found in scores.called()}
    leading = []
    for template in scores.templates:
        best = [found[:3] for found in scores.top(template.name, SHOWN_HEADS)]
        described = [found for found in best if found in called]
        if template.looks_back:
            leading += described or best[:1]
    # By rank, then template, so that where not all fit each template's best are in.
    rank = {found: sum(other[2] == found[2] for other in leading[:index]) for index, found in enumerate(leading)}
    return sorted(leading, key=lambda found: rank[found])


def _graphs(
    model: HookedModel,
    scores: HeadScores,
    make: ScannedSequences,
    leading: Sequence[tuple[int, int, str]],
    beside: Mapping[str, LargestParents],
) -> Iterator[HeadGraph]:
    templates = {template.name: template for template in scores.templates}
    for made in scores.settings["tokens"]:
        its = [found for found in leading if found[2] in made["templates"]]
        if not its:
            continue
        short = make.shown(made["kind"])
        graphs = beside[made["kind"]].graphs("root", describe(model))
        shown = head_graphs(model, OfText(model, short), per="sequence")
        for layer, head, name in sorted(its, key=lambda found: scores.names.index(found[2])):
            comparison = graphs.compare(templates[name], layer, head)
            truth = _truth(templates[name], short)
            yield HeadGraph(layer, head, templates[name], comparison, shown, truth, words_of(model, short[0]))


def _truth(template: Template, tokens: Int[Tensor, "one pos"]) -> nx.DiGraph:
    """A template's graph of a sequence."""
    targets = template(tokens)[0].tril(-1).cpu().numpy()
    truth = nx.empty_graph(len(targets), create_using=nx.DiGraph)
    truth.add_edges_from((int(parent), int(child)) for child, parent in np.argwhere(targets))
    return truth


def _circuits(
    model: HookedModel, scores: HeadScores, make: ScannedSequences
) -> tuple[tuple[HeadCircuit, ...], str | None]:
    """Of each template's best head, if it describes it; or none, and why."""
    called = {found[:3] for found in scores.called()}
    circuits = []
    for made in scores.settings["tokens"]:
        tokens = OfText(model, make.scanned(made["kind"], CIRCUIT_SEQUENCES))
        for template in (each for each in scores.templates if each.name in made["templates"]):
            best = next(iter(scores.top(template.name, 1)), None)
            if best is None or best[:3] not in called or not template.looks_back:
                continue
            place = (best.layer, best.head)
            try:
                found = probes.qk_attributions(model, tokens, *place, edges=template)
                back = probes.upstream(model, tokens, *place, edges=template, depth=1)
            except CausalProbeError as error:  # a model whose scores are no sum over pairs of sources
                return (), str(error)
            circuits.append(HeadCircuit(found, back))
    return tuple(circuits), None


def _examples(
    model: HookedModel, make: ScannedSequences, kind: str, leading: Sequence[tuple[int, int]]
) -> Iterator[Example]:
    if not leading:
        return
    tokens = make.shown(kind)[0]
    yield Example(make.title, words_of(model, tokens), patterns_of(model, tokens, leading))
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        start = make.start(kind)
        text = [*start, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]][: context_length(model)]
        tokens = torch.tensor(text, device=tokens.device)
        yield Example("English text", words_of(model, tokens), patterns_of(model, tokens, leading))
