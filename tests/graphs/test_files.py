"""Every form is read back as it was written, and whatever is wrong with a file is said in one clear error."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_probe.errors import CausalProbeError
from causal_probe.graphs import chain, from_parents, random_dag, random_forest, read_graph, two_parent_tree, write_graph
from causal_probe.graphs import files as files_module

GRAPHS = [
    from_parents([None, 0]),
    chain(5),
    two_parent_tree(9),
    random_dag(8, parents=3, seed=1),
    random_forest(6, seed=2),
]
RULE = (
    "Its nodes must be the integers 0..n-1, its edges go from parent to child, and each parent comes before its child."
)

# The time of an example says nothing on a busy machine.
quick = settings(deadline=None, max_examples=50)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "graph.json"


def node_link(nodes: Any, edges: Any, key: str = "edges", **more: Any) -> str:
    ends = [{"source": edge[0], "target": edge[1]} for edge in edges]
    return json.dumps({"directed": True, "nodes": [{"id": node} for node in nodes], key: ends, **more})


def graphml(body: str, *, default: str = "directed", head: str = "") -> str:
    start = '<?xml version="1.0" encoding="utf-8"?>'
    return (
        f'{start}{head}<graphml xmlns="http://graphml.graphdrawing.org/xmlns">'
        f'<graph edgedefault="{default}">{body}</graph></graphml>'
    )


def refused(path: Path, content: str | bytes, *, nodes: int | None = None) -> str:
    """What :func:`read_graph` says of a file with this content, after the file's name."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CausalProbeError) as caught:
        read_graph(path, nodes=nodes)
    message = str(caught.value)
    assert message.startswith(f"{path} can't be used as a graph: ")
    assert "\n" not in message
    return message.removeprefix(f"{path} can't be used as a graph: ")


# ---------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("graph", GRAPHS)
def test_what_is_written_is_read_back(graph: nx.DiGraph, path: Path) -> None:
    write_graph(graph, path)
    for nodes in (None, len(graph)):
        again = read_graph(path, nodes=nodes)
        assert nx.utils.graphs_equal(again, graph)
        assert list(again) == list(range(len(graph)))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("key", ["edges", "links"])
def test_what_networkx_writes_is_read(graph: nx.DiGraph, key: str, tmp_path: Path) -> None:
    n = len(graph)
    (tmp_path / "g.json").write_text(json.dumps(nx.node_link_data(graph, edges=key)))
    nx.write_graphml(graph, tmp_path / "g.graphml")
    nx.write_edgelist(graph, tmp_path / "g.edges")
    nx.write_edgelist(graph, tmp_path / "g.txt", data=False)
    for name in ("g.json", "g.graphml", "g.edges", "g.txt"):
        assert nx.utils.graphs_equal(read_graph(tmp_path / name, nodes=n), graph)
    # Named otherwise, a file is known by its content.
    (tmp_path / "g.json").rename(tmp_path / "truth")
    (tmp_path / "g.graphml").rename(tmp_path / "truth.yed")
    for name in ("truth", "truth.yed"):
        assert nx.utils.graphs_equal(read_graph(str(tmp_path / name)), graph)


