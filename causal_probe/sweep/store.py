"""Where a sweep's results lie: a folder with one Parquet file for each finished cell, which together are one dataset.

    sweep.json      the spec
    cells/          <key>.parquet, one for each finished cell: pandas.read_parquet reads them all
    failed/         <key>.json, one for each cell that failed, with its error
    summary.csv     one row for each cell
    merged.csv      where cells are shards of a corpus, and all are there: the scans of the whole
    report.html     the points with their metrics, and what failed

A file appears whole or not at all, and is never changed. All have the same columns, so they are one table; a row says all that
its cell says. What concerns the cell as a whole is in the file's own metadata, with checksums of both.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from causal_probe.errors import CausalProbeError
from causal_probe.results import hold, read_sealed, seal, to_jsonable, versions, write_bytes, write_json
from causal_probe.results.files import check_format
from causal_probe.sweep.plan import Cell

__all__ = ["COLUMNS", "FORMAT", "Store", "encode"]

#: Of what is written here. Files of a higher number are not read.
FORMAT = 1

#: The columns of the dataset. Null where a probe doesn't measure such a thing, or it is undefined.
COLUMNS = pa.schema(
    [
        # Where a row comes from.
        ("cell", pa.string()),  # the cell's key
        ("probe", pa.string()),
        ("model", pa.string()),  # the option; without one, the model that the probe makes
        ("revision", pa.string()),
        ("step", pa.int64()),  # the training step of a checkpoint
        ("corpus", pa.string()),
        ("shard", pa.string()),
        ("graph", pa.string()),
        ("graph_seed", pa.int64()),
        ("seed", pa.int64()),
        ("derived_seed", pa.int64()),
        ("threads", pa.int64()),
        ("options", pa.string()),  # all options, as JSON
        ("inputs", pa.string()),  # fingerprints of the files that they name, as JSON
        ("dtype", pa.string()),
        ("device", pa.string()),
        ("versions", pa.string()),  # of the packages, as JSON
        # What it is about: a head, an edge, or a head's edge.
        ("layer", pa.int64()),
        ("head", pa.int64()),
        ("template", pa.string()),
        ("child", pa.int64()),
        ("parent", pa.int64()),
        # The measurement.
        ("score", pa.float64()),  # of a head, or the gradient's evidence for an edge
        ("chance", pa.float64()),
        ("stderr", pa.float64()),  # of score, attention or gain, whichever the probe decides by
        ("chance_variance", pa.float64()),  # of the chance as a mean over sequences, and
        ("covariance", pa.float64()),  # of score and chance: what merging shards needs
        ("excess", pa.float64()),
        ("excess_stderr", pa.float64()),
        ("sink", pa.float64()),
        ("nothing", pa.float64()),
        ("attention", pa.float64()),
        ("gain", pa.float64()),
        ("margin", pa.float64()),  # of an edge: its gain less the gain with the child redrawn as a root
        ("margin_stderr", pa.float64()),
        ("p_value", pa.float64()),
        ("log_e_value", pa.float64()),
        ("measured_rows", pa.int64()),
        ("n_sequences", pa.int64()),
        ("found", pa.bool_()),  # the head is called what the template says; the edge is claimed
        ("true", pa.bool_()),  # the edge is in the true graph
    ]
)
#: The exceptions of pyarrow for a damaged file: names that are no text are ValueErrors.
UNREADABLE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, RuntimeError)
#: Where the metadata of a file holds the cell.
METADATA = b"causal_probe.sweep"
#: Keys of a probe's rows that are not columns and are dropped.
NOT_KEPT = frozenset({"rows"})


def encode(
    cell: Cell, rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], provenance: Mapping[str, Any]
) -> bytes:
    """The file of a finished cell. It holds no time and no place, so the same cell gives the same bytes.

    Raises
    ------
    CausalProbeError
        If a row has a column that there is not.
    """
    names = set(COLUMNS.names)
    if unknown := sorted({name for row in rows for name in row} - names - NOT_KEPT):
        raise CausalProbeError(f"A probe's rows have the columns {', '.join(unknown)}, which the dataset has not.")
    installed = versions()
    origin = {
        "cell": cell.key,
        "probe": cell.probe,
        "model": cell.options.get("model", provenance.get("model")),
        "seed": cell.seed,
        "derived_seed": cell.derived_seed,
        "threads": cell.threads,
        "options": _json(cell.options),
        "inputs": _json(cell.inputs),
        "dtype": provenance.get("dtype"),
        "device": provenance.get("device"),
        "versions": _json(installed),
    }
    origin |= {
        name: cell.options[name]
        for name in ("revision", "corpus", "shard", "graph", "graph_seed")
        if name in cell.options
    }
    table = pa.Table.from_pylist(
        [{name: _defined(value) for name, value in {**row, **origin}.items() if name in names} for row in rows], COLUMNS
    )
    about = {
        "format": FORMAT,
        "cell": cell,
        "rows": len(rows),
        "content": _digest(table),
        "metrics": metrics,
        "versions": installed,
    }
    table = table.replace_schema_metadata({METADATA: _json(seal(about))})
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    return file.getvalue()


class Store:
    """The folder of a sweep.

    Parameters
    ----------
    folder
        Made when it is written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.cells = self.folder / "cells"
        self.failed = self.folder / "failed"

    @contextlib.contextmanager
    def writing(self, cells: Sequence[Cell], spec: Mapping[str, Any]) -> Iterator[None]:
        """Hold the folder for writing; tidy up after an interruption, and write down the spec.

        Raises
        ------
        CausalProbeError
            If somebody else writes into the folder, it can't be written, holds something else, a newer format, or cells that are
            not asked for.
        """
        try:
            with hold(self.folder):
                self._open(cells, spec)
                yield
        except OSError as error:
            raise CausalProbeError(f"Can't write into {self.folder}: {error.strerror or error}.") from error

    def _open(self, cells: Sequence[Cell], spec: Mapping[str, Any]) -> None:
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self._is_ours():
            raise CausalProbeError(
                f"{self.folder} is not empty and holds no sweep. Name a new or empty folder, or one of an earlier sweep."
            )
        for place in (self.cells, self.failed):
            place.mkdir(parents=True, exist_ok=True)
        self._check(cells)
        for place in (self.folder, self.cells, self.failed):
            for left in place.glob(".*.causal-probe-*"):
                left.unlink()
        about = {"kind": "sweep", "format": FORMAT, "spec": spec, "cells": len(cells), "versions": versions()}
        write_json(self.folder / "sweep.json", seal(about))

    def finished(self) -> set[str]:
        """The keys of the cells that are there."""
        return {path.stem for path in self.cells.glob("*.parquet")} if self.cells.is_dir() else set()

    def put(self, key: str, content: bytes) -> None:
        """Keep a finished cell; forget that it has failed before."""
        write_bytes(self._path(key), content)
        (self.failed / f"{key}.json").unlink(missing_ok=True)

    def put_failure(self, cell: Cell, error: str, traceback: str | None) -> None:
        """Keep the error of a cell."""
        about = {"format": FORMAT, "cell": cell, "error": error, "traceback": traceback}
        write_json(self.failed / f"{cell.key}.json", seal(about))

    def failure(self, key: str) -> str | None:
        """The error of a cell that failed when it was last tried."""
        path = self.failed / f"{key}.json"
        return str(read_sealed(path)["error"]) if path.is_file() else None

    def about(self, key: str) -> dict[str, Any]:
        """The entries of a finished cell's file about the cell as a whole: ``cell``, ``rows``, ``metrics``, ``versions``.

        Raises
        ------
        CausalProbeError
            If the file is of a newer format, or damaged.
        """
        path = self._path(key)
        try:
            metadata = pq.read_schema(path).metadata or {}
        except UNREADABLE as error:
            raise _damaged(path, error) from error
        if METADATA not in metadata:
            raise CausalProbeError(f"{path} was not written by a sweep.")
        try:
            about = dict(json.loads(metadata[METADATA]))
        except (ValueError, TypeError) as error:
            raise _damaged(path, error) from error
        check_format(path, about, FORMAT)
        if seal(about) != about:
            raise _damaged(path, "the checksum of what it says about its cell differs")
        return about

    def read(self, keys: Sequence[str]) -> pa.Table:
        """The rows of finished cells, in the order of the keys.

        Raises
        ------
        CausalProbeError
            If a file is of a newer format, or damaged.
        """
        tables = []
        for key in keys:
            about = self.about(key)
            try:
                table = pq.read_table(self._path(key), schema=COLUMNS, page_checksum_verification=True)
            except UNREADABLE as error:
                raise _damaged(self._path(key), error) from error
            if _digest(table) != about["content"]:
                raise _damaged(self._path(key), "the checksum of its rows differs")
            tables.append(table.replace_schema_metadata(None))
        return pa.concat_tables(tables) if tables else COLUMNS.empty_table()

    def _path(self, key: str) -> Path:
        return self.cells / f"{key}.parquet"

    def _is_ours(self) -> bool:
        there = {path.name for path in self.folder.iterdir() if ".causal-probe-" not in path.name}
        return (self.folder / "sweep.json").is_file() or there <= {"cells", "failed"}

    def _check(self, cells: Sequence[Cell]) -> None:
        path = self.folder / "sweep.json"
        if path.is_file():
            check_format(path, read_sealed(path), FORMAT)
        if others := self.finished() - {cell.key for cell in cells}:
            raise CausalProbeError(
                f"{self.folder} holds {len(others)} finished cells that this sweep does not ask for. A sweep may grow; for another "
                "one, or after a change of a file that the cells read, name another folder."
            )


def _damaged(path: Path, error: Exception | str) -> CausalProbeError:
    return CausalProbeError(f"{path} can't be read as Parquet: {error}. Remove it, and its cell is run again.")


def _digest(table: pa.Table) -> str:
    """A checksum of the rows, whatever the file that they come from says about them."""
    found = hashlib.sha256()
    for name in table.column_names:
        column = table[name]
        found.update(f"{name} {column.type} {len(column)} ".encode() + column.is_null().to_numpy().tobytes())
        if pa.types.is_string(column.type):
            found.update(json.dumps(column.to_pylist()).encode())
        elif column.null_count < len(column):
            filled = column.fill_null(pa.scalar(False if pa.types.is_boolean(column.type) else 0, column.type))
            found.update(filled.to_numpy().tobytes())
    return found.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(to_jsonable(value), sort_keys=True, ensure_ascii=False, allow_nan=False)


def _defined(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value
