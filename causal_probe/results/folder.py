"""A folder of results: one writer at a time, and all of it or nothing.

Beside the folder ``NAME`` stand, while it is written, ``.NAME.causal-probe-lock``, ``-partial`` (the results to come), ``-previous`` (those
that go) and ``-gone`` (those that are being removed). Who holds the lock is the only one that may touch them, so what is left there is a dead writer's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.results.files import read_json, read_sealed, reason_of, seal, sync_folder, write_json
from causal_probe.results.jsonable import to_jsonable
from causal_probe.results.locks import beside, locked

__all__ = ["Claim", "check_results_folder", "claim", "hold", "list_files", "results_folder"]

OTHER = "Name another one with --out."


class ForeignFiles(CausalProbeError):
    """A folder holds what is not ours to replace."""


class Claim:
    """A folder that this process alone may write, until the ``with`` of :func:`claim` ends.

    Attributes
    ----------
    path
        The folder, as it was named.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        target: Path,
        settings: Mapping[str, Any],
        result: str,
        left: frozenset[str],
    ) -> None:
        self.path = Path(folder)
        self._target, self._settings, self._result, self._left = target, settings, result, left

    @contextlib.contextmanager
    def stage(self, *, page: Callable[[Path], object] | None = None) -> Iterator[Path]:
        """Yield an empty folder that takes the place of :attr:`path` when the block ends well, and goes when it raises.

        The block writes the file ``result`` of :func:`claim`, a JSON mapping, and whatever else belongs to the results; ``files``, ``settings``
        and the checksum are added to the former here.

        Parameters
        ----------
        page
            Called with the folder when all else is in it, to write what can be done without: a report. If it raises, the rest is put in place
            nevertheless.

        Raises
        ------
        CausalProbeError
            If anything can't be written (nothing has changed then), a file of somebody else has come into the folder meanwhile, or ``page``
            raised (the results are in place then).
        """
        staging = beside(self._target, "partial")
        try:
            with _said(f"Can't put the results into {self.path}"):
                staging.mkdir()
                yield staging
                self._seal(staging)
                failure = None if page is None else self._write_page(staging, page)
                _tidy(staging)
                _sync(staging)
                self._swap(staging)
        finally:
            _remove(staging)
        if failure is not None:
            reason = str(failure) if isinstance(failure, CausalProbeError) else f"{type(failure).__name__}: {failure}"
            raise CausalProbeError(f"The numbers are in {self.path}, but not their page: {reason}") from failure

    def _seal(self, staging: Path) -> None:
        _tidy(staging)
        content = read_json(staging / self._result)
        files = sorted({*list_files(staging), self._result})
        write_json(staging / self._result, seal({**content, "settings": self._settings, "files": files}))

    def _write_page(self, staging: Path, page: Callable[[Path], object]) -> Exception | None:
        before = set(list_files(staging))
        try:
            page(staging)
            self._seal(staging)
        except Exception as error:  # whatever a page raises, the numbers are put in place; the caller says it
            for name in set(list_files(staging)) - before:
                os.unlink(staging / name)
            return error
        return None

    def _swap(self, staging: Path) -> None:
        """Replace the folder with ``staging``. Between the two renames the earlier results are in ``previous``."""
        target, previous = self._target, beside(self._target, "previous")
        try:
            refuse_foreign(self.path, target, self._result, self._left)  # somebody may have put a file there meanwhile
            if target.exists():
                os.replace(target, previous)
                refuse_foreign(self.path, previous, self._result, self._left)
            os.replace(staging, target)
        except BaseException as error:
            if previous.exists() and not target.exists():
                os.replace(previous, target)
            rescue = target.with_name(f"{target.name}.new")
            if isinstance(error, ForeignFiles) and not rescue.exists():  # the work is not lost for a note
                os.replace(staging, rescue)
                raise CausalProbeError(f"{error} The new results are in {rescue}.") from error
            raise
        sync_folder(target.parent)
        _discard(previous, target)


