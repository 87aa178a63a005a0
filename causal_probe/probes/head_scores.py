"""How much of its attention every head puts where a head of each type would."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float

from causal_probe.arguments import Count, checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.corpus import merge_readings
from causal_probe.hooks.heads import find_head
from causal_probe.probes.p_values import t_p_value
from causal_probe.probes.template_sums import TemplateSums
from causal_probe.probes.templates import Template
from causal_probe.results import BINARY, Result, Rows, Table, merge_provenance
from causal_probe.results.lazy import pandas as pd

__all__ = ["CALLED", "HeadScore", "HeadScores"]

#: A head is called what a template says if its excess is surely above this: of what chance leaves to be explained, more is on
#: the targets than elsewhere.
CALLED = 0.5
#: "Surely": by so many standard errors.
SURELY = 3.0
#: The numbers of a head that may be undefined.
NUMBERS = ("score", "chance", "excess", "stderr", "excess_stderr", "sink", "nothing")


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
        The score of a head that attends uniformly to what it sees: the same mean of |targets| / |keys|, the keys those that the
        layer's mask shows: query + 1, fewer in a sliding window.
    excess
        (score - chance) / (1 - chance): 1 for a perfect head, 0 at chance, negative below.
    stderr
        Standard error of ``score`` over sequences; None for one sequence.
    excess_stderr
        Standard error of ``excess`` (a ratio of means, by the delta method); None for one sequence.
    sink
        Attention on position 0, in [0, 1], on the same rows.
    nothing
        Attention on nothing, in [0, 1], on the same rows: of heads with a learnt sink (GPT-OSS), what their attention leaves to one; 0 of others.
    rows
        Number of scored rows: those that have a target, and see a key that is none.
    n_sequences
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
    nothing: float | None
    rows: int
    n_sequences: int


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """The result of :func:`~causal_probe.probes.scan`: every head of a model against every template.

    Attributes
    ----------
    templates
        The templates, in the order in which they were asked for.
    sums
        By template name, the raw sums of every sequence.
    shared
        By pair of template names that were scored on the same sequences: the number of triples (sequence, query, key) that
        are targets of both. A template with itself: of all its targets.
    """

    KIND = "head scores"
    DERIVED = ("scores", "coinciding")

    templates: tuple[Template, ...]
    sums: Mapping[str, TemplateSums] = field(metadata=BINARY)
    shared: Mapping[tuple[str, str], int] = field(metadata=BINARY)

    # --------------------------------------------------------------------------------------------------------------- reading

    @property
    def names(self) -> tuple[str, ...]:
        """The templates' names."""
        return tuple(template.name for template in self.templates)

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of heads of each layer."""
        return tuple(layer.shape[1] for layer in self.sums[self.names[0]].attention)

    @property
    def to_nothing(self) -> bool:
        """Whether some head can attend to nothing; :attr:`HeadScore.nothing` is then a column of the table."""
        return any(found.nothing for found in self.sums.values())

    def of(self, layer: Any, head: Any = None, template: str | None = None) -> Any:
        """One head against one template, ``of("L18H6", "induction")``; every head against one, ``of("induction")``; or one against every, ``of("L18H6")``.

        Parameters
        ----------
        layer, head
            A layer and a head, counted from 0; or the head alone, as ``"L18H6"`` or ``(18, 6)``, with the template after it.
        template
            The template's name.

        Returns
        -------
        HeadScore or Rows
            A :class:`HeadScore`; several are a tuple that prints as a table, of a template the largest score first.

        Raises
        ------
        CausalProbeError
            If there is no such head, or the template was not scored.
        """
        if head is None and template is None and isinstance(layer, str) and not re.fullmatch(r"L\d+H\d+", layer):
            return self.top(layer, sum(self.heads))
        if template is None and (head is None or isinstance(head, str)):
            head, template = None, head
        if template is None:
            place = find_head(dict(enumerate(self.heads)), layer, head)
            return Rows(self.of(*place, name) for name in self.names)
        layer, head = find_head(dict(enumerate(self.heads)), layer, head)
        sums = self._of(template)
        its, _ = sums.of_layer(layer)
        counts = {"rows": int(its.sum()), "n_sequences": int((its > 0).sum())}
        numbers: dict[str, Any] = dict.fromkeys(NUMBERS)
        if sums.summary is not None:
            found = {name: float(values[head]) for name, values in sums.summary[layer].items()}
            numbers |= {name: value if np.isfinite(value) else None for name, value in found.items()}
        return HeadScore(layer=layer, head=head, template=template, **numbers, **counts)

    @property
    def scores(self) -> tuple[HeadScore, ...]:
        """Every head against every template."""
        return tuple(self)

    def __iter__(self) -> Iterator[HeadScore]:
        """Every head against every template: by layer, head, then template."""
        for layer, n_heads in enumerate(self.heads):
            for head, name in itertools.product(range(n_heads), self.names):
                yield self.of(layer, head, name)

    @checked
    def top(self, template: str, k: Count = 10) -> tuple[HeadScore, ...]:
        """The ``k`` heads with the largest score, the largest first. None where the score is undefined.

        Raises
        ------
        CausalProbeError
            If the template was not scored.
        """
        if self._of(template).summary is None:
            return Rows()
        found = [self.of(layer, head, template) for layer, n in enumerate(self.heads) for head in range(n)]
        return Rows(sorted(found, key=lambda head: -(head.score or 0))[:k])

    def heatmap(self, template: str, *, value: str = "excess") -> tuple[Float[np.ndarray, " _head"], ...]:
        """By layer, one value for each head: what :func:`causal_probe.viz.heads` draws; ``numpy.array`` of it is [layer, head].

        Parameters
        ----------
        value
            ``"excess"``, ``"score"``, ``"stderr"``, ``"excess_stderr"``, ``"sink"``, ``"nothing"`` or ``"chance"``.

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

    def called(self, template: str | None = None, *, minimum: float = CALLED) -> tuple[HeadScore, ...]:
        """The heads that a template describes: an excess above ``minimum`` by three standard errors, so on two sequences or more.

        By default those of every template. They print as a table.

        A call says what a head attends to, not that the model uses it. A head may be called several things: what coincides on
        the data (:attr:`coinciding`) can't be told apart there.

        Raises
        ------
        CausalProbeError
            If the template was not scored.

        Examples
        --------
        >>> from causal_probe import models, probes
        >>> model = models.DisentangledTransformer(d_vocab=12, n_positions=24)
        >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
        >>> scores = probes.scan(model, templates="previous-token", n_sequences=4, period=10)
        >>> scores.called("previous-token")
        1 row
          head  template        score  chance  excess  stderr  excess_stderr     sink  nothing  rows  n_sequences
          L0H0  previous-token ...
        >>> scores.of("previous-token").to_pandas()["head"].tolist(), scores.of("L1H0")[0].template
        ([0, 0], 'previous-token')
        >>> scores.to_pandas()[["excess_low", "excess_high", "p_value"]].round(2).values.tolist()[0]
        [1.0, 1.0, 0.0]
        """
        if template is not None:
            self._of(template)
        return Rows(
            found
            for found in self
            if template in (None, found.template)
            and found.excess is not None
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
        """The templates without a score, or without standard errors, and why."""
        reasons = {}
        for name in self.names:
            if self.sums[name].summary is None:
                reasons[name] = f"No row has a target of {name!r} and a visible key that is none"
            elif int((self.sums[name].rows > 0).any(1).sum()) == 1:
                reasons[f"{name}: stderr"] = "a standard error needs two sequences or more"
        return reasons

    # --------------------------------------------------------------------------------------------------------------- merging

    def merge(self, *others: HeadScores) -> HeadScores:
        """The result of one run over the sequences of all: the raw sums stand side by side, nothing is rounded.

        What was read of a corpus is added up. Other settings that differ are kept, one for each result.

        Raises
        ------
        CausalProbeError
            If the models, their heads, the templates, or the scored queries differ, or shards of a corpus share documents.
        """
        for index, other in enumerate(others):
            if not isinstance(other, HeadScores) or any(other is its for its in (self, *others[:index])):
                what = "one twice" if isinstance(other, HeadScores) else f"a {type(other).__name__}"
                raise CausalProbeError(f"Scores are merged with those of other sequences; found {what}.")
            for what, mine, theirs in (
                ("models", self.provenance["model"], other.provenance["model"]),
                ("templates", self.names, other.names),
                ("heads", self.heads, other.heads),
                ("queries", self.settings.get("queries"), other.settings.get("queries")),
                ("pairs of templates on the same sequences", self.shared.keys(), other.shared.keys()),
            ):
                if mine != theirs:
                    raise CausalProbeError(f"Scores can't be merged: their {what} differ, {mine} and {theirs}.")
        return replace(
            self,
            sums={name: found.merge(*(other.sums[name] for other in others)) for name, found in self.sums.items()},
            shared={pair: count + sum(other.shared[pair] for other in others) for pair, count in self.shared.items()},
            settings=_merged([self.settings, *(other.settings for other in others)]),
            provenance=merge_provenance(self.provenance, *(other.provenance for other in others)),
        )

    # --------------------------------------------------------------------------------------------------------------- writing

    def to_pandas(self) -> pd.DataFrame:
        """One row for each head and template: the columns of :class:`HeadScore`, and of the excess, over sequences, by Student's t,
        ``excess_low`` and ``excess_high``, its 95% confidence interval, and ``p_value``, one-sided, of its being above 0, which is chance; it
        is not corrected for the number of heads. What is undefined is NaN.
        """
        table = pd.DataFrame(list(self), columns=list(HeadScore._fields)).astype(dict.fromkeys(NUMBERS, float))
        excess, stderr, n = (table[name].to_numpy(float) for name in ("excess", "excess_stderr", "n_sequences"))
        known = np.isfinite(stderr)
        low, high, p_value = (np.full(len(table), np.nan) for _ in range(3))
        reach = scipy.stats.t.ppf(0.975, df=n[known] - 1) * stderr[known]
        low[known], high[known] = excess[known] - reach, excess[known] + reach
        tested = zip(excess[known], stderr[known], n[known], strict=True)
        p_value[known] = [t_p_value(mean, spread, int(count)) for mean, spread, count in tested]
        return table.assign(excess_low=low, excess_high=high, p_value=p_value)

    @property
    def works(self) -> tuple[str, ...]:
        """The papers behind the templates."""
        of_graph = any(name.startswith("successor-of-parent") for name in self.names)
        return ("olsson2022", "nichani2024") if of_graph else ("olsson2022",)

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"Every attention head of {self.provenance['model']} was scored against the templates {', '.join(self.names)}: the "
            "score is the attention on a template's target keys, averaged over the rows that have a target (rows whose targets "
            "are all visible keys are left out) and then over sequences "
            f"({', '.join(f'{len(found.rows)} for {name}' for name, found in self.sums.items())}), and the excess is "
            "(score - chance)/(1 - chance), with the share of visible keys that are targets as chance; standard errors are over "
            f"sequences ({self.measured_with})."
        )

    def table(self) -> Table:
        """By template: the head with the largest score."""
        counts = sorted({len(found.rows) for found in self.sums.values()})
        rows = []
        last = ["nothing"] * self.to_nothing
        for name in self.names:
            best = next(iter(self.top(name, 1)), None)
            cells: tuple[object, ...] = (None,) * (5 + len(last))
            if best is not None:
                cells = (
                    f"L{best.layer}H{best.head}",
                    best.score,
                    best.chance,
                    best.excess,
                    best.sink,
                    *[best.nothing] * len(last),
                )
            rows.append((name, *cells))
        return Table(
            f"HeadScores of {self.provenance['model']}: {sum(self.heads)} heads in {len(self.heads)} layers, {len(self.names)} "
            f"templates, {' or '.join(f'{count:,}' for count in counts)} sequences",
            ("template", "best head", "score", "chance", "excess", "sink", *last),
            rows,
            [
                *(f"the same targets on these sequences: {', '.join(group)}" for group in self.coinciding),
                *(f"{self.undefined[name]}." for name in self.names if name in self.undefined),
            ],
        )

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
