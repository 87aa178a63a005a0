"""Options, told once: a frozen dataclass for each study, and what follows from it.

An option is a field whose type carries a :class:`Help`: its text, what None stands for, its range. From that follow the keywords, the
signature and the docstring of the study's function (:func:`takes`), the options of its command (:mod:`causal_probe.cli`), the ``settings``
of its result (:meth:`Options.settings`), the Python that gives the result (:meth:`Options.call`), and what a sweep's grid may say.

>>> @dataclass(frozen=True, kw_only=True)
... class TossOptions(Options):
...     n_tosses: Annotated[int, Help("How often the coin is tossed.", least=1)] = 3
>>> @takes(TossOptions)
... def toss(coin: str, o: TossOptions) -> str:
...     '''Toss a coin.'''
...     return coin * o.n_tosses
>>> toss("|", n_tosses=5)
'|||||'
>>> toss("|", n_toses=5)
Traceback (most recent call last):
causal_probe.options.base.UnknownOptionError: toss has no option `n_toses`; did you mean `n_tosses`? Its options: n_tosses.
>>> toss("|", n_tosses=0)
Traceback (most recent call last):
causal_probe.errors.CausalProbeError: `n_tosses` is 0. It must be a whole number of at least 1.

An option stands between backticks in an error, so that a command can say it in its own way, ``--n-tosses``.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import NoneType, SimpleNamespace
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Concatenate,
    Generic,
    ParamSpec,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from causal_probe.arguments import Help, check_value, near, shown
from causal_probe.errors import CausalProbeError

__all__ = ["GIVEN", "Option", "Options", "Subject", "UnknownOptionError", "takes"]

P = ParamSpec("P")
O = TypeVar("O", bound="Options")  # noqa: E741 - as in the functions that take options
O_contra = TypeVar("O_contra", bound="Options", contravariant=True)
R = TypeVar("R")

#: How settings name an argument that was given as an object, such as a graph.
GIVEN = "given"


class UnknownOptionError(CausalProbeError, TypeError):
    """A keyword that a study does not have."""


@dataclass(frozen=True)
class Subject:
    """What a study is about, its first argument: not an option, and different in every call.

    Attributes
    ----------
    name, text, python
        As an option's.
    several
        Whether it is a sequence of such.
    path
        Whether a command is given a file or folder.
    """

    name: str
    text: str
    python: str = ""
    several: bool = False
    path: bool = False


@dataclass(frozen=True)
class Option:
    """A field of an :class:`Options` class.

    Attributes
    ----------
    name, hint, help
        Its name, type and help text.
    default
        ``dataclasses.MISSING`` if it must be given.
    positional
        Whether it may be given by its place.
    """

    name: str
    hint: Any
    help: Help
    default: Any
    positional: bool

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING

    @property
    def parameter(self) -> inspect.Parameter:
        """As a function's signature shows it."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if self.positional else inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if self.required else self.default
        return inspect.Parameter(self.name, kind, default=default, annotation=self.hint)


@dataclass(frozen=True)
class Options:
    """The options of a study; see the module."""

    #: The subject of the study; None if there are only options.
    subject: ClassVar[Subject | None] = None

    if not TYPE_CHECKING:

        def __new__(cls, *args, **kwargs):  # noqa: D102
            # Before __init__, so that the error is ours where types are checked on every call, too.
            positional = [option.name for option in cls.described().values() if option.positional]
            for name, value in {**dict(zip(positional, args, strict=False)), **kwargs}.items():
                if name in cls.described():
                    cls.allowed(name, value)
            return object.__new__(cls)

    def __post_init__(self) -> None:
        for option in self.described().values():
            value = check_value(option.name, getattr(self, option.name), option.hint, option.help)
            if option.name == "out" and value is not None and os.fspath(value).startswith("~"):
                value = os.path.expanduser(value)  # as every reader of files does
                if value.startswith("~"):
                    raise CausalProbeError(f"`out` is {value!r}, and no user of that name has a home folder here.")
            object.__setattr__(self, option.name, value)
        self.check()

    def check(self) -> None:
        """Refuse what does not go together, before any work.

        Raises
        ------
        CausalProbeError
            With the names of the options between backticks.
        """

    @classmethod
    def described(cls) -> Mapping[str, Option]:
        """The options by name: the class's own first, then those that it shares with others."""
        known: Any = _described  # a type can be hashed, which mypy doubts of a dataclass's
        found: Mapping[str, Option] = known(cls)
        return found

    @classmethod
    def allowed(cls, name: str, value: Any) -> Any:
        """``value`` as the option ``name`` takes it, by itself.

        Raises
        ------
        CausalProbeError
            If it can't be taken.
        """
        option = cls.described()[name]
        return check_value(name, value, option.hint, option.help)

    def settings(self, **resolved: Any) -> dict[str, Any]:
        """All options on which the result depends, in plain types where they have one.

        Parameters
        ----------
        **resolved
            Values to record instead of an option's own (such as what None resolved to), and further entries.
        """
        named = {option.name for option in self.described().values() if option.help.setting}
        found = {name: _plain(getattr(self, name)) for name in self.described() if name in named}
        return {**found, **resolved}

    def shared(self, other: type[Options], **changes: Any) -> dict[str, Any]:
        """The values of the options that ``other`` has too, as keywords for its function."""
        both = {name: getattr(self, name) for name in other.described() if name in self.described()}
        return {**both, **changes}

    @classmethod
    def call(cls, function: str, settings: Mapping[str, Any], *subject: str, **shown: str) -> str:
        """The Python that gives a result: only what differs from the defaults.

        Parameters
        ----------
        function
            Its name, with its room before a dot if that is not :mod:`causal_probe.experiments`.
        settings
            Of the result.
        *subject
            Its first argument, as Python.
        **shown
            Options that Python shows otherwise than the settings do.
        """
        arguments = list(subject)
        for option in cls.described().values():
            if not option.help.in_call or not option.help.setting or option.name not in settings:
                continue
            value = settings[option.name]
            # None is a default, or stands for what plays no part.
            if option.name in shown or value not in (None, _plain(option.default)):
                text = shown.get(option.name, repr(value))
                arguments.append(text if option.positional else f"{option.name}={text}")
        room = function.partition(".")[0] if "." in function else "experiments"
        graphs = ", graphs" if any("graphs." in text for text in shown.values()) else ""
        return (
            f"from causal_probe import {room}{graphs}\n\n{room}.{function.rpartition('.')[2]}({', '.join(arguments)})"
        )


