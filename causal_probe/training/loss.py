"""The loss of a training step, as it is or compiled by :func:`torch.compile`: the same numbers to rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax

from causal_probe.errors import CausalProbeError
from causal_probe.models.fast import last_logits

__all__ = ["StepLoss", "compile_step", "step_loss", "task_loss"]

#: (tokens, target, A, W_U, position_only) -> the mean loss, in nats.
StepLoss = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor, bool], Tensor]


def task_loss(
    logits: Float[Tensor, "*rows batch d_vocab"], target: Float[Tensor, "batch d_vocab"]
) -> Float[Tensor, "*rows batch"]:
    """-sum_s target(s) log softmax(logits)(s), in nats, one per sequence.

    Examples
    --------
    >>> import torch
    >>> task_loss(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]])).round(decimals=3)
    tensor([1.0990])
    """
    return -(target * log_softmax(logits, dim=-1)).sum(-1)


def step_loss(
    tokens: Int[Tensor, "batch pos"],
    target: Float[Tensor, "batch d_vocab"],
    A: Sequence[Tensor],
    W_U: Tensor,
    position_only: bool,
) -> Float[Tensor, ""]:
    """The mean of :func:`task_loss` of a disentangled transformer with these weights."""
    return task_loss(last_logits(tokens, A, W_U, position_only=position_only), target).mean()


def compile_step(loss: StepLoss = step_loss) -> StepLoss:
    """The loss, compiled when it is first called, which takes some seconds, and anew for every batch size and choice of moved weights.

    Raises
    ------
    CausalProbeError
        When it is called, if it can't be compiled, as where there is no C++ compiler.
    """
    fast: Callable[..., Tensor] | None = None

    def run(*given: Any) -> Tensor:
        nonlocal fast
        try:
            with warnings.catch_warnings():  # the compiler's, of its own parts and of what it passes over
                warnings.simplefilter("ignore")
                if fast is None:
                    fast = torch.compile(loss, dynamic=False)
                found = fast(*given)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise CausalProbeError(
                f"The training step can't be compiled ({type(error).__name__}: {reason}). It takes a C++ compiler that torch finds; without "
                "one leave `compiled` out."
            ) from error
        return found

    return run
