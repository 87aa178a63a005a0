"""What scan, verify and a circuit cost on a large model on a GPU: `python tests/benchmarks/bench_gpu.py llama-8b qwen-32b`.

The models have the shapes of Llama-3.1-8B and Qwen3-32B and random weights, in bfloat16: what is timed does not depend on the weights, and what is found means
nothing. Seconds by the wall, after a first call that is not counted; the peak is that of the GPU's memory.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from causal_probe.circuits import Prompts, find_circuit
from causal_probe.hooks import to_hooked
from causal_probe.probes import Rule, next_token, scan, verify
from causal_probe.probes.measures import Measured

MORE: dict[str, Any] = {"attn_implementation": "eager", "tie_word_embeddings": False}
#: By name: the kind, then vocabulary, width, width of an MLP, layers, heads, heads of keys and values.
SHAPES: dict[str, tuple[str, tuple[int, int, int, int, int, int]]] = {
    "tiny": ("llama", (512, 64, 128, 4, 8, 4)),
    "llama-8b": ("llama", (128_256, 4096, 14_336, 32, 32, 8)),
    "qwen-32b": ("qwen3", (151_936, 5120, 25_600, 64, 64, 8)),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(shape: str) -> Any:
    kind, (vocabulary, width, mlp, layers, heads, key_heads) = SHAPES[shape]
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    per_head = max(16, width // heads) if kind == "llama" else 128
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": per_head}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            if kind == "llama":
                model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **MORE))
            else:
                model = Qwen3ForCausalLM(Qwen3Config(**sizes, **MORE))
    finally:
        torch.set_default_dtype(torch.float32)
    return to_hooked(model.eval(), name=shape)


def timed(what: str, run: Callable[[], Any]) -> Any:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else 0.0
    print(f"  {what}: {seconds:.2f} s, peak {peak:.1f} GiB", flush=True)
    return found


def measure(logits: torch.Tensor, batch: Any) -> Measured:
    """The next token's loss, without the question whether the model does the task: random weights do none."""
    return dataclasses.replace(next_token()(logits, batch), without={})


def main(shapes: list[str]) -> None:
    for shape in shapes:
        print(f"{shape} on {torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'cpu'}", flush=True)
        model = timed("made and hooked, with its check", lambda: make(shape))  # noqa: B023
        generator = torch.Generator().manual_seed(0)
        half = torch.randint(0, model.cfg.d_vocab, (32, 50), generator=generator)
        tokens = torch.cat([half, half], 1)
        with torch.no_grad():
            model(tokens[:4].to(DEVICE))
            timed("one forward of 32 sequences of 100 tokens", lambda: model(tokens.to(DEVICE)))  # noqa: B023
        scores = timed("probes.scan of them, all templates", lambda: scan(model, tokens))  # noqa: B023
        # The heads whose excess is among the largest of the random ones are taken for flagged.
        excess = np.sort([each.excess - 8 * each.excess_stderr for each in scores if each.template == "induction"])
        rule = Rule(minimum_excess=float(excess[-8]))
        found = timed(
            "probes.verify, defaults",
            lambda: verify(scores, model, templates=["induction"], measure=measure, rule=rule),  # noqa: B023
        )
        print(f"    {len(found.verdicts)} flagged, {found.settings['forwards']} forwards")
        with torch.no_grad():  # what the model says by itself is the answer: it falls surely when all is ablated
            said = model(half[:24, :20].to(DEVICE))[:, -1].argmax(-1).cpu()
        prompts = Prompts("said", half[:24, :20], (19,), said[:, None, None])
        circuit = timed(
            "find_circuit, 400 edges on 24 sequences of 20 tokens",
            lambda: find_circuit(model, prompts, "log-probability", sizes=1),  # noqa: B023
        )
        print(f"    {len(circuit.edges)} edges tested")
        del model, scores, found, circuit


if __name__ == "__main__":
    main(sys.argv[1:] or ["llama-8b"])
