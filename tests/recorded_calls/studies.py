"""Calls: whole studies, and sweeps."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from causal_probe import experiments, graphs, hooks, models
from causal_probe.experiments.explanations import ADJECTIVES, PEOPLE, SENTENCES, THINGS
from causal_probe.sweep import sweep
from causal_probe.tasks import generator
from tests import tiny_huggingface, tiny_models
from tests.recorded_calls.calls import Numbers, call
from tests.recorded_calls.fields import (
    of_attention_graph,
    of_dynamics,
    of_evidence_row,
    of_explanation,
    of_gradient_graph,
    of_gradient_recovery,
    of_gradient_slots,
    of_graph,
    of_model_scan,
    of_reading,
    of_recovery,
    of_scores,
    of_weights,
)
from tests.recorded_calls.made import (
    TWO_PARENTS,
    forest_task,
    hugging_face,
    induction_model,
    reader,
    texts,
    two_parent_task,
)


@call
def recover_staged() -> Numbers:
    yield from of_recovery(experiments.recover("forest", n_positions=8, steps=20, batch_size=64, probe_sequences=1024))


@call
def recover_joint_sgd() -> Numbers:
    yield from of_recovery(
        experiments.recover("chain", n_positions=6, training="joint", steps=40, batch_size=128, probe_sequences=512)
    )


@call
def recover_joint_adamw() -> Numbers:
    yield from of_recovery(
        experiments.recover(
            "chain",
            n_positions=6,
            training="joint",
            optimizer="adamw",
            learning_rate=0.01,
            steps=40,
            batch_size=128,
            heads=(2, 1),
            probe_sequences=512,
        )
    )


@call
def recover_two_parents() -> Numbers:
    yield from of_recovery(
        experiments.recover(
            "two-parent", n_positions=10, heads=(2, 1), steps=12, batch_size=64, probe_sequences=512, seed=1
        )
    )


@call
def recover_saved() -> Numbers:
    """The arrays and graphs of the files that a recovery writes."""
    with tempfile.TemporaryDirectory() as folder:
        experiments.recover(
            "pairs", n_positions=6, steps=6, batch_size=32, probe_sequences=256, out=Path(folder) / "out"
        )
        from safetensors.numpy import load_file

        arrays = load_file(Path(folder) / "out" / "attention.safetensors")
        yield [arrays[name] for name in ("layer0.mean", "layer0.stderr")]
        yield from of_graph(graphs.read_graph(Path(folder) / "out" / "graph.json"))
        yield from of_graph(graphs.read_graph(Path(folder) / "out" / "recovered.json"))
        yield from of_weights(models.load(Path(folder) / "out" / "model"))


@call
def recover_by_gradient() -> Numbers:
    found = experiments.recover_by_gradient("forest", n_positions=8, n_sequences=1024)
    yield from of_gradient_recovery(found)
    yield from of_gradient_graph(found.found)


@call
def recover_by_gradient_two_parents() -> Numbers:
    found = experiments.recover_by_gradient("two-parent", n_positions=10, n_sequences=2**14)
    yield from of_gradient_recovery(found)
    yield from of_gradient_slots(found.found)


@call
def recover_from_tokens() -> Numbers:
    batch = forest_task().sample(1024, generator(0, "sample"), targets="hard")
    tokens = torch.cat([batch.tokens, batch.target.argmax(-1, keepdim=True)], 1)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "tokens.npy", tokens.numpy())
        found = experiments.recover_from_tokens(Path(folder) / "tokens.npy", d_vocab=4)
    yield from of_gradient_recovery(found)
    yield from of_gradient_graph(found.found)


@call
def study_scan() -> Numbers:
    """With everything that can be asked for."""
    yield from of_model_scan(experiments.scan(induction_model(), n_sequences=6, verify=True, attributions=True))


@call
def study_scan_transformer_lens() -> Numbers:
    yield from of_model_scan(
        experiments.scan(
            tiny_models.transformer_lens(),
            templates=["previous-token", "offset-2"],
            n_sequences=6,
            period=3,
            attributions=True,
        )
    )


@call
def study_scan_hugging_face() -> Numbers:
    model = tiny_huggingface.gpt2()
    yield from of_model_scan(experiments.scan(model, n_sequences=4, seed=2, batch_size=3))


@call
def study_scan_corpus() -> Numbers:
    yield from of_model_scan(experiments.scan(reader(), corpus=texts(), length=9))


@call
def merge_scans() -> Numbers:
    model = reader()
    with tempfile.TemporaryDirectory() as folder:
        saved = [Path(folder) / f"part{part}.safetensors" for part in range(2)]
        for part, path in enumerate(saved):
            experiments.scan(model, corpus=texts(), length=9, shard=(part, 2)).scores.save(path)
        yield from of_model_scan(experiments.merge_scans(saved))


@call
def check_model() -> Numbers:
    for build in (tiny_huggingface.gpt2, tiny_huggingface.llama):
        found = experiments.check_model(build())
        yield len(found.findings), found.ok
        yield [found.works[name] for name in sorted(found.works)]
        yield [(its.error, its.tolerance) for its in found.answers]


@call
def check_loaded_model() -> Numbers:
    """From a folder that Hugging Face has written."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_huggingface.llama().save_pretrained(folder)
        tiny_huggingface.tokenizer().save_pretrained(folder)
        hooked, _ = experiments.open_model(folder, device="cpu")
        with torch.no_grad():
            yield hooked(tiny_huggingface.tokens())
        found = experiments.check_model(folder, device="cpu")
        yield [(its.error, its.tolerance) for its in found.answers]
        yield from of_scores(experiments.scan(folder, n_sequences=3, device="cpu", templates="induction").scores)


