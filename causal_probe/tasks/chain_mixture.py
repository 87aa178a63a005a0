"""A finite set of Markov chains, one of which makes each sequence: will a model memorise the chains, or count in context?

The transition matrices of n chains are drawn once, rows iid Dirichlet(concentration); each sequence follows one of them, from a uniform first
token. Four predictors span the answers (Park et al., *Competition Dynamics Shape Algorithmic Phases of In-Context Learning*, ICLR 2025):
those that *retrieve* weigh the n chains by their likelihood, those that *infer* count in the context; each sees single tokens (unigram) or
pairs (bigram).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.tasks.dirichlet import check_concentration, dirichlet
from causal_probe.tasks.graph_mixture import LabelledBatch, NextTokens, counted, next_token_losses
from causal_probe.tasks.randomness import check_batch_size, generator, out_of_range
from causal_probe.tasks.stationary import stationary_distribution

__all__ = ["MarkovMixture"]


@checked
class MarkovMixture:
    """Sequences of one of ``n_chains`` Markov chains each.

    Parameters
    ----------
    n_chains
        Number of chains, at least 1.
    n_positions, d_vocab
        Tokens in a sequence, and states; at least 2 of each.
    concentration
        Of the Dirichlet law of the rows.
    seed
        Of the chains.

    Raises
    ------
    CausalProbeError
        If an argument is out of range.

    Examples
    --------
    >>> from causal_probe import tasks
    >>> task = MarkovMixture(4, n_positions=64, d_vocab=5)
    >>> losses = task.reference_losses(task.sample(512, tasks.generator(0, "chains")))
    >>> losses["retrieval, bigram"] < losses["inference, bigram"] < losses["uniform"]
    True
    """

    def __init__(
        self, n_chains: int, *, n_positions: int, d_vocab: int, concentration: float = 1.0, seed: int = 0
    ) -> None:
        counts = {"n_chains": (n_chains, 1), "n_positions": (n_positions, 2), "d_vocab": (d_vocab, 2)}
        if wrong := out_of_range(counts, {}):
            raise CausalProbeError(f"{'; '.join(wrong)}.")
        self.n_chains, self.n_positions, self.d_vocab, self.concentration = n_chains, n_positions, d_vocab, check_concentration(concentration)  # fmt: skip
        #: [chain, d_vocab, d_vocab]
        self.matrices: Float[Tensor, "chain d_vocab d_vocab"] = dirichlet(
            concentration, (n_chains, d_vocab, d_vocab), generator=generator(seed, "chains"), dtype=torch.float64
        )
        #: The stationary law of each chain, [chain, d_vocab].
        self.stationary = stationary_distribution(self.matrices)

    def __repr__(self) -> str:
        return (
            f"MarkovMixture({self.n_chains} chains, {self.n_positions} positions, d_vocab={self.d_vocab}, "
            f"concentration={self.concentration:g})"
        )

    def sample(self, batch_size: int, generator: torch.Generator) -> LabelledBatch:
        """Draw sequences on the generator's device; their labels are their chains.

        Raises
        ------
        CausalProbeError
            If ``batch_size`` is below 1.
        """
        check_batch_size(batch_size, generator)
        device = generator.device
        labels = torch.randint(self.n_chains, (batch_size,), generator=generator, device=device)
        above = self.matrices.to(device).cumsum(-1)
        above = above / above[..., -1:]  # the last is exactly 1
        token = torch.randint(self.d_vocab, (batch_size,), generator=generator, device=device)
        tokens = [token]
        for _ in range(self.n_positions - 1):
            u = torch.rand(batch_size, 1, generator=generator, dtype=above.dtype, device=device)
            token = (u >= above[labels, token][:, :-1]).sum(-1)
            tokens.append(token)
        return LabelledBatch(torch.stack(tokens, 1), labels)

    def posterior(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch chain pos"]:
        """The probability of each chain given the tokens before each position, by their transitions."""
        return _before(self._transitions(tokens).log())

    def references(self) -> dict[str, NextTokens]:
        """Uniform, and retrieval or inference with unigrams or bigrams.

        *Retrieval, bigram* is the exact posterior mixture: no predictor has a lower expected loss. *Retrieval, unigram* weighs the chains by the
        likelihood of the tokens under their stationary laws and predicts the mixture of these. *Inference* counts so far, with the
        concentration as pseudo-count.
        """
        S, a = self.d_vocab, self.concentration

        def retrieved(batch: LabelledBatch, *, pairs: bool) -> Tensor:
            tokens = batch.tokens
            if not pairs:
                laws = self.stationary.to(tokens.device)
                weights = _before(laws[:, tokens].transpose(0, 1).log())
                return torch.einsum("b c t, c s -> b t s", weights, laws)
            weights = self.posterior(tokens)[..., 1:]
            after = self.matrices.to(tokens.device)[:, tokens[:, :-1]]  # [chain, batch, pos - 1, state]
            rest = torch.einsum("b c t, c b t s -> b t s", weights, after)
            return functional.pad(rest, (0, 0, 1, 0), value=1 / S)

        return {
            "uniform": lambda batch: torch.full((*batch.tokens.shape, S), 1 / S, dtype=torch.float64),
            "inference, unigram": lambda batch: counted(batch.tokens, [-2] * self.n_positions, S, a),
            "retrieval, unigram": lambda batch: retrieved(batch, pairs=False),
            "inference, bigram": lambda batch: counted(batch.tokens, range(-1, self.n_positions - 1), S, a),
            "retrieval, bigram": lambda batch: retrieved(batch, pairs=True),
        }

    def reference_losses(self, batch: LabelledBatch) -> dict[str, float]:
        """Mean loss of each reference in nats per token, from the second on."""
        return {
            name: float(next_token_losses(predict(batch), batch.tokens)[:, 1:].mean())
            for name, predict in self.references().items()
        }

    def _transitions(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch chain pos"]:
        """The probability of each token given the one before it, by chain; that of the first is 1 / S."""
        rest = self.matrices.to(tokens.device)[:, tokens[:, :-1], tokens[:, 1:]].transpose(0, 1)
        return functional.pad(rest, (1, 0), value=1 / self.d_vocab)


def _before(logs: Float[Tensor, "batch chain pos"]) -> Float[Tensor, "batch chain pos"]:
    """The posterior over chains, uniform beforehand, given the log-likelihoods of the tokens before each position."""
    return functional.pad(logs.cumsum(-1)[..., :-1], (1, 0)).softmax(1)
