"""The disentangled transformer as a standard TransformerLens model: the same function, with a residual stream that is summed.

A concatenation is a sum of vectors in disjoint subspaces. Give every part of the final stream its own coordinates of one
stream of that width, leave them zero until the part is computed, and appending becomes adding. What every tool for standard
models expects (``W_Q``, ``W_K``, ``W_V``, ``W_O``, one ``d_model``, one ``d_head``) is then there, and nothing is approximated.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig

from causal_probe.errors import CausalProbeError

__all__ = ["real_heads", "to_transformer_lens"]


@runtime_checkable
class Disentangled(Protocol):
    """The members of a :class:`~causal_probe.models.DisentangledTransformer` that are read."""

    d_vocab: int
    n_positions: int
    heads: tuple[int, ...]
    W_U: nn.Parameter

    @property
    def A(self) -> list[Tensor]:
        """The heads' query-key matrices, layer by layer."""


def to_transformer_lens(model: Any) -> Any:
    """The same function as a standard TransformerLens model, in eval mode, with weights of its own.

    Logits at every position and patterns are those of ``model`` up to rounding (the order of the sums differs), and so are
    the gradients with respect to the patterns. ``W_Q W_K^T`` is A (TransformerLens 4: A / 2, see below), so the weights can be
    read as well as the activations, and :meth:`DisentangledTransformer.subspaces` names the coordinates of the stream.

    Parameters
    ----------
    model
        Any disentangled transformer. Device and dtype are kept; later changes of ``model`` don't reach the export.

    Returns
    -------
    model
        On TransformerLens 3 a ``HookedTransformer``, on 4 a ``TransformerBridge`` made by ``boot_native``. Its ``cfg``:
        ``d_model`` is the width of the final stream, ``d_head`` that of the widest stream a head reads, ``n_ctx`` is
        ``model.n_positions``, ``n_heads`` the largest number of heads of a layer; attention only, no normalization.

    Notes
    -----
    - Rounding: a score s is known to about eps |s|, and a pattern that is not saturated is too. In float32 the two models'
      patterns agree to 1e-6 while scores stay below about 50, and to 1e-5 at 3,000; in float64 to 1e-12 throughout.
    - A standard model has as many heads in every layer. A layer that has fewer is filled up with *inert* heads: all their
      weights are zero, they attend evenly and write nothing. Head h of layer l is real if ``h < model.heads[l]``;
      :func:`real_heads` tells from the export alone.
    - TransformerLens 4's native model always divides the scores by something, and not by 1. So there it divides by
      ``cfg.attn_scale`` = 1/2, ``W_Q`` and ``hook_q`` are halved, and nothing is rounded: these are powers of two.
    - Its ``hook_attn_scores`` carries the pattern, and editing it does nothing: that is how TransformerLens 4's native model
      is made. Use ``hook_pattern``, which is live on both lines.

    Examples
    --------
    >>> import torch
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=5, heads=[2, 1])
    >>> standard = to_transformer_lens(model)
    >>> standard.cfg.d_model, standard.cfg.d_head, standard.cfg.n_heads
    (48, 24, 2)
    >>> bool(torch.equal(standard(torch.tensor([[0, 2, 1]])), model(torch.tensor([[0, 2, 1]]))))
    True
    >>> real_heads(standard)
    tensor([[ True,  True],
            [ True, False]])
    """
    shape = {
        "d_model": model.W_U.shape[0],
        "d_head": model.A[-1].shape[-1],
        "n_layers": len(model.heads),
        "n_heads": max(model.heads),
        "n_ctx": model.n_positions,
        "d_vocab": model.d_vocab,
        "model_name": "disentangled-transformer",
        "attn_only": True,
        "normalization_type": None,
        "default_prepend_bos": False,
        "init_weights": False,
        "device": str(model.W_U.device),
        "dtype": model.W_U.dtype,
    }
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        standard = _native_bridge(model, shape)
    else:
        with warnings.catch_warnings():
            # Of the 3.x line it is the native model; the warning is about 4.0, which lands in the other branch.
            warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
            standard = HookedTransformer({**shape, "use_attn_scale": False})
        _fill(standard, _weights(model, attn_scale=1.0))
    standard.row_shift = 0  # the task is the same
    return standard.eval()


