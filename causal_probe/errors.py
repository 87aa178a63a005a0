"""The one exception and the one warning of the package."""

from __future__ import annotations

import os

__all__ = ["CausalProbeError", "CausalProbeWarning"]

#: Characters of a message.
LONGEST = 2000


class CausalProbeError(ValueError):
    """Raised for every input that causal-probe can't work with.

    The message is one paragraph: what was found, what is allowed, what to do. The command
    line prints it alone, without a traceback, and exits with code 2. It is one line; the middle of a very long one, which says again
    what was given, is left out.
    """

    def __str__(self) -> str:
        said = " ".join(super().__str__().splitlines())
        return said if len(said) <= LONGEST else f"{said[: LONGEST // 2]} ... {said[-LONGEST // 2 :]}"


class CausalProbeWarning(UserWarning):
    """Given with :func:`warnings.warn` where work goes on, on something that is rarely meant.

    The command line prints the message alone, on standard error.
    """


def show_path(path: str | os.PathLike[str]) -> str:
    """A path or name as a message names it: the middle of one that no file system would take is left out.

    >>> show_path("mine.json"), len(show_path("x" * 5000))
    ('mine.json', 203)
    """
    name = os.fspath(path)
    return name if len(name) <= 1000 else f"{name[:100]}...{name[-100:]}"