@functools.cache
def _described(cls: Any) -> Mapping[str, Option]:
    hints = _hints(cls)
    by_name = {field.name: field for field in fields(cls)}
    # The class's own come first, then those of its bases as they stand there.
    ordered = dict.fromkeys(name for each in cls.__mro__ for name in inspect.get_annotations(each))
    found = {}
    for field in (by_name[name] for name in ordered if name in by_name):
        hint, *extras = get_args(hints[field.name]) if get_origin(hints[field.name]) is Annotated else [None]
        helps = [extra for extra in extras if isinstance(extra, Help)]
        if not helps:
            raise TypeError(f"{cls.__name__}.{field.name} has no Help.")
        # The last word counts: what a class says of a type that others share.
        found[field.name] = Option(field.name, hint, helps[-1], field.default, not field.kw_only)
    return dict(sorted(found.items(), key=lambda item: (not item[1].positional, not item[1].help.setting)))


def _plain(value: Any) -> Any:
    """As settings name it; an object that has no name is :data:`GIVEN`."""
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else GIVEN


# ------------------------------------------------------------------------------------------------------------- functions


def _hints(cls: type) -> dict[str, Any]:
    """The types of all fields; Python 3.10's ``get_type_hints`` takes the mark ``KW_ONLY`` for one, and fails."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        told = inspect.get_annotations(base).items()
        own = {name: hint for name, hint in told if hint != "KW_ONLY" and not str(hint).startswith("ClassVar")}
        holder: Any = SimpleNamespace(__annotations__=own)
        found |= get_type_hints(holder, globalns=vars(sys.modules[base.__module__]), include_extras=True)
    return found


class _Takes(Generic[P, O_contra]):
    """The result of :func:`takes`; the type of the result of calling it depends on the function."""

    def __init__(self, options: Callable[P, Any]) -> None:
        self.options = options

    @overload
    def __call__(self, function: Callable[[O_contra], R]) -> Callable[P, R]: ...

    @overload
    def __call__(self, function: Callable[[Any, O_contra], R]) -> Callable[Concatenate[Any, P], R]: ...

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        options: Any = self.options
        signature = inspect.signature(function)
        leading = list(signature.parameters)[:-1]

        @functools.wraps(function)
        def with_keywords(*args: Any, **kwargs: Any) -> Any:
            subject = [
                kwargs.pop(name) if name in kwargs else _first(args, function, name) for name in leading[len(args) :]
            ]
            first = [*args[: len(leading)], *subject]
            if options.subject is not None and options.subject.several and isinstance(first[0], (str, bytes, NoneType)):
                raise CausalProbeError(
                    f"`{leading[0]}` is {shown(first[0])}. It must be a list of such: {options.subject.text}"
                )
            known = options.described()
            if unknown := [name for name in kwargs if name not in known]:
                names = ", ".join(f"`{name}`" for name in unknown)
                guess = near(unknown[0], known, quote="`{}`".format)
                raise UnknownOptionError(
                    f"{function.__name__} has no option {names}{guess} Its options: {', '.join(known)}."
                )
            return function(*first, options(*args[len(leading) :], **kwargs))

        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in leading]
        parameters += [option.parameter for option in options.described().values()]
        made: Any = with_keywords
        made.__signature__ = inspect.Signature(parameters, return_annotation=signature.return_annotation)
        made.__doc__ = _documented(function.__doc__, options)
        made.options = options
        return with_keywords


def _first(args: Sequence[Any], function: Callable[..., Any], name: str) -> Any:
    raise TypeError(f"{function.__name__}() misses its first argument, {name}.")


def takes(options: Callable[P, O]) -> _Takes[P, O]:
    """Give a function the keywords of an :class:`Options` class.

    Parameters
    ----------
    options
        The class. The function is called with an instance of it as its last argument, after its subject if it has one.
        It is left as ``function.options``, so that others find it.
    """
    return _Takes(options)


def _documented(text: str | None, options: type[Options]) -> str | None:
    """A docstring with its section on parameters."""
    if text is None:
        return None
    section = "Parameters\n----------\n"
    if options.subject is not None:
        section += f"{options.subject.name}\n{textwrap.indent(f'{options.subject.text} {options.subject.python}'.rstrip(), '    ')}\n"
    for option in options.described().values():
        about = option.help
        told = [about.text, about.python, "" if about.none is None else f"None: {about.none}."]
        section += f"{option.name}\n{textwrap.indent(' '.join(filter(None, told)), '    ')}\n"
    text = inspect.cleandoc(text)
    places = [text.find(f"\n{title}\n---") for title in ("Returns", "Raises", "Examples", "Notes")]
    place = min((at for at in places if at >= 0), default=len(text))
    return f"{text[:place].rstrip()}\n\n{section}{text[place:]}"
