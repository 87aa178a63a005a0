"""Whatever text goes into a picture, a page or a notebook's output stays text: the tags are those of harmless text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causal_probe import viz
from causal_probe.viz import report as parts
from causal_probe.viz.figure import to_svg

from .hostile import HOSTILE

#: Pieces that end, begin or hide markup, and any character at all, surrogates included.
TEXT = st.one_of(
    st.sampled_from(HOSTILE),
    st.lists(st.sampled_from(["<", ">", "&", '"', "'", "</", "script", "]]>", "<!--", "-->", "{{", "\\", "$", "\n", "\0", "\u202e"]), max_size=12)
    .map("".join),
    st.text(st.characters(codec=None, exclude_categories=()), max_size=30),
)  # fmt: skip
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Tags(HTMLParser):
    """The start tags of a page with the names of their attributes, and the text outside scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self._script = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self._script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if not self._script:
            self.text += data


def page(text: str) -> str:
    """Text in every place of a page that takes one."""
    graph = nx.DiGraph([(0, 1)])
    widget = viz.attention(
        [text, text], np.tril(np.ones((1, 2, 2))), head_names=[text], graphs=[graph], scores={text: [1.0]}
    )
    blocks = [
        parts.Headline([(text, text, text)]),
        parts.Paragraph(f"one {text}".replace("\n\n", " ")),
        parts.Table([text], [[text]], text),
        parts.Code(text, f"one {text}"),
        parts.Attention(widget, text),
    ]
    return viz.Report(
        text, [parts.Section(text, blocks)], {f"name {text}": text}, {f"name {text}": text}, text, f"one {text}"
    ).to_html()


@given(TEXT)
@FEW
def test_a_page_has_the_tags_of_harmless_text(text: str) -> None:
    assert Tags(page(text)).found == Tags(page("harmless")).found


@given(TEXT)
@FEW
def test_a_notebook_output_has_the_tags_of_harmless_text(text: str) -> None:
    def output(token: str) -> str:
        graph = nx.DiGraph([(0, 1)])
        pattern = np.tril(np.ones((1, 2, 2)))
        return viz.attention(
            [token, token], pattern, head_names=[token], graphs=[graph], scores={token: [1]}
        )._repr_html_()

    made = Tags(output(text))
    made.text.encode()
    assert made.found == Tags(output("harmless")).found


def graph(text: str) -> str:
    chain = nx.path_graph(3, create_using=nx.DiGraph)
    return to_svg(viz.graph(chain, chain, labels=[text] * 3, title=text), prefix="a-", description=text)


@given(TEXT)
@FEW
def test_the_labels_of_a_graph_are_text(text: str) -> None:
    found = Tags(graph(text)).found
    # Lines of a title may be more than one; every other tag is there as often as with harmless text.
    kinds = {tag for tag, _ in found}
    assert kinds == {tag for tag, _ in Tags(graph("harmless")).found}
    assert sum(tag == "path" for tag, _ in found) == sum(tag == "path" for tag, _ in Tags(graph("harmless")).found)
    ElementTree.fromstring(graph(text))


@pytest.mark.parametrize("text", [*HOSTILE, "_private", "$\\frac{$", "$x$ and $y$"])
def test_every_picture_is_well_formed_and_not_wider_than_its_text_may_make_it(text: str) -> None:
    curve = viz.Curve([0, 1], [0, 1])
    pictures = [
        viz.blocks({text: np.eye(2), (0, 0, text, text): np.eye(2)}, title=text, value_name=text),
        viz.heads([[0.1, 0.2]], score_name=text, title=text),
        viz.training({"step": [0, 1], "loss": [1, 2], "stage": [text, text + "a"]}, {text: 1.0}, title=text, loss_name=text),
        viz.curves({text: {text: curve}}, x_name=text, y_name=text, references={text: {text: 1.0}}, title=text),
    ]  # fmt: skip
    if "\ud800" not in text:  # pandas' own index can't hold a lone surrogate
        table = pd.DataFrame([[1.0]], index=[text], columns=[text])
        pictures.append(viz.table_map(table, value_name=text, row_name=text, column_name=text, title=text))
    for figure in pictures:
        svg = to_svg(figure, prefix="a-", description=text)
        assert {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()} <= {
            "svg", "g", "defs", "path", "use", "text", "tspan", "rect", "clipPath", "image"
        }  # fmt: skip
        box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
        assert box is not None
        assert all(float(side) < 1300 for side in box.groups()), (figure.axes[0].get_title(), box.groups())


def test_a_long_token_is_cut_with_a_mark() -> None:
    long = "x" * 10_000
    widget = viz.attention([long], [[[1.0]]])
    assert widget.props["tokens"] == ["x" * 23 + "…"]
    assert "1 token longer than 24 characters is cut" in widget.note
    assert "…</text>" in graph(long)
    table = viz.Report("T", [parts.Section("S", [parts.Table(["a"], [[long]])])], {}, {}, "").to_html()
    assert f"{'x' * 500}… (10,000 characters)" in table
    assert "x" * 501 not in table
