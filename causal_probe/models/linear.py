"""A transformer over continuous tokens: linear or softmax self-attention, hooked with TransformerLens' names.

Definition, for tokens h_1 ... h_T as rows (von Oswald et al. 2022; Zheng et al. 2024)::

    scores_ij = (h_i W_Q) . conj(h_j W_K)                          [/ sqrt(d_head) where the layer is softmax]
    pattern   = scores on the visible keys, 0 elsewhere            a linear layer
              = softmax over the visible keys                      a softmax layer
    h_i      <- h_i + sum_heads sum_j pattern_ij h_j W_V W_O

Visible are all keys but the last token, the query (``mask="context"``), or those up to the query (``mask="causal"``). The
pattern of a linear layer is no distribution: its rows don't sum to one, and probes that take patterns for probabilities refuse
it. Optional: an MLP that turns x into features before the first layer; positions, concatenated to the tokens.
"""

# HookPoint, HookedRootModule.setup and Module._apply carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from einops import einsum
from jaxtyping import Complex, Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.typed_module_list import TypedModuleList

from causal_probe.arguments import Count, checked
from causal_probe.errors import CausalProbeError
from causal_probe.models.device import Device, Dtype
from causal_probe.models.hooked import HookedAttention, HookedBlock, HookedModel

__all__ = ["LinearTransformer", "Mask"]

Mask = Literal["context", "causal"]

WEIGHTS = ("W_Q", "W_K", "W_V", "W_O")

#: The inputs, and the residual stream. Only the mesa-optimizer's are complex.
Tokens = Float[Tensor, "batch pos d_token"] | Complex[Tensor, "batch pos d_token"]
Stream = Float[Tensor, "batch pos d_model"] | Complex[Tensor, "batch pos d_model"]


