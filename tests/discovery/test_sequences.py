"""The graph of sequences: the score against enumeration and the closed form, the null, planted forests, honest refusals."""

import itertools
import json

import numpy as np
import pytest
from scipy.special import gammaln

from causal_probe.discovery.sequences import graph_from_sequences, read_table
from causal_probe.discovery.sequences.codes import code
from causal_probe.discovery.sequences.counts import CONCENTRATIONS, Counts, polya
from causal_probe.discovery.sequences.lags import lags_from_stream
from causal_probe.discovery.sequences.models import one_matrix
from causal_probe.discovery.sequences.order import (
    IN_ORDER,
    _later_parents,
    _other_roots,
    _turned,
    _two_before,
    best_without_order,
)
from causal_probe.discovery.sequences.redrawn import dirichlet, stationary, walk
from causal_probe.discovery.sequences.result import SequenceGraph
from causal_probe.discovery.sequences.search import search
from causal_probe.discovery.sequences.swaps import redraw
from causal_probe.discovery.sequences.verdicts import identifiable, one_matrix_for_all
from causal_probe.errors import CausalProbeError


def planted(parents, *, states=3, n=1500, concentration=0.1, seed=0):
    rng = np.random.default_rng(seed)
    pi = rng.dirichlet(np.full(states, concentration), size=(n, states)) + 1e-9
    pi /= pi.sum(2, keepdims=True)
    law = np.full((n, states), 1 / states)
    for _ in range(500):
        law = 0.5 * law + 0.5 * np.einsum("nx,nxy->ny", law, pi)
    tokens = np.zeros((n, len(parents)), int)
    for child, parent in enumerate(parents):
        row = law if parent < 0 else pi[np.arange(n), tokens[:, parent]]
        tokens[:, child] = (rng.random((n, 1)) >= row.cumsum(1)[:, :-1]).sum(1)
    return tokens


def closed_form(tokens, base, parents, A):
    total = 0.0
    for row, b in zip(tokens, base, strict=True):
        law = {token: float(b[row == token][0]) for token in set(row.tolist())}
        counts = {}
        for child, parent in enumerate(parents):
            if parent >= 0:
                counts.setdefault(row[parent], []).append(row[child])
                total -= np.log(b[child])
        for children in counts.values():
            total += gammaln(A) - gammaln(A + len(children))
            total += sum(gammaln(A * law[y] + children.count(y)) - gammaln(A * law[y]) for y in set(children))
    return total / len(tokens)


@pytest.mark.parametrize("columns", [2, 3, 4, 5])
def test_the_search_finds_the_best_of_all_forests(columns):
    tokens = planted([-1, 0, 1, 1, 0][:columns], n=12)
    codes = code(tokens, max_memory=2**30)
    best = max(
        closed_form(tokens, codes.base, graph, A)
        for graph in itertools.product(*(range(-1, child) for child in range(columns)))
        for A in CONCENTRATIONS
    )
    found = search(codes)
    assert found.score == pytest.approx(best, abs=1e-5)
    if found.concentration is not None:
        assert closed_form(tokens, codes.base, found.parents, found.concentration) == pytest.approx(best, abs=1e-5)


def test_gains_are_differences_of_the_score():
    codes = code(planted([-1, 0, 1, -1, 3, 2], n=60), max_memory=2**30)
    counts = Counts(codes, [-1, 0, 0, 1, -1, 2])
    gains = counts.mean_gains(3, None, 2.0)
    for parent in range(3):
        other = [-1, 0, 0, parent, -1, 2]
        root = [-1, 0, 0, -1, -1, 2]
        difference = polya(codes, other, 2.0) - polya(codes, root, 2.0)
        assert gains[parent] == pytest.approx(difference.mean(), abs=1e-5)


