"""Files that appear whole or not at all, and that say when they are damaged.

A file is written under a name beside its target, brought to the disk, and renamed; what a writer that was killed left is used up by the
next. Every file that is read back carries a checksum: SHA-256 over its content. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from causal_probe.errors import CausalProbeError
from causal_probe.results.jsonable import to_jsonable
from causal_probe.results.locks import beside, locked

__all__ = [
    "digest",
    "read_arrays",
    "read_json",
    "read_sealed",
    "reason_of",
    "seal",
    "sync_folder",
    "write_arrays",
    "write_bytes",
    "write_json",
    "write_text",
]

#: Where the header of a file of arrays says what they are; and in it, as in JSON, where the checksum is.
ABOUT, SHA256 = "causal_probe", "sha256"
#: No header of ours is longer, in bytes, and nothing is nested deeper.
LONGEST_HEADER, DEEPEST = 2**25, 100
#: Seconds that a writer waits for another writer of the same file.
PATIENCE = 10.0


# --------------------------------------------------------------------------------------------------------------- writing


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
    refusal = f"Another process is writing {path}. Wait for it, or name another file."
    try:
        with locked(path, refusal=refusal, patience=PATIENCE):
            partial = beside(path, "partial")
            with contextlib.suppress(FileNotFoundError):  # of a writer that died: who holds the lock is the only one
                os.unlink(partial)
            try:
                with open(partial, "xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
                raise
            sync_folder(path.parent)
    except CausalProbeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise CausalProbeError(
            f"Can't write {path}: {reason_of(error)}. Name a file, in a folder that exists and can be written."
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    r"""Write ``text`` to ``path`` atomically: a reader, or an interruption, sees the old file or the new one.

    Raises
    ------
    CausalProbeError
        If the folder is missing or can't be written, ``path`` is a folder, or another process is writing it.

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


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` (see :func:`~causal_probe.results.to_jsonable`) to ``path`` as indented, strict JSON, atomically.

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


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` in plain JSON types with its checksum under ``sha256``: what :func:`read_sealed` reads.

    Examples
    --------
    >>> seal({"seed": 0})["sha256"][:8]
    'bd048884'
    """
    plain = to_jsonable({key: value for key, value in content.items() if key != SHA256})
    return {**plain, SHA256: hashlib.sha256(_canonical(plain)).hexdigest()}


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], *, about: Any = None) -> None:
    """Write named arrays to ``path`` as safetensors, atomically; ``about``, in plain JSON types, goes into the file's header.

    The header also holds a checksum over names, dtypes, shapes, bytes and ``about``.

    Raises
    ------
    CausalProbeError
        As :func:`write_text`; also for an array of a dtype that safetensors does not have.

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
    ordered = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    plain = to_jsonable(about)
    try:
        # One entry: safetensors writes several in no certain order, and equal results must be equal files.
        said = json.dumps({SHA256: _checksum(ordered, plain), "about": plain}, allow_nan=False)
        content = save(ordered, {ABOUT: said})
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        dtypes = ", ".join(sorted({str(array.dtype) for array in ordered.values()}))
        raise CausalProbeError(f"Can't write {path}: arrays of {dtypes} have no place in safetensors.") from error
    write_bytes(path, content)


