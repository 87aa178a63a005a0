"""A task's states as tokens of a language model: single-token words, drawn anew for every sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import HookedModel
from causal_probe.hooks.tokens import content_tokens, special_tokens, unknown_token

__all__ = ["WORDS", "StateWords"]

#: Common, concrete, short; each is one token, with a blank before it, in the vocabularies of GPT-2, Pythia, Llama and SmolLM2.
WORDS = (
    "red", "blue", "green", "black", "white", "one", "two", "three", "four", "five", "six", "seven", "day", "night", "sun", "moon",
    "dog", "cat", "fish", "bird", "horse", "tree", "river", "sea", "rock", "fire", "water", "wind", "snow", "rain", "house", "door",
    "road", "city", "king", "man", "woman", "child", "hand", "head", "eye", "foot", "book", "song", "game", "ball", "car", "ship",
    "gold", "iron", "wood", "glass", "bread", "milk", "salt", "apple", "table", "chair", "bed", "box", "key", "ring", "war", "time",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class StateWords:
    """Which tokens may stand for states.

    Attributes
    ----------
    pool
        Token ids.
    fixed
        Whether state s is ``pool[s]`` in every sequence; otherwise every sequence draws its own words, without replacement.
    words
        The pool as texts.
    """

    pool: Int[Tensor, " token"]
    fixed: bool
    words: tuple[str, ...]

    @classmethod
    def choose(cls, model: HookedModel, states: int, words: Sequence[str] | None = None) -> StateWords:
        """The words of a model.

        Parameters
        ----------
        states
            How many states there are.
        words
            As many words, one for each state in every sequence. By default every sequence draws its own from :data:`WORDS`; in a
            model without a tokenizer, from all tokens, or if these are as many as the states, each state is the token of its number.

        Raises
        ------
        CausalProbeError
            If a word is not a single token or unknown to the model, two are the same, or there are too few.
        """
        tokenizer = getattr(model, "tokenizer", None)
        no_words = {*special_tokens(model).ids, unknown_token(tokenizer)} if tokenizer is not None else set()
        if words is not None:
            if tokenizer is None:
                raise CausalProbeError(
                    "Words were given for the states, and the model has no tokenizer to read them. Leave them out."
                )
            if len(words) != states:
                raise CausalProbeError(f"{len(words)} words were given for {states} states. Give one for each.")
            ids = {word: _tokens_of(tokenizer, word) for word in words}
            if several := {word: found for word, found in ids.items() if len(found) != 1}:
                named = ", ".join(f"{word!r} ({len(found)})" for word, found in several.items())
                raise CausalProbeError(
                    f"Not a single token of this model, with the number that it has: {named}. Choose other words."
                )
            if unknown := [word for word, found in ids.items() if found[0] in no_words]:
                raise CausalProbeError(f"No tokens of this model: {', '.join(map(repr, unknown))}. Choose other words.")
            if len({found[0] for found in ids.values()}) != states:
                raise CausalProbeError("Two states have the same token. Give each a word of its own.")
            return cls(torch.tensor([found[0] for found in ids.values()]), True, tuple(words))
        if tokenizer is not None:
            single: dict[int, str] = {}  # the first word of each token
            for word in WORDS:
                found = _tokens_of(tokenizer, word)
                if len(found) == 1 and found[0] not in no_words:
                    single.setdefault(found[0], word)
            if len(single) < states:
                raise CausalProbeError(
                    f"The words that stand for states are {len(single)} different single tokens of this model; {states} are needed. Give "
                    "words of your own."
                )
            return cls(torch.tensor(list(single)), False, tuple(single.values()))
        tokens = content_tokens(model)
        if len(tokens) < states:
            raise CausalProbeError(
                f"The model knows {len(tokens)} tokens, fewer than the {states} states that were asked for."
            )
        return cls(tokens, len(tokens) == states, tuple(map(str, tokens.tolist())))

    def draw(self, sequences: int, states: int, generator: torch.Generator) -> Int[Tensor, "sequence state"]:
        """The token of each state, by sequence."""
        if self.fixed:
            return self.pool.expand(sequences, -1)
        order = torch.rand(sequences, len(self.pool), generator=generator).argsort(1)[:, :states]
        return self.pool[order]


def _tokens_of(tokenizer: Any, word: str) -> list[int]:
    return list(tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
