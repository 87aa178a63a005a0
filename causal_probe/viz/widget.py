"""circuitsvis' interactive pictures, made safe and self-contained.

circuitsvis carries its JavaScript in its wheel, but what it writes around it points to a server on the internet, doesn't
escape the tokens (one that reads ``</script>`` ends the script and may start another), and leaves a ``div`` open that
swallows what follows. Here the component's name and its properties are kept apart from the page, and written by us.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from circuitsvis.utils.render import RenderedHTML
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from causal_probe.errors import CausalProbeError

__all__ = ["Widget", "bundle"]


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
        What was rounded or left out; shown under the picture.
    tokens
        The tokens as they are shown, for the text beside the picture.
    """

    def __init__(
        self, component: str, props: Mapping[str, Any], *, note: str = "", tokens: tuple[str, ...] = ()
    ) -> None:
        self.component = component
        self.props = dict(props)
        self.note = note
        self.tokens = tokens

    def data(self) -> Markup:
        """The properties as JSON that may stand inside a ``<script>`` element: ``<``, ``>``, ``&`` and ``'`` are escaped."""
        return htmlsafe_json_dumps(self.props, separators=(",", ":"))

    @property
    def local_src(self) -> str:
        """The picture as a piece of HTML that needs nothing else; every call gives it a fresh id."""
        target = f"causal-probe-{uuid.uuid4()}"
        return Markup(
            '<div id="{target}" style="margin: 15px 0; max-width: 760px"></div>\n'
            '<p style="color: #5f6b7a; font-size: 90%">{note}</p>\n'
            # The first output of a page that runs its copy shares it with the others: a second would register itself anew.
            '<script type="module">\nconst CircuitsVis = globalThis.causalProbeCircuitsVis ??= (() => {{\n{bundle}\n'
            "return CircuitsVis;\n}})();\n"
            'CircuitsVis.render("{target}", CircuitsVis.{component}, {data});\n</script>\n'
        ).format(target=target, note=self.note, bundle=bundle(), component=self.component, data=self.data())

    @property
    def cdn_src(self) -> str:
        """The same as ``local_src``: nothing of ours asks the internet for anything."""
        return self.local_src

    def _repr_html_(self) -> str:
        return self.local_src
