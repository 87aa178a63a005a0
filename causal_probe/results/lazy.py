"""pandas, imported when it is first used: it takes a third of a second, and most of what is imported never makes a table."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["pandas"]

if TYPE_CHECKING:
    import pandas as pandas
else:

    class _Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            import pandas

            return getattr(pandas, name)

    pandas = _Lazy("pandas")