@quick
@given(seed=st.integers(0, 10_000))
def test_order_in_a_file_plays_no_part(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("shuffled") / "graph.json"
    shuffle = random.Random(seed)
    graph = random_dag(7, parents=2, seed=seed)
    nodes, edges = shuffle.sample(list(graph), 7), shuffle.sample(list(graph.edges), graph.number_of_edges())
    path.write_text(node_link(map(str, nodes), [(str(parent), child) for parent, child in edges]))
    again = read_graph(path)
    assert nx.utils.graphs_equal(again, graph)
    assert list(again) == list(range(7))
    assert list(again.edges) == sorted(graph.edges)


def test_a_byte_order_mark_hides_no_form(tmp_path: Path) -> None:
    for content in (node_link([0, 1], [(0, 1)]), graphml('<node id="0"/><node id="1"/><edge source="0" target="1"/>')):
        (tmp_path / "graph").write_text(f"\n{content}" if content[0] == "{" else content, encoding="utf-8-sig")
        assert list(read_graph(tmp_path / "graph").edges) == [(0, 1)]


def test_string_ids_and_integers_name_the_same_nodes(path: Path) -> None:
    path.write_text(node_link(["0", 1, "10", *range(2, 10)], [("0", 1), (1, "10")]))
    assert list(read_graph(path).edges) == [(0, 1), (1, 10)]


def test_data_is_kept(path: Path, tmp_path: Path) -> None:
    graph = chain(3)
    graph.graph["name"] = "truth"
    graph.nodes[1]["label"] = "</script>"
    graph.edges[0, 1].update(weight=0.5, node_for_adding=1)  # the second is an argument's name in networkx
    write_graph(graph, path)
    assert nx.utils.graphs_equal(read_graph(path), graph)

    del graph.edges[0, 1]["node_for_adding"]
    nx.write_graphml(graph, tmp_path / "g.graphml")
    nx.write_edgelist(graph, tmp_path / "g.txt")
    assert read_graph(tmp_path / "g.graphml").nodes[1] == {"label": "</script>"}
    assert read_graph(tmp_path / "g.graphml").edges[0, 1] == {"weight": 0.5}
    assert read_graph(tmp_path / "g.txt", nodes=3).edges[0, 1] == {"weight": 0.5}


def test_equal_graphs_make_equal_files(tmp_path: Path) -> None:
    turned = nx.DiGraph()
    turned.add_edges_from([(np.int64(1), np.int64(3)), (0, 3), (0, 1)])
    turned.add_node(2)
    write_graph(turned, tmp_path / "turned.json")
    write_graph(from_parents([None, 0, None, [0, 1]]), tmp_path / "plain.json")
    assert (tmp_path / "turned.json").read_bytes() == (tmp_path / "plain.json").read_bytes()
    assert json.loads((tmp_path / "plain.json").read_text())["edges"] == [
        {"source": 0, "target": 1},
        {"source": 0, "target": 3},
        {"source": 1, "target": 3},
    ]


def test_edge_list_takes_comments_weights_and_windows_line_ends(path: Path) -> None:
    path = path.with_suffix(".txt")
    path.write_bytes(
        b"\xef\xbb\xbf# parent child\r\n\r\n0 1\r\n  0\t2 0.5 # a weight\r\n2 3 {'p': 1e-3}\r\n1 3 {} \r\n"
    )
    graph = read_graph(path, nodes=5)
    assert list(graph) == [0, 1, 2, 3, 4]
    assert list(graph.edges(data=True)) == [(0, 1, {}), (0, 2, {"weight": 0.5}), (1, 3, {}), (2, 3, {"p": 1e-3})]


def test_json_that_does_not_say_directed_is_directed(path: Path) -> None:
    path.write_text('{"nodes": [{"id": 0}, {"id": 1}], "edges": [{"source": 0, "target": 1}]}')
    assert list(read_graph(path).edges) == [(0, 1)]


def test_graphml_without_entities_may_have_a_doctype(tmp_path: Path) -> None:
    path = tmp_path / "g.xml"
    path.write_text(graphml('<node id="0"/>', head='<!DOCTYPE graphml SYSTEM "http://graphml.example/graphml.dtd">'))
    assert list(read_graph(path)) == [0]


# ------------------------------------------------------------------------------------------------- what is no causal graph


@pytest.mark.parametrize("form", ["json", "graphml", "txt"])
@pytest.mark.parametrize(
    ("edges", "problem"),
    [
        ([(0, 1), (1, 2), (2, 1)], "a cycle in 1 -> 2 -> 1; the parent comes after its child in 2 -> 1"),
        ([(0, 1), (2, 2)], "self loops at 2"),
        ([(0, 1), (2, 0)], "the parent comes after its child in 2 -> 0"),
        ([(0, 1), (0, 2), (0, 1)], "listed twice: the edges 0 -> 1"),
        ([(0, 1), (0, 2), (2, "x")], "not integers: the nodes 'x'"),
        ([(0, 1), (0, 2), (2, "03")], "not integers: the nodes '03'"),
    ],
)
def test_the_same_words_for_every_form(form: str, edges: list[tuple[Any, Any]], problem: str, tmp_path: Path) -> None:
    names = dict.fromkeys([0, 1, 2, *(node for edge in edges for node in edge)])
    content = {
        "json": node_link(names, edges),
        "graphml": graphml(
            "".join(f'<node id="{node}"/>' for node in names)
            + "".join(f'<edge source="{parent}" target="{child}"/>' for parent, child in edges)
        ),
        "txt": "\n".join(f"{parent} {child}" for parent, child in edges),
    }[form]
    nodes = 3 if form == "txt" else None
    assert refused(tmp_path / f"g.{form}", content, nodes=nodes) == f"{problem}. {RULE}"


@pytest.mark.parametrize("form", ["json", "graphml"])
def test_nodes_are_what_the_file_lists(form: str, tmp_path: Path) -> None:
    def content(nodes: list[Any], edges: list[tuple[Any, Any]]) -> str:
        if form == "json":
            return node_link(nodes, edges)
        body = "".join(f'<node id="{node}"/>' for node in nodes)
        return graphml(body + "".join(f'<edge source="{u}" target="{v}"/>' for u, v in edges))

    path = tmp_path / f"g.{form}"
    assert refused(path, content([0, 1], [(0, 1), (1, 2)])).startswith("edges to nodes that it does not list: 2.")
    assert refused(path, content([0, 1, 1], [(0, 1)])).startswith("listed twice: the nodes 1.")
    assert refused(path, content([0, 2, 5], [(0, 2)])).startswith("the numbering leaves out 1, 3-4.")
    assert refused(path, content([0, 1], []), nodes=3).startswith("it has 2 nodes where 3 were expected.")
    assert refused(path, content([], [])).startswith("it has no nodes.")
    assert refused(path, content([0, "1.0", -1], [])).startswith(
        "not integers: the nodes '1.0'; negative: the nodes -1."
    )


def test_everything_wrong_is_said_at_once(path: Path) -> None:
    message = refused(path, node_link([0, 0, 2, "a"], [(2, 0), (2, 2), (0, 9)]), nodes=7)
    assert message == (
        "listed twice: the nodes 0; edges to nodes that it does not list: 9; it has 4 nodes where 7 were expected; "
        "not integers: the nodes 'a'; the numbering leaves out 1, 3-8; self loops at 2; "
        f"the parent comes after its child in 2 -> 0. {RULE}"
    )


def test_json_names_that_only_equal_integers(path: Path) -> None:
    message = refused(path, node_link([0, True, 1.0, [2], {"a": 3}, "９", " 4", "1_0", "+5"], []))
    assert message.startswith("not integers: the nodes 'True', '1.0', '[2]', \"{'a': 3}\", '９', ' 4', '1_0', '+5'.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is not JSON: Expecting value"),
        ("{", "it is not JSON: "),
        (b"\x89PNG\r\n\x1a\n\xff\x00", "it is not JSON: "),
        (b"[" * 10**6, "it is not JSON: maximum recursion depth"),
        ('{"nodes": [' + "9" * 10**5 + "]}", "it is not JSON: Exceeds the limit"),
        (
            "[[0, 1]]",
            "networkx's node-link form is an object with the keys 'nodes' and 'edges' (or 'links'), both lists; ",
        ),
        ('{"nodes": []}', "networkx's node-link form is an object with the keys"),
        ('{"nodes": {}, "edges": []}', "networkx's node-link form is an object with the keys"),
        ('{"directed": true, "adjacency": []}', "both lists; it has the keys 'directed', 'adjacency'."),
        (
            '{"nodes": [], "edges": [], "links": []}',
            "it has both 'edges' and 'links'. Keep the one that holds its edges.",
        ),
        (
            node_link([0], [], directed=False),
            'it says "directed": false. A causal graph is directed, from parent to child.',
        ),
        (node_link([0], [], multigraph=True), 'it says "multigraph": true. A causal graph holds each edge once.'),
        (
            '{"nodes": [{"id": 0}, {"name": 1}, 2], "links": [{"source": 0}, {"target": null}, "01"]}',
            "nodes[1] has no 'id', nodes[2] has no 'id', links[0] has no 'target', links[1] has no 'source', "
            "links[1] has no 'target', links[2] has no 'source', links[2] has no 'target'.",
        ),
    ],
)
def test_json_that_is_no_graph(content: str | bytes, message: str, path: Path) -> None:
    assert message in refused(path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is not XML: no element found"),
        ("<graphml>", "it is not XML: no element found"),
        (b"\x00\x01\x02" * 1000, "it is not XML: "),
        ('<?xml version="1.0" encoding="klingon"?><graphml/>', "it is not XML: unknown encoding"),
        ("<html><body/></html>", "networkx can't read it as GraphML: file not successfully read as graphml."),
        (graphml('<node id="0"/>', default="undirected"), 'it does not say edgedefault="directed".'),
        (graphml('<node id="0"/><graph edgedefault="directed"/>'), "it holds 2 graphs. Keep one."),
        (
            graphml('<node id="0"><data key="nokey">1</data></node>'),
            "networkx can't read it as GraphML: Bad GraphML data",
        ),
        (graphml("<hyperedge/>"), "networkx can't read it as GraphML: GraphML reader doesn't support hyperedges."),
        (graphml("<node/>"), "not integers: the nodes 'None'."),
        (graphml('<node id="n0"/><node id="n1"/>'), "not integers: the nodes 'n0', 'n1'."),
    ],
)
def test_xml_that_is_no_graph(content: str | bytes, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path / "g.graphml", content)


