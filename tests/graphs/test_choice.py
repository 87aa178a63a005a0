"""The graph that a command names."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pytest

from causal_probe import graphs
from causal_probe.errors import CausalProbeError, CausalProbeWarning
from causal_probe.graphs import choose_graph


def test_families_have_the_size_that_the_positions_ask_for() -> None:
    assert nx.utils.graphs_equal(choose_graph("chain", n_positions=7), graphs.chain(6))
    assert nx.utils.graphs_equal(choose_graph("pairs", n_positions=7), graphs.pairs(6))
    assert nx.utils.graphs_equal(choose_graph("two-parent", n_positions=7), graphs.two_parent_tree(8))
    assert len(choose_graph("forest", n_positions=None)) == 19


def test_forests_follow_the_seed_and_the_root_probability() -> None:
    first, again, other = (choose_graph("forest", n_positions=30, seed=seed) for seed in (0, 0, 1))
    assert nx.utils.graphs_equal(first, again)
    assert not nx.utils.graphs_equal(first, other)
    assert choose_graph("forest", n_positions=30, root_probability=0).number_of_edges() == 28


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_fixes_the_positions(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    graphs.write_graph(graphs.chain(5), path)
    assert nx.utils.graphs_equal(choose_graph(path, n_positions=None), graphs.chain(5))
    assert nx.utils.graphs_equal(choose_graph(str(path), n_positions=6), graphs.chain(5))
    with pytest.raises(CausalProbeError, match="`n_positions` is 20, but the graph's 5 nodes make 6"):
        choose_graph(path, n_positions=20)


def test_a_graph_of_several_parents_has_two_nodes_more(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    graphs.write_graph(graphs.two_parent_tree(8), path)
    assert len(choose_graph(path, n_positions=7)) == 8
    with pytest.raises(CausalProbeError, match="make 7"):
        choose_graph(path, n_positions=9)


def test_an_edge_list_needs_the_positions(tmp_path: Path) -> None:
    tree = write(tmp_path / "tree.txt", "0 1\n1 2\n")
    found = choose_graph(tree, n_positions=6)
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert set(found.edges) == {(0, 1), (1, 2)}
    with pytest.raises(CausalProbeError, match="`n_positions`"):
        choose_graph(tree, n_positions=None)

    several = write(tmp_path / "several.txt", "0 2\n1 2\n2 5\n4 5\n")
    assert sorted(choose_graph(several, n_positions=5)) == [0, 1, 2, 3, 4, 5]

    # A tree's last position is the query and no node.
    beyond = write(tmp_path / "beyond.txt", "0 5\n")
    with pytest.raises(CausalProbeError, match="5"):
        choose_graph(beyond, n_positions=5)


def test_what_is_neither_a_family_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(
        CausalProbeError, match=r"'chian' is neither a family of graphs \(chain, pairs, forest, two-parent, lag-K\)"
    ):
        choose_graph("chian", n_positions=20)
    with pytest.raises(CausalProbeError, match="at least 2"):
        choose_graph("chain", n_positions=1)
    with pytest.raises(CausalProbeError):
        choose_graph(write(tmp_path / "x.json", json.dumps({"nodes": 3})), n_positions=None)


def test_a_given_graph_is_checked() -> None:
    graph = graphs.chain(4)
    assert choose_graph(graph, n_positions=5) is graph
    with pytest.raises(CausalProbeError):
        choose_graph(nx.DiGraph([(1, 0)]), n_positions=None)


@pytest.mark.parametrize(
    ("graph", "options"), [("lag-30", {}), ("forest", {"root_probability": 1}), (graphs.from_parents([None] * 9), {})]
)
def test_a_graph_without_any_edge_is_warned_of(graph: object, options: dict[str, float]) -> None:
    with pytest.warns(
        CausalProbeWarning, match=r"has no edge: all its 9 nodes are roots, and there is nothing to recover\."
    ):
        assert choose_graph(graph, n_positions=10, **options).number_of_edges() == 0


def test_a_name_that_no_file_system_takes_is_refused_briefly() -> None:
    for name in ("x" * 5000, "lag-" + "9" * 5000, "~nouser/x", "nul\0"):
        with pytest.raises(CausalProbeError, match="is neither a family of graphs") as caught:
            choose_graph(name, n_positions=10)
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [float("nan"), [1, float("inf")], object()])
def test_data_that_no_result_can_keep_is_refused_before_any_work(value: object) -> None:
    graph = graphs.chain(5)
    graph.edges[0, 1]["weight"] = value
    with pytest.raises(CausalProbeError, match="can't be kept in a result: the edge 0 -> 1 has 'weight': "):
        choose_graph(graph, n_positions=None)


def test_a_home_folder_is_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "tree.txt", "0 1\n")
    assert choose_graph("~/tree.txt", n_positions=4).number_of_edges() == 1
