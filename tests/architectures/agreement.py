"""Every probe beside its reference, on one architecture: right, wrong by how much, or refused with the reason."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import to_hooked
from causal_probe.probes.measures import Measured
from tests.architectures import references
from tests.architectures.zoo import ARCHITECTURES, tokens

TEMPLATE = "previous-token"
LINE = importlib.metadata.version("transformer-lens").rpartition(".")[0]


@dataclass(frozen=True)
class Entry:
    """What came out: ``error`` over what is allowed; or a reason."""

    error: float | None = None
    reason: str = ""

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= 1

    def __str__(self) -> str:
        return (
            "right"
            if self.right
            else f"refused: {self.reason}"
            if self.error is None
            else f"wrong by {self.error:.2g} times what rounding makes"
        )


@dataclass
class Case:
    """A model both ways, and what several probes need of it."""

    original: Any
    hooked: Any

    def __post_init__(self) -> None:
        self.tokens = tokens(6)
        self.patterns = references.patterns(self.original, self.tokens)
        self.layer = max(self.patterns)  # the last that has attention
        self.heads = range(references.n_heads(self.original))


def scan(case: Case) -> float:
    """Scores to 1e-6, chance to 1e-7."""
    found = probes.scan(case.hooked, case.tokens, templates=references.TEMPLATES)
    worst = 0.0
    for template in references.TEMPLATES:
        for layer, pattern in case.patterns.items():
            expected = references.template_scores(pattern, case.tokens, template)
            ours = [found.of(layer, head, template) for head in case.heads]
            if expected is None:
                worst = max(worst, *(0.0 if one.score is None else 2.0 for one in ours))
                continue
            for head, one in enumerate(ours):
                worst = max(worst, abs(one.score - expected[0][head]) / 1e-6, abs(one.chance - expected[1]) / 1e-7)
    return worst


def head_graphs(case: Case) -> float:
    """The mean attention to 1e-6."""
    found = probes.head_graphs(case.hooked, case.tokens)
    if sorted(found.values) != sorted(case.patterns):
        return float("inf")
    return max(
        float((torch.from_numpy(found.values[layer]) - pattern.double().mean(0)).abs().max()) / 1e-6
        for layer, pattern in case.patterns.items()
    )


def untested(logits: torch.Tensor, batch: torch.Tensor) -> Measured:
    """The mean loss of each sequence, and no predictor that a random model would have to beat."""
    return Measured(references.losses(logits, batch).mean(1), None)


def verify(case: Case) -> float:
    """The effect of ablating one head to 1e-5 of the loss."""
    scores = probes.scan(case.hooked, case.tokens, templates=TEMPLATE)
    found = probes.verify(
        scores, case.hooked, case.tokens, reference=case.tokens.roll(1, 0), templates=[TEMPLATE],
        rule=probes.Rule(minimum_excess=-9, level=0.999), measure=untested, random_sets=0,
    )  # fmt: skip
    verdicts = {(one.layer, one.head): one.effect.value for one in found.verdicts}
    if not verdicts:
        return float("inf")
    head = max(verdicts, key=lambda each: abs(verdicts[each]))
    with torch.no_grad():
        loss = float(references.losses(case.original(case.tokens).logits, case.tokens).mean())
    return abs(verdicts[head] - references.ablation_effect(case.original, case.tokens, *head)) / (1e-5 * loss)


def score_gradients(case: Case) -> float:
    """To 1e-5 of the largest."""
    found = probes.score_gradients(case.hooked, case.tokens)
    expected = references.score_gradients(case.original, case.tokens)
    if sorted(found.values) != sorted(expected):
        return float("inf")
    largest = max(float(values.abs().max()) for values in expected.values())
    return max(
        float((torch.from_numpy(found.values[layer]) - values).abs().max()) for layer, values in expected.items()
    ) / (1e-5 * largest)


def qk_attributions(case: Case) -> float:
    """The sums over pairs are the contrast of the log of the attention, and that log less even attention's, to 1e-5."""
    worst = 0.0
    for head in case.heads:
        found = probes.qk_attributions(
            case.hooked, case.tokens, case.layer, head, edges=TEMPLATE, pairs=0, competition=True
        )
        expected = references.contrast(case.patterns[case.layer], case.tokens, head, TEMPLATE)
        total = found.total if found.capped is None else found.capped
        worst = max(worst, abs(total - expected) / 1e-5)
        worst = max(worst, abs(float(found.contribution.sum()) - found.total) / 1e-5)
        gain = references.gain(case.original, case.patterns[case.layer], case.tokens, case.layer, head, TEMPLATE)
        worst = max(worst, abs(float(found.attention.sum()) - gain) / 1e-5)
    return worst


def upstream(case: Case) -> float:
    """Each arrow's drop, by editing the projection, to 1e-5."""
    found = probes.upstream(case.hooked, case.tokens, case.layer, 0, edges=TEMPLATE, depth=1, width=1, controls=1)
    if not found.arrows:
        return float("inf")
    worst = 0.0
    for arrow in found.arrows:
        source = tuple(int(part) for part in arrow.source[1:].split("H"))
        expected = references.drop(case.original, case.tokens, source, (case.layer, 0), arrow.side, TEMPLATE)
        worst = max(worst, abs(arrow.drop - expected) / 1e-5)
    return worst


def head_weights(case: Case) -> float:
    """Copying scores, by the eigenvalues of the whole matrix, to 1e-4."""
    found = probes.head_weights(case.hooked)
    return max(
        abs(found.copying[layer][head] - references.copying(case.original, layer, head)) / 1e-4
        for layer in case.patterns
        for head in (0, 3)
    )


def in_context_score(case: Case) -> float:
    """The difference of two losses, to 1e-5."""
    found = probes.in_context_score(case.hooked, case.tokens, early=4, late=12)
    with torch.no_grad():
        each = references.losses(case.original(case.tokens).logits, case.tokens)
    return abs(found.score - float((each[:, 11] - each[:, 3]).mean())) / 1e-5


PROBES: Mapping[str, Callable[[Case], float]] = {
    one.__name__: one
    for one in (scan, head_graphs, verify, score_gradients, qk_attributions, upstream, head_weights, in_context_score)
}


def entries(name: str, wanted: tuple[str, ...] = tuple(PROBES)) -> dict[str, Entry]:
    """One row of the table."""
    original = ARCHITECTURES[name].build()
    try:
        case = Case(original, to_hooked(original))
    except CausalProbeError as error:
        return dict.fromkeys(wanted, Entry(reason=str(error)))
    found = {}
    for probe in wanted:
        try:
            found[probe] = Entry(float(PROBES[probe](case)))
        except CausalProbeError as error:
            found[probe] = Entry(reason=str(error))
    return found