@pytest.mark.parametrize(
    "entities",
    [
        # A billion laughs, a quadratic blowup, and a file of the reader's machine.
        '<!ENTITY e0 "ha">' + "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10)),
        '<!ENTITY e9 "' + "A" * 10**5 + '">',
        '<!ENTITY e9 SYSTEM "file:///etc/passwd">',
        "<!ENTITY % e9 SYSTEM 'http://127.0.0.1/evil.dtd'> %e9;",
    ],
    ids=["billion laughs", "quadratic blowup", "file", "parameter"],
)
@pytest.mark.parametrize("name", ["g.graphml", "g.txt"])
def test_xml_entities_are_refused(entities: str, name: str, tmp_path: Path) -> None:
    bomb = graphml('<node id="0"/>' + "<desc>&e9;</desc>" * 100, head=f"<!DOCTYPE graphml [{entities}]>")
    start = time.perf_counter()
    message = refused(tmp_path / name, bomb)
    assert time.perf_counter() - start < 2
    assert "which a graph has no use for. Remove its DOCTYPE." in message


# --------------------------------------------------------------------------------------------------------------- edge lists


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0 1\n2\n0 1 2 3\n0 1 x\n0 1 {'a'}\n0 1 {1: 2}\n0 1 {f()}", None),
        ("0 1 {'a': " + "(" * 300 + ")" * 300 + "}", "line 1 is \"0 1 {'a': "),
        ("0 1 {'a': " + "-" * 10**5 + "1}", "line 1 is \"0 1 {'a': "),
        ("0 1 {'a': '" + "x" * 1000 + "'}", "line 1 is \"0 1 {'a': "),
        (b"0 1\n\xff\xfe", "it is neither JSON, GraphML nor an edge list: it is not UTF-8 text."),
        (b"0 1\n\x00\x00", "it is neither JSON, GraphML nor an edge list: it is a binary file."),
        ("0 1\n3 20\n-1 2\n3 1000000000000", "of 5 nodes the last is 4, and it mentions -1, 20, 1000000000000."),
        ("0 1\na,b", "line 2 is 'a,b'"),
        ("a b", "not integers: the nodes 'a', 'b'."),
    ],
)
def test_edge_list_that_is_no_graph(content: str | bytes, message: str | None, tmp_path: Path) -> None:
    expected = message or (
        "a line of an edge list is 'parent child', then optionally a weight or a dict of data, then optionally a # comment; "
        "line 2 is '2', line 3 is '0 1 2 3', line 4 is '0 1 x', line 5 is \"0 1 {'a'}\", line 6 is '0 1 {1: 2}', "
        "line 7 is '0 1 {f()}'."
    )
    assert expected in refused(tmp_path / "g.edges", content, nodes=5)


