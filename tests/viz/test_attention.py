"""viz.attention: what goes into circuitsvis, what is left out, and what a notebook gets."""

from __future__ import annotations

import json
import re
import socket
from html.parser import HTMLParser

import networkx as nx
import numpy as np
import pytest
import torch
from circuitsvis.utils.render import RenderedHTML
from hypothesis import given
from hypothesis import strategies as st

from causal_probe import viz
from causal_probe.errors import CausalProbeError
from causal_probe.viz.widget import Widget, bundle

from .hostile import HOSTILE


def causal_pattern(n_heads: int, n: int) -> np.ndarray:
    scores = np.tril(np.random.default_rng(0).uniform(0.1, 1.0, size=(n_heads, n, n)))
    return scores / scores.sum(-1, keepdims=True)


def test_values_are_those_given_rounded() -> None:
    pattern = causal_pattern(2, 5)
    html = viz.attention(list("abcde"), pattern, head_names=["L0H0", "L0H1"], decimals=2)
    assert isinstance(html, RenderedHTML)
    np.testing.assert_array_equal(np.array(html.props["attention"]), np.round(pattern, 2))
    assert html.props["tokens"] == list("abcde")
    assert html.props["attentionHeadNames"] == ["L0H0", "L0H1"]
    assert html.props["maskUpperTri"] is True
    assert html.note == "Values are rounded to 2 decimals."


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_any_dtype_with_gradient(dtype: torch.dtype) -> None:
    patterns = torch.eye(3, dtype=dtype, requires_grad=True)[None]
    html = viz.attention(torch.tensor([7, 8, 9]), patterns)
    assert html.props["attention"] == [np.eye(3, dtype=int).tolist()]
    assert html.props["tokens"] == ["7", "8", "9"]


def test_what_is_left_out_is_said() -> None:
    tokens = ["y" * 100, "\ud800" * 20, *["a"] * 8]
    html = viz.attention(tokens, causal_pattern(5, 10), max_positions=6, max_heads=2)
    assert np.array(html.props["attention"]).shape == (2, 6, 6)
    assert len(html.props["tokens"]) == 6
    assert len(html.props["attentionHeadNames"]) == 2
    assert html.note == (
        "Shown are the first 6 of 10 positions, as queries and as keys. Shown are the first 2 of 5 heads. "
        "2 tokens longer than 24 characters are cut. Values are rounded to 3 decimals."
    )


def test_heads_are_sorted_and_carry_their_edges_and_scores() -> None:
    patterns = causal_pattern(3, 4)
    graphs = [nx.DiGraph([(0, 1)]), nx.DiGraph(), nx.DiGraph()]
    graphs[2].add_edge(1, 3, weight=0.91234)
    graphs[2].add_edge(0, 2, weight=-0.0001)
    scores = {"induction": [0.25, None, 0.5], "sink": [3, 2, 1]}
    made = viz.attention(list("abcd"), patterns, graphs=graphs, scores=scores, sort_by="induction")
    assert made.props["attentionHeadNames"] == ["H2", "H0", "H1"]
    np.testing.assert_array_equal(made.props["attention"], np.round(patterns[[2, 0, 1]], 3))
    assert [(head.name, head.scores, head.edges) for head in made.heads] == [
        ("H2", (("induction", "0.500"), ("sink", "1.000")), ((0, "a", 2, "c", "0.000"), (1, "b", 3, "d", "0.912"))),
        ("H0", (("induction", "0.250"), ("sink", "3.000")), ((0, "a", 1, "b", ""),)),
        ("H1", (("induction", "undefined"), ("sink", "2.000")), ()),
    ]
    assert made.scores == {"induction": [0.5, 0.25, None], "sink": [1, 3, 2]}


def test_the_best_heads_are_kept_and_edges_that_are_left_out_are_counted() -> None:
    graphs = [nx.DiGraph([(0, 1), (0, 4)])] * 3
    made = viz.attention(
        list("abcde"),
        causal_pattern(3, 5),
        graphs=graphs,
        scores={"x": [1, 3, 2]},
        sort_by="x",
        max_heads=2,
        max_positions=3,
    )
    assert made.props["attentionHeadNames"] == ["H1", "H2"]
    assert "the first 2 of 3 heads, by x." in made.note
    assert "2 edges are not listed." in made.note
    assert [len(head.edges or ()) for head in made.heads] == [1, 1]


def test_attention_to_the_future_is_not_masked() -> None:
    patterns = causal_pattern(2, 4)
    patterns[1] = 0.25
    assert viz.attention(list("abcd"), patterns).props["maskUpperTri"] is False


