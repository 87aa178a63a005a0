"""A study's folder: claimed before the work, and filled with its numbers, its tables and its page, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from causal_probe.options.common import SavingOptions
from causal_probe.results import Claim, claim, write_json

__all__ = ["fill", "kept"]


@contextmanager
def kept(
    o: SavingOptions, settings: Mapping[str, Any], *, result: str = "result.json", unfinished: str | None = None
) -> Iterator[Callable[[Any], None]]:
    """Hold the folder ``o.out`` for the length of a study (:func:`causal_probe.results.claim`); yield what saves its result there.

    Without a folder nothing is held, and nothing saved.
    """
    if o.out is None:
        yield lambda found: None
        return
    with claim(o.out, settings=settings, overwrite=o.overwrite, result=result, unfinished=unfinished) as claimed:
        yield lambda found: fill(claimed, found, page=o.page)


def fill(claimed: Claim, found: Any, *, page: Callable[[Any, Path], object] | None) -> None:
    """Put a result into its folder: the JSON, what ``write_data`` writes beside it, and its page."""
    with claimed.stage(page=None if page is None else partial(page, found)) as folder:
        write_json(folder / found.RESULT, found.to_dict())
        if hasattr(found, "write_data"):
            found.write_data(folder)
