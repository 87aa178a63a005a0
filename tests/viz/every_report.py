"""A small report of every kind that a command writes, each with hostile text wherever it takes text."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import torch
import transformers

from causal_probe import circuits, experiments, graphs, hooks, models, probes, tasks, viz
from causal_probe.discovery import graph_from_sequences
from causal_probe.errors import CausalProbeWarning
from causal_probe.papers.base import Line, Reproduction
from causal_probe.reports import report
from causal_probe.sweep import sweep as run_sweep
from causal_probe.viz import report as page

from .hostile import HOSTILE

#: A tokenizer's own code can hold no lone surrogate; what becomes of one is tested where tokens are given as texts.
SPEAKABLE = [
    token for token in HOSTILE if token.strip() and token.isprintable() and token.isascii() and len(token) < 60
]
NAME = "".join(HOSTILE[:2])


def tokenizer() -> Any:
    """Hostile tokens as whole words, one a word of the text ``t4 t5 ...``."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as parts

    words = ["<s>", "</s>", *SPEAKABLE, *(f"t{i}" for i in range(50))][:50]
    fast = Tokenizer(parts.WordLevel({word: place for place, word in enumerate(words)}, unk_token="t5"))
    fast.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")


@cache
def language_model() -> Any:
    """A tiny random GPT-2 with a hostile name, whose tokens are hostile."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    return hooks.to_hooked(transformers.GPT2LMHeadModel(config).eval(), tokenizer=tokenizer(), name=NAME)


@cache
def recovery() -> Any:
    return experiments.recover("chain", n_positions=5, probe_sequences=1024, device="cpu")


@cache
def gradient() -> Any:
    found = experiments.recover_by_gradient("chain", n_positions=6, n_sequences=256)
    return dataclasses.replace(found, settings={**found.settings, NAME: NAME})


@cache
def own_sequences() -> Any:
    known = graphs.from_parents([None, 0, 1, 1, None, 4, 4, 2])
    batch = tasks.InContextMarkov(known, d_vocab=3, concentration=0.1).sample(300, tasks.generator(0, NAME))
    found = graph_from_sequences(batch.tokens[:, :-1])
    return dataclasses.replace(found, notes=(NAME,), settings={**found.settings, "data": NAME, NAME: NAME})


@cache
def scan() -> Any:
    known = models.DisentangledTransformer(d_vocab=12, n_positions=24)
    known.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    known.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)
    known.output_block("L1H0.token").diagonal().fill_(9)
    own = probes.Template("own", lambda tokens: torch.ones(tokens.shape[1], tokens.shape[1]).tril(-1).bool(), NAME)
    return experiments.scan(
        known, templates=["previous-token", "induction", own], n_sequences=6, verify=True, attributions=True
    )


@cache
def scan_of_a_language_model() -> Any:
    return experiments.scan(language_model(), templates=["previous-token", "induction"], n_sequences=4)


@cache
def in_context() -> Any:
    made = models.hand_set(graphs.chain(11), 3, match_scale=12.0, output_scale=4.0)
    return experiments.in_context_graph(made, "chain", states=3, n_sequences=4, verify=False)


@cache
def leaderboard() -> Any:
    made = models.hand_set(graphs.chain(11), 3, match_scale=12.0, output_scale=4.0)
    found = experiments.leaderboard([made], ["chain", "pairs"], states=3, n_sequences=4)
    return dataclasses.replace(found, names=(NAME,) * len(found.names))


@cache
def discovery() -> Any:
    text = " ".join(SPEAKABLE[:6])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CausalProbeWarning)  # the tokenizer knows no hostile word
        return experiments.discover_in_text(language_model(), text, samples=50, explain=-1, max_size=1)


@cache
def circuit() -> Any:
    """A planted circuit, of which not every edge is tested."""
    known = circuits.known_circuit("planted-5")
    tokens = known.sample(48, torch.Generator().manual_seed(0))
    return circuits.find_circuit(known.model, tokens, known.metric, most=40, sampled=10, sizes=2)


@cache
def node_circuit() -> Any:
    """Pruned nodes of a planted circuit, with its edges."""
    known = circuits.known_circuit("planted-5")
    tokens = known.sample(48, torch.Generator().manual_seed(0))
    order = known.model(tokens)[:, -1].argsort(-1, descending=True)
    prompts = circuits.Prompts(NAME, tokens, (tokens.shape[1] - 1,), order[:, None, :1], order[:, None, 1:2])
    found = circuits.prune_nodes(known.model, prompts, contrast="mean-by-position", edges=True, n_random=2)
    return dataclasses.replace(found, settings={**found.settings, NAME: NAME})


@cache
def structure() -> Any:
    """A tiny random model; not all orders are single tokens of it."""
    found = experiments.model_structure(language_model(), n_sentences=12, n_sequences=8, length=6, n_components=2)
    return dataclasses.replace(found, left_out={**found.left_out, NAME: NAME}, settings={**found.settings, NAME: NAME})


def reproduction() -> Any:
    return Reproduction(
        name="tiny",
        title=NAME,
        paper=("vonoswald2023",),
        summary=" ".join(HOSTILE),
        lines=(Line(NAME, 0.1, 0.01, 0.1, NAME, True), Line("nothing", None, note=NAME)),
        figures={
            "curve": viz.curves({NAME: {NAME: viz.Curve([0, 1, 2], [1, 2, 3])}}, x_name=NAME, y_name=NAME, title=NAME)
        },
        settings={"quick": True, "seed": 0, NAME: NAME},
        captions={"curve": NAME},
        notes=(NAME,),
    )


def sweep(folder: Path) -> Any:
    def broken(*, seed: int, graph: str) -> Any:
        raise ValueError(graph)

    spec = {
        "probes": ["gradient", "broken"],
        "grid": {"graph": ["chain", NAME], "seed": [0, 1]},
        "settings": {},
    }
    return run_sweep(
        {**spec, "probes": {"gradient": {"n_positions": 5, "n_sequences": 32}, "broken": {}}},
        out=folder,
        probes={"broken": broken},
    )


def everything() -> viz.Report:
    """Every block and every picture."""
    chain = nx.path_graph(20, create_using=nx.DiGraph)
    mixed = graphs.mixed_graph(3, [(0, "o", ">", 1), (1, "<", ">", 2)])
    text = " ".join(HOSTILE)
    n = len(HOSTILE)
    pattern = torch.ones(2, n, n).tril()
    line = nx.path_graph(n, create_using=nx.DiGraph)
    widget = viz.attention(
        HOSTILE, pattern / pattern.sum(-1, keepdim=True), head_names=HOSTILE[:2], graphs=[line, line], scores={text: [1, 2], NAME: [None, 0.5]}
    )  # fmt: skip
    pictures = [
        viz.graph(chain, chain, labels=(HOSTILE * 2)[:20], title=text),
        viz.graph(chain),
        viz.mixed(mixed, HOSTILE[:3], title=text),
        viz.training(
            {"step": [0, 1], "loss": [1.0, 0.5], "stage": [text, NAME]}, {text: 0.7}, title=text, loss_name=text
        ),
        viz.blocks({text: torch.eye(3), NAME: torch.eye(3)}, title=text, value_name=text),
        viz.heads(torch.ones(2, 2), score_name=text, title=text),
        viz.curves({text: {text: viz.Curve([0, 1], [0, 1])}}, x_name=text, y_name=text, title=text),
    ]
    blocks = [
        page.Headline([(text, 0, text), (text, None, text)]),
        page.Paragraph(f"First.\n\n{text}"),
        *(page.Picture(figure, text) for figure in pictures),
        page.Table((text, "value"), [(text, 1.0), (text, None)], text),
        page.Code(text, text),
        page.Attention(widget, text),
    ]
    return viz.Report(text, [page.Section(text, blocks)], {text: text}, {text: text}, text, text)


#: By command: what it finds.
def known_circuits() -> Any:
    """Methods on two circuits, with a claim, and one that could not be asked."""
    return experiments.known_circuits(["and-gate", "value-composition"], ["EAP", "circuit", "upstream"], n_prompts=24)


RESULTS: dict[str, Callable[[], Any]] = {
    "recover": recovery,
    "recover --method gradient": gradient,
    "recover --data": own_sequences,
    "recover --model": in_context,
    "scan": scan,
    "scan of a language model": scan_of_a_language_model,
    "leaderboard": leaderboard,
    "discover": discovery,
    "reproduce": reproduction,
    "circuit": circuit,
    "circuit of nodes": node_circuit,
    "structure": structure,
    "known circuits": known_circuits,
}


def reports(folder: Path) -> dict[str, viz.Report]:
    """By command: its report; and one with every block and picture."""
    found = {kind: make() for kind, make in RESULTS.items()} | {"sweep": sweep(folder)}
    return {kind: report(result) for kind, result in found.items()} | {"everything": everything()}
