"""Sequences on which head types can be told apart: repeated random tokens, and repeated walks whose n-grams share their ends."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.arguments import Count, Seed
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import probe
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.hooks.preflight import context_length
from causal_probe.hooks.tokens import content_tokens, text_start

__all__ = ["Sequences", "longest_ngram", "make_sequences", "ngram_tokens", "repeated_tokens", "varied_repeats"]

#: Tokens in a period, and sequences, where nothing stands in the way.
PERIOD = 50
SEQUENCES = 32
#: The most tokens that are made at once, 1 GiB of them.
LARGEST = 2**27
#: The context of a model that names none: more than is ever made by default.
UNLIMITED = 2**20


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences that were made, and how.

    Attributes
    ----------
    tokens
        [sequence, pos], on the model's device.
    settings
        What made them: ``kind``, ``n_sequences``, ``period``, ``copies``, ``bos`` (what was asked for), ``start`` (the tokens that
        each sequence begins with), ``drawn_from`` (how many tokens could be drawn), ``seed``.
    """

    tokens: Int[Tensor, "sequence pos"]
    settings: Mapping[str, Any]


def make_sequences(model: HookedModel, kind: str | Callable[..., Sequences], **options: Any) -> Sequences:
    """Sequences of a kind, as a template's ``shown_by`` names it.

    Parameters
    ----------
    kind
        ``"repeated"``: :func:`repeated_tokens`; ``"3-gram"``: :func:`ngram_tokens` of that n; or a function that makes them.
    options
        ``n_sequences``, ``period``, ``bos``, ``seed``, as for these functions.

    Raises
    ------
    CausalProbeError
        If there is no such kind, or the function says so.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> make_sequences(DisentangledTransformer(d_vocab=12, n_positions=48), "2-gram", n_sequences=2).settings["kind"]
    '2-gram'
    """
    if callable(kind):
        return kind(model, **options)
    if kind == "repeated":
        return repeated_tokens(model, **options)
    if n := longest_ngram([kind]):
        return ngram_tokens(model, n=n, **options)
    raise CausalProbeError(
        f"There are no sequences of the kind {kind!r}; there are 'repeated', 'N-gram' such as '3-gram', or a function that makes them."
    )


def longest_ngram(kinds: Iterable[str]) -> int | None:
    """The largest n among kinds such as ``"3-gram"``, whose sequences serve the smaller ones too; None where there is none.

    >>> longest_ngram(["repeated", "2-gram", "3-gram"]), longest_ngram(["repeated"])
    (3, None)
    """
    found = [int(match[1]) for kind in kinds if (match := re.fullmatch(r"(\d+)-gram", kind))]
    return max(found, default=None)


