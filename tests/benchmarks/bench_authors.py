"""The authors' own code (Nichani, Damian & Lee 2024, JAX) beside ours, in one run on one machine.

``AUTHORS_CODE`` names a clone of their repository, ``AUTHORS_PYTHON`` a Python that has what its ``catformer`` and ``problems`` import (jax
and simple-pytree): ``AUTHORS_CODE=../theirs AUTHORS_PYTHON=../env/bin/python make bench ARGS="-k authors -s"``. Without them this is
skipped. Theirs runs in a process of its own, compiled before it is timed, with as many threads as JAX takes; ours with as many as torch
takes. Both sample 1,024 sequences and make a step of plain gradients on them, each seven times in turns; medians are printed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from causal_probe import graphs
from causal_probe.models import DisentangledTransformer
from causal_probe.tasks import InContextMarkov, generator
from causal_probe.training import fit
from causal_probe.training.stages import Stage

CODE, PYTHON = (os.environ.get(name) for name in ("AUTHORS_CODE", "AUTHORS_PYTHON"))
BATCH_SIZE = 1024
ROUNDS = 7
SETTINGS = {
    "S=3, T=20": (InContextMarkov(graphs.random_forest(19, seed=0), 3, 0.1), (1, 1)),
    "S=10, T=20": (InContextMarkov(graphs.random_forest(19, seed=0), 10, 0.1), (1, 1)),
    "two parents, S=5, T=32": (InContextMarkov(graphs.two_parent_tree(33), 5, 0.1), (2, 1)),
}

#: Their sampler and their model, called as their notebooks do; a line of JSON comes for each line that is read.
THEIRS = """
import contextlib, io, json, sys, time
import jax
from jax import numpy as jnp, random
setting = json.loads(sys.argv[1])
sys.path.insert(0, setting["code"])
from catformer import CatFormer
from problems import InContextDAG, InContextTree
with contextlib.redirect_stdout(io.StringIO()):
    if setting["tree"]:
        problem = InContextTree(setting["vocab"], jnp.array([its[0] if its else -1 for its in setting["parents"]]), setting["alpha"])
    else:
        problem = InContextDAG(setting["vocab"], setting["parents"], setting["alpha"])
draw = jax.jit(lambda key: jax.vmap(problem.sample)(random.split(key, setting["batch"])))
loss = lambda model, x, y: -(jnp.log(model(x)) * y).sum(-1).mean()
step = jax.jit(lambda model, x, y: jax.tree_util.tree_map(lambda w, g: w - g, model, jax.grad(loss)(model, x, y)))
model = CatFormer(setting["positions"], setting["vocab"], setting["heads"])
key = random.PRNGKey(0)
for _ in sys.stdin:
    key, mine = random.split(key)
    began = time.perf_counter()
    x, y = jax.block_until_ready(draw(mine))
    drawn = time.perf_counter()
    model = jax.block_until_ready(step(model, x, y))
    print(json.dumps([drawn - began, time.perf_counter() - drawn]), flush=True)
"""


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@pytest.mark.skipif(
    CODE is None or PYTHON is None, reason="AUTHORS_CODE and AUTHORS_PYTHON name no clone and no Python with JAX"
)
@pytest.mark.parametrize("name", SETTINGS)
def test_beside_the_authors_code(name: str) -> None:
    task, heads = SETTINGS[name]
    setting: dict[str, Any] = {
        "code": CODE, "tree": task.is_tree, "vocab": task.d_vocab, "positions": task.n_positions, "alpha": task.concentration,
        "parents": task.parents, "heads": heads, "batch": BATCH_SIZE,
    }  # fmt: skip
    model, source = DisentangledTransformer(task.d_vocab, task.n_positions, heads), generator(0, "bench")
    stage = Stage("step", 1, BATCH_SIZE, "sgd", 1.0, ("A0", "A1", "W_U"))
    fit(model, task, [stage], generator=source)
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    with subprocess.Popen(
        [str(PYTHON), "-c", THEIRS, json.dumps(setting)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(ROUNDS + 2):
            print(file=process.stdin, flush=True)
            line = process.stdout.readline()
            assert line, "their process ended: see its error above"
            if number >= 2:  # the first compiles, the second compiles for the model that the first gave
                drawing, stepping = json.loads(line)
                theirs.append((drawing, drawing + stepping))
                ours.append(
                    (
                        seconds(lambda: task.sample(BATCH_SIZE, source)),
                        seconds(lambda: fit(model, task, [stage], generator=source)),
                    )
                )
        process.stdin.close()
    print(f"\n{name}, batch {BATCH_SIZE:,}, medians of {ROUNDS}:")
    for what, its, others in zip(
        ("sampling", "step with its sampling"), zip(*ours, strict=True), zip(*theirs, strict=True), strict=True
    ):
        a, b = statistics.median(its), statistics.median(others)
        print(f"  {what}: {1e3 * a:.1f} ms, the authors' {1e3 * b:.1f} ms: {b / a:.1f} times")