@checked
@contextlib.contextmanager
def claim(
    folder: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    overwrite: bool = False,
    result: str = "result.json",
    unfinished: str | None = None,
) -> Iterator[Claim]:
    """Hold a folder of results for writing: first for the work, then for what came of it.

    Parameters
    ----------
    folder
        Where the results are to be. It may be absent, empty, or hold earlier results (the file ``result`` is in it).
    settings
        The settings of this run. Earlier results of the same settings are replaced; of other settings only with ``overwrite``.
    overwrite
        Replace earlier results whatever their settings. A folder that holds anything but results is never replaced.
    result
        The JSON file by which a folder of results is known: its ``settings``, and under ``files`` the names of all that is in it.
    unfinished
        A file that a run which was interrupted may have left there, alone or beside earlier results. It goes when the results come.

    Raises
    ------
    CausalProbeError
        If another process holds ``folder``; if it is a file, can't be written, can't be replaced (it is the current folder or a mount
        point), holds something that is not a result or was changed since, or holds results of other settings and ``overwrite`` is false.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as above:
    ...     with claim(Path(above) / "out", settings={"seed": 0}) as claimed:
    ...         loss = 0.5                                    # the work
    ...         with claimed.stage() as staging:
    ...             write_json(staging / "result.json", {"loss": loss})
    ...     list_files(Path(above) / "out"), os.listdir(above)
    (['result.json'], ['out'])
    """
    left = frozenset() if unfinished is None else _left_of(unfinished)
    with hold(folder) as target:
        with _said(f"Can't make the folder {_brief(folder)}", OTHER):
            _remove(beside(target, "partial"))
            _remove(beside(target, "gone"))
            _restore(folder, target, result, left)
            if target.is_dir():
                _check(folder, target, settings=settings, overwrite=overwrite, result=result, left=left)
        yield Claim(folder, target, settings, result, left)


