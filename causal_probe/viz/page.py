"""The template engine that every page and every piece of a page goes through: what it is given is text, and stays text."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from causal_probe.viz.text import clean

__all__ = ["environment", "show_value"]

#: Characters of one cell of a table.
LONGEST_CELL = 500


@cache
def environment() -> Environment:
    """Jinja with escaping on, and with nothing invisible, reordering or unwritable let through."""
    made = Environment(
        loader=PackageLoader("causal_probe.viz", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    filters: dict[str, Callable[..., object]] = {"cell": show_value}
    made.filters.update(filters)
    return made


def show_value(value: object) -> str | Markup:
    """A value as it is shown in a table: floats with four significant digits, None as "undefined", long texts cut with a note."""
    if value is None:
        return Markup('<span class="undefined">undefined</span>')
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        number = float(value)
        text = f"{number:,.1f}" if 1000 <= abs(number) < 1e9 else f"{number:#.4g}" if number else "0"
        return text.replace("-", "\N{MINUS SIGN}")
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}".replace("-", "\N{MINUS SIGN}")
    text = str(value)
    # A token or an error can be as long as a book; what is left out of it is said.
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]}… ({len(text):,} characters)"


def _finalize(value: object) -> object:
    """Every text that is put into the page, but for markup of our own, is made showable before it is escaped."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
