"""Tasks whose graph changes from sequence to sequence: their laws, and their reference predictors by enumeration."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.special import gammaln

from causal_probe import graphs
from causal_probe.errors import CausalProbeError
from causal_probe.tasks import GraphMixture, MarkovMixture, VariableBinding, generator
from causal_probe.tasks.graph_mixture import LabelledBatch, next_token_losses

FORESTS = [graphs.from_parents(parents) for parents in ([None, 0, None, 2], [None, None, 0, 1], [None, 0, 0, 2])]


def all_sequences(n: int, d_vocab: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(d_vocab), repeat=n)))


# ------------------------------------------------------------------------------------------------------------ graph mixtures


def test_model_averaging_over_graphs_is_the_law_by_enumeration() -> None:
    """P(x_t | x_<t) from the joint law of all 81 sequences, summed over graphs: no posterior is ever formed."""
    task = GraphMixture(FORESTS, 3, seed=4)
    tokens = all_sequences(4, 3)
    assert task.matrix is not None
    joint = np.zeros(len(tokens))
    for graph in FORESTS:
        for i, x in enumerate(tokens.tolist()):
            factors = [
                float(task.matrix[x[next(iter(graph.pred[t]))], x[t]]) if graph.pred[t] else 1 / 3 for t in range(4)
            ]
            joint[i] += math.prod(factors) / len(FORESTS)
    assert joint.sum() == pytest.approx(1)
    found = task.references()["model averaging"](LabelledBatch(tokens, torch.zeros(len(tokens), dtype=torch.long)))
    for i, x in enumerate(tokens.tolist()):
        for t in range(4):
            same = [j for j, y in enumerate(tokens.tolist()) if y[:t] == x[:t]]
            law = [sum(joint[j] for j in same if tokens[j, t] == s) / sum(joint[j] for j in same) for s in range(3)]
            np.testing.assert_allclose(found[i, t], law, atol=1e-12)


def test_fresh_transitions_are_integrated_out() -> None:
    """The evidence for a graph is a product over rows of Dirichlet-multinomial laws, in closed form."""
    a, S = 0.3, 3
    task = GraphMixture(FORESTS, S, transitions="fresh", concentration=a)
    tokens = all_sequences(4, S)
    laws = task.by_graph(tokens)
    found = laws.gather(-1, tokens[:, None, :, None].expand(-1, 3, -1, 1))[..., 0].log().sum(-1)
    for g, graph in enumerate(FORESTS):
        for i, x in enumerate(tokens.tolist()):
            counts = np.zeros((S, S))
            for parent, child in graph.edges:
                counts[x[parent], x[child]] += 1
            rows = gammaln(S * a) - S * gammaln(a) + gammaln(counts + a).sum(1) - gammaln(counts.sum(1) + S * a)
            roots = sum(not graph.pred[t] for t in graph) * math.log(1 / S)
            assert float(found[i, g]) == pytest.approx(rows.sum() + roots, abs=1e-10)


@pytest.mark.parametrize("transitions", ["fixed", "fresh"])
def test_no_reference_beats_model_averaging(transitions: Any) -> None:
    task = GraphMixture.of_lags((1, 2, 4), 40, 4, transitions=transitions, concentration=0.5)
    losses = task.reference_losses(task.sample(2000, generator(0, "losses")))
    assert min(losses, key=lambda name: losses[name]) == "model averaging"
    assert losses["model averaging"] < losses["maximum likelihood"] < min(losses[f"lag {k}"] for k in (1, 2, 4))


def test_sequences_follow_their_own_lag() -> None:
    task = GraphMixture.of_lags((1, 3), 30, 3, seed=1)
    batch = task.sample(4000, generator(0, "law"))
    assert task.matrix is not None
    assert abs(float((batch.labels == 1).double().mean()) - 0.5) < 4 * 0.5 / 4000**0.5
    for label, lag in enumerate((1, 3)):
        its = batch.tokens[batch.labels == label]
        counts = np.zeros((3, 3))
        np.add.at(counts, (its[:, 3 - lag : -lag].ravel().numpy(), its[:, 3:].ravel().numpy()), 1)
        n = counts.sum(1, keepdims=True)
        law = task.matrix.numpy()
        assert (np.abs(counts / n - law) < 5 * np.sqrt(law * (1 - law) / n) + 1e-9).all()
        first = np.bincount(its[:, :3].ravel().numpy(), minlength=3) / its[:, :3].numel()
        assert np.abs(first - 1 / 3).max() < 5 * np.sqrt(2 / 9 / its[:, :3].numel())


def test_the_first_tokens_say_nothing_of_the_lag() -> None:
    task = GraphMixture.of_lags((1, 2, 5), 12, 3)
    posterior = task.posterior(task.sample(50, generator(0, "posterior")).tokens)
    assert torch.allclose(posterior[..., :6], torch.full((), 1 / 3, dtype=torch.float64))
    assert torch.allclose(posterior.sum(1), torch.ones((), dtype=torch.float64))
    batch = task.sample(50, generator(0, "posterior"))
    even, exact, *alone = (
        task.references()[name](batch) for name in ("even averaging", "model averaging", "lag 1", "lag 2", "lag 5")
    )
    assert torch.allclose(even[:, :6], exact[:, :6])
    assert torch.allclose(even, sum(alone) / 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GraphMixture(FORESTS[:1], 3), "found 1 graphs"),
        (lambda: GraphMixture([FORESTS[0], FORESTS[0]], 3), "2 graphs (1 different)"),
        (lambda: GraphMixture([FORESTS[0], graphs.chain(5)], 3), "over 4, 5 nodes"),
        (lambda: GraphMixture([FORESTS[0], nx.DiGraph([(0, 2), (1, 2), (2, 3)])], 3), "several parents"),
        (lambda: GraphMixture(FORESTS, 1), "d_vocab is 1"),
        (lambda: GraphMixture(FORESTS, 3, concentration=math.nan), "is nan"),
        (lambda: GraphMixture(FORESTS, 3, transitions="new"), "'fixed' or 'fresh', not 'new'"),
        (lambda: GraphMixture.of_lags((1,), 9, 3), "found [1]"),
        (lambda: GraphMixture.of_lags((1, 9), 9, 3), "from 1 to 8; found [1, 9]"),
        (lambda: GraphMixture(FORESTS, 3).sample(0, generator(0, "x")), "0"),
        (lambda: MarkovMixture(0, n_positions=9, d_vocab=3), "n_chains must be"),
        (lambda: MarkovMixture(2, n_positions=1, d_vocab=3), "n_positions must be"),
        (lambda: MarkovMixture(2, n_positions=9, d_vocab=3, concentration=0), "not 0"),
        (lambda: VariableBinding(0), "n_lines must be"),
        (lambda: VariableBinding(3, hops=(4,)), "from 1 to n_lines = 3"),
        (lambda: VariableBinding(3, hops=()), "one or more; found ()"),
        (lambda: VariableBinding(copies=1.0), "between 0 and 1, not 1.0"),
        (lambda: VariableBinding(30, hops=(30,), n_variables=2, copies=0.01).sample(1, generator(0, "x")), "too rare"),
    ],
)  # fmt: skip
def test_what_can_not_be_a_task(make: Any, message: str) -> None:
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        make()


# ---------------------------------------------------------------------------------------------------------- a set of chains


def test_retrieval_is_the_law_by_enumeration_and_inference_counts() -> None:
    task = MarkovMixture(3, n_positions=4, d_vocab=2, concentration=0.7, seed=2)
    tokens = all_sequences(4, 2)
    batch = LabelledBatch(tokens, torch.zeros(len(tokens), dtype=torch.long))
    found = {name: predict(batch) for name, predict in task.references().items()}
    P, pi = task.matrices.numpy(), task.stationary.numpy()
    np.testing.assert_allclose(np.einsum("c x, c x y -> c y", pi, P), pi, atol=1e-9)
    for i, x in enumerate(tokens.tolist()):
        for t in range(4):
            pairs = np.array(
                [math.prod([0.5, *(P[c, x[u - 1], x[u]] for u in range(1, t))]) if t else 1 for c in range(3)]
            )
            singles = np.array([math.prod(pi[c, x[u]] for u in range(t)) for c in range(3)])
            law = pairs / pairs.sum() @ P[:, x[t - 1]] if t else [0.5, 0.5]
            np.testing.assert_allclose(found["retrieval, bigram"][i, t], law, atol=1e-10)
            np.testing.assert_allclose(found["retrieval, unigram"][i, t], singles / singles.sum() @ pi, atol=1e-9)
            seen = [0.7 + x[:t].count(s) for s in range(2)]
            np.testing.assert_allclose(found["inference, unigram"][i, t], np.array(seen) / sum(seen))
            after = [0.7 + sum(x[u - 1 : u + 1] == [x[t - 1], s] for u in range(1, t)) for s in range(2)]
            law = np.array(after) / sum(after) if t else [0.5, 0.5]
            np.testing.assert_allclose(found["inference, bigram"][i, t], law)


def test_few_chains_are_worth_remembering_and_many_are_not() -> None:
    few = MarkovMixture(2, n_positions=50, d_vocab=4)
    losses = few.reference_losses(few.sample(500, generator(0, "few")))
    assert losses["retrieval, bigram"] < losses["inference, bigram"] - 0.05
    many = MarkovMixture(2000, n_positions=50, d_vocab=4)
    losses = many.reference_losses(many.sample(100, generator(0, "many")))
    assert abs(losses["retrieval, bigram"] - losses["inference, bigram"]) < 0.02
    batch = few.sample(3, generator(0, "few"))
    loss = next_token_losses(few.references()["uniform"](batch), batch.tokens)
    assert torch.allclose(loss, torch.tensor(math.log(4), dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------------- programs


def test_programs_mean_what_they_say() -> None:
    """Their text is run, line by line: the answer, each line's source, and the number of hops."""
    task = VariableBinding(6, hops=(1, 2, 3), n_variables=4, n_constants=5)
    programs = task.sample(300, generator(0, "programs"))
    for i in range(len(programs)):
        *lines, query = task.text(programs.tokens[i]).splitlines()
        holds: dict[str, tuple[str, int, int]] = {}  # by variable: value, line, hops
        parents = []
        for number, line in enumerate(lines):
            left, right = line.split(" = ")
            value, parent, hops = holds.get(right, (right, -1, 0))
            assert value.isdigit(), "a variable is read before it is assigned"
            holds[left] = (value, number, hops + 1)
            parents.append(parent)
        value, line, hops = holds[query.removeprefix("# ")]
        assert (int(programs.answers[i]), int(programs.hops[i])) == (int(value), hops)
        assert programs.parents[i].tolist() == [*parents, line]
        assert set(programs.graph(i).edges) == {(p, c) for c, p in enumerate([*parents, line]) if p >= 0}
    assert torch.bincount(programs.hops, minlength=4)[1:].min() > 60  # each number of hops about as often
    assert programs.tokens.max() < task.d_vocab
    assert programs.tokens.shape == (300, task.n_positions)


