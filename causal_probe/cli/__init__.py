"""The command line: a thin skin over :mod:`causal_probe.experiments`. Every command is one call that a notebook can make."""

from causal_probe.cli.main import main

__all__ = ["main"]
