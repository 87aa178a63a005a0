"""A causal graph from sequences as they are: no model, no query, an honest verdict.

>>> import numpy as np
>>> from causal_probe.from_sequences import graph_from_sequences
>>> coins = np.random.default_rng(0).integers(3, size=(400, 8))
>>> graph_from_sequences(coins).structure
'none'
"""

from causal_probe.from_sequences.codes import read_table
from causal_probe.from_sequences.result import READ_AS, SequenceGraph
from causal_probe.from_sequences.study import graph_from_sequences
from causal_probe.from_sequences.swaps import SwapTest
from causal_probe.from_sequences.verdicts import Assumption, Node

__all__ = ["READ_AS", "Assumption", "Node", "SequenceGraph", "SwapTest", "graph_from_sequences", "read_table"]


def __dir__() -> list[str]:
    return [*__all__]
