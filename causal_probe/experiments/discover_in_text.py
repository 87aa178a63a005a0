"""Causal discovery from the attention to one text, end to end: load a model, learn the graphs, explain a decision, write the report."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.opening import is_named
from causal_probe.experiments.saving import Clock, kept
from causal_probe.hooks import to_hooked
from causal_probe.hooks.check import HookedModel
from causal_probe.hooks.tokens import added_by_itself, check_known, token_text
from causal_probe.models import choose_device, load_model
from causal_probe.options import takes
from causal_probe.options.discover import DiscoverOptions
from causal_probe.probes import outputs_of
from causal_probe.probes.discovered_graphs import Discovery
from causal_probe.probes.explain import Explanation
from causal_probe.results import Result, Table

__all__ = ["TextDiscovery", "discover_in_text"]

#: The options that the discovery itself takes.
ASKED = ("layer", "head", "algorithm", "level", "samples", "source", "residual")
#: Replacements for a token, the best first.
REPLACEMENTS = ("mask_token_id", "unk_token_id", "pad_token_id", "eos_token_id")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TextDiscovery(Result):
    """The result of :func:`discover_in_text`.

    Attributes
    ----------
    discovery
        The graphs, head by head.
    explanations
        By method, what explains the decision at the token that was asked for; empty without one. Their ``target`` is its node.
    decision
        The decision in words; None without one.
    changed_to
        The decision after each set of the CLEANN explanation is replaced, in words.
    timings
        Seconds for ``loading``, ``discovering`` and ``explaining``.
    """

    KIND = "discovery in a text"
    RESULT: ClassVar[str] = "discovery.json"

    discovery: Discovery
    explanations: Mapping[str, Explanation]
    decision: str | None
    changed_to: tuple[str, ...]
    timings: Mapping[str, float]

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        return DiscoverOptions.call("discover_in_text", self.settings, repr(self.settings["model"]))

    @property
    def works(self) -> tuple[str, ...]:
        """Those of the discovery."""
        return self.discovery.works

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return self.discovery.methods

    def table(self) -> Table:
        """The graphs, and below them the decision and the sets that explain it, at most five by method."""
        shown, nodes = self.discovery.table(), self.discovery.nodes
        notes = list(shown.notes)
        if self.decision is not None:
            notes.append(f"Decision at {nodes[next(iter(self.explanations.values())).target]!r}: {self.decision!r}")
        for name, found in self.explanations.items():
            sets = "; ".join(", ".join(repr(nodes[node]) for node in each) for each in found.sets[:5])
            more = f"; and {len(found.sets) - 5} more" if len(found.sets) > 5 else ""
            notes.append(
                f"  {name:<13} {sets or 'no set that was tried changes it'}{more}  ({found.tested} sets tried)"
            )
        return dataclasses.replace(shown, notes=notes)


@takes(DiscoverOptions)
def discover_in_text(model: Any, o: DiscoverOptions) -> TextDiscovery:
    """Discover the graphs over the tokens of a text (:func:`causal_probe.probes.discover_from_attention`), and explain a decision.

    For a causal model the decision at a token is the next token there; for a sequence classifier the class, whatever the token; for a
    masked language model the token itself, which is masked.

    Raises
    ------
    CausalProbeError
        If the text is empty or too long, the model has no tokenizer, an argument is out of range, there is no such token, or the model
        takes no decision that could be explained.
    """
    about: dict[str, Any] = {"model": type(model).__name__, "dtype": None, "device": None}
    if named := is_named(model):
        about = {"model": os.fspath(model), "dtype": o.dtype, "device": str(choose_device(o.device))}
    settings = o.settings(**about)
    clock = Clock()
    with kept(o, settings, TextDiscovery) as saved:
        name, tokenizer = None, o.tokenizer
        if named:
            model, tokenizer, name = load_model(model, dtype=o.dtype, device=about["device"], any_kind=True)
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise CausalProbeError(
                "The model has no tokenizer, which turns the text into tokens. Give token numbers to probes.discover_from_attention."
            )
        if not isinstance(model, HookedModel) and (o.source == "values" or _is_causal(model)):
            model = to_hooked(model, tokenizer, name)
        encoded = tokenizer(o.text)
        tokens = torch.tensor([encoded["input_ids"]])
        added = sum(map(len, added_by_itself(tokenizer)))
        check_known(tokenizer, encoded["input_ids"], len(encoded["input_ids"]) - added)
        nodes = _words(encoded, tokenizer) if o.words else None
        clock.spent_on("loading")
        found = probes.discover_from_attention(
            model,
            tokens,
            groups=nodes,
            texts=[token_text(tokenizer, token) for token in tokens[0].tolist()],
            **{name: getattr(o, name) for name in ASKED},
        )
        clock.spent_on("discovering")
        explanations: dict[str, Explanation] = {}
        decision, changed = None, tuple[str, ...]()
        if o.explain is not None:
            explanations, names = _explain(model, tokenizer, found, o.explain, o.max_size)
            cleann = explanations["cleann"]
            decision, changed = names(cleann.decision), tuple(map(names, cleann.changed_to))
        clock.spent_on("explaining")
        return saved(
            TextDiscovery(
                found, explanations, decision, changed, clock.timings, settings=settings, provenance=found.provenance
            )
        )


def _is_causal(model: Any) -> bool:
    return "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__


def _words(encoded: Any, tokenizer: Any) -> list[list[int]]:
    """The positions of each word; a special token is a word by itself."""
    try:
        of = encoded.word_ids()
    except (ValueError, AttributeError) as error:
        raise CausalProbeError(
            f"The tokenizer {type(tokenizer).__name__} doesn't say which tokens are a word."
        ) from error
    groups: list[list[int]] = []
    for position, word in enumerate(of):
        if word is not None and position and of[position - 1] == word:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def _explain(
    model: Any, tokenizer: Any, found: Discovery, explain: str | int, max_size: int
) -> tuple[dict[str, Explanation], Any]:
    node = _node(found, explain)
    position = found.groups[node][-1]
    kind = type(model).__name__
    known = [token for name in REPLACEMENTS if (token := getattr(tokenizer, name, None)) is not None]
    if not known:
        raise CausalProbeError("The tokenizer has no mask, unknown, padding or end token to replace others by.")
    if "ForSequenceClassification" in kind:
        outputs, names = outputs_of(model, "class"), lambda choice: str(model.config.id2label.get(choice, choice))
    elif isinstance(model, HookedModel) or "ForMaskedLM" in kind:
        outputs = outputs_of(model, "masked", position=position)  # for a causal model: the next token at that position
        if "ForMaskedLM" in kind:
            outputs = _masked(outputs, position, tokenizer.mask_token_id)

        def names(choice: int) -> str:
            return str(tokenizer.decode([choice]))
    else:
        raise CausalProbeError(
            f"A {kind} takes no decision that could be explained: give a causal or masked language model, or a classifier."
        )
    special = set(tokenizer.all_special_ids)
    tokens = found.settings["tokens"]
    fixed = [i for i, group in enumerate(found.groups) if all(tokens[position] in special for position in group)]
    explanations = probes.explain(
        found,
        outputs,
        target=node,
        replacement=known[0],
        methods=("cleann", "leave-one-out"),
        head="any",
        fixed=fixed,
        max_size=max_size,
    )
    return explanations, names


def _masked(outputs: Any, position: int, mask: int) -> Any:
    def masked(tokens: Tensor) -> Tensor:
        tokens = tokens.clone()
        tokens[:, position] = mask
        result: Tensor = outputs(tokens)
        return result

    return masked


def _node(found: Discovery, explain: str | int) -> int:
    n = len(found.nodes)
    with_name = [node for node, text in enumerate(found.nodes) if text.strip() == str(explain).strip()]
    if len(with_name) == 1:
        return with_name[0]
    try:
        number = int(explain)
    except ValueError:
        number = n
    if not -n <= number < n:
        how = f"occurs {len(with_name)} times" if with_name else "does not occur"
        raise CausalProbeError(
            f"The token {explain!r} {how} among {', '.join(repr(text) for text in found.nodes)}. Give its number, 0 to {n - 1}."
        )
    return number % n