@contextlib.contextmanager
def hold(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The lock of a folder, whatever is in it; yields its resolved path. The folder's parents are made.

    Raises
    ------
    CausalProbeError
        If another process holds it, it is a file, or it can't be replaced (it is the current folder or a mount point).

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as above:
    ...     with hold(f"{above}/out"), hold(f"{above}/out"):
    ...         pass
    Traceback (most recent call last):
    causal_probe.errors.CausalProbeError: Another process is writing into ...out. Wait until it has ended, or name another folder.
    """
    target = _resolve(folder)
    refusal = f"Another process is writing into {folder}. Wait until it has ended, or name another folder."
    with contextlib.ExitStack() as held:
        with _said(f"Can't make the folder {_brief(folder)}", OTHER):
            _refuse_place(folder, target)
            target.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(target, refusal=refusal))
        yield target


@contextlib.contextmanager
def results_folder(folder: str | os.PathLike[str], **options: Any) -> Iterator[Path]:
    """:func:`claim` a folder, with its options, for its results alone: yields :meth:`Claim.stage`.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as above:
    ...     with results_folder(Path(above) / "out", settings={"seed": 0}) as staging:
    ...         write_json(staging / "result.json", {"loss": 0.5})
    ...     list_files(Path(above) / "out")
    ['result.json']
    """
    with claim(folder, **options) as claimed, claimed.stage() as staging:
        yield staging


def check_results_folder(folder: str | os.PathLike[str], **options: Any) -> None:
    """Raise what :func:`claim` would raise; create no more than the missing parents of ``folder``."""
    with claim(folder, **options):
        pass


def list_files(folder: str | os.PathLike[str]) -> list[str]:
    """Every file below a folder, as sorted paths relative to it with forward slashes; a link is one file, wherever it leads.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "a.txt").write_text("hello")
    ...     list_files(folder)
    ['a.txt']
    """
    found = []
    for above, folders, files in os.walk(folder, onerror=_raise):
        here = Path(above).relative_to(folder)
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        found += [(here / name).as_posix() for name in (*files, *links)]
    return sorted(found)


def refuse_foreign(
    folder: str | os.PathLike[str], place: Path, result: str, left: frozenset[str] = frozenset()
) -> dict[str, Any] | None:
    """The sealed content of the results that lie in ``place``, of which ``folder`` is the name; None if it is empty or absent.

    Raises
    ------
    ForeignFiles
        If anything is there that is not listed in the results' ``files``: it is somebody's, and not ours to replace.
    """
    there = set(list_files(place)) - left if place.is_dir() else set()
    if not there:
        return None
    earlier = place / result
    if result not in there or earlier.is_symlink() or not earlier.is_file():
        raise ForeignFiles(f"{folder} is not empty and holds no earlier result. Name a new or empty folder.")
    content = read_sealed(earlier)
    files = content.get("files")
    listed = set(map(str, files)) if isinstance(files, list) else set()
    foreign = sorted(name for name in there if name not in listed or (place / name).is_symlink())
    if foreign:
        raise ForeignFiles(
            f"{folder} holds files that causal-probe did not write there ({', '.join(foreign[:3])}). Name another folder."
        )
    return content


def _check(
    folder: str | os.PathLike[str],
    target: Path,
    *,
    settings: Mapping[str, Any],
    overwrite: bool,
    result: str,
    left: frozenset[str],
) -> None:
    if not os.access(target, os.W_OK | os.X_OK):
        raise CausalProbeError(f"The folder {folder} can't be written. Name another one with --out.")
    content = refuse_foreign(folder, target, result, left)
    if content is not None and not overwrite and content.get("settings") != to_jsonable(settings):
        raise CausalProbeError(f"{folder} holds a result of other settings. Name another folder, or pass --overwrite.")


def _restore(folder: str | os.PathLike[str], target: Path, result: str, left: frozenset[str]) -> None:
    """Finish what a kill inside a swap left: bring the earlier results back, or drop them if the new ones are in place."""
    previous = beside(target, "previous")
    if not previous.exists():
        return
    if not target.exists() or not os.listdir(target):
        os.replace(previous, target)
        return
    # Each is whole, and ours, or a person has to look.
    refuse_foreign(folder, target, result, left)
    refuse_foreign(previous, previous, result, left)
    _discard(previous, target)


def _refuse_place(folder: str | os.PathLike[str], target: Path) -> None:
    if not os.fspath(folder):
        raise CausalProbeError("An empty text names no folder of results.")
    if target.exists() and not target.is_dir():
        raise CausalProbeError(f"--out names {folder}, which is a file. Name a folder.")
    if target.exists() and (os.path.ismount(target) or os.path.samefile(target, os.curdir)):
        raise CausalProbeError(
            f"{folder} is the current folder or a mount point, and can't be replaced as a whole. Name a folder inside it."
        )


def _left_of(unfinished: str) -> frozenset[str]:
    """An unfinished file, and what a kill while it was written leaves beside it."""
    return frozenset({unfinished, *(beside(Path(unfinished), what).name for what in ("partial", "lock"))})


def _resolve(folder: str | os.PathLike[str]) -> Path:
    try:
        return Path(folder).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; no possible name
        raise CausalProbeError(f"{os.fspath(folder)!r} can't name a folder of results: {reason_of(error)}.") from error


@contextlib.contextmanager
def _said(what: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CausalProbeError(f"{what}: {reason_of(error)}. {advice}".rstrip()) from error


def _discard(previous: Path, target: Path) -> None:
    """Remove earlier results, which were checked: first their name, so that a kill in the middle leaves no half of them under it."""
    gone = beside(target, "gone")
    try:
        os.replace(previous, gone)
    except OSError:
        gone = previous
    _remove(gone)


def _remove(place: Path) -> None:
    """Remove what is ours, as far as it can be; a link goes, and what it leads to stays."""
    with contextlib.suppress(OSError):
        os.unlink(place) if place.is_symlink() else shutil.rmtree(place, ignore_errors=True)


def _tidy(staging: Path) -> None:
    """Remove what a failing disk let nobody remove when it was written."""
    for left in staging.rglob(beside(Path("*"), "*").name):
        left.unlink()


def _sync(folder: Path) -> None:
    for above, _, files in os.walk(folder):
        for name in files:
            handle = os.open(os.path.join(above, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(above))


def _raise(error: OSError) -> None:
    raise error


def _brief(folder: str | os.PathLike[str]) -> str:
    name = os.fspath(folder)
    return name if len(name) <= 300 else f"{name[:300]}..."
