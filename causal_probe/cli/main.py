"""The entry point: one error in one line with exit code 2, an interruption with 130, and no traceback for either."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import typer

from causal_probe import __version__
from causal_probe.cli.recover import recover
from causal_probe.errors import CausalProbeError

__all__ = ["app", "main"]

app = typer.Typer(
    name="causal-probe",
    help="Ask a transformer which causal structure it has learnt, and prove the answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"causal-probe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Ask a transformer which causal structure it has learnt, and prove the answer."""


app.command()(recover)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 2 for input that can't be worked with, 130 when interrupted."""
    # A user of the command can do nothing about the warnings of the libraries below.
    warnings.simplefilter("ignore")
    try:
        status = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except CausalProbeError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
