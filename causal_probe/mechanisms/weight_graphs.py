"""Which block of the weights holds the graph, and how much skill does each block carry?

The disentangled transformer's stream is a concatenation, so every block of a query-key matrix A has one meaning: it joins one part
of the stream, at the query, with one part, at the key. Where both parts run over positions, the block is a candidate graph, in two
directions:

- **as it stands**, A[child, parent]: "at this child, look at its parent". Layer 0's (position, position) block holds the graph
  of the paper's construction in this way;
- **transposed**, A[parent, child]: "from this parent, go to its child". A block of layer 1 may hold it, whose query part says at
  which positions something was found.

Not every entry acts. Adding a constant to a row changes no attention, so rows are taken about their mean; and entries whose query
position lies before the key position are masked, so blocks whose query part is ``position`` have no transposed graph.

What a block is *worth* is what the loss rises by when it is set to zero, as a share of the in-context skill: the loss of the
in-context unigram predictor minus the model's. That asks whether the block is *needed*. Shares of blocks that work together don't
add up, because a circuit of two blocks is lost with either, and a share may exceed 1: what is left of the model was made to go
with the block. Nor is a hole without content: with the graph's block at zero every node copies the average of its past, which the rest
of the model may be helped by (its parent is one of few) or misled by (a chain's past holds everything else as well). So two more
questions are asked. **Does it matter which?** (``scrambled``): every row's entries are moved to other keys that the row can see, at
random, so that the block keeps its values, and its softmax its sharpness, and only what it says about *which* key is lost; the graph's
block holds another graph then, in which every parent is a wrong one. A share above 1 says that this is worse than no graph, the unigram predictor's.
And is the block **enough** for its layer: how much of the skill is left when all other blocks of the layer are set to zero (``alone``)?
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.hooks.check import describe
from causal_probe.mechanisms.weight_result import BlockGraph, Direction, WeightGraphs
from causal_probe.models import DisentangledTransformer
from causal_probe.results import digest
from causal_probe.tasks import Batch, InContextMarkov, cross_entropy, generator, sample_batches
from causal_probe.tasks.predictors import in_context_unigram
from causal_probe.training import task_loss

__all__ = ["weight_graphs"]

#: Fresh sequences on which ablations are measured, and how many at once.
SEQUENCES = 2**14
MICRO_BATCH = 2048
#: How often a block is scrambled, each time on as large a part of the sequences.
SCRAMBLES = 128
#: Family-wise level at which a block is said to hold the graph.
LEVEL = 1e-3


@checked
def weight_graphs(
    model: DisentangledTransformer,
    task: InContextMarkov,
    *,
    n_sequences: int = SEQUENCES,
    seed: int = 0,
    level: float = LEVEL,
) -> WeightGraphs:
    """Read every block of every A as a graph, compare it with the true one, and ablate it.

    Parameters
    ----------
    model
        Any disentangled transformer of the task's shape; it is left as it is.
    task
        The task that the model was trained on: its graph is the truth, over the children 0..T-2.
    n_sequences, seed
        Number of fresh sequences on which ablations are measured, the same ones for all, and their seed.
    level
        Family-wise level at which a block is said to hold the graph, over all blocks and both directions (Holm).

    Raises
    ------
    CausalProbeError
        If model and task differ in shape, or fewer than two sequences are asked for.

    Examples
    --------
    >>> from causal_probe import graphs, models, tasks
    >>> task = tasks.InContextMarkov(graphs.chain(5), d_vocab=3, concentration=0.1)
    >>> model = models.hand_set(graphs.chain(5), 3, match_scale=8.0, output_scale=4.0)
    >>> found = weight_graphs(model, task, n_sequences=256)
    >>> found.blocks[0].layer, found.blocks[0].query, found.blocks[0].key
    (1, 'position', 'position')
    """
    if (model.d_vocab, model.n_positions) != (task.d_vocab, task.n_positions):
        raise CausalProbeError(
            f"The task has {task.d_vocab} states and {task.n_positions} positions; the model has {model.d_vocab} and "
            f"{model.n_positions}. Give the task that the model was trained on."
        )
    if n_sequences < 2:
        raise CausalProbeError(f"Ablations can't be compared on {n_sequences} sequences; at least 2 are needed.")
    if not 0 < level < 1:
        raise CausalProbeError(f"A level lies between 0 and 1; it is {level}.")
    device = model.W_U.device
    batches = list(
        sample_batches(task, n_sequences, generator(seed, "weight graphs", device=device), batch_size=MICRO_BATCH)
    )
    losses = _losses(model, batches)
    skill = np.concatenate(
        [cross_entropy(in_context_unigram(task, b.tokens), b.target).double().cpu().numpy() for b in batches]
    )
    skill -= losses
    parts = np.array_split(np.arange(len(losses)), min(SCRAMBLES, len(losses)))
    skill_of_parts = np.array([skill[part].mean() for part in parts])

    ablated = copy.deepcopy(model)
    blocks = []
    for (layer, head, query, key), block in model.named_blocks().items():
        hole = ablated.block(layer, head, query=query, key=key)
        costs = np.zeros_like(losses)
        scrambled = np.zeros(len(parts))
        if bool(block.any()):
            source = generator(seed, f"scrambling {layer} {head} {query} {key}", device=device)
            for number, part in enumerate(parts):
                hole.copy_(_scramble(block, query, key, source))
                scrambled[number] = (_losses(ablated, [_rows(batches, part)]) - losses[part]).mean()
            hole.zero_()
            costs = _losses(ablated, batches) - losses
        ablated.A[layer].data.zero_()
        hole.copy_(block)
        lost, alone_stderr = _share(_losses(ablated, batches) - losses, skill)
        ablated.A[layer].data.copy_(model.A[layer])
        matrix = block.detach().double().cpu().numpy()
        share, share_stderr = _share(costs, skill)
        scrambled_share, scrambled_stderr = (None, None) if share is None else _share(scrambled, skill_of_parts)
        blocks.append(
            BlockGraph(
                layer=layer,
                head=head,
                query=query,
                key=key,
                matrix=matrix,
                as_it_stands=_direction(matrix, query, key, task, transposed=False),
                transposed=_direction(matrix, query, key, task, transposed=True),
                identity=_identity(matrix, query, key),
                cost=float(costs.mean()),
                stderr=float(costs.std(ddof=1) / np.sqrt(len(costs))),
                share=share,
                share_stderr=share_stderr,
                scrambled=scrambled_share,
                scrambled_stderr=scrambled_stderr,
                alone=None if lost is None else 1 - lost,
                alone_stderr=alone_stderr,
            )
        )
    return WeightGraphs(
        blocks=tuple(sorted(blocks, key=lambda block: -block.cost)),
        loss=float(losses.mean()),
        skill=float(skill.mean()),
        skill_stderr=float(skill.std(ddof=1) / np.sqrt(len(skill))),
        truth=task.graph,
        children=tuple(task.children),
        settings={
            "n_sequences": n_sequences,
            "seed": seed,
            "level": level,
            "ablation": "zero",
            "heads": list(model.heads),
            # The model and the graph have no names: so that another one's result is told from this one.
            "edges": [list(edge) for edge in task.graph.edges],
            "weights": digest(*(A.detach().cpu().numpy() for A in model.A)),
        },
        provenance=describe(model),
    )


def leading_parents(matrix: Float[np.ndarray, "query key"], *, transposed: bool) -> tuple[int | None, ...]:
    """By child: the earlier position that leads in the block, rows about their mean; None for node 0 and where several tie.

    >>> leading_parents(np.array([[0, 0, 0], [5, 0, 0], [0, 4, 0.0]]), transposed=False)
    (None, 0, 1)
    """
    centred = matrix - matrix.mean(1, keepdims=True)
    entries = centred.T if transposed else centred
    found: list[int | None] = [None]
    for child in range(1, len(entries)):
        past = entries[child, :child]
        first = int(past.argmax())
        found.append(None if (past == past[first]).sum() > 1 else first)
    return tuple(found)


def chance_of(parents: Sequence[tuple[int, ...]], right: int) -> float:
    """The probability that at least ``right`` leading parents are true ones, if each child's leads at random.

    Child c has c candidates, and each of its k parents is one of them: a success with probability k / c, independently. (The
    Poisson-binomial law, by convolution.)

    >>> round(chance_of([(), (0,), (0,), (2,)], 2), 3)    # 1, 1/2, 1/3: 1 - P(only the first) = 1 - 1/2 * 2/3
    0.667
    """
    law = np.ones(1)
    for child, its in enumerate(parents):
        if its:
            p = len(its) / child
            law = np.convolve(law, [1 - p, p])
    return float(min(1.0, law[right:].sum()))


def _direction(
    matrix: Float[np.ndarray, "query key"], query: str, key: str, task: InContextMarkov, *, transposed: bool
) -> Direction | None:
    """The block as a graph; None where it is none, because a part holds tokens, entries are masked, or all are equal."""
    if not (query.endswith("position") and key.endswith("position")) or (transposed and query == "position"):
        return None
    leading = leading_parents(matrix, transposed=transposed)
    if all(parent is None for parent in leading[2:]):
        return None
    truth = [task.parents[child] for child in task.children]
    n_slots = max(map(len, truth), default=0)
    right = tuple(
        sum(len(its) > slot and leading[child] == its[slot] for child, its in enumerate(truth))
        for slot in range(n_slots)
    )
    return Direction(
        parents=leading,
        right=right,
        edges=tuple(sum(len(its) > slot for its in truth) for slot in range(n_slots)),
        children=sum(map(bool, truth)),
        chance=sum(len(its) / child for child, its in enumerate(truth) if its),
        p_value=chance_of(truth, sum(right)),
    )


def _identity(matrix: Float[np.ndarray, "query key"], query: str, key: str) -> float | None:
    """Correlation of a token-by-token block, rows about their mean, with the identity; None for others and without spread."""
    if not (query.endswith("token") and key.endswith("token")):
        return None
    centred = matrix - matrix.mean(1, keepdims=True)
    eye = np.eye(len(matrix)) - 1 / len(matrix)
    norm = np.linalg.norm(centred)
    return float((centred * eye).sum() / norm / np.linalg.norm(eye)) if norm > 0 else None


def _scramble(
    block: Float[Tensor, "query key"], query: str, key: str, source: torch.Generator
) -> Float[Tensor, "query key"]:
    """The block with each row's entries moved around a random cycle of the keys that it can see, so that none stays where it was.

    Position i sees the positions up to i, everything else sees all keys; a row that sees one key stays as it is.
    """
    order = torch.rand(block.shape, generator=source, device=block.device)
    seen = torch.full((len(block), 1), block.shape[1], device=block.device)
    if query == key == "position":
        order += torch.ones_like(order).triu(1)  # masked entries stay behind the others
        seen = torch.arange(1, len(block) + 1, device=block.device)[:, None]
    order = order.argsort(1)
    place = torch.arange(block.shape[1], device=block.device).expand_as(block)
    following = torch.where(place < seen, (place + 1) % seen, place)
    return torch.empty_like(block).scatter_(1, order, block.gather(1, order).gather(1, following))


def _rows(batches: Sequence[Batch], rows: Int[np.ndarray, " row"]) -> Batch:
    """Some of the sequences, counted across batches."""
    at = torch.as_tensor(rows, device=batches[0].tokens.device)
    return Batch(torch.cat([b.tokens for b in batches])[at], torch.cat([b.target for b in batches])[at], {})


def _share(
    costs: Float[np.ndarray, " sequence"], skill: Float[np.ndarray, " sequence"]
) -> tuple[float | None, float | None]:
    """Mean cost over mean skill, and its standard error to first order; None where the model has no skill to be shared."""
    mean = skill.mean()
    if mean <= 2 * skill.std(ddof=1) / np.sqrt(len(skill)):
        return None, None
    share = float(costs.mean() / mean)
    return share, float((costs - share * skill).std(ddof=1) / np.sqrt(len(skill)) / mean)


@torch.no_grad()
def _losses(model: DisentangledTransformer, batches: Sequence[Batch]) -> Float[np.ndarray, " sequence"]:
    losses: list[Tensor] = [task_loss(model.predict(batch.tokens), batch.target) for batch in batches]
    return torch.cat(losses).double().cpu().numpy()
