"""What every result shares: where it came from, how it is told, shown, kept and cited, and how files and folders are written."""

from causal_probe.results.base import Result, load
from causal_probe.results.citing import BIBLIOGRAPHY, Citation, cite
from causal_probe.results.files import (
    digest,
    read_arrays,
    read_json,
    read_sealed,
    seal,
    write_arrays,
    write_bytes,
    write_json,
    write_text,
)
from causal_probe.results.folder import Claim, check_results_folder, claim, hold, list_files, results_folder
from causal_probe.results.jsonable import BINARY, UNSAVED, to_jsonable
from causal_probe.results.provenance import measured_with, merge_provenance, this_process, versions
from causal_probe.results.showing import Table, clean, escape, escape_character, html_table, is_showable
from causal_probe.results.tables import csv_text, parquet_bytes

__all__ = [
    "BIBLIOGRAPHY",
    "BINARY",
    "check_results_folder",
    "Citation",
    "cite",
    "Claim",
    "claim",
    "clean",
    "csv_text",
    "parquet_bytes",
    "digest",
    "escape",
    "escape_character",
    "hold",
    "html_table",
    "is_showable",
    "list_files",
    "load",
    "measured_with",
    "merge_provenance",
    "read_arrays",
    "read_json",
    "read_sealed",
    "Result",
    "results_folder",
    "seal",
    "Table",
    "this_process",
    "to_jsonable",
    "UNSAVED",
    "versions",
    "write_arrays",
    "write_bytes",
    "write_json",
    "write_text",
]

#: What tab completion offers; the rest of ``__all__`` is for who builds on it.
_OFFERED = (
    "BIBLIOGRAPHY",
    "Citation",
    "Result",
    "Table",
    "cite",
    "claim",
    "list_files",
    "load",
    "merge_provenance",
    "read_arrays",
    "read_json",
    "to_jsonable",
    "versions",
    "write_arrays",
    "write_bytes",
    "write_json",
    "write_text",
)


def __dir__() -> list[str]:
    return [*_OFFERED]
