"""Text of unknown origin, made fit to be shown: no character of it is invisible, reorders others, or can't be written.

Escaping for HTML is not done here: the template engine does it for every value.
"""

from __future__ import annotations

from collections.abc import Iterable

from causal_probe.errors import CausalProbeError
from causal_probe.results import clean, escape_character, is_showable

__all__ = ["clean", "show_number", "show_token", "shorten", "token_list"]


def shorten(text: str, limit: int) -> str:
    """:func:`clean` text of at most ``limit`` characters; an ellipsis marks omitted text.

    Examples
    --------
    >>> shorten("the excess", 20), shorten("the excess of every head", 12)
    ('the excess', 'the excess …')
    """
    # Whatever the text, an escape lengthens it: its first characters are enough to fill the space.
    shown = clean(text[: limit + 1])
    return shown if len(text) <= limit and len(shown) <= limit else shown[: limit - 1] + "…"


def show_token(token: str, *, limit: int = 24) -> str:
    r"""A token as visible text: white space and unshowable characters as marks or escapes, at most ``limit`` characters.

    A space is shown as U+2423 (an open box), an empty token as ``""``, a token that is too long by its beginning and an ellipsis.

    Examples
    --------
    >>> show_token("\n"), show_token(""), show_token("abcdef", limit=4)
    ('\\n', '""', 'abc…')
    """
    if not token:
        return '""'
    # An escape lengthens the text; whatever the token, its first `limit` characters are enough to fill the space.
    shown = "".join(map(_show_character, token[:limit]))
    return shown if len(token) <= limit and len(shown) <= limit else shown[: limit - 1] + "…"


def show_number(value: float | None, decimals: int) -> str:
    """A number to ``decimals`` places, None as "undefined"; numbers that round to zero have no sign.

    Examples
    --------
    >>> show_number(-0.001, 2), show_number(None, 2)
    ('0.00', 'undefined')
    """
    if value is None:
        return "undefined"
    text = f"{value:.{decimals}f}"
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def token_list(tokens: Iterable[object]) -> list[str]:
    """Tokens as strings; token ids (in a list, an array or a tensor of shape [pos]) as their decimal digits.

    Raises
    ------
    CausalProbeError
        If ``tokens`` is one string, which would be taken apart into its characters, or has another shape than [pos].
    """
    if isinstance(tokens, str):
        raise CausalProbeError(
            "The tokens of a sequence were asked for and one string was given. Give a list of strings."
        )
    plain = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
    if not isinstance(plain, list) or any(isinstance(token, (list, tuple)) for token in plain):
        raise CausalProbeError(
            "The tokens of one sequence were asked for, of shape [pos]; several were given. Choose one."
        )
    return [str(token) for token in plain]


def _show_character(character: str) -> str:
    if character == " ":
        return "␣"
    return escape_character(character) if character.isspace() or not is_showable(character) else character
