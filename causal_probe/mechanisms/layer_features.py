r"""The features on which a linear layer behind an MLP runs its gradient step: what the layer itself says they are.

A linear layer that reads phi(x) and y can multiply the query's features by the examples' in any metric G,

    prediction = sum_j y_j phi(x_j)' G phi(x_q)  +  what else its weights do,        G' = - sum_heads (QK's x-x block) (OV's y-y block)

and G is not determined by the function: phi -> B phi and G -> B^-T G B^-1 is the same model. So one plain gradient step on the MLP's
output, G = identity, is a statement about a basis that training had no reason to choose. What does not depend on the basis is this:
if G is symmetric and positive, G = C'C, then the layer is *exactly* one step of gradient descent on the features C phi; if it is not,
it is a step on no features at all. :func:`layer_features` takes the nearest such G, with the coordinates scaled so that the features
have second moments 1 (directions that the features never take must not count), and says how much of G that leaves out.

Nothing here is fitted to the model's predictions: G is read from the weights, and whether the *whole* model predicts like that
step is measured afterwards, by :func:`~causal_probe.mechanisms.descent_alignment`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.mechanisms.descent import Algorithm
from causal_probe.models import LinearTransformer
from causal_probe.results import UNSAVED, Result, Table
from causal_probe.tasks import LinearRegression, SineRegression, generator
from causal_probe.tasks.regression import RegressionBatch

__all__ = ["LayerFeatures", "function_cosine", "layer_features"]

#: Second moments below this share of the largest are directions that the features don't take.
NEGLIGIBLE = 1e-8


@dataclass(frozen=True, eq=False, repr=False)
class LayerFeatures(Result):
    """The result of :func:`layer_features`. Called with x [..., d_x], it gives the features [..., d].

    Attributes
    ----------
    root
        C' above, [d_features, d]; as many columns as the metric has positive eigenvalues.
    spectrum
        The metric's eigenvalues, in falling order: those of the map from the examples' features to the query's, for features of
        second moment 1.
    off
        The share of the metric's Frobenius norm that is not symmetric and positive, in [0, 1].
    model
        The model whose MLP computes them. Files don't hold it, so loaded features can't be called.
    """

    KIND = "layer features"
    WORKS = ("vonoswald2023",)

    root: Float[Tensor, "_features _kept"]
    spectrum: Float[Tensor, " _features"]
    off: float
    model: LinearTransformer = field(default=cast(Any, None), metadata=UNSAVED)

    def __call__(self, x: Float[Tensor, "*batch d_x"]) -> Float[Tensor, "*batch d"]:
        """The features of x."""
        if self.model is None or self.model.features is None:
            raise CausalProbeError(
                "The features were read from a file, which does not hold the model whose MLP makes them. Call layer_features."
            )
        features: Tensor = self.model.features(x)
        return features @ self.root

    @property
    def methods(self) -> str:
        """One sentence for a methods section."""
        return (
            "The features of a linear layer behind an MLP were read from its weights: the MLP's output in the nearest symmetric and positive metric of the "
            f"layer, with second moments from {self.settings['n_sequences']:,} sequences (after von Oswald et al., 2023; {self.measured_with})."
        )

    def table(self) -> Table:
        """The metric's eigenvalues."""
        return Table(
            f"LayerFeatures on {self.settings['task']}: {self.root.shape[1]} features, {self.off:.1%} of the metric is no metric",
            ("eigenvalue", "value"),
            list(enumerate(self.spectrum.tolist())),
        )


@checked
@torch.no_grad()
def layer_features(
    model: LinearTransformer, task: LinearRegression | SineRegression, *, n_sequences: int = 5_000, seed: int = 0
) -> LayerFeatures:
    """The MLP's features in the metric of the layer behind it.

    Parameters
    ----------
    model
        One linear layer behind an MLP.
    task
        Whose inputs give the features' second moments.
    n_sequences, seed
        How many sequences are drawn for that, and the seed.

    Raises
    ------
    CausalProbeError
        If the model has no MLP, or is not one linear layer, or reads no y in its first layer.
    """
    if model.features is None or len(model.kinds) != 1 or any(model.kinds):
        raise CausalProbeError(
            "The features of a layer are those of a model of one linear layer behind an MLP (d_hidden, d_features)."
        )
    attention, x, y = model.blocks[0].attn, slice(0, model.d_x), slice(model.d_x, None)
    QK = (attention.W_Q @ attention.W_K.mT)[:, x, x].double()
    passed = (attention.W_V @ attention.W_O)[:, y, y].double().diagonal(dim1=-2, dim2=-1).mean(-1)
    metric = -(QK * passed[:, None, None]).sum(0)
    if not metric.any():
        raise CausalProbeError("The layer's weights pass no y on, so that they have no metric on the features.")
    phi = model.features(
        task.sample(n_sequences, generator(seed, "layer features"), dtype=model.cfg.dtype).x_query
    ).double()
    moments, basis = torch.linalg.eigh(phi.mT @ phi / len(phi))
    taken = moments > NEGLIGIBLE * moments[-1]
    scale, basis = moments[taken].sqrt(), basis[:, taken]
    # In coordinates z = phi basis / scale the features have second moments 1, and the metric is
    inner = scale[:, None] * (basis.mT @ metric @ basis) * scale
    eigenvalues, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    positive = eigenvalues > 0
    kept = (vectors * eigenvalues.clamp(min=0)) @ vectors.mT
    root = (basis / scale) @ vectors[:, positive] * eigenvalues[positive].sqrt()
    spectrum = torch.zeros(len(metric), dtype=torch.float64)
    spectrum[: len(eigenvalues)] = eigenvalues.flip(0)
    norm = inner.norm()
    dtype = model.cfg.dtype
    return LayerFeatures(
        root.to(dtype),
        spectrum,
        float((inner - kept).norm() / norm) if norm else 1.0,
        model,
        settings={"task": repr(task), "n_sequences": n_sequences, "seed": seed},
        provenance={"dtype": str(dtype).removeprefix("torch."), "device": str(root.device)},
    )


@torch.no_grad()
def function_cosine(
    model: LinearTransformer,
    algorithm: Algorithm,
    task: LinearRegression | SineRegression,
    batch: RegressionBatch,
    *,
    queries: int = 64,
) -> Float[Tensor, " batch"]:
    """Cosine between what a model and an algorithm predict, as functions of the query: over ``queries`` that are the same for all.

    For predictions that are linear in features of the query it is the cosine of their sensitivities to those features in the metric of
    the features' second moments. Where x is a scalar it tells more than the cosine of the sensitivities to x, the agreement of two signs.

    Examples
    --------
    >>> from causal_probe import mechanisms, models, tasks
    >>> task = tasks.LinearRegression(d_x=2, n_examples=4)
    >>> [descent, _] = mechanisms.reference_algorithms(task)
    >>> batch = task.sample(2, tasks.generator(0, "sequences"))
    >>> function_cosine(models.gradient_steps(2, 4, eta=descent.descent.eta), descent, task, batch, queries=8).round(decimals=3)
    tensor([1., 1.])
    """
    at = task.sample(queries, generator(0, "queries"), dtype=batch.x.dtype).x_query
    found = []
    for x_query in at:
        here = x_query.expand(len(batch.x), -1)
        found.append((model.predict(task.tokens(batch.x, batch.y, here)), algorithm.predict(batch.x, batch.y, here)))
    ours, theirs = (torch.stack(each, 1).flatten(1) for each in zip(*found, strict=True))
    return torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