@probe
def repeated_tokens(
    model: HookedModel,
    *,
    n_sequences: Count | None = None,
    period: int | None = None,
    bos: str = "auto",
    seed: Seed = 0,
) -> Sequences:
    """Random tokens, repeated: x_1 ... x_p x_1 ... x_p, with a BOS token first where there is to be one.

    The tokens of a period are drawn without replacement, so that each has exactly one earlier occurrence in the second copy.
    Only tokens that stand for text by themselves are drawn: no special and padding tokens, and no fragments of characters
    (:func:`~causal_probe.hooks.tokens.content_tokens`).

    Parameters
    ----------
    model
        Says which tokens there are (``cfg.d_vocab``, ``tokenizer``), and how many fit (``cfg.n_ctx``).
    n_sequences
        How many. By default 32, and more where the period is short, so that there are about as many tokens.
    period
        Tokens in a period. By default 50, or what the context and the vocabulary hold; where the vocabulary is the
        limit, there are more than two copies, to at most 100 tokens.
    bos
        Whether a BOS token comes first: ``"yes"``, ``"no"``, or ``"auto"``, what the model's tokenizer does by itself.
    seed
        Of the draws.

    Raises
    ------
    CausalProbeError
        If an argument is out of range, the sequences don't fit, or a BOS token is asked for and there is none.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> repeated_tokens(DisentangledTransformer(d_vocab=12, n_positions=8), n_sequences=1, period=4).tokens
    tensor([[8, 0, 5, 9, 8, 0, 5, 9]])
    """
    allowed, start, room = _vocabulary(model, bos)
    limit = min(len(allowed), room // 2)
    if period is None:
        period = min(PERIOD, limit)
        copies = min(2 * PERIOD, room) // max(period, 1)
    else:
        copies = 2
    if not 2 <= period <= limit:
        raise CausalProbeError(
            f"Two copies of {period} different tokens are wanted, of at least 2; the context has room for {room} tokens, and "
            f"{len(allowed)} can be drawn."
        )
    n_sequences = _count(n_sequences, period)
    generator = torch.Generator().manual_seed(seed)
    periods = [allowed[torch.randperm(len(allowed), generator=generator)[:period]] for _ in range(n_sequences)]
    made = {"kind": "repeated", "copies": copies, "bos": bos, "drawn_from": len(allowed), "seed": seed}
    return _finish(model, torch.stack(periods), start, made)


def varied_repeats(
    model: HookedModel, *, n_sequences: int | None = None, period: int | None = None, bos: str = "auto", seed: int = 0
) -> Sequences:
    """:func:`repeated_tokens` of one length, each with a period and an offset of its own, so that nothing repeats at a fixed distance.

    A sequence's period is from three quarters of ``period`` to that; before it stand some of the tokens that it leaves out, which
    don't occur again. Parameters are those of :func:`repeated_tokens`; in the settings ``period`` is the longest.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> varied_repeats(DisentangledTransformer(d_vocab=12, n_positions=16), n_sequences=2, period=8, seed=2).tokens
    tensor([[ 0,  9,  3,  2, 10,  5,  0,  9,  3,  2, 10,  5,  0,  9,  3,  2],
            [ 1,  9,  7,  6, 11,  8,  4,  5,  1,  9,  7,  6, 11,  8,  4,  5]])
    """
    made = repeated_tokens(model, n_sequences=n_sequences, period=period, bos=bos, seed=seed)
    longest, start = made.settings["period"], len(made.settings["start"])
    generator = torch.Generator().manual_seed(seed)
    tokens = made.tokens.clone()
    place = torch.arange(tokens.shape[1] - start, device=tokens.device)
    for row in tokens:
        its = int(torch.randint(longest - longest // 4, longest + 1, (), generator=generator))
        offset = int(torch.randint(0, longest - its + 1, (), generator=generator))
        once = row[start : start + longest].clone()
        row[start:] = torch.where(
            place < offset, once[(its + place).clamp(max=longest - 1)], once[(place - offset) % its]
        )
    return Sequences(tokens, {**made.settings, "varied": True})


@probe
def ngram_tokens(
    model: HookedModel,
    *,
    n: int = 3,
    n_sequences: Count | None = None,
    period: int | None = None,
    bos: str = "auto",
    seed: Seed = 0,
) -> Sequences:
    """Repeated walks in which n tokens determine the next one, and fewer do not.

    On tokens that were drawn without replacement, all of the n-gram templates coincide. Here a period is a random closed walk in
    which every n-gram occurs once, and in it every shorter one, of k tokens, 2^(n - k) times, before different tokens and
    after different tokens: an Eulerian circuit over the (n-1)-grams of a graph in which each of m tokens has two
    successors and two predecessors. So the period has 2^(n - 1) m tokens.

    Parameters
    ----------
    n
        At least 2. The sequences serve all smaller n too.
    period
        At most this many tokens in a period; by default 50, or half of what the context holds.
    model, n_sequences, bos, seed
        As for :func:`repeated_tokens`.

    Raises
    ------
    CausalProbeError
        As :func:`repeated_tokens`; m is at least 2.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> ngram_tokens(DisentangledTransformer(d_vocab=12, n_positions=48), n=2, n_sequences=2).tokens.shape
    torch.Size([2, 48])
    """
    allowed, start, room = _vocabulary(model, bos)
    if n < 2:
        raise CausalProbeError(f"Sequences for n-grams need n of at least 2; it is {n}.")
    longest = min(period or PERIOD, room // 2)
    m = min(longest >> (n - 1), len(allowed))
    if m < 2:
        raise CausalProbeError(
            f"Sequences for {n}-grams need two copies of {2**n} tokens or more; a period of at most {longest} is possible."
        )
    generator = torch.Generator().manual_seed(seed)
    n_sequences = _count(n_sequences, m << (n - 1))
    periods = [
        allowed[torch.randperm(len(allowed), generator=generator)[:m]][_walk(m, n, generator)]
        for _ in range(n_sequences)
    ]
    made = {"kind": f"{n}-gram", "copies": 2, "bos": bos, "drawn_from": len(allowed), "seed": seed}
    return _finish(model, torch.stack(periods), start, made)


def _walk(m: int, n: int, generator: torch.Generator) -> Tensor:
    """A random closed walk over ``m`` tokens that passes each of its ``m 2^(n-1)`` n-grams once."""
    # Successors i and i+1 for two tokens (then a token may follow itself); i+1 and i+jump for more.
    jump = 0 if m == 2 else int(torch.randint(2, m, (), generator=generator))
    grams: list[tuple[int, ...]] = [(i,) for i in range(m)]
    for _ in range(n - 2):
        grams = [(*gram, (gram[-1] + step) % m) for gram in grams for step in (1, jump)]
    edges = [(gram, (*gram[1:], (gram[-1] + step) % m)) for gram in grams for step in (1, jump)]
    order = torch.randperm(len(edges), generator=generator).tolist()
    circuit = nx.eulerian_circuit(nx.DiGraph([edges[i] for i in order]))  # follows the edges as they were put in
    return torch.tensor([gram[0] for gram, _ in circuit])


def _finish(model: HookedModel, periods: Tensor, start: tuple[int, ...], made: Mapping[str, Any]) -> Sequences:
    first = torch.tensor(start, dtype=torch.long).expand(len(periods), -1)
    tokens = torch.cat([first, periods.repeat(1, made["copies"])], 1)
    settings = {**made, "n_sequences": len(periods), "period": periods.shape[1], "start": list(start)}
    return Sequences(tokens.to(describe(model)["device"] or "cpu"), settings)


def _count(n_sequences: int | None, period: int) -> int:
    if n_sequences is None:
        return max(SEQUENCES, math.ceil(SEQUENCES * PERIOD / period))
    if n_sequences < 1:
        raise CausalProbeError(f"One sequence or more is needed; {n_sequences} were asked for.")
    if n_sequences * period > LARGEST:
        raise CausalProbeError(
            f"{n_sequences:,} sequences of periods of {period} tokens were asked for; at most {LARGEST // period:,} are made at once."
        )
    return n_sequences


def _vocabulary(model: HookedModel, bos: str) -> tuple[Tensor, tuple[int, ...], int]:
    """The tokens that can be drawn, those that come first, and how many tokens fit after them."""
    start = text_start(model, bos)
    longest = context_length(model) or UNLIMITED
    return content_tokens(model), start, longest - len(start)
