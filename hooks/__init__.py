"""What is done *at a hook point*: check it, record there, edit there.

Everything works on any model with TransformerLens' hook points (:class:`HookedModel`), leaves the model as it was, and keeps
nothing of the size of a batch.
"""

from __future__ import annotations

from causal_probe.hooks.adapt import to_hooked
from causal_probe.hooks.check import HookedModel, attention_hook, describe, is_live, require_hooks, undisturbed
from causal_probe.hooks.continuous import OnSequences, on_residual_stream
from causal_probe.hooks.corpus import (
    Corpus,
    CorpusCounts,
    CorpusPass,
    corpus,
    merge_readings,
    missing_shards,
    read_documents,
    read_shard,
)
from causal_probe.hooks.edit import (
    Edit,
    edited,
    mean_ablate,
    one_hot_row,
    replace_row,
    resample_ablate,
    uniform_row,
    zero_ablate,
)
from causal_probe.hooks.means import mean_heads, mean_patterns
from causal_probe.hooks.moments import Moments
from causal_probe.hooks.preflight import Finding, context_length, find_faults, preflight
from causal_probe.hooks.record import each_batch
from causal_probe.hooks.self_test import Answer, self_test
from causal_probe.hooks.tokens import SpecialTokens, content_tokens, special_tokens, text_start

__all__ = [
    "Answer",
    "Corpus",
    "CorpusCounts",
    "CorpusPass",
    "Edit",
    "Finding",
    "HookedModel",
    "Moments",
    "OnSequences",
    "SpecialTokens",
    "attention_hook",
    "content_tokens",
    "context_length",
    "corpus",
    "describe",
    "each_batch",
    "edited",
    "find_faults",
    "is_live",
    "mean_ablate",
    "mean_heads",
    "mean_patterns",
    "merge_readings",
    "missing_shards",
    "on_residual_stream",
    "one_hot_row",
    "preflight",
    "read_documents",
    "read_shard",
    "replace_row",
    "require_hooks",
    "resample_ablate",
    "self_test",
    "special_tokens",
    "text_start",
    "to_hooked",
    "undisturbed",
    "uniform_row",
    "zero_ablate",
]

#: What tab completion offers: where a notebook begins. The rest of ``__all__``, most of it classes of results, is as public.
_OFFERED = (
    "attention_hook",
    "corpus",
    "describe",
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
    "undisturbed",
    "uniform_row",
    "zero_ablate",
)


def __dir__() -> list[str]:
    return [*_OFFERED]
