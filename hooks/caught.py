"""Queries and keys as they meet in the scores, of models that show them at no hook point: caught where transformers' own attention gets them.

A bridge that runs transformers' attention as it is, such as those of Phi-3.5-MoE, Llama 4 and GPT-J, shows projections and pattern, and what is in
between (rotations, norms, temperatures) passes no hook. There the function that makes the pattern of them is watched while the model runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

__all__ = ["catch", "is_catchable"]

#: The function in the modules of transformers' models, and the method of older ones, that make the pattern.
FUNCTION, METHOD = "eager_attention_forward", "_attn"


def _attention(model: Any, layer: int) -> Any:
    blocks = getattr(model, "blocks", None)
    return None if blocks is None else getattr(getattr(blocks[layer], "attn", None), "original_component", None)


def is_catchable(model: Any, layer: int) -> bool:
    """Whether the layer's attention is one of transformers' that can be watched."""
    attention = _attention(model, layer)
    home = sys.modules.get(type(attention).__module__)
    return attention is not None and (hasattr(home, FUNCTION) or callable(getattr(attention, METHOD, None)))


@contextmanager
def catch(model: Any, layer: int) -> Iterator[dict[str, Tensor]]:
    """While this is open, each forward puts the layer's queries and keys, [batch, pos, head, d_head], under ``"q"`` and ``"k"``, and where it can be seen the
    values under ``"v"``, what the heads read of them under ``"z"`` and the pattern under ``"pattern"``; all are left as they are.
    """
    attention = _attention(model, layer)
    home: Any = sys.modules[type(attention).__module__]
    found: dict[str, Tensor] = {}

    def keep(query: Tensor, key: Tensor) -> None:
        found.update(q=query.detach().transpose(1, 2), k=key.detach().transpose(1, 2))

    if hasattr(home, FUNCTION):
        function: Callable[..., Any] = getattr(home, FUNCTION)

        def watched(module: Any, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
            made = function(module, query, key, *args, **options)
            if module is attention:
                keep(query, key)
                value = args[0] if args else options.get("value")
                if (
                    isinstance(value, Tensor)
                    and isinstance(made, tuple)
                    and all(isinstance(its, Tensor) for its in made[:2])
                ):
                    found.update(v=value.detach().transpose(1, 2), z=made[0].detach(), pattern=made[1].detach())
            return made

        setattr(home, FUNCTION, watched)
        try:
            yield found
        finally:
            setattr(home, FUNCTION, function)
        return
    method: Callable[..., Any] = getattr(attention, METHOD)

    def followed(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        keep(query, key)
        return method(query, key, *args, **options)

    setattr(attention, METHOD, followed)
    try:
        yield found
    finally:
        delattr(attention, METHOD)
