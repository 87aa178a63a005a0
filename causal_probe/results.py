"""What every result shares: where it came from, how it is cited, how it is written.

A result is written as strict JSON (``allow_nan=False``: what is undefined is ``null``, with a reason beside it) and, for
arrays, as safetensors. Nothing is ever pickled. Every file appears whole or not at all: it is written under a temporary
name beside its target and then renamed, and :func:`results_folder` does the same for a whole folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import html
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from causal_probe.errors import CausalProbeError

__all__ = [
    "BIBLIOGRAPHY",
    "Citation",
    "cite",
    "clean",
    "digest",
    "escape",
    "html_table",
    "list_files",
    "read_arrays",
    "read_json",
    "results_folder",
    "to_jsonable",
    "versions",
    "write_arrays",
    "write_bytes",
    "write_json",
    "write_text",
]


def __dir__() -> list[str]:
    return [*__all__]


#: Where the header of a file of arrays says what they are.
ABOUT = "causal_probe"

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
    """Versions of Python and of the packages that a result depends on; a package that is absent is left out.

    Examples
    --------
    >>> sorted(versions())[:3]
    ['causal-probe', 'circuitsvis', 'networkx']
    """
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = _version(package)
    return found


@functools.cache
def _version(package: str) -> str:
    """Read once: a package's metadata takes milliseconds, and results are made by the thousand."""
    return importlib.metadata.version(package)


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
    "vonoswald2023": """@inproceedings{vonoswald2023,
  title     = {Transformers Learn In-Context by Gradient Descent},
  author    = {von Oswald, Johannes and Niklasson, Eyvind and Randazzo, Ettore and Sacramento, Jo{\\~a}o and Mordvintsev, Alexander and Zhmoginov, Andrey and Vladymyrov, Max},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  eprint    = {2212.07677},
  archivePrefix = {arXiv}
}""",
    "zheng2024": """@inproceedings{zheng2024,
  title     = {On Mesa-Optimization in Autoregressively Trained Transformers: Emergence and Capability},
  author    = {Zheng, Chenyu and Huang, Wei and Wang, Rongzhen and Wu, Guoqiang and Zhu, Jun and Li, Chongxuan},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  eprint    = {2405.16845},
  archivePrefix = {arXiv}
}""",
    "rohekar2023": """@inproceedings{rohekar2023,
  title     = {Causal Interpretation of Self-Attention in Pre-Trained Transformers},
  author    = {Rohekar, Raanan Y. and Gurwicz, Yaniv and Nisimov, Shami},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  eprint    = {2310.20307},
  archivePrefix = {arXiv}
}""",
    "rohekar2021": """@inproceedings{rohekar2021,
  title     = {Iterative Causal Discovery in the Possible Presence of Latent Confounders and Selection Bias},
  author    = {Rohekar, Raanan Y. and Nisimov, Shami and Gurwicz, Yaniv and Novik, Gal},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021}
}""",
    "rohekar2024": """@misc{rohekar2024,
  title  = {A Causal World Model Underlying Next Token Prediction: Exploring {GPT} in a Controlled Environment},
  author = {Rohekar, Raanan Y. and Gurwicz, Yaniv and Yu, Sungduk and Aflalo, Estelle and Lal, Vasudev},
  year   = {2024},
  eprint = {2412.07446},
  archivePrefix = {arXiv}
}""",
    "elhage2021": """@article{elhage2021,
  title   = {A Mathematical Framework for Transformer Circuits},
  author  = {Elhage, Nelson and Nanda, Neel and Olsson, Catherine and Henighan, Tom and Joseph, Nicholas and others},
  journal = {Transformer Circuits Thread},
  year    = {2021}
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

    Examples
    --------
    >>> cite("nichani2024", methods="A graph was recovered.").methods
    'A graph was recovered.'
    """
    return Citation("\n\n".join(BIBLIOGRAPHY[key] for key in keys), methods)


# -------------------------------------------------------------------------------------------------------------- showing

