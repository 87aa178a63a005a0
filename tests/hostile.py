"""Bad and odd arguments for everything public: tokens, models and scalars, and a good call of each probe to put them into."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
import transformers

from causal_probe import graphs, hooks, models, probes, syntax
from causal_probe.errors import CausalProbeError
from causal_probe.models.loading import LoadedModel
from causal_probe.probes.permutation_sensitivity import permutation_sensitivity
from causal_probe.probes.posterior_alignment import posterior_alignment
from causal_probe.probes.score_pca import score_pca
from tests import tiny_huggingface as tiny
from tests.syntax import test_dependency_heads

LENGTH = 12
Call = tuple[Callable[..., Any], dict[str, Any]]


@cache
def model() -> Any:
    """A hooked model with a tokenizer that starts texts and pads them."""
    return hooks.to_hooked(tiny.llama(), tiny.tokenizer(bos=True))


@cache
def own_model() -> Any:
    """A model of the package, whose weights can be read one by one."""
    return models.DisentangledTransformer(tiny.D_VOCAB, LENGTH, dtype=torch.float64)


def tokens() -> torch.Tensor:
    """Two copies of a random text, for several sequences."""
    generator = torch.Generator().manual_seed(0)
    half = torch.stack([3 + torch.randperm(tiny.D_VOCAB - 3, generator=generator)[: LENGTH // 2] for _ in range(4)])
    return half.repeat(1, 2)


def loss(its: Any, batch: Any) -> torch.Tensor:
    read = getattr(batch, "tokens", batch)
    return probes.next_token()(its(read), read).loss


@cache
def scores() -> Any:
    return probes.scan(model(), tokens(), templates=["previous-token", "induction"])


@cache
def evidence() -> Any:
    return probes.head_graphs(model(), tokens())


@cache
def discovery() -> Any:
    return probes.discover_from_attention(model(), tokens()[0], samples=100, max_order=1)


@cache
def sums() -> Any:
    return models.gradient_steps(2, 3, eta=[0.1])


#: A good call of every public function of the rooms that measure: what is not in here is not tried, and a test sees it.
GOOD: dict[str, Callable[[], Call]] = {
    "probes.composition": lambda: (probes.composition, {"model": own_model(), "kinds": ["q"]}),
    "probes.copy_losses": lambda: (probes.copy_losses, {"model": model(), "tokens": tokens(), "period": LENGTH // 2, "start": 0, "batch_size": 2}),
    "probes.copy_sensitivity": lambda: (probes.copy_sensitivity, {"model": sums(), "inputs": torch.ones(2, 4, 3), "layer": 0}),
    "probes.discover_from_attention": lambda: (
        probes.discover_from_attention,
        {"model": model(), "tokens": tokens()[:1], "layer": -1, "head": 0, "algorithm": "ordered-icd", "level": 0.01, "samples": 100,
         "source": "attention", "residual": 0.0, "groups": None, "texts": None, "stable": True, "max_order": 1, "max_tests": 1000},
    ),
    "probes.edge_effects": lambda: (
        probes.edge_effects,
        {"model": model(), "tokens": tokens(), "loss": loss, "layer": 0, "head": 1, "candidates": [(1, 2)], "level": 1e-3, "redraw": None},
    ),
    "probes.ablate_heads": lambda: (
        probes.ablate_heads,
        {"model": model(), "tokens": tokens(), "heads": "L1H0", "by": "zero", "measure": None, "reference": tokens(), "batch_size": 2},
    ),
    "probes.graph_selectivity": lambda: (
        probes.graph_selectivity,
        {"model": model(), "tokens": tokens(), "labels": [i % 2 for i in range(len(tokens()))], "graphs": [graphs.chain(4), graphs.lag(4, k=2)],
         "shift": 0, "burn_in": 0, "permutations": 19, "seed": 0, "batch_size": 2},
    ),
    "probes.permutation_sensitivity": lambda: (
        permutation_sensitivity, {"model": model(), "tokens": tokens(), "n_permutations": 1, "start": 1, "seed": 0, "batch_size": 2},
    ),
    "probes.score_pca": lambda: (score_pca, {"model": model(), "tokens": tokens(), "n_components": 1, "batch_size": 2}),
    "syntax.dependency_heads": lambda: (
        syntax.dependency_heads, {"model": test_dependency_heads.planted(), "treebank": test_dependency_heads.sentences(6), "least_words": 1, "batch_size": 2},
    ),
    "syntax.generated_sentences": lambda: (syntax.generated_sentences, {"n": 2, "seed": 0}),
    "syntax.tree_projection": lambda: (
        syntax.tree_projection,
        {"model": tiny.bert(attn_implementation="eager"), "sentences": test_dependency_heads.sentences(4), "tokenizer": test_dependency_heads.tokenizer(),
         "most_words": 6, "seed": 0},
    ),
    "syntax.read_conllu": lambda: (syntax.read_conllu, {"path": str(Path(__file__).parent / "syntax/two.conllu")}),
    "probes.posterior_alignment": lambda: (
        posterior_alignment,
        {"model": model(), "tokens": tokens(), "graphs": [graphs.chain(4), graphs.lag(4, k=2)], "posterior": torch.tensor([[0.7] * 4, [0.3] * 4]).repeat(len(tokens()), 1, 1),
         "shift": 0, "burn_in": 0, "least_entropy": 0.2, "batch_size": 2},
    ),
    "probes.explain": lambda: (
        probes.explain,
        {"discovery": discovery(), "outputs": probes.outputs_of(model(), "next"), "target": 11, "replacement": 1,
         "methods": ["leave-one-out", "attention"], "head": 0, "fixed": [], "max_size": 1, "max_tested": 10, "pattern": torch.ones(LENGTH, LENGTH), "model": None, "batch_size": 8},
    ),
    "probes.from_graph": lambda: (probes.from_graph, {"graph": graphs.chain(4), "name": "mine", "first": 1}),
    "probes.head_graphs": lambda: (probes.head_graphs, {"model": model(), "tokens": tokens(), "per": "mean", "sink": "keep", "batch_size": 2}),
    "probes.head_weights": lambda: (probes.head_weights, {"model": own_model(), "n_positions": 4}),
    "probes.implied_step": lambda: (probes.implied_step, {"model": sums(), "d_x": 2, "d_out": 1, "W0": None, "read_in": None}),
    "probes.in_context_score": lambda: (probes.in_context_score, {"model": model(), "tokens": tokens(), "early": 2, "late": 9, "batch_size": 2}),
    "probes.induction": lambda: (probes.induction, {"n": 2}),
    "probes.match_heads": lambda: (probes.match_heads, {"evidence": evidence(), "truth": graphs.chain(5), "layer": 0, "children": [1, 2]}),
    "probes.next_token": lambda: (probes.next_token, {"queries": [1]}),
    "probes.offset": lambda: (probes.offset, {"k": 1}),
    "probes.outputs_of": lambda: (probes.outputs_of, {"model": model(), "decision": "masked", "position": 1}),
    "probes.qk_attributions": lambda: (
        probes.qk_attributions,
        {"model": model(), "tokens": tokens(), "layer": 1, "head": 0, "edges": "induction", "sources": "layers", "pairs": 1, "batch_size": 2},
    ),
    "probes.repeated_tokens": lambda: (probes.repeated_tokens, {"model": model(), "n_sequences": 2, "period": 5, "bos": "auto", "seed": 0}),
    "probes.scan": lambda: (
        probes.scan, {"model": model(), "tokens": tokens(), "templates": ["previous-token"], "queries": [3], "batch_size": 2},
    ),
    "probes.score_gradients": lambda: (probes.score_gradients, {"model": model(), "tokens": tokens(), "loss": None, "layers": [0], "batch_size": 2}),
    "probes.score_patterns": lambda: (
        probes.score_patterns,
        {"patterns": [torch.eye(LENGTH).expand(4, 2, -1, -1)], "tokens": tokens(), "templates": "previous-token", "queries": [3]},
    ),
    "probes.successor_of_parent": lambda: (probes.successor_of_parent, {"graph": graphs.chain(4), "name": "mine", "first": 1}),
    "probes.template": lambda: (probes.template, {"name": "induction"}),
    "probes.upstream": lambda: (
        probes.upstream,
        {"model": model(), "tokens": tokens(), "layer": 1, "head": 0, "edges": "induction", "depth": 1, "width": 1, "controls": 1, "batch_size": 2},
    ),
    "probes.verify": lambda: (
        probes.verify,
        {"scores": scores(), "model": model(), "tokens": tokens(), "templates": ["induction"], "measure": None, "reference": tokens(),
         "rule": probes.Rule(minimum_excess=-1.0), "ranked_on": 2, "random_sets": 1, "seed": 1, "batch_size": 2, "progress": False},
    ),
    "hooks.attention_hook": lambda: (hooks.attention_hook, {"layer": 0, "what": "pattern"}),
    "hooks.corpus": lambda: (
        hooks.corpus, {"model": model(), "source": ["t3 t4"], "length": 2, "bos": "auto", "separator": None, "field": "text", "shard": "0/1"},
    ),
    "hooks.edited": lambda: (hooks.edited, {"model": model()}),
    "hooks.find_faults": lambda: (hooks.find_faults, {"model": model(), "tokens": tokens(), "attention_mask": None, "hooks": ["pattern"]}),
    "hooks.preflight": lambda: (hooks.preflight, {"model": model(), "tokens": tokens(), "attention_mask": None, "hooks": ["pattern"]}),
    "hooks.mean_ablate": lambda: (hooks.mean_ablate, {"layer": 0, "head": 1, "reference": torch.zeros(4)}),
    "hooks.mean_heads": lambda: (hooks.mean_heads, {"model": model(), "tokens": tokens(), "layer": 0, "batch_size": 2}),
    "hooks.mean_patterns": lambda: (hooks.mean_patterns, {"model": model(), "tokens": tokens(), "layers": [0], "batch_size": 2}),
    "hooks.on_residual_stream": lambda: (
        hooks.on_residual_stream, {"model": model(), "read_in": torch.ones(3, 16), "read_out": torch.ones(16, 1), "at": "hook_embed"},
    ),
    "hooks.one_hot_row": lambda: (hooks.one_hot_row, {"key": 1}),
    "hooks.replace_row": lambda: (hooks.replace_row, {"layer": 0, "head": 1, "query": 2, "row": hooks.uniform_row(2)}),
    "hooks.resample_ablate": lambda: (hooks.resample_ablate, {"layer": 0, "head": 1, "donors": torch.zeros(4, LENGTH, 4)}),
    "hooks.self_test": lambda: (hooks.self_test, {"model": model(), "tokens": tokens()[:1], "original": None}),
    "hooks.to_hooked": lambda: (hooks.to_hooked, {"model": model(), "tokenizer": None, "name": "mine", "check": "raise"}),
    "hooks.uniform_row": lambda: (hooks.uniform_row, {"query": 3}),
    "hooks.zero_ablate": lambda: (hooks.zero_ablate, {"layer": 0, "head": 1}),
}  # fmt: skip

#: What is no model of these functions, or is read when the model is run.
ANY_MODEL = {"probes.outputs_of", "probes.explain", "hooks.find_faults", "hooks.to_hooked"}
#: Functions of the caller's, whose errors are the caller's.
FUNCTIONS = {"loss", "outputs", "measure", "redraw", "sources", "original", "features", "callback"}
#: Tokens of one input, and tokens that are no model's.
ONE_INPUT, NO_MODEL = {"probes.discover_from_attention"}, {"probes.score_patterns"}


def changed(its: torch.Tensor, row: int, column: Any, value: int) -> torch.Tensor:
    """The tokens with one of them another."""
    return its.index_put((torch.tensor(row), torch.as_tensor(column)), torch.tensor(value))


#: Tokens that no probe may measure, and a word of the reason.
BAD_TOKENS: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "None"),
    "a number": (lambda: 3, "int"),
    "a set": (lambda: {1, 2}, "int"),
    "bool": (lambda: tokens() > 5, "torch.bool"),
    "float32": (lambda: tokens().float(), "whole numbers"),
    "complex": (lambda: tokens().to(torch.complex64), "whole numbers"),
    "an array of floats": (lambda: tokens().numpy() / 2, "whole numbers"),
    "one sequence": (lambda: tokens()[0], r"tokens\[None\]"),
    "three axes": (lambda: tokens()[None], "whole numbers"),
    "no axis": (lambda: torch.tensor(3), "whole numbers"),
    "[4, 0]": (lambda: tokens()[:, :0], "no tokens"),
    "[0, 12]": (lambda: tokens()[:0], "no sequences|no tokens|no batches"),
    "no batches": (lambda: [], "no sequences|no tokens|no batches|None"),
    "an id too large": (lambda: changed(tokens(), 2, 3, tiny.D_VOCAB), "run from"),
    "an id far too large": (lambda: changed(tokens(), 2, 3, 2**62), "run from"),
    "a negative id": (lambda: changed(tokens(), 2, 3, -1), "run from"),
    "too long": (lambda: tokens().repeat(1, 4), "context holds"),
    "padded left": (lambda: changed(tokens(), 1, [0, 1, 2], 0), "padding"),
    "padded right": (lambda: changed(tokens(), 3, [-1, -2], 0), "padding"),
    "a mask with padding": (lambda: {"input_ids": tokens(), "attention_mask": changed(torch.ones(4, LENGTH).long(), 0, 1, 0)}, "padding"),
    "rows of two lengths": (lambda: {"input_ids": [[3, 4], [5]]}, "one length"),
    "a dict of something": (lambda: {"ids": tokens()}, "input_ids"),
    "unknown lengths of text": (lambda: ["t5 t4", "t5"], "one length"),
    "empty texts": (lambda: [b"t3"], "bytes"),
    "sparse": (lambda: tokens().to_sparse(), "sparse"),
    "meta": (lambda: tokens().to("meta"), "without values"),
    "a Dataset of texts": (lambda: iter([object()]), "object"),
    "the second batch": (lambda: [tokens(), tokens() - 9], "Batch 1"),
    "a second batch of another length": (lambda: [tokens(), tokens()[:, :10]], "length|Batch 1|shape"),
    "a padded second batch": (lambda: [tokens(), changed(tokens(), 0, 0, 0)], "Batch 1"),
    "objects": (lambda: np.array([[None, 1]], dtype=object), "no batch of tokens|whole numbers"),
}  # fmt: skip


def encoding() -> Any:
    return transformers.BatchEncoding(
        {"input_ids": tokens(), "attention_mask": torch.ones(4, LENGTH, dtype=torch.long)}
    )


class TaskBatch:
    """What a task draws, in small."""

    def __init__(self) -> None:
        self.tokens = tokens()


#: Tokens in another form, which every probe takes as the same tokens.
SAME_TOKENS: dict[str, Callable[[], Any]] = {
    "int32": lambda: tokens().int(),
    "int16": lambda: tokens().short(),
    "uint8": lambda: tokens().byte(),
    "NumPy": lambda: tokens().numpy().astype(np.uint16),
    "nested lists": lambda: tokens().tolist(),
    "a batch": TaskBatch,
    "a dict": lambda: {"input_ids": tokens().tolist()},
    "BatchEncoding": encoding,
    "batches": lambda: [tokens()],
    "read once": lambda: iter([tokens()]),
}


class Returns(torch.nn.Module):
    """A model whose forward returns something else than logits."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.what


