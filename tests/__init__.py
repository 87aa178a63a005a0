"""The tests, and the run-time type checker that pytest puts on every function of causal_probe (`--jaxtyping-packages`)."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

#: As in mypy, an int is welcome where a float is asked for.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
