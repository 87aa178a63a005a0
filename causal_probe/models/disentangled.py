"""The disentangled transformer: a transformer whose residual stream is a concatenation, so that every weight has one meaning.

Definition (Nichani, Damian & Lee 2024, section 2; checked against the authors' code), for T tokens over S states::

    h_0[i]    = [onehot(s_i), onehot(i)]                                     width S + T
    attn(h;A) = softmax(mask(h A h^T)) h                                     causal mask, no scale, value = whole stream
    h_l       = [h_(l-1), attn(h_(l-1); A_l1), ..., attn(h_(l-1); A_lH)]     width (1 + H_l) * previous width
    logits    = h_L W

The query-key product of a head is one matrix A; what it does between two named parts of the stream is one *block* of A. The
block (position, position) of layer 0 is where a causal graph is written.

It is a ``HookedRootModule`` with TransformerLens' hook names, so TransformerLens' tools and ours take it as it is.
"""

# HookPoint, HookedRootModule.setup and Module._apply carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.typed_module_list import TypedModuleList

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.models.device import Device, Dtype
from causal_probe.models.export import to_transformer_lens
from causal_probe.models.fast import last_logits, last_logits_by_rows
from causal_probe.models.hooked import HookedAttention, HookedBlock, HookedModel
from causal_probe.models.subspaces import stream_widths, subspaces

__all__ = ["DisentangledTransformer"]

#: 64 GiB in float32. The stream widens (1 + heads)-fold with every layer, so a few layers too many are soon beyond any memory.
MAX_WEIGHTS = 2**34

#: How many numbers the last layer's patterns hold at once in :meth:`DisentangledTransformer.predict_by_rows`.
MAX_PATTERN_ENTRIES = 2**22


class SoftmaxAttention(HookedAttention):
    """Heads of softmax attention over the past, without a scale."""

    def attend(
        self,
        q: Float[Tensor, "batch pos head d_key"],
        k: Float[Tensor, "batch pos head d_key"],
        v: Float[Tensor, "batch pos head d_value"],
    ) -> Float[Tensor, "batch pos head d_value"]:
        """The output of each head, through all hooks."""
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        scores = einsum(q, k, "batch query head e, batch key head e -> batch head query key")
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        pattern = self.hook_pattern(self.hook_attn_scores(scores.masked_fill(future, float("-inf"))).softmax(-1))
        z: Tensor = self.hook_z(einsum(pattern, v, "batch head query key, batch key head e -> batch query head e"))
        return z


