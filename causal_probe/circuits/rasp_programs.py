"""Causal programs in RASP, to be compiled by tracr. Each says what it computes at a position from the tokens up to there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from causal_probe.circuits.known import Edge

__all__ = ["PROGRAMS", "RaspProgram"]


@dataclass(frozen=True)
class RaspProgram:
    """A program, and the sequences that it is run on.

    Attributes
    ----------
    make
        ``(rasp) -> SOp``, with tracr's module ``rasp``.
    description
        What it computes.
    vocab
        The tokens, all strings or all numbers.
    n
        Length of the sequences, without BOS.
    repeated
        Whether a sequence is a random order of the vocabulary, again and again; else its tokens are drawn evenly.
    without_effect
        Edges that are true by the rule and yet have no effect on any input but under "zero", and why.
    """

    make: Callable[[Any], Any]
    description: str
    vocab: tuple[Any, ...]
    n: int = 7
    repeated: bool = False
    without_effect: dict[Edge, str] = field(default_factory=dict)


#: By name.
PROGRAMS: dict[str, RaspProgram] = {}

LETTERS, DIGITS = ("a", "b", "c"), (0, 1, 2)


def program(
    name: str, description: str, vocab: tuple[Any, ...] = LETTERS, **more: Any
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Name a program."""

    def register(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        PROGRAMS[name] = RaspProgram(make, description, vocab, **more)
        return make

    return register


def equal(key: Any, query: Any) -> bool:
    """Whether two values are the same; nothing (None) is like no value."""
    return key is not None and key == query


def back(rasp: Any, k: int, of: Any = None) -> Any:
    """A sequence, by default the tokens, k back."""
    source = rasp.Map(lambda i: i - k, rasp.indices).named(f"minus_{k}")
    return rasp.Aggregate(
        rasp.Select(rasp.indices, source, rasp.Comparison.EQ), rasp.tokens if of is None else of
    ).named(f"{'token' if of is None else of.label}_{k}_back")


def share(rasp: Any, token: Any) -> Any:
    """The share of the tokens so far that are this one."""
    is_it = rasp.numerical(rasp.Map(lambda t: int(t == token), rasp.tokens)).named(f"is_{token}")
    so_far = rasp.Select(rasp.indices, rasp.indices, rasp.Comparison.LEQ)
    return rasp.numerical(rasp.Aggregate(so_far, is_it, default=0)).named(f"share_{token}")


@program("token-one-back", "The previous token.")
def _one_back(rasp: Any) -> Any:
    return back(rasp, 1)


@program("token-three-back-by-steps", "The token three back: one back, of what is two back.")
def _by_steps(rasp: Any) -> Any:
    return back(rasp, 1, back(rasp, 2))


@program("induction", "The token after the previous occurrence of this one.", ("a", "b", "c", "d"), repeated=True)
def _induction(rasp: Any) -> Any:
    return rasp.Aggregate(rasp.Select(back(rasp, 1), rasp.tokens, equal), rasp.tokens).named("induced")


@program(
    "induction-two-back",
    "The token two after the previous occurrence of this one.",
    ("a", "b", "c", "d"),
    repeated=True,
)
def _induction_two(rasp: Any) -> Any:
    return rasp.Aggregate(rasp.Select(back(rasp, 2), rasp.tokens, equal), rasp.tokens).named("induced")


@program("sum-of-two-lags", "The sum of the tokens one and three back.", DIGITS)
def _two_lags(rasp: Any) -> Any:
    return rasp.SequenceMap(lambda x, y: x + y, back(rasp, 1), back(rasp, 3)).named("sum")


@program("share-of-a", "The share of the tokens so far that are a.")
def _share(rasp: Any) -> Any:
    return share(rasp, "a")


@program("balance", "The share of opening brackets so far minus that of closing ones.", ("(", ")", "x"))
def _balance(rasp: Any) -> Any:
    return rasp.numerical(rasp.LinearSequenceMap(share(rasp, "("), share(rasp, ")"), 1, -1)).named("balance")


@program("a-so-far", "Whether an a has been so far.")
def _any(rasp: Any) -> Any:
    return rasp.Map(lambda x: x > 0, share(rasp, "a")).named("any")


@program("count-so-far", "How often this token has been, this time included.")
def _count(rasp: Any) -> Any:
    return rasp.SelectorWidth(rasp.Select(rasp.tokens, rasp.tokens, rasp.Comparison.EQ)).named("count")


@program("been-before", "Whether this token has been before.")
def _duplicate(rasp: Any) -> Any:
    return rasp.Map(lambda n: n > 1, _count(rasp)).named("been_before")


@program("count-smaller", "How many tokens so far are smaller than this one.", (0, 1, 2, 3))
def _smaller(rasp: Any) -> Any:
    return rasp.SelectorWidth(rasp.Select(rasp.tokens, rasp.tokens, rasp.Comparison.LT)).named("smaller")


@program("token-and-place", "The token, moved on by the position (modulo three).", DIGITS)
def _place(rasp: Any) -> Any:
    return rasp.SequenceMap(lambda t, i: (t + i) % 3, rasp.tokens, rasp.indices).named("moved")


@program(
    "first-token",
    "The first token.",
    without_effect={("pos_embed", "L0.mlp"): "The MLP gives 0 for every position, so no other position changes it."},
)
def _first(rasp: Any) -> Any:
    zero = rasp.Map(lambda i: 0, rasp.indices).named("zero")
    return rasp.Aggregate(rasp.Select(rasp.indices, zero, rasp.Comparison.EQ), rasp.tokens).named("first")


@program("changed", "Whether this token differs from the previous one.")
def _changed(rasp: Any) -> Any:
    return rasp.SequenceMap(lambda x, y: x != y, rasp.tokens, back(rasp, 1)).named("changed")


@program("sum-of-three", "The sum of this token and the two before, modulo three.", DIGITS)
def _three(rasp: Any) -> Any:
    two = rasp.SequenceMap(lambda x, y: (x + y) % 3, back(rasp, 1), back(rasp, 2)).named("two")
    return rasp.SequenceMap(lambda x, y: (x + y) % 3, rasp.tokens, two).named("three")


@program("pointer", "The token at the position that this token names.", (0, 1, 2, 3))
def _pointer(rasp: Any) -> Any:
    return rasp.Aggregate(rasp.Select(rasp.indices, rasp.tokens, rasp.Comparison.EQ), rasp.tokens).named("pointed")


@program("a-in-last-two", "Whether an a is among the two tokens before this one: an OR of two heads.")
def _either(rasp: Any) -> Any:
    return rasp.SequenceMap(lambda x, y: x == "a" or y == "a", back(rasp, 1), back(rasp, 2)).named("either")


@program("both-before-a", "Whether both tokens before this one are a: an AND of two heads.")
def _both(rasp: Any) -> Any:
    return rasp.SequenceMap(lambda x, y: x == "a" and y == "a", back(rasp, 1), back(rasp, 2)).named("both")


@program("pair-count", "How often this pair of tokens has been, this time included.", ("a", "b"))
def _pairs(rasp: Any) -> Any:
    pair = rasp.SequenceMap(lambda x, y: x + y, rasp.tokens, back(rasp, 1)).named("pair")
    return rasp.SelectorWidth(rasp.Select(pair, pair, equal)).named("pairs")
