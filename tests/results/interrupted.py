"""A program that is interrupted at its n-th file operation, for every n: killed there, or refused it by a full disk.

``python -m tests.results.interrupted file|folder PLACE`` prints how many points it tried. It is a program of its own because it forks, which
a process with threads can't do safely.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from causal_probe.errors import CausalProbeError
from causal_probe.results import Result, claim, write_json, write_text

#: What Python tells an audit hook of files. A disk that is full refuses the first of them (of what is opened, only for writing).
MAKING = {"open", "os.mkdir", "os.rename"}
EVENTS = MAKING | {"os.remove", "os.rmdir", "os.listdir", "os.scandir", "fcntl.flock"}
KILLED, REFUSED, DONE, SURVIVED = 9, 3, 0, 5


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Kept(Result):
    KIND = "test: kept"

    values: np.ndarray


def save_file(place: Path, mark: float) -> None:
    Kept(np.full(100, mark), provenance={"versions": {}}).save(place / "out.safetensors")


def save_folder(place: Path, mark: float) -> None:
    with (
        claim(place / "out", settings={"seed": 0}) as claimed,
        claimed.stage(page=lambda folder: write_text(folder / "report.html", f"<p>{mark}")) as staging,
    ):
        (staging / "model").mkdir()
        write_json(staging / "model" / "shape.json", {"mark": mark})
        write_json(staging / "result.json", {"mark": mark})


def tree(place: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too."""
    return {str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in sorted(place.rglob("*"))}


def run(
    save: Callable[[Path, float], None],
    place: Path,
    n: int,
    events: set[str],
    act: Callable[[], Any],
    told: int | None = None,
) -> int:
    """Save in a forked process that does ``act`` at the n-th of ``events``; its exit status, DONE if there were fewer.

    How many there were is written to ``told``, a file descriptor.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        reading = event == "open" and not arguments[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
        if event in events and not (reading and events is MAKING):
            seen += 1
            if seen == n:
                act()

    try:
        sys.addaudithook(hook)
        save(place, 2.0)
    except CausalProbeError as error:
        os._exit(REFUSED if len(str(error).splitlines()) == 1 else 1)
    except BaseException:
        events = set()
        traceback.print_exc()
        os._exit(1)
    if told is not None:
        os.write(told, str(seen).encode())
    os._exit(DONE if seen < n else SURVIVED)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def everywhere(save: Callable[[Path, float], None], above: Path) -> int:
    """Try every point, with and without an earlier result; the number of points."""
    save_whole = above / "whole"
    save_whole.mkdir()
    save(save_whole, 1.0)
    before = tree(save_whole)
    save(save_whole, 2.0)
    after = tree(save_whole)
    tried = 0
    for events, act, expected in (
        (EVENTS, lambda: os._exit(KILLED), KILLED),
        (EVENTS, full, REFUSED),
        (MAKING, full, REFUSED),
    ):
        for earlier in (False, True):
            for n in range(1, 1000):
                place = above / "place"
                place.mkdir()
                if earlier:
                    save(place, 1.0)
                status = run(save, place, n, events, act)
                assert status in {DONE, expected, SURVIVED if expected is REFUSED else DONE}, (n, status, expected)
                if events is MAKING:  # what can't be made is not there, and nothing else has changed
                    page_alone = {**after, "out/result.json": tree(place).get("out/result.json")}
                    page_alone.pop("out/report.html", None)
                    assert tree(place) in (before if earlier else {}, after, page_alone), (n, sorted(tree(place)))
                save(place, 2.0)
                assert tree(place) == after, (n, sorted(tree(place)))
                shutil.rmtree(place)
                tried += 1
                if status == DONE:
                    break
    return tried


def half_full(save: Callable[[Path, float], None], above: Path) -> None:
    """A disk that fills while a file is written: no file may grow beyond some bytes."""
    for size in (0, 10, 100):
        place = above / "place"
        place.mkdir()
        save(place, 1.0)
        before = tree(place)

        def limited(place: Path, mark: float, size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            save(place, mark)

        assert run(limited, place, 0, set(), full) == REFUSED
        assert tree(place) == before
        shutil.rmtree(place)


if __name__ == "__main__":
    what, place = sys.argv[1:]
    save = {"file": save_file, "folder": save_folder}[what]
    print(everywhere(save, Path(place)))
    half_full(save, Path(place))
