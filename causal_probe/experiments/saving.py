"""A study's folder: claimed before the work, and filled with its numbers, its tables and its page, whole or not at all; and its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from causal_probe.options.common import SavingOptions
from causal_probe.results import Claim, Result, claim, write_json

__all__ = ["Clock", "fill", "kept"]

R = TypeVar("R", bound=Result)


class Clock:
    """Seconds by activity."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._spent: dict[str, float] = {}

    def spent_on(self, what: str) -> None:
        """Count the seconds since the last call."""
        now = time.perf_counter()
        self._spent[what] = now - self._last
        self._last = now

    @property
    def timings(self) -> dict[str, float]:
        """All that was counted, and the ``total``."""
        return {**self._spent, "total": time.perf_counter() - self._started}


@contextmanager
def kept(o: SavingOptions, settings: Mapping[str, Any], kind: Any) -> Iterator[Callable[[R], R]]:
    """Hold the folder ``o.out`` for the length of a study (:func:`causal_probe.results.claim`); yield what saves its result there.

    The result, of the class ``kind``, is given back. Without a folder nothing is held, and nothing saved.
    """
    if o.out is None:
        yield lambda found: found
        return
    names = {"result": kind.RESULT, "unfinished": getattr(kind, "UNFINISHED", None)}
    with claim(o.out, settings=settings, overwrite=o.overwrite, **names) as claimed:
        yield partial(fill, claimed, page=o.page)


def fill(claimed: Claim, found: R, *, page: Callable[[Any, Path], object] | None) -> R:
    """Put a result into its folder: the JSON, all of it in a ``.safetensors`` of the same name, what ``write_data`` writes, and its page."""
    made: Any = found
    with claimed.stage(page=None if page is None else partial(page, found)) as folder:
        write_json(folder / made.RESULT, found.to_dict())
        found.save((folder / made.RESULT).with_suffix(".safetensors"))
        if hasattr(found, "write_data"):
            made.write_data(folder)
    return found
