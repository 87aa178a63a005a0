"""The reduced transformer against its definition, its maps to the disentangled one, and its first gradient against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from causal_probe import graphs, probes
from causal_probe.errors import CausalProbeError
from causal_probe.models import DisentangledTransformer, ReducedTransformer
from causal_probe.models.reduced import first_gradient
from causal_probe.tasks import InContextMarkov

S, T = 3, 6


def random_model(n_positions: int = T) -> ReducedTransformer:
    model = ReducedTransformer(S, n_positions, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def random_tokens(batch: int = 5, n: int = T) -> torch.Tensor:
    return torch.randint(S, (batch, n), generator=torch.Generator().manual_seed(1))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def define(model: ReducedTransformer, tokens: list[int]) -> np.ndarray:
    """X^T softmax(softmax(mask A1) X A2^T x_T), as it is written."""
    A1, A2 = model.A1.detach().numpy(), model.A2.detach().numpy()
    X = np.eye(S)[tokens]
    mixed = np.array([softmax(A1[i, : i + 1]) @ X[: i + 1] for i in range(len(tokens))])
    return X.T @ softmax(mixed @ A2.T @ X[-1])


def test_the_output_is_the_definition_at_every_position() -> None:
    model, tokens = random_model(), random_tokens()
    f = model(tokens)
    for sequence, its in zip(tokens.tolist(), f.detach().numpy(), strict=True):
        for position in range(T):
            np.testing.assert_allclose(its[position], define(model, sequence[: position + 1]), atol=1e-13)
    torch.testing.assert_close(model.predict(tokens), f[:, -1], rtol=0, atol=1e-13)


def test_every_head_can_be_probed_though_no_residual_stream_goes_around_it() -> None:
    """Layer 2's pattern alone stands between layer 1's and the output; the disentangled transformer of the same weights says what is right."""
    model, tokens = random_model(), random_tokens(8)
    ours, theirs = (
        probes.scan(each, tokens, templates=["previous-token", "induction"])
        for each in (model, model.to_disentangled())
    )
    assert {score.layer for score in ours} == {0, 1}
    for score in ours:
        twin = theirs.of(*score[:3])
        assert (score.score, score.chance) == pytest.approx((twin.score, twin.chance), abs=1e-12)
    with torch.no_grad():
        model.A2.zero_()  # layer 2 reads the tokens evenly, whatever layer 1 does: live all the same
    assert probes.scan(model, tokens, templates=["previous-token"]).of(0, 0, "previous-token").rows


def test_to_the_disentangled_transformer_and_back_on_logits() -> None:
    model, tokens = random_model(), random_tokens()
    full = model.to_disentangled()
    torch.testing.assert_close(full(tokens), model(tokens), rtol=0, atol=1e-13)
    back = ReducedTransformer.from_disentangled(full)
    assert torch.equal(back.A1, model.A1)
    assert torch.equal(back.A2, model.A2)
    torch.testing.assert_close(back(tokens), full(tokens), rtol=0, atol=1e-13)


def test_no_other_disentangled_transformer_is_a_reduced_one() -> None:
    full = random_model().to_disentangled()
    full.block(0, 0, query="token", key="position")[0, 0] = 1
    full.output_block("token")[0, 0] = 1
    with pytest.raises(CausalProbeError, match="L0H0 token x position, W_U token should be zero"):
        ReducedTransformer.from_disentangled(full)
    with pytest.raises(CausalProbeError, match=r"two layers of one head; .* \[2, 1\]"):
        ReducedTransformer.from_disentangled(DisentangledTransformer(S, T, (2, 1)))
    with pytest.raises(CausalProbeError, match=r"W_U L1H0\.token"):
        ReducedTransformer.from_disentangled(DisentangledTransformer(S, T))


def test_hooks_reach_the_fast_path_and_the_cache_is_transformer_lens() -> None:
    model, tokens = random_model(), random_tokens()
    _, cache = model.run_with_cache(tokens)
    assert cache["pattern", 0].shape == cache["attn_scores", 1].shape == (5, 1, T, T)
    np.testing.assert_allclose(cache["pattern", 0][0, 0, 2, :3], softmax(model.A1.detach().numpy()[2, :3]), atol=1e-13)
    name = "blocks.0.attn.hook_pattern"
    with model.hooks(fwd_hooks=[(name, lambda pattern, hook: pattern * 0)]):
        edited = model.predict(tokens)
    even = torch.nn.functional.one_hot(tokens, S).double().mean(1)  # nothing to compare with: layer 2 is even
    torch.testing.assert_close(edited, even)


@pytest.mark.parametrize("query", [-1, 2])
@pytest.mark.parametrize("beta", [0.01, 1.0, 4.0])
def test_the_first_gradient_is_autograd_s(beta: float, query: int) -> None:
    """Of the scores and, at the hook, of the pattern. Another query is the same model with its token put last."""
    task = InContextMarkov(graphs.chain(T - 1), S, 0.3)
    batch = task.sample(7, torch.Generator().manual_seed(0), dtype=torch.float64)
    model = ReducedTransformer(S, T, beta=beta, dtype=torch.float64)
    kept = []

    def keep(pattern: torch.Tensor, hook: object) -> None:
        pattern.retain_grad()
        kept.append(pattern)

    tokens = batch.tokens
    mixed_of_query = model.A2[tokens[:, query]]  # [batch, d_vocab]
    X = torch.nn.functional.one_hot(tokens, S).double()
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = model.A1.masked_fill(future, float("-inf"))
    pattern = scores.softmax(-1).expand(7, T, T)
    pattern.retain_grad()
    attention = ((pattern @ X) @ mixed_of_query[..., None])[..., 0].softmax(-1)
    f = (attention[:, None] @ X)[:, 0]
    loss = -(batch.target * (f + 1e-8).log()).sum()
    if query == -1:
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", keep)]):
            torch.testing.assert_close(model.loss(tokens, batch.target).sum(), loss)
    loss.backward()
    u, m = first_gradient(tokens, batch.target, beta=beta, query=query)
    past = torch.ones(T, T, dtype=torch.float64).tril()
    by_pattern = u[:, :, None] * m[:, None, :]
    assert pattern.grad is not None
    torch.testing.assert_close(by_pattern * past, -pattern.grad * past, rtol=1e-10, atol=1e-14)
    share = 1 / torch.arange(1, T + 1, dtype=torch.float64)
    row_mean = (by_pattern * past).sum(-1, keepdim=True) * share[:, None]
    centred = (by_pattern - row_mean) * past * share[:, None]
    assert model.A1.grad is not None
    torch.testing.assert_close(centred.sum(0), -model.A1.grad, rtol=1e-10, atol=1e-14)


def test_the_loss_is_the_cross_entropy_of_f() -> None:
    model, tokens = random_model(), random_tokens()
    target = torch.eye(S, dtype=torch.float64)[tokens[:, 0]]
    by_hand = [-np.log(define(model, row)[row[0]] + 1e-8) for row in tokens.tolist()]
    np.testing.assert_allclose(model.loss(tokens, target).detach(), by_hand, atol=1e-13)
    following = [
        -np.log(define(model, row[: i + 1])[row[i + 1]] + 1e-8) for row in tokens.tolist() for i in range(T - 1)
    ]
    assert float(model(tokens, return_type="loss").detach()) == pytest.approx(np.mean(following))


def test_bad_input_is_refused() -> None:
    with pytest.raises(CausalProbeError, match="d_vocab must be at least 2"):
        ReducedTransformer(1, 5)
    model = ReducedTransformer(3, 5)
    with pytest.raises(CausalProbeError, match="Token 3 is outside the vocabulary"):
        model(torch.tensor([[0, 3]]))
    with pytest.raises(CausalProbeError, match="return_type"):
        model(torch.tensor([[0, 2]]), return_type="both")


def test_a_loss_needs_a_next_token() -> None:
    with pytest.raises(CausalProbeError, match=r"needs a sequence of two tokens or more; the shape is \[1, 1\]"):
        random_model()(torch.tensor([[0]]), return_type="loss")
