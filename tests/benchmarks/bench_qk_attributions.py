"""What it costs to take a head's scores apart: CPU seconds against the bare forward, and memory against the number of sequences."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_probe import probes
from causal_probe.hooks import to_hooked
from causal_probe.hooks.record import run_layers

LAYER = 18


@pytest.fixture(scope="module")
def llama() -> Any:
    """A random model of SmolLM2-135M's shape: 30 layers, 9 query and 3 key heads, d_model 576."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, intermediate_size=1536,
        vocab_size=4096, max_position_embeddings=512,
    )  # fmt: skip
    return to_hooked(LlamaForCausalLM(shape), name="random-llama")


def repeated(sequences: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 4096, (sequences, 64), generator=generator).repeat(1, 2)


@pytest.mark.benchmark(timer=time.process_time)
def test_one_head_on_sixteen_sequences(benchmark: Any, llama: Any) -> None:
    """181 sources, 16 sequences of 128 tokens; beside it the forward through the same layers."""
    tokens = repeated(16)
    benchmark.pedantic(lambda: probes.qk_attributions(llama, tokens, LAYER, 6, edges="induction", pairs=0), rounds=3)
    start = time.process_time()
    with torch.no_grad():
        for piece in torch.split(tokens, 4):
            run_layers(llama, piece, LAYER + 1)
    forward = time.process_time() - start
    benchmark.extra_info["seconds"] = round(benchmark.stats.stats.median, 1)
    benchmark.extra_info["forwards"] = round(benchmark.stats.stats.median / forward, 1)


@pytest.mark.benchmark(timer=time.process_time)
def test_memory_does_not_grow_with_sequences(benchmark: Any, llama: Any) -> None:
    """The peak of the process after 4, 16 and 64 sequences, in MiB."""
    peaks = {}

    def run() -> None:
        for sequences in (4, 16, 64):
            probes.qk_attributions(llama, repeated(sequences), LAYER, 6, edges="induction", pairs=0)
            (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            peaks[sequences] = int(line.split()[1]) // 1024

    benchmark.pedantic(run, rounds=1)
    benchmark.extra_info["peak MiB"] = peaks
