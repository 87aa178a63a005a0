"""The sequences of a scan, again: those that were scored, and a short one like them that can be looked at."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from jaxtyping import Int
from torch import Tensor

from causal_probe.hooks.check import HookedModel
from causal_probe.hooks.corpus import IN_MEMORY, Corpus
from causal_probe.hooks.preflight import context_length
from causal_probe.hooks.tokens import text_start
from causal_probe.probes import Template
from causal_probe.probes.scan import Part
from causal_probe.probes.sequences import make_sequences

__all__ = ["MadeSequences", "ScannedSequences", "TextSequences", "corpus_name", "sequence_length"]

#: The longest period, in tokens, of the sequence whose patterns and graphs are shown.
SHOWN_PERIOD = 20
#: Tokens in a sequence of a corpus, where the model can take as many.
LENGTH = 128


class MadeSequences:
    """Sequences that a scan has made, and short ones like them.

    Parameters
    ----------
    model
        The model that is scanned.
    options
        ``n_sequences``, ``period``, ``bos`` and ``seed`` of the scan.
    templates
        The templates of the scan, which may bring sequences of their own.
    parts
        The sequences.
    """

    title = "Repeated random tokens"

    def __init__(
        self, model: HookedModel, options: Mapping[str, Any], templates: Iterable[Template], parts: Sequence[Part]
    ) -> None:
        self.model = model
        self.options = options
        self.makers = {template.kind: template.shown_by for template in templates}
        self.made = {about["kind"]: (tokens, about) for _, tokens, about in parts}
        self.short: dict[str, Int[Tensor, "one pos"]] = {}

    def scanned(self, kind: str, n: int) -> Int[Tensor, "sequence pos"]:
        """The first ``n`` of those that were scored."""
        tokens: Tensor = self.made[kind][0]
        return tokens[:n]

    def shown(self, kind: str) -> Int[Tensor, "one pos"]:
        """One of the kind, of a shorter period if need be."""
        if kind not in self.short:
            self.short[kind] = self._one(kind)
            if self.short[kind].shape[1] > 2 * SHOWN_PERIOD + 2:
                self.short[kind] = self._one(kind, period=SHOWN_PERIOD)
        return self.short[kind]

    def start(self, kind: str) -> list[int]:
        """The tokens that each sequence begins with."""
        return list(self.made[kind][1]["start"])

    def _one(self, kind: str, **changes: Any) -> Int[Tensor, "one pos"]:
        options = {**self.options, "n_sequences": 1, **changes}
        return make_sequences(self.model, self.makers.get(kind, kind), **options).tokens


class TextSequences:
    """Sequences of a corpus; there is one kind."""

    title = "The first sequence of the corpus"

    def __init__(self, text: Corpus) -> None:
        self.text = text

    def scanned(self, kind: str, n: int) -> Int[Tensor, "sequence pos"]:
        """The first ``n``."""
        return self.text.first(n)

    def shown(self, kind: str) -> Int[Tensor, "one pos"]:
        """The beginning of the first one."""
        return self.text.first(1)[:, : 2 * SHOWN_PERIOD + 2]

    def start(self, kind: str) -> list[int]:
        """The tokens that each sequence begins with."""
        return list(text_start(self.text.model, self.text.bos))


#: Both answer the same questions.
ScannedSequences: TypeAlias = MadeSequences | TextSequences


def corpus_name(corpus: Any) -> str | None:
    """How settings name a corpus."""
    if corpus is None or isinstance(corpus, (str, os.PathLike)):
        return None if corpus is None else os.fspath(corpus)
    return f"{IN_MEMORY}{type(corpus).__name__}"


def sequence_length(model: HookedModel, asked: int | None) -> int:
    """How many tokens a sequence of a corpus has, if none were asked for."""
    return min(LENGTH, context_length(model) or LENGTH) if asked is None else asked
