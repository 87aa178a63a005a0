"""Where results come from, and how they are cited and shown."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
import torch

from causal_probe.results import BIBLIOGRAPHY, Table, cite, measured_with, merge_provenance, this_process, versions
from causal_probe.results import provenance as origin


def test_versions_name_what_is_installed_and_leave_out_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "RECORDED_PACKAGES", ("torch", "no-such-package-anywhere"))
    found = versions()
    assert found == {"python": ".".join(map(str, sys.version_info[:3])), "torch": found["torch"]}
    assert found["torch"] == torch.__version__


def test_a_checkout_that_is_not_installed_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nowhere)
    origin._version.cache_clear()
    try:
        assert set(versions()) == {"python", "causal-probe", "torch"}
    finally:
        origin._version.cache_clear()


def test_citing() -> None:
    citation = cite("nichani2024", "olsson2022", methods="We did it.")
    assert citation.methods == "We did it."
    assert str(citation).startswith("We did it.\n\n@inproceedings{nichani2024,")
    assert citation.bibtex.count("\n@") == 1
    with pytest.raises(KeyError):
        cite("nobody1900", methods="")


def test_every_bibliography_entry_is_whole() -> None:
    for key, entry in BIBLIOGRAPHY.items():
        assert entry.split("{")[1].startswith(f"{key},")
        assert entry.count("{") == entry.count("}")
        for field in ("title", "author", "year"):
            assert f"  {field} " in entry


def test_a_package_s_version_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: (read.append(name), "1.0")[1])
    origin._version.cache_clear()
    try:
        for _ in range(100):
            assert this_process()["versions"]["numpy"] == "1.0"
    finally:
        origin._version.cache_clear()
    assert sorted(read) == sorted({*origin.RECORDED_PACKAGES} - {"causal-probe", "torch"})  # these say it themselves


def test_merging_says_both_and_each_once() -> None:
    one = {"model": "m", "threads": 1, "versions": {"torch": "2.6.0", "numpy": "2.0"}}
    two = {"model": "m", "threads": 4, "versions": {"torch": "2.7.1", "numpy": "2.0", "scipy": "1.0"}}
    merged = merge_provenance(one, two, one, two)
    versions_of_both = {"torch": "2.6.0 and 2.7.1", "numpy": "2.0", "scipy": "1.0"}
    assert merged == {"model": "m", "threads": "1 and 4", "versions": versions_of_both}
    assert merge_provenance(merged, merged) == merged
    assert one["threads"] == 1


def test_what_a_methods_sentence_ends_with() -> None:
    assert measured_with({"versions": {"causal-probe": "1.0", "transformer-lens": "4.3"}}) == "causal-probe 1.0"
    assert measured_with({"versions": {}}) == "causal-probe from source"


def test_a_table_shows_so_many_rows_and_no_harm() -> None:
    table = Table("<b>\ud800", ("head", "score"), [(f"L0H{i}", i / 3) for i in range(40)], ["<script>"])
    assert "and 16 more" in table.text()
    assert len(table.text().splitlines()) == 1 + 1 + 24 + 2
    page = table.html()
    assert "<script>" not in page
    assert "&lt;b&gt;" in page
    page.encode()
    table.text().encode()
    assert page.count("<tr>") == 25
    assert Table("t", ("a",), []).text() == "t"
