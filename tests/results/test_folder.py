"""Folders of results: one writer, all or nothing, and nothing of anybody else's."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from causal_probe.errors import CausalProbeError
from causal_probe.results import (
    check_results_folder,
    claim,
    list_files,
    read_sealed,
    results_folder,
    seal,
    to_jsonable,
    write_json,
    write_text,
)
from causal_probe.results.locks import beside
from tests.results.looking import contents

SETTINGS = {"seed": 0, "heads": (1, 1), "alpha": 0.1}
#: A folder in which no file can be made, by root neither.
UNWRITABLE = "/proc"

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc refuses root too; it is Linux's")


def write_result(
    folder: Path,
    settings: Any = SETTINGS,
    *,
    mark: str = "",
    overwrite: bool = False,
    and_then: Callable[[], object] = lambda: None,
) -> None:
    """A whole result, told from others by ``mark``; ``and_then`` is what happens before the end of the block."""
    with results_folder(folder, settings=settings, overwrite=overwrite) as staging:
        write_text(staging / "table.csv", mark)
        write_json(staging / "result.json", {"mark": mark})
        and_then()


def raising(error: BaseException) -> Callable[[], None]:
    def throw() -> None:
        raise error

    return throw


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()], ids=["absent", "empty"])
def test_a_new_result(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "out")
    write_result(tmp_path / "out", mark="first")
    assert contents(tmp_path).keys() == {"out/result.json", "out/table.csv"}
    (tmp_path / "other").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_result(tmp_path / "a" / "b" / "out")
    assert contents(tmp_path).keys() == {"a/b/out/result.json", "a/b/out/table.csv"}


def test_the_same_settings_are_replaced(tmp_path: Path) -> None:
    write_result(tmp_path / "out", mark="first")
    write_result(tmp_path / "out", mark="second")  # a tuple in settings is a list in the file, and still the same
    assert contents(tmp_path)["out/table.csv"] == "second"
    assert os.listdir(tmp_path) == ["out"]


def test_other_settings_are_refused_unless_overwrite(tmp_path: Path) -> None:
    write_result(tmp_path / "out", mark="first")
    before = contents(tmp_path)
    other = {**SETTINGS, "seed": 1}
    with pytest.raises(CausalProbeError, match=r"holds a result of other settings.*--overwrite"):
        write_result(tmp_path / "out", other, mark="second")
    assert contents(tmp_path) == before
    write_result(tmp_path / "out", other, mark="second", overwrite=True)
    assert contents(tmp_path)["out/table.csv"] == "second"


def test_the_result_says_its_settings_and_its_files(tmp_path: Path) -> None:
    write_result(tmp_path / "out", mark="first")
    assert read_sealed(tmp_path / "out" / "result.json") == {
        "mark": "first",
        "settings": to_jsonable(SETTINGS),
        "files": ["result.json", "table.csv"],
    }


def sealed(**content: Any) -> str:
    return json.dumps(seal(content))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"mine.txt": "mine"}, "is not empty and holds no earlier result"),
        ({"result.json": "{"}, "was expected to be a JSON file"),
        ({"result.json": "[1]"}, "holds no checksum"),
        ({"result.json": '{"files": ["result.json"], "sha256": "0"}'}, "was changed by something else"),
        ({"result.json": sealed(files=3)}, r"did not write there \(result.json\)"),
        ({"result.json": sealed(settings={})}, r"did not write there \(result.json\)"),
        ({"result.json": sealed(files=["result.json"]), "mine.txt": ""}, r"did not write there \(mine.txt\)"),
        ({"result.json": sealed(files=[["result.json"]])}, r"did not write there \(result.json\)"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_replaced(files: dict[str, str], message: str, overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, text in files.items():
        (out / name).write_text(text)
    with pytest.raises(CausalProbeError, match=message):
        write_result(out, {}, overwrite=overwrite)
    assert contents(out) == files
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["{above}/mine.txt", "../mine.txt", "link/mine.txt"])
def test_names_that_lead_elsewhere_are_neither_followed_nor_deleted(name: str, tmp_path: Path) -> None:
    """A result that lists files outside of its folder is replaced, and they stay; a link in it is somebody's."""
    (tmp_path / "mine.txt").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    listed = ["result.json", name.format(above=tmp_path)]
    if name.startswith("link"):
        (out / "link").symlink_to(tmp_path)
        listed.append("link")
    (out / "result.json").write_text(sealed(settings=SETTINGS, files=listed))
    if name.startswith("link"):
        with pytest.raises(CausalProbeError, match=r"did not write there \(link\)"):
            write_result(out, overwrite=True)
        assert (out / "link").is_symlink()
    else:
        write_result(out, overwrite=True)
        assert sorted(os.listdir(out)) == ["result.json", "table.csv"]
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_file_that_comes_meanwhile_is_kept_and_so_are_both_results(tmp_path: Path) -> None:
    write_result(tmp_path / "out", mark="first")
    with pytest.raises(CausalProbeError, match=r"\(notes.md\).* The new results are in .*out\.new\."):
        write_result(
            tmp_path / "out", mark="second", and_then=lambda: (tmp_path / "out" / "notes.md").write_text("mine")
        )
    found = contents(tmp_path)
    assert found["out/notes.md"] == "mine"
    assert (found["out/table.csv"], found["out.new/table.csv"]) == ("first", "second")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.new"]


