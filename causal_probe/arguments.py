"""Checks of arguments against the signature, types and ranges, in production too.

An option of a study (:mod:`causal_probe.options`) and an argument of a probe (:func:`checked`) are refused in the same words. A type may
carry its range, as :class:`Help` in ``Annotated``. Of a library there would be pydantic's ``validate_call``, which turns ``"3"`` into 3 and
copies arrays, and beartype, whose errors are for programmers; neither is needed here otherwise.

>>> @checked
... def toss(n_tosses: Count, *, level: Level = 0.05) -> int:
...     return n_tosses
>>> toss(3)
3
>>> toss(True)
Traceback (most recent call last):
causal_probe.errors.CausalProbeError: `n_tosses` is True. It must be a whole number of at least 1.
"""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import itertools
import math
import numbers
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from causal_probe.errors import CausalProbeError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Reader: TypeAlias = Callable[[Any, Mapping[str, Any]], Any]

#: Whole numbers beyond these fit into no tensor.
LARGEST = 2**63 - 1
#: The longest sequence of numbers, names and the like that is an argument.
LONGEST = 2**24

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100


@dataclass(frozen=True)
class Help:
    """What is known about an option.

    Attributes
    ----------
    text
        One or two sentences.
    python
        Uses that only Python has, not the command.
    none
        The meaning of None.
    least, most
        The range of a number, ends included; of a sequence, of each number in it.
    above, below
        The same, ends excluded.
    setting
        Whether the result depends on it: what does not, such as a progress bar, is no part of ``settings``, ``call`` and sweeps.
    in_call
        Whether ``call`` repeats it; a device, for one, does not change the result.
    in_command
        Whether the command has it.
    allows, what
        What else must be so, asked of a value of the type, and that in words.
    """

    text: str
    python: str = ""
    none: str | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    setting: bool = True
    in_call: bool = True
    in_command: bool = True
    allows: Callable[[Any], bool] | None = None
    what: str = ""

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def range(self) -> str:
        """The range in words, such as ``" of at least 2"``."""
        words = [f"at least {self.least}"] if self.least is not None else []
        words += [f"at most {self.most}"] if self.most is not None else []
        words += [f"more than {self.above}"] if self.above is not None else []
        words += [f"less than {self.below}"] if self.below is not None else []
        return f" of {' and '.join(words)}" if words else ""


Count: TypeAlias = Annotated[int, Help("How many.", least=1)]
Seed: TypeAlias = Annotated[int, Help("Of the draws.", least=0)]
Position: TypeAlias = Annotated[int, Help("Counted from 0.", least=0, most=2**20)]
Level: TypeAlias = Annotated[float, Help("Of a test.", above=0, below=1)]
Scale: TypeAlias = Annotated[float, Help("Of a quantity.", above=0)]
Size: TypeAlias = Annotated[float, Help("Of a difference.", least=0)]
Natural: TypeAlias = Annotated[int, Help("How many.", least=0)]
Moderate: TypeAlias = Annotated[float, Help("Whose square single precision holds.", least=-1e15, most=1e15)]
Share: TypeAlias = Annotated[float, Help("Of a whole.", least=0, most=1)]
BatchSize: TypeAlias = Annotated[int, Help("Sequences in a forward pass.", least=1)] | None


# --------------------------------------------------------------------------------------------------------------- values

_UNFIT = object()
SEQUENCES = (tuple, list, collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)


