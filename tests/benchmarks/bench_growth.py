"""How the cost of a scan grows: `python tests/benchmarks/bench_growth.py`, or with `make bench`.

One thing at a time is doubled, twice, from a random model of GPT-2's kind with 4 layers of 4 heads of width 32, 32 sequences of 64 tokens and 4 templates. Printed
are CPU seconds, and the exponent p of what they grow as, size^p, beside that of the model's own forwards on the same sequences; and the peak memory of a
fresh process for sequences and templates.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from causal_probe.hooks import to_hooked
from causal_probe.probes import offset, scan

START = {"layers": 4, "heads": 4, "tokens": 64, "sequences": 32, "templates": 4}
WIDTH = 32  # of a head
ROUNDS = 3

MEMORY = """
    import json, sys
    from tests.benchmarks.bench_growth import START, made, scanned
    size = START | json.loads(sys.argv[1])
    scanned(made(size), size)()
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(line.split()[1]) / 1024)
"""


def made(size: dict[str, int]) -> Any:
    torch.manual_seed(0)
    shape = {"n_layer": size["layers"], "n_head": size["heads"], "n_embd": WIDTH * size["heads"]}
    config = GPT2Config(vocab_size=512, n_positions=1024, bos_token_id=0, eos_token_id=0, **shape)
    return to_hooked(GPT2LMHeadModel(config).eval())


def tokens_of(size: dict[str, int]) -> torch.Tensor:
    half = torch.randint(512, (size["sequences"], size["tokens"] // 2), generator=torch.Generator().manual_seed(0))
    return half.repeat(1, 2)


def scanned(model: Any, size: dict[str, int]) -> Callable[[], object]:
    templates = [offset(k) for k in range(1, 1 + size["templates"])]
    return lambda: scan(model, tokens_of(size), templates=templates, batch_size=16)


def forwards(model: Any, size: dict[str, int]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            for batch in tokens_of(size).split(16):
                model(batch)

    return run


def seconds(run: Callable[[], object]) -> float:
    """The least of some rounds, after one that is not counted."""
    times = []
    for _ in range(1 + ROUNDS):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times[1:])


def megabytes(changed: dict[str, int]) -> float:
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), json.dumps(changed)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def grows(what: str) -> tuple[float, float]:
    """The exponents of a scan and of the forwards alone; the seconds are printed."""
    sizes = [START[what] * factor for factor in (1, 2, 4)]
    found: dict[str, list[float]] = {"scan": [], "forwards": []}
    for each in sizes:
        size = START | {what: each}
        model = made(size)
        found["scan"].append(seconds(scanned(model, size)))
        found["forwards"].append(seconds(forwards(model, size)))
    power = {name: float(np.polyfit(np.log(sizes), np.log(times), 1)[0]) for name, times in found.items()}
    shown = ", ".join(f"{each} {scan_time:.3f} s" for each, scan_time in zip(sizes, found["scan"], strict=True))
    print(
        f"{what}: {shown}; as size^{power['scan']:.2f}, the forwards alone as size^{power['forwards']:.2f}", flush=True
    )
    return power["scan"], power["forwards"]


@pytest.mark.parametrize("what", START)
def test_a_scan_grows_as_its_forwards(what: str) -> None:
    """With templates, on which no forward depends, by less than their number."""
    own, model = grows(what)
    assert own < (0.7 if what == "templates" else model + 0.3)


@pytest.mark.parametrize("what", ["sequences", "templates"])
def test_memory_does_not_grow(what: str) -> None:
    few, many = megabytes({}), megabytes({what: 16 * START[what]})
    print(f"peak memory, 16 times as many {what}: {few:.0f} and {many:.0f} MiB")
    assert many - few < 40


if __name__ == "__main__":
    for name in START:
        grows(name)
    for name in ("sequences", "templates"):
        test_memory_does_not_grow(name)
