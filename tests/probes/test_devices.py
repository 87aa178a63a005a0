"""What the probes find does not depend on the device of the model, and lies on the CPU; tokens may lie elsewhere.

Every test runs on the CPU and, where there is one, on a GPU, against the same known answers, or the answer of the CPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from causal_probe import first_gradient, graphs, hooks, models, probes, tasks, training
from tests import tiny_huggingface


def induction_model(device):
    """An ideal induction circuit, set by hand."""
    model = models.DisentangledTransformer(d_vocab=12, n_positions=24)
    model.block(0, 0, query="position", key="position").diagonal(-1).fill_(30)
    model.block(1, 0, query="token", key="L0H0.token").diagonal().fill_(30)
    model.output_block("L1H0.token").diagonal().fill_(9)
    return model.to(device)


def test_scan_and_verify(device):
    model = induction_model(device)
    scores = probes.scan(model, templates=["previous-token", "induction"], period=10, n_sequences=8)
    assert scores.provenance["device"].startswith(device)
    assert [found[:3] for found in scores.called()] == [(0, 0, "previous-token"), (1, 0, "induction")]
    verdicts = probes.verify(scores, model, period=10, n_sequences=4)
    assert [(found.name, found.verdict) for found in verdicts.verdicts] == [("L0H0", "causal"), ("L1H0", "causal")]


def test_tokens_on_the_cpu(device):
    model = induction_model(device)
    tokens = probes.repeated_tokens(induction_model("cpu"), n_sequences=4, period=10).tokens
    found = probes.scan(model, tokens, templates="induction")
    assert found.of(1, 0, "induction").excess > 0.85
    assert list(probes.head_graphs(model, tokens).graph(0, 0).edges) == [(i, i + 1) for i in range(19)]
    by_sequence = probes.head_graphs(model, tokens, per="sequence")
    assert by_sequence.compare(probes.template("induction"), 1, 0).precision == 1


def test_a_pretrained_model_as_on_the_cpu(device):
    tokens = tiny_huggingface.tokens(6)
    here, there = (hooks.to_hooked(tiny_huggingface.llama().to(place)) for place in ("cpu", device))
    for one, other in zip(probes.scan(here, tokens), probes.scan(there, tokens), strict=True):
        assert one[3:9] == pytest.approx(other[3:9], abs=1e-4)
    gradients = [probes.score_gradients(model, tokens.to(place)) for model, place in ((here, "cpu"), (there, device))]
    for layer, values in gradients[0].values.items():
        np.testing.assert_allclose(gradients[1].values[layer], values, atol=1e-5)


def test_blocks_and_upstream(device):
    model = models.DisentangledTransformer(d_vocab=6, n_positions=12, heads=[2, 1])
    model.block(0, 1, query="position", key="position").diagonal(-1).fill_(30)
    model.block(1, 0, query="token", key="L0H1.token").diagonal().fill_(30)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randperm(6, generator=generator).repeat(2) for _ in range(8)])
    taken_apart = probes.qk_attributions(model.to(device), tokens, 1, 0, edges="induction")
    top = taken_apart.top(1).iloc[0]
    assert (top["query"], top["key"]) == ("token", "L0H1.token")
    back = probes.upstream(model.to_transformer_lens().to(device), tokens, 1, 0, edges="induction")
    assert list(back.graph.edges(data="side")) == [("L0H1", "L1H0", "key")]


def test_training_and_edge_effects(device):
    task = tasks.InContextMarkov(graphs.chain(6), d_vocab=3, concentration=0.1)
    model = models.DisentangledTransformer(3, task.n_positions).to(device)
    training.give_matcher(model)
    source = tasks.generator(0, "training", device=device)
    stages = training.staged(n_positions=task.n_positions, steps=20, batch_size=128)
    history = training.fit(model, task, stages, generator=source)
    assert history.loss[-1] < history.loss[0]
    assert model.W_U.device.type == device
    batches = [task.sample(512, source) for _ in range(4)]
    assert batches[0].tokens.device.type == device
    found = probes.edge_effects(
        model,
        batches,
        loss=lambda model, batch: training.task_loss(model(batch.tokens)[:, -1], batch.target),
        layer=0,
        head=0,
        candidates=graphs.chain(6),
    )
    assert set(found.graph(6).edges) == set(graphs.chain(6).edges)


def test_one_gradient(device):
    task = tasks.InContextMarkov(graphs.chain(8), d_vocab=3, concentration=0.1)
    source = tasks.generator(0, "gradient", device=device)
    found = first_gradient.gradient_graph([task.sample(512, source) for _ in range(4)])
    assert found.compare(graphs.chain(8)).exact


def test_where_and_how_a_model_is_loaded(device, tmp_path):
    tiny_huggingface.llama().save_pretrained(tmp_path / "model")
    loaded = models.load_model(tmp_path / "model", dtype="bfloat16", device_map={"": device})
    assert loaded.model.device.type == device
    found = probes.scan(hooks.to_hooked(*loaded), templates="previous-token", n_sequences=2, period=4, bos="no")
    assert found.provenance["dtype"] == "bfloat16"
    assert found.provenance["device"].startswith(device)
