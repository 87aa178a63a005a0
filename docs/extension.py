"""For griffe, which reads the docstrings: Sphinx' roles become links, and a function that ``takes`` options shows them."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "docs"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import generate  # noqa: E402 - beside this file

ROLE = re.compile(r":(?:func|class|meth|attr|mod|data|exc):`(?:([^`<]*)<)?~?([^`>]*)>?`")


#: What doctest runs, with what it gives; outside of a section of examples, where griffe finds it itself.
DOCTEST = re.compile(r"^>>> .*(?:\n(?!$).*)*", re.MULTILINE)


def fenced(text: str) -> str:
    """A docstring as Markdown: examples are code, ``::`` is a colon, and two pairs of brackets are no link."""
    parts, end = [], 0
    for found in DOCTEST.finditer(text):
        parts += [plain(text[end : found.start()]), f"```pycon\n{found[0]}\n```"]
        end = found.end()
    return "".join([*parts, plain(text[end:])])


def plain(text: str) -> str:
    """Text that is no doctest."""
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r"(`+[^`]*`+)|\](?=\[)", lambda found: found[1] or "]\\", text)


class Docstrings(griffe.Extension):
    """See the module."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Go over all that was read."""
        self.known = {}
        for room in generate.rooms():
            for name, path in generate.public_names(room).items():
                self.known[f"causal_probe.{room}.{name}"] = self.known[path] = path
        self._visit(pkg)

    def _visit(self, each: Any) -> None:
        if each.is_function:
            self._with_options(each)
        if each.docstring is not None:
            each.docstring.value = self._linked(each.docstring.value, each)
        for member in list(each.members.values()):
            if not member.is_alias:
                self._visit(member)

    def _linked(self, text: str, where: Any) -> str:
        room = ".".join(where.path.split(".")[:2])

        def link(found: re.Match[str]) -> str:
            said, target = (found[1] or "").strip(), found[2].strip()
            shown = said or (target.rpartition(".")[2] if f"~{target}" in found[0] else target)
            inside = where.module.path
            owners = [target, f"{room}.{target}", f"{inside}.{target}"]
            for path in owners:
                if path in self.known:
                    return f"[`{shown}`][{self.known[path]}]"
                owner = path.rpartition(".")[0]
                if owner in self.known:  # an attribute: its class
                    return f"[`{shown}`][{self.known[owner]}]"
            return f"`{shown}`"

        told, heading, examples = text.partition("\nExamples\n---")
        return ROLE.sub(link, fenced(told)) + heading + examples

    def _with_options(self, function: Any) -> None:
        """The keywords and the documentation that ``@takes`` gives, which can't be seen without running it."""
        given = [re.fullmatch(r"takes\((\w+)\)", str(each.value)) for each in function.decorators]
        paths = [function.parent.resolve(found[1]) for found in given if found]
        from causal_probe import options

        if not paths or not paths[0].startswith("causal_probe.options."):  # a sweep's cells take options of their own
            return
        where, _, name = paths[0].rpartition(".")

        def like() -> None: ...

        leading = [each.name for each in function.parameters if each.name not in ("self",)]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        like.__name__ = function.name
        like.__doc__ = function.docstring.value if function.docstring else None
        like.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in leading])  # type: ignore[attr-defined]
        made = options.takes(getattr(importlib.import_module(where), name))(like)
        kinds = {
            inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
            inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
        }
        function.parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    each.name,
                    kind=kinds[each.kind],
                    default=None if each.default is each.empty else repr(each.default),
                )
                for each in inspect.signature(made).parameters.values()
            )
        )
        if function.docstring is not None and made.__doc__:
            function.docstring.value = made.__doc__
