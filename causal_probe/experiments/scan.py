"""Scan a model for head types, end to end: load it, score every head, read the leading heads' graphs, verify what was flagged."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.check_model import open_model
from causal_probe.experiments.saving import kept
from causal_probe.experiments.scan_sequences import (
    MadeSequences,
    ScannedSequences,
    TextSequences,
    corpus_name,
    sequence_length,
)
from causal_probe.hooks import (
    Corpus,
    HookedModel,
    attention_hook,
    context_length,
    describe,
    missing_shards,
    preflight,
    read_shard,
    to_hooked,
)
from causal_probe.hooks import corpus as open_corpus
from causal_probe.hooks.corpus import IN_MEMORY
from causal_probe.hooks.values import read_values
from causal_probe.models import choose_device
from causal_probe.options import MergeOptions, ScanOptions, takes
from causal_probe.probes import (
    HeadScore,
    HeadScores,
    QKAttributions,
    SequenceComparison,
    SequenceGraphs,
    Template,
    Upstream,
    bootstrap_intervals,
    choose_templates,
    head_graphs,
)
from causal_probe.probes.sequences import longest_ngram
from causal_probe.probes.templates import TEMPLATES
from causal_probe.probes.verification import HeadVerdict, Verification
from causal_probe.probes.verify import verify as verify_heads
from causal_probe.results import (
    Citation,
    csv_text,
    escape,
    to_jsonable,
    versions,
    write_text,
)

__all__ = ["Example", "HeadGraph", "ModelScan", "Row", "scan"]

#: Real text, with names and phrases that come back.
TEXT = (
    "The old keeper of the lighthouse wrote a letter to his sister. The letter said that the lighthouse was cold, that the sea "
    "was grey, and that the old keeper missed his sister."
)
#: What is shown of patterns and graphs: so many heads of a template, ...
SHOWN_HEADS = 3
#: ... and so many in all.
SHOWN_IN_ALL = 12
#: Graphs are compared with their templates' on so many sequences.
GRAPH_SEQUENCES = 8
#: The model is looked at on so many.
CHECKED = 32
#: Heads are taken apart on so many sequences.
CIRCUIT_SEQUENCES = 8


class Row(NamedTuple):
    """A line of the table: a head against a template, whether the template describes it, and the verdict if there is one."""

    score: HeadScore
    called: bool
    verdict: HeadVerdict | None

    @property
    def name(self) -> str:
        """Such as ``"L18H6"``."""
        return _name(self.score.layer, self.score.head)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A sequence, and the patterns of the leading heads on it.

    Attributes
    ----------
    title
        What the sequence is.
    tokens
        Its tokens as texts.
    patterns
        One for each of :attr:`ModelScan.leading`.
    """

    title: str
    tokens: tuple[str, ...]
    patterns: Float[np.ndarray, "_head query key"]


@dataclasses.dataclass(frozen=True, eq=False)
class HeadGraph:
    """A head's graphs beside those of a template.

    Attributes
    ----------
    layer, head, template
        Which head, and the template for which it leads.
    comparison
        On some of the scanned sequences, in the rows that have a target.
    shown
        The graphs of all heads on one sequence that is short enough to be drawn.
    tokens
        That sequence, as texts.
    """

    layer: int
    head: int
    template: Template
    comparison: SequenceComparison
    shown: SequenceGraphs
    tokens: tuple[str, ...]

    @property
    def name(self) -> str:
        """Such as ``"L18H6"``."""
        return _name(self.layer, self.head)


