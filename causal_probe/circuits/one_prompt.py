"""What carries one answer to one prompt? Edges at single positions, each tested against other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from causal_probe.arguments import Count, Level, Seed
from causal_probe.circuits.contrasts import contrast_with
from causal_probe.circuits.found import Attention, Circuit
from causal_probe.circuits.interventions import Interventions, placed
from causal_probe.circuits.judging import split
from causal_probe.circuits.partial import Layers
from causal_probe.circuits.prompts import Prompts, Texts, prompts_of, token_ids
from causal_probe.circuits.three_parts import Asked, screen_test_report
from causal_probe.errors import CausalProbeError
from causal_probe.hooks import attention_hook
from causal_probe.hooks.batches import probe, read_tokens
from causal_probe.hooks.check import HookedModel, describe, undisturbed
from causal_probe.hooks.record import token_batches
from causal_probe.hooks.tokens import content_tokens, special_tokens, text_start, token_text

__all__ = ["prompt_circuit"]

RANDOM = "random tokens"
#: Attention below this is not shown between two positions of the circuit.
SHOWN = 0.02


@probe
def prompt_circuit(
    model: HookedModel,
    prompt: str | Prompts,
    answer: str | Sequence[str] = (),
    wrong: str | Sequence[str] = (),
    *,
    baselines: Any = None,
    n_baselines: Count = 36,
    metric: Literal["logit-difference", "log-probability", "probability-difference"] | None = None,
    contrast: Literal["resample", "corrupted"] = "resample",
    level: Level = 0.05,
    delta: float | None = None,
    correction: Literal["fdr", "family-wise"] = "fdr",
    most: Count = 100,
    sampled: Count = 10,
    sizes: Count = 4,
    bos: str = "auto",
    seed: Seed = 0,
    progress: bool = False,
) -> Circuit:
    """Find what carries one answer to one prompt: edges at single positions, with a test for each.

    The edge ``L16H0@5 -> L18H6.k@5`` is what head L16H0 writes at position 5 (from 0) and the keys of L18H6 read there. It is ablated by replacing that part, in that
    one input, by the part of the same source in another prompt, a *baseline*; all behind is computed anew.

    Estimand: the mean fall of the metric on this prompt over baselines. H0: at most ``delta``. Unit of replication: the baseline; one-sided t-test. Family: the
    tested edges. Nothing is said of other prompts: for that, give many to :func:`~causal_probe.circuits.find_circuit`. Baselines are split into three parts, to screen,
    to test and to report, as prompts are there.

    Parameters
    ----------
    model
        A causal model whose sources add to one stream.
    prompt
        Its text, without a space at its end; or :class:`~causal_probe.circuits.Prompts` of one prompt, which have their answers (for a model without a tokenizer).
    answer, wrong
        The right and, if wanted, wrong answers to the text, each one token: ``" Mary"``.
    baselines
        Other prompts: texts, or tokens [baseline, pos]. Of texts the first tokens are taken, as many as the prompt has; none may have fewer. None:
        ``n_baselines`` times random tokens that stand for text, behind what the prompt starts with (BOS).
    n_baselines
        How many random ones; no meaning where ``baselines`` are given.
    metric
        ``"logit-difference"`` (default where there are wrong answers), ``"log-probability"``, ``"probability-difference"``, all of the next token after the prompt.
    contrast
        ``"resample"``: a part is replaced by that at a position of the baseline drawn at random, position 0, special tokens and outlier positions neither taken nor
        replaced; ``"corrupted"``: by that at the same position, so that what depends on the position alone is in no circuit.
    level, delta, correction, most, sampled, sizes, seed, progress
        As of :func:`~causal_probe.circuits.find_circuit`.
    bos
        Whether a BOS token comes first: ``"yes"``, ``"no"``, or ``"auto"``, what the tokenizer does by itself.

    Returns
    -------
    Circuit
        With ``text``, the prompt's tokens, and ``attention``, by which the circuit's heads read other positions.

    Raises
    ------
    CausalProbeError
        As of :func:`~causal_probe.circuits.find_circuit`; and if an answer is not one token behind the prompt, a baseline is too short, or there are fewer than 24.

    Examples
    --------
    >>> from causal_probe import circuits
    >>> known = circuits.known_circuit("key-composition")
    >>> prompt = circuits.Prompts("copy", torch.tensor([[0, 3, 1, 2, 2, 3]]), (5,), torch.tensor([[[1]]]))
    >>> found = prompt_circuit(known.model, prompt, n_baselines=60)
    >>> ("L0H0@2", "L1H0.k@2") in found.confirmed, found.attention[-1][:3]
    (True, ('L1H0', 5, 2))
    """
    prompts, start = _asked(model, prompt, answer, wrong, bos)
    name = metric or ("log-probability" if prompts.wrong is None else "logit-difference")
    score, tokens = prompts.score(name), prompts.tokens
    beside = _baselines(model, baselines, tokens, len(start), n_baselines, bos, seed)
    asked = Asked(level, delta, correction, most, sampled, 0, sizes, seed, progress)
    parts, generator = split(len(beside), seed, "baselines"), torch.Generator().manual_seed(seed)
    with undisturbed(model):
        device = describe(model)["device"] or "cpu"
        tokens, beside = tokens.to(device), beside.to(device)
        layers, special = Layers(model, torch.cat([tokens, beside[:1]])), special_tokens(model).ids

        def runs(number: int) -> Interventions:
            rows = beside[parts[number].to(device)]
            clean, other = layers.clean(tokens.expand(len(rows), -1)), layers.clean(rows)
            made = contrast_with(contrast, layers, clean, other, special, generator)
            return Interventions(layers, clean, made, score, torch.zeros(len(rows), dtype=torch.long))

        found = screen_test_report(layers, runs, name, contrast, asked, by_position=True)
        attention = _attention(layers, tokens, found)
    settings = {
        **found.settings,
        "prompts": "one prompt",
        **{f"prompts_{key}": value for key, value in prompts.settings.items()},
        "replaced_by": RANDOM if baselines is None else "given baselines",
        "n_baselines": len(beside),
        "bos": bos,
    }
    tokenizer = getattr(model, "tokenizer", None)
    text = tuple(str(int(t)) if tokenizer is None else token_text(tokenizer, int(t)) for t in tokens[0])
    return replace(found, text=text, attention=attention, settings=settings, provenance=describe(model))


def _asked(
    model: HookedModel, prompt: Any, answer: str | Sequence[str], wrong: str | Sequence[str], bos: str
) -> tuple[Prompts, tuple[int, ...]]:
    """The prompt with its answers, and the tokens that it starts with."""
    right, others = ((each,) if isinstance(each, str) else tuple(each) for each in (answer, wrong))
    if isinstance(prompt, Prompts):
        if right or others:
            raise CausalProbeError("The prompt comes with its answers; `answer` and `wrong` are those of a text.")
        if len(prompt) != 1:
            raise CausalProbeError(
                f"There are {len(prompt)} prompts, and one is asked about. Give several to find_circuit."
            )
        return prompt, ()
    if not right:
        raise CausalProbeError('A text needs its `answer`, one token: " Mary".')
    its = {"text": prompt, "right": list(right), "wrong": list(others)}
    found = prompts_of(model, [Texts(prompt, right, others)], name="prompt", bos=bos, settings=its)
    return replace(found, settings=its), text_start(model, bos)


def _baselines(
    model: HookedModel, given: Any, tokens: Int[Tensor, "1 pos"], n_start: int, n: int, bos: str, seed: int
) -> Int[Tensor, "baseline pos"]:
    length = tokens.shape[1]
    if given is None:
        words = content_tokens(model).cpu()
        drawn = words[torch.randint(len(words), (n, length), generator=torch.Generator().manual_seed(seed))]
        drawn[:, :n_start] = tokens[:, :n_start]
        return drawn
    if isinstance(given, str):
        raise CausalProbeError("`baselines` is one text; it is a list of texts, or tokens [baseline, pos].")
    if isinstance(given, Sequence) and given and all(isinstance(each, str) for each in given):
        cut = [token_ids(model, each, bos) for each in given]
        if short := [at for at, each in enumerate(cut) if len(each) < length]:
            raise CausalProbeError(
                f"Baseline {short[0]} has {len(cut[short[0]])} tokens, the prompt {length}. Give baselines that are at least as long; their first {length} tokens are taken."
            )
        return torch.tensor([each[:length] for each in cut])
    found = torch.cat([*token_batches(read_tokens(model, given))]).cpu()
    if found.shape[1] != length:
        raise CausalProbeError(
            f"Baselines are [{len(found)}, {found.shape[1]}], the prompt has {length} tokens. Give as many."
        )
    return found


def _attention(layers: Layers, tokens: Int[Tensor, "1 pos"], found: Circuit) -> tuple[Attention, ...]:
    """From which positions the circuit's heads have read, of those where the circuit writes their keys or values."""
    read: dict[tuple[int, str], set[int]] = {}
    wrote: dict[str, set[int]] = {}
    for source, receiver in found.members:
        (writer, at), (reader, position) = placed(source), placed(receiver)
        assert at is not None
        assert position is not None
        wrote.setdefault(writer, set()).add(at)
        head, _, side = reader.partition(".")
        if side in ("k", "v"):
            layer, first = (int(each) for each in head[1:].split("H"))
            shared = layers.heads[layer] // layers.groups[layer][side]
            for each in range(first, first + shared):
                read.setdefault((layer, f"L{layer}H{each}"), set()).add(position)
    names = {attention_hook(layer, "pattern") for layer, _ in read}
    patterns, _ = layers.run(tokens, names=sorted(names))
    passed = []
    for (layer, head), keys in sorted(read.items()):
        pattern = patterns.get(attention_hook(layer, "pattern"))
        if pattern is None:
            continue
        for query in sorted(wrote.get(head, ())):
            for key in sorted(keys):
                if key <= query and (share := float(pattern[0, int(head.split("H")[1]), query, key])) >= SHOWN:
                    passed.append(Attention(head, query, key, share))
    return tuple(passed)
