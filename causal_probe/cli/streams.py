"""Standard output and standard error that may be full, closed or gone."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer

from causal_probe.errors import CausalProbeError

__all__ = ["GONE", "OutputError", "put", "streams"]

#: The exit code of a process whose reader has gone, as a shell reports it of one that the signal SIGPIPE ended.
GONE = 128 + 13


class OutputError(CausalProbeError):
    """Standard output takes nothing more.

    Attributes
    ----------
    gone
        Whether its reader has gone, as ``head`` does: then nobody asks for a reason.
    """

    def __init__(self, message: str, *, gone: bool) -> None:
        super().__init__(message)
        self.gone = gone


def put(text: str) -> None:
    """Print a line on standard output, and see it through.

    Raises
    ------
    OutputError
        If that can't be done.
    """
    if sys.stdout is None:
        raise OutputError(
            "Standard output is closed, and nothing was printed. What --out names is written.", gone=False
        )
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        typer.echo(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        raise _refused(error) from error


def _refused(error: OSError) -> OutputError:
    _to_nowhere(sys.stdout)  # else the interpreter tries again at its end
    said = error.strerror or str(error)
    return OutputError(
        f"Can't print on standard output: {said}. What --out names is written.", gone=error.errno == errno.EPIPE
    )


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """What a command prints goes to streams that may fail: of standard output that is an error, of standard error it is none."""
    before = sys.stderr
    sys.stderr = _Forgiving(before)
    try:
        yield
        with contextlib.suppress(AttributeError):  # closed from the start: then it was not written to, or that was said
            sys.stdout.flush()
    except OSError as error:  # of our own files each is an error that names them
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        raise _refused(error) from error
    finally:
        sys.stderr = before


class _Forgiving:
    """Standard error: that nothing can be said there is no reason to lose the work."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, what: str, *given: str) -> None:
        try:
            if self._stream is not None:
                getattr(self._stream, what)(*given)
        except (OSError, ValueError):  # ValueError: closed meanwhile
            _to_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _to_nowhere(stream: Any) -> None:
    """What the stream still holds, and all that comes, is thrown away."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
