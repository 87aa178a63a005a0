"""Every kind of report that a command writes: whole, small, offline; with hostile text in it, as text and in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from causal_probe import viz
from causal_probe.viz.widget import bundle

from . import every_report
from .browser import Browser, needs_browser
from .hostile import HACK
from .page import Page

#: What pages are made of; anything else came from a text. image and use are SVG's, whose references are checked.
TAGS = {
    "html", "head", "title", "style", "body", "div", "header", "nav", "main", "section", "h1", "h2", "h4", "p", "ol", "ul", "li",
    "a", "dl", "dt", "dd", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "b", "span", "bdi", "pre",
    "code", "script", "noscript", "label", "select", "option", "meta", "link",
    "svg", "g", "defs", "path", "use", "text", "tspan", "rect", "clippath", "image",
}  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, viz.Report]:
    return every_report.reports(tmp_path_factory.mktemp("sweep") / "out")


@pytest.fixture(scope="module")
def pages(reports: dict[str, viz.Report]) -> dict[str, str]:
    return {kind: report.to_html() for kind, report in reports.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.slow
def test_every_page_is_whole_small_and_its_own(pages: dict[str, str]) -> None:
    for kind, page in pages.items():
        outline = Page(page)
        assert {tag for tag, _ in outline.tags} <= TAGS, kind
        assert not [name for _, attributes in outline.tags for name in attributes if name.startswith("on")], kind
        links = [
            value or ""
            for tag, attributes in outline.tags
            for name, value in attributes.items()
            if name in ("href", "src", "xlink:href", "action")
        ]
        assert all(link.startswith(("#", "data:")) for link in links), kind
        assert len(page.encode()) < 3_000_000, kind
        assert page.count(bundle()) == ("data-component" in page), kind
        ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
        assert len(ids) == len(set(ids)), kind


@pytest.mark.slow
def test_every_page_leads_to_its_sections_and_says_how_it_was_made(
    pages: dict[str, str], reports: dict[str, viz.Report]
) -> None:
    for kind, page in pages.items():
        outline = Page(page)
        links = [attributes["href"] for tag, attributes in outline.tags if tag == "a"]
        sections = [attributes["id"] for tag, attributes in outline.tags if tag == "section" and "id" in attributes]
        assert links == [f"#{name}" for name in sections], kind
        assert sections[-1] == "made"
        end = page[page.index('id="made"') :]
        assert end.index("<pre>") < end.index("Settings") < end.index("Versions"), kind
        if kind != "everything":
            compile(reports[kind].call, kind, "exec")
            assert any(
                f"\n{room}." in reports[kind].call
                for room in ("circuits", "discovery", "experiments", "papers", "sweep")
            ), kind


@pytest.mark.slow
def test_every_figure_and_table_says_what_it_shows(reports: dict[str, viz.Report]) -> None:
    for kind, report in reports.items():
        for section in report.sections:
            for block in section.blocks:
                if block.kind in ("picture", "table", "attention"):
                    assert block.caption, f"{kind}, {section.title}: a {block.kind} without a caption"


@pytest.mark.slow
@pytest.mark.browser
@needs_browser
def test_every_report_in_a_browser(pages: dict[str, str], browser: Browser, tmp_path: Path) -> None:
    """No complaint, no request; each widget and each drawing has a box; nothing that a text holds has run."""
    for place, (kind, html) in enumerate(pages.items()):
        file = tmp_path / f"{place}.html"
        file.write_bytes(html.encode())
        page = browser.open(file)
        assert page.complaints() == [], kind
        assert page.requests() == [], kind
        assert page.run("document.title") != "HACKED", kind
        assert page.run("document.querySelectorAll('img, iframe, object, embed, form, input').length") == 0, kind
        drawn = page.run(
            "[...document.querySelectorAll('.cp-widget')].map(place => [...place.querySelectorAll('canvas')]"
            ".filter(canvas => canvas.getBoundingClientRect().width > 20).length)"
        )
        assert len(drawn) == html.count('class="cp-widget"'), kind
        assert all(canvases >= 2 for canvases in drawn), (kind, drawn)
        boxes = page.run(
            "[...document.querySelectorAll('.drawing svg')].map(svg => [svg.getBoundingClientRect().width, "
            "svg.getBoundingClientRect().height, svg.querySelectorAll('path, use, image, text').length])"
        )
        assert len(boxes) == html.count('class="drawing"'), kind
        assert all(width > 100 and height > 40 and marks > 3 for width, height, marks in boxes), (kind, boxes)
        assert page.run("document.documentElement.scrollWidth <= innerWidth"), f"{kind} is wider than its window"
        page.close()


@pytest.mark.slow
@pytest.mark.browser
@needs_browser
def test_heads_change_their_order_in_a_browser(pages: dict[str, str], browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_bytes(pages["everything"].encode())
    page = browser.open(file)
    names = "[...document.querySelectorAll('.cp-beside h4')].map(name => name.textContent)"
    first = page.run(names)
    assert len(first) == 2
    page.run(
        "(() => { const choice = document.querySelector('select'); choice.value = '0'; choice.dispatchEvent(new Event('change')); })()"
    )
    assert page.run(names) == first[::-1]  # the second has the larger score
    page.run("new Promise(done => setTimeout(done, 100))")
    assert page.run("document.querySelectorAll('.cp-widget canvas').length") == 3
    assert page.run("document.querySelectorAll('.cp-beside li').length") == 2 * 15
    assert page.complaints() == []
    page.close()


def test_the_hostile_title_would_be_seen() -> None:
    assert HACK == "document.title='HACKED'"