def test_redrawing_keeps_the_counts_of_sequences_and_columns():
    rng = np.random.default_rng(0)
    codes = code(rng.integers(3, size=(40, 9)), max_memory=2**30)
    pairs = rng.permutation(40).reshape(-1, 2)
    drawn, movable = redraw(codes, pairs, rng)
    before = codes.shared[pairs.reshape(-1)]
    assert movable.any()
    assert (drawn.shared != before).any()
    assert (np.sort(drawn.shared, 1) == np.sort(before, 1)).all()
    pair = (20, 2, 9)
    assert (np.sort(drawn.shared.reshape(pair), 1) == np.sort(before.reshape(pair), 1)).all()
    # Ranks and frequencies follow their tokens.
    for old, new, rank, base in zip(pairs.reshape(-1), drawn.shared, drawn.local, drawn.base, strict=True):
        law = {t: (r, b) for t, r, b in zip(codes.shared[old], codes.local[old], codes.base[old], strict=True)}
        assert [law[t] for t in new] == list(zip(rank, base, strict=True))


@pytest.mark.parametrize(
    "parents", [[-1, 0, 1, 2, 3, 4, 5, 6, 7, 8], [-1, 0, -1, 2, -1, 4, -1, 6, -1, 8], [-1, 0, 1, 1, -1, 4, 4, 2, -1, 0]]
)
def test_planted_forests_are_found(parents):
    found = graph_from_sequences(planted(parents))
    assert found.structure in ("in-context", "both")
    assert set(found.edges) == {(p, c) for c, p in enumerate(parents) if p >= 0}
    assert all(parents[column] < 0 for column in found.roots)


@pytest.mark.parametrize("parents", [[-1] + [0] * 9, [-1] * 9 + [3], [-1, -1, 0, 1, 0, 1, 0, 1, 0, 1]])
def test_hubs_that_could_be_others_are_not_claimed(parents):
    assert not identifiable(parents)
    assert graph_from_sequences(planted(parents)).edges == ()


@pytest.mark.parametrize("kind", ["independent", "own frequencies", "columns"])
def test_no_structure(kind):
    rng = np.random.default_rng(3)
    law = np.full((400, 8, 3), 1 / 3)
    if kind != "independent":
        law = np.repeat(rng.dirichlet([0.5] * 3, size=(400, 1)), 8, 1)
    if kind == "columns":
        law = law * rng.dirichlet([1.0] * 3, size=8)
        law /= law.sum(2, keepdims=True)
    tokens = (rng.random((400, 8, 1)) >= law.cumsum(2)[..., :-1]).sum(2)
    found = graph_from_sequences(tokens, level=0.001)
    assert (found.structure, found.edges) == ("none", ())


def test_one_fixed_matrix_is_called_fixed():
    rng = np.random.default_rng(0)
    pi = rng.dirichlet([0.5] * 3, size=3)
    tokens = np.zeros((1500, 8), int)
    tokens[:, 0] = rng.integers(3, size=1500)
    for column in range(1, 8):
        tokens[:, column] = (rng.random((1500, 1)) >= pi[tokens[:, column - 1]].cumsum(1)[:, :-1]).sum(1)
    found = graph_from_sequences(tokens)
    assert (found.structure, found.edges) == ("fixed", ())
    assert set(found.fixed_tree) == {(i, i + 1) for i in range(7)}


def test_names_of_tokens_do_not_matter():
    parents = [-1, 0, 1, 1, -1, 4, 4, 2]
    tokens = planted(parents)
    names = np.random.default_rng(0).integers(2**20, size=(len(tokens), 1))
    assert set(graph_from_sequences(tokens * 7919 + names).edges) == {(p, c) for c, p in enumerate(parents) if p >= 0}


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (np.zeros((50, 1), int), "1 columns"),
        (np.zeros((1, 5), int), "1 sequences"),
        (np.zeros((3, 5), int), "at least 4 sequences"),
        (np.zeros((50, 5)), "float64"),
        (np.full((50, 5), np.nan), "NaN"),
        ([[1, 2], [3]], "length"),
        (np.zeros((2, 2, 2), int), "shape"),
        (np.array([["a", "b"]] * 2), "no tokens"),
    ],
)
def test_bad_tokens_are_refused(tokens, said):
    with pytest.raises(CausalProbeError, match=said):
        graph_from_sequences(tokens)


