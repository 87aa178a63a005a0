"""Causal discovery from the attention to one text, end to end: load a model, learn the graphs, explain a decision, write the report."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from causal_probe import probes
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.saving import kept
from causal_probe.hooks import HookedModel, to_hooked
from causal_probe.models import choose_device, load_model
from causal_probe.options import DiscoverOptions, takes
from causal_probe.probes import Discovery, Explanation, outputs_of
from causal_probe.results import Citation, html_table, to_jsonable

__all__ = ["TextDiscovery", "discover_in_text"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TextDiscovery:
    """What :func:`discover_in_text` found.

    Attributes
    ----------
    discovery
        The graphs, head by head.
    explanations
        By method, what explains the decision at the token that was asked for; empty without one. Their ``target`` is its node.
    decision
        The decision in words; None without one.
    changed_to
        What each set of the CLEANN explanation makes of it, in words.
    settings
        All that was asked for.
    timings
        Seconds for ``loading``, ``discovering`` and ``explaining``.
    """

    RESULT: ClassVar[str] = "discovery.json"

    discovery: Discovery
    explanations: Mapping[str, Explanation]
    decision: str | None
    changed_to: tuple[str, ...]
    settings: Mapping[str, Any]
    timings: Mapping[str, float]

    @property
    def call(self) -> str:
        """The Python that gives this result."""
        return DiscoverOptions.call("discover_in_text", self.settings, repr(self.settings["model"]))

    def cite(self) -> Citation:
        """The papers, and one sentence for a methods section."""
        return self.discovery.cite()

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON types."""
        return {
            **self.discovery.to_dict(),
            "decision": self.decision,
            "explanations": {name: found.to_dict() for name, found in self.explanations.items()},
            "changed_to": list(self.changed_to),
            "settings": to_jsonable(self.settings),
            "timings": to_jsonable(self.timings),
        }

    def __repr__(self) -> str:
        lines = [repr(self.discovery)]
        if self.decision is not None:
            nodes = self.discovery.nodes
            lines.append(f"Decision at {nodes[next(iter(self.explanations.values())).target]!r}: {self.decision!r}")
            for name, found in self.explanations.items():
                sets = "; ".join(", ".join(repr(nodes[node]) for node in each) for each in found.sets[:5])
                more = f"; and {len(found.sets) - 5} more" if len(found.sets) > 5 else ""
                lines.append(
                    f"  {name:<13} {sets or 'no set that was tried changes it'}{more}  ({found.tested} sets tried)"
                )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        if self.decision is None:
            return self.discovery._repr_html_()
        nodes = self.discovery.nodes
        rows = [
            (
                name,
                "; ".join(", ".join(nodes[node] for node in each) for each in found.sets[:5]),
                len(found.sets),
                found.tested,
            )
            for name, found in self.explanations.items()
        ]
        decided = html_table(
            ["method", "sets that change the decision (at most 5)", "sets", "tried"],
            rows,
            caption=f"Decision at {nodes[next(iter(self.explanations.values())).target]!r}: {self.decision!r}",
        )
        return self.discovery._repr_html_() + decided


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
    if is_named := isinstance(model, (str, os.PathLike)):
        settings = o.settings(model=os.fspath(model), device=str(choose_device(o.device)))
    else:
        settings = o.settings(model=type(model).__name__, dtype=None, device=None)
    with kept(o, settings, result="discovery.json") as save_result:
        started = time.perf_counter()
        name, tokenizer = None, o.tokenizer
        if is_named:
            loaded = load_model(model, dtype=o.dtype, device=str(choose_device(o.device)), any_kind=True)
            model, tokenizer, name = loaded
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise CausalProbeError(
                "The model has no tokenizer, which turns the text into tokens. Give token numbers to probes.discover_from_attention."
            )
        if not isinstance(model, HookedModel) and (o.source == "values" or _is_causal(model)):
            model = to_hooked(model, tokenizer, name)
        encoded = tokenizer(o.text)
        tokens = torch.tensor([encoded["input_ids"]])
        nodes = _words(encoded, tokenizer) if o.words else None
        loaded_at = time.perf_counter()
        found = probes.discover_from_attention(
            model,
            tokens,
            layer=o.layer,
            head=o.head,
            algorithm=o.algorithm,
            level=o.level,
            samples=o.samples,
            source=o.source,
            residual=o.residual,
            groups=nodes,
            texts=[tokenizer.decode([token]) for token in tokens[0].tolist()],
        )
        discovered_at = time.perf_counter()
        explanations: dict[str, Explanation] = {}
        decision, changed = None, tuple[str, ...]()
        if o.explain is not None:
            explanations, names = _explain(model, tokenizer, found, o.explain, o.max_size)
            cleann = explanations["cleann"]
            decision, changed = names(cleann.decision), tuple(map(names, cleann.changed_to))
        result = TextDiscovery(
            found,
            explanations,
            decision,
            changed,
            settings,
            {
                "loading": loaded_at - started,
                "discovering": discovered_at - loaded_at,
                "explaining": time.perf_counter() - discovered_at,
            },
        )
        save_result(result)
    return result


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
    replacement = next(
        (
            token
            for name in ("mask_token_id", "unk_token_id", "pad_token_id", "eos_token_id")
            if (token := getattr(tokenizer, name, None)) is not None
        ),
        None,
    )
    if replacement is None:
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
        replacement=replacement,
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