#: What is no hooked model; the error names the way to one.
BAD_MODELS: dict[str, Callable[[], Any]] = {
    "a Hugging Face model": tiny.gpt2,
    "what load_model returns": lambda: LoadedModel(tiny.gpt2(), None, "tiny"),
    "a name": lambda: "gpt2",
    "None": lambda: None,
    "a number": lambda: 7,
    "a dict": lambda: {"cfg": 1},
    "a module": lambda: torch.nn.Linear(2, 2),
    "a class": lambda: models.DisentangledTransformer,
    "a module of nothing": lambda: Returns(None),
}

#: Scalars that are wrong for most arguments.
SCALARS: dict[str, Any] = {
    "a text": "a",
    "an empty text": "",
    "None": None,
    "True": True,
    "NaN": math.nan,
    "inf": math.inf,
    "-1": -1,
    "0": 0,
    "2**70": 2**70,
    "-(2**70)": -(2**70),
    "3.5": 3.5,
    "a list": [1],
    "an empty list": [],
    "a list of texts": ["x"],
    "a tuple of floats": (0.5, math.nan),
    "a dict": {"a": 1},
    "bytes": b"x",
    "an object": object(),
    "a tensor": torch.ones(2, 2),
    "an array": np.zeros((2, 2)),
    "NumPy's NaN": np.float64("nan"),
    "a complex number": 1j,
    "a graph": nx.Graph([(0, 1)]),
    "a function": len,
    "a class": int,
    "L9H9": "L9H9",
    "long": "x" * 5000,
    "a surrogate": "\ud800",
}


