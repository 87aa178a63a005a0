"""Greedy pruning: one item after another is taken away for good, unless what is left falls too far."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

__all__ = ["prune"]

Item = TypeVar("Item")


def prune(
    items: Iterable[Item],
    value: Callable[[list[Item]], float],
    may_go: Callable[[float, float], bool],
    *,
    gone: Sequence[Item] = (),
    now: float,
) -> tuple[list[Item], float]:
    """What is taken away, and the value without it.

    Parameters
    ----------
    items
        In the order in which they are tried.
    value
        Of the model without these items; the one that is tried stands last.
    may_go
        (the value so far, the value without one more) -> whether it may be taken away.
    gone, now
        What is gone before, and the value without it.

    Examples
    --------
    >>> worth = {"a": 3, "b": 0, "c": 1}
    >>> prune("abc", lambda gone: 4 - sum(worth[each] for each in gone), lambda now, after: after >= 3, now=4)
    (['b', 'c'], 3)
    """
    left_out = [*gone]
    for item in items:
        after = value([*left_out, item])
        if may_go(now, after):
            left_out, now = [*left_out, item], after
    return left_out, now
