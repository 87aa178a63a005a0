"""What ``import causal_probe.probes`` costs beside torch and networkx, which it can't do without: CPU seconds, in turn, in processes of their own."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

PAIRS = 9
MOST = 1.3


def seconds(modules: str) -> float:
    code = f"import time; start = time.process_time(); import {modules}; print(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def test_probes_beside_torch_and_networkx(benchmark: Any) -> None:
    def run() -> list[tuple[float, float]]:
        return [(seconds("causal_probe.probes"), seconds("torch, networkx")) for _ in range(PAIRS)]

    run()  # once, so that the files are in memory
    pairs = benchmark.pedantic(run, rounds=1)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    print(f"\nimport causal_probe.probes: {ratio:.2f} of importing torch and networkx, median of {PAIRS} pairs")
    assert ratio <= MOST
