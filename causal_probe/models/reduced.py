"""The reduced transformer: the two matrices that the theory of causal structure learning is about, and its first gradient.

Definition (Nichani, Damian & Lee 2024, arXiv 2402.14735, section 4), for T tokens over S states, X their one-hot rows [T, S]::

    z    = softmax(mask(A1)) X                                    A1 [T, T]: layer 1 mixes earlier tokens by position alone
    f(s) = X^T softmax(z A2^T x_T)                                A2 [S, S]: layer 2 compares the mixture with the last token
    loss = -E sum_s' pi(s' | s_T) log(f_s' + epsilon)

f is a distribution over states. The model is the disentangled transformer of two layers of one head in which every block but
two is zero, and whose logits are f: :meth:`ReducedTransformer.to_disentangled` and back are exact.

At A1 = 0, A2 = beta I the gradient is a product of two vectors per sequence (:func:`first_gradient`), so that a batch costs one
matrix product. To first order in beta, and for long sequences, it is the chi-square information between positions:
see :mod:`causal_probe.tasks.information`.
"""

# HookPoint, HookedRootModule.setup and Module._apply carry no types.
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformer_lens.utilities.typed_module_list import TypedModuleList

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.models.device import Device, Dtype
from causal_probe.models.disentangled import DisentangledTransformer, SoftmaxAttention, StatesModel, check_shape

__all__ = ["EPSILON", "ReducedTransformer", "first_gradient"]

#: Keeps the loss finite where a state that may come next has not occurred.
EPSILON = 1e-8


class Head(SoftmaxAttention):
    """One head whose query-key product is a matrix that the model owns."""

    def forward(
        self,
        query: Float[Tensor, "batch pos d_query"],
        key: Float[Tensor, "batch pos d_key"],
        value: Float[Tensor, "batch pos d_vocab"],
        A: Float[Tensor, "d_query d_key"],
    ) -> Float[Tensor, "batch pos d_vocab"]:
        q, k, v = (each[:, :, None].clone() for each in (query @ A, key, value))
        return self.attend(q, k, v)[:, :, 0]