def test_memory_is_stated_before_it_is_taken():
    with pytest.raises(CausalProbeError, match="MiB"):
        graph_from_sequences(np.arange(40_000).reshape(100, 400) % 977, max_memory=2**20)


@pytest.mark.parametrize("options", [{"level": 0}, {"level": 2}, {"order": None}])
def test_bad_options_are_refused(options):
    with pytest.raises(CausalProbeError):
        graph_from_sequences(np.zeros((50, 4), int), **options)


def test_constant_columns_and_two_columns():
    tokens = np.random.default_rng(0).integers(3, size=(300, 4))
    tokens[:, 2] = 1
    assert 2 in graph_from_sequences(tokens).not_identifiable
    assert graph_from_sequences(tokens[:, :2]).edges == ()


def test_files(tmp_path):
    tokens = np.arange(12).reshape(4, 3)
    np.save(tmp_path / "a.npy", tokens)
    np.savetxt(tmp_path / "a.csv", tokens, fmt="%d", delimiter=",")
    for name in ("a.npy", "a.csv"):
        assert (read_table(tmp_path / name) == tokens).all()
    with pytest.raises(CausalProbeError, match=r"\.txt"):
        read_table(tmp_path / "a.txt")
    with pytest.raises(CausalProbeError, match="read"):
        read_table(tmp_path / "none.npy")


def law_of(row, child):
    """Smoothed frequencies of the tokens of a sequence but one."""
    rest = [*row[:child], *row[child + 1 :]]
    occurring = set(row)
    return {y: (rest.count(y) + 0.5) / (len(rest) + 0.5 * len(occurring)) for y in occurring}


@pytest.mark.parametrize("child", [3, 5])
def test_gains_over_root_and_of_siblings_by_plain_loops(child):
    graph = [-1, 0, 0, 1, -1, 2, 3]
    tokens = planted(graph, n=20)
    counts = Counts(code(tokens, max_memory=2**30), graph)
    over_root, siblings = counts.over_root(child, 2.0), counts.sibling_gains(child, 2.0)
    for n, row in enumerate(tokens.tolist()):
        law = law_of(row, child)
        edges = [(row[p], row[c]) for c, p in enumerate(graph) if p >= 0 and c != child]

        def next_law(x, y, edges=edges, law=law):
            return (edges.count((x, y)) + 2 * law[y]) / (sum(a == x for a, _ in edges) + 2)

        gain = {y: np.log(next_law(row[graph[child]], y) / law[y]) for y in law}
        assert over_root[n] == pytest.approx(gain[row[child]] - sum(law[y] * gain[y] for y in law), abs=1e-6)
        for earlier in range(child):
            both = sum(law[h] * next_law(h, row[earlier]) * next_law(h, row[child]) for h in law)
            one = sum(law[h] * next_law(h, row[earlier]) for h in law)
            base = law[row[child]]
            assert siblings[earlier, n] == pytest.approx(np.log(both / one / base), abs=1e-6)


def test_one_matrix_is_a_law():
    """Whatever the child's token, the probabilities of all tokens that the rest of the sequence has, and of the child's, sum to 1."""
    tokens = np.random.default_rng(0).integers(3, size=(60, 6))
    graph = [-1, 0, 1, 2, 3, 4]
    for margins in (True, False):
        model = one_matrix(code(tokens, max_memory=2**30), graph, margins=margins)
        for mixture in (0.0, 0.5, 1.0):
            tried = type(model)(model.pooled, mixture, model.ratio)
            total = 0
            for y in range(3):
                changed = np.tile([0, 0, 1, 1, 2, 2], (1, 1))
                changed[0, 3] = y  # the rest has all three tokens
                changed[0, 5] = {0: 2, 1: 2, 2: 2}[y]
                codes = code(np.concatenate([tokens, changed]), max_memory=2**30).take(slice(60, 61))
                total += np.exp(tried.log_q(codes, graph)[0, 2])
            assert total == pytest.approx(1, abs=1e-6)


