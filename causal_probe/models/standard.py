"""A transformer with a standard residual stream whose weights are set by hand: heads, MLPs, RMSNorm or none, TransformerLens' names.

Definition, for the stream x [pos, d_model], heads h of layer l, and norm(x) = x / sqrt(mean(x^2) + eps) * gain (the identity without norms)::

    x_i       = W_E[s_i] + W_pos[i]
    q, k, v   = norm(x) W_Q + b_Q, norm(x) W_K + b_K, norm(x) W_V + b_V      of each head
    pattern   = softmax of q_i . k_j over j <= i                             no scale: it is part of W_Q
    x        += sum_heads (pattern v) W_O + b_O
    x        += relu(norm(x) W_in + b_in) W_out + b_out                      where the model has MLPs
    logits    = norm(x) W_U + b_U

The parameters have the names and shapes of TransformerLens 3's ``HookedTransformer`` without a scale of attention, so a state dict goes
over as it is. Queries, keys and values of a head, and the MLP, have hook points on the stream that they alone read
(``hook_q_input``, ``hook_k_input``, ``hook_v_input``, ``hook_mlp_in``), before the norm.
"""

# HookPoint, HookedRootModule.setup and Module._apply carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.typed_module_list import TypedModuleList

from causal_probe.errors import CausalProbeError
from causal_probe.models.device import Device
from causal_probe.models.hooked import HookedAttention, HookedModel

__all__ = ["StandardTransformer"]

#: What is added to the mean square of a stream, as in TransformerLens.
EPS = 1e-5


class RMSNorm(nn.Module):
    """Every vector over its root mean square, times a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(width))
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]

    def forward(self, x: Float[Tensor, "*any d_model"], *, hooked: bool = True) -> Float[Tensor, "*any d_model"]:
        scale = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        scale = self.hook_scale(scale) if hooked else scale
        normed: Tensor = self.hook_normalized(x / scale) if hooked else x / scale
        return normed * self.w


class Attention(HookedAttention):
    """Causal softmax attention without a scale."""

    def __init__(self, n_heads: int, d_model: int, d_head: int) -> None:
        super().__init__()
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.zeros(n_heads, d_model, d_head)) for _ in range(3))
        self.W_O = nn.Parameter(torch.zeros(n_heads, d_head, d_model))
        self.b_Q, self.b_K, self.b_V = (nn.Parameter(torch.zeros(n_heads, d_head)) for _ in range(3))
        self.b_O = nn.Parameter(torch.zeros(d_model))

    def forward(self, inputs: Sequence[Tensor]) -> Float[Tensor, "batch pos d_model"]:
        """What the heads write; the inputs are the normed streams of queries, keys and values, with or without an axis of heads."""
        q, k, v = (
            hook(
                einsum(x, W, "batch pos d, head d e -> batch pos head e" if x.ndim == 3 else "batch pos head d, head d e -> batch pos head e")
                + b
            )
            for x, W, b, hook in zip(
                inputs,
                (self.W_Q, self.W_K, self.W_V),
                (self.b_Q, self.b_K, self.b_V),
                (self.hook_q, self.hook_k, self.hook_v),
                strict=True,
            )
        )  # fmt: skip
        scores = einsum(q, k, "batch query head e, batch key head e -> batch head query key")
        n = scores.shape[-1]
        future = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
        scores = self.hook_attn_scores(scores.masked_fill(future, float("-inf")))
        pattern = self.hook_pattern(scores.softmax(-1))
        z = self.hook_z(einsum(pattern, v, "batch head query key, batch key head e -> batch query head e"))
        out: Tensor = einsum(z, self.W_O, "batch pos head e, head e d -> batch pos d") + self.b_O
        return out


class MLP(nn.Module):
    """One hidden ReLU layer."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.zeros(d_model, d_mlp))
        self.b_in = nn.Parameter(torch.zeros(d_mlp))
        self.W_out = nn.Parameter(torch.zeros(d_mlp, d_model))
        self.b_out = nn.Parameter(torch.zeros(d_model))
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        hidden = self.hook_post(self.hook_pre(x @ self.W_in + self.b_in).relu())
        out: Tensor = hidden @ self.W_out + self.b_out
        return out


