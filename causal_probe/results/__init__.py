"""The base of all results: provenance, printing, display, files, folders and citation."""

from causal_probe.results.base import Result, load
from causal_probe.results.citing import BIBLIOGRAPHY, Citation
from causal_probe.results.citing import cite as cite

# For the rooms above, which build on them; not offered.
from causal_probe.results.files import digest as digest
from causal_probe.results.files import read_arrays as read_arrays
from causal_probe.results.files import read_json as read_json
from causal_probe.results.files import read_sealed as read_sealed
from causal_probe.results.files import seal as seal
from causal_probe.results.files import write_arrays as write_arrays
from causal_probe.results.files import write_bytes as write_bytes
from causal_probe.results.files import write_json as write_json
from causal_probe.results.files import write_text as write_text
from causal_probe.results.folder import Claim as Claim
from causal_probe.results.folder import check_results_folder as check_results_folder
from causal_probe.results.folder import claim
from causal_probe.results.folder import hold as hold
from causal_probe.results.folder import list_files as list_files
from causal_probe.results.folder import results_folder as results_folder
from causal_probe.results.jsonable import BINARY as BINARY
from causal_probe.results.jsonable import UNSAVED as UNSAVED
from causal_probe.results.jsonable import to_jsonable as to_jsonable
from causal_probe.results.provenance import measured_with as measured_with
from causal_probe.results.provenance import merge_provenance as merge_provenance
from causal_probe.results.provenance import this_process as this_process
from causal_probe.results.provenance import versions as versions
from causal_probe.results.showing import Rows as Rows
from causal_probe.results.showing import Table
from causal_probe.results.showing import clean as clean
from causal_probe.results.showing import escape as escape
from causal_probe.results.showing import escape_character as escape_character
from causal_probe.results.showing import html_table as html_table
from causal_probe.results.showing import is_showable as is_showable
from causal_probe.results.tables import csv_text as csv_text
from causal_probe.results.tables import parquet_bytes as parquet_bytes

__all__ = ["BIBLIOGRAPHY", "Citation", "Result", "Table", "claim", "load"]


def __dir__() -> list[str]:
    return [*__all__]
