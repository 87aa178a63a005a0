"""viz.Report: one page, whole, offline, with nothing in it that runs but our own scripts; as text and in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from circuitsvis.tokens import colored_tokens

from causal_probe import viz
from causal_probe.errors import CausalProbeError
from causal_probe.results import Citation
from causal_probe.viz import report as parts
from causal_probe.viz.figure import to_svg
from causal_probe.viz.widget import bundle

from .browser import Browser, needs_browser
from .hostile import HACK, HOSTILE
from .page import Page

N_WIDGETS = 20


def pattern(n_heads: int, n: int) -> np.ndarray:
    return np.tril(np.full((n_heads, n, n), 1 / n))


def example(title: str = "An example") -> viz.Report:
    """A report with everything in it, and hostile text wherever text can be."""
    chain = nx.path_graph(20, create_using=nx.DiGraph)
    tokens = [str(i % 3) for i in range(20)]
    widgets = [viz.attention(tokens, pattern(2, 20)) for _ in range(N_WIDGETS - 1)]
    widgets.append(viz.attention(HOSTILE, pattern(2, len(HOSTILE)), head_names=HOSTILE[:2]))
    text = " ".join(HOSTILE)
    sections = [
        parts.Section(
            "Result",
            [
                parts.Headline([("SHD", 0, "edges to change"), (text, None, text)]),
                parts.Paragraph(f"First.\n\n{text}"),
                parts.Picture(viz.graph(chain, chain, labels=(HOSTILE * 2)[:20], title=text), text),
                parts.Picture(viz.graph(chain), "The truth."),
                parts.Picture(viz.training({"step": [0, 1], "loss": [1.0, 0.5]}, {HOSTILE[0]: 0.7}, title=HOSTILE[1])),
                parts.Picture(viz.blocks({HOSTILE[0]: np.eye(3)})),
                parts.Picture(viz.heads(np.ones((2, 2)), score_name=HOSTILE[0])),
            ],
        ),
        parts.Section(
            f"Metrics {HOSTILE[0]}",
            [
                parts.Table(("metric", "value", text), [("precision", 1.0, text), ("AUROC", None, "one class")], text),
                parts.Code(text, text),
            ],
        ),
        parts.Section("Attention", [parts.Attention(widget, HOSTILE[0]) for widget in widgets]),
    ]
    settings = {"seed": 0, "heads": [1, 1], "graph": HOSTILE[0], HOSTILE[1]: None}
    return viz.Report(
        title, sections, settings, {"python": HOSTILE[0]}, f"recover({text!r})", text, Citation(text, HOSTILE[0])
    )


@pytest.fixture(scope="module")
def report() -> viz.Report:
    return example()


@pytest.fixture(scope="module")
def html(report: viz.Report) -> str:
    return report.to_html()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_bundle_is_there_once(html: str) -> None:
    assert html.count(bundle()) == 1
    assert html.count("var CircuitsVis=") == 1


def test_a_page_without_widgets_has_no_script() -> None:
    report = viz.Report("Text", [parts.Section("One", [parts.Paragraph("Hello.")])], {}, {}, "")
    assert "<script" not in report.to_html()
    assert "script-src &#39;none&#39;" in report.to_html()


def test_every_widget_has_its_place_and_its_data(page: Page) -> None:
    data = [attributes for tag, attributes in page.tags if tag == "script" and "data-component" in attributes]
    targets = [attributes["data-target"] for attributes in data]
    assert len(targets) == len(set(targets)) == N_WIDGETS
    assert set(targets) <= set(page.attributes("id"))
    assert {attributes["type"] for attributes in data} == {"application/json"}


def test_ids_are_unique_and_references_resolve(html: str, page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    inside = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    references = set(re.findall(r'(?:url\(#|href="#)([^")]+)', inside))
    assert len(references) > 10
    assert references <= set(ids)


def test_every_figure_is_an_svg_of_its_own(page: Page) -> None:
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(svgs) == 5
    assert all(attributes["role"] == "img" and attributes["viewbox"] for attributes in svgs)


def test_figure_text_stays_text(page: Page) -> None:
    texts = page.text_of("text")
    assert "truth" in texts
    assert "uniform" not in texts
    assert any(text.startswith("</script><") for text in texts)


def test_nothing_is_asked_of_the_network(html: str, page: Page) -> None:
    for attribute in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
        assert all(value.startswith(("#", "data:")) for value in page.attributes(attribute))
    own = html.replace(bundle(), "")
    # What is left are the names of XML namespaces; nobody fetches them.
    assert set(re.findall(r"(?:https?:)?//[\w.]+", re.sub("<!--.*?-->", "", own))) <= {"http://www.w3.org"}
    assert "@import" not in own
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy


def test_only_our_own_scripts_may_run(html: str, page: Page) -> None:
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert len(scripts) == 2
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert policy is not None
    assert re.findall(r"sha256-([^']+)'", policy) == hashes
    assert "script-src 'sha256-" in policy
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_hostile_text_is_text(page: Page) -> None:
    assert page.text_of("bdi")[-len(HOSTILE)] == "</script><script>docume…"
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert any(HACK in text for tag, text in page.texts if tag == "p")
    assert any("{{ 7*7 }}" in text for tag, text in page.texts if tag == "p")
    assert any("\\ud800 alone \\udfff" in text for tag, text in page.texts if tag == "p")


def test_contents_lead_to_every_section(page: Page) -> None:
    links = [value for value in page.attributes("href") if value.startswith(("#section", "#cite", "#made"))]
    assert links == ["#section-1", "#section-2", "#section-3", "#cite", "#made"]
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert [f"#{name}" for name in sections] == links


def test_settings_versions_and_call_are_at_the_end(html: str) -> None:
    end = html[html.index('id="made"') :]
    assert "recover(" in end
    assert '<th scope="row">heads</th><td>[1, 1]</td>' in end
    assert '<th scope="row">seed</th><td>0</td>' in end
    assert end.index("Settings") < end.index("Versions")


def test_values_of_a_table(page: Page) -> None:
    assert {"1.000", "0"} <= {text for _, text in page.texts}
    assert "undefined" in page.text_of("span")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123456, "0.1235"), (1.0, "1.000"), (-2, "−2"), (1234567, "1,234,567"), (12345.678, "12,345.7"), (0.0, "0"),
     (True, "yes"), ("a", "a"), (np.float32(0.5), "0.5000"), (np.int64(3), "3"), (1.5e-7, "1.500e−07")],
)  # fmt: skip
def test_cells(value: object, shown: str) -> None:
    section = parts.Section("One", [parts.Table(("name",), [(value,)])])
    assert f">{shown}</td>" in viz.Report("T", [section], {}, {}, "").to_html()


def test_the_page_is_small(html: str) -> None:
    assert len(html.encode()) < 3_000_000


def test_the_same_report_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        chain = nx.path_graph(4, create_using=nx.DiGraph)
        blocks = [parts.Picture(viz.graph(chain, chain)), parts.Attention(viz.attention(["a"], [[[1.0]]]))]
        viz.Report("T", [parts.Section("One", blocks)], {}, {}, "").write(tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_two_drawings_share_no_id() -> None:
    figure = viz.training({"step": [0, 1], "loss": [1.0, 0.5]}, title='id="x" url(#x)')
    first, second = (set(re.findall(r'\sid="([^"]+)"', to_svg(figure, prefix=prefix))) for prefix in ("a-", "b-"))
    assert first
    assert not first & second
    assert 'id="x" url(#x)' in to_svg(figure, prefix="a-")  # what only looks like an id is left alone


def test_a_table_of_uneven_rows() -> None:
    with pytest.raises(CausalProbeError, match="2 columns has rows of other lengths, at the places 1"):
        parts.Table(("a", "b"), [(1, 2), (1,)])


def test_html_of_circuitsvis_itself_is_refused() -> None:
    with pytest.raises(CausalProbeError, match="can't be made safe"):
        parts.Attention(colored_tokens(["a"], [1.0]))


def test_a_setting_without_a_plain_form() -> None:
    with pytest.raises(CausalProbeError, match="object"):
        viz.Report("T", [], {"x": object()}, {}, "").to_html()


# ---------------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.browser
@needs_browser
def test_all_of_twenty_widgets_in_a_browser(html: str, tmp_path: Path) -> None:
    """circuitsvis' own output shows the first of several."""
    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        page = browser.open(file)
        canvases = page.run(
            "[...document.querySelectorAll('.cp-widget')].map(place => place.querySelectorAll('canvas').length)"
        )
        assert canvases == [3] * N_WIDGETS  # a small one for each of two heads and the large one
        assert page.run("document.title") == "An example"
        assert page.complaints() == page.requests() == []


@pytest.mark.browser
@needs_browser
def test_notebook_outputs_in_a_browser(tmp_path: Path) -> None:
    """Two outputs on one page, as in a notebook, where no policy protects it: both draw, and nothing else runs."""
    widgets = [viz.attention(HOSTILE, pattern(1, len(HOSTILE)), scores={HOSTILE[0]: [1.0]}) for _ in range(2)]
    outputs = "".join(f"<section class=output>{widget._repr_html_()}</section>" for widget in widgets)
    file = tmp_path / "notebook.html"
    file.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>Notebook</title>{outputs}", encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        page = browser.open(file)
        canvases = page.run(
            "[...document.querySelectorAll('.output')].map(place => place.querySelectorAll('canvas').length)"
        )
        assert canvases == [2, 2]
        assert page.run("document.title") == "Notebook"
        assert page.complaints() == page.requests() == []
