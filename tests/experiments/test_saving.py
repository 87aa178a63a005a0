"""What a study writes comes back: every result, from its folder and from its file, and what it says of itself is the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import causal_probe
from causal_probe.errors import CausalProbeError
from causal_probe.reports import report, save
from causal_probe.results import Result
from causal_probe.results.jsonable import set_aside
from causal_probe.viz import Report
from tests.viz import every_report

KINDS = [kind for kind in every_report.RESULTS if kind != "reproduce"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_result_comes_back_from_its_folder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Result = every_report.RESULTS[kind]()
    shown = report(found)
    monkeypatch.setattr("causal_probe.reports.saving.report", lambda result: Report("", [], {}, {}, ""))
    save(found, tmp_path / "out")
    again = causal_probe.load(tmp_path / "out")
    assert type(again) is type(found)
    assert repr(again) == repr(found)
    assert str(again.cite()) == str(found.cite())
    assert again.call == found.call
    assert again.to_dict() == json.loads(json.dumps(found.to_dict()))
    (plain, arrays), (_, expected) = set_aside(again), set_aside(found)
    assert plain
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert again.provenance == found.provenance
    # The page of what was read says the same, but for what is drawn from a live model.
    page = report(again)
    assert (page.title, page.summary) == (shown.title, shown.summary)
    assert [section.title for section in page.sections] == [section.title for section in shown.sections]


def test_versions_are_those_of_the_process_that_measured(tmp_path: Path) -> None:
    found = every_report.gradient()
    old = dataclasses.replace(found, provenance={**found.provenance, "versions": {"causal-probe": "0.0.7"}})
    save(old, tmp_path / "out")
    again = causal_probe.load(tmp_path / "out")
    assert again.provenance["versions"] == {"causal-probe": "0.0.7"}
    assert json.loads((tmp_path / "out" / "result.json").read_text())["provenance"]["versions"] == {
        "causal-probe": "0.0.7"
    }
    assert report(again).versions == {"causal-probe": "0.0.7"}


def test_a_folder_without_a_result(tmp_path: Path) -> None:
    with pytest.raises(CausalProbeError, match="holds no result that can be loaded"):
        causal_probe.load(tmp_path)
    with pytest.raises(CausalProbeError, match="Can't read"):
        causal_probe.load(tmp_path / "nothing.safetensors")
