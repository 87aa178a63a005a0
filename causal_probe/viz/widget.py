"""circuitsvis' interactive pictures, made safe and self-contained.

circuitsvis carries its JavaScript in its wheel, but what it writes around it points to a server on the internet, doesn't
escape the tokens (one that reads ``</script>`` ends the script and may start another), and leaves a ``div`` open that
swallows what follows. Here the component's name and its properties are kept apart from the page, and written by us.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from circuitsvis.utils.render import RenderedHTML
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from causal_probe.errors import CausalProbeError
from causal_probe.viz.page import environment

__all__ = ["PLAYER", "HeadNotes", "Widget", "bundle"]

#: Draws one widget, and draws it anew when another order of the heads is chosen. Whatever the data hold is set as text.
PLAYER = Markup("""\
function causalProbeDraw(CircuitsVis, id, component, data) {
  const place = document.getElementById(id), picture = place.closest(".cp-picture");
  const heads = [...picture.querySelectorAll(".cp-beside section")];
  const order = (by) => (data.props.attentionHeadNames ?? []).map((_, head) => head).sort(
    (a, b) => by === null ? a - b : (by[b] ?? -Infinity) - (by[a] ?? -Infinity) || a - b);
  const draw = (heads_in_order) => {
    const fresh = document.createElement("div"), props = { ...data.props };
    fresh.id = id + "-drawn";
    place.replaceChildren(fresh);
    for (const key of ["attention", "attentionHeadNames"])
      if (key in props) props[key] = heads_in_order.map((head) => data.props[key][head]);
    CircuitsVis.render(fresh.id, CircuitsVis[component], props);
    for (const head of heads_in_order) if (heads[head]) heads[head].parentNode.append(heads[head]);
  };
  picture.querySelector("select")?.addEventListener("change", (event) =>
    draw(order(event.target.value === "" ? null : data.scores[Number(event.target.value)])));
  draw(order(null));
}
""")


@cache
def bundle() -> Markup:
    """The JavaScript of circuitsvis, fit to stand inside a ``<script>`` element; it defines the global ``CircuitsVis``.

    Raises
    ------
    CausalProbeError
        If the installed circuitsvis doesn't carry it.
    """
    file = resources.files("circuitsvis") / "dist" / "cdn" / "iife.js"
    try:
        source = file.read_text(encoding="utf-8")
    except OSError as error:
        raise CausalProbeError(
            "The installed circuitsvis doesn't carry its JavaScript (dist/cdn/iife.js). Install circuitsvis 1.43.3 or later."
        ) from error
    # A source map would be asked for over the network by a browser's developer tools.
    source = source.partition("//# sourceMappingURL=")[0]
    # Inside a JavaScript string, where alone it occurs, "<\/" is "</"; and a page's parser doesn't see an end tag in it.
    return Markup(source.replace("</script", r"<\/script").rstrip())


@dataclasses.dataclass(frozen=True)
class HeadNotes:
    """The text beside the picture for one head: its name, its ``scores`` (name, text), and its ``edges``.

    An edge is (parent, its token, child, its token, weight); ``edges`` is None where no graph came with the head.
    """

    name: str
    scores: tuple[tuple[str, str], ...] = ()
    edges: tuple[tuple[int, str, int, str, str], ...] | None = None


class Widget(RenderedHTML):  # type: ignore[misc]  # circuitsvis ships no types
    """One interactive picture of circuitsvis.

    A notebook shows it without a network: every output carries the JavaScript (1.3 MB). A
    :class:`~causal_probe.viz.Report` carries it once for all its widgets.

    Parameters
    ----------
    component
        The name of a component of circuitsvis' JavaScript, such as ``"AttentionHeads"``.
    props
        Its properties, in plain JSON types.
    note
        A note on rounding and omissions, shown under the picture.
    tokens
        The tokens as they are shown, for the text beside the picture.
    heads
        The texts beside the picture, head by head.
    scores
        By name, a number for each head or None: the orders that a reader can choose.
    """

    def __init__(
        self,
        component: str,
        props: Mapping[str, Any],
        *,
        note: str = "",
        tokens: tuple[str, ...] = (),
        heads: tuple[HeadNotes, ...] = (),
        scores: Mapping[str, Sequence[float | None]] | None = None,
    ) -> None:
        self.component = component
        self.props = dict(props)
        self.note = note
        self.tokens = tokens
        self.heads = heads
        self.scores = dict(scores or {})

    def data(self) -> Markup:
        """The data of the JavaScript, as JSON that may stand inside a ``<script>`` element: ``<``, ``>``, ``&`` and ``'`` are escaped."""
        return htmlsafe_json_dumps({"props": self.props, "scores": [*self.scores.values()]}, separators=(",", ":"))

    @property
    def local_src(self) -> str:
        """The picture as a piece of HTML that needs nothing else; every call gives it a fresh id."""
        # The first output of a page that runs its copy shares it with the others: a second would register itself anew.
        macros = environment().get_template("widget.html.jinja").module
        made: Markup = macros.output(self, f"causal-probe-{uuid.uuid4()}", bundle(), PLAYER)  # type: ignore[attr-defined]  # a macro of the template
        return made.strip()

    @property
    def cdn_src(self) -> str:
        """The same as ``local_src``: nothing of ours asks the internet for anything."""
        return self.local_src

    def _repr_html_(self) -> str:
        return self.local_src

    def __repr__(self) -> str:
        n, pos = len(self.props.get("attentionHeadNames", ())), len(self.tokens)
        return f"<{self.component}: {n} head{'s' * (n != 1)}, {pos} token{'s' * (pos != 1)}; a notebook shows it, local_src is its HTML>"

    __str__ = __repr__
