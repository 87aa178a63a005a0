"""Sequences of your own, read, checked and coded.

Everything downstream asks only whether two tokens of one sequence are equal, so each sequence's tokens are numbered anew by how
often they occur in it (0 the most frequent; ties by first occurrence). A vocabulary of 50,000 symbols costs no more than the
number of distinct tokens in one sequence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from causal_probe.errors import CausalProbeError

__all__ = ["Codes", "code", "read_table", "stated_memory"]

#: Labels are compared between sequences (fixed dependence, column effects) up to this many; above, ranks within the sequence are.
MAX_LABELS = 64
#: Two in each half.
FEWEST = 4
READ = (".npy", ".csv", ".parquet")


@dataclass(frozen=True)
class Codes:
    """Tokens as they are used.

    Attributes
    ----------
    local
        [n_sequences, n_columns]; equal where the tokens of one sequence are, numbered by frequency within the sequence.
    shared
        [n_sequences, n_columns]; labels that mean the same in all sequences, or ``local`` if there are more than 64.
    d_vocab
        Number of distinct tokens.
    base
        [n_sequences, n_columns]; the smoothed frequency of each entry's token among the *other* entries of its sequence. With the entry itself
        counted, a token that is seen twice would look like half of what an edge has to explain.
    diagonal
        How much likelier a token is to follow itself along an edge than its frequency says, before an edge has been seen: 1 where rows are alike.
    """

    local: NDArray[np.intp]
    shared: NDArray[np.intp]
    d_vocab: int
    base: NDArray[np.float32]
    diagonal: float = 1.0

    @property
    def ranked(self) -> bool:
        """Whether ``shared`` holds ranks within each sequence, because there are too many labels to compare between sequences."""
        return self.d_vocab > MAX_LABELS

    def take(self, rows: slice | NDArray[np.intp]) -> Codes:
        """The same for some of the sequences."""
        return Codes(self.local[rows], self.shared[rows], self.d_vocab, self.base[rows], self.diagonal)

    def columns(self, chosen: Sequence[int]) -> Codes:
        """The same for some of the columns; frequencies are still those in the whole sequence."""
        return Codes(self.local[:, chosen], self.shared[:, chosen], self.d_vocab, self.base[:, chosen], self.diagonal)


def stated_memory(n_sequences: int, n_columns: int, distinct: int) -> int:
    """Bytes that the study takes at most, before any of them is taken."""
    counts = 4 * n_sequences * (distinct**2 + distinct)
    tables = 44 * n_sequences * n_columns + 16 * n_columns * 2**16 + 2**27
    return counts + tables


def code(tokens: Any, *, max_memory: int) -> Codes:
    """Check tokens [n_sequences, n_columns] and number them.

    Parameters
    ----------
    tokens
        Whole numbers, an array, a tensor, nested lists of equal length, or an iterable of such batches (read once, one after the other).
    max_memory
        Most bytes to take.

    Raises
    ------
    CausalProbeError
        If these are no whole numbers in a table of at least four sequences and two columns, or would not fit into ``max_memory``.
    """
    table = _table(tokens)
    n, columns = table.shape
    if n < FEWEST or columns < 2:
        raise CausalProbeError(
            f"The tokens are a table of {n} sequences and {columns} columns. A graph needs at least {FEWEST} sequences, two for each half, and 2 columns (and hundreds of sequences to be "
            "claimed): give tokens [n_sequences, n_columns]."
        )
    labels, shared = np.unique(table, return_inverse=True)
    local = np.empty(table.shape, np.intp)
    base = np.empty(table.shape, np.float32)
    block = max(1, 2**22 // columns**2)
    distinct = 0
    for start in range(0, n, block):
        local[start : start + block], base[start : start + block] = _rank(table[start : start + block])
        distinct = max(distinct, int(local[start : start + block].max()) + 1)
        asked = stated_memory(n, columns, distinct)
        if asked > max_memory:
            raise CausalProbeError(
                f"{n:,} sequences of {columns} columns with {distinct} distinct tokens in one sequence need {asked / 2**20:,.0f} MiB; max_memory is "
                f"{max_memory / 2**20:,.0f} MiB. Give fewer sequences, or raise max_memory."
            )
    shared = shared.reshape(table.shape).astype(np.intp) if len(labels) <= MAX_LABELS else local
    return Codes(local, shared, len(labels), base)


def read_table(path: str | os.PathLike[str]) -> NDArray[Any]:
    """A table of tokens from a .npy, .csv (commas, no header) or .parquet file (one column for each position).

    Raises
    ------
    CausalProbeError
        If the file has another suffix, can't be read, or holds pickled objects.
    """
    path = Path(path)
    if path.suffix not in READ:
        raise CausalProbeError(
            f"{path.name} has the suffix {path.suffix!r}, which isn't read. Give a table as {', '.join(READ)}."
        )
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            import pandas as pd

            found = (pd.read_csv(path, header=None) if path.suffix == ".csv" else pd.read_parquet(path)).to_numpy()
    except OSError as error:
        raise CausalProbeError(f"Can't read {path.name}: {error.strerror or 'it is damaged'}.") from error
    except (ValueError, EOFError) as error:
        raise CausalProbeError(
            f"Can't read {path.name} as one table of numbers: {' '.join(str(error).split())}. Rows of different lengths are not read."
        ) from error
    return np.asarray(found)


def _table(tokens: Any) -> NDArray[np.int64]:
    if hasattr(tokens, "to_numpy"):  # a DataFrame, whose iteration gives the names of its columns
        tokens = tokens.to_numpy()
    if hasattr(tokens, "detach"):
        tokens = tokens.detach().cpu().numpy()
    if isinstance(tokens, Iterable) and not isinstance(tokens, (list, tuple, np.ndarray, str, bytes)):
        batches = [_table(batch) for batch in tokens]
        if len({batch.shape[1] for batch in batches}) != 1:
            raise CausalProbeError(
                f"The batches have {sorted({batch.shape[1] for batch in batches})} columns. All must have as many, and there must be one."
            )
        return np.concatenate(batches)
    try:
        found = np.asarray(tokens)
    except ValueError as error:
        raise CausalProbeError("The rows of the tokens differ in length. Give sequences of one length.") from error
    if found.dtype == object:
        raise CausalProbeError("The tokens are no table of whole numbers: rows differ in length, or hold other things.")
    if found.dtype.kind not in "iu":
        hint = (
            " (and hold NaN, as where rows are of different lengths)"
            if found.dtype.kind == "f" and bool(np.isnan(found).any())
            else ""
        )
        raise CausalProbeError(
            f"The tokens are of the type {found.dtype}{hint}, which are no tokens. Give whole numbers [n_sequences, n_columns]."
        )
    if found.ndim != 2 or 0 in found.shape:
        raise CausalProbeError(f"The tokens have the shape {list(found.shape)}. Give a table [n_sequences, n_columns].")
    return found.astype(np.int64)


def _rank(table: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Each entry's rank by frequency in its row, and the smoothed frequency of its token in the rest of the row."""
    columns = table.shape[1]
    same = table[:, :, None] == table[:, None, :]
    often = same.sum(2)
    first = same.argmax(2)  # the column where the entry's token occurs first
    opens = first == np.arange(columns)
    # One number for each token of a row, larger for the more frequent, then for the earlier.
    key = often * columns + (columns - 1 - first)
    ahead = ((key[:, None, :] > key[:, :, None]) & opens[:, None, :]).sum(2)
    base = (often - 0.5) / (columns - 1 + 0.5 * opens.sum(1, keepdims=True))
    return ahead.astype(np.intp), base.astype(np.float32)
