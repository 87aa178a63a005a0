"""Reading graphs in context: a model whose answer is known, words, losses by hand, reports, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from causal_probe import experiments, graphs
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.in_context_graph import word_batches
from causal_probe.experiments.state_words import WORDS, StateWords
from causal_probe.hooks import to_hooked
from causal_probe.hooks.check import undisturbed
from causal_probe.models import save
from causal_probe.models.constructions import fit_scales, hand_set
from causal_probe.reports import write_page
from causal_probe.tasks import InContextMarkov
from causal_probe.tasks.predictors import known_graph
from tests import tiny_huggingface

POSITIONS = 24
STATES = 4


def ideal(graph: nx.DiGraph):
    """The hand-set model of a graph, its scales fitted on the task."""
    batch = InContextMarkov(graph, STATES, 0.1).sample(512, torch.Generator().manual_seed(5))
    match, output = fit_scales(graph, batch.tokens, batch.target)
    return hand_set(graph, STATES, match_scale=match, output_scale=output)


@pytest.fixture(scope="module")
def chain_model():
    return ideal(graphs.chain(POSITIONS - 1))


@pytest.mark.parametrize("graph", ["chain", "lag-2"])
def test_a_model_made_for_a_graph_reads_it_and_no_other(graph: str):
    made_for = graphs.chain(POSITIONS - 1) if graph == "chain" else graphs.lag(POSITIONS - 1, k=2)
    model = ideal(made_for)
    own = experiments.in_context_graph(model, graph, n_positions=POSITIONS, states=STATES)
    assert [(head.layer, head.head) for head in own.carriers] == [(1, 0)]
    assert own.best.excess > 0.9  # the fitted scale is finite, so a little attention is elsewhere
    assert own.answers
    assert own.skill > 0.7  # logits are linear in a frequency, and the best prediction is not
    assert own.verdict == "1 head sees the graph; the answer uses it"
    other = experiments.in_context_graph(model, "lag-3", n_positions=POSITIONS, states=STATES)
    assert other.carriers == ()
    assert not other.answers
    assert other.verdict == "no head sees the graph; no use of more than frequencies is shown"


def test_losses_by_hand(chain_model):
    found = experiments.in_context_graph(
        chain_model, "chain", n_positions=POSITIONS, states=STATES, n_sequences=8, seed=3
    )
    task = InContextMarkov(graphs.chain(POSITIONS - 1), STATES, 0.1)
    batch = word_batches(chain_model, task, StateWords.choose(chain_model, STATES), n_sequences=8, seed=3)[0]
    assert torch.equal(batch.tokens, batch.states)
    with undisturbed(chain_model):
        logits = chain_model(batch.tokens)[:, -1].double()
    losses = [
        -sum(float(batch.target[b, s]) * float(logits[b].log_softmax(-1)[s]) for s in range(STATES)) for b in range(8)
    ]
    assert found.losses["model"].value == pytest.approx(sum(losses) / 8, abs=1e-6)
    assert found.losses["model, all words"].value == pytest.approx(found.losses["model"].value, abs=1e-6)
    assert found.losses["uniform"].value == pytest.approx(torch.tensor(STATES).log().item(), abs=1e-6)
    best = known_graph(task, batch.states).double()
    expected = -(batch.target.double() * best.log()).sum(-1).mean()
    assert found.losses["known-graph"].value == pytest.approx(float(expected), abs=1e-6)
    gap = found.losses["in-context unigram"].value
    assert found.gain.value == pytest.approx(gap - found.losses["model"].value)
    assert found.skill == pytest.approx(found.gain.value / (gap - found.losses["known-graph"].value))


def test_states_are_words_drawn_for_each_sequence():
    """On a model with more tokens than states, every sequence has words of its own, and the loss is over these alone."""
    model = to_hooked(tiny_huggingface.gpt2())
    task = InContextMarkov(graphs.chain(11), 3, 0.1)
    words = StateWords.choose(model, 3)
    assert not words.fixed
    batch = word_batches(model, task, words, n_sequences=20, start=(1,))[0]
    assert batch.tokens[:, 0].eq(1).all()
    for b in range(20):
        assert len(set(batch.words[b].tolist())) == 3
        assert batch.tokens[b, 1:].tolist() == [int(batch.words[b, s]) for s in batch.states[b]]
    assert len({tuple(row.tolist()) for row in batch.words}) > 10
    found = experiments.in_context_graph(model, "chain", n_positions=12, states=3, n_sequences=16)
    assert found.losses["model, all words"].value > found.losses["model"].value
    assert found.carriers == ()


def test_words_of_a_tokenizer():
    model = to_hooked(tiny_huggingface.gpt2(), tiny_huggingface.tokenizer())
    chosen = StateWords.choose(model, 2, ["t5", "t7"])
    assert chosen.fixed
    assert chosen.pool.tolist() == [5, 7]
    with pytest.raises(CausalProbeError, match=r"Not a single token.*'t5 t6' \(2\)"):
        StateWords.choose(model, 2, ["t5 t6", "t7"])
    with pytest.raises(CausalProbeError, match=r"Two states have the same token"):
        StateWords.choose(model, 2, ["t5", "t5"])
    with pytest.raises(CausalProbeError, match=r"3 words were given for 2 states"):
        StateWords.choose(model, 2, ["t5", "t6", "t7"])
    assert len(set(WORDS)) == len(WORDS) == 64


def test_heads_that_see_the_graph_are_verified(chain_model):
    found = experiments.in_context_graph(
        chain_model, "chain", n_positions=POSITIONS, states=STATES, n_sequences=16, verify=True
    )
    verdict = found.verification.of(1, 0, found.scores.names[0])
    assert verdict.verdict == "causal"
    assert verdict.effect.value > 0.3
    assert "causal (effect" in repr(found)


def test_it_saves_itself(chain_model, tmp_path: Path):
    found = experiments.in_context_graph(
        chain_model, "pairs", n_positions=POSITIONS, states=STATES, n_sequences=8, out=tmp_path / "out", page=write_page
    )
    saved = json.loads((tmp_path / "out/result.json").read_text())
    assert saved["verdict"] == found.verdict
    assert [(edge["source"], edge["target"]) for edge in saved["graph"]["edges"]] == list(found.graph.edges)
    assert "successor-of-parent" in (tmp_path / "out/report.html").read_text()
    assert found.cite().methods


def test_a_leaderboard(chain_model, tmp_path: Path):
    other = ideal(graphs.lag(POSITIONS - 1, k=2))
    found = experiments.leaderboard(
        [chain_model, other],
        ["chain", "lag-2"],
        n_positions=POSITIONS,
        states=STATES,
        n_sequences=32,
        out=tmp_path / "board",
        page=write_page,
    )
    frame = found.to_pandas()
    assert frame["graph"].tolist() == ["chain", "lag-2"] * 2
    high = frame["skill"] > 0.6
    assert high.tolist() == [True, False, False, True]
    assert (frame["excess"] > 0.9).tolist() == [True, False, False, True]
    assert (tmp_path / "board/leaderboard.csv").read_text().count("\n") == 5
    assert "report.html" in json.loads((tmp_path / "board/leaderboard.json").read_text())["files"]


def test_a_saved_model_by_its_folder(chain_model, tmp_path: Path):
    for name in ("mine", "yours/model"):
        save(chain_model, tmp_path / name)
    folders = [tmp_path / "mine", tmp_path / "yours" / "model"]
    found = experiments.leaderboard(folders, ["chain"], n_positions=POSITIONS, states=STATES, n_sequences=8)
    assert found.by_graph("excess").index.tolist() == ["mine", "yours"]
    with pytest.raises(CausalProbeError, match=r"There is no figure 'accuracy'; there are excess"):
        found.by_graph("accuracy")


def test_bad_input(chain_model, tmp_path: Path):
    def read(*args, **kwargs):
        return experiments.in_context_graph(
            chain_model, *args, **{"n_positions": POSITIONS, "states": STATES, **kwargs}
        )

    with pytest.raises(CausalProbeError, match=r"makes 65 positions, and the model's context has room for 24"):
        read("chain", n_positions=65)
    with pytest.raises(CausalProbeError, match=r"The model knows 4 tokens, fewer than the 5 states"):
        read("chain", states=5)
    with pytest.raises(CausalProbeError, match=r"has two parents"):
        read("two-parent")
    with pytest.raises(CausalProbeError, match=r"neither a family of graphs .*lag-K.* nor a file"):
        read("lag-0")
    with pytest.raises(CausalProbeError, match=r"`n_sequences` is 1\. It must be a whole number of at least 2"):
        read("chain", n_sequences=1)
    with pytest.raises(CausalProbeError, match=r"no tokenizer to read them"):
        read("chain", words=["a", "b", "c", "d"])
    with pytest.raises(CausalProbeError, match=r"The graph chain was named twice"):
        experiments.leaderboard([chain_model], ["chain", "chain"])
    with pytest.raises(CausalProbeError, match=r"needs a model at least"):
        experiments.leaderboard([], ["chain"])
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CausalProbeError):
        read("chain", out=tmp_path, page=write_page)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def words_known(*known, unk="<unk>"):
    """A model whose tokenizer knows these words, and no others."""
    names = {"<unk>": 0, "</s>": 1, **{word: i for i, word in enumerate(known, 2)}}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast.normalizer = tokenizers.normalizers.Replace("blue", "red")  # two words of one token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", **({"unk_token": unk} if unk else {}))
    return to_hooked(tiny_huggingface.gpt2(), tokenizer)


@pytest.mark.parametrize("unk", ["<unk>", None])
def test_each_state_has_a_token_of_its_own_and_none_is_unknown(unk):
    model = words_known(*WORDS[:20], unk=unk)
    chosen = StateWords.choose(model, 8)
    assert chosen.pool.tolist() == [2, *range(4, 22)]  # "blue" is "red"
    assert chosen.words == ("red", *WORDS[2:20])
    drawn = chosen.draw(200, 8, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 8 for row in drawn.tolist())
    with pytest.raises(CausalProbeError, match="are 19 different single tokens of this model; 20 are needed"):
        StateWords.choose(model, 20)
    with pytest.raises(CausalProbeError, match="No tokens of this model: 'zebra'"):
        StateWords.choose(model, 2, ["red", "zebra"])


def test_sequences_in_which_no_head_can_be_scored_are_refused() -> None:
    model = hand_set(graphs.chain(5), 64, match_scale=12.0, output_scale=4.0)
    with pytest.raises(CausalProbeError, match=r"no head can be scored\. Give more `n_sequences`"):
        experiments.in_context_graph(model, "chain", states=64, n_positions=4, n_sequences=2, verify=False)
