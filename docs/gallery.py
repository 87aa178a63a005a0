"""Draw the pictures of the site's gallery from the very lines that stand beside them: ``make gallery``.

Each section of ``docs/pages/gallery.md`` has a block of Python whose last expression is a picture, and below it the picture's file. The blocks
run in order and share their names, as the cells of a notebook do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parent / "pages" / "gallery.md"
#: A section: a heading, a sentence, a block of Python, and a picture.
SECTION = re.compile(r"^## (?P<title>.*?)\n\n(?P<said>.*?)\n\n```python\n(?P<code>.*?)^```\n\n!\[(?P<alt>[^\]]*)\]\((?P<file>[^)]+)\)", re.DOTALL | re.MULTILINE)  # fmt: skip


class Section(NamedTuple):
    """One picture of the page: what is said of it, the lines that make it, and where it lies beside the page."""

    title: str
    said: str
    code: str
    alt: str
    file: str


def sections() -> list[Section]:
    """The page, picture by picture."""
    return [Section(**found.groupdict()) for found in SECTION.finditer(PAGE.read_text(encoding="utf-8"))]


def pictures() -> Iterator[tuple[Section, Any]]:
    """Run every block: the section, and what its last expression gives."""
    names: dict[str, Any] = {}
    for section in sections():
        *body, last = ast.parse(section.code).body
        assert isinstance(last, ast.Expr), f"the last line under {section.title} is no picture"
        exec(compile(ast.Module(body, []), section.title, "exec"), names)
        yield section, eval(compile(ast.Expression(last.value), section.title, "eval"), names)


def main() -> None:
    """Write every picture."""
    from causal_probe import viz

    for section, picture in pictures():
        target = PAGE.parent / section.file
        target.parent.mkdir(exist_ok=True)
        viz.write_svg(picture, target, description=section.alt)
        print(target)


if __name__ == "__main__":
    main()