class Attention(HookedAttention):
    """Heads of linear or softmax self-attention; weights as in TransformerLens, ``x @ W``."""

    def __init__(
        self, shape: tuple[int, int, int], *, softmax: bool, mask: Mask, per_pair: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.softmax, self.mask, self.per_pair = softmax, mask, per_pair
        n_heads, d_model, d_head = shape
        self.W_Q, self.W_K, self.W_V = (
            nn.Parameter(torch.zeros(n_heads, d_model, d_head, dtype=dtype)) for _ in range(3)
        )
        self.W_O = nn.Parameter(torch.zeros(n_heads, d_head, d_model, dtype=dtype))

    def forward(self, x: Stream) -> Stream:
        q, k, v = (einsum(x, W, "batch pos d, head d e -> batch pos head e") for W in (self.W_Q, self.W_K, self.W_V))
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        scores = einsum(q, k.conj(), "batch query head e, batch key head e -> batch head query key")
        pattern = self.hook_pattern(self.weigh(self.hook_attn_scores(self.hide(scores))))
        z = self.hook_z(einsum(pattern, v, "batch head query key, batch key head e -> batch query head e"))
        out: Tensor = einsum(z, self.W_O, "batch pos head e, head e d -> batch pos d")
        return out

    def hide(self, scores: Tensor) -> Tensor:
        """Scores [..., query, key] of all positions, scaled, with invisible keys at -inf (softmax) or 0."""
        n = scores.shape[-1]
        if self.mask == "causal":
            hidden = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
        else:
            hidden = torch.arange(n, device=scores.device) == n - 1
        scale = 1 / math.sqrt(self.W_Q.shape[-1]) if self.softmax else 1.0
        return (scale * scores).masked_fill(hidden, float("-inf") if self.softmax else 0.0)

    def weigh(self, scores: Tensor) -> Tensor:
        """The pattern of hidden scores."""
        if self.softmax:
            return scores.softmax(-1)
        if not self.per_pair:
            return scores.clone()  # a hook's value shares no memory with another's: patching tools write into it
        n = scores.shape[-1]
        pairs = torch.arange(n, device=scores.device) if self.mask == "causal" else torch.full((n,), n - 2)
        return scores / pairs.clamp(min=1).to(scores.real.dtype)[:, None]


class Block(HookedBlock):
    """One layer of attention, added to the stream or (without ``residual``) put in its place."""

    attn: Attention

    def __init__(self, attention: Attention, *, residual: bool) -> None:
        super().__init__(attention)
        self.residual = residual

    def forward(self, x: Stream) -> Stream:
        x = self.hook_resid_pre(x)
        out = self.hook_attn_out(self.attn(x))
        stream: Stream = self.hook_resid_post(x + out if self.residual else out.clone())
        return stream


class Features(nn.Module):
    """An MLP of one hidden GELU layer: x [..., d_x] -> features [..., d_features]."""

    def __init__(self, d_x: int, d_hidden: int, d_features: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.W_in = nn.Parameter(torch.zeros(d_x, d_hidden, dtype=dtype))
        self.b_in = nn.Parameter(torch.zeros(d_hidden, dtype=dtype))
        self.W_out = nn.Parameter(torch.zeros(d_hidden, d_features, dtype=dtype))
        self.b_out = nn.Parameter(torch.zeros(d_features, dtype=dtype))
        self.hook_pre = HookPoint()  # [batch, pos, d_hidden]
        self.hook_post = HookPoint()  # [batch, pos, d_hidden]

    def forward(self, x: Float[Tensor, "*batch d_x"]) -> Float[Tensor, "*batch d_features"]:
        hidden = self.hook_post(torch.nn.functional.gelu(self.hook_pre(x @ self.W_in + self.b_in)))
        features: Tensor = hidden @ self.W_out + self.b_out
        return features


@checked
class LinearTransformer(HookedModel):
    """A transformer over continuous tokens, all weights zero until they are trained, set or :meth:`initialise` d.

    Parameters
    ----------
    d_token
        Width of a token, (x, y).
    n_positions
        Length of the longest sequence.
    n_layers, n_heads, d_head
        Layers, heads in each, and their width (None: that of the stream).
    d_out
        The last ``d_out`` entries of a token are its y, and of the last token's output minus the prediction.
    shared
        All layers have the same weights.
    softmax
        For every layer, or one for each layer: softmax instead of linear attention.
    mask
        ``"context"``: all see all but the last token. ``"causal"``: all see themselves and what came before.
    per_pair
        Divide linear patterns by the number of visible keys less one: of (token, next token) pairs that the query has seen.
    residual
        Add to the stream, or replace it.
    d_positions
        Width of sinusoidal positions, concatenated to the token; 0: none.
    d_hidden, d_features
        Of an MLP that turns x into features before the first layer; 0: none.
    dtype, device
        Of the weights.

    Raises
    ------
    CausalProbeError
        Naming every argument that is out of range.

    Examples
    --------
    >>> import torch
    >>> model = LinearTransformer(d_token=11, n_positions=11).initialise(torch.Generator().manual_seed(0))
    >>> stream, cache = model.run_with_cache(torch.randn(2, 11, 11))
    >>> stream.shape, cache["pattern", 0].shape, model.predict(torch.randn(2, 11, 11)).shape
    (torch.Size([2, 11, 11]), torch.Size([2, 1, 11, 11]), torch.Size([2, 1]))
    """

    def __init__(
        self,
        d_token: int,
        n_positions: int,
        n_layers: int = 1,
        n_heads: int = 1,
        *,
        d_head: Count | None = None,
        d_out: int = 1,
        shared: bool = False,
        softmax: bool | Sequence[bool] = False,
        mask: Mask = "context",
        per_pair: bool = False,
        residual: bool = True,
        d_positions: int = 0,
        d_hidden: int = 0,
        d_features: int = 0,
        dtype: Dtype = torch.float32,
        device: Device = "cpu",
    ) -> None:
        super().__init__()
        kinds = (softmax,) * n_layers if isinstance(softmax, bool) else tuple(softmax)
        counts = {"n_layers": n_layers, "n_heads": n_heads, "d_out": d_out, "n_positions": n_positions - 1}
        problems = [f"{name} must be at least {1 + (name == 'n_positions')}" for name, n in counts.items() if n < 1]
        problems += ["d_token must be above d_out: a token is (x, y)"] * (d_token <= d_out)
        problems += [f"softmax must have {n_layers} entries, one for each layer"] * (len(kinds) != n_layers)
        problems += [f"mask must be context or causal, not {mask!r}"] * (mask not in get_args(Mask))
        problems += ["d_hidden and d_features go together"] * (bool(d_hidden) != bool(d_features))
        problems += ["layers that share weights are all linear or all softmax"] * (shared and len(set(kinds)) > 1)
        problems += ["a complex model has linear layers and no MLP"] * (
            dtype.is_complex and (any(kinds) or d_hidden > 0)
        )
        width = d_token + d_positions + d_features
        if not problems and 4 * n_layers * n_heads * width * max(d_head or 0, width) > 2**34:
            problems.append("it would have more than 2^34 weights")
        if problems:
            raise CausalProbeError("No such linear transformer can be built: " + "; ".join(problems) + ".")
        self.d_token, self.n_positions, self.d_out = d_token, n_positions, d_out
        self.shared, self.residual, self.mask, self.kinds = shared, residual, mask, kinds
        self.d_x = d_features or d_token - d_out  # width of what the attention layers see of x
        d_model = self.d_x + d_out + d_positions
        self.features = Features(d_token - d_out, d_hidden, d_features, dtype=dtype) if d_hidden else None
        self.positions: Tensor
        positions = sinusoids(n_positions, d_positions)
        self.register_buffer("positions", positions if dtype.is_complex else positions.to(dtype), persistent=False)
        self.hook_embed = HookPoint()  # [batch, pos, d_x + d_out]
        if d_positions:
            self.hook_pos_embed = HookPoint()  # [batch, pos, d_positions]
        d_head = d_model if d_head is None else d_head
        shape = (n_heads, d_model, d_head)
        self.blocks = TypedModuleList(
            [
                Block(Attention(shape, softmax=kind, mask=mask, per_pair=per_pair, dtype=dtype), residual=residual)
                for kind in kinds
            ]
        )
        self._share()
        self.make_ready(
            "linear-transformer",
            d_model=d_model,
            d_head=d_head,
            n_layers=n_layers,
            n_heads=n_heads,
            n_positions=n_positions,
            d_vocab=d_token,  # there is no vocabulary
            dtype=dtype,
            device=device,
            use_attn_scale=any(kinds),
        )

    def initialise(self, generator: torch.Generator, *, scale: float = 0.002) -> LinearTransformer:
        """Draw all weights from N(0, scale / (layers x rows of the matrix)), biases zero; return the model.

        That is the authors' initialisation, but for their truncation at two standard deviations. It is small: training starts
        near a saddle. The MLP is drawn at scale 1, so that there are features to learn from.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if ".b_" in name:
                    parameter.zero_()
                    continue
                of = 1.0 if name.startswith("features") else scale / len(self.kinds)
                spread = math.sqrt(of / parameter.shape[-2])
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device=generator.device)
                parameter.copy_(spread * drawn)
        return self

    # ------------------------------------------------------------------------------------------------------------ weights

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"] | Complex[Tensor, "layer head d_model d_head"]:
        """As in TransformerLens."""
        return torch.stack([block.attn.W_Q for block in self.blocks])

    @property
    def W_K(self) -> Float[Tensor, "layer head d_model d_head"] | Complex[Tensor, "layer head d_model d_head"]:
        """As in TransformerLens."""
        return torch.stack([block.attn.W_K for block in self.blocks])

    @property
    def W_V(self) -> Float[Tensor, "layer head d_model d_head"] | Complex[Tensor, "layer head d_model d_head"]:
        """As in TransformerLens."""
        return torch.stack([block.attn.W_V for block in self.blocks])

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"] | Complex[Tensor, "layer head d_head d_model"]:
        """As in TransformerLens."""
        return torch.stack([block.attn.W_O for block in self.blocks])

    # ------------------------------------------------------------------------------------------------------------ forward

    def embed(self, input: Tokens) -> Stream:
        """Tokens as the stream that layer 0 reads: x through the MLP if there is one, y as it is, then positions."""
        self._check(input)
        d_x = self.d_token - self.d_out
        x = torch.cat([self.features(input[..., :d_x]), input[..., d_x:]], -1) if self.features else input.clone()
        x = self.hook_embed(x)
        if self.positions.shape[1]:
            here = self.positions[: input.shape[1]].repeat(len(input), 1, 1)
            x = torch.cat([x, self.hook_pos_embed(here)], -1)
        return x

    def forward(self, input: Tokens, *, stop_at_layer: int | None = None) -> Stream:
        """The stream after the last layer, [batch, pos, d_model].

        Parameters
        ----------
        input
            Tokens [batch, pos, d_token].
        stop_at_layer
            Return the stream that this layer would read (negative: from the end).

        Raises
        ------
        CausalProbeError
            If the tokens don't fit the model.
        """
        x = self.embed(input)
        for block in list(self.blocks)[:stop_at_layer]:
            x = block(x)
        return x

    def read(self, stream: Stream) -> Float[Tensor, "batch d_out"]:
        """The prediction in a stream: minus the y of its last token."""
        return -stream[:, -1, self.d_x : self.d_x + self.d_out]

    def predict(self, tokens: Float[Tensor, "batch pos d_token"]) -> Float[Tensor, "batch d_out"]:
        """The prediction for the last token, ``read(self(tokens))``; several times faster, while no hook is on the model.

        Below the last layer the stream is computed as it is, with the products W_Q W_K' and W_V W_O instead of their factors;
        in the last layer for one query and its y alone.
        """
        if any(point.has_hooks() for point in self.hook_dict.values()):
            return self.read(self(tokens))
        x = self.embed(tokens)
        y = slice(self.d_x, self.d_x + self.d_out)
        *below, last = [block.attn for block in self.blocks]
        for attention in below:
            QK, OV = attention.W_Q @ attention.W_K.mH, attention.W_V @ attention.W_O
            out = torch.zeros((), dtype=x.dtype, device=x.device)
            for head in range(len(QK)):
                pattern = attention.weigh(attention.hide((x @ QK[head]) @ x.mH))
                out = out + (pattern @ x) @ OV[head]
            x = x + out if self.residual else out
        QK, OV = last.W_Q @ last.W_K.mH, last.W_V @ last.W_O[..., y]
        seen = x[:, :-1] if self.mask == "context" else x
        answer = x[:, -1, y] if self.residual else torch.zeros((), dtype=x.dtype, device=x.device)
        for head in range(len(QK)):
            pattern = torch.bmm(seen, (x[:, -1] @ QK[head])[..., None].conj())[..., 0].conj()  # [batch, key]
            if last.softmax:
                pattern = (pattern / math.sqrt(last.W_Q.shape[-1])).softmax(-1)
            elif last.per_pair:
                pattern = pattern / max(1, seen.shape[1] - 1)
            answer = answer + torch.bmm(pattern[:, None], seen)[:, 0] @ OV[head]
        return -answer

    # --------------------------------------------------------------------------------------------------------- bookkeeping

    def _check(self, input: Tensor) -> None:
        if input.ndim != 3 or input.shape[-1] != self.d_token or not 2 <= input.shape[1] <= self.n_positions:
            raise CausalProbeError(
                f"The model reads tokens [batch, pos, {self.d_token}] of 2 to {self.n_positions} positions; these are "
                f"{list(input.shape)}. Build a model of the task's shape (d_token, n_positions)."
            )
        if input.dtype != self.cfg.dtype:
            raise CausalProbeError(
                f"The tokens are {input.dtype} and the model {self.cfg.dtype}; sample with dtype=model.cfg.dtype."
            )

    def extra_repr(self) -> str:
        """The shape, for ``print(model)``."""
        return f"d_token={self.d_token}, layers={len(self.kinds)}, softmax={list(self.kinds)}, shared={self.shared}"

    def _apply(self, fn: Any, recurse: bool = True) -> LinearTransformer:
        super()._apply(fn, recurse)
        self._share()  # moving a module makes new parameters of shared ones on some paths
        return self

    def _share(self) -> None:
        """Layers that share weights: the parameters are one, the hook points are not."""
        for block in self.blocks[1:] if self.shared else ():
            for name in WEIGHTS:
                setattr(block.attn, name, getattr(self.blocks[0].attn, name))


def sinusoids(n_positions: int, width: int) -> Float[Tensor, "n_positions width"]:
    """Sinusoidal positions: entries 2i and 2i + 1 are the sine and the cosine of position / 10000^(2i / width)."""
    if width % 2:
        raise CausalProbeError(f"Sinusoidal positions come in pairs; their width is {width}.")
    angle = torch.arange(n_positions)[:, None] / 10_000 ** (torch.arange(0, width, 2) / max(width, 1))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
