"""Whole circuits: which edges carry a behaviour, prompts that ask for one, and models whose every edge is known."""

from causal_probe.circuits.check_truth import check_truth
from causal_probe.circuits.compiled import compiled_circuit
from causal_probe.circuits.find_circuit import find_circuit
from causal_probe.circuits.found import Circuit
from causal_probe.circuits.known import KnownCircuit
from causal_probe.circuits.named import known_circuit, known_circuits
from causal_probe.circuits.next_scores import next_scores
from causal_probe.circuits.one_prompt import prompt_circuit
from causal_probe.circuits.prompt_tasks import task_prompts
from causal_probe.circuits.prompts import Prompts, read_prompts
from causal_probe.circuits.prune_nodes import prune_nodes
from causal_probe.circuits.published import published
from causal_probe.circuits.random_planted import random_circuit

__all__ = [
    "Circuit",
    "KnownCircuit",
    "Prompts",
    "check_truth",
    "compiled_circuit",
    "find_circuit",
    "known_circuit",
    "known_circuits",
    "next_scores",
    "prompt_circuit",
    "prune_nodes",
    "published",
    "random_circuit",
    "read_prompts",
    "task_prompts",
]


def __dir__() -> list[str]:
    return [*__all__]
