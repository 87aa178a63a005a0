"""One writer at a time: a lock beside what is written, which goes with its holder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from causal_probe.errors import CausalProbeError

__all__ = ["beside", "locked"]


def beside(target: Path, what: str) -> Path:
    """The name of our own beside a file or folder: its ``partial`` successor, its ``previous`` content, its ``lock``."""
    return target.with_name(f".{target.name}.causal-probe-{what}")


@contextlib.contextmanager
def locked(target: Path, *, refusal: str, patience: float = 0) -> Iterator[None]:
    """Hold the lock of ``target``, which need not exist; its folder must. A lock whose holder died is free.

    Raises
    ------
    CausalProbeError
        With the text ``refusal``, if another holds it for longer than ``patience`` seconds.
    OSError, ValueError
        If no file can be made there.
    """
    if not target.parent.is_dir():  # filelock would make it
        os.listdir(target.parent)  # says why not
    path = beside(target, "lock")
    lock = FileLock(path)
    try:
        _acquire(lock, path, patience)
    except Timeout:
        raise CausalProbeError(refusal) from None
    try:
        yield
    finally:
        # While it is held: who opens the name afterwards makes a new file, and who has it open sees that it lost its name.
        with contextlib.suppress(OSError):
            os.unlink(path)
        with contextlib.suppress(OSError):  # it goes with the file's handle at the latest
            lock.release()


def _acquire(lock: FileLock, path: Path, patience: float) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not path.exists():  # "no such file" is a race to filelock, also where no file can ever be made
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o644))
        lock.acquire(timeout=patience, poll_interval=0.01)