@dataclasses.dataclass(frozen=True, eq=False)
class HeadCircuit:
    """What makes a head attend along its template.

    Attributes
    ----------
    attributions
        The sources, in the query and in the key, of its scores on the template's targets.
    upstream
        The earlier heads that it needs for that, each confirmed by an ablation; one step back.
    """

    attributions: QKAttributions
    upstream: Upstream


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ModelScan:
    """What :func:`scan` found.

    Attributes
    ----------
    scores
        Every head against every template.
    verification
        Whether the model uses what the flagged heads attend to; None if that was not asked for.
    leading
        The heads that are shown, (layer, head): of each template the best that it describes, or its best one.
    examples
        Their patterns on repeated tokens and, where the model has a tokenizer, on English text.
    graphs
        Their graphs. Not of templates that don't look back (``current-token``, ``first-token``).
    circuits
        Of each template's best head, if a template describes it and circuits were asked for: what makes it attend there.
    no_circuits
        Why there are none although they were asked for; None otherwise.
    intervals
        Of a corpus: the bootstrap interval of each head's score and excess (:func:`~causal_probe.probes.bootstrap_intervals`, 95%, in
        the order of ``scores``). None for sequences that were made.
    settings
        All that was asked for. What sequences were made of it: ``scores.settings["tokens"]``.
    timings
        Seconds for ``loading``, ``scanning`` and ``verifying``, and in ``total``.
    """

    RESULT: ClassVar[str] = "scan.json"

    scores: HeadScores
    verification: Verification | None
    leading: tuple[tuple[int, int], ...]
    examples: tuple[Example, ...]
    graphs: tuple[HeadGraph, ...]
    circuits: tuple[HeadCircuit, ...]
    no_circuits: str | None
    intervals: pd.DataFrame | None
    settings: Mapping[str, Any]
    timings: Mapping[str, float]

    def rows(self, template: str) -> tuple[Row, ...]:
        """What is shown of a template: the heads that it describes, at most ``settings["top"]``, and the best that it does not.

        Empty where the score is undefined.
        """
        called = {found[:3] for found in self.scores.called()}
        ordered = self.scores.top(template, sum(self.scores.heads))
        rows = [Row(score, score[:3] in called, self._verdict(score)) for score in ordered]
        first_other = next((index for index, row in enumerate(rows) if not row.called), len(rows))
        top: int = self.settings["top"]
        return tuple(rows[: min(top, first_other + 1)])

    def left_out(self, template: str) -> int:
        """How many heads a template describes that :meth:`rows` leaves out."""
        called = sum(found.template == template for found in self.scores.called())
        return called - sum(row.called for row in self.rows(template))

    @property
    def readings(self) -> tuple[Mapping[str, Any], ...]:
        """Of a corpus: what was read (:attr:`causal_probe.hooks.CorpusPass.reading`)."""
        return tuple(made for made in self.scores.settings["tokens"] if made["kind"] == "corpus")

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known beside the table: what was read of a corpus, templates that coincide, scores that are undefined, joint effects."""
        notes = [_read(reading) for reading in self.readings]
        notes += [
            f"{' and '.join(group)} coincide: the same targets on these sequences, so no score can tell them apart."
            for group in self.scores.coinciding
        ]
        notes += [f"{reason}." for reason in self.scores.undefined.values()]
        if self.verification is not None:
            for joint in (each for each in self.verification.joint.values() if len(each.heads) > 1):
                beyond = "" if joint.exceeds is None else f", more than {joint.exceeds:.0%} of random sets of as many"
                notes.append(
                    f"{joint.template}: ablating the {len(joint.heads)} flagged heads together raises the loss by "
                    f"{joint.effect.value:.2f} ± {joint.effect.stderr:.2f} nats{beyond}."
                )
        return tuple(notes)

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        s = self.settings
        if s["source"] == "merged":
            return MergeOptions.call("merge_scans", s, repr(s["merged"]))
        shown = {"corpus": "corpus"} if str(s["corpus"]).startswith(IN_MEMORY) else {}
        return ScanOptions.call("scan", s, repr(s["model"]) if s["source"] == "loaded" else "model", **shown)

    def to_pandas(self) -> pd.DataFrame:
        """One row for each head and template: :meth:`HeadScores.to_pandas`, ``called``, what was verified, and where it is from."""
        table = self.scores.to_pandas()
        called = {found[:3] for found in self.scores.called()}
        table["called"] = [found[:3] in called for found in self.scores]
        if self.verification is not None:
            verdicts = [self._verdict(found) for found in self.scores]
            table["verdict"] = [None if found is None else found.verdict for found in verdicts]
            table["effect"] = [np.nan if found is None else found.effect.value for found in verdicts]
            table["effect_stderr"] = [np.nan if found is None else found.effect.stderr for found in verdicts]
        if self.intervals is not None:
            table[list(LIMITS)] = self.intervals[list(LIMITS)]
        provenance = self.scores.provenance
        for name in ("model", "dtype", "device"):
            table[name] = provenance[name]
        table["seed"] = self.settings["seed"]
        table["causal_probe"] = provenance["versions"].get("causal-probe")
        return table

    def to_dict(self) -> dict[str, Any]:
        """The content of ``scan.json``, in plain JSON types.

        ``model``, ``heads`` (one entry for each head and template; ``effect``, ``effect_stderr`` and ``verdict`` for those that were
        verified), ``coinciding``, ``undefined``, ``graphs``, ``tokens`` (the sequences that were made), ``settings``, ``versions``
        and, if it was asked for, ``verification``.
        """
        about = self.scores.provenance
        called = {found[:3] for found in self.scores.called()}
        heads = []
        limits: list[dict[str, Any]] = [{}] * len(self.scores.scores)
        if self.intervals is not None:
            each = self.intervals[list(LIMITS)].to_dict("records")
            limits = [{name: None if pd.isna(value) else value for name, value in one.items()} for one in each]
        for found, low_high in zip(self.scores, limits, strict=True):
            verdict = self._verdict(found)
            checked: dict[str, Any] = dict(low_high)
            if verdict is not None:
                checked |= {
                    "effect": verdict.effect.value,
                    "effect_stderr": verdict.effect.stderr,
                    "verdict": verdict.verdict,
                }
            heads.append({**found._asdict(), "called": found[:3] in called, **checked})
        graphs = [
            {
                "layer": found.layer,
                "head": found.head,
                "template": found.template.name,
                "sink": found.shown.sink,
                "sequences": len(found.comparison.each),
                "precision": found.comparison.precision,
                "recall": found.comparison.recall,
            }
            for found in self.graphs
        ]
        verification = {} if self.verification is None else {"verification": self.verification.to_dict()}
        circuits: dict[str, Any] = {}
        if self.settings["attributions"]:
            each = [
                {"attributions": found.attributions.top(20).to_dict("records"), "upstream": found.upstream.to_dict()}
                for found in self.circuits
            ]
            circuits = {"circuits": each}
            circuits |= {} if self.no_circuits is None else {"no_circuits": self.no_circuits}
        return dict(
            to_jsonable(
                {
                    "kind": "scan",
                    "format": 1,
                    **{name: about[name] for name in ("model", "dtype", "device")},
                    "heads": heads,
                    "coinciding": self.scores.coinciding,
                    "undefined": self.scores.undefined,
                    "graphs": graphs,
                    "tokens": self.scores.settings["tokens"],
                    **verification,
                    **circuits,
                    "seconds": self.timings["total"],
                    "timings": self.timings,
                    "settings": self.settings,
                    "versions": versions(),
                }
            )
        )

    def write_data(self, folder: Path) -> None:
        """Write ``scan.csv`` beside the JSON; of a corpus also ``scores.safetensors``, the sums of each sequence, with which other shards
        are merged (:func:`merge_scans`).
        """
        write_text(folder / "scan.csv", csv_text(self.to_pandas()))
        if self.readings:
            self.scores.save(folder / SCORES)

    def cite(self) -> Citation:
        """The papers behind this result, and what a methods section may say."""
        citation = self.scores.cite()
        if self.verification is None or not self.verification.verdicts:
            return citation
        verified = self.verification.cite()
        entries = [citation.bibtex, *(verified.bibtex,) * (verified.bibtex not in citation.bibtex)]
        return Citation("\n\n".join(entries), f"{citation.methods} {verified.methods}")

    def __repr__(self) -> str:
        cells = [self._header, *self._cells()]
        widths = [max(len(row[column]) for row in cells if len(row) > 1) for column in range(len(self._header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in cells
        ]
        return "\n".join([self._title(), *(f"  {line}" for line in (*lines, *self.notes, *self._legend()))])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

        notes = "".join(f"<p>{escape(note)}</p>" for note in (*self.notes, *self._legend()))
        return (
            f"<table><caption>{escape(self._title())}</caption><thead>{line(self._header, 'th')}</thead>"
            f"<tbody>{''.join(line(cells, 'td') for cells in self._cells())}</tbody></table>{notes}"
        )

    def _title(self) -> str:
        heads = self.scores.heads
        return f"Scan of {self.scores.provenance['model']}: {sum(heads)} heads in {len(heads)} layers"

    def interval(self, score: HeadScore) -> str:
        """The bootstrap interval of a head's excess as it is shown: ``"0.31 to 0.35"``, empty where there is none."""
        if self.intervals is None:
            return ""
        place = self.intervals[list(score._fields[:3])].eq(list(score[:3])).all(axis=1)
        low, high = self.intervals.loc[place, ["excess_low", "excess_high"]].iloc[0]
        return "" if pd.isna(low) else f"{low:.3f} to {high:.3f}"

    @property
    def _header(self) -> tuple[str, ...]:
        return HEADER if self.intervals is None else (*HEADER[:5], "95% interval", *HEADER[5:])

    def _cells(self) -> Iterator[tuple[str, ...]]:
        for template in self.scores.names:
            rows = self.rows(template)
            if not rows:
                yield (template, "-", *[""] * (len(self._header) - 2))
            for row in rows:
                score, verdict = row.score, row.verdict
                error = "" if score.excess_stderr is None else f" ± {score.excess_stderr:.3f}"
                yield (
                    template,
                    row.name,
                    f"{score.score:.3f}",
                    f"{score.chance:.3f}",
                    f"{score.excess:.3f}{error}",
                    *([] if self.intervals is None else [self.interval(score)]),
                    f"{score.sink:.3f}",
                    "yes" if row.called else "no",
                    "" if verdict is None else verdict.verdict,
                    "" if verdict is None else f"{verdict.effect.value:.3f} ± {verdict.effect.stderr:.3f}",
                )
            if more := self.left_out(template):
                yield (f"{template}: {more} more",)

    def _legend(self) -> list[str]:
        legend = [
            "called: an excess above 0.5 by three standard errors. It says where a head attends, not that the model uses it."
        ]
        if self.intervals is not None:
            legend.append("95% interval: of the excess, by the bootstrap over sequences.")
        if self.verification is not None:
            legend.append("effect: rise of the loss in nats when the head's output is replaced by its mean.")
        return legend

    def _verdict(self, score: HeadScore) -> HeadVerdict | None:
        return None if self.verification is None else self.verification.of(*score[:3])