@call
def study_discover() -> Numbers:
    found = experiments.discover_in_text(
        tiny_huggingface.gpt2(),
        "t3 t7 t4 t7 t9 t3 t5",
        tokenizer=tiny_huggingface.tokenizer(),
        samples=100,
        explain=-1,
        max_size=2,
    )
    yield from _of_text_discovery(found)
    # a masked language model, and words of several tokens
    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "##s"]
        (Path(folder) / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        tokenizer = transformers.BertTokenizer(str(Path(folder) / "vocab.txt"))
        model = tiny_huggingface.bert()
        text = "the cats sat on a mat"
        for words_too in (False, True):
            options: Any = {"tokenizer": tokenizer, "words": words_too, "samples": 60, "max_size": 2}
            yield from _of_text_discovery(experiments.discover_in_text(model, text, explain="sat", **options))


def _of_text_discovery(found: Any) -> Numbers:
    for its in found.discovery.graphs:
        yield from of_attention_graph(its)
    for name in sorted(found.explanations):
        yield from of_explanation(found.explanations[name])


@call
def compare_evidence() -> Numbers:
    """The whole comparison, of one hand-set model."""
    found = experiments.compare_evidence(
        ("chain",), models=("copy parents",), n_positions=6, d_vocab=3, inputs=2, n_sequences=32
    )
    for row in found.rows:
        yield from of_evidence_row(row)
    yield found.by_graph().to_numpy(dtype=float)
    yield found.deepest().to_numpy(dtype=float)


@call
def measure_evidence() -> Numbers:
    task = two_parent_task()
    model = models.hand_set(TWO_PARENTS, 3, match_scale=8.0, output_scale=4.0, graph_scale=3.0)
    for row in experiments.measure_evidence(model, task, inputs=2, n_sequences=64, seed=2):
        yield from of_evidence_row(row)


@call
def explain_sessions() -> Numbers:
    found = experiments.explain_sessions(inputs=4, steps=40, max_size=2)
    yield from _of_explanations(found)
    yield found.planted
    yield found.decides
    for share in (found.cause_decides, *(found.with_cause(method) for method in found.summary.by_method)):
        assert share is not None
        yield share.share, share.low, share.high


@call
def explain_ratings() -> Numbers:
    """Sessions out of a file: users who go through the items in a circle, from anywhere."""
    rng = np.random.default_rng(0)
    lines = [
        f"{user}\t{7 * ((start + step) % 20)}\t{rng.integers(1, 6)}\t{1000 + step}"
        for user, start in enumerate(rng.integers(0, 20, 30))
        for step in range(12)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "u.data"
        path.write_text("\n".join(rng.permutation(lines)) + "\n", encoding="utf-8")
        yield from _of_explanations(experiments.explain_sessions(ratings=path, inputs=3, steps=20, max_size=2))


@call
def explain_sentiment() -> Numbers:
    """An encoder of random weights that knows the words of the sentences."""
    words = " ".join([*SENTENCES, *THINGS, *PEOPLE, *(word for group in ADJECTIVES for word in group)]).split()
    known = sorted({word.strip(",.{}") for word in words} - {"[MASK]", ""})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", ".", *known]
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
        transformers.BertTokenizer(str(Path(folder) / "vocab.txt")).save_pretrained(folder)
        transformers.BertModel(
            transformers.BertConfig(vocab_size=len(vocabulary), initializer_range=0.3, **shape)
        ).save_pretrained(folder)
        yield from _of_explanations(experiments.explain_sentiment(folder, inputs=4, max_size=2))


def _of_explanations(found: Any) -> Numbers:
    yield found.accuracy
    yield found.summary.to_pandas().to_numpy(dtype=float)
    for each in found.explanations:
        for name in sorted(each):
            yield from of_explanation(each[name])


@call
def in_context_graph() -> Numbers:
    model = models.hand_set(graphs.chain(11), 3, match_scale=12.0, output_scale=4.0, graph_scale=20.0)
    yield from of_reading(experiments.in_context_graph(model, "chain", states=3, n_sequences=8, verify=True))
    yield from of_reading(experiments.in_context_graph(model, "lag-2", states=3, n_sequences=8, seed=1))


@call
def in_context_graph_of_words() -> Numbers:
    for graph in ("chain", "pairs"):
        model = hooks.to_hooked(tiny_huggingface.llama(), tiny_huggingface.tokenizer(bos=True))
        for words in (["t5", "t9", "t11"], None):
            if words is None:
                model = hugging_face("gpt2")  # without a tokenizer every sequence draws its own states
            yield from of_reading(
                experiments.in_context_graph(model, graph, n_positions=12, states=3, n_sequences=8, words=words)
            )


@call
def leaderboard() -> Numbers:
    several = [hugging_face("gpt2"), hugging_face("llama")]
    found = experiments.leaderboard(several, ("chain", "lag-2"), n_positions=10, states=3, n_sequences=6)
    for its in found.readings:
        yield from of_reading(its)
    yield found.table("excess").to_numpy(dtype=float)
    yield found.table("skill").to_numpy(dtype=float)


# A cell's seed is a hash of its options, names included. So the sweeps here say nothing whose name may change.


@call
def sweep_of_gradients() -> Numbers:
    spec: Any = {"probes": "gradient", "grid": {"graph_seed": [0, 1], "seed": [0]}, "settings": {"graph": "forest"}}
    with tempfile.TemporaryDirectory() as folder:
        table = sweep(spec, out=folder).to_pandas()
    yield from _of_sweep(table)


@call
def sweep_of_models() -> Numbers:
    """Scans and head graphs of saved models, and a recovery."""
    with tempfile.TemporaryDirectory() as folder:
        for name, seed in (("one", 0), ("two", 1)):
            model = induction_model()
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            models.save(model, Path(folder) / name)
        names = [str(Path(folder) / name) for name in ("one", "two")]
        settings: Any
        for probe, settings in (("scan", {"templates": ["induction"]}), ("head_graphs", {})):
            spec: Any = {"probes": probe, "grid": {"model": names, "seed": [0]}, "settings": settings}
            yield from _of_sweep(sweep(spec, out=Path(folder) / f"out-{probe}").to_pandas())
        settings = {"graph": "chain", "steps": 5, "batch_size": 32, "probe_sequences": 64}
        spec = {"probes": "recover", "grid": {"seed": [0]}, "settings": settings}
        yield from _of_sweep(sweep(spec, out=Path(folder) / "out-recover").to_pandas())


@call
def sweep_of_corpora() -> Numbers:
    """Shards, merged."""
    with tempfile.TemporaryDirectory() as folder:
        model, corpus = Path(folder) / "model", Path(folder) / "corpus.txt"
        tiny_huggingface.llama().save_pretrained(model)
        tiny_huggingface.tokenizer(bos=True).save_pretrained(model)
        corpus.write_text("\n--\n".join(texts()), encoding="utf-8")
        spec: Any = {
            "probes": {"scan": {"templates": ["previous-token", "duplicate-token"]}},
            "grid": {"corpus": [str(corpus)], "shard": ["0/2", "1/2"]},
            "settings": {"model": str(model), "length": 8, "separator": "--"},
        }
        found = sweep(spec, out=Path(folder) / "out")
        yield from _of_sweep(found.to_pandas())
        merged = found.merged()
        for name in ("score", "chance", "stderr", "chance_variance", "covariance", "excess", "excess_stderr", "sink"):
            yield merged[name].to_numpy(dtype=float)


@call
def sweep_over_time() -> Numbers:
    """Checkpoints of one training run, and when each head changes."""
    with tempfile.TemporaryDirectory() as folder:
        for step in range(5):
            model = models.DisentangledTransformer(d_vocab=12, n_positions=24)
            model.block(0, 0, query="position", key="position").diagonal(-1).fill_(3.0 * (step > 2) + step)
            models.save(model, Path(folder) / f"step{step}")
        names = [str(Path(folder) / f"step{step}") for step in range(5)]
        spec: Any = {"probes": "scan", "grid": {"model": names}, "settings": {"templates": ["previous-token"]}}
        yield from of_dynamics(sweep(spec, out=Path(folder) / "out").dynamics("previous-token"))


def _of_sweep(table: Any) -> Numbers:
    """The measured columns, NaN where a probe doesn't measure such a thing. An edge has a margin where a head has an excess."""
    for name in SWEEP_COLUMNS:
        column = table[name].fillna(table[name.replace("excess", "margin")])
        yield column.to_numpy(dtype=float, na_value=math.nan)


#: What a sweep's table says of a head or an edge.
SWEEP_COLUMNS = (
    "layer", "head", "child", "parent", "score", "chance", "stderr", "chance_variance", "covariance", "excess", "excess_stderr",
    "sink", "attention", "gain", "p_value", "log_e_value", "measured_rows", "n_sequences", "found", "true",
)  # fmt: skip
