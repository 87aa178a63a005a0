"""The options of each study, with a help text for each. Ground floor, and without torch.

The options of a study are the class that :data:`STUDIES` names, of which ``described()`` says what each is.
"""

from causal_probe.options.base import Options, takes
from causal_probe.options.registry import STUDIES

__all__ = ["STUDIES", "Options", "takes"]


def __dir__() -> list[str]:
    return [*__all__]