class Attention(SoftmaxAttention):
    """Heads whose query-key product is one free matrix and whose value is the whole residual stream."""

    def __init__(self, d_in: int, n_heads: int) -> None:
        super().__init__()
        #: [head, query part, key part]: the score of (query i, key j) is h_i A h_j
        self.A = nn.Parameter(torch.zeros(n_heads, d_in, d_in))

    def forward(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_out"]:
        q = einsum(x, self.A, "batch pos d, head d e -> batch pos head e")
        k, v = (repeat(x, "batch pos d -> batch pos head d", head=len(self.A)).clone() for _ in range(2))
        out: Tensor = rearrange(self.attend(q, k, v), "batch pos head d -> batch pos (head d)")
        return out.clone()


class Block(HookedBlock):
    """One layer: what the heads copied is appended to the stream."""

    attn: Attention

    def forward(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_out"]:
        x = self.hook_resid_pre(x)
        stream: Tensor = self.hook_resid_post(torch.cat([x, self.hook_attn_out(self.attn(x))], dim=-1))
        return stream


class StatesModel(HookedModel):
    """A model of few states, whose embeddings are one-hot: of the state, and of the position."""

    def __init__(self, d_vocab: int, n_positions: int) -> None:
        super().__init__()
        self.d_vocab = d_vocab
        self.n_positions = n_positions
        self.hook_embed = HookPoint()  # [batch, pos, d_vocab]
        self.hook_pos_embed = HookPoint()  # [batch, pos, n_positions]

    def _embed(self, tokens: Int[Tensor, "batch pos"]) -> tuple[Tensor, Tensor]:
        """States and positions, one-hot, through their hooks: [batch, pos, d_vocab] and [batch, pos, n_positions]."""
        dtype = next(self.parameters()).dtype
        eye = torch.eye(self.n_positions, dtype=dtype, device=tokens.device)
        token = self.hook_embed(one_hot(tokens, self.d_vocab).to(dtype))
        return token, self.hook_pos_embed(eye[: tokens.shape[1]].repeat(len(tokens), 1, 1))

    def _check_next(self, tokens: Int[Tensor, "batch pos"]) -> None:
        if len(tokens) == 0 or tokens.shape[1] == 1:
            raise CausalProbeError(
                f"The loss of the next token needs a sequence of two tokens or more; the shape is {list(tokens.shape)}."
            )

    def to_tokens(
        self, input: Tensor | str | Sequence[str], prepend_bos: bool | None = None
    ) -> Int[Tensor, "batch pos"]:
        """States as a checked tensor ``[batch, pos]`` on the model's device.

        Parameters
        ----------
        input
            States ``[batch, pos]`` or ``[pos]``, of any integer dtype; or text: states as numbers between blanks, one string
            per sequence.
        prepend_bos
            There is no beginning-of-sequence token: False and None are the same, True is an error.

        Raises
        ------
        CausalProbeError
            If a state is not a whole number in 0..d_vocab-1, there are none, there are more than ``n_positions``, or
            texts differ in length.
        """
        if prepend_bos:
            raise CausalProbeError(
                "A disentangled transformer has no beginning-of-sequence token; leave prepend_bos out."
            )
        if not isinstance(input, Tensor):
            input = _parse([input] if isinstance(input, str) else list(input))
        if input.is_floating_point() or input.is_complex() or input.dtype == torch.bool:
            raise CausalProbeError(f"Tokens must be whole numbers; the tensor's dtype is {input.dtype}.")
        tokens = (input[None] if input.ndim == 1 else input).long()
        if tokens.ndim != 2:
            raise CausalProbeError(f"Tokens must have the shape [batch, pos]; theirs is {list(input.shape)}.")
        if not 1 <= tokens.shape[1] <= self.n_positions:
            raise CausalProbeError(
                f"A sequence must hold 1 to {self.n_positions} tokens, the model's n_positions; these hold {tokens.shape[1]}."
            )
        if tokens.numel():
            low, high = (int(bound) for bound in torch.aminmax(tokens))
            if low < 0 or high >= self.d_vocab:
                raise CausalProbeError(
                    f"Token {low if low < 0 else high} is outside the vocabulary; states are 0 to {self.d_vocab - 1}."
                )
        return tokens.to(next(self.parameters()).device)


@checked
class DisentangledTransformer(StatesModel):
    """The disentangled transformer, all weights zero until they are trained or set.

    Parameters
    ----------
    d_vocab
        Number of states S, >= 2.
    n_positions
        Length T of the longest sequence, >= 2; shorter ones are fine.
    heads
        Heads per layer, from the first layer to the last; each >= 1.
    dtype, device
        Of the weights.

    Raises
    ------
    CausalProbeError
        If an argument is out of range.

    Examples
    --------
    >>> import torch
    >>> model = DisentangledTransformer(d_vocab=3, n_positions=5, heads=[1, 1])
    >>> logits, cache = model.run_with_cache(torch.tensor([[0, 2, 1, 1, 0]]))
    >>> logits.shape, cache["pattern", 0].shape
    (torch.Size([1, 5, 3]), torch.Size([1, 1, 5, 5]))
    >>> model.block(layer=0, head=0, query="position", key="position").shape
    torch.Size([5, 5])
    """

    def __init__(
        self,
        d_vocab: int,
        n_positions: int,
        heads: Sequence[int] = (1, 1),
        *,
        dtype: Dtype = torch.float32,
        device: Device = "cpu",
    ) -> None:
        check_shape(d_vocab, n_positions, heads)
        super().__init__(d_vocab, n_positions)
        self.heads: tuple[int, ...] = tuple(heads)
        widths = stream_widths(d_vocab, n_positions, heads)
        layers = zip(widths[:-1], heads, strict=True)
        self.blocks = TypedModuleList([Block(Attention(width, n_heads)) for width, n_heads in layers])
        self.W_U = nn.Parameter(torch.zeros(widths[-1], d_vocab))
        self.make_ready(
            "disentangled-transformer",
            d_model=widths[-1],
            d_head=widths[-2],
            n_layers=len(heads),
            n_heads=max(heads),  # of the layers'
            n_positions=n_positions,
            d_vocab=d_vocab,
            dtype=dtype,
            device=device,
        )

    # ------------------------------------------------------------------------------------------------------------ weights

    @property
    def A(self) -> list[Float[Tensor, "_head _d_query _d_key"]]:
        """The heads' query-key matrices, layer by layer."""
        return [block.attn.A for block in self.blocks]

    def subspaces(self, layer: int) -> dict[str, slice]:
        """The named parts of the stream that layer ``layer`` reads (``len(heads)``: that W_U reads), as slices."""
        return subspaces(self.d_vocab, self.n_positions, self.heads[:layer])

    def block(self, layer: int, head: int, *, query: str, key: str) -> Float[Tensor, "d_query d_key"]:
        """The block of a head's A that joins two named parts, as a view: writing into it changes the model.

        Raises
        ------
        CausalProbeError
            If there is no such layer, head or part.
        """
        if not 0 <= layer < len(self.heads) or not 0 <= head < self.heads[layer]:
            raise CausalProbeError(f"There is no head L{layer}H{head}; the heads per layer are {list(self.heads)}.")
        parts = self.subspaces(layer)
        for part in (query, key):
            if part not in parts:
                raise CausalProbeError(f"Layer {layer} reads no part {part!r}; its parts are {', '.join(parts)}.")
        return self.A[layer].data[head, parts[query], parts[key]]

    def named_blocks(self) -> dict[tuple[int, int, str, str], Float[Tensor, "_d_query _d_key"]]:
        """Every block of every A by (layer, head, query part, key part), as views."""
        return {
            (layer, head, query, key): self.block(layer, head, query=query, key=key)
            for layer, n_heads in enumerate(self.heads)
            for head in range(n_heads)
            for query in self.subspaces(layer)
            for key in self.subspaces(layer)
        }

    def output_block(self, part: str) -> Float[Tensor, "d_part d_vocab"]:
        """The rows of W_U that read one named part of the final stream, as a view.

        Raises
        ------
        CausalProbeError
            If there is no such part.
        """
        parts = self.subspaces(len(self.heads))
        if part not in parts:
            raise CausalProbeError(f"The final stream has no part {part!r}; its parts are {', '.join(parts)}.")
        return self.W_U.data[parts[part]]

    # ------------------------------------------------------------------------------------------------------------- running

    def forward(
        self,
        input: Tensor | str | Sequence[str],
        return_type: str | None = "logits",
        *,
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
    ) -> Any:
        """Run the model through every hook.

        Parameters
        ----------
        input
            States ``[batch, pos]`` or ``[pos]``, of any integer dtype; or text for :meth:`to_tokens`.
        return_type
            ``"logits"`` [batch, pos, d_vocab]; ``"loss"``, the mean cross-entropy of the next token; ``"both"``; or None.
        loss_per_token
            The loss at every position but the last, [batch, pos - 1], instead of its mean.
        stop_at_layer
            Return the stream that this layer would read (negative: from the end) instead of the logits.

        Raises
        ------
        CausalProbeError
            If a token is outside the vocabulary, a sequence is too long, ``return_type`` is unknown, or a loss is asked for
            and there is no next token.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise CausalProbeError(f"return_type must be 'logits', 'loss', 'both' or None, not {return_type!r}.")
        tokens = self.to_tokens(input)
        batch, n = tokens.shape
        x = torch.cat(self._embed(tokens), dim=-1)
        for block in list(self.blocks)[:stop_at_layer]:
            x = block(x)
        if stop_at_layer is not None:
            return x
        logits = x @ self.W_U
        if return_type in (None, "logits"):
            return None if return_type is None else logits
        self._check_next(tokens)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(batch, n - 1)
        loss = loss if loss_per_token else loss.mean()
        return loss if return_type == "loss" else (logits, loss)

    def predict(self, tokens: Tensor | str | Sequence[str]) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the last position, the same as ``self(tokens)[:, -1]`` and many times faster.

        Hooks are honoured: those on the scores and patterns below the last layer at full speed, any other by the hooked
        forward.

        Parameters
        ----------
        tokens
            As in :meth:`forward`.
        """
        tokens = self.to_tokens(tokens)
        hooked = self._hooked()
        if hooked - self._edited_below():
            logits: Tensor = self(tokens)
            return logits[:, -1]
        return last_logits(tokens, self.A, self.W_U, **self._as_hooked(hooked))

    def predict_by_rows(
        self,
        tokens: Tensor | str | Sequence[str],
        *,
        head: int,
        queries: Int[Tensor, " _query"],
        rows: Float[Tensor, "row key"],
    ) -> Float[Tensor, "row batch d_vocab"]:
        """Logits at the last position if layer 0 attended otherwise, for many rows of its attention at a fraction of a run each.

        The same as :meth:`predict` under :func:`causal_probe.hooks.replace_row`, one row after the other, without gradients. In a model of two
        layers the row of an earlier query changes one key of the last layer, and all else is computed once. Any other model, the last position,
        and hooks that :meth:`predict` does not run at full speed take one run for each row.

        Parameters
        ----------
        tokens
            As in :meth:`forward`.
        head
            Which head of layer 0.
        queries, rows
            At which position, and its attention there on keys 0, 1, ...: a distribution; later keys get none.

        Raises
        ------
        CausalProbeError
            If there is no such head or position, the shapes don't fit each other, or a row is no distribution.

        Examples
        --------
        >>> model, tokens = DisentangledTransformer(d_vocab=3, n_positions=4), torch.tensor([[0, 1, 2, 0]])
        >>> rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> model.predict_by_rows(tokens, head=0, queries=torch.tensor([2, 2]), rows=rows).shape
        torch.Size([2, 1, 3])
        """
        tokens = self.to_tokens(tokens)
        n = tokens.shape[1]
        if not 0 <= head < self.heads[0]:
            raise CausalProbeError(f"Layer 0 has {self.heads[0]} heads, counted from 0; there is no head {head}.")
        if (
            rows.ndim != 2
            or rows.shape[1] > n
            or queries.shape != rows.shape[:1]
            or queries.is_floating_point()
            or ((queries < 0) | (queries >= n)).any()
        ):
            raise CausalProbeError(
                f"Rows must be [row, key] with at most {n} keys, and queries [row] whole numbers below {n}; they are {list(rows.shape)} and "
                f"{str(queries.dtype).removeprefix('torch.')} {list(queries.shape)}{f', up to {int(queries.max())}' if queries.numel() else ''}."
            )
        if (rows < 0).any() or not torch.allclose(
            rows.double().sum(1), torch.ones(len(rows), dtype=torch.float64, device=rows.device), atol=1e-5
        ):
            raise CausalProbeError("Each row must be a distribution over keys: not negative, with the sum one.")
        queries, rows = queries.to(self.W_U.device), pad(rows.to(self.W_U), (0, n - rows.shape[1]))
        hooked = self._hooked()
        with torch.no_grad():
            if len(self.heads) == 2 and not hooked - self._edited_below() and not (queries == n - 1).any():
                at_once = max(1, MAX_PATTERN_ENTRIES // max(1, tokens.numel()))
                arguments = self._as_hooked(hooked)
                found = [
                    last_logits_by_rows(tokens, self.A, self.W_U, head=head, queries=q, rows=r, **arguments)
                    for q, r in zip(queries.split(at_once), rows.split(at_once), strict=True)
                ]
                return torch.cat(found)
            return torch.stack(
                [self._with_row(tokens, head, q, r) for q, r in zip(queries.tolist(), rows, strict=True)]
            )

    def _with_row(self, tokens: Tensor, head: int, query: int, row: Tensor) -> Float[Tensor, "batch d_vocab"]:
        def edit(pattern: Tensor, hook: Any) -> Tensor:
            pattern = pattern.clone()
            pattern[:, head, query] = row
            return pattern

        with self.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", edit)]):
            return self.predict(tokens)

    def _hooked(self) -> set[str]:
        return {name for name, point in self.hook_dict.items() if point.has_hooks()}

    def _edited_below(self, *names: str) -> set[str]:
        """The hook points below the last layer that :meth:`predict` honours at full speed."""
        names = names or ("attn_scores", "pattern")
        return {f"blocks.{layer}.attn.hook_{name}" for layer in range(len(self.heads) - 1) for name in names}

    def _as_hooked(self, hooked: set[str]) -> dict[str, Any]:
        """How the fast path runs these weights under the hooks that are there."""
        token = self.subspaces(0)["token"]
        A_0 = self.A[0]
        patterns = hooked & self._edited_below("pattern")
        return {
            # Without gradients, token blocks that are all zero can be left out.
            "position_only": not torch.is_grad_enabled() and not bool(A_0[:, token].any() or A_0[:, :, token].any()),
            "edit_scores": self._hook_scores if hooked & self._edited_below("attn_scores") else None,
            "edit_pattern": self._hook_pattern if patterns else None,
            "edits_keep": all(_keep_their_input(self.hook_dict[name]) for name in patterns),
        }

    def _hook_scores(self, layer: int, scores: Tensor) -> Any:
        return self.hook_dict[f"blocks.{layer}.attn.hook_attn_scores"](scores)

    def _hook_pattern(self, layer: int, pattern: Tensor) -> Any:
        return self.hook_dict[f"blocks.{layer}.attn.hook_pattern"](pattern)

    def to_transformer_lens(self) -> Any:
        """The same function as a standard TransformerLens model: see :func:`causal_probe.models.export.to_transformer_lens`."""
        return to_transformer_lens(self)

    # -------------------------------------------------------------------------------------------------------------- tokens

    def to_str_tokens(
        self, input: Tensor | str | Sequence[str], prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """States as text: one list for one sequence, a list of lists for several."""
        texts = [[str(state) for state in row] for row in self.to_tokens(input, prepend_bos).tolist()]
        return texts[0] if len(texts) == 1 else texts

    # --------------------------------------------------------------------------------------------------------- bookkeeping

    def extra_repr(self) -> str:
        """The shape, for ``print(model)``."""
        return f"d_vocab={self.d_vocab}, n_positions={self.n_positions}, heads={list(self.heads)}"


def count_weights(d_vocab: int, n_positions: int, heads: Sequence[int]) -> int:
    """How many weights a disentangled transformer has.

    >>> count_weights(3, 5, (1, 1))  # 8^2 and 16^2 of the heads, 32 x 3 of the output
    416
    """
    *widths, d_last = stream_widths(d_vocab, n_positions, heads)
    return sum(n * d**2 for n, d in zip(heads, widths, strict=True)) + d_last * d_vocab


def check_shape(d_vocab: int, n_positions: int, heads: Sequence[int]) -> None:
    """Raise unless a disentangled transformer of this shape can be built."""
    sizes = {"d_vocab": d_vocab, "n_positions": n_positions}
    problems = [f"{name} must be at least 2, not {size}" for name, size in sizes.items() if size < 2]
    if not heads or any(n < 1 for n in heads):
        problems.append(f"heads must name at least one layer, and at least one head in each; it is {list(heads)}")
    if not problems and count_weights(d_vocab, n_positions, heads) > MAX_WEIGHTS:
        problems.append(
            "it would have more than 2^34 weights: every layer widens the stream (1 + heads)-fold; take fewer layers, "
            "heads, positions or states"
        )
    if problems:
        raise CausalProbeError("No such disentangled transformer can be built: " + "; ".join(problems) + ".")


def _parse(texts: list[str]) -> Tensor:
    try:
        rows = [[int(word) for word in text.split()] for text in texts]
    except (AttributeError, ValueError) as error:
        raise CausalProbeError(
            f"A disentangled transformer reads states, written as whole numbers between blanks; got {texts!r:.80}."
        ) from error
    if len({len(row) for row in rows}) != 1:
        raise CausalProbeError(
            f"Sequences of one batch must be of one length; theirs are {[len(row) for row in rows]}."
        )
    return torch.tensor(rows, dtype=torch.long)


def _keep_their_input(point: Any) -> bool:
    """Whether every hook on this point is an edit of :func:`causal_probe.hooks.edited` that never writes to what it is given."""
    return len(point.fwd_hooks) == getattr(point, "edits_that_keep_their_input", 0)
