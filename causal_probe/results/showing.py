"""How results are shown: tables as text and as HTML, in which no text can do harm."""

from __future__ import annotations

import dataclasses
import html
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["Rows", "Table", "clean", "escape", "escape_character", "html_table", "is_showable"]

#: A table shows this many rows at most, and says how many more there are.
SHOWN = 24

# Controls, formats (among them the marks that reorder text), surrogates, unassigned, line and paragraph separators.
_UNSHOWABLE = {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
_ZERO_WIDTH_JOINER = "\u200d"  # of category Cf, but it is what joins an emoji's parts


def clean(text: str) -> str:
    r"""``text`` with every unshowable character as its escape, but for newlines and tabs.

    Examples
    --------
    >>> clean("a lone surrogate: \ud800, a mark that reorders: \u202e")
    'a lone surrogate: \\ud800, a mark that reorders: \\u202e'
    """
    return "".join(
        character if character in "\n\t" or is_showable(character) else escape_character(character)
        for character in text
    )


def is_showable(character: str) -> bool:
    """Whether a character can be seen, leaves the order of others alone, and can be written."""
    return character == _ZERO_WIDTH_JOINER or unicodedata.category(character) not in _UNSHOWABLE


def escape_character(character: str) -> str:
    """A character as Python writes it in ASCII."""
    return character.encode("unicode_escape").decode("ascii")


def escape(text: object) -> str:
    r"""Text that may stand in HTML: markup is escaped, and so is what can't be shown.

    Examples
    --------
    >>> escape("</table>\ud800")
    '&lt;/table&gt;\\ud800'
    """
    return html.escape(clean(str(text)))


def html_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "", notes: Sequence[str] = ()
) -> str:
    """A table for a notebook: what results return from ``_repr_html_``.

    Parameters
    ----------
    columns
        The head of the table.
    rows
        Their values; a float is shown with four significant digits, None as an empty cell.
    caption, notes
        The texts above and below.

    Examples
    --------
    >>> html_table(["head", "score"], [("L0H0", 0.5)])
    '<table><thead><tr><th>head</th><th>score</th></tr></thead><tbody><tr><td>L0H0</td><td>0.5</td></tr></tbody></table>'
    """

    def line(cells: Sequence[object], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{_cell(cell)}</{tag}>' for cell in cells)}</tr>"

    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(line(row, "td") for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table>{above}<thead>{line(columns, 'th')}</thead><tbody>{body}</tbody></table>{below}"


def _cell(value: object) -> str:
    return escape(_shown(value))


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)


@dataclasses.dataclass(frozen=True)
class Table:
    """The short table by which a result is shown.

    Attributes
    ----------
    title
        One line that says what the result is, of which model, over how many sequences.
    columns, rows
        Its head and its values: numbers as numbers, what is undefined as None. By default they are also what ``to_pandas`` gives.
    notes
        Lines below it.
    shown
        How many rows are shown at most; what is left out is said.

    Examples
    --------
    >>> print(Table("Scores of a model", ("head", "score"), [("L0H0", 0.5), ("L0H1", None)], ["chance: 0.1"]).text())
    Scores of a model
      head  score
      L0H0    0.5
      L0H1
      chance: 0.1
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()
    shown: int = SHOWN

    def text(self) -> str:
        """The table as aligned text: numbers to the right, four significant digits."""
        cells = [list(self.columns), *([clean(_shown(cell)) for cell in row] for row in self.rows[: self.shown])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = [
            any(isinstance(row[index], (int, float, np.number)) for row in self.rows) for index in range(len(widths))
        ]
        lines = [
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in cells
        ]
        body = lines if self.rows else []
        return "\n".join([clean(self.title), *(f"  {line}" for line in (*body, *self._below()))])

    def html(self) -> str:
        """The table for a notebook."""
        return html_table(self.columns, self.rows[: self.shown], caption=self.title, notes=self._below())

    def _below(self) -> list[str]:
        more = len(self.rows) - self.shown
        return [*([f"and {more:,} more"] if more > 0 else []), *map(clean, self.notes)]


class Rows(tuple[Any, ...]):
    """Named tuples of one kind, as results give them, which print as a table.

    The fields ``layer`` and ``head`` are shown as one name; a field that is an estimate (``value``, ``stderr``, ...), as it is reported.

    Examples
    --------
    >>> from typing import NamedTuple
    >>> class Score(NamedTuple):
    ...     layer: int
    ...     head: int
    ...     excess: float
    >>> found = Rows([Score(18, 6, 0.89), Score(17, 3, 0.77)])
    >>> found
    2 rows
      head    excess
      L18H6     0.89
      L17H3     0.77
    >>> found[0].excess, len(found.to_pandas())
    (0.89, 2)
    """

    def table(self) -> Table:
        """The rows, all of them up to the 24 that a table shows."""
        names = list(self[0]._fields) if self else []
        named = names[:2] == ["layer", "head"]
        rows = [[f"L{row[0]}H{row[1]}", *row[2:]] if named else [*row] for row in self]
        count = f"{len(self)} row{'s' * (len(self) != 1)}" if self else "no rows"
        return Table(count, names[1:] if named else names, [[_reported(cell) for cell in row] for row in rows])

    def to_pandas(self) -> Any:
        """One row each, the columns the fields."""
        import pandas as pd  # what only reads or writes does without

        return pd.DataFrame(list(self), columns=list(self[0]._fields) if self else None)

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def _reported(cell: Any) -> Any:
    """An estimate with its standard error, an interval as it is said; all else as it is."""
    if hasattr(cell, "stderr") and hasattr(cell, "value"):
        return f"{cell.value:.3f} ± {cell.stderr:.3f}"
    if isinstance(cell, tuple) and len(cell) == 2 and all(isinstance(end, float) for end in cell):
        return f"{cell[0]:.3f} to {cell[1]:.3f}"
    return cell
