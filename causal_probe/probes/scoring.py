"""Score patterns against templates, batch by batch: the engine under :func:`~causal_probe.probes.scan`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from causal_probe.errors import CausalProbeError
from causal_probe.hooks import HookedModel, describe, each_batch
from causal_probe.hooks.patterns import attention_on_nothing, given_patterns, row_slack
from causal_probe.hooks.stream import Rows, Visit, visit_patterns
from causal_probe.probes.head_scores import HeadScores
from causal_probe.probes.targets import compile_targets
from causal_probe.probes.template_sums import TemplateSums
from causal_probe.probes.templates import TEMPLATES, Template, find_templates

__all__ = ["Part", "Scored", "micro_batch_size", "micro_batches", "score_batches", "score_patterns", "settings_of"]

#: Without a batch size, what a micro-batch's patterns of all layers, or its logits, take up at most, in bytes: some models keep
#: all patterns for the length of a forward.
MICRO_BATCH = 2**28


@dataclass(frozen=True, eq=False)
class Part:
    """Templates that are scored on the same sequences."""

    templates: tuple[Template, ...]
    tokens: Any
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Scored:
    """The sums by template, and the shared targets of pairs of them."""

    sums: dict[str, TemplateSums]
    shared: dict[tuple[str, str], int]


def score_batches(
    model: HookedModel,
    templates: tuple[Template, ...],
    batches: Any,
    queries: Sequence[int] | None,
    batch_size: int | None,
) -> Scored:
    """Run a model over batches of tokens, once, and score every head's patterns at their hooks."""
    sums = _Sums(templates, queries)
    pieces = micro_batches(model, batches) if batch_size is None else batches
    visit_patterns(model, pieces, sums.add, batch_size=batch_size, undo=sums.undo)
    return sums.scored()


