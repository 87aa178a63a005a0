"""``causal-probe recover --method gradient`` and ``--data``: which of the command's options mean something there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from causal_probe.errors import CausalProbeError

if TYPE_CHECKING:
    from causal_probe.experiments import GradientRecovery

__all__ = ["by_gradient"]

#: What a gradient is told, and what tokens that are there are told. All else is about training or reading a model.
FOR_A_GRADIENT = ("graph", "positions", "vocab", "alpha", "root_probability", "seed", "sequences", "out", "overwrite")
FOR_TOKENS = ("vocab", "out", "overwrite")
ABOUT_THE_OUTPUT = ("as_json", "method", "data", "out", "overwrite")


def by_gradient(options: Mapping[str, Any], given: Collection[str]) -> GradientRecovery:
    """Run the command's options.

    Parameters
    ----------
    options
        All options of ``causal-probe recover`` by name.
    given
        The names of those that were given: the others are left to the functions below.
    """
    from causal_probe import experiments

    data = options["data"]
    meant = FOR_A_GRADIENT if data is None else FOR_TOKENS
    named = [
        f"--{name.replace('_', '-')}" for name in options if name in given and name not in (*meant, *ABOUT_THE_OUTPUT)
    ]
    if named:
        why = "--method gradient" if data is None else "--data"
        raise CausalProbeError(f"With {why} these options mean nothing: {', '.join(named)}. Leave them out.")
    chosen = {name: options[name] for name in meant if name in given}
    if data is None:
        return experiments.recover_by_gradient(**chosen)
    return experiments.recover_from_tokens(data, **chosen)
