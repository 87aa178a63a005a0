"""What a verification costs, and whether it says what it says after all ablations: `python tests/benchmarks/bench_verify.py planted | random | smollm2`.

Each model is verified twice on the same sequences: as by default, and exhaustively. CPU seconds of this process, one after the other.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from causal_probe.hooks import to_hooked
from causal_probe.models import DisentangledTransformer, load_model
from causal_probe.probes import Rule, next_token, scan, verify
from causal_probe.probes.measures import Measured
from tests.real_model import smollm2_folder


def both(name: str, model: Any, scores: Any, **options: Any) -> None:
    found, seconds = [], []
    for exhaustive in (False, True):
        start = time.process_time()
        found.append(verify(scores, model, exhaustive=exhaustive, **options))
        seconds.append(time.process_time() - start)
    quick, whole = (each.verdicts for each in found)
    assert quick, f"{name}: nothing was flagged"
    same = sum(one[:4] == other[:4] for one, other in zip(quick, whole, strict=True))
    kinds = {each.verdict for each in whole}
    forwards = [each.settings["forwards"] for each in found]
    print(
        f"{name}: {same} of {len(whole)} verdicts the same ({', '.join(sorted(kinds))}); {forwards[0]} of {forwards[1]} forwards, "
        f"{seconds[0]:.1f} of {seconds[1]:.1f} CPU s",
        flush=True,
    )


def planted() -> None:
    """Ideal induction heads, of which two stand in for one another, among heads that do nothing."""
    for induction in (1, 2, 3):
        model = DisentangledTransformer(d_vocab=24, n_positions=48, heads=[8, 16])
        model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
        for head in range(induction):
            model.block(1, head, query="token", key="L0H0.token").diagonal().fill_(30)
            model.output_block(f"L1H{head}.token").diagonal().fill_(9)
        scores = scan(model, templates=["previous-token", "induction"], period=20)
        both(f"planted, {induction} induction heads", model, scores, period=20)


def without_a_task(logits: torch.Tensor, batch: Any) -> Measured:
    found = next_token()(logits, batch)
    return Measured(found.loss, found.logit)


def random_models(seeds: range) -> None:
    """Six layers of twelve heads, width 384: the heads of largest excess are taken for flagged, and delta is of the size of their effects."""
    for seed in seeds:
        torch.manual_seed(seed)
        plain = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=2000, n_positions=64, n_embd=384, n_layer=6, n_head=12, bos_token_id=0, eos_token_id=0
            )
        )
        for name, parameter in plain.named_parameters():
            if parameter.ndim > 1 and "wpe" not in name:
                parameter.data = torch.randn_like(parameter) * 0.08
        model = to_hooked(plain.eval())
        scores = scan(model, templates=["previous-token", "duplicate-token", "induction"], period=16, n_sequences=64)
        least = float(np.quantile([each.excess - 4 * each.excess_stderr for each in scores], 0.98))
        rule = Rule(
            minimum_excess=least,
            level=0.3,
            delta=(0.0, 0.001, 0.1)[seed % 3],
            rank=(0.95, 0.5)[seed % 2],
            joint_rank=0.9,
        )
        both(
            f"random model {seed}",
            model,
            scores,
            measure=without_a_task,
            rule=rule,
            n_sequences=32,
            period=16,
            seed=seed,
        )


def smollm2() -> None:
    model = to_hooked(*load_model(str(smollm2_folder())))
    both("SmolLM2-135M", model, scan(model))


if __name__ == "__main__":
    part = sys.argv[1] if len(sys.argv) > 1 else "planted"
    {"planted": planted, "random": lambda: random_models(range(12)), "smollm2": smollm2}[part]()