# Controls, formats (among them the marks that reorder text), surrogates, unassigned, line and paragraph separators.
_UNSHOWABLE = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
_ZERO_WIDTH_JOINER = "\u200d"  # of category Cf, but it is what joins an emoji's parts


def clean(text: str) -> str:
    r"""``text`` with every unshowable character as its escape, but for newlines and tabs.

    Examples
    --------
    >>> clean("a lone surrogate: \ud800, a mark that reorders: \u202e")
    'a lone surrogate: \\ud800, a mark that reorders: \\u202e'
    """
    return "".join(
        character if character in "\n\t" or is_showable(character) else escape_character(character)
        for character in text
    )


def is_showable(character: str) -> bool:
    """Whether a character can be seen, leaves the order of others alone, and can be written."""
    return character == _ZERO_WIDTH_JOINER or unicodedata.category(character) not in _UNSHOWABLE


def escape_character(character: str) -> str:
    """A character as Python writes it in ASCII."""
    return character.encode("unicode_escape").decode("ascii")


def escape(text: object) -> str:
    r"""Text that may stand in HTML: markup is escaped, and so is what can't be shown.

    Examples
    --------
    >>> escape("</table>\ud800")
    '&lt;/table&gt;\\ud800'
    """
    return html.escape(clean(str(text)))


