"""Circuits found where they are known, and levels where there is nothing to find: `python tests/benchmarks/bench_find_circuit.py known | planted | level | smollm2 | curves |
architectures`.

H0 of every edge: the mean fall of the metric is at most delta. Unit of replication: the prompt. Family: the tested edges of one run.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from causal_probe import circuits
from causal_probe.circuits import find_circuit
from causal_probe.circuits.contrasts import contrast_of
from causal_probe.circuits.interventions import Interventions, edges_of
from causal_probe.circuits.judging import judged
from causal_probe.circuits.partial import SIDES, Layers
from causal_probe.circuits.screen import attributions
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook, to_hooked
from causal_probe.hooks.check import undisturbed
from causal_probe.hooks.tokens import special_tokens
from causal_probe.models import load_model
from tests import tiny_huggingface as tiny
from tests.architectures import zoo
from tests.real_model import WHEEL, smollm2_folder

#: Drawn after the method was settled, on the first 15.
PLANTED = range(300, 400)


def known(names: list[str], n: int) -> None:
    """By contrast: true edges that are found, found edges that are not true, and those among them without any effect on any sequence."""
    for contrast in ("resample", "mean", "mean-by-position", "zero"):
        true = found = right = exact = n_circuits = 0
        wrong: list[str] = []
        for name in names:
            circuit = circuits.known_circuit(name)
            if contrast not in circuit.truth.graph["exact"]:
                continue
            tokens = circuit.sample(n, torch.Generator().manual_seed(1))
            result = find_circuit(circuit.model, tokens, circuit.metric, contrast=contrast, sizes=1)
            agreement = result.compare(circuit)
            extra = [
                edge for edge in agreement.extra if edge not in circuit.constant
            ]  # under zero constants have an effect, too
            n_circuits += 1
            true, found = true + len(circuit.edges(contrast)), found + len(result.members)
            right += len(circuit.edges(contrast)) - len(agreement.missing)
            exact += not extra and not agreement.missing
            wrong += [f"{name}: missing {agreement.missing}, extra {extra}"] if extra or agreement.missing else []
        if n_circuits:
            print(
                f"{contrast}: {n_circuits} circuits, {n} sequences; exact {exact}; {right} of {true} true edges found; {found} found",
                flush=True,
            )
            print("\n".join(f"  {each}" for each in wrong))


def level(runs: int, at: float = 0.05) -> None:
    """The difference of two answers with its sign drawn for each prompt: every edge's mean effect is 0. How many runs confirm any edge?"""
    generator = torch.Generator().manual_seed(5)
    false, p_values, tested = 0, [], 0
    for number in range(runs):
        if number % 10 == 0:  # another random model, of one of four kinds
            torch.manual_seed(number)
            kind = list(tiny.CAUSAL.values())[number // 10 % len(tiny.CAUSAL)]
            model = to_hooked(_drawn(kind(), number))
        tokens = torch.randint(3, tiny.D_VOCAB, (32, 8), generator=generator)
        answers = torch.randint(3, tiny.D_VOCAB, (32, 2), generator=generator)
        signs = 2.0 * torch.randint(0, 2, (32,), generator=generator) - 1

        def score(logits: Tensor, rows: Tensor, answers: Tensor = answers, signs: Tensor = signs) -> Tensor:
            at = logits[:, -1].gather(-1, answers[rows])
            return signs[rows] * (at[:, 0] - at[:, 1])

        with undisturbed(model):
            layers = Layers(model, tokens)
            clean = layers.clean(tokens)
            contrast = contrast_of("resample", layers, clean, None, frozenset(), generator)
            run = Interventions(layers, clean, contrast, score, torch.arange(32))
            edges = edges_of(layers, run.read)
            effects = run.effects(edges).cpu().numpy()
        found = judged(edges, effects, dict.fromkeys(edges, 0.0), set(), at, 0.0, "fdr")
        false += any(edge.status == "confirmed" for edge in found.values())
        tested += len(edges)
        one = int(torch.randint(len(edges), (), generator=generator))  # one of a run: others share its prompts
        p_values.append([float(stats.ttest_1samp(each, 0, alternative="greater").pvalue) for each in effects])
        p_values[-1].insert(0, p_values[-1][one])
    alone = stats.kstest([each[0] for each in p_values], "uniform")
    pooled = np.concatenate([each[1:] for each in p_values])
    shares = ", ".join(f"{np.mean(pooled <= q):.3f} at {q}" for q in (0.01, 0.05, 0.2, 0.5))
    print(
        f"level {at}: {false} of {runs} runs confirm an edge (at most {int(stats.binom.ppf(0.99, runs, at))} at 0.99); {tested} null edges"
    )
    print(
        f"p-values, one edge a run: Kolmogorov-Smirnov p = {alone.pvalue:.2f}; shares of all {len(pooled)} at most q: {shares}"
    )


def smollm2() -> None:
    """The induction circuit of SmolLM2: 48 prompts of repeated random tokens, 200 of its edges tested."""
    model = _smollm2()
    start = time.process_time()
    found = find_circuit(model, circuits.task_prompts(model, "induction", n=48), most=200)
    print(found, *found.sizes, f"{time.process_time() - start:.0f} CPU s", sep="\n")


def curves() -> None:
    """By contrast, the share of the metric's fall that the n edges of the largest estimates keep alone, on prompts that the estimates have not seen."""
    model = _smollm2()
    for task in ("ioi", "induction"):
        prompts = circuits.task_prompts(model, task, n=24)
        for name in ("corrupted", "resample"):
            with undisturbed(model):
                layers = Layers(model, prompts.tokens)

                def run_on(
                    rows: Tensor, name: str = name, layers: Layers = layers, prompts: circuits.Prompts = prompts
                ) -> Interventions:
                    assert prompts.corrupted is not None
                    clean, broken = layers.clean(prompts.tokens[rows]), layers.clean(prompts.corrupted[rows])
                    generator = torch.Generator().manual_seed(0)
                    made = contrast_of(name, layers, clean, broken, special_tokens(model).ids, generator)
                    return Interventions(layers, clean, made, prompts.score(), rows)

                estimates = {edge: float(each.sum()) for edge, each in attributions(run_on(torch.arange(12))).items()}
                run = run_on(torch.arange(12, 24))
                edges = edges_of(layers, run.read)
                order = sorted(edges, key=lambda edge: -estimates[edge])
                baseline = run.without(edges)
                kept = []
                for size in (100, 300, 1_000, 3_000, 10_000):
                    values = run.without(edges, but=order[:size])
                    kept.append(f"{size} {float((values - baseline).mean() / (run.before - baseline).mean()):.2f}")
            print(f"{task}, {name}: kept by {', '.join(kept)}", flush=True)


def architectures() -> None:
    """On tiny random models: which receivers there are, and whether what is pinned stays as it is."""
    counts = {"all": 0, "MLPs and logits": 0, "refused": 0}
    for name, architecture in zoo.ARCHITECTURES.items():
        try:
            model, tokens = zoo.hooked(architecture)[1], zoo.tokens(2, 10)
            with undisturbed(model):
                layers = Layers(model, tokens)
                clean = layers.clean(tokens)
                for layer, z in clean.z.items():
                    out = f"blocks.{layer}.hook_attn_out"
                    own, other = (
                        layers.run(tokens, start=layer, stream=stream, puts=puts, names=[out], until=layer + 1)[0].get(
                            out
                        )
                        for stream, puts in (
                            (clean.streams[layer], {}),
                            (
                                clean.streams[layer] * 1.5 + 1,
                                {attention_hook(layer, "z"): lambda value, z=z: z.to(value)},
                            ),
                        )
                    )
                    assert own is None or other is None or torch.allclose(own, other, rtol=1e-3, atol=1e-4), (
                        name,
                        layer,
                    )
            whole = all(its == SIDES for its in layers.attends.values())
        except CausalProbeError as error:
            counts["refused"] += 1
            print(f"  {name}: {str(error)[:120]}")
            continue
        counts["all" if whole else "MLPs and logits"] += 1
        if not whole:
            print(f"  {name}: attention is no receiver")
    print(f"{len(zoo.ARCHITECTURES)} architectures: {counts}")


def _smollm2() -> Any:
    folder = smollm2_folder()
    if folder is None:
        raise SystemExit(f"Install {WHEEL} first.")
    return to_hooked(*load_model(folder))


def _drawn(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


if __name__ == "__main__":
    what = sys.argv[1]
    torch.set_num_threads(1)
    if what == "known":
        known(list(circuits.known_circuits()), 192)
    elif what == "planted":
        known([f"planted-{seed}" for seed in PLANTED], 192)
    elif what == "level":
        level(200, 0.05)
        level(200, 0.2)
    elif what == "smollm2":
        smollm2()
    elif what == "architectures":
        architectures()
    elif what == "curves":
        curves()
    else:
        raise SystemExit(__doc__)
