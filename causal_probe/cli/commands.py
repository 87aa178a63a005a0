"""Commands, made from the options of the studies: what a study may be told is told once, in :mod:`causal_probe.options`."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from causal_probe.cli.streams import put
from causal_probe.errors import CausalProbeError
from causal_probe.options import STUDIES
from causal_probe.options.base import Option
from causal_probe.options.registry import Study

__all__ = ["INTERRUPTED", "commands", "examples", "flag", "in_flags"]

#: The exit status of a command that Ctrl-C has ended.
INTERRUPTED = 130


def commands() -> Iterator[tuple[str, Callable[..., None]]]:
    """(name, function for typer) of every command, in the order of :data:`~causal_probe.options.STUDIES`."""
    for name in dict.fromkeys(study.command for study in STUDIES.values() if study.command is not None):
        yield name, _command({key: study for key, study in STUDIES.items() if study.command == name})


def examples(command: str) -> list[str]:
    """Lines that run a command, one or more for each of its studies.

    >>> examples("check")
    ['causal-probe check MODEL']
    """
    its = (line for study in STUDIES.values() if study.command == command for line in study.examples)
    return [f"causal-probe {command} {line}".strip() for line in its]


def flag(name: str) -> str:
    """How a command is told an option.

    >>> flag("n_positions")
    '--n-positions'
    """
    return f"--{name.replace('_', '-')}"


def in_flags(text: str) -> str:
    """An error of the library in the command's words.

    >>> in_flags("`n_positions` is 1. Leave it out, or pass `overwrite=True`.")
    '--n-positions is 1. Leave it out, or pass --overwrite.'
    """
    known = {name for study in STUDIES.values() for name in study.options.described()}
    return re.sub(r"`(\w+)(?:=True)?`", lambda found: flag(found[1]) if found[1] in known else found[0], text)


# --------------------------------------------------------------------------------------------------------- what is run


def _command(studies: Mapping[str, Study]) -> Callable[..., None]:
    """The function that typer makes a command of. An option that was not given is None there, so that the given ones are known."""

    def run(**values: Any) -> None:
        given = {name: value for name, value in values.items() if value is not None}
        as_json = given.pop("as_json", False)
        name = _chosen(studies, given)
        _run(name, studies[name], given, as_json=as_json)

    made: Any = run
    made.__doc__ = next(iter(studies.values())).about
    made.__signature__ = inspect.Signature(list(_parameters(studies)))
    return run


def _chosen(studies: Mapping[str, Study], given: dict[str, Any]) -> str:
    """The study that the given options choose; what means nothing to it is refused. ``method`` is taken out of them."""
    if len(studies) == 1:
        return next(iter(studies))
    about = [name for name, study in studies.items() if (its := study.options.subject) and its.name in given]
    subjects = dict.fromkeys(_flag_of(studies[name]) for name in about)
    if len(subjects) > 1:
        raise CausalProbeError(f"{' and '.join(subjects)} exclude each other. Give one.")
    method = given.pop("method", None)
    fitting = [name for name in about if studies[name].method == method]
    if fitting:
        chosen = fitting[0]
    elif about and method is None:
        chosen = about[0]
    elif about:
        raise CausalProbeError(f"With {_how(studies[about[0]])} --method {method} means nothing. Leave it out.")
    else:
        plain = {study.method: name for name, study in studies.items() if study.options.subject is None}
        chosen = plain[method or next(iter(plain))]
    known = set(_names(studies[chosen]))
    strays = {
        name: [study for study in studies.values() if name in _names(study)] for name in given if name not in known
    }
    if strays:
        named = ", ".join(f"{flag(name)} ({_with(its, 'only with')})" for name, its in strays.items())
        raise CausalProbeError(f"With {_how(studies[chosen])} these options mean nothing: {named}. Leave them out.")
    return chosen


def _how(study: Study) -> str:
    """The option that chooses among the studies of one command."""
    return " ".join(filter(None, [_flag_of(study), study.method and f"--method {study.method}"]))


def _flag_of(study: Study) -> str:
    return "" if study.options.subject is None else flag(study.options.subject.name)


def _with(studies: Sequence[Study], before: str = "With") -> str:
    *others, last = [_how(study) for study in studies]
    return " ".join([before, *([", ".join(others), "or"] if others else []), last])


def _names(study: Study) -> list[str]:
    its = study.options.subject
    return [*([] if its is None else [its.name]), *study.options.described()]


def _run(name: str, study: Study, given: dict[str, Any], *, as_json: bool) -> None:
    known, subject = study.options.described(), study.options.subject
    first = [] if subject is None else [given.pop(subject.name)]
    options = {key: _read(known[key].hint, value) for key, value in given.items()}
    lists = study.lists is not None and any(option.required and key not in given for key, option in known.items())
    if not lists:
        study.options(
            **options
        )  # what can't be worked with is refused before torch and TransformerLens take seconds to import
    from causal_probe import experiments, papers, reports, sweep

    place = {"experiments": experiments, "papers": papers, "sweep": sweep}[study.place]
    if lists:
        put(getattr(place, str(study.lists))())
        return
    out: Path | None = given.get("out")
    always = {"progress": True, "page": reports.write_page}
    with _resumable(study, out):
        found = getattr(place, name)(*first, **options, **{key: value for key, value in always.items() if key in known})
    put(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else str(found))
    if out is not None:
        said = f"Report: {out / 'report.html'}"
        typer.echo(said, err=True) if as_json else put(said)
    if not getattr(found, "ok", True):
        raise typer.Exit(1)


@contextlib.contextmanager
def _resumable(study: Study, out: Path | None) -> Iterator[None]:
    """Where the same command goes on after Ctrl-C: leave with 130, and one line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        if study.keeps is None or out is None or not (out / study.keeps[0]).exists():
            raise
        typer.echo(
            f"Interrupted. {study.keeps[1]} {out / study.keeps[0]}; the same command goes on from there.", err=True
        )
        raise SystemExit(INTERRUPTED) from None