def check_value(name: str, value: Any, hint: Any, about: Help | None = None) -> Any:
    """``value`` as a type has it: numbers of other libraries as Python's, sequences as tuples.

    Numbers, texts, choices, classes and sequences of them are looked at; what else a type allows fits anything.

    Raises
    ------
    CausalProbeError
        If the value is of another type, is not finite, or is out of the range.

    Examples
    --------
    >>> check_value("heads", [2, 1], tuple[int, ...]), check_value("rate", 1, float)
    ((2, 1), 1.0)
    >>> check_value("bos", "auot", Literal["auto", "yes"])
    Traceback (most recent call last):
    causal_probe.errors.CausalProbeError: `bos` is 'auot'; did you mean 'auto'? It must be 'auto' or 'yes'.
    """
    about = about or Help("")
    found = _fitted(value, hint, about)
    if found is _UNFIT:
        name, value, hint = _within(name, value, hint, about)
        guess = near(value, _choices(hint), quote=repr) if isinstance(value, str) else "."
        large = isinstance(value, numbers.Integral) and abs(int(value)) > LARGEST
        fits = " that fits into 64 bits" if large else ""
        raise CausalProbeError(f"`{name}` is {shown(value)}{guess} It must be {_in_words(hint, about)}{fits}.")
    return found


def shown(value: Any) -> str:
    """A value as messages show it: one line, never long.

    >>> shown([1]), len(shown("x" * 5000))
    ('[1]', 100)
    """
    if hasattr(value, "dtype") and len(getattr(value, "shape", ())) > 0:
        return f"a {type(value).__name__} of {str(value.dtype).removeprefix('torch.')}, of shape {list(value.shape)}"
    said = " ".join(_short.repr(value).split())
    return said if len(said) <= 100 else f"{said[:100]}..."


def _fitted(value: Any, hint: Any, about: Help) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        extra = [each for each in get_args(hint)[1:] if isinstance(each, Help)]
        about = (extra or [about])[-1]
        found = _fitted(value, get_args(hint)[0], about)
        return found if found is _UNFIT or about.allows is None or about.allows(found) else _UNFIT
    if origin in (Union, UnionType):
        return next((found for each in get_args(hint) if (found := _fitted(value, each, about)) is not _UNFIT), _UNFIT)
    if origin is Literal:
        return (
            value
            if any(value is each or (type(value) is type(each) and value == each) for each in get_args(hint))
            else _UNFIT
        )
    if hint is NoneType:
        return value if value is None else _UNFIT
    if hint is bool:
        return value if isinstance(value, bool) else _UNFIT
    if hint is str:
        return value if isinstance(value, str) else _UNFIT
    if hint in (int, float):
        return _number(value, hint, about)
    if origin in SEQUENCES:
        found = _sequence(value, get_args(hint), about)
        return list(found) if origin is list and found is not _UNFIT else found
    if hint is Any or hint is object:
        return value
    if origin is collections.abc.Mapping:
        return value if isinstance(value, Mapping) and _holds(value, get_args(hint), about) else _UNFIT
    if origin is collections.abc.Callable:
        return value if callable(value) else _UNFIT
    kind = origin or hint
    if isinstance(kind, type) and getattr(kind, "_is_runtime_protocol", True):
        return value if isinstance(value, kind) else _UNFIT
    return value


def _within(name: str, value: Any, hint: Any, about: Help) -> tuple[str, Any, Any]:
    """Of a mapping the entry that is wrong."""
    for each in (hint, *get_args(hint)):
        if get_origin(each) is collections.abc.Mapping and isinstance(value, Mapping):
            its = get_args(each)[1]
            for key, held in value.items():
                if _fitted(held, its, about) is _UNFIT:
                    return _within(f"{name}[{shown(key)}]", held, its, about)
    return name, value, hint


def _holds(value: Mapping[Any, Any], hints: tuple[Any, ...], about: Help) -> bool:
    key, its = hints
    return all(
        _fitted(name, key, about) is not _UNFIT and _fitted(held, its, about) is not _UNFIT
        for name, held in value.items()
    )