def digest(*arrays: NDArray[Any]) -> str:
    """A hash of the content of arrays: for results of data without a name.

    >>> digest(np.zeros(2)) == digest(np.zeros(2)) != digest(np.zeros((1, 2)))
    True
    """
    content = hashlib.sha256()
    for array in arrays:
        content.update(f"{array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:32]


# --------------------------------------------------------------------------------------------------------------- reading


def read_arrays(
    path: str | os.PathLike[str], *, kind: str | None = None, newest: int | None = None
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a file, and what it says about them: a mapping with its ``kind`` and ``format``.

    Parameters
    ----------
    kind, newest
        The kind and the format that are asked for; any if None.

    Raises
    ------
    CausalProbeError
        If the file is missing, damaged, of another kind, or of another format.

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
        _check_header(Path(path))
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        said = parse_json(header.get(ABOUT, "null"))
        if set(header) != {ABOUT} or set(said) != {SHA256, "about"}:
            raise ValueError("it was not written by causal-probe")
        about = said["about"]
        if said[SHA256] != _checksum(arrays, about):
            raise ValueError("its checksum differs: the file is damaged, or was changed by something else")
    except OSError as error:
        raise CausalProbeError(f"Can't read {path}: {reason_of(error)}.") from error
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CausalProbeError(
            f"{path} was expected to be a safetensors file of causal-probe and isn't: {error}."
        ) from error
    about = {} if about is None and kind is None else about
    if not isinstance(about, dict) or (kind is not None and about.get("kind") != kind):
        raise CausalProbeError(f"{path} was expected to hold {kind} of causal-probe, and holds something else.")
    if newest is not None:
        check_format(path, about, newest)
    return arrays, about


def check_format(path: str | os.PathLike[str], about: Mapping[str, Any], number: int) -> None:
    """Refuse what was written in another format."""
    found = about.get("format")
    if found != number:
        by = (about.get("versions") or (about.get("provenance") or {}).get("versions") or {}).get(
            "causal-probe", "another version"
        )
        advice = "Upgrade causal-probe" if isinstance(found, int) and found > number else "Measure anew"
        raise CausalProbeError(
            f"{path} is of format {found}, written by causal-probe {by}; this version reads format {number}. {advice}."
        )


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
        regular_size(Path(path))
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CausalProbeError(f"Can't read {path}: {reason_of(error)}.") from error
    except (ValueError, RecursionError) as error:  # bytes that are no text, text that is no JSON, thousands of brackets
        raise CausalProbeError(f"{path} was expected to be a JSON file and isn't: {error}.") from error


def read_sealed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a JSON file that :func:`seal` gave its checksum, without that.

    Raises
    ------
    CausalProbeError
        As :func:`read_json`; also if there is no checksum, or it differs.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json(Path(folder) / "a.json", seal({"seed": 0}))
    ...     read_sealed(Path(folder) / "a.json")
    {'seed': 0}
    """
    content = read_json(path)
    if not isinstance(content, dict) or SHA256 not in content:
        raise CausalProbeError(f"{path} was expected to be a result of causal-probe, and holds no checksum.")
    if not is_whole(content):
        raise CausalProbeError(f"{path} is damaged, or was changed by something else: its checksum differs.")
    del content[SHA256]
    return content


def is_whole(content: Mapping[str, Any]) -> bool:
    """Whether content has the checksum that :func:`seal` would give it.

    >>> is_whole(seal({"seed": 0})), is_whole({**seal({"seed": 0}), "seed": 1})
    (True, False)
    """
    try:
        return bool(seal(content)[SHA256] == content.get(SHA256))
    except (CausalProbeError, ValueError):  # a number beyond all floats
        return False


def parse_json(text: str) -> Any:
    """Strict JSON that is not nested deeply.

    Raises
    ------
    ValueError
        If it is something else.
    """
    depth = deepest = 0
    for bracket in re.findall(r"[\[{\]}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise ValueError(f"it is nested {deepest} deep")
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=no_key_twice)


def no_key_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, which Python would read with the last of equal keys alone.

    Raises
    ------
    ValueError
        If a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in one object"
        )
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _checksum(arrays: Mapping[str, NDArray[Any]], about: Any) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        found.update(f"{name!r} {array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    found.update(_canonical(about))
    return found.hexdigest()


def _check_header(path: Path) -> None:
    """Compare the sizes that a header states with the file's, before anything is made of them."""
    size = regular_size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise ValueError(f"its header would take {length} bytes of {size}")
        header = parse_json(file.read(length).decode("utf-8"))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != size:
        raise ValueError(f"it has {size} bytes, and its header speaks of {8 + length + max(ends, default=0)}")


def regular_size(path: Path) -> int:
    """The size of a regular file; a pipe would make a reader wait for ever."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError("it is no regular file")
    return found.st_size


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system can."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # a file system that can't
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def reason_of(error: Exception) -> str:
    """The text of an error, without its number and name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
