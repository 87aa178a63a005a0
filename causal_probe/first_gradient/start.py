"""The start of staged training where nodes have several parents: the graph shown by gradients of the untrained model."""

from __future__ import annotations

from causal_probe.first_gradient.batches import SEQUENCES_OF_SEVERAL, batches_of
from causal_probe.first_gradient.slots import gradient_slots
from causal_probe.models import DisentangledTransformer
from causal_probe.tasks import Task, generator
from causal_probe.training.slots import give_slots

__all__ = ["GRAPH_OF_GRADIENTS", "give_gradient_graph"]

#: The first words of the returned text where layer 0 begins with the graph.
GRAPH_OF_GRADIENTS = "layer 0 begins with what gradients of the untrained model show"


def give_gradient_graph(model: DisentangledTransformer, task: Task, *, seed: int) -> tuple[str, ...]:
    """Set what staged training starts from (:func:`~causal_probe.training.slots.give_slots`); return it in words.

    Where the gradients show as many parents of the predicted node as layer 0 has heads, each head begins with the parents in its slot, and stage 1
    finds the graph written. Otherwise only the query positions are set, and stage 1 learns it.

    Raises
    ------
    CausalProbeError
        If the model does not have two layers, or the task has too many states for :func:`gradient_slots` (its held-out sequences are kept in memory).
    """
    found = gradient_slots(batches_of(task, SEQUENCES_OF_SEVERAL, generator(seed, "gradient")))
    slots = generator(seed, "slots", device=model.W_U.device)
    if len(found.queries) != model.heads[0]:
        return give_slots(model, task, generator=slots)
    given = give_slots(model, task, generator=slots, graph=found.graph)
    return (f"{GRAPH_OF_GRADIENTS}, over {SEQUENCES_OF_SEVERAL:,} sequences", *given)