def _sequence(value: Any, hints: tuple[Any, ...], about: Help) -> Any:
    """A tuple; an iterable of anything as it is, for it may be a stream."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return _UNFIT
    if isinstance(value, Mapping) and not isinstance(value, collections.abc.Set):  # the nodes of a graph are both
        return _UNFIT
    if hints[0] in (Any, object):
        return value
    each = tuple(itertools.islice(value, LONGEST + 1))
    fixed = len(hints) > 1 and hints[1] is not Ellipsis
    if len(each) > LONGEST or (fixed and len(each) != len(hints)):
        return _UNFIT
    items = tuple(
        _fitted(its, hint, about)
        for its, hint in zip(each, hints if fixed else itertools.repeat(hints[0]), strict=False)
    )
    return _UNFIT if any(item is _UNFIT for item in items) else items


def _number(value: Any, hint: type, about: Help) -> Any:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if hint is int else numbers.Real):
        return _UNFIT
    try:
        found: Any = operator.index(value) if isinstance(value, numbers.Integral) and hint is int else float(value)
    except OverflowError:
        return _UNFIT
    finite = abs(found) <= LARGEST if hint is int else math.isfinite(found)
    return found if finite and about.holds(found) else _UNFIT


def _in_words(hint: Any, about: Help) -> str:
    origin = get_origin(hint)
    if origin is Annotated:
        extra = [each for each in get_args(hint)[1:] if isinstance(each, Help)]
        about = (extra or [about])[-1]
        return about.what or _in_words(get_args(hint)[0], about)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_in_words(each, about) for each in get_args(hint)))
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is NoneType:
        return f"None ({about.none})" if about.none else "None"
    if origin in SEQUENCES:
        its = get_args(hint)
        if len(its) > 1 and its[1] is not Ellipsis:
            return f"{len(its)} of these: {', '.join(_in_words(each, about) for each in its)}"
        return f"a sequence, each of it {_in_words(its[0], about)}"
    names = {
        int: f"a whole number{about.range}",
        float: f"a finite number{about.range}",
        bool: "True or False",
        str: "a text",
    }
    others = {
        os.PathLike: "a path",
        collections.abc.Mapping: "a mapping",
        collections.abc.Callable: "a function",
    }
    name = getattr(hint, "__name__", str(hint))
    return names.get(hint) or others.get(origin) or f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [each for each in get_args(hint) if isinstance(each, str)]
    return [choice for each in get_args(hint) for choice in _choices(each)]


def near(name: str, known: Iterable[str], *, quote: Callable[[str], str] = str) -> str:
    """The end of a sentence about a name that there is not, with the known one that it resembles.

    >>> near("scna", ["scan", "recover"])
    '; did you mean scan?'
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {quote(found[0])}?" if found else "."


def device_is_there(device: Any) -> bool:
    """Whether torch knows the device, and can put something there."""
    import torch  # which options do without

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError):  # by device, type and build
        return False
    return True


DEVICE = Help("Of tensors.", allows=device_is_there, what="a device of torch that is there, such as 'cpu'")


# ------------------------------------------------------------------------------------------------------------- functions


@overload
def checked(function: type[T], **readers: Reader) -> type[T]: ...


@overload
def checked(function: Callable[P, R], **readers: Reader) -> Callable[P, R]: ...


def checked(function: Any, **readers: Reader) -> Any:
    """A public function, or a class, whose arguments are looked at before it runs, some microseconds each.

    Parameters
    ----------
    function
        Its annotations say what is taken: see :func:`check_value`. Of a class, such as a dataclass of options, they are those of ``__init__``.
    **readers
        By the name of an argument, what reads it in place of its type: from the argument, and all arguments by name, to what the
        function is given.

    Raises
    ------
    CausalProbeError
        When it is called, if an argument is of another type or out of the range.
    """
    if inspect.isclass(function):
        setattr(function, "__init__", checked(function.__init__, **readers))  # noqa: B010 - to the type checker a method stays one
        return function
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        # At the first call: what a type names may not be there yet when the function is made.
        return get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def with_checks(*args: Any, **kwargs: Any) -> Any:
        from jaxtyping import jaxtyped  # which brings NumPy, and options need none

        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own error names the function
        given = bound.arguments
        with jaxtyped("context"):  # an axis has one length in all arguments
            for name, value in given.items():
                if name in readers:
                    if value is not signature.parameters[name].default:
                        given[name] = readers[name](value, given)
                elif name in hints():
                    kind = signature.parameters[name].kind
                    if kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                        given[name] = check_value(name, value, hints()[name])
        return function(*bound.args, **bound.kwargs)

    return with_checks
