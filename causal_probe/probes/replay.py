"""Parts of a forward pass that need not run: blocks that give what they gave before, and rows of the logits that nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

__all__ = ["only_rows", "passed_on", "recorded", "replayed"]


@contextmanager
def recorded(model: Any, outputs: dict[int, Any]) -> Iterator[None]:
    """Put what each block of the model returns into ``outputs``, by layer."""
    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):

            def record(block: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                outputs[layer] = output

            stack.callback(block.register_forward_hook(record).remove)
        yield


@contextmanager
def replayed(model: Any, outputs: Mapping[int, Any]) -> Iterator[None]:
    """Let blocks return what they returned before, without running."""

    def again(stream: Any, output: Any) -> Any:
        return output

    with _in_place_of(model, {layer: partial(again, output=output) for layer, output in outputs.items()}):
        yield


@contextmanager
def passed_on(model: Any, outputs: Mapping[int, Any], layer: int) -> Iterator[None]:
    """Let all blocks behind ``layer`` add to the stream what they added before, without running: a change of the stream passes them by."""
    last = max(outputs)

    def at_last(stream: Tensor) -> Any:
        before, after = (_stream(outputs[which]) for which in (layer, last))
        return _with_stream(outputs[last], after + (stream - before))

    between: dict[int, Any] = {each: partial(_with_stream, outputs[each]) for each in range(layer + 1, last)}
    with _in_place_of(model, between | ({last: at_last} if last > layer else {})):
        yield


@contextmanager
def only_rows(model: Any, chosen: Bool[Tensor, "batch pos"]) -> Iterator[None]:
    """Let the unembedding read these rows alone: logits are [1, row, d_vocab] then, in the order of sequences and positions."""

    def pick(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        stream, *more = args
        return (stream[chosen.to(stream.device)][None], *more)

    handle = model.unembed.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _stream(output: Any) -> Tensor:
    """Blocks return the stream, or a tuple that begins with it."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _with_stream(output: Any, stream: Tensor) -> Any:
    return stream if isinstance(output, Tensor) else (stream, *output[1:])


@contextmanager
def _in_place_of(model: Any, functions: Mapping[int, Callable[[Any], Any]]) -> Iterator[None]:
    """Give blocks other functions of the stream, by layer."""
    with ExitStack() as stack:
        for layer, function in functions.items():
            block = model.blocks[layer]
            own = vars(block).get("forward")  # some libraries wrap a module's forward in this way, too
            stack.callback(_restore, block, own)

            def forward(*args: Any, function: Callable[[Any], Any] = function, **kwargs: Any) -> Any:
                return function(args[0] if args else next(iter(kwargs.values())))

            vars(block)["forward"] = forward
        yield


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        vars(block).pop("forward", None)
    else:
        vars(block)["forward"] = forward
