"""The result of a scan: the heads that stand out, their graphs, what makes them attend there, and whether the model uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Float

from causal_probe.hooks.corpus import IN_MEMORY, missing_shards
from causal_probe.options.scan import MergeOptions, ScanOptions
from causal_probe.probes import Template
from causal_probe.probes.head_scores import HeadScore, HeadScores
from causal_probe.probes.qk_attributions import QKAttributions
from causal_probe.probes.sequence_graphs import SequenceComparison, SequenceGraphs
from causal_probe.probes.upstream_heads import Upstream
from causal_probe.probes.verification import HeadVerdict, Verification
from causal_probe.results import BINARY, Result, Table

__all__ = ["SCORES", "Example", "HeadCircuit", "HeadGraph", "ModelScan", "Row"]

#: The sums of each sequence of a corpus.
SCORES = "scores.safetensors"
#: Of each head its intervals on a corpus.
LIMITS = ("score_low", "score_high", "excess_low", "excess_high")
#: So many pairs of sources stand in the JSON.
STRONGEST = 20


class Row(NamedTuple):
    """A line of the table: a head against a template, whether the template describes it, and the verdict if there is one."""

    score: HeadScore
    called: bool
    verdict: HeadVerdict | None

    @property
    def name(self) -> str:
        """Such as ``"L18H6"``."""
        return f"L{self.score.layer}H{self.score.head}"


@dataclass(frozen=True, eq=False)
class Example:
    """A sequence, and the patterns of the leading heads on it.

    Attributes
    ----------
    title
        A description of the sequence.
    tokens
        Its tokens as texts.
    patterns
        One for each of :attr:`ModelScan.leading`.
    """

    title: str
    tokens: tuple[str, ...]
    patterns: Float[np.ndarray, "_head query key"] = field(metadata=BINARY)


@dataclass(frozen=True, eq=False)
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
    truth
        The template's graph there.
    tokens
        That sequence, as texts.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("agreement",)

    layer: int
    head: int
    template: Template
    comparison: SequenceComparison = field(metadata=BINARY)
    shown: SequenceGraphs = field(metadata=BINARY)
    truth: nx.DiGraph = field(metadata=BINARY)
    tokens: tuple[str, ...] = field(metadata=BINARY)

    @property
    def name(self) -> str:
        """Such as ``"L18H6"``."""
        return f"L{self.layer}H{self.head}"

    @property
    def agreement(self) -> dict[str, float | str | None]:
        """Precision and recall of the comparison, over how many sequences, and what is made of the attention on position 0."""
        found = self.comparison
        said = {"precision": found.precision, "recall": found.recall, "n_sequences": len(found.each)}
        return {**said, "sink": self.shown.sink}


@dataclass(frozen=True, eq=False)
class HeadCircuit:
    """The sources that make a head attend along its template.

    Attributes
    ----------
    attributions
        The sources, in the query and in the key, of its scores on the template's targets.
    upstream
        The earlier heads that it needs for that, each confirmed by an ablation; one step back.
    """

    DERIVED: ClassVar[tuple[str, ...]] = ("strongest",)

    attributions: QKAttributions = field(metadata=BINARY)
    upstream: Upstream

    @property
    def strongest(self) -> list[dict[str, Any]]:
        """The pairs of sources that contribute most."""
        return [
            {str(name): None if pd.isna(value) else value for name, value in row.items()}
            for row in self.attributions.top(STRONGEST).to_dict("records")
        ]


def _said_of(circuit: HeadCircuit) -> str:
    """A circuit in a line."""
    its, best = circuit.attributions, circuit.strongest[0]
    earlier = [f"{arrow.source} ({arrow.side})" for arrow in circuit.upstream.arrows if arrow.confirmed]
    return (
        f"L{its.layer}H{its.head} on {its.edges}: most of its score, {best['contribution']:.2f} of {its.total:.2f}, is from {best['query']} in the "
        f"query and {best['key']} in the key; confirmed before it: {', '.join(earlier) or 'no head'}."
    )


@dataclass(frozen=True, eq=False, repr=False)
class ModelScan(Result):
    """The result of :func:`~causal_probe.experiments.scan`.

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
        Of a corpus: the bootstrap interval of each head's score and excess (:func:`~causal_probe.probes.bootstrap.bootstrap_intervals`, 95%, in
        the order of ``scores``). None for sequences that were made.
    timings
        Seconds for ``loading``, ``scanning`` and ``verifying``, and in ``total``.
    """

    KIND = "scan"
    DERIVED = ("heads", "coinciding", "tokens")
    RESULT: ClassVar[str] = "scan.json"

    scores: HeadScores = field(metadata=BINARY)
    verification: Verification | None = None
    leading: tuple[tuple[int, int], ...] = ()
    examples: tuple[Example, ...] = ()
    graphs: tuple[HeadGraph, ...] = ()
    circuits: tuple[HeadCircuit, ...] = ()
    no_circuits: str | None = None
    intervals: pd.DataFrame | None = field(default=None, metadata=BINARY)
    timings: Mapping[str, float] = field(default_factory=dict)

    def rows(self, template: str) -> tuple[Row, ...]:
        """The heads shown for a template: those that it describes, at most ``settings["top"]``, and the best that it does not.

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
    def coinciding(self) -> tuple[tuple[str, ...], ...]:
        """Templates that no score can tell apart."""
        return self.scores.coinciding

    @property
    def tokens(self) -> tuple[Mapping[str, Any], ...]:
        """The sequences that were made or read."""
        return tuple(self.scores.settings["tokens"])

    @property
    def readings(self) -> tuple[Mapping[str, Any], ...]:
        """Of a corpus: what was read (:attr:`causal_probe.hooks.CorpusPass.reading`)."""
        return tuple(made for made in self.tokens if made["kind"] == "corpus")

    @property
    def heads(self) -> list[dict[str, Any]]:
        """One entry for each head and template, in the order of ``scores``.

        With ``called``, the limits of a corpus' intervals, and ``effect``, ``effect_stderr`` and ``verdict`` of those that were verified.
        """
        called = {found[:3] for found in self.scores.called()}
        limits: list[dict[str, Any]] = [{}] * len(self.scores.scores)
        if self.intervals is not None:
            each = self.intervals[list(LIMITS)].to_dict("records")
            limits = [{str(name): None if pd.isna(value) else value for name, value in one.items()} for one in each]
        heads = []
        for found, low_high in zip(self.scores, limits, strict=True):
            checked: dict[str, Any] = {}
            if (verdict := self._verdict(found)) is not None:
                effect = verdict.effect
                checked = {"effect": effect.value, "effect_stderr": effect.stderr, "verdict": verdict.verdict}
            heads.append({**found._asdict(), "called": found[:3] in called, **low_high, **checked})
        return heads

    @property
    def undefined(self) -> dict[str, str]:
        """The templates without a score, and why."""
        return self.scores.undefined

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes under the table: what was read of a corpus, templates that coincide, undefined scores, joint effects."""
        notes = [_read(reading) for reading in self.readings]
        notes += [
            f"{' and '.join(group)} coincide: the same targets on these sequences, so no score can tell them apart."
            for group in self.coinciding
        ]
        notes += [f"{self.undefined[name]}." for name in self.scores.names if name in self.undefined]
        if self.verification is not None:
            for joint in (each for each in self.verification.joint.values() if len(each.heads) > 1):
                beyond = "" if joint.exceeds is None else f", more than {joint.exceeds:.0%} of random sets of as many"
                notes.append(
                    f"{joint.template}: ablating the {len(joint.heads)} flagged heads together raises the loss by "
                    f"{joint.effect.value:.2f} ± {joint.effect.stderr:.2f} nats{beyond}."
                )
            notes += [f"{note}." for note in self.verification.notes]
            if "verdicts" in self.verification.undefined:
                notes.append(f"No verdicts: {self.verification.undefined['verdicts']}.")
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
            table["effect"] = [np.nan if found is None else found.shown.value for found in verdicts]
            table["effect_stderr"] = [np.nan if found is None else found.shown.stderr for found in verdicts]
        if self.intervals is not None:
            table[list(LIMITS)] = self.intervals[list(LIMITS)]
        provenance = self.scores.provenance
        for name in ("model", "dtype", "device"):
            table[name] = provenance[name]
        table["seed"] = self.settings["seed"]
        table["causal_probe"] = provenance["versions"].get("causal-probe")
        return table

    @property
    def works(self) -> tuple[str, ...]:
        """Those of the templates, and of the verdicts where there are any."""
        return tuple(dict.fromkeys(work for part in self._cited for work in part.works))

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return " ".join(part.methods for part in self._cited)

    @property
    def _cited(self) -> list[Result]:
        return [
            self.scores,
            *([self.verification] if self.verification is not None and self.verification.verdicts else []),
        ]

    def interval(self, score: HeadScore) -> str:
        """The bootstrap interval of a head's excess as it is shown: ``"0.31 to 0.35"``, empty where there is none."""
        if self.intervals is None:
            return ""
        place = self.intervals[list(score._fields[:3])].eq(list(score[:3])).all(axis=1)
        low, high = self.intervals.loc[place, ["excess_low", "excess_high"]].iloc[0]
        return "" if pd.isna(low) else f"{low:.3f} to {high:.3f}"

    def table(self) -> Table:
        """Of each template the heads that it describes, and the best that it does not."""
        interval = [] if self.intervals is None else ["95% interval"]
        checked = [] if self.verification is None else ["verdict", "effect (nats)"]
        nothing = ["nothing"] * self.scores.to_nothing
        columns = ["template", "head", "score", "chance", "excess", *interval, "sink", *nothing, *checked, "called"]
        cells: list[list[object]] = []
        for name in self.scores.names:
            rows = self.rows(name)
            for row in rows:
                s, verdict = row.score, row.verdict
                error = "" if s.excess_stderr is None else f" ± {s.excess_stderr:.3f}"
                told: list[object] = [] if self.verification is None else [self.verification.unflagged_are, None]
                if verdict is not None:
                    told = [verdict.verdict, f"{verdict.shown.value:.3f} ± {verdict.shown.stderr:.3f}"]
                cells.append(
                    [name, row.name, f"{s.score:.3f}", f"{s.chance:.3f}", f"{s.excess:.3f}{error}", *[self.interval(s)] * len(interval),
                     f"{s.sink:.3f}", *[f"{s.nothing:.3f}"] * len(nothing), *told, "yes" if row.called else "no"]
                )  # fmt: skip
            if not rows:
                cells.append([name, "-", *[None] * (len(columns) - 2)])
        heads = self.scores.heads
        return Table(
            f"Scan of {self.scores.provenance['model']}: {sum(heads)} heads in {len(heads)} layers",
            columns,
            cells,
            [
                *(f"{name}: {more} more" for name in self.scores.names if (more := self.left_out(name))),
                *self.notes,
                *map(_said_of, self.circuits),
                *([] if self.no_circuits is None else [f"The scores could not be taken apart. {self.no_circuits}"]),
                "called: an excess above 0.5 by three standard errors. It says where a head attends, not that the model uses it.",
                *["95% interval: of the excess, by the bootstrap over sequences."] * len(interval),
                *([] if self.verification is None else [self.verification.legend]),
            ],
            shown=len(cells),
        )

    def write_data(self, folder: Path) -> None:
        """Write ``scan.csv`` beside the JSON; of a corpus also ``scores.safetensors``, the sums of each sequence, with which other shards
        are merged (:func:`~causal_probe.experiments.merge_scans`).
        """
        self.save(folder / "scan.csv")
        if self.readings:
            self.scores.save(folder / SCORES)

    def _verdict(self, score: HeadScore) -> HeadVerdict | None:
        return None if self.verification is None else self.verification.of(*score[:3])


def _read(reading: Mapping[str, Any]) -> str:
    """The parts of a corpus that were read, in a sentence."""
    missing = missing_shards(reading)
    sources = reading["source"] if isinstance(reading["source"], str) else ", ".join(reading["source"])
    left = reading["left_over"] / reading["tokens"] if reading["tokens"] else 0
    part = f" Not read: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}." if missing else ""
    return (
        f"Read of {sources}: {reading['documents']:,} documents, {reading['sequences']:,} sequences of {reading['length']} tokens; "
        f"{reading['left_over']:,} of {reading['tokens']:,} tokens ({left:.1%}), the ends of documents that fill no sequence, are left "
        f"out.{part}"
    )
