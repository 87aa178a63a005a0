"""Reproductions: parts are done once, folders are whole, and the command does what the function does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from causal_probe import CausalProbeError, results, viz
from causal_probe import papers as registry
from causal_probe.cli import main
from causal_probe.models import DisentangledTransformer
from causal_probe.papers import reproduce
from causal_probe.papers.base import Line, Reproduction, Run, Study
from causal_probe.reports import write_page
from causal_probe.tasks import generator
from causal_probe.training.checkpoint import Progress


def tiny(run: Run, calls: list[str] | None = None) -> Reproduction:
    def compute() -> dict[str, Any]:
        if calls is not None:
            calls.append("computed")
        return {"value": 0.1 + run.seed, "curve": np.arange(3.0), "pair": (1, 2)}

    part = run.part("one", compute)
    return Reproduction(
        name="tiny",
        title="A <tiny> one",
        paper=("vonoswald2023",),
        summary="Nothing.",
        lines=(
            Line("value", part["value"], 0.01, 0.1, "by hand", True),
            Line("nothing", None, note="there is none"),
        ),
        figures={
            "curve": viz.curves({"": {"c": viz.Curve([0, 1, 2], part["curve"].tolist())}}, x_name="x", y_name="y")
        },
        settings=run.settings,
        arrays={"curve": part["curve"]},
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(registry, "REPRODUCTIONS", {"tiny": Study(lambda run: tiny(run, seen), "Tiny", (1, 2))})
    return seen


def test_a_folder_is_whole_and_strict(calls: list[str], tmp_path: Path) -> None:
    result = registry.reproduce("tiny", out=tmp_path / "out", page=write_page)
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == set(content["files"])
    assert {"curve.svg", "report.html", "arrays.safetensors", "result.json", "parts/one.json"} <= found
    assert content["lines"][0]["ours"] == result.lines[0].ours
    assert content["lines"][1]["ours"] is None
    assert "A &lt;tiny&gt; one" in (tmp_path / "out" / "report.html").read_text()
    assert "&lt;tiny&gt;" in result._repr_html_()
    assert "undefined: there is none" in repr(result)
    assert list(result.to_pandas()["quantity"]) == ["value", "nothing"]


def test_a_part_of_other_settings_or_without_its_arrays_is_refused(tmp_path: Path) -> None:
    def begun(steps: int) -> dict[str, Any]:
        run = Run(folder=tmp_path, settings={"name": "n"})
        return run.part("one", lambda: {"x": 1, "y": np.arange(3)}, settings={"steps": steps})

    assert begun(5)["y"].tolist() == begun(5)["y"].tolist() == [0, 1, 2]
    with pytest.raises(CausalProbeError, match=r"The part one in .* was computed with other settings. Delete one.json"):
        begun(6)
    (tmp_path / "parts" / "one.safetensors").unlink()
    with pytest.raises(CausalProbeError, match="lacks its arrays y"):
        begun(5)


def test_a_training_does_not_go_on_from_one_of_other_settings(tmp_path: Path) -> None:
    model, source = DisentangledTransformer(3, 6), generator(0, "training")
    run = Run(folder=tmp_path, settings={"name": "n"})
    first = run.checkpoint("one", settings={"steps": 5})
    assert first is not None
    first.save(model, source, Progress(0, 3, [1.0, 1.0, 1.0], {}))
    again = run.checkpoint("one", settings={"steps": 5})
    other = run.checkpoint("one", settings={"steps": 6})
    assert again is not None
    assert other is not None
    assert again.load(model, source) is not None
    with pytest.raises(CausalProbeError, match="a run with other settings"):
        other.load(model, source)


def test_a_part_is_done_once_and_comes_back_the_same(calls: list[str], tmp_path: Path) -> None:
    first = registry.reproduce("tiny", out=tmp_path / "out")
    again = registry.reproduce("tiny", out=tmp_path / "out")
    assert calls == ["computed"]
    assert first.lines == again.lines
    np.testing.assert_array_equal(first.arrays["curve"], again.arrays["curve"])
    registry.reproduce("tiny")
    assert calls == ["computed"] * 2


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    done: list[int] = []

    def go(*, until: int) -> None:
        run = Run(folder=tmp_path / "out", settings={"name": "n"})
        for number in range(3):

            def compute(number: int = number) -> dict[str, Any]:
                if number == until:
                    raise KeyboardInterrupt
                done.append(number)
                return {"x": np.float64(number)}

            assert run.part(f"part-{number}", compute) == {"x": number}

    with pytest.raises(KeyboardInterrupt):
        go(until=2)
    go(until=-1)
    assert done == [0, 1, 2]
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_folder_of_something_else_is_refused(calls: list[str], tmp_path: Path) -> None:
    registry.reproduce("tiny", out=tmp_path / "out")
    with pytest.raises(CausalProbeError, match="other settings"):
        registry.reproduce("tiny", seed=1, out=tmp_path / "out")
    registry.reproduce("tiny", seed=1, out=tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["lines"][0]["ours"] == 1.1
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(CausalProbeError, match="did not write there"):
        registry.reproduce("tiny", seed=2, out=tmp_path / "out", overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(CausalProbeError, match="holds no earlier reproduction"):
        registry.reproduce("tiny", out=other)
    with pytest.raises(CausalProbeError, match="is a file"):
        registry.reproduce("tiny", out=other / "notes.txt")


def test_names(calls: list[str]) -> None:
    with pytest.raises(CausalProbeError, match="did you mean 'tiny'"):
        registry.reproduce("tinny")
    with pytest.raises(CausalProbeError, match="kebab-case"):
        Run().part("Not this", dict)


def test_the_command(calls: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["reproduce", "tiny", "--quick", "--out", str(tmp_path / "out"), "--json"])
    assert status.value.code == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {"quick": True, "seed": 0, "name": "tiny"}
    with pytest.raises(SystemExit):
        main(["reproduce"])
    assert capsys.readouterr().out.split() == ["tiny", "Tiny", "(1", "and", "2", "minutes)"]
    with pytest.raises(SystemExit) as status:
        main(["reproduce", "nothing"])
    assert status.value.code == 2
    assert "There is no reproduction 'nothing'" in capsys.readouterr().err


def test_every_reproduction_says_what_it_is_about_and_what_it_takes() -> None:
    assert list(registry.REPRODUCTIONS) == sorted(registry.REPRODUCTIONS)
    for name, its in registry.REPRODUCTIONS.items():
        quick, whole = its.minutes
        assert 0 < quick <= 5, name
        assert quick <= whole, name
        assert its.about, name
        assert "\n" not in its.about, name


def test_overwriting_never_leaves_the_folder(calls: list[str], tmp_path: Path) -> None:
    """Whatever names an earlier result lists, absolute or upwards: only files of the folder go."""
    out, outside = tmp_path / "out", tmp_path / "mine.txt"
    registry.reproduce("tiny", out=out)
    outside.write_text("keep")
    content = results.read_sealed(out / "result.json")
    names = [str(outside), "../mine.txt", "parts/../../mine.txt", "~/mine.txt"]
    results.write_json(out / "result.json", results.seal({**content, "files": [*content["files"], *names]}))
    registry.reproduce("tiny", seed=1, out=out, overwrite=True)
    assert outside.read_text() == "keep"
    (out / "parts" / "my notes.txt").write_text("keep")
    with pytest.raises(CausalProbeError, match="did not write there"):
        registry.reproduce("tiny", seed=2, out=out, overwrite=True)
    assert (out / "result.json").is_file()


def test_parts_that_are_a_link_are_left_alone(calls: list[str], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    registry.reproduce("tiny", out=elsewhere)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "parts").symlink_to(elsewhere / "parts")
    with pytest.raises(CausalProbeError, match="is a link"):
        registry.reproduce("tiny", seed=1, out=tmp_path / "out", overwrite=True)
    assert (elsewhere / "parts" / "one.json").is_file()


@pytest.mark.parametrize("left", [None, ".run.json.causal-probe-partial", ".run.json.causal-probe-lock"])
def test_what_a_kill_before_the_first_part_leaves_is_taken_up(
    calls: list[str], tmp_path: Path, left: str | None
) -> None:
    (tmp_path / "parts").mkdir()
    if left is not None:
        (tmp_path / "parts" / left).write_text("{")
    registry.reproduce("tiny", out=tmp_path)
    assert left not in {path.name for path in tmp_path.rglob("*")}


def test_a_second_process_is_refused(calls: list[str], tmp_path: Path) -> None:
    with results.hold(tmp_path / "out"), pytest.raises(CausalProbeError, match="Another process is writing into"):
        registry.reproduce("tiny", out=tmp_path / "out")
    assert calls == []


def test_a_saved_reproduction_comes_back_without_its_figures(tmp_path: Path) -> None:
    found = tiny(Run())
    found.save(tmp_path / "a.safetensors")
    again = Reproduction.load(tmp_path / "a.safetensors")
    assert again.to_dict() == found.to_dict()
    assert again.figures == {}
    np.testing.assert_array_equal(again.arrays["curve"], found.arrays["curve"])


@pytest.mark.slow
def test_the_moment_condition_is_reproduced() -> None:
    result = reproduce("mesa-moments", quick=True)
    assert result.holds
    assert len(result.lines) == 9
