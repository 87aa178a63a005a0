"""A causal graph from sequences as they are: no model, no query, an honest verdict.

>>> import numpy as np
>>> from causal_probe.discovery import graph_from_sequences
>>> coins = np.random.default_rng(0).integers(3, size=(400, 8))
>>> graph_from_sequences(coins).structure
'none'
"""

from causal_probe.discovery.sequences.codes import read_table
from causal_probe.discovery.sequences.study import graph_from_sequences

__all__ = ["graph_from_sequences", "read_table"]


def __dir__() -> list[str]:
    return [*__all__]
