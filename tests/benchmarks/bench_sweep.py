"""What a sweep costs beside its cells: cells per minute with one and two workers, overhead per cell, memory over 1,000 cells.

Numbers stand in ``extra_info`` and are printed. Cells per minute are wall-clock and suffer from what else the machine does. Two
processes may not be twice as fast as one on a machine at all (two threads of one core, shared caches), so the same cells are also run in bare
processes, without a sweep: *efficiency* is the rate of two workers over twice that of one, and it is to be read beside that of the
machine.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from causal_probe.sweep import Outcome, sweep

#: Cells of about a second.
GRADIENT = {"graph": "forest", "n_positions": 16, "n_sequences": 2**18}
CELLS = 24

#: Every ``jobs``-th cell from ``first`` on, once a line has come in; the first is to warm up.
BARE = """
import sys
import torch
from causal_probe.sweep.cells import PROBES
torch.set_num_threads(1)
first, jobs, cells, options = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
PROBES["gradient"](seed=1000, **options)
print("ready", flush=True)
sys.stdin.readline()
for seed in range(first, cells, jobs):
    PROBES["gradient"](seed=seed, **options)
print("done", flush=True)
"""


def nothing(*, seed: int, a: int) -> Outcome:
    """A cell of 20 rows that computes nothing."""
    return Outcome([{"layer": 0, "head": head, "score": float(a)} for head in range(20)], {})


def cells_per_minute(folder: Path, jobs: int) -> float:
    """Of a sweep whose workers have been started and have imported everything."""
    warm: dict[str, Any] = {
        "probes": "gradient",
        "grid": {"seed": [1000 + i for i in range(2 * jobs)]},
        "settings": GRADIENT,
    }
    sweep(warm, out=folder / f"warm{jobs}", jobs=jobs)
    spec = {**warm, "grid": {"seed": list(range(CELLS))}}
    start = time.perf_counter()
    sweep(spec, out=folder / f"jobs{jobs}", jobs=jobs)
    return 60 * CELLS / (time.perf_counter() - start)


def bare_cells_per_minute(jobs: int) -> float:
    """Of as many processes that run the same cells, and write nothing."""
    command = [sys.executable, "-W", "ignore", "-c", BARE]
    processes = [
        subprocess.Popen(
            [*command, str(first), str(jobs), str(CELLS), repr(GRADIENT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in range(jobs)
    ]
    pipes = [(process.stdin, process.stdout) for process in processes]
    for _, answer in pipes:
        assert answer is not None
        assert answer.readline() == "ready\n"
    start = time.perf_counter()
    for go, _ in pipes:
        assert go is not None
        go.write("\n")
        go.flush()
    for _, answer in pipes:
        assert answer is not None
        assert answer.readline() == "done\n"
    rate = 60 * CELLS / (time.perf_counter() - start)
    for process in processes:
        process.communicate()
    return rate


def test_cells_per_minute(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = [bare_cells_per_minute(jobs) for jobs in (1, 2)]
    one = cells_per_minute(tmp_path, 1)
    two = benchmark.pedantic(lambda: cells_per_minute(tmp_path, 2), rounds=1)
    found = {
        "one worker": round(one),
        "two workers": round(two),
        "efficiency": round(two / (2 * one), 2),
        "one bare process": round(bare[0]),
        "two bare processes": round(bare[1]),
        "the machine's own efficiency": round(bare[1] / (2 * bare[0]), 2),
    }
    benchmark.extra_info.update(found)
    with capsys.disabled():
        print(f"\ncells per minute: {found}")


def test_overhead_and_memory_over_a_thousand_cells(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = psutil.Process()

    def run(cells: int, name: str) -> None:
        spec = {"probes": "nothing", "grid": {"a": list(range(cells))}}
        sweep(spec, out=tmp_path / name, probes={"nothing": nothing})

    run(100, "warm")
    before, start = process.memory_info().rss, time.process_time()
    benchmark.pedantic(lambda: run(1000, "thousand"), rounds=1)
    found = {
        "CPU ms per cell": round(time.process_time() - start, 2),  # seconds per 1,000 cells are milliseconds per cell
        "growth in MiB": round((process.memory_info().rss - before) / 2**20, 1),
    }
    benchmark.extra_info.update(found)
    with capsys.disabled():
        print(f"\noverhead over 1,000 cells: {found}")