def test_predictors_that_know_a_part_of_the_rules_by_reading_the_text() -> None:
    task = VariableBinding(5, hops=(1, 2, 3), n_variables=3, n_constants=4)
    programs = task.sample(120, generator(1, "references"))
    found = {name: predict(programs)[:, 0].numpy() for name, predict in task.references().items()}
    assert [*found] == ["a constant", "a constant of the program", "the first line's", "a line of the variable", "one hop", "two hops", "exact"]  # fmt: skip
    for i in range(len(programs)):
        *lines, query = task.text(programs.tokens[i]).splitlines()
        pairs = [line.split(" = ") for line in lines]
        constants = [int(right) for _, right in pairs if right.isdigit()]
        some = np.bincount(constants, minlength=task.d_vocab) / len(constants)

        def says(line: int, pairs: list[list[str]] = pairs, some: np.ndarray = some) -> np.ndarray:
            right = pairs[line][1]
            return np.eye(task.d_vocab)[int(right)] if right.isdigit() else some

        def last(name: str, before: int, pairs: list[list[str]] = pairs) -> int:
            return max(line for line in range(before) if pairs[line][0] == name)

        asked = query.removeprefix("# ")
        one = last(asked, len(pairs))
        two = one if pairs[one][1].isdigit() else last(pairs[one][1], one)
        expected = {
            "a constant": np.r_[np.full(4, 0.25), np.zeros(task.d_vocab - 4)],
            "a constant of the program": some,
            "the first line's": says(0),
            "a line of the variable": np.mean([says(n) for n, (left, _) in enumerate(pairs) if left == asked], 0),
            "one hop": says(one),
            "two hops": says(two),
            "exact": np.eye(task.d_vocab)[int(programs.answers[i])],
        }
        for name, law in expected.items():
            np.testing.assert_allclose(found[name][i], law, atol=1e-12, err_msg=name)
