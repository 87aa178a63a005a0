"""The circuit of a behaviour in a model, end to end: load the model, make or read prompts, find the circuit, write the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from causal_probe.circuits import Circuit, find_circuit, prompt_circuit, prune_nodes, read_prompts, task_prompts
from causal_probe.circuits.nodes import NodeCircuit
from causal_probe.circuits.prompts import read_lines
from causal_probe.experiments.opening import model_settings, open_model
from causal_probe.experiments.saving import kept
from causal_probe.options import takes
from causal_probe.options.circuit import PROMPT_TASKS, CircuitOptions

__all__ = ["model_circuit"]

KEEP = 0.8


@takes(CircuitOptions)
def model_circuit(model: Any, o: CircuitOptions) -> Circuit | NodeCircuit:
    """Find what carries a behaviour: edges (:func:`causal_probe.circuits.find_circuit`), or one answer's (:func:`causal_probe.circuits.prompt_circuit`), each with its test; or nodes (:func:`causal_probe.circuits.prune_nodes`).

    Raises
    ------
    CausalProbeError
        If the task's words are not tokens of the model, a file's prompts can't be used, the model does not do the task, or can't be taken apart.
    """
    hooked, about = model_settings(model, o)
    settings = o.settings(**about, contrast=o.replaced_by, **_of_nodes(o))
    with kept(o, settings, Circuit) as saved:
        if hooked is None:
            hooked, _ = open_model(model, dtype=o.dtype, device=o.device)
        found = _one_prompt(hooked, o) if o.text is not None else _of_prompts(hooked, o)
        return saved(dataclasses.replace(found, settings={**found.settings, **settings}))


def _of_prompts(model: Any, o: CircuitOptions) -> Circuit | NodeCircuit:
    if o.task in PROMPT_TASKS:
        prompts = task_prompts(model, o.task, n=o.n_prompts, seed=o.seed, bos=o.bos)
    else:
        prompts = read_prompts(model, o.task, bos=o.bos)
    if o.strategy == "nodes":
        its: dict[str, Any] = {"contrast": o.replaced_by, "seed": o.seed, "progress": o.progress}
        return prune_nodes(model, prompts, **its, **_of_nodes(o))
    return find_circuit(model, prompts, **_tests(o))


def _of_nodes(o: CircuitOptions) -> dict[str, Any]:
    """What the strategy nodes takes where nothing is given."""
    if o.strategy != "nodes":
        return {}
    return {"keep": KEEP if o.keep is None else o.keep, "metric": o.metric or "logit-difference"}


def _one_prompt(model: Any, o: CircuitOptions) -> Circuit:
    others = None if o.baselines is None else [line for _, line in read_lines(Path(o.baselines))]
    its: dict[str, Any] = {"baselines": others, "n_baselines": o.n_prompts, "bos": o.bos, **_tests(o)}
    return prompt_circuit(model, str(o.text), str(o.answer), () if o.wrong is None else o.wrong, **its)


def _tests(o: CircuitOptions) -> dict[str, Any]:
    names = ("metric", "level", "delta", "correction", "most", "sampled", "seed", "progress")
    return {"contrast": o.replaced_by, **{name: getattr(o, name) for name in names}}
