"""The entry point: one error in one line with exit code 2, an interruption with 130, and no traceback for either."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from causal_probe import __version__
from causal_probe.cli.commands import INTERRUPTED, commands, examples, in_flags
from causal_probe.cli.streams import GONE, OutputError, streams
from causal_probe.errors import CausalProbeError, CausalProbeWarning

__all__ = ["app", "main"]

app = typer.Typer(
    name="causal-probe",
    help="Ask a transformer which causal structure it has learnt, and test the answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"causal-probe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = None,
) -> None:
    """Ask a transformer which causal structure it has learnt, and test the answer."""


for _name, _function in commands():
    # typer sets what stands between two empty lines as a line of its own.
    app.command(_name, epilog="\n\n".join(["Examples:", *examples(_name)]))(_function)


class _Said(logging.Handler):
    """The library's log, a line each on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(record.getMessage(), err=True)


def _say(text: str) -> None:
    with contextlib.suppress(OutputError), streams():
        typer.echo(text, err=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"Warning: {in_flags(str(message))}", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 2 for input that can't be worked with, 130 when interrupted."""
    # Before torch is imported: its threads wait for each other by spinning, which on a busy machine costs more than the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A user of the command can do nothing about the warnings of the libraries below; ours are a line each.
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", CausalProbeWarning)
    warnings.showwarning = _show_warning
    log = logging.getLogger("causal_probe")
    log.setLevel(logging.INFO)
    log.handlers, log.propagate = [_Said()], False
    try:
        with streams():
            status = app(
                args=None if arguments is None else list(arguments), prog_name="causal-probe", standalone_mode=False
            )
    except OutputError as error:
        if error.gone:
            sys.exit(GONE)
        _say(f"Error: {error}")
        sys.exit(2)
    except CausalProbeError as error:
        _say(f"Error: {in_flags(str(error))}")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:  # typer's usage errors (an unknown option, say) share no public class; all others go on
        usage: Any = error
        if not hasattr(usage, "exit_code") or not hasattr(usage, "show"):
            raise
        if sys.argv[1:] if arguments is None else arguments:
            path = getattr(getattr(usage, "ctx", None), "command_path", "causal-probe")
            said = " ".join(str(usage.format_message()).replace("Value error, ", "").split()).rstrip(".")
            said = said if len(said) < 1000 else f"{said[:300]} ... {said[-300:]}"  # it repeats the arguments
            _say(f"Error: {said}. See {path} --help.")
        else:
            usage.show()  # without arguments: the help
        sys.exit(usage.exit_code)
    if status == INTERRUPTED:  # typer turns an interruption into a status of its own
        _say("Interrupted; nothing was written.")
    sys.exit(status if isinstance(status, int) else 0)