def test_one_colour_scale_for_negative_values_and_large_ones() -> None:
    props = viz.attention(["a", "b"], [[[0.5, 0.0], [-3.0, 1.0]]]).props
    assert (props["minValue"], props["maxValue"]) == (-3.0, 3.0)
    props = viz.attention(["a", "b"], causal_pattern(1, 2) / 10).props
    assert (props["minValue"], props["maxValue"]) == (-1.0, 1.0)  # a pattern's scale is 0 to 1, however faint it is


class Outline(HTMLParser):
    """Start tags with their attributes, end tags, and the text of every script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.starts: list[tuple[str, dict[str, str | None]]] = []
        self.ends: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.ends.append(tag)

    def handle_data(self, data: str) -> None:
        if self.starts and self.starts[-1][0] == "script" and self.ends.count("script") < len(self.scripts):
            self.scripts[-1] += data


def target_of(outline: Outline) -> str:
    """The id of the element that the picture is drawn into."""
    (found,) = (attributes["id"] for tag, attributes in outline.starts if tag == "div" and "id" in attributes)
    assert found is not None
    return found


def test_a_notebook_gets_one_whole_piece_of_html(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise AssertionError("circuitsvis asks the internet before it shows anything; ours must not")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    html = viz.attention(HOSTILE, causal_pattern(2, len(HOSTILE)))
    for page in (html._repr_html_(), html.local_src, html.show_code(), html.__html__()):
        outline = Outline(page)
        tags = [tag for tag, _ in outline.starts]
        assert tags == ["div", "style", "div", "div", "div", "noscript", "p", "script"]
        assert sorted(outline.ends) == sorted(tags)
        page.encode()
        assert "unpkg" not in page
        assert f'causalProbeDraw(CircuitsVis, "{target_of(outline)}", "AttentionHeads", ' in outline.scripts[0]


def test_every_showing_has_its_own_id() -> None:
    html = viz.attention(["a"], [[[1.0]]])
    assert target_of(Outline(html._repr_html_())) != target_of(Outline(html._repr_html_()))


def test_the_bundle_can_stand_in_a_script() -> None:
    assert "var CircuitsVis=" in bundle()[:100]
    assert not re.search("</script|<!--|sourceMappingURL", bundle())
    assert r"<script><\/script>" in bundle()  # the same JavaScript string as before, not a shorter one


@given(st.lists(st.text(st.characters(codec=None, exclude_categories=()), max_size=30), min_size=1, max_size=4))
def test_data_is_inert_and_whole(tokens: list[str]) -> None:
    widget = Widget("AttentionHeads", {"tokens": tokens})
    assert not re.search("[<>&'\u2028\u2029\ud800-\udfff]", widget.data())
    assert json.loads(widget.data()) == {"props": {"tokens": tokens}, "scores": []}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a", "b"], np.zeros((2, 2))), {}, "[head query key]; found the shape [2, 2]"),
        ((["a"], np.zeros((1, 2, 2))), {}, "1 tokens with patterns of 2 queries and 2 keys"),
        ((["a", "b"], np.full((1, 2, 2), np.nan)), {}, "4 of 4 values that are NaN"),
        (("ab", np.zeros((1, 2, 2))), {}, "`tokens` is 'ab'"),
        ((["a"], np.ones((1, 1, 1))), {"max_positions": 0, "decimals": -1, "head_names": []}, "max_positions = 0; "),
        ((["a"], np.ones((1, 1, 1))), {"max_positions": 0, "decimals": -1, "head_names": []}, "decimals = -1; "),
        ((["a"], np.ones((1, 1, 1))), {"max_heads": 0, "head_names": []}, "0 head names with patterns of 1 heads"),
        ((["a"], np.ones((1, 1, 1))), {"graphs": []}, "0 graphs came with 1 heads"),
        ((["a"], np.ones((1, 1, 1))), {"graphs": [nx.Graph()]}, "the graph of head 0 is a Graph"),
        (
            (["a"], np.ones((1, 1, 1))),
            {"graphs": [nx.DiGraph([(0, 1)])]},
            "has the node 1, which is none of 1 positions",
        ),
        ((["a"], np.ones((1, 1, 1))), {"graphs": [nx.DiGraph([("a", "b")])]}, "has the node 'a'"),
        ((["a"], np.ones((1, 1, 1))), {"scores": {"x": [1, 2]}}, "x has 2 scores for 1 heads"),
        (
            (["a"], np.ones((1, 1, 1))),
            {"scores": {"x": [float("nan")]}},
            "is [nan]. It must be a sequence, each of it a finite number",
        ),
        ((["a"], np.ones((1, 1, 1))), {"scores": {"x": [1]}, "sort_by": "y"}, "sorted by 'y', and the scores are x"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], options: dict[str, object], message: str) -> None:
    with pytest.raises(CausalProbeError, match=re.escape(message)):
        viz.attention(*arguments, **options)
