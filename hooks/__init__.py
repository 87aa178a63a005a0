"""Work at a hook point: check it, record there, edit there.

Everything works on any model with TransformerLens' hook points (:class:`~causal_probe.hooks.check.HookedModel`), leaves the model as
it was, and keeps nothing of the size of a batch.

Can this model be measured?
    :func:`to_hooked` turns a Hugging Face model into one with hook points, :func:`on_residual_stream` runs one on vectors.
    :func:`preflight` raises, and :func:`find_faults` lists, what would make its measurements wrong; :func:`self_test` compares what
    the probes find in it with known answers; :func:`attention_hook` gives the layers that can be read.
On what?
    :func:`corpus`: token sequences out of files.
What do its heads do on average?
    :func:`mean_patterns`, :func:`mean_heads`.
What happens without a head, or with other attention?
    :func:`edited` runs a block under edits: :func:`zero_ablate`, :func:`mean_ablate`, :func:`resample_ablate`,
    :func:`replace_row` with :func:`one_hot_row` or :func:`uniform_row`.

All else is imported from its module, such as :func:`causal_probe.hooks.check.describe`.
"""

from __future__ import annotations

from causal_probe.hooks.adapt import to_hooked
from causal_probe.hooks.check import attention_hook
from causal_probe.hooks.continuous import on_residual_stream
from causal_probe.hooks.corpus import corpus
from causal_probe.hooks.edit import (
    edited,
    mean_ablate,
    one_hot_row,
    replace_row,
    resample_ablate,
    uniform_row,
    zero_ablate,
)
from causal_probe.hooks.means import mean_heads, mean_patterns
from causal_probe.hooks.preflight import find_faults, preflight
from causal_probe.hooks.self_test import self_test

__all__ = [
    "attention_hook",
    "corpus",
    "edited",
    "find_faults",
    "mean_ablate",
    "mean_heads",
    "mean_patterns",
    "on_residual_stream",
    "one_hot_row",
    "preflight",
    "replace_row",
    "resample_ablate",
    "self_test",
    "to_hooked",
    "uniform_row",
    "zero_ablate",
]


def __dir__() -> list[str]:
    return [*__all__]
