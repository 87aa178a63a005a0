"""A result's folder, with its page."""

from __future__ import annotations

import os
from functools import singledispatch
from pathlib import Path
from typing import Any

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.experiments.saving import fill
from causal_probe.papers.base import Reproduction
from causal_probe.reports.pages import report
from causal_probe.results import Result, claim
from causal_probe.results import load as load_file
from causal_probe.sweep.result import Sweep

__all__ = ["REPORT", "load", "save", "write_page"]

#: The page's file in every folder of results.
REPORT = "report.html"


@checked
def write_page(result: Any, folder: str | os.PathLike[str]) -> None:
    """Write the page on a result into a folder, as ``report.html``: what studies take as ``page=``.

    Raises
    ------
    CausalProbeError
        If there is no page for results of this kind, or it can't be written.

    Examples
    --------
    >>> import tempfile
    >>> from causal_probe import experiments
    >>> with tempfile.TemporaryDirectory() as out:
    ...     found = experiments.recover("chain", n_positions=5, steps=20, batch_size=64, probe_sequences=512, out=out, page=write_page)
    ...     (Path(out) / "report.html").is_file()
    True
    """
    report(result).write(Path(folder) / REPORT)


@singledispatch
def save(result: Any, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a study's result and its page into a folder, whole or not at all; return the path of the page.

    Parameters
    ----------
    result
        The result of a study. Its JSON (``result.json``, ``scan.json``, ..., which lists all files of the folder), the tables and arrays
        beside it, and the page.
    folder
        A new or empty folder, or one that holds an earlier result of the same settings, which is replaced.
    overwrite
        Replace a result of other settings as well. A folder that holds anything but results is never replaced.

    Raises
    ------
    CausalProbeError
        If there is no page for results of this kind, or ``folder`` can't be written or holds something else.

    Examples
    --------
    >>> import tempfile
    >>> from causal_probe import experiments
    >>> found = experiments.recover("chain", n_positions=5, steps=20, batch_size=64, probe_sequences=512)
    >>> with tempfile.TemporaryDirectory() as above:
    ...     save(found, Path(above) / "out").name
    'report.html'
    """
    report(result)  # there is one
    unfinished = getattr(result, "UNFINISHED", None)
    with claim(
        folder, settings=result.settings, overwrite=overwrite, result=result.RESULT, unfinished=unfinished
    ) as claimed:
        fill(claimed, result, page=write_page)
    return Path(folder) / REPORT


@save.register
def _(result: Reproduction, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    result.write(folder, page=write_page)
    return Path(folder) / REPORT


@save.register
def _(result: Sweep, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    write_page(result, folder)
    return Path(folder) / REPORT


@checked
def load(path: str | os.PathLike[str]) -> Result:
    """The result in a folder that a study or :func:`save` has written, or in a ``.safetensors`` file. No live model comes back.

    Raises
    ------
    CausalProbeError
        If there is no such result, or its file is damaged, or of another format than this version's.

    Examples
    --------
    >>> import tempfile
    >>> from causal_probe import experiments
    >>> with tempfile.TemporaryDirectory() as out:
    ...     found = experiments.recover("chain", n_positions=5, steps=20, batch_size=64, probe_sequences=512, out=out)
    ...     load(out).loss == found.loss
    True
    """
    if not os.path.isdir(path):
        return load_file(path)
    # Beside the JSON of the same name; what else is there (weights, sums to merge) has none.
    found = [each for each in sorted(Path(path).glob("*.safetensors")) if each.with_suffix(".json").is_file()]
    if len(found) != 1:
        raise CausalProbeError(
            f"{path} holds no result that can be loaded. Name a folder that a study has written, or a file."
        )
    return load_file(found[0])