def html_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "", notes: Sequence[str] = ()
) -> str:
    """A table for a notebook: what results return from ``_repr_html_``.

    Parameters
    ----------
    columns
        The head of the table.
    rows
        Their values; a float is shown with four significant digits, None as an empty cell.
    caption, notes
        What stands above and below.

    Examples
    --------
    >>> html_table(["head", "score"], [("L0H0", 0.5)])
    '<table><thead><tr><th>head</th><th>score</th></tr></thead><tbody><tr><td>L0H0</td><td>0.5</td></tr></tbody></table>'
    """

    def line(cells: Sequence[object], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{_cell(cell)}</{tag}>' for cell in cells)}</tr>"

    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(line(row, "td") for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table>{above}<thead>{line(columns, 'th')}</thead><tbody>{body}</tbody></table>{below}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return escape(f"{value:.4g}" if isinstance(value, (float, np.floating)) else value)


# --------------------------------------------------------------------------------------------------------------- writing


def to_jsonable(value: Any) -> Any:
    """``value`` in plain JSON types: arrays as nested lists, graphs as node-link with the key ``edges``.

    Raises
    ------
    CausalProbeError
        For NaN, an infinity, or a type that has no plain form. What is undefined is None, never NaN.

    Examples
    --------
    >>> import numpy as np
    >>> to_jsonable({"weights": np.eye(2), "heads": (1, 1), "error": None})
    {'weights': [[1.0, 0.0], [0.0, 1.0]], 'heads': [1, 1], 'error': None}
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
    r"""Write ``text`` to ``path`` atomically: a reader, or an interruption, sees the old file or the new one.

    Raises
    ------
    CausalProbeError
        If the folder is missing or can't be written, or ``path`` is a folder.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder) / "a.txt", "a lone surrogate: \ud800")
    ...     (Path(folder) / "a.txt").read_text()
    'a lone surrogate: \\ud800'
    """
    # Token text may hold lone surrogates, which UTF-8 can't carry: they are written as their escapes.
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` to ``path`` atomically, as :func:`write_text` does.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_bytes(Path(folder) / "a", b"whole or not at all")
    ...     (Path(folder) / "a").read_bytes()
    b'whole or not at all'
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(8)}.partial"  # as _PARTIAL has it
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                os.unlink(temporary)
            raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CausalProbeError(
            f"Can't write {path}: {_reason(error)}. Name a file, in a folder that exists and can be written."
        ) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` (see :func:`to_jsonable`) to ``path`` as indented, strict JSON, atomically.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "a.json", {"edges": {(0, 1)}})
    ...     read_json(Path(folder) / "a.json")
    {'edges': [[0, 1]]}
    """
    write_text(path, json.dumps(to_jsonable(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], *, about: Any = None) -> None:
    """Write named arrays to ``path`` as safetensors, atomically; ``about``, in plain JSON types, goes into the file's header.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from safetensors.numpy import load_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_arrays(Path(folder) / "a.safetensors", {"weights": np.eye(2)})
    ...     load_file(Path(folder) / "a.safetensors")["weights"].shape
    (2, 2)
    """
    # Not ascontiguousarray, which gives an array without axes one axis.
    header = None if about is None else {ABOUT: json.dumps(to_jsonable(about), allow_nan=False)}
    write_bytes(path, save({name: np.asarray(array, order="C") for name, array in arrays.items()}, header))


def digest(*arrays: NDArray[Any]) -> str:
    """What tells the content of arrays from that of others: for results of data that have no name.

    >>> digest(np.zeros(2)) == digest(np.zeros(2)) != digest(np.zeros((1, 2)))
    True
    """
    content = hashlib.sha256()
    for array in arrays:
        content.update(f"{array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:32]


def read_arrays(
    path: str | os.PathLike[str], *, kind: str, newest: int
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a file, and what it says about them: a mapping with the ``kind`` and a ``format`` up to ``newest``.

    Raises
    ------
    CausalProbeError
        If the file is missing, damaged, of another kind, or of a newer format.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.safetensors"
    ...     write_arrays(path, {"weights": np.eye(2)}, about={"kind": "weights", "format": 1})
    ...     arrays, about = read_arrays(path, kind="weights", newest=1)
    >>> arrays["weights"].shape, about["kind"]
    ((2, 2), 'weights')
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "null"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except OSError as error:
        raise CausalProbeError(f"Can't read {path}: {_reason(error)}.") from error
    except (SafetensorError, ValueError) as error:
        raise CausalProbeError(f"{path} was expected to be a safetensors file and isn't: {error}.") from error
    if not isinstance(about, dict) or about.get("kind") != kind or not isinstance(about.get("format"), int):
        raise CausalProbeError(f"{path} was expected to hold {kind} of causal-probe, and holds something else.")
    if about["format"] > newest:
        by = (about.get("versions") or {}).get("causal-probe", "a newer version")
        raise CausalProbeError(
            f"{path} is of format {about['format']}, written by causal-probe {by}; this version reads formats up to {newest}. Upgrade "
            "causal-probe."
        )
    return arrays, about


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises
    ------
    CausalProbeError
        If the file is missing, unreadable or not strict JSON (which has no NaN).

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "a.json", {"seed": 0})
    ...     read_json(Path(folder) / "a.json")
    {'seed': 0}
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise CausalProbeError(f"Can't read {path}: {_reason(error)}.") from error
    except (ValueError, RecursionError) as error:  # bytes that are no text, text that is no JSON, thousands of brackets
        raise CausalProbeError(f"{path} was expected to be a JSON file and isn't: {error}.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# --------------------------------------------------------------------------------------------------------------- folders

#: What a kill in the middle of writing a file leaves beside it.
_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")


@contextlib.contextmanager
def results_folder(
    folder: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    overwrite: bool = False,
    result: str = "result.json",
    unfinished: str | None = None,
) -> Iterator[Path]:
    """A folder of results that appears whole or not at all.

    Yields an empty staging folder beside ``folder``. When the block ends well, the staging folder takes the place of
    ``folder``; when it raises, the staging folder is removed and ``folder`` is as it was.

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
        If ``folder`` is a file, can't be written, can't be replaced (it is the current folder or a mount point), holds
        something that is not a result, or holds results of other settings and ``overwrite`` is false.
        :func:`check_results_folder` tells all this before any work is done.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as above:
    ...     with results_folder(Path(above) / "out", settings={"seed": 0}) as staging:
    ...         write_json(staging / "result.json", {"settings": {"seed": 0}, "files": ["result.json"]})
    ...     list_files(Path(above) / "out")
    ['result.json']
    """
    check_results_folder(folder, settings=settings, overwrite=overwrite, result=result, unfinished=unfinished)
    target = _resolve(folder)
    staging = _make_staging(target)
    try:
        yield staging
        try:
            _swap(staging, target)
        except OSError as error:
            raise CausalProbeError(f"Can't put the results into {folder}: {_reason(error)}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def list_files(folder: str | os.PathLike[str]) -> list[str]:
    """Every file below a folder, as sorted paths relative to it with forward slashes: what ``files`` of a result lists.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder) / "a.txt", "hello")
    ...     list_files(folder)
    ['a.txt']
    """
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if not path.is_dir())


def check_results_folder(
    folder: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    overwrite: bool = False,
    result: str = "result.json",
    unfinished: str | None = None,
) -> None:
    """Raise what :func:`results_folder` would raise; create no more than the missing parents of ``folder``."""
    target = _resolve(folder)
    try:
        if target.exists() and not target.is_dir():
            raise CausalProbeError(f"--out names {folder}, which is a file. Name a folder.")
        if target.exists() and (os.path.ismount(target) or os.path.samefile(target, os.curdir)):
            raise CausalProbeError(
                f"{folder} is the current folder or a mount point, and can't be replaced as a whole. Name a folder inside it."
            )
        _restore(target)
        if target.is_dir():
            left = {
                name for name in os.listdir(target) if name == unfinished or (unfinished and _PARTIAL.fullmatch(name))
            }
            _check_replaceable(folder, target, settings=settings, overwrite=overwrite, result=result, left=left)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder can be made here if one has just been made: on a read-only or special file system, rights are not enough.
        _make_staging(target).rmdir()
    except OSError as error:
        raise CausalProbeError(
            f"Can't make the folder {folder}: {_reason(error)}. Name another one with --out."
        ) from error


def _check_replaceable(
    folder: str | os.PathLike[str],
    target: Path,
    *,
    settings: Mapping[str, Any],
    overwrite: bool,
    result: str,
    left: set[str],
) -> None:
    if not os.access(target, os.W_OK | os.X_OK):
        raise CausalProbeError(f"The folder {folder} can't be written. Name another one with --out.")
    if set(os.listdir(target)) <= left:
        return
    earlier = target / result
    if not earlier.is_file():
        raise CausalProbeError(f"{folder} is not empty and holds no earlier result. Name a new or empty folder.")
    content = read_json(earlier)
    files = content.get("files") if isinstance(content, dict) else None
    # A folder that a person has added files to is not ours to replace.
    foreign = sorted(set(list_files(target)) - left - set(map(str, files if isinstance(files, list) else ())))
    if foreign:
        raise CausalProbeError(
            f"{folder} holds files that causal-probe did not write there ({', '.join(foreign[:3])}). Name another folder."
        )
    if not overwrite and content.get("settings") != to_jsonable(settings):
        raise CausalProbeError(f"{folder} holds a result of other settings. Name another folder, or pass --overwrite.")


def _resolve(folder: str | os.PathLike[str]) -> Path:
    try:
        return Path(folder).resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # RuntimeError: links in a circle; ValueError: no possible name
        raise CausalProbeError(f"{os.fspath(folder)!r} can't name a folder of results: {_reason(error)}.") from error


def _make_staging(target: Path) -> Path:
    staging = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    staging.mkdir()
    return staging


def _backup_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.causal-probe-previous")


def _swap(staging: Path, target: Path) -> None:
    """Put ``staging`` in the place of ``target``. Between the two renames the old results are in the backup."""
    backup = _backup_of(target)
    try:
        if target.exists():
            os.replace(target, backup)
        os.replace(staging, target)
    except BaseException:
        _restore(target)
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _restore(target: Path) -> None:
    """Finish what a kill inside :func:`_swap` left: bring the old results back, or drop them if the new ones are in place."""
    backup = _backup_of(target)
    if not backup.exists():
        return
    if target.exists() and any(target.iterdir()):
        shutil.rmtree(backup)
    else:
        os.replace(backup, target)
