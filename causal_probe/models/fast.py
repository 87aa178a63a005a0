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
from torch.nn.functional import embedding, one_hot

__all__ = ["last_logits", "last_logits_by_rows"]

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

    stream = _stream(tokens, X, A, W_U, position_only, edit_scores, edit_pattern, edits_keep)
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


def last_logits_by_rows(
    tokens: Int[Tensor, "batch pos"],
    A: Sequence[Float[Tensor, "_head _d_query _d_key"]],
    W_U: Float[Tensor, "d_last d_vocab"],
    *,
    head: int,
    queries: Int[Tensor, " row"],
    rows: Float[Tensor, "row pos"],
    position_only: bool = False,
    edit_scores: Edit | None = None,
    edit_pattern: Edit | None = None,
    edits_keep: bool = False,
) -> Float[Tensor, "row batch d_vocab"]:
    """Logits at the last position of a model of two layers, if one row of layer 0's attention were another, for each of many rows.

    Such a row changes one key of the last layer: its score and its value. All else is computed once.

    Parameters
    ----------
    tokens, A, W_U, position_only, edit_scores, edit_pattern, edits_keep
        As for :func:`last_logits`.
    head, queries, rows
        The head of layer 0; whose attention at a query, which is not the last position, is each of the rows.
    """
    n = tokens.shape[1]
    d_vocab = W_U.shape[1]
    by_key = tokens.T.contiguous()
    changed, each = 1 + head, torch.arange(len(rows), device=tokens.device)

    @cache
    def X() -> Float[Tensor, "batch pos d_vocab"]:
        return one_hot(tokens, d_vocab).to(W_U.dtype)

    stream = _stream(tokens, X, A, W_U, position_only, edit_scores, edit_pattern, edits_keep)
    here = torch.zeros(1, n, dtype=W_U.dtype, device=tokens.device)
    here[0, -1] = 1
    ends = [here if M is None else M[:, -1] for M in stream]
    of_states = [_of_states(end.expand(len(tokens), -1), tokens, X, d_vocab) for end in ends]
    # The stream at the last position.
    at_end = [torch.cat(of_states, 1), torch.cat([end.expand(max(map(len, ends)), -1) for end in ends], 1)]

    def by_part(weights: Float[Tensor, "d_stream out"]) -> tuple[Tensor, Tensor]:
        """The blocks of tokens, [product, d_vocab, out], and of positions, [product, pos, out]."""
        blocks = weights.view(len(stream), len(weights) // len(stream), weights.shape[-1])
        return blocks[:, :d_vocab], blocks[:, d_vocab : d_vocab + n]

    def read(weights: Float[Tensor, "d_stream out"]) -> Float[Tensor, "batch out"]:
        """The stream at the last position @ weights."""
        of_token, of_position = (
            part @ blocks.flatten(0, 1) for part, blocks in zip(at_end, by_part(weights), strict=True)
        )
        return of_token + of_position

    logits, *of_heads = W_U.chunk(1 + len(A[-1]))
    found = read(logits).expand(len(rows), -1, -1)
    for weights, out in zip(A[-1], of_heads, strict=True):
        u = by_part(read(weights).T)
        # What a key that holds a token and a position alone gives, by product: its score [batch, key], and its value [key, batch, d_vocab].
        scores = [token.T.gather(1, tokens) + position.T for token, position in zip(*u, strict=True)]
        values = [embedding(by_key, token) + position[:, None] for token, position in zip(*by_part(out), strict=True)]
        new_scores, new_values = scores[changed] @ rows.T, _mix(rows[None], values[changed])
        scores = [_apply(M, score) for M, score in zip(stream, scores, strict=True)]
        values = [_mix(M, value) for M, value in zip(stream, values, strict=True)]
        other_scores, other_values = (sum(x for i, x in enumerate(xs) if i != changed) for xs in (scores, values))
        # The last layer's attention with one key changed, and what it reads.
        pattern = (other_scores + scores[changed])[:, None].repeat(1, len(rows), 1)  # [batch, row, key]
        pattern[:, each, queries] = other_scores[:, queries] + new_scores
        pattern = pattern.softmax(-1)
        # In this order of axes the product is several times as fast.
        value = (other_values + values[changed]).permute(1, 2, 0).contiguous()
        of_query = pattern[:, each, queries].T[..., None]
        found = (
            found + torch.bmm(pattern, value.mT).transpose(0, 1) + of_query * (new_values - values[changed][queries])
        )
    return found


def _stream(
    tokens: Int[Tensor, "batch pos"],
    X: Callable[[], Tensor],
    A: Sequence[Tensor],
    W_U: Tensor,
    position_only: bool,
    edit_scores: Edit | None,
    edit_pattern: Edit | None,
    edits_keep: bool,
) -> list[Tensor | None]:
    """The stream before the last layer as products of patterns, each [batch, query, key], or [1, query, key] where all sequences share it."""
    batch, n = tokens.shape
    d_vocab = W_U.shape[1]
    n_positions = A[0].shape[-1] - d_vocab
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
    return stream


def _mix(M: Tensor | None, values: Float[Tensor, "key batch width"]) -> Float[Tensor, "query batch width"]:
    """M values for each sequence."""
    if M is None:
        return values
    if len(M) == 1:
        return (M[0] @ values.flatten(1)).view(M.shape[1], *values.shape[1:])
    return torch.bmm(M, values.transpose(0, 1)).transpose(0, 1)


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
        parts += [_of_states(r.expand(len(tokens), -1), tokens, X, d_vocab), _pad(r, n_positions)]
    return torch.cat(parts, dim=-1)


def _of_states(
    r: Float[Tensor, "batch pos"], tokens: Int[Tensor, "batch pos"], X: Callable[[], Tensor], d_vocab: int
) -> Float[Tensor, "batch d_vocab"]:
    """How much of each row is on each state."""
    if torch.is_grad_enabled() or tokens.device.type != "cpu":  # where it would depend on the order of threads
        return torch.bmm(r[:, None], X())[:, 0]
    # The same sums without the one-hots, several times as fast; its gradient would be as much slower.
    return r.new_zeros(len(tokens), d_vocab).scatter_add_(1, tokens, r)


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
