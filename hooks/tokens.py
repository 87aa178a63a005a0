"""Which tokens of a model's vocabulary are content, which are not, and what its tokenizer puts around a text by itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.errors import CausalProbeError, CausalProbeWarning
from causal_probe.hooks.check import HookedModel

__all__ = ["SpecialTokens", "content_tokens", "special_tokens", "text_start"]

#: The character that a decoder writes for bytes that are no character.
NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens of a model that stand for no text.

    Attributes
    ----------
    ids
        Every id below ``cfg.d_vocab`` that is not content: special tokens, and ids that the tokenizer never gives (rows that
        fill up the embedding, and were never trained).
    bos
        The token that starts a text, None where there is none. It is known also where the tokenizer doesn't add it.
    pad
        The padding token, None where there is none.
    before, after
        Tokens that the tokenizer itself adds before and after a text; empty without a tokenizer.
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
    starts, ends, pads = starts_ends_pads(model)
    bos, pad = next(iter(starts), None), next(iter(pads), None)
    if tokenizer is None:
        return SpecialTokens(frozenset([*starts, *ends, *pads]), bos, pad, (), ())
    given = _remembered(tokenizer, "vocabulary", lambda: frozenset(tokenizer.get_vocab().values()))
    ids = _special_ids(tokenizer) | (set(vocabulary) - given)
    return SpecialTokens(frozenset(ids.intersection(vocabulary)), bos, pad, *added_by_itself(tokenizer))


def starts_ends_pads(model: HookedModel) -> tuple[list[int], list[int], list[int]]:
    """The BOS, EOS and padding tokens within the model's vocabulary: its tokenizer's where it has one, otherwise its configuration's."""
    says = getattr(model, "tokenizer", None) or model.cfg
    vocabulary = range(int(getattr(model.cfg, "d_vocab", None) or 2**63 - 1))
    bos, eos, pad = (_ids(says, f"{which}_token_id", vocabulary) for which in ("bos", "eos", "pad"))
    return bos, eos, pad


def content_tokens(model: HookedModel) -> Int[Tensor, " token"]:
    """The tokens from which random text is drawn: those that stand for text by themselves, in ascending order.

    They are all tokens but the :func:`special_tokens` and, where there is a tokenizer, *fragments*: tokens whose own text holds no
    whole character in some place, since byte-level vocabularies also have single bytes of longer characters, and byte strings that
    end within one. A text has a fragment only beside the bytes that complete it, so that fragments in random text are out of place
    as special tokens are. In SmolLM2's vocabulary they are 314 of 49,135, one in four sequences of 50 has one, and the induction
    scores of its best heads are lower by 0.01 to 0.02 on those.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> content_tokens(DisentangledTransformer(d_vocab=3, n_positions=5))
    tensor([0, 1, 2])
    """
    special = special_tokens(model).ids
    content = [token for token in range(int(model.cfg.d_vocab)) if token not in special]
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None:
        fragments = _remembered(tokenizer, frozenset(content), lambda: _fragments(tokenizer, content))
        content = [token for token in content if token not in fragments]
    return torch.tensor(content, dtype=torch.long)


def _fragments(tokenizer: Any, tokens: list[int]) -> frozenset[int]:
    """Those whose own text holds no whole character in some place."""
    alone = [[token] for token in tokens]
    fast = getattr(tokenizer, "backend_tokenizer", None)  # six times as fast
    texts = tokenizer.batch_decode(alone) if fast is None else fast.decode_batch(alone)
    return frozenset(token for token, text in zip(tokens, texts, strict=True) if NO_CHARACTER in text)


T = TypeVar("T")
#: What is known of tokenizers, for as long as they live: a vocabulary of a quarter of a million words takes a second to read.
_KNOWN: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


