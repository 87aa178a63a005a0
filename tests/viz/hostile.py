"""Tokens that a page has to survive. A script of theirs that ran would change the page's title to HACKED."""

from __future__ import annotations

HACK = "document.title='HACKED'"
HOSTILE = [
    f"</script><script>{HACK}</script>",
    f'<img src=x onerror="{HACK}">',
    f"<svg/onload={HACK}>",
    "<!-- <script>",
    "]]></style></title></div>",
    "\"quotes' and `ticks`\\",
    "new\nline\r\ntab\t",
    "\N{RIGHT-TO-LEFT OVERRIDE}gnp.exe\N{RIGHT-TO-LEFT MARK}",
    "\N{LINE SEPARATOR}\N{PARAGRAPH SEPARATOR}\x00\x1b",
    "\N{GRINNING FACE}\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}",
    "\N{HEBREW LETTER SHIN}\N{HEBREW LETTER LAMED}",
    "x" * 10_000,
    "\ud800 alone \udfff",
    "",
    " the",
    "&lt;b&gt;{{ 7*7 }}{% raw %}$\\frac{",
]