def test_redrawn_data_have_the_laws_they_are_to_have():
    rng = np.random.default_rng(0)
    parameters = np.array([[0.2, 0.5, 1.3], [3.0, 1.0, 1.0], [0.01, 0.02, 0.03]])
    drawn = dirichlet(parameters, 20_000, rng)
    total = parameters.sum(1, keepdims=True)
    mean = parameters / total
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.015)
    np.testing.assert_allclose(drawn.var(0), mean * (1 - mean) / (total + 1), atol=0.01)
    matrices = rng.dirichlet([1.0, 1.0, 1.0], size=(4, 3))
    law = stationary(matrices)
    np.testing.assert_allclose(np.einsum("nx,nxy->ny", law, matrices), law, atol=1e-12)
    tokens = walk([-1, 0], np.repeat(matrices[:1], 40_000, 0), rng)
    joint = np.zeros((3, 3))
    np.add.at(joint, tuple(tokens.T), 1 / 40_000)
    np.testing.assert_allclose(joint, law[0][:, None] * matrices[0], atol=0.01)


def test_nothing_fixed_is_seen_in_short_sequences_of_in_context_data():
    """With few columns a sequence's frequencies are rough, and one matrix for all sequences seems to help. It isn't fixed dependence."""
    found = [graph_from_sequences(planted([-1, 0, 1, 2, 3, 4, 5], n=1000, seed=seed)) for seed in range(4)]
    assert [each.structure for each in found] == ["in-context"] * 4


def test_both_where_the_mean_transition_is_fixed_too():
    rng = np.random.default_rng(1)
    mean = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.1, 0.8, 0.1]])
    graph = [-1, 0, 1, 1, -1, 4, 4, 2, 5, 5, 7, 3]
    found = graph_from_sequences(walk(graph, 0.999 * dirichlet(2.0 * mean, 2000, rng) + 0.001 / 3, rng))
    assert found.structure == "both"
    assert found.gains["fixed_besides"].z > 3
    assert set(found.edges) <= {(p, c) for c, p in enumerate(graph) if p >= 0}


FOREST = [-1, 0, 1, 1, -1, 4, 4, 2, 5, 5, 7, 3, -1, 12]


def rejected(tokens):
    found = graph_from_sequences(tokens)
    names = {each.name for each in found.assumptions if not each.holds}
    assert not names or found.edges == ()
    return names


def test_a_hidden_common_parent_is_found():
    tokens = planted([-1, 0, 1, 2, 2, -1, -1, 3, 4, 7, 4, 0, 11, 2, 0, 10], n=2000)
    assert rejected(tokens) == set()
    assert rejected(np.delete(tokens, 0, 1)) == {"no two columns have a hidden common parent"}


def near_identity(parents, n, seed):
    """Sequences in which a token mostly follows itself; each has its own matrix."""
    rng = np.random.default_rng(seed)
    return walk(parents, dirichlet(0.1 + 0.3 * np.eye(3), n, rng), rng)


@pytest.mark.parametrize("seed", range(3))
def test_where_tokens_follow_themselves_no_edge_is_claimed_that_only_rows_alike_ask_for(seed):
    """With few edges, rows that swap two tokens explain 0 > 1, 1 > 4, 0 > 7 and 4 > 16 better than rows near the identity explain the truth."""
    sparse = [-1] * 20
    for parent, child in ((0, 4), (1, 7), (7, 16)):
        sparse[child] = parent
    found = graph_from_sequences(near_identity(sparse, 2000, seed), level=0.001)
    assert set(found.edges) <= {(0, 4), (1, 7), (7, 16)}
    assert all(sparse[column] == -1 for column in found.roots)


