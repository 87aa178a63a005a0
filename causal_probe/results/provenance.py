"""Where a result came from: the process that measured it, which is not always the process that writes it."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["measured_with", "merge_provenance", "this_process", "versions"]

#: The packages whose versions every result records.
RECORDED_PACKAGES = (
    "causal-probe",
    "torch",
    "transformer-lens",
    "transformers",
    "networkx",
    "numpy",
    "scipy",
    "scikit-learn",
    "circuitsvis",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on; a package that is absent is left out.

    Examples
    --------
    >>> sorted(versions())[:3]
    ['causal-probe', 'circuitsvis', 'networkx']
    """
    found = {package: _version(package) for package in RECORDED_PACKAGES}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


@functools.cache
def _version(package: str) -> str | None:
    """Read once: a package's metadata takes milliseconds, and results are made by the thousand."""
    if package == "causal-probe":  # a checkout that nobody installed has no metadata
        return str(sys.modules["causal_probe"].__version__)
    if package == "torch" and "torch" in sys.modules:  # it alone says for which device it was built: 2.13.0+cu130
        return str(sys.modules["torch"].__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def this_process(**about: Any) -> dict[str, Any]:
    """The environment of this process: ``versions`` of the packages, ``threads`` of torch, and ``about`` (the model, its dtype and device).

    Examples
    --------
    >>> import torch
    >>> sorted(this_process(model="gpt2"))
    ['model', 'threads', 'versions']
    """
    torch = sys.modules.get("torch")  # what did without torch has no threads of its own
    threads = {} if torch is None else {"threads": torch.get_num_threads()}
    return {**about, **threads, "versions": versions()}


def merge_provenance(first: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a result that is made of several: what differs says all, ``"2.6.0 and 2.7.1"``.

    Examples
    --------
    >>> merge_provenance({"device": "cpu", "threads": 1}, {"device": "cpu", "threads": 2})
    {'device': 'cpu', 'threads': '1 and 2'}
    """
    merged = dict(first)
    for other in others:
        for key, theirs in other.items():
            mine = merged.get(key, theirs)
            if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
                merged[key] = merge_provenance(mine, theirs)
            elif mine == theirs:
                merged[key] = mine
            else:
                merged[key] = " and ".join(dict.fromkeys([*str(mine).split(" and "), *str(theirs).split(" and ")]))
    return merged


def measured_with(about: Mapping[str, Any]) -> str:
    """The end of a methods sentence: the software, the dtype and the device of a provenance.

    Examples
    --------
    >>> measured_with({"model": "m", "versions": {"causal-probe": "1.0", "transformer-lens": "4.3.0"}, "dtype": "float32", "device": "cpu"})
    'causal-probe 1.0, TransformerLens 4.3.0, float32 on cpu'
    """
    number_of = about["versions"]
    parts = [f"causal-probe {number_of.get('causal-probe', 'from source')}"]
    if about.get("model") and "transformer-lens" in number_of:
        parts.append(f"TransformerLens {number_of['transformer-lens']}")
    if about.get("dtype"):
        parts.append(f"{about['dtype']} on {about['device']}")
    return ", ".join(parts)
