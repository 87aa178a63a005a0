"""The disentangled transformer's last-position logits without wasted work: what training runs, thousands of times.

It computes what the hooked forward computes at the last position, by three observations:

1. **Embeddings are one-hot**, so layer 0's scores are entries of A picked by token and position; nothing is multiplied by the
   one-hots of positions.
2. **Every part of the stream is a pattern product.** The part ``L1H0.L0H0.token`` is P_1 P_0 X, with X the one-hot tokens, and
   ``L1H0.L0H0.position`` is P_1 P_0 itself. So the stream is kept as a list of products M (None: the identity), each of which
   stands for the two parts M X and M, and no wide stream is ever built for a two-layer model.
3. **Only the last position is read**, so the last layer needs one query: with u = h_last A,
   score(j) = sum over M of (M (u_M.token[s] + u_M.position))_j, a few matrix-vector products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["last_logits"]

#: An edit of the scores or the pattern of a layer below the last: (layer, [batch, head, query, key]) -> the same shape.
Edit = Callable[[int, Tensor], Tensor]


def last_logits(
    tokens: Int[Tensor, "batch pos"],
    A: Sequence[Float[Tensor, "_head _d_query _d_key"]],
    W_U: Float[Tensor, "d_last d_vocab"],
    *,
    position_only: bool = False,
    edit_scores: Edit | None = None,
    edit_pattern: Edit | None = None,
    edits_keep: bool = False,
) -> Float[Tensor, "batch d_vocab"]:
    """Logits at the last position.

    Parameters
    ----------
    tokens
        States in 0..d_vocab-1; not checked here.
    A, W_U
        The weights of a :class:`~causal_probe.models.DisentangledTransformer`, from the first layer to the last.
    position_only
        Use layer 0's (position, position) block alone and take its others as zero: its pattern is then the same for every
        sequence and is computed once. Their gradient is not computed.
    edit_scores, edit_pattern
        Applied to the scores and patterns of every layer but the last.
    edits_keep
        ``edit_pattern`` never writes to what it is given. Then a pattern that all sequences share is given as one, expanded, and what comes back so is
        shared.
    """
    batch, n = tokens.shape
    d_vocab = W_U.shape[1]
    n_positions = A[0].shape[-1] - d_vocab

    @cache
    def X() -> Float[Tensor, "batch pos d_vocab"]:
        return one_hot(tokens, d_vocab).to(W_U.dtype)

    future = torch.full((n, n), float("-inf"), dtype=W_U.dtype, device=tokens.device).triu(1)

    stream: list[Tensor | None] = [None]
    for layer, heads in enumerate(A[:-1]):
        patterns = []
        for head in heads:
            if layer > 0:
                h = _dense(stream, X(), n_positions)
                scores = h @ head @ h.mT
            elif position_only:
                scores = head[None, d_vocab : d_vocab + n, d_vocab : d_vocab + n]
            else:
                # Products with one-hots, for the gradient's sake: that of an indexing adds up one sequence after the other.
                to_token, to_position = head[: d_vocab + n, : d_vocab + n].split([d_vocab, n], dim=1)
                of_token = X() @ to_token[:d_vocab] + to_token[d_vocab:]  # [batch, query, token of the key]
                scores = X() @ to_position[:d_vocab] + to_position[d_vocab:] + of_token @ X().mT
            patterns.append(scores + future)
        if edit_scores is not None:
            patterns = list(edit_scores(layer, torch.stack([s.expand(batch, n, n) for s in patterns], 1)).unbind(1))
        patterns = [scores.softmax(-1) for scores in patterns]
        if edit_pattern is not None and edits_keep and all(len(pattern) == 1 for pattern in patterns):
            found = edit_pattern(layer, torch.stack(patterns, 1).expand(batch, -1, -1, -1))
            patterns = list((found[:1] if found.stride(0) == 0 else found).unbind(1))
        elif edit_pattern is not None:
            patterns = list(edit_pattern(layer, torch.stack([p.expand(batch, n, n) for p in patterns], 1)).unbind(1))
        stream += [_product(pattern, M) for pattern in patterns for M in stream]

    here = torch.zeros(batch, n, dtype=W_U.dtype, device=tokens.device)
    here[:, -1] = 1
    last = _read(here, stream, tokens, X, d_vocab, n_positions)  # [batch, d_last_but_one]
    read = [last]
    for head in A[-1]:
        u = (last @ head).split([d_vocab, n_positions] * len(stream), dim=-1)
        scores = torch.zeros((), dtype=W_U.dtype, device=tokens.device)
        for M, u_token, u_position in zip(stream, u[::2], u[1::2], strict=True):
            w = u_token.gather(1, tokens) + u_position[:, :n]  # [batch, pos]: the score of a key that holds this alone
            scores = scores + _apply(M, w)
        read.append(_read(scores.softmax(-1), stream, tokens, X, d_vocab, n_positions))
    return torch.cat(read, dim=-1) @ W_U


def _product(pattern: Tensor, M: Tensor | None) -> Tensor:
    return pattern if M is None else pattern @ M


def _apply(M: Tensor | None, w: Tensor) -> Tensor:
    """M w for each sequence; a pattern that all sequences share ([1, query, key]) is one matrix product."""
    if M is None:
        return w
    return w @ M[0].mT if len(M) == 1 else torch.bmm(M, w[..., None])[..., 0]


def _read(
    row: Tensor, stream: list[Tensor | None], tokens: Tensor, X: Callable[[], Tensor], d_vocab: int, n_positions: int
) -> Tensor:
    """The product row @ stream, where row holds weights over the keys: [batch, key] -> [batch, width of the stream]."""
    parts = []
    for M in stream:
        if M is None:
            r = row
        elif len(M) == 1:
            r = row @ M[0]
        else:
            r = torch.bmm(row[:, None], M)[:, 0]
        if torch.is_grad_enabled() or tokens.device.type != "cpu":  # where it would depend on the order of threads
            of_states = torch.bmm(r[:, None], X())[:, 0]
        else:  # the same sums without the one-hots, several times as fast; its gradient would be as much slower
            of_states = r.new_zeros(len(tokens), d_vocab).scatter_add_(1, tokens, r.expand(len(tokens), -1))
        parts += [of_states, _pad(r, n_positions)]
    return torch.cat(parts, dim=-1)


def _dense(stream: list[Tensor | None], X: Tensor, n_positions: int) -> Tensor:
    """The stream itself: [batch, pos, width]."""
    batch, n = X.shape[:2]
    eye = torch.eye(n, dtype=X.dtype, device=X.device)[None]
    parts = []
    for M in stream:
        product = (eye if M is None else M).expand(batch, n, n)
        parts += [product @ X, _pad(product, n_positions)]
    return torch.cat(parts, dim=-1)


def _pad(x: Tensor, width: int) -> Tensor:
    """Zeros for the positions beyond the end of a short sequence."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))
