"""English sentences from a small grammar, with their dependency trees: for trying a probe where no treebank is at hand.

Relative clauses and prepositional phrases stand between subject and verb, so that governors are near and far.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from causal_probe.arguments import Count, Seed, checked
from causal_probe.syntax.treebank import Sentence

__all__ = ["generated_sentences"]

DETERMINERS = ("the", "a", "every", "that", "one")
ADJECTIVES = ("old", "young", "small", "tall", "quiet", "clever", "red", "happy")
NOUNS = ("dog", "cat", "teacher", "child", "farmer", "bird", "horse", "doctor", "singer", "king", "lawyer", "girl")
VERBS = ("saw", "liked", "followed", "found", "helped", "called", "loved", "watched", "heard", "met")
PREPOSITIONS = ("near", "with", "behind", "beside")
ADVERBS = ("yesterday", "again", "quickly", "often")
#: Chance of an adjective, a second one, of a phrase behind the noun, and of an adverb.
ADJECTIVE, SECOND, BEHIND, ADVERB = 0.4, 0.2, 0.45, 0.3


class _Node(NamedTuple):
    """A word with its dependents before it, and behind it."""

    word: str
    relation: str
    before: Sequence[_Node] = ()
    behind: Sequence[_Node] = ()


@checked
def generated_sentences(n: Count, *, seed: Seed = 0) -> tuple[Sentence, ...]:
    """Different random sentences with their trees, relations named as in Universal Dependencies.

    Examples
    --------
    >>> generated_sentences(1, seed=1)[0].words
    ('every', 'cat', 'heard', 'every', 'horse')
    """
    rng = np.random.default_rng(seed)
    found: dict[Sentence, None] = {}
    while len(found) < n:
        found[_read(_clause(rng))] = None
    return tuple(found)


def _clause(rng: np.random.Generator) -> _Node:
    behind = [_noun(rng, "obj", depth=1)]
    if rng.random() < ADVERB:
        behind.append(_Node(str(rng.choice(ADVERBS)), "advmod"))
    return _Node(str(rng.choice(VERBS)), "root", [_noun(rng, "nsubj", depth=0)], behind)


def _noun(rng: np.random.Generator, relation: str, *, depth: int, case: str | None = None) -> _Node:
    before: list[_Node] = [] if case is None else [_Node(case, "case")]
    before.append(_Node(str(rng.choice(DETERMINERS)), "det"))
    adjectives = int(rng.random() < ADJECTIVE) + int(rng.random() < ADJECTIVE * SECOND)
    before += [_Node(str(word), "amod") for word in rng.choice(ADJECTIVES, adjectives, replace=False)]
    behind: list[_Node] = []
    if rng.random() < BEHIND / (1 + depth):
        if rng.random() < 0.5:
            behind.append(_noun(rng, "nmod", depth=depth + 1, case=str(rng.choice(PREPOSITIONS))))
        else:
            verb, thing = str(rng.choice(VERBS)), _noun(rng, "obj", depth=depth + 1)
            behind.append(_Node(verb, "acl:relcl", [_Node("who", "nsubj")], [thing]))
    return _Node(str(rng.choice(NOUNS)), relation, before, behind)


def _read(tree: _Node) -> Sentence:
    """A tree as words, governors and relations, in order."""
    rows: dict[int, tuple[str, int, str]] = {}
    counter = itertools.count()

    def place(tree: _Node) -> int:
        """Number the words of a tree in order; its own number."""
        word, relation, before, behind = tree
        children = [place(each) for each in before]
        own = next(counter)
        children += [place(each) for each in behind]
        rows[own] = word, -1, relation
        for child in children:
            rows[child] = rows[child][0], own, rows[child][2]
        return own

    place(tree)
    return Sentence(*zip(*(rows[number] for number in range(len(rows))), strict=True))
