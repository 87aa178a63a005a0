"""Sentences as a model's tokens, and attention between tokens as attention between words.

A token belongs to the word in which its last character lies. Attention to a word is the sum over its tokens, attention from a word the mean over
its tokens (Clark et al. 2019). Tokens that are no part of a word (a start, an end) are left out, so rows don't sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.syntax.treebank import Sentence

__all__ = ["Tokenized", "between_words", "tokenize"]


class Tokenized(NamedTuple):
    """A sentence's tokens, and for each token the number of its word, -1 for none."""

    tokens: tuple[int, ...]
    word_of: tuple[int, ...]


def tokenize(tokenizer: Any, sentences: Sequence[Sentence], *, longest: int | None = None) -> list[Tokenized]:
    """The sentences' tokens, words with a space between, with what the tokenizer puts before and behind a text.

    Raises
    ------
    CausalProbeError
        If there is no tokenizer that says which characters a token stands for, a sentence has more than ``longest`` tokens, a word gets none, or more
        than half of the words' tokens are unknown to the tokenizer.
    """
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise CausalProbeError(
            "Words are told from tokens by the characters that a token stands for, which only a fast tokenizer says; this model has "
            f"{'none' if tokenizer is None else type(tokenizer).__name__}. Give one with `tokenizer=`, as hooks.to_hooked takes it."
        )
    found = [_tokenized(tokenizer, sentence, longest) for sentence in sentences]
    ids = [token for each in found for token, word in zip(each.tokens, each.word_of, strict=True) if word >= 0]
    unknown = sum(token == getattr(tokenizer, "unk_token_id", None) for token in ids)
    if unknown > len(ids) / 2:
        raise CausalProbeError(
            f"{unknown} of the sentences' {len(ids)} tokens are the tokenizer's {tokenizer.unk_token!r}: it doesn't know these words. Give sentences in its language."
        )
    return found


def _tokenized(tokenizer: Any, sentence: Sentence, longest: int | None) -> Tokenized:
    text = " ".join(sentence.words)
    word_at = [number for number, word in enumerate(sentence.words) for _ in range(len(word) + 1)]
    coded = tokenizer(text, return_offsets_mapping=True)
    tokens, spans = list(coded["input_ids"]), list(coded["offset_mapping"])
    words = tuple(word_at[end - 1] if text[begin:end].strip() else -1 for begin, end in spans)
    if lost := [word for number, word in enumerate(sentence.words) if number not in words]:
        raise CausalProbeError(f"The tokenizer gives no token of its own to {lost[0]!r} in {text[:60]!r}.")
    if longest is not None and len(tokens) > longest:
        raise CausalProbeError(f"{text[:40]!r} ... has {len(tokens)} tokens; the model's context holds {longest}.")
    return Tokenized(tuple(tokens), words)


def between_words(
    pattern: Float[Tensor, "head query key"], word_of: Sequence[int]
) -> Float[Tensor, "head from_word to_word"]:
    """Attention between the words of one sentence.

    Examples
    --------
    >>> pattern = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0.1, 0.3, 0.6]]])
    >>> between_words(pattern, [0, 1, 1])  # the second word has two tokens
    tensor([[[1.0000, 0.0000],
             [0.3000, 0.7000]]])
    """
    where = torch.tensor(word_of, device=pattern.device)
    member = (where == torch.arange(int(where.max()) + 1, device=pattern.device)[:, None]).to(pattern)
    return (member / member.sum(1, keepdim=True)) @ pattern @ member.T
