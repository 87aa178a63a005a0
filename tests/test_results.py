"""Results: strict JSON, files and folders that appear whole or not at all, citations."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from causal_probe import results
from causal_probe.errors import CausalProbeError
from causal_probe.results import (
    BIBLIOGRAPHY,
    check_results_folder,
    cite,
    read_json,
    results_folder,
    to_jsonable,
    versions,
    write_arrays,
    write_json,
    write_text,
)

SETTINGS = {"seed": 0, "heads": (1, 1), "alpha": 0.1}
#: A folder in which no file can be made, by root neither.
UNWRITABLE = "/proc"

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc refuses root too; it is Linux's")


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    where: Path


def contents(folder: Path) -> dict[str, str]:
    """Every file below ``folder``, hidden ones included, with its text."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fail_at_call(n: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """``function``, raising ``error`` at its n-th call instead of doing anything."""
    calls = iter(range(1, 1000))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == n:
            raise error
        return function(*args, **kwargs)

    return failing


# ---------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (None, None),
        (True, True),
        (np.bool_(False), False),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.array([[1.5, 2.5]]), [[1.5, 2.5]]),
        (np.array(7), 7),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor(2.0, requires_grad=True), 2.0),
        ((1, "a"), [1, "a"]),
        ({3, 1, 2}, [1, 2, 3]),
        ({1: {"a": (2,)}}, {"1": {"a": [2]}}),
        (Path("a") / "b", os.path.join("a", "b")),
        (Point(0.5, Path("here")), {"x": 0.5, "where": "here"}),
    ],
)
def test_plain_json_types(value: Any, plain: Any) -> None:
    found = to_jsonable(value)
    assert found == plain
    assert type(found) is type(plain)
    json.dumps(found, allow_nan=False)


def test_a_graph_is_node_link_with_the_key_edges() -> None:
    graph = nx.DiGraph([(0, 2), (1, 2)])
    found = to_jsonable(graph)
    assert [(edge["source"], edge["target"]) for edge in found["edges"]] == [(0, 2), (1, 2)]
    assert nx.utils.graphs_equal(nx.node_link_graph(found, edges="edges"), graph)


@pytest.mark.parametrize(
    "value",
    [math.nan, [math.inf], {"a": -math.inf}, np.float32("nan"), np.array([[0.0, np.nan]]), torch.tensor(math.inf)],
)
def test_what_is_not_finite_is_refused_wherever_it_is(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CausalProbeError, match="What is undefined must be None with a reason beside it"):
        write_json(tmp_path / "result.json", {"deep": [value]})
    assert contents(tmp_path) == {}


def test_what_has_no_plain_form_is_refused() -> None:
    with pytest.raises(CausalProbeError, match="A value of type complex can't be written as JSON"):
        to_jsonable([1j])


def test_json_round_trip_is_exact(tmp_path: Path) -> None:
    value = {"third": 1 / 3, "small": 5e-324, "text": 'é \N{PILE OF POO} "\\ \x00', "lone": ["\udc80", "\ud800x"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    (tmp_path / "a.json").read_bytes().decode("utf-8")  # a lone surrogate is not what is in the file


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "isn't"),
        (b"", "isn't"),
        (b"\xff\xfe", "isn't"),
        (b'{"x": NaN}', "NaN is no JSON value"),
        (b"-Infinity", "-Infinity is no JSON value"),
        (b"[" * 100_000, "isn't"),
        (b"1" * 5000, "isn't"),
    ],
    ids=["cut off", "empty", "no text", "NaN", "infinity", "deep", "long number"],
)
def test_what_is_no_json_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    if reason == "isn't" and content[:1] == b"1" and not hasattr(sys, "set_int_max_str_digits"):
        return  # early patch releases of Python 3.10 read a number of any length
    with pytest.raises(CausalProbeError, match="was expected to be a JSON file and isn't") as caught:
        read_json(path)
    assert reason in str(caught.value)


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CausalProbeError, match=r"Can't read .*absent\.json: No such file or directory"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(CausalProbeError, match=r"Can't read .*: Is a directory"):
        read_json(tmp_path)


# --------------------------------------------------------------------------------------------------------------- files


def test_arrays_keep_shape_and_dtype(tmp_path: Path) -> None:
    arrays = {
        "no axes": np.array(3.5),
        "none": np.zeros((0, 4), dtype=np.float32),
        "transposed": np.arange(6).reshape(2, 3).T,
        "strided": np.arange(10.0)[::3],
    }
    write_arrays(tmp_path / "a.safetensors", arrays)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(found[name], array)


def test_a_new_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    write_text(tmp_path / "ours", "")
    rights = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "ours")}
    assert rights["ours"] == rights["other"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("before", [{}, {"a.txt": "old"}], ids=["new file", "old file"])
def test_a_failed_write_leaves_what_was_there(
    before: dict[str, str], error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "replace", fail_at_call(1, os.replace, error))
    expected = CausalProbeError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left on device" if isinstance(error, OSError) else None):
        write_text(tmp_path / "a.txt", "new")
    assert contents(tmp_path) == before


def test_the_target_never_holds_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    seen = []
    replace = os.replace

    def looking(source: Any, target: Any) -> None:
        seen.append((path.read_text(), Path(source).read_text(), Path(source).parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", looking)
    write_text(path, "new")
    # The text was whole before the one atomic step, on the same file system as the target.
    assert seen == [("old", "new", tmp_path)]
    assert contents(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "Is a directory"),
        ("absent/a.txt", "No such file or directory"),
        ("file/a.txt", "Not a directory"),
        ("nul\0", "embedded null"),
        ("\ud800", "surrogates not allowed"),
        ("x" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("write", [lambda path: write_text(path, "x"), lambda path: write_arrays(path, {})])
def test_a_path_that_can_not_be_written(
    write: Callable[[Path], None], name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CausalProbeError, match=f"Can't write .*{reason}.*Name a file, in a folder that exists"):
        write(tmp_path / name)
    assert contents(tmp_path) == {"file": "mine"}
    assert list((tmp_path / "folder").iterdir()) == []


@needs_proc
def test_a_folder_that_refuses_root_too() -> None:
    with pytest.raises(CausalProbeError, match=f"Can't write {UNWRITABLE}/a.txt"):
        write_text(f"{UNWRITABLE}/a.txt", "x")


# ------------------------------------------------------------------------------------------------------------- folders


def write_result(
    folder: Path,
    settings: Any = SETTINGS,
    *,
    mark: str = "",
    overwrite: bool = False,
    and_then: Callable[[], None] = lambda: None,
) -> None:
    """A whole result, told from others by ``mark``; ``and_then`` is what happens before the end of the block."""
    with results_folder(folder, settings=settings, overwrite=overwrite) as staging:
        write_text(staging / "table.csv", mark)
        write_json(staging / "result.json", {"settings": settings, "files": ["result.json", "table.csv"]})
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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"mine.txt": "mine"}, "is not empty and holds no earlier result"),
        ({"result.json": "{"}, "was expected to be a JSON file"),
        ({"result.json": "[1]"}, r"did not write there \(result.json\)"),
        ({"result.json": '{"files": 3}'}, r"did not write there \(result.json\)"),
        ({"result.json": '{"settings": {}}'}, r"did not write there \(result.json\)"),
        ({"result.json": '{"files": ["result.json"]}', "mine.txt": ""}, r"did not write there \(mine.txt\)"),
        ({"result.json": '{"files": [["result.json"]]}'}, r"did not write there \(result.json\)"),
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


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["OSError", "Ctrl-C"])
def test_a_failed_rename_brings_the_old_results_back(
    error: BaseException, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_result(tmp_path / "out", mark="first")
    before = contents(tmp_path)
    expected = CausalProbeError if isinstance(error, OSError) else type(error)
    failing = fail_at_call(n, os.replace, error)
    with pytest.raises(expected):
        write_result(tmp_path / "out", mark="second", and_then=lambda: monkeypatch.setattr(os, "replace", failing))
    assert contents(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours runs after it."""


