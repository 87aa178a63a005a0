"""``causal-probe recover --data``: the causal graph of a user's token sequences, and a model's attention beside it."""

from __future__ import annotations

import dataclasses
import os

from causal_probe.discovery.sequences.codes import read_table
from causal_probe.discovery.sequences.lags import SequenceLags, lags_from_stream
from causal_probe.discovery.sequences.result import SequenceGraph
from causal_probe.discovery.sequences.study import graph_from_sequences
from causal_probe.experiments.beside import model_beside, trained_beside
from causal_probe.experiments.saving import kept
from causal_probe.options import takes
from causal_probe.options.recover import SequencesOptions

__all__ = ["graph_from_file"]


@takes(SequencesOptions)
def graph_from_file(data: str | os.PathLike[str], o: SequencesOptions) -> SequenceGraph | SequenceLags:
    """Find the causal graph of your token sequences (:func:`causal_probe.discovery.graph_from_sequences`).

    Returns
    -------
    SequenceGraph
        Or, if lags are asked for, :class:`~causal_probe.discovery.sequences.lags.SequenceLags`.

    Raises
    ------
    CausalProbeError
        If the file can't be read or holds no such tokens, or an argument can't be worked with; nothing is written then.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> coins = np.random.default_rng(0).integers(3, size=(400, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/coins.npy", coins)
    ...     graph_from_file(f"{folder}/coins.npy").structure
    'none'
    """
    tokens = read_table(data)
    settings = o.settings(data=os.fspath(data))
    memory = o.max_memory * 2**20
    with kept(o, settings, SequenceGraph if o.max_lag is None else SequenceLags) as saved:
        if o.max_lag is not None:
            lags = lags_from_stream(tokens, max_lag=o.max_lag, level=o.level, seed=o.seed, max_memory=memory)
            return saved(dataclasses.replace(lags, settings={**lags.settings, **settings}))
        found = graph_from_sequences(tokens, level=o.level, seed=o.seed, max_memory=memory)
        beside = [trained_beside(tokens, found, seed=o.seed)] if o.train else []
        beside += [] if o.beside is None else [model_beside(o.beside, tokens, found)]
        return saved(dataclasses.replace(found, beside=tuple(beside), settings={**found.settings, **settings}))
