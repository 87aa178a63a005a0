"""Which tokens of a model's vocabulary are not content, and what its tokenizer puts around a text by itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from causal_probe.hooks.check import HookedModel

__all__ = ["SpecialTokens", "special_tokens"]


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens of a model that stand for no text.

    Attributes
    ----------
    ids
        Every id below ``cfg.d_vocab`` that is not content: special tokens, and ids that the tokenizer never gives (rows that
        fill up the embedding, and were never trained). Random text is drawn from the others.
    bos
        The token that starts a text, None where there is none. It is known also where the tokenizer doesn't add it.
    pad
        The padding token, None where there is none.
    before, after
        What the tokenizer puts in front of and behind a text by itself; empty without a tokenizer.
    """

    ids: frozenset[int]
    bos: int | None
    pad: int | None
    before: tuple[int, ...]
    after: tuple[int, ...]


def special_tokens(model: HookedModel) -> SpecialTokens:
    """The special tokens of a model: by its tokenizer where it has one, otherwise by its configuration.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> special_tokens(DisentangledTransformer(d_vocab=3, n_positions=5))
    SpecialTokens(ids=frozenset(), bos=None, pad=None, before=(), after=())
    """
    tokenizer = getattr(model, "tokenizer", None)
    vocabulary = range(int(model.cfg.d_vocab))
    says = model.cfg if tokenizer is None else tokenizer
    starts, ends, pads = (_ids(says, f"{which}_token_id", vocabulary) for which in ("bos", "eos", "pad"))
    bos, pad = next(iter(starts), None), next(iter(pads), None)
    if tokenizer is None:
        return SpecialTokens(frozenset([*starts, *ends, *pads]), bos, pad, (), ())
    ids = _special_ids(tokenizer) | (set(vocabulary) - set(tokenizer.get_vocab().values()))
    return SpecialTokens(frozenset(ids.intersection(vocabulary)), bos, pad, *added_by_itself(tokenizer))


def added_by_itself(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts in front of and behind a text."""
    special = _special_ids(tokenizer)
    tokens = tokenizer("a")["input_ids"]
    before = tuple(takewhile(special.__contains__, tokens))
    after = tuple(takewhile(special.__contains__, reversed(tokens[len(before) :])))
    return before, after[::-1]


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _ids(owner: Any, name: str, vocabulary: range) -> list[int]:
    # A configuration may name none, one or several, or a default that the vocabulary doesn't reach.
    found = getattr(owner, name, None)
    tokens: list[int | None] = found if isinstance(found, list) else [found]
    return [token for token in tokens if token is not None and token in vocabulary]
