"""How much of its attention every head puts where a head of each type would."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import merge_readings
from causal_probe.probes.template_sums import TemplateSums
from causal_probe.probes.templates import Template, recall_template
from causal_probe.results import Citation, cite, escape, read_arrays, to_jsonable, versions, write_arrays

__all__ = ["CALLED", "HeadScore", "HeadScores"]

#: A head is called what a template says if its excess is surely above this: of what chance leaves to be explained, more is on
#: the targets than elsewhere.
CALLED = 0.5
#: "Surely": by so many standard errors.
SURELY = 3.0
#: What a file of :meth:`HeadScores.save` says that it is.
KIND, FORMAT = "head scores", 1


class HeadScore(NamedTuple):
    """One head against one template. What is undefined is None.

    Attributes
    ----------
    layer, head
        Counted from 0.
    template
        The template's name.
    score
        Attention on the targets, in [0, 1]: the mean over the scored rows of a sequence, then over sequences.
    chance
        The score of a head that attends uniformly to what it sees: the same mean of |targets| / (query + 1).
    excess
        (score - chance) / (1 - chance): 1 for a perfect head, 0 at chance, negative below.
    stderr
        Standard error of ``score`` over sequences; None for one sequence.
    excess_stderr
        Standard error of ``excess`` (a ratio of means, by the delta method); None for one sequence.
    sink
        Attention on position 0, in [0, 1], on the same rows.
    rows
        Number of scored rows: those that have a target, and see a key that is none.
    sequences
        Number of sequences with a scored row. Others say nothing and are left out.
    """

    layer: int
    head: int
    template: str
    score: float | None
    chance: float | None
    excess: float | None
    stderr: float | None
    excess_stderr: float | None
    sink: float | None
    rows: int
    sequences: int


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """What :func:`~causal_probe.probes.scan` found: every head of a model against every template.

    Attributes
    ----------
    templates
        The templates, in the order in which they were asked for.
    sums
        By template name, the raw sums of every sequence.
    shared
        By pair of template names that were scored on the same sequences: the number of triples (sequence, query, key) that
        are targets of both. A template with itself: of all its targets.
    settings
        What was asked for, and what was made for it (tokens, BOS, seed).
    provenance
        The model's name, dtype and device, and the versions of the packages.
    """

    templates: tuple[Template, ...]
    sums: Mapping[str, TemplateSums]
    shared: Mapping[tuple[str, str], int]
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]

    # --------------------------------------------------------------------------------------------------------------- reading

    @property
    def names(self) -> tuple[str, ...]:
        """The templates' names."""
        return tuple(template.name for template in self.templates)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads of each layer."""
        return tuple(layer.shape[1] for layer in self.sums[self.names[0]].attention)

    def of(self, layer: int, head: int, template: str) -> HeadScore:
        """One head against one template.

        Raises
        ------
        CausalProbeError
            If there is no such head, or the template was not scored.
        """
        heads = self.heads
        if not 0 <= layer < len(heads) or not 0 <= head < heads[layer]:
            raise CausalProbeError(f"There is no head L{layer}H{head}; the heads by layer are {list(heads)}.")
        sums = self._of(template)
        rows, sequences = int(sums.rows.sum()), int((sums.rows > 0).sum())
        if sums.summary is None:
            return HeadScore(layer, head, template, None, None, None, None, None, None, rows, sequences)
        found = {name: float(values[head]) for name, values in sums.summary[layer].items()}
        defined = {name: value if np.isfinite(value) else None for name, value in found.items()}
        return HeadScore(layer=layer, head=head, template=template, rows=rows, sequences=sequences, **defined)

    def __iter__(self) -> Iterator[HeadScore]:
        """Every head against every template: by layer, head, then template."""
        for layer, n_heads in enumerate(self.heads):
            for head, name in itertools.product(range(n_heads), self.names):
                yield self.of(layer, head, name)

    def top(self, template: str, k: int = 10) -> tuple[HeadScore, ...]:
        """The ``k`` heads with the largest score, the largest first. None where the score is undefined.

        Raises
        ------
        CausalProbeError
            If the template was not scored.
        """
        if self._of(template).summary is None:
            return ()
        found = [self.of(layer, head, template) for layer, n in enumerate(self.heads) for head in range(n)]
        return tuple(sorted(found, key=lambda head: -(head.score or 0))[:k])

    def heatmap(self, template: str, *, value: str = "excess") -> tuple[Float[np.ndarray, " _head"], ...]:
        """By layer, one value for each head: what :func:`causal_probe.viz.heads` draws; ``numpy.array`` of it is [layer, head].

        Parameters
        ----------
        value
            ``"excess"``, ``"score"``, ``"stderr"``, ``"excess_stderr"``, ``"sink"`` or ``"chance"``.

        Raises
        ------
        CausalProbeError
            If the template was not scored, no row has a target, or there is no such value.
        """
        summary = self._of(template).summary
        if summary is None:
            raise CausalProbeError(f"{self.undefined[template]}: there is nothing to draw.")
        if value not in summary[0]:
            raise CausalProbeError(f"A head has no {value!r}; the values are {', '.join(summary[0])}.")
        return tuple(layer[value] for layer in summary)

    def called(self, *, minimum: float = CALLED) -> tuple[HeadScore, ...]:
        """The heads that a template describes: an excess above ``minimum`` by three standard errors, so on two sequences or more.

        A call says what a head attends to, not that the model uses it. A head may be called several things: what coincides on
        the data (:attr:`coinciding`) can't be told apart there.
        """
        return tuple(
            found
            for found in self
            if found.excess is not None
            and found.excess_stderr is not None
            and found.excess - SURELY * found.excess_stderr > minimum
        )

    @property
    def coinciding(self) -> tuple[tuple[str, ...], ...]:
        """Groups of templates with the same targets in every scored row, so that no score can tell them apart."""
        groups: list[list[str]] = []
        for name in self.names:
            group = next((group for group in groups if self.overlap(group[0], name) == 1), None)
            if group is None:
                groups.append([name])
            else:
                group.append(name)
        return tuple(tuple(group) for group in groups if len(group) > 1)

    def overlap(self, one: str, other: str) -> float | None:
        """Targets of both of two templates over targets of either, in [0, 1].

        None if the templates were scored on different sequences, or neither has a target.
        """
        self._of(one), self._of(other)
        if (one, other) not in self.shared:
            return None
        both = self.shared[one, other]
        either = self.shared[one, one] + self.shared[other, other] - both
        return both / either if either else None

    @property
    def undefined(self) -> dict[str, str]:
        """The templates without a score, and why."""
        return {
            name: f"No row has a target of {name!r} and a visible key that is none"
            for name in self.names
            if self.sums[name].summary is None
        }

    # --------------------------------------------------------------------------------------------------------------- merging

    def merge(self, *others: HeadScores) -> HeadScores:
        """The result of one run over the sequences of all: the raw sums stand side by side, nothing is rounded.

        What was read of a corpus is added up. Other settings that differ are kept, one for each result.

        Raises
        ------
        CausalProbeError
            If the models, their heads, the templates, or the scored queries differ, or shards of a corpus share documents.
        """
        for other in others:
            for what, mine, theirs in (
                ("models", self.provenance["model"], other.provenance["model"]),
                ("templates", self.names, other.names),
                ("heads", self.heads, other.heads),
                ("queries", self.settings.get("queries"), other.settings.get("queries")),
                ("pairs of templates on the same sequences", self.shared.keys(), other.shared.keys()),
            ):
                if mine != theirs:
                    raise CausalProbeError(f"Scores can't be merged: their {what} differ, {mine} and {theirs}.")
        return HeadScores(
            templates=self.templates,
            sums={name: found.merge(*(other.sums[name] for other in others)) for name, found in self.sums.items()},
            shared={pair: count + sum(other.shared[pair] for other in others) for pair, count in self.shared.items()},
            settings=_merged([self.settings, *(other.settings for other in others)]),
            provenance=self.provenance,
        )

    # --------------------------------------------------------------------------------------------------------------- writing

    def to_pandas(self) -> pd.DataFrame:
        """One row for each head and template, the columns those of :class:`HeadScore`. What is undefined is NaN."""
        table = pd.DataFrame(list(self), columns=list(HeadScore._fields))
        numbers = ["score", "chance", "excess", "stderr", "excess_stderr", "sink"]
        return table.astype(dict.fromkeys(numbers, float))

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types: ``model``, ``heads`` (one entry for each head and template), ``settings``, ``versions``.

        Beside them ``coinciding`` (templates that no score can tell apart), ``undefined`` (what is null, and why), ``dtype`` and
        ``device``.
        """
        undefined = dict(self.undefined)
        for name in self.names:
            if name not in undefined and int((self.sums[name].rows > 0).sum()) == 1:
                undefined[f"{name}: stderr"] = "a standard error needs two sequences or more"
        rest = {key: value for key, value in self.provenance.items() if key not in ("model", "versions")}
        return dict(
            to_jsonable(
                {
                    "model": self.provenance["model"],
                    "heads": [found._asdict() for found in self],
                    "coinciding": self.coinciding,
                    "undefined": undefined,
                    "settings": self.settings,
                    **rest,
                    "versions": self.provenance["versions"],
                }
            )
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything into one safetensors file, which :meth:`load` reads: the raw sums of each sequence.

        It takes 8 bytes for each sequence, template and head.
        """
        arrays: dict[str, np.ndarray] = {}
        for number, found in enumerate(self.sums[name] for name in self.names):
            arrays |= {f"{number}.rows": found.rows, f"{number}.chance": found.chance}
            for layer, (attention, sink) in enumerate(zip(found.attention, found.sink, strict=True)):
                arrays |= {f"{number}.attention.{layer}": attention, f"{number}.sink.{layer}": sink}
        about = {
            "kind": KIND,
            "format": FORMAT,
            "templates": [[each.name, each.description, each.kind, each.looks_back] for each in self.templates],
            "shared": [[*pair, count] for pair, count in self.shared.items()],
            "settings": self.settings,
            "provenance": self.provenance,
            "versions": versions(),
        }
        write_arrays(path, arrays, about=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadScores:
        """What :meth:`save` has written. Of a template that is not a shipped one, the function is not in the file.

        Raises
        ------
        CausalProbeError
            If the file is missing, damaged, something else, or of a newer format.
        """
        arrays, about = read_arrays(path, kind=KIND, newest=FORMAT)
        templates = tuple(recall_template(*each) for each in about["templates"])
        n_layers = sum(name.startswith("0.sink.") for name in arrays)

        def layers(number: int, what: str) -> tuple[np.ndarray, ...]:
            return tuple(arrays[f"{number}.{what}.{layer}"] for layer in range(n_layers))

        sums = {
            each.name: TemplateSums(
                attention=layers(number, "attention"),
                sink=layers(number, "sink"),
                rows=arrays[f"{number}.rows"],
                chance=arrays[f"{number}.chance"],
            )
            for number, each in enumerate(templates)
        }
        shared = {(one, other): int(count) for one, other, count in about["shared"]}
        return cls(templates, sums, shared, about["settings"], about["provenance"])

    def cite(self) -> Citation:
        """The papers behind the shipped templates, and one sentence for a methods section."""
        number_of = self.provenance["versions"]
        works = ["olsson2022"]
        if any(name.startswith("successor-of-parent") for name in self.names):
            works.append("nichani2024")
        return cite(
            *works,
            methods=(
                f"Every attention head of {self.provenance['model']} was scored against the templates {', '.join(self.names)}: the "
                "score is the attention on a template's target keys, averaged over the rows that have a target (rows whose targets "
                "are all visible keys are left out) and then over sequences "
                f"({', '.join(f'{len(found.rows)} for {name}' for name, found in self.sums.items())}), and the excess is "
                "(score - chance)/(1 - chance), with the share of visible keys that are targets as chance; standard errors are over "
                f"sequences (causal-probe {number_of.get('causal-probe', 'from source')}, TransformerLens "
                f"{number_of['transformer-lens']}, {self.provenance['dtype']} on {self.provenance['device']})."
            ),
        )

    def __repr__(self) -> str:
        heads, best = "score   chance  excess  sink", "best head"
        width = max(map(len, (*self.names, "template")))
        lines = [f"HeadScores of {self._title()}", f"  {'template':<{width}}  {best:<9}  {heads}"]
        lines += [f"  {name:<{width}}  {'  '.join(cells)}" for name, cells in self._rows()]
        return "\n".join([*lines, *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{cell}</th>" for cell in ("template", "best head", "score", "chance", "excess", "sink"))
        rows = "".join(
            f"<tr><th>{name}</th>{''.join(f'<td>{cell.strip()}</td>' for cell in cells)}</tr>"
            for name, cells in self._rows()
        )
        return (
            f"<table><caption>Head scores of {escape(self._title())}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table>{''.join(f'<p>{escape(note)}</p>' for note in self._notes())}"
        )

    def _title(self) -> str:
        counts = sorted({len(found.rows) for found in self.sums.values()})
        return (
            f"{self.provenance['model']}: {sum(self.heads)} heads in {len(self.heads)} layers, {len(self.names)} templates, "
            f"{' or '.join(f'{count:,}' for count in counts)} sequences"
        )

    def _rows(self) -> Iterator[tuple[str, list[str]]]:
        for name in self.names:
            best = next(iter(self.top(name, 1)), None)
            if best is None:
                yield name, ["-" * 9, *["undefined"]]
            else:
                numbers = (best.score, best.chance, best.excess, best.sink)
                label = f"L{best.layer}H{best.head}"
                yield name, [f"{label:<9}", *(f"{number:>6.3f}" for number in numbers if number is not None)]

    def _notes(self) -> list[str]:
        notes = [f"the same targets on these sequences: {', '.join(group)}" for group in self.coinciding]
        return notes + [f"{reason}." for reason in self.undefined.values()]

    def _of(self, template: str) -> TemplateSums:
        if template not in self.sums:
            raise CausalProbeError(
                f"The template {template!r} was not scored; those that were: {', '.join(self.names)}."
            )
        return self.sums[template]


def _merged(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of several results as those of one."""
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in settings for key in one):
        values = [one.get(key) for one in settings]
        parts: list[Any] = [] if key != "tokens" else [its or [] for its in values]
        if any(parts) and all(part["kind"] == "corpus" for its in parts for part in its):
            merged[key] = [merge_readings(*same) for same in zip(*parts, strict=True)]
        else:
            merged[key] = values[0] if all(value == values[0] for value in values) else tuple(values)
    return merged