def micro_batch_size(model: HookedModel, pos: int) -> int:
    """How many sequences of ``pos`` tokens a forward pass takes by default, at least 1.

    The rule: float32 patterns of all layers, and logits, fit into 256 MiB on a CPU, where more is no faster (and results are the same
    on every machine), and into a quarter of the free memory of a GPU (what torch holds and doesn't use counts as free), the rest
    being for the forward pass itself.
    """
    cfg = model.cfg
    per_layer = int(getattr(cfg, "n_heads", 1)) * pos * pos
    numbers = max(int(cfg.n_layers) * per_layer, pos * int(getattr(cfg, "d_vocab", 1)))
    device = torch.device(describe(model)["device"] or "cpu")
    room = MICRO_BATCH
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        room = (torch.cuda.mem_get_info(device)[0] + unused) // 4
    return max(1, room // (4 * numbers))


def score_patterns(
    patterns: Any,
    tokens: Int[Tensor, "batch pos"],
    templates: str | Template | Iterable[str | Template] = tuple(TEMPLATES),
    *,
    queries: Sequence[int] | None = None,
) -> HeadScores:
    """Score attention patterns that you have already, as :func:`scan` does.

    Parameters
    ----------
    patterns
        Of all layers, [batch, head, query, key]: a TransformerLens ``ActivationCache`` (or any mapping with its names,
        ``blocks.{layer}.attn.hook_pattern``), or a list with one tensor or array for each layer, as from nnsight,
        ``output_attentions``, or NumPy.
    tokens
        The tokens that they were made on.
    templates, queries
        As for :func:`scan`.

    Raises
    ------
    CausalProbeError
        If a template is unknown or returns something else, the patterns don't fit the tokens, their rows don't sum to one or less, or
        they look ahead.

    Examples
    --------
    >>> import torch
    >>> previous = torch.eye(4).roll(1, 0).tril()
    >>> previous[0, 0] = 1
    >>> score_patterns([previous.expand(2, 1, 4, 4)], torch.randint(9, (2, 4)), "previous-token").of(0, 0, "previous-token").score
    1.0
    """
    wanted = find_templates(templates)
    tokens = torch.as_tensor(tokens)
    n_pos = tokens.shape[1]
    given = given_patterns(patterns)
    if wrong := [
        list(its.shape) for its in given.values() if its.shape[:1] + its.shape[2:] != (len(tokens), n_pos, n_pos)
    ]:
        raise CausalProbeError(
            f"Patterns of {len(tokens)} sequences of {n_pos} tokens are [{len(tokens)}, head, {n_pos}, {n_pos}]; there are {wrong}."
        )
    attention_on_nothing(given)
    if ahead := [layer for layer, its in given.items() if bool((its.triu(1) > row_slack(its.dtype)).any())]:
        raise CausalProbeError(
            f"The patterns of layer {ahead[0]} attend to later positions. Templates are about earlier ones: give those of a causal model."
        )
    sums = _Sums(wanted, queries)
    score = sums.add(tokens)
    for layer, pattern in given.items():
        score(layer, pattern)
    scored = sums.scored()
    first = next(iter(given.values()))
    return HeadScores(
        templates=wanted,
        sums=scored.sums,
        shared=scored.shared,
        settings=settings_of([Part(wanted, tokens, {"kind": "given"})], queries),
        provenance={
            "model": "patterns",
            "dtype": str(first.dtype).removeprefix("torch."),
            "device": str(first.device),
        },
    )


def settings_of(parts: Sequence[Part], queries: Sequence[int] | None) -> dict[str, Any]:
    """What a result says of how it came about."""
    tokens = [{"templates": [template.name for template in part.templates], **part.settings} for part in parts]
    return {"queries": None if queries is None else list(queries), "tokens": tokens}


def micro_batches(model: HookedModel, batches: Any) -> Iterator[Any]:
    """The batches, in pieces of :func:`micro_batch_size`."""
    for batch in each_batch(batches):
        tokens = getattr(batch, "tokens", batch)
        if isinstance(tokens, Tensor) and tokens.ndim == 2:
            yield from torch.split(tokens, micro_batch_size(model, tokens.shape[1]))
        else:
            yield batch  # what is wrong with it is said where it is run


class _Sums:
    """The raw sums of every sequence, written as the batches pass."""

    def __init__(self, templates: tuple[Template, ...], queries: Sequence[int] | None) -> None:
        self._templates = templates
        self._queries = queries
        self._sequences = 0
        self._rows, self._chance = Rows(), Rows()
        self._attention: defaultdict[int, Rows] = defaultdict(Rows)
        self._sink: defaultdict[int, Rows] = defaultdict(Rows)
        self._shared = np.zeros((len(templates), len(templates)), dtype=np.int64)

    def add(self, tokens: Tensor) -> Visit:
        """Add the targets of a batch; returns what adds a layer's pattern on it."""
        groups = compile_targets(self._templates, tokens, queries=self._queries)
        self._before = self._sequences, self._shared.copy()
        start = self._sequences
        self._sequences += len(tokens)
        self._rows.write(start, _joined([targets.rows for targets in groups]))
        self._chance.write(start, _joined([targets.chance.double() for targets in groups]))
        for targets in groups:
            self._shared += targets.shared.cpu().numpy()

        def add_pattern(layer: int, pattern: Tensor) -> None:
            parts = torch.split(pattern, [len(targets.pairs) for targets in groups])
            pairs = list(zip(groups, parts, strict=True))
            self._attention[layer].write(start, _joined([targets.attention(part).float() for targets, part in pairs]))
            self._sink[layer].write(start, _joined([targets.sink(part).float() for targets, part in pairs]))

        return add_pattern

    def undo(self) -> None:
        """Take back the last batch; the next ones are written over what is left of it."""
        self._sequences, self._shared = self._before

    def scored(self) -> Scored:
        """What was added, by template."""
        layers = sorted(self._attention)
        attention, sink = ([of[layer].array for layer in layers] for of in (self._attention, self._sink))
        rows, chance = self._rows.array, self._chance.array
        names = [template.name for template in self._templates]
        return Scored(
            {
                name: TemplateSums(
                    attention=tuple(layer[..., i] for layer in attention),
                    sink=tuple(layer[..., i] for layer in sink),
                    rows=rows[:, i],
                    chance=chance[:, i],
                )
                for i, name in enumerate(names)
            },
            {(one, other): int(self._shared[i, j]) for i, one in enumerate(names) for j, other in enumerate(names)},
        )


def _joined(tensors: Sequence[Tensor]) -> NDArray[Any]:
    joined: NDArray[Any] = torch.cat(list(tensors)).cpu().numpy()
    return joined