def real_heads(standard: Any) -> Bool[Tensor, "layer head"]:
    """Which heads of an exported model are heads of the disentangled one: those that write into the stream.

    Parameters
    ----------
    standard
        The result of :func:`to_transformer_lens`.
    """
    W_O: Tensor = standard.W_O  # [layer, head, d_head, d_model]
    return (W_O != 0).flatten(2).any(-1)


def _weights(model: Any, *, attn_scale: float) -> dict[str, Tensor]:
    """The weights that are not zero, under TransformerLens' names and in its shapes; scores are divided by ``attn_scale``."""
    S, T = model.d_vocab, model.n_positions
    d_model, d_head = model.W_U.shape[0], model.A[-1].shape[-1]

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=model.W_U.dtype, device=model.W_U.device)

    # x_0[i] = W_E[s_i] + W_pos[i]                   = [onehot(s_i), onehot(i), 0]          the parts token and position
    W_E, W_pos = zeros(S, d_model), zeros(T, d_model)
    W_E[:, :S].fill_diagonal_(1)
    W_pos[:, S : S + T].fill_diagonal_(1)
    weights = {"embed.W_E": W_E, "pos_embed.W_pos": W_pos}

    for layer, A in enumerate(model.A):
        n_heads, d_in = A.shape[:2]
        W_Q, W_K, W_V = zeros(3, max(model.heads), d_model, d_head)
        W_O = zeros(max(model.heads), d_head, d_model)
        # The stream that the layer reads is h = x[:d_in]; the coordinates above it are still zero.
        for head in range(n_heads):
            # q_i = x_i W_Q                          = attn_scale h_i A
            # k_j = x_j W_K                          = h_j
            # score(i, j) = q_i k_j^T / attn_scale   = h_i A h_j^T
            W_Q[head, :d_in, :d_in] = attn_scale * A[head].detach()
            W_K[head, :d_in, :d_in].fill_diagonal_(1)
            # v_j = x_j W_V                          = h_j                                   the value is the whole stream
            # x_i += (sum_j pattern(i, j) v_j) W_O   writes it to the next d_in coordinates that are free
            start = (1 + head) * d_in
            W_V[head, :d_in, :d_in].fill_diagonal_(1)
            W_O[head, :d_in, start : start + d_in].fill_diagonal_(1)
        for name, W in {"W_Q": W_Q, "W_K": W_K, "W_V": W_V, "W_O": W_O}.items():
            weights[f"blocks.{layer}.attn.{name}"] = W

    # logits = x_L W_U                               the final stream's coordinates are the concatenation's
    return weights | {"unembed.W_U": model.W_U.detach()}


def _native_bridge(model: Any, shape: dict[str, Any]) -> Any:
    """TransformerLens 4's native model, whose weights are those of ``nn.Linear``: [out, in], the heads side by side."""
    from transformer_lens.model_bridge.sources import boot_native

    attn_scale = 0.5  # 1 is refused; any other power of two is as exact
    with torch.random.fork_rng(devices=[]):  # its layers draw initial weights that nobody asked for
        bridge = boot_native(
            TransformerBridgeConfig(**shape, use_attn_scale=True, attn_scale=attn_scale),
            device=model.W_U.device,
            dtype=model.W_U.dtype,
            model_name=shape["model_name"],
        )
    layouts = {
        "W_E": ("weight", "d_vocab d_model -> d_vocab d_model"),
        "W_pos": ("weight", "n_ctx d_model -> n_ctx d_model"),
        "W_Q": ("q.weight", "head d_model d_head -> (head d_head) d_model"),
        "W_K": ("k.weight", "head d_model d_head -> (head d_head) d_model"),
        "W_V": ("v.weight", "head d_model d_head -> (head d_head) d_model"),
        "W_O": ("o.weight", "head d_head d_model -> d_model (head d_head)"),
        "W_U": ("weight", "d_model d_vocab -> d_vocab d_model"),
    }
    weights = {}
    for name, W in _weights(model, attn_scale=attn_scale).items():
        path, kind = name.rsplit(".", 1)
        linear, layout = layouts[kind]
        weights[f"{path}.{linear}"] = rearrange(W, layout)
    _fill(bridge, weights)
    return bridge


def _fill(standard: Any, weights: dict[str, Tensor]) -> None:
    """Set these weights, and every other parameter (the biases) to zero."""
    for parameter in standard.parameters():
        nn.init.zeros_(parameter)
    unexpected = standard.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        raise CausalProbeError(
            f"This version of TransformerLens names its weights in another way: it has no {', '.join(unexpected)}. "
            "Install transformer-lens 3.9 or 4.3."
        )