def test_edge_list_needs_its_number_of_nodes(tmp_path: Path) -> None:
    path = tmp_path / "g.txt"
    assert refused(path, "0 1") == "an edge list does not say how many nodes there are. Give their number too."
    assert refused(path, "0 1", nodes=0) == "the number of nodes is 0. It must be an integer of at least 1."


# ------------------------------------------------------------------------------------------------------------ the file itself


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in [
        (tmp_path / "absent.json", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "nul\0.json", "embedded null byte"),
    ]:
        with pytest.raises(CausalProbeError) as caught:
            read_graph(path)
        assert str(caught.value) == f"Can't read the graph file {str(path)!r}: {reason}."


def test_a_file_too_large_is_not_parsed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "LARGEST_FILE", 2**20)
    path.write_text(node_link(range(3), []).ljust(2**20))
    assert len(read_graph(path)) == 3
    path.write_text(node_link(range(3), []).ljust(2**20 + 1))
    with pytest.raises(CausalProbeError, match="is larger than 1 MiB"):
        read_graph(path)


@quick
@given(content=st.binary(max_size=200), name=st.sampled_from(["g.json", "g.graphml", "g.txt", "g"]))
def test_garbage_never_ends_in_a_traceback(content: bytes, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    with contextlib.suppress(CausalProbeError):
        assert len(read_graph(path, nodes=3)) == 3


def test_a_long_file_of_garbage_is_refused_briefly(tmp_path: Path) -> None:
    message = refused(tmp_path / "g.txt", "x\n" * 20_000, nodes=5)
    assert message.endswith("line 50 is 'x' and 19,950 more.")


def test_an_edge_list_without_an_edge_is_refused(tmp_path: Path) -> None:
    for content in ("", "\n", "# parent child\n"):
        assert refused(tmp_path / "g.txt", content, nodes=5).startswith("it lists no edge. Is it empty by mistake? ")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused_when_read(value: str, tmp_path: Path) -> None:
    edge = '{"directed": true, "nodes": [{"id": 0}, {"id": 1}], "edges": [{"source": 0, "target": 1, "w": [%s]}]}'
    node = '{"nodes": [{"id": 0, "x": %s}], "edges": []}'
    graph = '{"graph": {"x": {"y": %s}}, "nodes": [{"id": 0}], "edges": []}'
    for content in (edge, node, graph):
        assert "not finite, or of no plain kind: " in refused(tmp_path / "g.json", content % value)
    if value != "1e999":
        assert "the edge 0 -> 1 has 'weight'" in refused(tmp_path / "g.txt", f"0 1 {value}", nodes=3)
    key = '<key id="w" for="edge" attr.name="weight" attr.type="double"/>'
    content = graphml(f'<node id="0"/><node id="1"/><edge source="0" target="1"><data key="w">{value}</data></edge>')
    content = content.replace("<graph ", f"{key}<graph ", 1)
    assert "the edge 0 -> 1 has 'weight'" in refused(tmp_path / "g.graphml", content)


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("g.dot", "digraph {0 -> 1}", "DOT"),
        ("g", "strict digraph G {\n0 -> 1\n}", "DOT"),
        ("g.txt", "graph g\n{ 0 -- 1; }", "DOT"),
        ("g.txt", "digraph {0 -> 1}", "DOT"),
        ("g.csv", "0 1\n", "a table"),
        ("g.txt", "0,1,0\n0,0,1\n", "a table"),
        ("g.txt", "parent;child\n0;1\n", "a table"),
        ("g.gml", "graph [ directed 1 ]", "GML"),
        ("g.txt", "graph [\n directed 1\n]", "GML"),
        ("g.npy", b"\x93NUMPY", "an array"),
    ],
)
def test_a_form_that_is_not_read_is_named(name: str, content: str | bytes, form: str, tmp_path: Path) -> None:
    assert refused(tmp_path / name, content, nodes=2).startswith(f"it is {form}, a form that isn't read. ")