class Block(nn.Module):
    """One layer: its attention, and its MLP if there is one."""

    def __init__(self, n_heads: int, d_model: int, d_head: int, d_mlp: int | None, *, norm: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attn = Attention(n_heads, d_model, d_head)
        self.ln1 = RMSNorm(d_model) if norm else None
        self.mlp = None if d_mlp is None else MLP(d_model, d_mlp)
        self.ln2 = RMSNorm(d_model) if norm and d_mlp is not None else None
        self.hook_resid_pre = HookPoint()  # [batch, pos, d_model]
        self.hook_q_input, self.hook_k_input, self.hook_v_input = (
            HookPoint(),
            HookPoint(),
            HookPoint(),
        )  # [batch, pos, head, d_model]
        self.hook_attn_out = HookPoint()  # [batch, pos, d_model]
        self.hook_resid_post = HookPoint()  # [batch, pos, d_model]
        if d_mlp is not None:
            self.hook_resid_mid, self.hook_mlp_in, self.hook_mlp_out = HookPoint(), HookPoint(), HookPoint()  # [batch, pos, d_model]  # fmt: skip

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        x = self.hook_resid_pre(x)
        normed = x if self.ln1 is None else self.ln1(x)
        out = self.hook_attn_out(self.attn([self._read(x, normed, hook) for hook in (self.hook_q_input, self.hook_k_input, self.hook_v_input)]))  # fmt: skip
        x = x + out
        if self.mlp is not None:
            x = self.hook_resid_mid(x)
            read = self.hook_mlp_in(x.clone())
            x = x + self.hook_mlp_out(self.mlp(read if self.ln2 is None else self.ln2(read)))
        stream: Tensor = self.hook_resid_post(x)
        return stream

    def _read(self, x: Tensor, normed: Tensor, hook: HookPoint) -> Tensor:
        """The normed stream that one side of the heads reads: one for each head only where a hook may change it."""
        if not hook.has_hooks():
            return normed
        each: Tensor = hook(x[:, :, None].expand(-1, -1, self.n_heads, -1).clone())
        return each if self.ln1 is None else self.ln1(each, hooked=False)


class Embed(nn.Module):
    """The tokens' embedding."""

    def __init__(self, d_vocab: int, d_model: int) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.zeros(d_vocab, d_model))


class PosEmbed(nn.Module):
    """The positions' embedding."""

    def __init__(self, n_positions: int, d_model: int) -> None:
        super().__init__()
        self.W_pos = nn.Parameter(torch.zeros(n_positions, d_model))


class Unembed(nn.Module):
    """From the stream to the logits."""

    def __init__(self, d_model: int, d_out: int) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.zeros(d_model, d_out))
        self.b_U = nn.Parameter(torch.zeros(d_out))


class StandardTransformer(HookedModel):
    """A standard transformer, all weights zero (norms' gains one) until they are set.

    Parameters
    ----------
    d_vocab, n_positions
        Number of tokens, and length of the longest sequence.
    d_model, n_layers, n_heads, d_head
        Width of the stream; layers; heads in each; width of a head.
    d_mlp
        Hidden width of the MLPs; None for no MLPs.
    norm
        Whether RMSNorm stands before attention, MLP and unembedding.
    d_out
        Number of logits; None: ``d_vocab``.
    dtype, device
        Of the weights.

    Raises
    ------
    CausalProbeError
        If a size is not positive.

    Examples
    --------
    >>> model = StandardTransformer(d_vocab=3, n_positions=5, d_model=8, n_layers=2, n_heads=2, d_head=4, d_mlp=6)
    >>> model(torch.tensor([[0, 2, 1]])).shape
    torch.Size([1, 3, 3])
    """

    def __init__(
        self,
        d_vocab: int,
        n_positions: int,
        *,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_head: int,
        d_mlp: int | None = None,
        norm: bool = False,
        d_out: int | None = None,
        name: str = "standard-transformer",
        dtype: torch.dtype = torch.float32,
        device: Device = "cpu",
    ) -> None:
        super().__init__()
        sizes = {
            "d_vocab": d_vocab, "n_positions": n_positions, "d_model": d_model, "n_layers": n_layers, "n_heads": n_heads,
            "d_head": d_head, "d_mlp": 1 if d_mlp is None else d_mlp, "d_out": d_vocab if d_out is None else d_out,
        }  # fmt: skip
        if wrong := [f"{key} = {value}" for key, value in sizes.items() if value < 1]:
            raise CausalProbeError(f"Sizes are whole numbers from 1 on; found {', '.join(wrong)}.")
        self.embed, self.pos_embed = Embed(d_vocab, d_model), PosEmbed(n_positions, d_model)
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()  # [batch, pos, d_model]
        self.blocks = TypedModuleList([Block(n_heads, d_model, d_head, d_mlp, norm=norm) for _ in range(n_layers)])
        self.ln_final = RMSNorm(d_model) if norm else None
        self.unembed = Unembed(d_model, sizes["d_out"])
        self.make_ready(
            name,
            d_model=d_model,
            d_head=d_head,
            n_layers=n_layers,
            n_heads=n_heads,
            n_positions=n_positions,
            d_vocab=d_vocab,
            dtype=dtype,
            device=device,
        )
        self.cfg.attn_only, self.cfg.normalization_type = d_mlp is None, "RMS" if norm else None
        self.cfg.d_mlp, self.cfg.act_fn, self.cfg.d_vocab_out = d_mlp, "relu", sizes["d_out"]

    def to_tokens(self, input: Any) -> Int[Tensor, "batch pos"]:
        """Tokens ``[batch, pos]``, of a tensor or nested lists of numbers; one sequence is a batch of one.

        Raises
        ------
        CausalProbeError
            If they are no tokens of this model, or too long.
        """
        tokens = torch.as_tensor(input, device=self.W_E.device)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or tokens.dtype.is_floating_point or not 0 < tokens.shape[1] <= len(self.W_pos):
            raise CausalProbeError(
                f"Tokens are whole numbers [batch, pos] of at most {len(self.W_pos)} positions; found {tokens.dtype} {list(tokens.shape)}."
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(self.W_E):
            raise CausalProbeError(
                f"Tokens are 0 to {len(self.W_E) - 1}; found {int(tokens.min())} to {int(tokens.max())}."
            )
        return tokens.long()

    def forward(self, input: Any, return_type: str | None = "logits", stop_at_layer: int | None = None) -> Any:
        """The logits at every position [batch, pos, d_out], through every hook.

        Parameters
        ----------
        input
            Tokens ``[batch, pos]`` or ``[pos]``.
        return_type
            ``"logits"``, or None for nothing.
        stop_at_layer
            The stream before that layer instead, as in TransformerLens.

        Raises
        ------
        CausalProbeError
            For other tokens, and another ``return_type``.
        """
        if return_type not in ("logits", None):
            raise CausalProbeError(f"return_type must be 'logits' or None, not {return_type!r}.")
        tokens = self.to_tokens(input)
        positions = self.W_pos[: tokens.shape[1]].expand(len(tokens), -1, -1)
        x = self.hook_embed(self.W_E[tokens]) + self.hook_pos_embed(positions.clone())
        for block in self.blocks[:stop_at_layer]:
            x = block(x)
        if stop_at_layer is not None:
            return x
        x = x if self.ln_final is None else self.ln_final(x)
        logits: Tensor = x @ self.W_U + self.unembed.b_U
        return logits if return_type == "logits" else None

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding of tokens."""
        return self.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "n_positions d_model"]:
        """The embedding of positions."""
        return self.pos_embed.W_pos

    @property
    def W_U(self) -> Float[Tensor, "d_model d_out"]:
        """The unembedding."""
        return self.unembed.W_U

    def _stack(self, name: str) -> Tensor:
        return torch.stack([getattr(block.attn, name) for block in self.blocks])

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Queries' weights."""
        return self._stack("W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Keys' weights."""
        return self._stack("W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Values' weights."""
        return self._stack("W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """What takes a head's output to the stream."""
        return self._stack("W_O")
