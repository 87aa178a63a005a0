"""Which probes will work on a model: the preflight and a self-test with known answers, before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.experiments.opening import is_named, open_model
from causal_probe.hooks import find_faults, self_test, to_hooked
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.gradients import find_routes
from causal_probe.hooks.preflight import Finding, context_length
from causal_probe.hooks.self_test import Answer
from causal_probe.hooks.tokens import content_tokens, special_tokens
from causal_probe.hooks.visible import heads_by_layer
from causal_probe.options import takes
from causal_probe.options.studies import CheckOptions
from causal_probe.results import Result, Table

__all__ = ["ModelCheck", "check_model"]

#: Patterns that are read and not edited.
READING = "reading"
#: Scores whose gradient can be taken: at the scores, at the pattern, or through the mask that is added to them.
GRADIENTS = "gradients"
#: By capability: the live hook points that it needs, and the questions that must be answered rightly.
ABILITIES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "read attention (scan, head graphs)": ((READING,), ("pattern-is-read-back", "same-as-original", "nothing-stays")),
    "edit attention (edge effects)": (("pattern",), ("pattern-moves-values", "same-as-original", "nothing-stays")),
    "ablate heads (verify)": (("z",), ("same-as-original", "nothing-stays")),
    "gradients by score": ((GRADIENTS,), ("same-as-original", "nothing-stays")),
}

#: Sequences and tokens that the model is tried on.
SEQUENCES, LENGTH = 2, 16


@dataclass(frozen=True, eq=False, repr=False)
class ModelCheck(Result):
    """Capabilities and problems of a model.

    Attributes
    ----------
    model
        Its name, sizes, dtype and device, and what its tokenizer does.
    abilities
        For each, whether it can be relied on.
    findings
        The problems, each once.
    answers
        The self-tests with known answers; empty where a hook point is missing that the questions need.
    """

    KIND = "model check"
    DERIVED = ("ok",)

    model: Mapping[str, Any]
    abilities: Mapping[str, bool]
    findings: tuple[Finding, ...]
    answers: tuple[Answer, ...]

    @property
    def ok(self) -> bool:
        """Whether everything works."""
        return all(self.abilities.values())

    @property
    def undefined(self) -> dict[str, str]:
        """Why an answer has no error."""
        return {each.question: "there is nothing to compare with" for each in self.answers if each.error is None}

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            f"The hooks of {self.model['model']} were looked at, and asked {len(self.answers)} questions with known answers, before anything "
            f"was measured ({self.measured_with})."
        )

    def table(self) -> Table:
        """Capabilities, answers to questions of known answer, and problems."""
        facts = self.model
        shared = "" if facts["key_value_heads"] in (None, facts["heads"]) else f" on {facts['key_value_heads']}"
        context = "no limit" if facts["context"] is None else facts["context"]
        bos = "no BOS token" if facts["bos"] is None else f"BOS token {facts['bos']}"
        before = f"puts {facts['added_before']} in front" if facts["added_before"] else "adds none by itself"
        return Table(
            f"{facts['model']}: {facts['layers']} layer{'s' * (facts['layers'] != 1)} of {facts['heads']}{shared} heads, "
            f"{facts['vocabulary']} tokens, context {context}, {facts['dtype']} on {facts['device']}",
            ("found", "what"),
            [("works" if works else "FAILS", ability) for ability, works in self.abilities.items()]
            + [("yes" if answer.passed else "NO", answer.statement) for answer in self.answers],
            [
                f"{bos}; {f'the tokenizer {before}' if facts['tokenizer'] else 'there is no tokenizer'}",
                *(
                    [f"attention in the layers {', '.join(map(str, having))} alone"]
                    if (having := facts.get("attention_layers"))
                    else []
                ),
                *(f"- {finding}" for finding in self.findings),
            ],
        )


@takes(CheckOptions)
def check_model(model: Any, o: CheckOptions) -> ModelCheck:
    """Find out what will work on a model.

    Raises
    ------
    CausalProbeError
        If there is no such model, or it can't be given hooks.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> check_model(DisentangledTransformer(d_vocab=20, n_positions=20)).ok
    True
    """
    original, name = None, None
    if is_named(model):
        hooked, loaded = open_model(model, dtype=o.dtype, device=o.device)
        name = loaded.name
        if loaded.model is not hooked:
            original = loaded.model
    else:
        hooked = to_hooked(model)
    tokens = _tokens(hooked)
    findings = {what: find_faults(hooked, tokens, hooks=(what,)) for what in ("pattern", "z", "attn_scores")}
    findings[READING] = find_faults(hooked, tokens, edits=False)
    findings[GRADIENTS] = _without_gradients(hooked, tokens) if not findings[READING] else findings[READING]
    if not findings[GRADIENTS]:  # scores that are only shown do no harm
        findings["attn_scores"] = ()
    answers: tuple[Answer, ...] = ()
    if not {"missing-hooks", "silent-hooks", "not-eager", "fails", "shape"} & {f.kind for f in findings["pattern"]}:
        try:
            answers = self_test(hooked, tokens, original=original)
        except CausalProbeError as error:
            findings["self-test"] = (Finding("self-test", str(error)),)
    passed = {answer.question for answer in answers if answer.passed}
    asked = {answer.question for answer in answers}
    abilities = {
        ability: bool(answers)
        and not any(findings[what] for what in hooks)
        and not (asked.intersection(questions) - passed)
        for ability, (hooks, questions) in ABILITIES.items()
    }
    unique = {finding.message: finding for found in findings.values() for finding in found}
    return ModelCheck(
        _facts(hooked, name),
        abilities,
        tuple(unique.values()),
        answers,
        settings=o.settings(),
        provenance=describe(hooked),
    )


def _without_gradients(model: HookedModel, tokens: Tensor) -> tuple[Finding, ...]:
    """Why gradients by score can't be taken; empty where they can."""

    def loss(model: Any, batch: Tensor) -> Tensor:
        found = model(batch)
        logits = getattr(found, "logits", found)
        each: Tensor = (logits[0] if isinstance(logits, tuple) else logits).float()
        return -each.log_softmax(-1).flatten(1).mean(1)

    try:
        find_routes(model, tokens[:1], loss)
    except CausalProbeError as error:
        return (Finding("dead-hooks", str(error)),)
    return ()


def _tokens(model: HookedModel) -> Tensor:
    """Random content."""
    content = content_tokens(model)
    length = min(LENGTH, context_length(model) or LENGTH)
    draw = torch.randint(len(content), (SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    return content[draw].to(describe(model)["device"] or "cpu")


def _facts(model: HookedModel, name: str | None) -> dict[str, Any]:
    special = special_tokens(model)
    having = list(heads_by_layer(model))
    return {
        **describe(model),
        **({"attention_layers": having} if len(having) < int(model.cfg.n_layers) else {}),
        **({} if name is None else {"model": name}),
        "layers": int(model.cfg.n_layers),
        "heads": getattr(model.cfg, "n_heads", None),
        "key_value_heads": getattr(model.cfg, "n_key_value_heads", None),
        "vocabulary": int(model.cfg.d_vocab),
        "context": context_length(model),
        "tokenizer": getattr(model, "tokenizer", None) is not None,
        "bos": special.bos,
        "added_before": list(special.before),
        "special_tokens": len(special.ids),
    }
