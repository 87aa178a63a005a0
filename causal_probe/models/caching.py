"""What TransformerLens' own models do and its ``HookedRootModule`` does not: a cache that knows its layers."""

from __future__ import annotations

from typing import Any

from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.HookedRootModule import HookedRootModule

__all__ = ["CachingModule"]


class CachingModule(HookedRootModule):
    """A ``HookedRootModule`` whose cache is asked as that of any TransformerLens model: ``cache["pattern", 0]``."""

    def run_with_cache(
        self, *model_args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> tuple[Any, Any]:
        """The output and an ``ActivationCache`` (a plain dict with ``return_cache_object=False``)."""
        output, cache = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if return_cache_object:
            return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return output, cache
