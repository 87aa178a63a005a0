"""What a scan costs: against TransformerLens' detect_head, against the model's own forward, and in memory.

Times are CPU seconds of this process, so that what else the machine does hardly matters; the ratios stand in ``extra_info``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from causal_probe.hooks import to_hooked
from causal_probe.hooks.record import run_layers
from causal_probe.probes import TEMPLATES, scan

HEAD_TYPES = ("previous_token_head", "duplicate_token_head", "induction_head")
BATCH = 16


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A random model of GPT-2 small's shape: 12 x 12 heads, d_model 768."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: Any = to_hooked(GPT2LMHeadModel(GPT2Config()), name="random-gpt2")
    model.to_tokens = parse  # detect_head takes text
    return model


def parse(text: str | list[str]) -> torch.Tensor:
    """Text here is ids with spaces between."""
    return torch.tensor([[int(token) for token in row.split()] for row in ([text] if isinstance(text, str) else text)])


def repeated(model: Any, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.cfg.d_vocab, (BATCH, length // 2), generator=generator).repeat(1, 2)


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def bench(benchmark: Any, run: Callable[[], object], *, rounds: int) -> float:
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1 if rounds > 1 else 0)
    return float(benchmark.stats.stats.min)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("length", [128, 512])
def test_against_detect_head(benchmark: Any, gpt2: Any, length: int) -> None:
    """All shipped templates in one scan, against three calls of detect_head, on the same 16 sequences."""
    from transformer_lens.head_detector import detect_head

    tokens = repeated(gpt2, length)
    texts = [" ".join(map(str, row)) for row in tokens.tolist()]
    ours = bench(benchmark, lambda: scan(gpt2, tokens, templates=TEMPLATES), rounds=3 if length == 128 else 1)
    with torch.no_grad():
        theirs = cpu_seconds(lambda: [detect_head(gpt2, texts, head_type) for head_type in HEAD_TYPES])
    benchmark.extra_info.update(detect_head_seconds=theirs, times_faster=theirs / ours, templates=len(TEMPLATES))
    assert theirs / ours >= 4


@pytest.mark.benchmark(timer=time.process_time)
def test_overhead_over_the_bare_forward(benchmark: Any, gpt2: Any) -> None:
    """At the same micro-batch: over the model's forward, and over one that is stopped where the scan stops it."""
    tokens = repeated(gpt2, 128)
    ours = bench(benchmark, lambda: scan(gpt2, tokens, templates=TEMPLATES, batch_size=BATCH), rounds=4)
    with torch.no_grad():
        whole = min(cpu_seconds(lambda: gpt2(tokens)) for _ in range(4))
        stopped = min(cpu_seconds(lambda: run_layers(gpt2, tokens, gpt2.cfg.n_layers)) for _ in range(4))
    benchmark.extra_info.update(
        forward_seconds=whole, stopped_seconds=stopped, overhead=ours / whole, overhead_over_stopped=ours / stopped
    )
    assert ours / whole <= 1.15
    assert ours / stopped <= 1.15


MEMORY = """
    import json, sys
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from causal_probe.hooks import to_hooked
    from causal_probe.probes import TEMPLATES, offset, scan

    what, sequences, n_templates = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    shape = dict(vocab_size=512, n_positions=256, n_embd=96, n_layer=4, n_head=12)
    model = to_hooked(GPT2LMHeadModel(GPT2Config(**shape)))
    tokens = torch.randint(512, (sequences, 64)).repeat(1, 2)
    templates = [*TEMPLATES, *(offset(k) for k in range(1, 100))][:n_templates]
    if what == "scan":
        scan(model, tokens, templates=templates, batch_size=16)
    else:
        with torch.no_grad():
            for batch in tokens.split(16):
                model(batch)
    # Not ru_maxrss, which a process inherits from the one that starts it.
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps(int(line.split()[1]) / 1024))
"""


def peak(what: str, sequences: int, templates: int = 7) -> float:
    """Peak memory of a fresh process, in MiB (on Linux)."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), what, str(sequences), str(templates)]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def test_memory_grows_neither_with_sequences_nor_with_templates(benchmark: Any) -> None:
    """Peak memory above that of the model's own forward over the same sequences, at micro-batch 16."""

    def measure() -> dict[str, float]:
        above = {f"{n} sequences": peak("scan", n) - peak("forward", n) for n in (16, 128, 1024)}
        return {**above, "16 sequences, 50 templates": peak("scan", 16, 50) - peak("forward", 16)}

    found = benchmark.pedantic(measure, rounds=1)
    assert any(found.values()), "nothing was measured"
    benchmark.extra_info.update({f"MiB above the forward, {name}": round(value, 1) for name, value in found.items()})
    # What a process of torch takes differs by some 30 MiB from run to run; one forward keeps 50 MiB of patterns here, and the
    # patterns of 1,024 sequences would be 3 GiB. Their raw sums are 2.6 MiB: 48 heads x 7 templates x 2 sums x 4 bytes each.
    for name, above in found.items():
        assert above - found["16 sequences"] <= 60, name
