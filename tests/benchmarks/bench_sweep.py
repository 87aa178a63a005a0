"""What a sweep costs beside its cells: cells per minute with one and two workers, overhead per cell, memory over 1,000 cells.

Numbers stand in ``extra_info`` and are printed. Cells per minute are wall-clock and suffer from what else the machine does.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from causal_probe import experiments
from causal_probe.experiments.sweep import Outcome

GRADIENT = {"graph": "forest", "positions": 16, "sequences": 8192}


def nothing(*, seed: int, a: int) -> Outcome:
    """A cell of 20 rows that computes nothing."""
    return Outcome([{"layer": 0, "head": head, "score": float(a)} for head in range(20)], {})


def cells_per_minute(folder: Path, jobs: int, cells: int = 40) -> float:
    warm: dict[str, Any] = {"probes": "gradient", "grid": {"seed": [1000, 1001]}, "settings": GRADIENT}
    experiments.sweep(warm, out=folder / f"warm{jobs}", jobs=jobs)  # processes start and import once
    spec = {**warm, "grid": {"seed": list(range(cells))}}
    start = time.perf_counter()
    experiments.sweep(spec, out=folder / f"jobs{jobs}", jobs=jobs)
    return 60 * cells / (time.perf_counter() - start)


def test_cells_per_minute(benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = cells_per_minute(tmp_path, 1)
    two = benchmark.pedantic(lambda: cells_per_minute(tmp_path, 2), rounds=1)
    found = {"one worker": round(one), "two workers": round(two), "efficiency": round(two / (2 * one), 2)}
    benchmark.extra_info.update(found)
    with capsys.disabled():
        print(f"\ncells per minute: {found}")


def test_overhead_and_memory_over_a_thousand_cells(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = psutil.Process()

    def run(cells: int, name: str) -> None:
        spec = {"probes": "nothing", "grid": {"a": list(range(cells))}}
        experiments.sweep(spec, out=tmp_path / name, probes={"nothing": nothing})

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