# ------------------------------------------------------------------------------------------------ what a command is told


def _parameters(studies: Mapping[str, Study]) -> Iterator[inspect.Parameter]:
    """What typer is to know: of each study its subject and its options; of several also what chooses one."""
    several = len(studies) > 1
    about_one: dict[str, list[Study]] = {}
    for study in studies.values():
        if study.options.subject is not None:
            about_one.setdefault(study.options.subject.name, []).append(study)
    for same in about_one.values():
        study, subject = same[0], same[0].options.subject
        if subject is not None:
            one: Any = Path if subject.path else str
            text = " ".join(each.options.subject.text for each in same if each.options.subject is not None)
            about: dict[str, Any] = {"help": _plain(text)}
            if several:
                yield _parameter(subject.name, one, typer.Option(**about, rich_help_panel=_with([study])))
            else:
                about["metavar"] = (
                    f"{subject.name.upper().removesuffix('S')}..." if subject.several else subject.name.upper()
                )
                yield _parameter(
                    subject.name, list[one] if subject.several else one, typer.Argument(**about), required=True
                )
    if several:
        plain = {str(study.method): study for study in studies.values() if study.options.subject is None}
        shown = " ".join(f"{method}: {study.mode}." for method, study in plain.items())
        choice = typer.Option(help=shown, show_default=next(iter(plain)))
        yield _parameter("method", Literal[tuple(plain)], choice)
    found: dict[str, list[tuple[Study, Option]]] = {}
    for study in studies.values():
        for option in study.options.described().values():
            if option.help.in_command:
                found.setdefault(option.name, []).append((study, option))
    for name, those in found.items():
        study, option = those[0]
        if option.required and option.positional and study.options.subject is None:
            argument = typer.Argument(metavar=name.upper(), help=_plain(option.help.text))
            yield _parameter(name, str, argument, required=study.lists is None)
        else:
            yield _parameter(name, _type(option.hint), _option(those, of=len(studies)), required=option.required)
    yield _parameter(
        "as_json",
        bool,
        typer.Option("--json", help="Print the result as JSON, alone on standard output.", show_default="off"),
    )


def _parameter(name: str, hint: Any, about: Any, *, required: bool = False) -> inspect.Parameter:
    default, hint = (inspect.Parameter.empty, hint) if required else (None, hint | None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, about])


def _option(its: Sequence[tuple[Study, Option]], *, of: int) -> Any:
    """One option of a command, which several of its studies may have, each with a text and a default of its own."""
    option = its[0][1]
    switch = option.hint is bool
    decided = (
        [f"{flag(option.name)}/--no-{flag(option.name)[2:]}"] if any(each.default is True for _, each in its) else []
    )
    text = _said(((study, each.help.text) for study, each in its), "{} ({}.)", " ")
    default = _said(((study, _default(each)) for study, each in its if _default(each)), "{} {}", "; ")
    return typer.Option(
        *([*decided] if decided else [flag(option.name)]),
        help=_plain(text),
        show_default="off" if switch and not decided else default or False,
        rich_help_panel=None if len(its) == of else _with([study for study, _ in its]),
    )


def _said(each: Iterable[tuple[Study, str]], form: str, between: str) -> str:
    """The help texts of an option over the studies: one if all agree."""
    texts: dict[str, list[Study]] = {}
    for study, text in each:
        texts.setdefault(text, []).append(study)
    if len(texts) == 1:
        return next(iter(texts))
    return between.join(form.format(text, _with(its, "with")) for text, its in texts.items())


def _plain(text: str) -> str:
    """Without what looks like markup to typer."""
    return text.replace("[", "\\[")


def _default(option: Option) -> str:
    if option.required:
        return ""
    if option.default is None:
        return option.help.none or ""
    return ",".join(map(str, option.default)) if isinstance(option.default, tuple) else str(option.default)


def _parts(hint: Any) -> list[Any]:
    """The types that a type is made of, without None."""
    if get_origin(hint) in (Union, UnionType):
        return [part for part in get_args(hint) if part is not NoneType]
    return [hint]


def _type(hint: Any) -> Any:
    """What typer reads an option as; what it has no word for is a text, which :func:`_read` goes on from."""
    parts = _parts(hint)
    if any(get_origin(part) is os.PathLike for part in parts):
        return Path
    only = parts[0] if len(parts) == 1 else str
    return only if only in (int, float, bool) or get_origin(only) is Literal else str


def _read(hint: Any, value: Any) -> Any:
    """A text as an option takes it: lists are between commas, and what can be a number is one."""
    parts = _parts(hint)
    if not isinstance(value, str) or str in parts:
        return value
    for part in parts:
        if get_origin(part) in (tuple, Sequence):
            return [_read(get_args(part)[0], item.strip()) for item in value.split(",")]
    for number in (int, float):
        if number in parts:
            with contextlib.suppress(ValueError):
                return number(value)
    return value
