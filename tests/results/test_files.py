"""Files: whole or not at all, and refused when they are damaged."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from safetensors.numpy import load_file, save_file

from causal_probe.errors import CausalProbeError
from causal_probe.results import (
    csv_text,
    parquet_bytes,
    read_arrays,
    read_json,
    read_sealed,
    seal,
    write_arrays,
    write_bytes,
    write_json,
    write_text,
)
from causal_probe.results import files as results_files
from tests.results.looking import contents, fail_at_call

#: A folder in which no file can be made, by root neither.
UNWRITABLE = "/proc"

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc refuses root too; it is Linux's")


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


def test_what_a_dead_writer_left_is_used_up(tmp_path: Path) -> None:
    for what in ("partial", "lock"):
        (tmp_path / f".a.txt.causal-probe-{what}").write_text("half of")
    write_text(tmp_path / "a.txt", "whole")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_link_in_the_place_of_the_part_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".a.txt.causal-probe-partial").symlink_to("mine")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "mine").read_text() == "mine"


def test_two_writers_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_files, "PATIENCE", 0.05)
    with (
        FileLock(tmp_path / ".a.txt.causal-probe-lock"),
        pytest.raises(CausalProbeError, match="Another process is writing"),
    ):
        write_text(tmp_path / "a.txt", "mine")
    write_text(tmp_path / "a.txt", "mine")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_file_and_folder_are_brought_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (done.append(stat.S_ISDIR(os.fstat(handle).st_mode)), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    write_text(tmp_path / "a.txt", "new")
    assert done == [False, "renamed", True]


# ------------------------------------------------------------------------------------------------------------ checksums

ARRAYS = {"weights": np.arange(12.0).reshape(3, 4), "none": np.zeros((0, 2), dtype=np.float32)}
ABOUT = {"kind": "weights", "format": 1, "versions": {"causal-probe": "0.9"}}


def damaged(content: bytes) -> list[bytes]:
    """50 flipped bits, 50 cuts and 50 zeroed ranges."""
    random = np.random.default_rng(0)
    found = []
    for place in random.integers(len(content), size=50):
        found.append(content[:place] + bytes([content[place] ^ 1 << int(random.integers(8))]) + content[place + 1 :])
    found += [content[: int(place)] for place in random.integers(len(content), size=50)]
    for place in random.integers(len(content), size=50):
        length = int(random.integers(1, 40))
        found.append((content[:place] + bytes(length) + content[place + length :])[: len(content)])
    return found


def test_damaged_arrays_are_refused_or_equal(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_arrays(path, ARRAYS, about=ABOUT)
    refused = 0
    for content in damaged(path.read_bytes()):
        path.write_bytes(content)
        try:
            arrays, about = read_arrays(path, kind="weights", newest=1)
        except CausalProbeError as error:
            refused += len(str(error).splitlines())  # one line each
        else:
            assert about == ABOUT
            assert {name: each.tolist() for name, each in arrays.items()} == {
                n: each.tolist() for n, each in ARRAYS.items()
            }
    assert 140 < refused <= 150


def test_damaged_json_is_refused_or_equal(tmp_path: Path) -> None:
    path, content = tmp_path / "a", {"loss": [0.1, 1e-300, None, "é"], "settings": {"seed": 0}}
    write_json(path, seal(content))
    refused = 0
    for bad in damaged(path.read_bytes()):
        path.write_bytes(bad)
        try:
            assert read_sealed(path) == content
        except CausalProbeError:
            refused += 1
    assert refused > 130


def test_the_checksum_by_hand(tmp_path: Path) -> None:
    assert seal({"b": 1, "a": [0.5]}) == {
        "b": 1,
        "a": [0.5],
        "sha256": hashlib.sha256(b'{"a":[0.5],"b":1}').hexdigest(),
    }
    write_json(tmp_path / "a", {"loss": 0.5})
    with pytest.raises(CausalProbeError, match="holds no checksum"):
        read_sealed(tmp_path / "a")


def header_of(stated: dict[str, Any], rest: bytes = b"") -> bytes:
    text = json.dumps(stated).encode()
    return struct.pack("<Q", len(text)) + text + rest


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its header would take"),
        (struct.pack("<Q", 2**60) + b"{}", "its header would take"),
        (struct.pack("<Q", 2**26) + b" " * 100, "its header would take"),
        (
            header_of({"x": {"dtype": "F64", "shape": [10**15], "data_offsets": [0, 8 * 10**15]}}),
            "its header speaks of",
        ),
        (header_of({}, b"more"), "its header speaks of"),
        (struct.pack("<Q", 400) + b"[" * 200 + b"]" * 200, "nested 200 deep"),
        (header_of({"x": 3}), "isn't"),
        (header_of([1]), "isn't"),  # type: ignore[arg-type]
    ],
    ids=["empty", "huge", "long", "more than there is", "less than there is", "deep", "no entry", "a list"],
)
def test_headers_that_lie(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(
        CausalProbeError, match="was expected to be a safetensors file of causal-probe and isn't"
    ) as caught:
        read_arrays(tmp_path / "a")
    assert reason in str(caught.value)


def test_a_header_beyond_all_measure_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.write(struct.pack("<Q", 2**40))
        file.truncate(2**41)  # a file with a hole
    with pytest.raises(CausalProbeError, match="its header would take"):
        read_arrays(tmp_path / "a")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"kind": "another", "format": 1}, "expected to hold weights of causal-probe, and holds something else"),
        (None, "holds something else"),
        ([1], "holds something else"),
        ({**ABOUT, "format": 2}, "of format 2, written by causal-probe 0.9; this version reads format 1. Upgrade"),
        ({**ABOUT, "format": 0}, "of format 0, .* reads format 1. Measure anew"),
        ({"kind": "weights"}, "of format None"),
    ],
)
def test_other_kinds_and_formats(about: Any, message: str, tmp_path: Path) -> None:
    write_arrays(tmp_path / "a", ARRAYS, about=about)
    with pytest.raises(CausalProbeError, match=message):
        read_arrays(tmp_path / "a", kind="weights", newest=1)


def test_arrays_of_others_and_what_has_no_place(tmp_path: Path) -> None:
    save_file({"x": np.zeros(1)}, tmp_path / "a")
    with pytest.raises(CausalProbeError, match="not written by causal-probe"):
        read_arrays(tmp_path / "a")
    for array in (np.array(["a"]), np.array([None])):
        with pytest.raises(CausalProbeError, match="have no place in safetensors"):
            write_arrays(tmp_path / "b", {"x": array})
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("read", [read_arrays, read_json])
def test_a_pipe_is_not_waited_for(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CausalProbeError, match="no regular file"):
        read(tmp_path / "pipe")


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"), ("@SUM(A1)", "'@SUM(A1)"), ("+cmd", "'+cmd"), ("-x", "'-x"), ("\t=1", "'\t=1"), ("\r=1", "'\r=1"),
        ("-0.5", "-0.5"), ("+3", "+3"), ("-1e-5", "-1e-5"), ("a=1", "a=1"), ("", ""), ("L0H0", "L0H0"),
    ],
)  # fmt: skip
def test_no_cell_is_a_formula(cell: str, written: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": [cell, "x"], cell or "name": [-0.5, None]})
    write_text(tmp_path / "a.csv", csv_text(frame))
    found = pd.read_csv(tmp_path / "a.csv", dtype=str, keep_default_na=False)
    assert list(found["text"]) == [written, "x"]
    assert list(found.columns) == ["text", written or "name"]
    assert list(found.iloc[:, 1]) == ["-0.5", ""]


def test_a_damaged_page_of_parquet_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_bytes(path, parquet_bytes(pd.DataFrame({"x": np.random.default_rng(0).random(1000)})))
    content = bytearray(path.read_bytes())
    content[2000] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)