def _remembered(tokenizer: Any, what: Hashable, find: Callable[[], T]) -> T:
    """What was found before of this tokenizer while it had as many tokens."""
    try:
        known = _KNOWN.setdefault(tokenizer, {})
        key = what, len(tokenizer)
    except TypeError:  # one that can't be kept so, or doesn't say how many it has
        return find()
    if key not in known:
        known[key] = find()
    found: T = known[key]
    return found


def text_start(model: HookedModel, bos: str) -> tuple[int, ...]:
    """The tokens that come before a text.

    Parameters
    ----------
    bos
        ``"yes"``: the BOS token; ``"no"``: nothing; ``"auto"``: what the model's tokenizer puts there by itself.

    Raises
    ------
    CausalProbeError
        If it is none of these, or a BOS token is asked for and there is none.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> text_start(DisentangledTransformer(d_vocab=3, n_positions=4), "auto")
    ()
    """
    special = special_tokens(model)
    if bos == "auto":
        return special.before
    if bos == "no":
        return ()
    if bos != "yes":
        raise CausalProbeError(f"bos is 'auto', 'yes' or 'no'; it is {bos!r}.")
    if special.bos is None:
        raise CausalProbeError("A BOS token was asked for, and the model names none. Say bos='no'.")
    return (special.bos,)


def added_by_itself(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts in front of and behind a text."""
    special = _special_ids(tokenizer)
    texts = ("a", "A", "0", ".")
    text = next((text for text in texts if tokenizer(text, add_special_tokens=False)["input_ids"]), texts[0])
    alone, tokens = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
    if special.issuperset(
        alone
    ):  # the letter itself is unknown, and what stands for it is a special token that nothing added
        at = next((i for i in range(len(tokens)) if tokens[i : i + len(alone)] == alone), len(tokens))
        return tuple(tokens[:at]), tuple(tokens[at + len(alone) :])
    before = tuple(takewhile(special.__contains__, tokens))
    after = tuple(takewhile(special.__contains__, reversed(tokens[len(before) :])))
    return before, after[::-1]


def token_text(tokenizer: Any, token: int) -> str:
    """A token's own text, with the space that it begins with: SentencePiece's decoders drop that."""
    text, piece = str(tokenizer.decode([token])), tokenizer.convert_ids_to_tokens(token)
    return f" {text}" if str(piece).startswith("\u2581") and not text.startswith(" ") else text


def unknown_token(tokenizer: Any) -> int | None:
    """The token that stands for text which a tokenizer doesn't know; None where there is none, or it starts, ends or pads a text too."""
    token = getattr(tokenizer, "unk_token_id", None)
    if token is None:  # it may be known to the part that cuts texts alone
        name = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "unk_token", None)
        token = tokenizer.convert_tokens_to_ids(name) if name else None
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if token in ends else token


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def _ids(owner: Any, name: str, vocabulary: range) -> list[int]:
    # A configuration may name none, one or several, or a default that the vocabulary doesn't reach.
    found = getattr(owner, name, None)
    tokens: list[int | None] = found if isinstance(found, list) else [found]
    return [token for token in tokens if token is not None and token in vocabulary]


def check_known(tokenizer: Any, tokens: Sequence[int], n_tokens: int) -> None:
    """Raise where a text is unknown to a tokenizer as a whole, warn where a part of it is.

    Parameters
    ----------
    n_tokens
        How many of the tokens are the text's own.

    Raises
    ------
    CausalProbeError
        If all of them are the token that stands for any.
    """
    unknown = unknown_token(tokenizer)
    n_unknown = 0 if unknown is None else list(tokens).count(unknown)
    said = f"The tokenizer knows {n_tokens - n_unknown} of the text's {n_tokens} tokens; each of the others is a token that stands for any"
    if n_unknown and n_unknown == n_tokens:
        raise CausalProbeError(
            f"{said}. Write the text as the model was trained on it: with blanks between its letters, say."
        )
    if n_unknown:
        warnings.warn(f"{said}, and what is found is found of those.", CausalProbeWarning, stacklevel=4)