HEADER = ("template", "head", "score", "chance", "excess", "sink", "called", "verdict", "effect")

#: The sums of each sequence of a corpus.
SCORES = "scores.safetensors"
#: Of each head its intervals on a corpus.
LIMITS = ("score_low", "score_high", "excess_low", "excess_high")


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
    started = time.perf_counter()
    wanted = None if o.templates is None else choose_templates(o.templates)
    i, n = read_shard(o.shard)
    is_named = isinstance(model, (str, os.PathLike))
    if not is_named:
        hooked: HookedModel = to_hooked(model)
        described = describe(hooked)
    settings = o.settings(
        model=os.fspath(model) if is_named else described["model"],
        source="loaded" if is_named else "given",
        templates=None if wanted is None else _texts(o.templates),
        corpus=corpus_name(o.corpus),
        shard=f"{i}/{n}",
        dtype=o.dtype if is_named else described["dtype"],
        device=str(choose_device(o.device)) if is_named else described["device"],
    )
    with kept(o, settings, result=ModelScan.RESULT) as save_result:
        if is_named:
            hooked, _ = open_model(model, dtype=o.dtype, device=o.device)
        loaded = time.perf_counter()

        checked = ("pattern", "z") if o.verify else ("pattern",)
        text: Corpus | None = None
        make: ScannedSequences
        if o.corpus is None:
            options: dict[str, Any] = {"n_sequences": o.n_sequences, "period": o.period, "bos": o.bos, "seed": o.seed}
            make = MadeSequences(hooked, options, TEMPLATES.values() if wanted is None else wanted)
            preflight(hooked, make.scanned(_kind(wanted), CHECKED), hooks=checked)
            scores = probes.scan(hooked, templates=wanted, batch_size=o.batch_size, **options)
        else:
            fits = sequence_length(hooked, o.length)
            text = open_corpus(
                hooked, o.corpus, length=fits, bos=o.bos, separator=o.separator, field=o.field, shard=(i, n)
            )
            make = TextSequences(text)
            if len(first := text.first(CHECKED)):
                preflight(hooked, first, hooks=checked)
            scores = probes.scan(hooked, text, templates=wanted, batch_size=o.batch_size)
        leading = _leading(scores)
        result = ModelScan(
            scores=scores,
            verification=None,
            leading=tuple(dict.fromkeys((layer, head) for layer, head, _ in leading))[:SHOWN_IN_ALL],
            examples=(),
            graphs=tuple(_graphs(hooked, scores, make, leading, o.batch_size)),
            circuits=(),
            no_circuits=None,
            intervals=None if text is None else bootstrap_intervals(scores),
            settings=settings,
            timings={},
        )
        kind = scores.settings["tokens"][0]["kind"]
        result = dataclasses.replace(result, examples=tuple(_examples(hooked, make, kind, result.leading)))
        if o.attributions:
            circuits, why = _circuits(hooked, scores, make)
            result = dataclasses.replace(result, circuits=circuits, no_circuits=why)
        scanned = time.perf_counter()
        if o.verify:
            # A head's output is also replaced by that in another sequence of its batch: there must be one.
            size = None if o.batch_size is None else max(2, o.batch_size)
            verification = verify_heads(scores, hooked, batch_size=size, progress=o.progress)
            result = dataclasses.replace(result, verification=verification)
        ended = time.perf_counter()
        timings = {
            "loading": loaded - started,
            "scanning": scanned - loaded,
            "verifying": ended - scanned,
            "total": ended - started,
        }
        result = dataclasses.replace(result, timings=timings)
        save_result(result)
    return result


