"""What the tests of files and folders share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


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