def refusal(run: Callable[[], Any]) -> str | None:
    """The one line in which something is refused; None where it is not. Whatever else it raises goes on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run()
    except CausalProbeError as error:
        said = str(error)
    else:
        return None
    assert "\n" not in said
    assert 10 < len(said) < 2500
    return said


def good(name: str) -> Call:
    """The function and its arguments."""
    return GOOD[name]()


def scalars(argument: str) -> dict[str, Any]:
    """The hostile values of an argument."""
    return {what: value for what, value in SCALARS.items() if argument not in FUNCTIONS or not callable(value)}


def public() -> Iterator[str]:
    """The functions that the rooms which measure offer, and some that are imported from their own modules."""
    yield from ("probes.posterior_alignment", "probes.permutation_sensitivity", "probes.score_pca")
    for room in (probes, hooks, syntax):
        for each in room.__all__:
            if inspect.isfunction(getattr(room, each)):
                yield f"{room.__name__.rpartition('.')[2]}.{each}"


def takes(name: str, argument: str) -> bool:
    """Whether a public function has an argument of that name."""
    return argument in inspect.signature(good(name)[0]).parameters


def call(name: str, /, **changes: Any) -> Any:
    """The good call with some arguments changed."""
    function, arguments = good(name)
    found = function(**{**arguments, **changes})
    if hasattr(found, "__enter__"):
        with found:
            return None
    return found
