"""The circuit of a behaviour in a model, end to end: load the model, make or read prompts, find the circuit, write the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from causal_probe.circuits import Circuit, find_circuit, prompt_circuit, read_prompts, task_prompts
from causal_probe.circuits.prompts import read_lines
from causal_probe.experiments.opening import model_settings, open_model
from causal_probe.experiments.saving import kept
from causal_probe.options import takes
from causal_probe.options.circuit import PROMPT_TASKS, CircuitOptions

__all__ = ["model_circuit"]


@takes(CircuitOptions)
def model_circuit(model: Any, o: CircuitOptions) -> Circuit:
    """Find the edges that carry a behaviour (:func:`causal_probe.circuits.find_circuit`), or one answer (:func:`causal_probe.circuits.prompt_circuit`), each with its test.

    Raises
    ------
    CausalProbeError
        If the task's words are not tokens of the model, a file's prompts can't be used, the model does not do the task, or can't be taken apart.
    """
    hooked, about = model_settings(model, o)
    settings = o.settings(**about)
    with kept(o, settings, Circuit) as saved:
        if hooked is None:
            hooked, _ = open_model(model, dtype=o.dtype, device=o.device)
        names = ("metric", "contrast", "level", "delta", "correction", "most", "sampled", "seed", "progress")
        shared = {name: getattr(o, name) for name in names}
        if o.text is not None:
            others = None if o.baselines is None else [line for _, line in read_lines(Path(o.baselines))]
            wrong = () if o.wrong is None else o.wrong
            its = {"baselines": others, "n_baselines": o.n_prompts, "bos": o.bos, **shared}
            found = prompt_circuit(hooked, o.text, str(o.answer), wrong, **its)
        else:
            if o.task in PROMPT_TASKS:
                prompts = task_prompts(hooked, o.task, n=o.n_prompts, seed=o.seed, bos=o.bos)
            else:
                prompts = read_prompts(hooked, o.task, bos=o.bos)
            found = find_circuit(hooked, prompts, **shared)
        return saved(dataclasses.replace(found, settings={**found.settings, **settings}))