def test_nesting_ends_in_no_traceback(tmp_path: Path) -> None:
    deep = 200_000
    for name, content in [
        ("g.json", "[" * deep),
        ("g.json", '{"nodes": [{"id": 0, "x": ' + "[" * 900 + "]" * 900 + '}], "edges": []}'),
        ("g.xml", "<a>" * deep + "</a>" * deep),
        ("g.xml", graphml("<node>" * deep + "</node>" * deep)),
        ("g.txt", "0 1 " + "[" * deep),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(CausalProbeError) as caught:
            read_graph(tmp_path / name, nodes=2)
        assert len(str(caught.value)) < 2000


def test_names_that_no_file_system_takes_are_refused_briefly() -> None:
    for name in ("x" * 5000, "~nouser/x.json"):
        with pytest.raises(CausalProbeError, match="Can't read the graph file") as caught:
            read_graph(name)
        assert len(str(caught.value)) < 500


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "g.txt")
    with pytest.raises(CausalProbeError, match="it is no file, and reading it might never end"):
        read_graph(tmp_path / "g.txt", nodes=2)


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "g.txt").write_text("0 1\n")
    with pytest.raises(CausalProbeError, match="A graph of 1,000,000,000,000 nodes was asked for"):
        read_graph(tmp_path / "g.txt", nodes=10**12)


# ---------------------------------------------------------------------------------------------------------------- writing


def test_what_is_not_a_causal_graph_is_not_written(path: Path) -> None:
    with pytest.raises(CausalProbeError, match="the parent comes after its child in 1 -> 0"):
        write_graph(nx.DiGraph([(1, 0)]), path)
    nan = chain(2)
    nan.edges[0, 1]["weight"] = float("nan")
    with pytest.raises(CausalProbeError, match="holds nan"):
        write_graph(nan, path)
    assert list(path.parent.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CausalProbeError, match=r"it is a folder\. Name a file\."):
        write_graph(chain(2), tmp_path)
    with pytest.raises(CausalProbeError, match="Can't write"):
        write_graph(chain(2), tmp_path / "absent" / "g.json")


@pytest.mark.parametrize("name", ["g.graphml", "g.XML"])
def test_json_is_not_written_under_a_name_that_says_graphml(name: str, tmp_path: Path) -> None:
    with pytest.raises(CausalProbeError, match="graphs are written as JSON"):
        write_graph(chain(2), tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []
