"""What staged training begins with where nodes have several parents: the graph that gradients of the untrained model show."""

from __future__ import annotations

from causal_probe.experiments.gradient_slots import gradient_slots
from causal_probe.models import DisentangledTransformer
from causal_probe.tasks import InContextMarkov, generator
from causal_probe.training import give_slots

__all__ = ["give_gradient_graph"]

#: Sequences for the gradients, and entries of a batch of tokens.
SEQUENCES = 2**17
AT_ONCE = 2**17


def give_gradient_graph(model: DisentangledTransformer, task: InContextMarkov, *, seed: int) -> tuple[str, ...]:
    """Set what staged training starts from (:func:`~causal_probe.training.give_slots`); return it in words.

    Where the gradients show as many parents of the predicted node as layer 0 has heads, each head begins with the parents in its slot, and stage 1
    finds the graph written. Otherwise only the query positions are set, and stage 1 learns it.

    Raises
    ------
    CausalProbeError
        If the model does not have two layers, or does not fit the task.
    """
    source = generator(seed, "gradient")
    at_once = max(1, AT_ONCE // task.n_positions)
    found = gradient_slots(task.sample(min(at_once, SEQUENCES - done), source) for done in range(0, SEQUENCES, at_once))
    slots = generator(seed, "slots", device=model.W_U.device)
    if len(found.queries) != model.heads[0]:
        return give_slots(model, task, generator=slots)
    given = give_slots(model, task, generator=slots, graph=found.graph)
    return (f"layer 0 begins with what gradients of the untrained model show, over {SEQUENCES:,} sequences", *given)