def test_where_tokens_follow_themselves_a_graph_of_many_edges_is_found():
    found = graph_from_sequences(near_identity(FOREST, 2000, 0), level=0.001)
    assert set(found.edges) == {(parent, child) for child, parent in enumerate(FOREST) if parent >= 0}


@pytest.mark.parametrize("seed", [1, 4, 7, 8])
def test_the_root_of_a_component_is_not_asked_for_where_any_would_do(seed):
    """Of two tokens every transition matrix is reversible, so the data say nothing against the order of the columns."""
    rng = np.random.default_rng(seed)
    tree = [-1, *(int(rng.integers(child)) for child in range(1, 16))]
    assert rejected(planted(tree, n=5000, states=2, concentration=0.5, seed=seed)) == set()


def test_out_of_order_no_direction_is_claimed_and_the_first_column_is_no_root():
    rng = np.random.default_rng(0)
    found = graph_from_sequences(planted(list(range(-1, 11)), n=2000)[:, rng.permutation(12)])
    assert "columns are in causal order" in {a.name for a in found.assumptions if not a.holds}
    assert found.edges == ()
    assert found.roots == ()
    assert found.nodes[0].reason == "assumption rejected: columns are in causal order"
    assert found.nodes[0].confidence_set == (-1, *range(1, 12))


def test_that_two_symbols_tell_no_order_is_said():
    found = graph_from_sequences(planted([-1, 0, 1, 2, 0, 3], n=1000, states=2, concentration=0.5))
    assert any("can't tell the order" in note for note in found.notes)
    assert not any("can't tell the order" in note for note in graph_from_sequences(planted([-1, 0, 1, 2], n=500)).notes)


def test_edges_of_another_matrix_are_found():
    tokens = np.concatenate([planted(FOREST, n=2000), planted([-1, 0, 1, 2, 3, 4], n=2000, seed=1)], 1)
    assert "all edges of a sequence share one transition matrix" in rejected(tokens)


@pytest.mark.parametrize("seed", range(3))
def test_columns_without_an_edge_are_not_edges_for_what_they_tell_of_the_frequencies(seed):
    """Forty linked columns blur a sequence's frequencies; twenty independent ones know them better, and would look like edges among themselves."""
    rng = np.random.default_rng(seed)
    tree = [-1, *(int(rng.integers(child)) for child in range(1, 40)), *[-1] * 20]
    codes = code(planted(tree, n=3000, seed=seed), max_memory=2**30)
    found = one_matrix_for_all(codes.take(slice(1500)), codes.take(slice(1500, 3000)), tree)
    assert found.holds
    assert found.p_value > 0.01


def test_transitions_from_pairs_of_parents_are_refused():
    rng = np.random.default_rng(0)
    pairs = dirichlet(np.full((9, 3), 0.1), 2000, rng).cumsum(2)
    tokens = rng.integers(3, size=(2000, 14))
    for child in range(2, 14):
        law = pairs[np.arange(2000), 3 * tokens[:, child - 1] + tokens[:, child - 2]]
        tokens[:, child] = (rng.random((2000, 1)) >= law[:, :-1]).sum(1)
    assert "at most one parent a column" in rejected(tokens)


@pytest.mark.parametrize("lag", [0, 3])
def test_lags_of_a_stream(lag):
    rng = np.random.default_rng(lag)
    law = dirichlet(np.full((3, 3), 0.3), 400, rng).cumsum(2)
    windows = rng.integers(3, size=(400, 16))
    for position in range(lag, 16 if lag else 0):
        row = law[np.arange(400), windows[:, position - lag]]
        windows[:, position] = (rng.random((400, 1)) >= row[:, :-1]).sum(1)
    found = lags_from_stream(windows.reshape(-1), max_lag=4)
    assert found.lag == (lag or None)
    assert found.structure == ("in-context" if lag else "none")
    assert str(lag) in repr(found) if lag else "no lag is claimed" in repr(found)