def _read(reading: Mapping[str, Any]) -> str:
    """What was read of a corpus, in a sentence."""
    missing = missing_shards(reading)
    sources = reading["source"] if isinstance(reading["source"], str) else ", ".join(reading["source"])
    left = reading["left_over"] / reading["tokens"] if reading["tokens"] else 0
    part = f" Not read: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}." if missing else ""
    return (
        f"Read of {sources}: {reading['documents']:,} documents, {reading['sequences']:,} sequences of {reading['length']} tokens; "
        f"{reading['left_over']:,} of {reading['tokens']:,} tokens ({left:.1%}), the ends of documents that fill no sequence, are left "
        f"out.{part}"
    )


def _texts(templates: str | Template | Iterable[str | Template] | None) -> list[str]:
    listed = [templates] if isinstance(templates, (str, Template)) else list(templates or ())
    return [each.name if isinstance(each, Template) else each for each in listed]


def _kind(templates: tuple[Template, ...] | None) -> str:
    """The kind of sequences that the first of these templates, or the shipped ones, are scored on."""
    kinds = ["repeated"] if templates is None else [template.kind for template in templates]
    n = longest_ngram(kinds)
    return "repeated" if "repeated" in kinds else kinds[0] if n is None else f"{n}-gram"


# ----------------------------------------------------------------------------------------------------------- what is shown


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
    batch_size: int | None,
) -> Iterator[HeadGraph]:
    templates = {template.name: template for template in scores.templates}
    for made in scores.settings["tokens"]:
        its = [found for found in leading if found[2] in made["templates"]]
        if not its:
            continue
        scanned, short = make.scanned(made["kind"], GRAPH_SEQUENCES), make.shown(made["kind"])
        graphs = head_graphs(model, scanned, per="sequence", batch_size=batch_size)
        shown = head_graphs(model, short, per="sequence")
        for layer, head, name in sorted(its, key=lambda found: scores.names.index(found[2])):
            comparison = graphs.compare(templates[name], layer, head)
            yield HeadGraph(layer, head, templates[name], comparison, shown, _words(model, short[0]))


