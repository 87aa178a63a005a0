"""What every result shares: where it came from, how it is cited, how it is written.

A result is written as strict JSON (``allow_nan=False``: what is undefined is ``null``, with a reason beside it) and, for
arrays, as safetensors. Nothing is ever pickled. Every file appears whole or not at all: it is written under a temporary
name beside its target and then renamed, and :func:`results_folder` does the same for a whole folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from causal_probe.errors import CausalProbeError

__all__ = [
    "BIBLIOGRAPHY",
    "Citation",
    "cite",
    "read_json",
    "results_folder",
    "to_jsonable",
    "versions",
    "write_arrays",
    "write_json",
    "write_text",
]

#: The packages whose versions every result records.
RECORDED_PACKAGES = (
    "causal-probe",
    "torch",
    "transformer-lens",
    "transformers",
    "networkx",
    "numpy",
    "scipy",
    "scikit-learn",
    "circuitsvis",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; a package that is absent is left out."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# ---------------------------------------------------------------------------------------------------------------- citing

#: BibTeX of every work that a probe of ours builds on, by its key.
BIBLIOGRAPHY: Mapping[str, str] = {
    "nichani2024": """@inproceedings{nichani2024,
  title     = {How Transformers Learn Causal Structure with Gradient Descent},
  author    = {Nichani, Eshaan and Damian, Alex and Lee, Jason D.},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  eprint    = {2402.14735},
  archivePrefix = {arXiv}
}""",
    "olsson2022": """@article{olsson2022,
  title   = {In-context Learning and Induction Heads},
  author  = {Olsson, Catherine and Elhage, Nelson and Nanda, Neel and Joseph, Nicholas and DasSarma, Nova and others},
  journal = {Transformer Circuits Thread},
  year    = {2022},
  eprint  = {2209.11895},
  archivePrefix = {arXiv}
}""",
}


@dataclasses.dataclass(frozen=True)
class Citation:
    """How to cite a result: ``bibtex`` (one entry per work) and ``methods`` (one sentence for a paper's methods section)."""

    bibtex: str
    methods: str

    def __str__(self) -> str:
        return f"{self.methods}\n\n{self.bibtex}"


def cite(*keys: str, methods: str) -> Citation:
    """The entries of :data:`BIBLIOGRAPHY` under ``keys`` beside one methods sentence.

    Raises
    ------
    KeyError
        If a key is not in the bibliography: that is a mistake of ours, not of the user's.
    """
    return Citation("\n\n".join(BIBLIOGRAPHY[key] for key in keys), methods)


# --------------------------------------------------------------------------------------------------------------- writing


def to_jsonable(value: Any) -> Any:
    """``value`` in plain JSON types: arrays as nested lists, graphs as node-link with the key ``edges``.

    Raises
    ------
    CausalProbeError
        For NaN, an infinity, or a type that has no plain form. What is undefined is None, never NaN.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, np.floating)):
        if not math.isfinite(value):
            raise CausalProbeError(
                f"A result was to be written as JSON and holds {value!r}. What is undefined must be None with a reason beside it."
            )
        return float(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.ndarray):
        return to_jsonable(value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, nx.Graph):
        return to_jsonable(nx.node_link_data(value, edges="edges"))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_jsonable(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if hasattr(value, "detach"):  # a tensor, without importing torch here
        return to_jsonable(value.detach().cpu().tolist())
    raise CausalProbeError(f"A value of type {type(value).__name__} can't be written as JSON.")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically: a reader, or an interruption, sees the old file or the new one.

    Raises
    ------
    CausalProbeError
        If the folder is missing or can't be written.
    """
    # Token text may hold lone surrogates, which UTF-8 can't carry: they are written as their escapes.
    _write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def _write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CausalProbeError(
            f"Can't write {path}: {error.strerror}. Name a folder that exists and can be written."
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` (see :func:`to_jsonable`) to ``path`` as indented, strict JSON, atomically."""
    write_text(path, json.dumps(to_jsonable(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write named arrays to ``path`` as safetensors, atomically."""
    _write_bytes(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises
    ------
    CausalProbeError
        If the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CausalProbeError(f"Can't read {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CausalProbeError(f"{path} was expected to be a JSON file and isn't: {error}.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --------------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def results_folder(
    folder: str | os.PathLike[str], *, settings: Mapping[str, Any], overwrite: bool = False
) -> Iterator[Path]:
    """A folder of results that appears whole or not at all.

    Yields an empty staging folder beside ``folder``. When the block ends well, the staging folder takes the place of
    ``folder``; when it raises, the staging folder is removed and ``folder`` is as it was.

    Parameters
    ----------
    folder
        Where the results are to be. It may be absent, empty, or hold earlier results (it has a ``result.json``).
    settings
        The settings of this run. Earlier results of the same settings are replaced; of other settings only with ``overwrite``.
    overwrite
        Replace earlier results whatever their settings. A folder that holds anything but results is never replaced.

    Raises
    ------
    CausalProbeError
        If ``folder`` is a file, can't be written, holds something that is not a result, or holds results of other
        settings and ``overwrite`` is false. :func:`check_results_folder` tells all this before any work is done.
    """
    folder = Path(folder)
    check_results_folder(folder, settings=settings, overwrite=overwrite)
    target = folder.resolve()
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    try:
        os.chmod(staging, 0o777 & ~_umask())
        yield staging
        _swap(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_results_folder(
    folder: str | os.PathLike[str], *, settings: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Raise what :func:`results_folder` would raise; create no more than the missing parents of ``folder``."""
    target = Path(folder).resolve()
    _restore(target)
    if target.exists() and not target.is_dir():
        raise CausalProbeError(f"--out names {folder}, which is a file. Name a folder.")
    if target.is_dir() and any(target.iterdir()):
        earlier = target / "result.json"
        if not earlier.is_file():
            raise CausalProbeError(f"{folder} is not empty and holds no earlier result. Name a new or empty folder.")
        content = read_json(earlier)
        # A folder that a person has added files to is not ours to replace.
        foreign = sorted({path.name for path in target.iterdir()} - set(content.get("files", [])))
        if foreign:
            raise CausalProbeError(
                f"{folder} holds files that causal-probe did not write there ({', '.join(foreign[:3])}). Name another folder."
            )
        if not overwrite and content.get("settings") != to_jsonable(settings):
            raise CausalProbeError(
                f"{folder} holds a result of other settings. Name another folder, or pass --overwrite."
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CausalProbeError(f"Can't make the folder {folder}: {error.strerror}.") from error
    for place in (target.parent, target):
        if place.exists() and not os.access(place, os.W_OK | os.X_OK):
            raise CausalProbeError(f"The folder {place} can't be written. Name another one with --out.")


def _backup_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _swap(staging: Path, target: Path) -> None:
    """Put ``staging`` in the place of ``target``. Between the two renames the old results are in the backup."""
    backup = _backup_of(target)
    if target.exists():
        os.replace(target, backup)
    try:
        os.replace(staging, target)
    except BaseException:
        if backup.exists():
            os.replace(backup, target)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _restore(target: Path) -> None:
    """After a kill between the two renames of :func:`_swap`, bring the old results back."""
    backup = _backup_of(target)
    if backup.exists() and not target.exists():
        os.replace(backup, target)
