"""Discover the graph over the tokens of one input, head by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import PurePath
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from causal_probe.arguments import Help, Level, checked
from causal_probe.discovery.fci import fci
from causal_probe.discovery.icd import icd, ordered_icd
from causal_probe.discovery.independence import FisherZ
from causal_probe.discovery.pc import pc
from causal_probe.discovery.search import Learned
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.batches import is_row, read_tokens
from causal_probe.hooks.check import HookedModel, describe, no_surface
from causal_probe.hooks.heads import parse_head
from causal_probe.hooks.preflight import context_length
from causal_probe.hooks.read import layer_index, read_layer
from causal_probe.hooks.record import token_batches
from causal_probe.hooks.tokens import token_text
from causal_probe.probes.attention_correlation import Correlation, attention_correlation, output_correlation
from causal_probe.probes.discovered_graphs import AttentionGraph, Discovery

__all__ = ["Algorithm", "discover_from_attention", "learn"]

Algorithm = Literal["pc", "fci", "icd", "ordered-icd"]

LEARNERS: dict[str, Callable[..., Learned]] = {"pc": pc, "icd": icd, "ordered-icd": ordered_icd}


@checked
def discover_from_attention(
    model: Any,
    tokens: Any,
    *,
    layer: int | str = -1,
    head: int | Literal["all", "mean"] = "all",
    algorithm: Algorithm | None = None,
    level: Level = 0.01,
    samples: Annotated[int, Help("", least=4)] | Literal["auto"] = "auto",
    source: Literal["attention", "values"] = "attention",
    residual: float = 0.0,
    groups: Sequence[Sequence[int]] | None = None,
    texts: Sequence[str] | None = None,
    stable: bool = True,
    max_order: int | None = None,
    max_tests: int = 5_000_000,
) -> Discovery:
    """Attention-based causal discovery (ABCD): one graph for each head, over the tokens of one input.

    The head's pattern A is read as the structure of a linear model with latent causes: C = A A^T are the covariances of the tokens'
    outputs (:func:`attention_correlation`), and a constraint-based learner finds the graphs that agree with them. An edge says what
    the learner could not explain away at ``level``. It is a reading of where the head looks; that the model *uses* it is
    another question, for :func:`~causal_probe.probes.explain` and :func:`~causal_probe.probes.verify`.

    Parameters
    ----------
    model
        Any TransformerLens model, causal or not, or a Hugging Face model, classifiers among them. Patterns are only read, nothing is
        edited at a hook: so hooks that are decorative, as BERT's are, don't matter here.
    tokens
        [pos] or [1, pos]: one input, taken as it is.
    layer
        Counted from 0, or from the end where negative; or one head of it, as ``"L5H3"``. The paper takes the last layer.
    head
        A number, ``"all"``, or ``"mean"``: the average of the layer's patterns (outputs are put side by side). That is ours, not the paper's.
    algorithm
        ``"ordered-icd"`` (the order of the tokens is the causal order; the default where no token attends to a later one), ``"icd"``
        (the paper's, the default elsewhere), ``"pc"`` (no latent causes), ``"fci"`` (causal-learn's, a cross-check).
    level
        Level of the tests, in (0, 1).
    samples
        How many samples the correlations count as. ``"auto"``: the width of the model, as in the paper; with ``source="values"``
        d_head (times the number of heads for ``"mean"``). It is a convention: it sets which correlations count as zero.
    source
        ``"attention"``: A A^T. ``"values"``: the correlation of the heads' outputs, which has the head's values in it and may escape
        the singularity of A A^T.
    residual
        In [0, 1): the share of each token's own value that is counted beside what it attends to, for the residual stream that passes
        the head by; see :func:`attention_correlation`. Ours; zero, the default, is the paper's reading.
    groups
        The nodes, as groups of positions: tokens can be merged into words, and left out (marginalised). By default each token.
    texts
        The tokens' labels; by default the tokenizer's, or their numbers.
    stable, max_order, max_tests
        See :func:`~causal_probe.discovery.icd`.

    Returns
    -------
    Discovery
        Graphs, separating sets, p-values and the number of tests.

    Raises
    ------
    CausalProbeError
        If an argument is out of range, there are no tokens or more than the model takes, or a pattern is not made of probabilities.

    References
    ----------
    Rohekar, Gurwicz & Nisimov, "Causal interpretation of self-attention in pre-trained Transformers", NeurIPS 2023.

    Examples
    --------
    >>> from causal_probe.models import DisentangledTransformer
    >>> model = DisentangledTransformer(d_vocab=5, n_positions=6, heads=(1,))
    >>> _ = model.block(0, 0, query="position", key="position").diagonal(-1).fill_(1)
    >>> discover_from_attention(model, torch.tensor([0, 3, 1, 4, 2, 0]), samples=100)
    Discovery on disentangled-transformer: layer 0, 1 graph over 6 nodes, ordered-icd at level 0.01 with 100 samples
      graph  edges  -->  <->  o->  o-o  tests  undefined
      L0H0       6    3    0    3    0     55          0
    """
    row = _one_input(model, tokens)
    if isinstance(layer, str):
        layer, head = parse_head(layer, None if head == "all" else head)
    layer = layer_index(model, layer)
    patterns = read_layer(model, row, layer)
    heads = _heads(head, len(patterns))
    values = read_layer(model, row, layer, what="z") if source == "values" else patterns
    if head == "mean":
        values = values.mean(dim=0, keepdim=True) if source == "attention" else torch.cat(list(values), dim=-1)[None]
    else:
        values = values[[each for each in heads if each is not None]]
    count = _samples(model, samples, None if source == "attention" else values.shape[-1])
    chosen = algorithm or ("icd" if bool(patterns.triu(1).any()) else "ordered-icd")
    if residual and source == "values":
        raise CausalProbeError(
            "The residual stream is counted beside attention; with source='values' leave residual at 0."
        )
    measure = partial(attention_correlation, residual=residual) if source == "attention" else output_correlation
    graphs = []
    for number, value in zip(heads, values, strict=True):
        found = measure(value, groups=groups)
        learned = learn(
            found, chosen, samples=count, level=level, stable=stable, max_order=max_order, max_tests=max_tests
        )
        graphs.append(AttentionGraph.of(layer, number, found, learned))
    return Discovery(
        texts=_texts(model, row, texts),
        groups=graphs[0].correlation.groups,
        graphs=tuple(graphs),
        settings={
            "tokens": row[0].tolist(),
            "layer": layer,
            "head": head,
            "algorithm": chosen,
            "level": level,
            "samples": count,
            "source": source,
            "residual": residual,
            "groups": None if groups is None else [list(group) for group in groups],
            "stable": stable,
            "max_order": max_order,
            "max_tests": max_tests,
        },
        provenance=_describe(model),
    )


def learn(
    correlation: Correlation,
    algorithm: str,
    *,
    samples: int,
    level: float = 0.01,
    stable: bool = True,
    max_order: int | None = None,
    max_tests: int = 5_000_000,
) -> Learned:
    """Run one learner on correlations: ``"pc"``, ``"icd"``, ``"ordered-icd"`` or ``"fci"``."""
    test = FisherZ(correlation.matrix, samples=samples, level=level, tolerance=correlation.tolerance, remember=False)
    if algorithm == "fci":
        return fci(test, max_order=max_order)
    return LEARNERS[algorithm](test, stable=stable, max_order=max_order, max_tests=max_tests)


def _one_input(model: Any, tokens: Any) -> Tensor:
    if not isinstance(model, HookedModel) and not hasattr(model, "config"):
        raise CausalProbeError(no_surface(model))
    if isinstance(model, HookedModel):
        one = (isinstance(tokens, (Tensor, np.ndarray)) and tokens.ndim == 1) or is_row(tokens)
        tokens = torch.cat(
            list(token_batches(read_tokens(model, torch.as_tensor(tokens)[None] if one else tokens, one=True)))
        )
    try:
        row = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CausalProbeError(f"The tokens can't be read as numbers: {error}") from error
    row = row[None] if row.ndim == 1 else row
    if row.ndim != 2 or len(row) != 1 or row.is_floating_point():
        raise CausalProbeError(
            f"One input is tokens [pos] or [1, pos]; found the shape {list(row.shape)} of {row.dtype}."
        )
    if row.shape[1] == 0:
        raise CausalProbeError("The text has no tokens. Give at least one.")
    config: Any = getattr(model, "cfg", None) or getattr(model, "config", None)
    limit = (
        context_length(model) if isinstance(model, HookedModel) else getattr(config, "max_position_embeddings", None)
    )
    if limit is not None and row.shape[1] > limit:
        raise CausalProbeError(f"The text has {row.shape[1]} tokens and the model takes {limit}. Shorten the text.")
    vocabulary = getattr(config, "d_vocab", None) or getattr(config, "vocab_size", None)
    vocabulary = int(vocabulary or row.max() + 1)
    if row.min() < 0 or row.max() >= vocabulary:
        raise CausalProbeError(f"Tokens are numbers from 0 to {vocabulary - 1}; found {row.min()} to {row.max()}.")
    return row


def _heads(head: Any, n: int) -> list[int | None]:
    if head == "mean":
        return [None]
    if head == "all":
        return list(range(n))
    if isinstance(head, bool) or not isinstance(head, (int, np.integer)) or not 0 <= head < n:
        raise CausalProbeError(f"Head {head!r} was asked for; the layer has the heads 0..{n - 1}, or all, or mean.")
    return [int(head)]


def _samples(model: Any, samples: Any, width: int | None) -> int:
    if samples == "auto":
        config: Any = getattr(model, "cfg", None) or getattr(model, "config", None)
        return width or int(getattr(config, "d_model", 0)) or int(getattr(config, "hidden_size", 0))
    return int(samples)


def _texts(model: Any, row: Tensor, texts: Sequence[str] | None) -> tuple[str, ...]:
    if texts is not None:
        if len(texts) != row.shape[1]:
            raise CausalProbeError(f"There are {row.shape[1]} tokens and {len(texts)} texts. Give one for each.")
        return tuple(map(str, texts))
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return tuple(map(str, row[0].tolist()))
    return tuple(token_text(tokenizer, token) for token in row[0].tolist())


def _describe(model: Any) -> dict[str, Any]:
    if isinstance(model, HookedModel):
        return dict(describe(model))
    return {
        "model": PurePath(model.config.name_or_path).name or type(model).__name__,
        "dtype": str(model.dtype),
        "device": str(model.device),
    }