def _circuits(
    model: HookedModel, scores: HeadScores, make: ScannedSequences
) -> tuple[tuple[HeadCircuit, ...], str | None]:
    """Of each template's best head, if it describes it; or none, and why."""
    called = {found[:3] for found in scores.called()}
    circuits = []
    for made in scores.settings["tokens"]:
        tokens = make.scanned(made["kind"], CIRCUIT_SEQUENCES)
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
    yield Example(make.title, _words(model, tokens), _patterns(model, tokens, leading))
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        start = make.start(kind)
        text = [*start, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]][: context_length(model)]
        tokens = torch.tensor(text, device=tokens.device)
        yield Example("English text", _words(model, tokens), _patterns(model, tokens, leading))


def _patterns(
    model: HookedModel, tokens: Int[Tensor, " pos"], heads: Sequence[tuple[int, int]]
) -> Float[np.ndarray, "_head query key"]:
    names = [attention_hook(layer, "pattern") for layer, _ in heads]
    found = read_values(model, tokens[None], names, n_layers=1 + max(layer for layer, _ in heads))
    return np.stack([found[name][0, head].float().cpu().numpy() for name, (_, head) in zip(names, heads, strict=True)])


def _words(model: HookedModel, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
    tokenizer = getattr(model, "tokenizer", None)
    ids = [int(token) for token in tokens]
    return tuple(str(token) if tokenizer is None else tokenizer.decode([token]) for token in ids)


def _name(layer: int, head: int) -> str:
    return f"L{layer}H{head}"