def test_a_file_that_a_person_added_is_kept(tmp_path: Path) -> None:
    write_result(tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(CausalProbeError, match=r"\(notes.md\)"):
        write_result(tmp_path / "out", overwrite=True)
    assert contents(tmp_path)["out/notes.md"] == "mine"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_block_leaves_what_was_there(earlier: bool, error: BaseException, tmp_path: Path) -> None:
    if earlier:
        write_result(tmp_path / "out", mark="first")
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        write_result(tmp_path / "out", mark="second", and_then=raising(error))
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == (["out"] if earlier else [])


@pytest.mark.parametrize("user", ["did nothing", "made the folder anew"])
def test_old_results_come_back_into_an_empty_folder_too(user: str, tmp_path: Path) -> None:
    write_result(tmp_path / "out", mark="first")
    os.replace(tmp_path / "out", beside(tmp_path / "out", "previous"))
    if user == "made the folder anew":
        (tmp_path / "out").mkdir()
    check_results_folder(tmp_path / "out", settings=SETTINGS)
    assert contents(tmp_path)["out/table.csv"] == "first"
    assert os.listdir(tmp_path) == ["out"]


def test_what_dead_writers_left_goes_and_what_is_like_it_stays(tmp_path: Path) -> None:
    write_result(tmp_path / "out", mark="second")
    write_result(beside(tmp_path / "out", "previous"), mark="first")
    (beside(tmp_path / "out", "partial") / "model").mkdir(parents=True)
    beside(tmp_path / "out", "lock").write_text("")
    for name in (".out.partial", ".other.causal-probe-partial", ".out.lock"):
        (tmp_path / name).write_text("mine")
    write_result(tmp_path / "out", mark="third")
    assert contents(tmp_path)["out/table.csv"] == "third"
    assert sorted(os.listdir(tmp_path)) == [".other.causal-probe-partial", ".out.lock", ".out.partial", "out"]


def test_a_person_s_folder_beside_earlier_results_is_left_to_the_person(tmp_path: Path) -> None:
    write_result(tmp_path / "out", mark="first")
    os.replace(tmp_path / "out", beside(tmp_path / "out", "previous"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(CausalProbeError, match="holds no earlier result"):
        write_result(tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


def test_a_link_in_the_place_of_the_staging_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    beside(tmp_path / "out", "partial").symlink_to("mine")
    write_result(tmp_path / "out")
    assert contents(tmp_path)["mine/file"] == "mine"
    assert sorted(os.listdir(tmp_path)) == ["mine", "out"]


def test_the_unfinished_file_is_let_be_and_goes_with_the_results(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("checkpoint", ".checkpoint.causal-probe-partial", ".checkpoint.causal-probe-lock"):
        (tmp_path / "out" / name).write_text("half")
    with claim(tmp_path / "out", settings=SETTINGS, unfinished="checkpoint") as claimed:
        assert (claimed.path / "checkpoint").read_text() == "half"
        with claimed.stage() as staging:
            write_json(staging / "result.json", {})
    assert os.listdir(tmp_path / "out") == ["result.json"]


# --------------------------------------------------------------------------------------------------------------- the lock


def test_a_second_writer_is_refused_at_once_and_the_first_goes_on(tmp_path: Path) -> None:
    with claim(tmp_path / "out", settings={"seed": 0}) as claimed:
        other = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from causal_probe.results import claim\nwith claim({str(tmp_path / 'out')!r}, settings={{}}): pass",
            ],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert f"Another process is writing into {tmp_path / 'out'}. Wait" in other.stderr
        with claimed.stage() as staging:
            write_json(staging / "result.json", {"seed": 0})
    assert read_sealed(tmp_path / "out" / "result.json")["seed"] == 0
    assert os.listdir(tmp_path) == ["out"]


# --------------------------------------------------------------------------------------------------------------- the page


def write_page(folder: Path) -> None:
    write_text(folder / "report.html", "<p>")


@pytest.mark.parametrize("earlier", [False, True])
def test_the_numbers_are_kept_where_the_page_fails(earlier: bool, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "figures").mkdir()
        write_text(folder / "figures" / "a.svg", "")
        raise ZeroDivisionError("a bug")

    for page, mark in ((write_page, "first"), (fail, "second"))[not earlier :]:
        with contextlib.ExitStack() as held:
            if page is fail:
                held.enter_context(
                    pytest.raises(
                        CausalProbeError,
                        match=r"The numbers are in .*out, but not their page: ZeroDivisionError: a bug",
                    )
                )
            claimed = held.enter_context(claim(tmp_path / "out", settings=SETTINGS))
            staging = held.enter_context(claimed.stage(page=page))
            write_json(staging / "result.json", {"mark": mark})
    found = read_sealed(tmp_path / "out" / "result.json")
    assert (found["mark"], found["files"]) == ("second", ["result.json"])
    assert list_files(tmp_path / "out") == ["result.json"]
    assert os.listdir(tmp_path) == ["out"]
    write_result(tmp_path / "out", mark="third")


def test_the_page_is_listed(tmp_path: Path) -> None:
    with claim(tmp_path / "out", settings=SETTINGS) as claimed, claimed.stage(page=write_page) as staging:
        write_json(staging / "result.json", {})
    assert read_sealed(tmp_path / "out" / "result.json")["files"] == ["report.html", "result.json"]


def test_an_error_of_the_system_in_the_block_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CausalProbeError, match=r"Can't put the results into .*out: No space left on device"):
        write_result(tmp_path / "out", and_then=raising(OSError(28, "No space left on device")))
    assert os.listdir(tmp_path) == []


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_results_folder(tmp_path / "a" / "out", settings=SETTINGS)
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_result(tmp_path / "link", mark="first")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real")["table.csv"] == "first"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "--out names .*file, which is a file. Name a folder"),
        ("file/out", "Can't make the folder .*Name another one with --out"),
        ("nul\0", "can't name a folder of results: .*embedded null"),
        ("x" * 300, "File name too long"),
        (".", "current folder or a mount point.*Name a folder inside it"),
        ("/", "current folder or a mount point"),
        pytest.param(f"{UNWRITABLE}/out", "Can't make the folder /proc/out", marks=needs_proc),
        pytest.param(f"{UNWRITABLE}/a/out", "Can't make the folder /proc/a/out", marks=needs_proc),
    ],
)
def test_a_folder_that_can_not_be_made(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    for use in (check_results_folder, write_result):
        with pytest.raises(CausalProbeError, match=message):
            use(Path(name), settings=SETTINGS)
    assert contents(tmp_path) == {"file": "mine"}
    assert os.listdir(tmp_path) == ["file"]


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CausalProbeError, match=r"can't name a folder of results|Can't make the folder|put the results"):
        write_result(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