class Block(nn.Module):
    """One layer, which is its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Head()


@checked
class ReducedTransformer(StatesModel):
    """The two-matrix model, at A1 = 0 and A2 = beta I: where Algorithm 1 of the paper starts.

    It has TransformerLens' hook names (``blocks.0.attn.hook_pattern``, ...), one head in each of its two layers.

    Parameters
    ----------
    d_vocab
        Number of states S, >= 2.
    n_positions
        Length T of the longest sequence, >= 2; shorter ones are fine.
    beta
        Scale of the comparison in layer 2.
    dtype, device
        Of the weights.

    Raises
    ------
    CausalProbeError
        If an argument is out of range.

    Examples
    --------
    >>> import torch
    >>> model = ReducedTransformer(d_vocab=3, n_positions=5)
    >>> f = model(torch.tensor([[0, 2, 1, 1, 0]]))
    >>> f.shape, bool(torch.allclose(f.sum(-1), torch.ones(5)))
    (torch.Size([1, 5, 3]), True)
    """

    def __init__(
        self,
        d_vocab: int,
        n_positions: int,
        *,
        beta: float = 1.0,
        dtype: Dtype = torch.float32,
        device: Device = "cpu",
    ) -> None:
        check_shape(d_vocab, n_positions, (1, 1))
        super().__init__(d_vocab, n_positions)
        #: [query position, key position]; the entries above the diagonal are never read.
        self.A1 = nn.Parameter(torch.zeros(n_positions, n_positions, dtype=dtype))
        #: [state of the query, state that layer 1 mixed into the key]
        self.A2 = nn.Parameter(beta * torch.eye(d_vocab, dtype=dtype))
        self.blocks = TypedModuleList([Block(), Block()])
        self.make_ready(
            "reduced-transformer",
            d_model=d_vocab + n_positions,
            d_head=max(d_vocab, n_positions),
            n_layers=2,
            n_heads=1,
            n_positions=n_positions,
            d_vocab=d_vocab,
            dtype=dtype,
            device=device,
        )

    def forward(self, input: Tensor | str | Sequence[str], return_type: str | None = "logits") -> Any:
        """The output f at every position, as if it were the last, through every hook.

        Parameters
        ----------
        input
            States ``[batch, pos]`` or ``[pos]``.
        return_type
            ``"logits"``: f [batch, pos, d_vocab], which is what the disentangled transformer's *logits* are, and here is a
            distribution by itself. ``"loss"``: mean of -log(f + epsilon) at the next token. None: nothing.

        Raises
        ------
        CausalProbeError
            For tokens as in :class:`DisentangledTransformer`, for another ``return_type``, and for a loss without a next token.
        """
        if return_type not in ("logits", "loss", None):
            raise CausalProbeError(f"return_type must be 'logits', 'loss' or None, not {return_type!r}.")
        tokens = self.to_tokens(input)
        if return_type == "loss":
            self._check_next(tokens)
        token, position = self._embed(tokens)
        mixed = self.blocks[0].attn(position, position, token, self.A1)
        f: Tensor = self.blocks[1].attn(token, mixed, token, self.A2)
        if return_type == "loss":
            return -(f[:, :-1].gather(2, tokens[:, 1:, None]) + EPSILON).log().mean()
        return f if return_type == "logits" else None

    def predict(self, tokens: Tensor | str | Sequence[str]) -> Float[Tensor, "batch d_vocab"]:
        """The output f at the last position: ``self(tokens)[:, -1]``, and much faster where no hook is set."""
        tokens = self.to_tokens(tokens)
        if any(point.has_hooks() for point in self.hook_dict.values()):
            f: Tensor = self(tokens)
            return f[:, -1]
        n = tokens.shape[1]
        X = one_hot(tokens, self.d_vocab).to(self.A1.dtype)
        future = torch.ones(n, n, dtype=torch.bool, device=tokens.device).triu(1)
        mixed = self.A1[:n, :n].masked_fill(future, float("-inf")).softmax(-1) @ X  # [batch, pos, d_vocab]
        pattern = (mixed @ self.A2[tokens[:, -1], :, None])[..., 0].softmax(-1)
        return (pattern[:, None] @ X)[:, 0]

    def loss(self, tokens: Int[Tensor, "batch pos"], target: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """-sum_s target(s) log(f_s + epsilon) at the last position, in nats, one per sequence."""
        return -(target * (self.predict(tokens) + EPSILON).log()).sum(-1)

    def to_disentangled(self) -> DisentangledTransformer:
        """The disentangled transformer of heads (1, 1) whose logits are f, exactly.

        Its weights are zero but for these: what layer 2 reads of the stream [token, position, L0H0.token, L0H0.position] is::

            A_0[position, position]      = A1     score(i, j) = e_i A1 e_j
            A_1[token, L0H0.token]       = A2     score(i, j) = x_i A2 z_j
            W_U[L1H0.token]              = I      logits = sum_j pattern(i, j) x_j
        """
        model = DisentangledTransformer(
            self.d_vocab, self.n_positions, (1, 1), dtype=self.A1.dtype, device=self.A1.device
        )
        with torch.no_grad():
            for block, weights in zip(
                _blocks(model), (self.A1, self.A2, torch.eye(self.d_vocab, device=self.A1.device)), strict=True
            ):
                block.copy_(weights)
        return model

    @classmethod
    def from_disentangled(cls, model: DisentangledTransformer) -> ReducedTransformer:
        """The reduced transformer whose f is the logits of ``model``, exactly.

        Raises
        ------
        CausalProbeError
            If there is none: the model does not have two layers of one head, a weight outside the blocks of
            :meth:`to_disentangled` is not zero, or the output's block is not the identity.
        """
        if model.heads != (1, 1):
            raise CausalProbeError(
                f"The reduced model has two layers of one head; this model's heads per layer are {list(model.heads)}."
            )
        position, token, _ = _blocks(model)
        reduced = cls(model.d_vocab, model.n_positions, dtype=model.W_U.dtype, device=model.W_U.device)
        with torch.no_grad():
            reduced.A1.copy_(position)
            reduced.A2.copy_(token)
        rebuilt = reduced.to_disentangled()
        others = [
            f"L{layer}H{head} {query} x {key}"
            for (layer, head, query, key), block in model.named_blocks().items()
            if not torch.equal(block, rebuilt.block(layer, head, query=query, key=key))
        ] + [
            f"W_U {part}"
            for part in model.subspaces(2)
            if not torch.equal(model.output_block(part), rebuilt.output_block(part))
        ]
        if others:
            raise CausalProbeError(
                f"This model is no reduced transformer: {', '.join(others[:4])}{' and others' if len(others) > 4 else ''} "
                "should be zero (and W_U L1H0.token the identity). Set them so first, and see what that costs."
            )
        return reduced


def _blocks(model: DisentangledTransformer) -> tuple[Tensor, Tensor, Tensor]:
    """The three blocks of a disentangled transformer that the reduced one has, as views."""
    return (
        model.block(0, 0, query="position", key="position"),
        model.block(1, 0, query="token", key="L0H0.token"),
        model.output_block("L1H0.token"),
    )


def first_gradient(
    tokens: Int[Tensor, "*batch pos"],
    target: Float[Tensor, "*batch d_vocab"],
    *,
    beta: float = 1.0,
    query: int = -1,
    epsilon: float = EPSILON,
) -> tuple[Float[Tensor, "*batch pos"], Float[Tensor, "*batch pos"]]:
    """Minus the loss's gradient with respect to layer 1's pattern at A1 = 0, A2 = beta I, as two vectors per sequence.

    With a the pattern, whose rows are even at A1 = 0, and p layer 2's::

        m_j = 1[s_j = s_query]                            what the comparison sees of key j
        p   = softmax_i(beta sum_j a_ij m_j)
        f_s = sum_i p_i 1[s_i = s]
        c_s = target_s / (f_s + epsilon)                  -dloss/df_s
        u_i = beta p_i (c_{s_i} - sum_k p_k c_{s_k})      -dloss/d(layer 2's score of i), times beta
        -dloss/da_ij = u_i m_j                            for j <= i

    The gradient with respect to the *scores* A1 is that, each row centred by its softmax:
    -dloss/dA1_ij = (u_i / (i + 1)) (m_j - mean_{k <= i} m_k).

    Parameters
    ----------
    tokens
        States; not checked here.
    target
        The distribution of the next token, or one draw from it, one-hot.
    query
        The position whose token layer 2 compares with; the paper's is the last.

    Returns
    -------
    u, m

    Examples
    --------
    >>> from causal_probe import graphs, tasks
    >>> batch = tasks.InContextMarkov(graphs.chain(7), d_vocab=3, concentration=0.1).sample(4, tasks.generator(0, "first"))
    >>> [list(part.shape) for part in first_gradient(batch.tokens, batch.target)]
    [[4, 8], [4, 8]]
    """
    n, d_vocab = tokens.shape[-1], target.shape[-1]
    m = (tokens == tokens[..., query, None]).to(target.dtype)
    even = m.cumsum(-1) / torch.arange(1, n + 1, dtype=m.dtype, device=m.device)
    p = (beta * even).softmax(-1)
    f = torch.zeros(*tokens.shape[:-1], d_vocab, dtype=m.dtype, device=m.device).scatter_add_(-1, tokens, p)
    c = (target / (f + epsilon)).gather(-1, tokens)
    u = beta * p * (c - (p * c).sum(-1, keepdim=True))
    return u, m
