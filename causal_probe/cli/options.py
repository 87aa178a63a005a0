"""What several commands share: options, and how a result is shown."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

__all__ = [
    "INTERRUPTED",
    "AsJson",
    "Command",
    "Device",
    "Dtype",
    "Model",
    "Overwrite",
    "options_given",
    "resumable",
    "show",
]

#: What a shell reports of a command that Ctrl-C has ended.
INTERRUPTED = 130

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder of a saved DisentangledTransformer or a Hugging Face model, a GGUF file, or a name on the hub.",
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="float64, float32, float16 or bfloat16. [default: float32, or as it was saved]")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result of other settings in that folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on standard output.")]


_given: ContextVar[frozenset[str]] = ContextVar("options that were given", default=frozenset())


class Command(TyperCommand):
    """A command that knows which of its options were given, whatever their values: :func:`options_given`."""

    def invoke(self, ctx: Any) -> Any:
        """Run it, and remember which options were given."""
        # Typer carries a click of its own, so the source of a value is told by its name.
        token = _given.set(
            frozenset(name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") != "DEFAULT")
        )
        try:
            return super().invoke(ctx)
        finally:
            _given.reset(token)


def options_given() -> frozenset[str]:
    """The names of the running :class:`Command`'s options that were given, also those with the value that they have by default."""
    return _given.get()


def show(result: Any, *, as_json: bool, out: Path | None) -> None:
    """Print a result, or its JSON alone, and where its report is."""
    typer.echo(json.dumps(result.to_dict(), indent=2, allow_nan=False) if as_json else repr(result))
    if out is not None:
        typer.echo(f"Report: {out / 'report.html'}", err=as_json)


@contextlib.contextmanager
def resumable(kept: Callable[[], str | None]) -> Iterator[None]:
    """Where the same command goes on after Ctrl-C: leave with 130 and one line.

    Parameters
    ----------
    kept
        Says what is kept, and where; None if there is nothing yet.
    """
    try:
        yield
    except KeyboardInterrupt:
        found = kept()
        if found is None:
            raise
        typer.echo(f"Interrupted. {found}; the same command goes on from there.", err=True)
        raise SystemExit(INTERRUPTED) from None
