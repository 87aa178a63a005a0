"""Sentences and their trees: does a head attend from each word to its governor, and does an encoder compute along a tree?

:func:`dependency_heads` and :func:`tree_projection` ask, of a treebank that :func:`read_conllu` reads or of :func:`generated_sentences`.
"""

from __future__ import annotations

from causal_probe.syntax.attachment import dependency_heads
from causal_probe.syntax.grammar import generated_sentences
from causal_probe.syntax.projection import tree_projection
from causal_probe.syntax.treebank import read_conllu

__all__ = ["dependency_heads", "generated_sentences", "read_conllu", "tree_projection"]


def __dir__() -> list[str]:
    return [*__all__]
