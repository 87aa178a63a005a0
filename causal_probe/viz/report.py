"""The report: one HTML file with everything in it, that opens anywhere and asks the network for nothing.

Every value is escaped by the template engine. Beyond that, the page carries a content security policy that lets exactly
its own scripts run (they are named by their hashes) and forbids every request, so that whatever a token or a title
holds, it stays text.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
import numbers
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from circuitsvis.utils.render import RenderedHTML
from markupsafe import Markup
from matplotlib.figure import Figure

from causal_probe.errors import CausalProbeError
from causal_probe.results import Citation, to_jsonable, write_text
from causal_probe.viz.figure import to_svg
from causal_probe.viz.page import environment
from causal_probe.viz.widget import PLAYER, Widget, bundle

__all__ = ["Attention", "Block", "Code", "Headline", "Paragraph", "Picture", "Report", "Section", "Table"]

# Draws every widget of the page; one that fails leaves the others as they are.
_STARTER = PLAYER + Markup("""\
for (const data of document.querySelectorAll("script[data-component]")) {
  try {
    causalProbeDraw(CircuitsVis, data.dataset.target, data.dataset.component, JSON.parse(data.textContent));
  } catch (error) {
    document.getElementById(data.dataset.target).textContent = "This picture could not be drawn: " + error;
  }
}
""")


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Plain text; an empty line begins a new paragraph."""

    text: str
    kind: ClassVar[str] = "paragraph"

    def parts(self) -> list[str]:
        """The paragraphs of the text."""
        return [part for part in self.text.strip().split("\n\n") if part.strip()]


@dataclasses.dataclass(frozen=True)
class Headline:
    """The key numbers: ``(name, value, meaning)`` each."""

    figures: Sequence[tuple[str, object, str]]
    kind: ClassVar[str] = "headline"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: ``columns`` are its head, each row has a value for every column.

    Floats are shown with four significant digits, None as "undefined" (say in the row why).

    Raises
    ------
    CausalProbeError
        If a row has more or fewer values than there are columns.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        if uneven := [index for index, row in enumerate(self.rows) if len(row) != len(self.columns)]:
            raise CausalProbeError(
                f"A table of {len(self.columns)} columns has rows of other lengths, at the places {', '.join(map(str, uneven[:8]))}."
            )

    def is_numeric(self, column: int) -> bool:
        """Whether all defined values of the column are numbers; those columns are set flush right."""
        values = [row[column] for row in self.rows if row[column] is not None]
        return bool(values) and all(
            isinstance(value, numbers.Number) and not isinstance(value, bool) for value in values
        )


@dataclasses.dataclass(frozen=True)
class Picture:
    """A matplotlib figure, with a caption that says what to see in it. It becomes SVG, whose text can be searched."""

    figure: Figure
    caption: str = ""
    kind: ClassVar[str] = "picture"


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention patterns (or another circuitsvis picture of ours) with a caption; the tokens are listed above them.

    Raises
    ------
    CausalProbeError
        If ``widget`` is not what :func:`causal_probe.viz.attention` returns. What circuitsvis itself returns is HTML in
        which tokens aren't escaped, and is refused.
    """

    widget: RenderedHTML
    caption: str = ""
    kind: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        if not isinstance(self.widget, Widget):
            raise CausalProbeError(
                f"A report takes what causal_probe.viz.attention returns; found {type(self.widget).__module__}."
                f"{type(self.widget).__name__}, which can't be made safe for a page."
            )


@dataclasses.dataclass(frozen=True)
class Code:
    """Text to be copied as it is: Python, BibTeX, a command."""

    text: str
    caption: str = ""
    kind: ClassVar[str] = "code"


Block = Paragraph | Headline | Table | Picture | Attention | Code


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading of the table of contents, and its blocks."""

    title: str
    blocks: Sequence[Block]


@dataclasses.dataclass(frozen=True)
class Report:
    """A report on one result, as one HTML file.

    Parameters
    ----------
    title
        The heading of the page.
    sections
        Its blocks, in order. Figures and tables are numbered throughout the report.
    settings
        Every setting of the run, in plain values.
    versions
        Versions of what it was made with, by name (:func:`causal_probe.results.versions`).
    call
        The Python that gives the same result.
    summary
        The finding, in a sentence or two; it stands under the title.
    citation
        How to cite the result (what its ``cite()`` returns).

    Examples
    --------
    >>> report = Report("Nothing yet", [Section("Result", [Paragraph("None.")])], {"seed": 0}, {"python": "3.11"}, "None")
    >>> report.to_html().splitlines()[0]
    '<!DOCTYPE html>'
    """

    title: str
    sections: Sequence[Section]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    call: str
    summary: str = ""
    citation: Citation | None = None

    def to_html(self) -> str:
        """The whole page, the same for the same report: it holds no date and no random id.

        Raises
        ------
        CausalProbeError
            If a setting has no plain form.
        """
        interactive = any(block.kind == "attention" for section in self.sections for block in section.blocks)
        scripts = [bundle(), "\n" + _STARTER] if interactive else []
        # Figures and tables are numbered as the template meets them.
        counts: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))
        return (
            environment()
            .get_template("report.html.jinja")
            .render(
                report=self,
                settings={name: _setting(value) for name, value in self.settings.items()},
                scripts=scripts,
                policy=_policy(scripts),
                number=lambda series: next(counts[series]),
                svg=_svg,
            )
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page to ``path``, whole or not at all.

        Raises
        ------
        CausalProbeError
            If the folder is missing or can't be written.
        """
        write_text(path, self.to_html())


def _policy(scripts: Sequence[str]) -> str:
    """Forbid every request; let the given scripts run, the page's own styles hold, and images inside the page show."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    rules = (
        "default-src 'none'",
        f"script-src {allowed}",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "base-uri 'none'",
    )
    return "; ".join((*rules, "form-action 'none'"))


def _setting(value: Any) -> str:
    """A setting as it would be written in JSON, but for quotes around a text that stands alone."""
    plain = to_jsonable(value)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _svg(picture: Picture, number: int) -> Markup:
    return Markup(to_svg(picture.figure, prefix=f"figure{number}-", description=picture.caption))
