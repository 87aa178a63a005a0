"""The one exception of the package."""

from __future__ import annotations

__all__ = ["CausalProbeError"]


class CausalProbeError(ValueError):
    """Raised for every input that causal-probe can't work with.

    The message is one paragraph that says what was asked, what was found and what to do about it. The command
    line prints it alone, without a traceback, and exits with code 2.
    """