def write_until_killed(folder: Path, module: Any, function: str, n: int) -> None:
    """A second result whose run is killed at the n-th call of a function after its block."""
    with pytest.MonkeyPatch.context() as patch:

        def arm() -> None:
            patch.setattr(module, function, fail_at_call(n, getattr(module, function), Killed()))
            patch.setattr(results, "_restore", lambda target: None)

        with pytest.raises(Killed):
            write_result(folder, mark="second", and_then=arm)


def test_a_kill_between_the_renames_is_repaired_by_the_next_run(tmp_path: Path) -> None:
    write_result(tmp_path / "out", mark="first")
    write_until_killed(tmp_path / "out", os, "replace", 2)
    assert not (tmp_path / "out").exists()
    # A run of other settings is refused, which shows that the old results are back.
    with pytest.raises(CausalProbeError, match="holds a result of other settings"):
        check_results_folder(tmp_path / "out", settings={"seed": 5})
    assert contents(tmp_path)["out/table.csv"] == "first"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("user", ["did nothing", "made the folder anew"])
def test_old_results_come_back_into_an_empty_folder_too(user: str, tmp_path: Path) -> None:
    write_result(tmp_path / "out", mark="first")
    os.replace(tmp_path / "out", results._backup_of(tmp_path / "out"))
    if user == "made the folder anew":
        (tmp_path / "out").mkdir()
    check_results_folder(tmp_path / "out", settings=SETTINGS)
    assert contents(tmp_path)["out/table.csv"] == "first"


def test_a_kill_after_the_renames_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    write_result(tmp_path / "out", mark="first")
    write_until_killed(tmp_path / "out", results.shutil, "rmtree", 1)
    assert contents(tmp_path)["out/table.csv"] == "second"
    assert len(os.listdir(tmp_path)) == 2  # and the backup
    write_result(tmp_path / "out", mark="third")
    assert contents(tmp_path)["out/table.csv"] == "third"
    assert os.listdir(tmp_path) == ["out"]


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


# ---------------------------------------------------------------------------------------------------------- provenance


def test_versions_name_what_is_installed_and_leave_out_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RECORDED_PACKAGES", ("torch", "no-such-package-anywhere"))
    found = versions()
    assert found == {"python": ".".join(map(str, sys.version_info[:3])), "torch": found["torch"]}
    assert torch.__version__.startswith(found["torch"])


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
