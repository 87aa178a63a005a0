"""What `causal-probe recover` costs, whole, and two of its parts beside themselves: edge tests beside the same by hooks, a compiled step beside one that is not.

``python tests/benchmarks/bench_recover.py default|long|two-parent`` prints the CPU seconds of the command, ``step`` those of a compiled step beside
one that is not (the checks of types that tests bring can't be compiled, so it is no test); `make bench` compares the edge tests.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from causal_probe import graphs, models, tasks
from causal_probe.probes import edge_effects
from causal_probe.training import task_loss
from causal_probe.training.loss import compile_step, step_loss

#: Options of the command.
COMMANDS = {
    "default": [],
    "long": ["--n-positions", "64"],
    "two-parent": ["--graph", "two-parent", "--n-positions", "32", "--d-vocab", "5", "--heads", "2,1", "--compiled"],
}
CALL = "from causal_probe.cli import main; main()"


def whole(name: str) -> float:
    """CPU seconds of the command, its imports and its report included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["recover", *COMMANDS[name], "--out", f"{folder}/out"]
        subprocess.run([sys.executable, "-W", "ignore", "-c", CALL, *arguments], check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@pytest.mark.parametrize("n_positions", [20, 64])
def test_edge_tests_beside_hooks(n_positions: int, benchmark: Any) -> None:
    """A model that solves the task of a random forest, 4,096 sequences."""
    truth = graphs.random_forest(n_positions - 1, seed=0)
    task = tasks.InContextMarkov(truth, 3, 0.1)
    model = models.hand_set(truth, 3, match_scale=8.0, output_scale=4.0)
    batches = [task.sample(1024, tasks.generator(0, "probe")) for _ in range(4)]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return task_loss(model.predict(batch.tokens), batch.target)

    def by_rows(model: Any, batch: Any, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return task_loss(model.predict_by_rows(batch.tokens, head=0, queries=queries, rows=rows), batch.target)

    def tested(short_cut: Any) -> Any:
        redraw = task.redraw
        assert redraw is not None
        generator = tasks.generator(0, "redrawing")
        return edge_effects(
            model, batches, loss, layer=0, head=0, candidates=truth, losses_by_rows=short_cut,
            redraw=lambda batch, child, edges: redraw(batch, child, edges, generator),
        )  # fmt: skip

    def pair() -> tuple[float, float]:
        return cpu(lambda: tested(by_rows)), cpu(lambda: tested(None))

    pair()
    fast, slow = benchmark.pedantic(pair, rounds=1)
    assert tested(by_rows).gain == pytest.approx(tested(None).gain, abs=1e-5)
    print(f"\nedge tests, T = {n_positions}: {fast / slow:.2f} of the same by hooks ({fast:.2f} and {slow:.2f} CPU s)")
    assert fast < slow


def compiled_step() -> None:
    """A compiled step beside one that is not: two parents, five states, 32 positions, two heads, 512 sequences."""
    task = tasks.InContextMarkov(graphs.choose_graph("two-parent", n_positions=32, seed=0), 5, 0.1)
    model = models.DisentangledTransformer(5, 32, heads=(2, 1))
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    batch = task.sample(512, tasks.generator(0, "training"))

    def steps(loss: Any, n: int = 50) -> None:
        for _ in range(n):
            found = loss(batch.tokens, batch.target, model.A, model.W_U, False)
            torch.autograd.grad(found, list(model.parameters()))

    fast = compile_step()
    begin = cpu(lambda: steps(fast, 1))
    pairs = [(cpu(lambda: steps(fast)), cpu(lambda: steps(step_loss))) for _ in range(5)]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    print(
        f"a compiled step: {ratio:.2f} of one that is not ({20 * pairs[-1][1]:.1f} CPU ms), median of 5 pairs; {begin:.0f} CPU s to compile"
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or ["step", *COMMANDS]:
        if name == "step":
            compiled_step()
        else:
            print(f"recover, {name}: {whole(name):.1f} CPU s", flush=True)
