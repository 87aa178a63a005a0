"""Tables as files: CSV in which no cell is a formula, and Parquet with checksums."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

__all__ = ["csv_text", "parquet_bytes"]

#: First characters that make a spreadsheet read a cell as a formula, unless it is a number.
_FORMULA = re.compile(r"[=+\-@\t\r\n]")


def csv_text(frame: Any) -> str:
    """A table as CSV in which no cell is a formula: a text that a spreadsheet would take for one begins with an apostrophe.

    Examples
    --------
    >>> import pandas as pd
    >>> print(csv_text(pd.DataFrame({"token": ["=1+1", "-0.5"], "score": [-0.5, 1.0]})))
    token,score
    '=1+1,-0.5
    -0.5,1.0
    <BLANKLINE>
    """
    safe = frame.rename(columns=_no_formula)
    for number, dtype in enumerate(frame.dtypes):
        if dtype.kind not in "biufc":
            safe.isetitem(number, frame.iloc[:, number].map(_no_formula, na_action="ignore"))
    # A carriage return in a cell would begin a row, unless it is quoted, which it is where rows end with one.
    returns = any("\r" in str(cell) for column in safe for cell in (column, *safe[column]))
    return str(safe.to_csv(index=False, lineterminator="\r\n" if returns else "\n"))


def parquet_bytes(frame: Any) -> bytes:
    """A table as Parquet, with a checksum for each page."""
    file = io.BytesIO()
    frame.to_parquet(file, index=False, write_page_checksum=True)
    return file.getvalue()


def _no_formula(cell: Any) -> Any:
    if not isinstance(cell, str) or not _FORMULA.match(cell):
        return cell
    with contextlib.suppress(ValueError):
        float(cell)
        return cell
    return f"'{cell}"