def test_short_streams_are_refused():
    with pytest.raises(CausalProbeError, match="two windows"):
        lags_from_stream(np.arange(20) % 3, max_lag=4)


def test_a_result_is_kept_and_told(tmp_path):
    found = graph_from_sequences(planted(FOREST, n=600))
    found.save(tmp_path / "a.safetensors")
    again = SequenceGraph.load(tmp_path / "a.safetensors")
    assert again.to_dict() == found.to_dict()
    assert repr(again) == repr(found)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["structure"] == "in-context"
    assert [tuple(edge) for edge in plain["edges"]] == list(found.edges)
    every = [*plain["roots"], *plain["undecided"], *plain["not_identifiable"], *(child for _, child in plain["edges"])]
    assert sorted(every) == list(range(14))
    assert set(plain["nodes"]) == set(map(str, range(14)))
    assert plain["level"] == 0.05
    assert "edges found" not in repr(found)
    assert "chow1968" in found.cite().bibtex


def shuffled(seed, columns=14, n=1000):
    """A planted forest with its columns in random order: tokens and parents by their new names."""
    rng = np.random.default_rng(seed)
    parents = [-1] + [int(rng.integers(i)) if rng.random() > 0.3 else -1 for i in range(1, columns)]
    tokens = planted(parents, n=n, seed=seed)
    order = rng.permutation(columns)
    place = np.argsort(order)
    return tokens[:, order], [-1 if parents[old] < 0 else int(place[parents[old]]) for old in order]


@pytest.mark.parametrize("seed", [3, 12, 73])
def test_a_broken_order_that_no_single_change_shows_is_found_by_a_search_without_one(seed):
    tokens, named = shuffled(seed)
    found = graph_from_sequences(tokens)
    (said,) = [each for each in found.assumptions if each.name == IN_ORDER]
    assert not said.holds
    assert "a graph with the edges" in said.found
    assert found.edges == ()
    codes = code(tokens, max_memory=2**30)
    best = search(codes)
    single = [
        *_later_parents(codes, best.parents, best.concentration),
        *_other_roots(codes, best.parents, best.concentration),
    ]
    assert max(z for z, _ in single) < 3  # what is asked of single parents and roots sees nothing
    parents, _ = best_without_order(codes, best.parents)
    right = sum(a == b for a, b in zip(parents, named, strict=True))
    assert right > 2 * sum(a == b for a, b in zip(best.parents, named, strict=True))


def test_without_an_order_the_best_of_all_forests_is_found():
    columns = 4
    tokens = planted([-1, 0, 1, 2], n=400)[:, [2, 0, 3, 1]]
    codes = code(tokens, max_memory=2**30)
    forests = [
        graph
        for graph in itertools.product(range(-1, columns), repeat=columns)
        if all(_ends(graph, column) for column in range(columns))
    ]
    assert len(forests) == (columns + 1) ** (columns - 1)
    counts = Counts(codes)
    scores = {graph: max(counts.score(graph, A) for A in CONCENTRATIONS) for graph in forests}
    parents, concentration = best_without_order(codes, [-1] * columns)
    assert counts.score(parents, concentration) == pytest.approx(max(scores.values()), abs=1e-3)


def _ends(parents, column):
    seen = set()
    while column >= 0 and column not in seen:
        seen.add(column)
        column = parents[column]
    return column < 0


def test_turned_components_have_the_same_edges():
    parents = [-1, 0, 1, 1, 3, -1]
    turned = _turned(parents, 4)
    assert turned == [1, 3, 1, 4, -1, -1]
    assert _turned(turned, 0) == parents
    assert _two_before([1, 2, -1, 1]) is False
    assert _two_before([2, 2, -1]) is True
