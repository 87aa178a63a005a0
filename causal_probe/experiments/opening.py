"""Opening the model that a study is about."""

from __future__ import annotations

import logging
import os
from typing import Any

from causal_probe.arguments import checked
from causal_probe.hooks import to_hooked
from causal_probe.hooks.check import HookedModel, describe
from causal_probe.models import choose_device, load_model
from causal_probe.models.loading import LoadedModel
from causal_probe.options.common import LoadingOptions

__all__ = ["is_named", "model_settings", "open_model"]

#: The model that a study has loaded: the command line shows it.
LOG = logging.getLogger("causal_probe")


@checked
def open_model(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    device_map: Any = None,
) -> tuple[HookedModel, LoadedModel]:
    """The model that ``source`` names with TransformerLens' hooks, and as it was loaded: around the same weights.

    Arguments and errors are those of :func:`~causal_probe.models.load_model`, and ``device="auto"`` is a GPU if there is one.

    Examples
    --------
    >>> import tempfile
    >>> from causal_probe.models import DisentangledTransformer, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(DisentangledTransformer(d_vocab=3, n_positions=4), folder)
    ...     hooked, loaded = open_model(folder)
    ...     hooked.cfg.n_layers
    2
    """
    place = str(choose_device(device))
    loaded = load_model(source, revision=revision, dtype=dtype, device=place, device_map=device_map)
    hooked = to_hooked(*loaded)
    about, n_heads = describe(hooked), getattr(hooked.cfg, "n_heads", None)
    heads = " and ".join(map(str, dict.fromkeys(getattr(hooked, "heads", [n_heads] if n_heads else []))))
    layers = f"{hooked.cfg.n_layers} layer{'s' * (hooked.cfg.n_layers != 1)}"
    shape = f"{layers}{f' of {heads} head' + 's' * (heads != '1') if heads else ''}"
    LOG.info("Loaded %s: %s, %s on %s", about["model"], shape, about["dtype"], about["device"])
    return hooked, loaded


def is_named(model: Any) -> bool:
    """Whether a model is given by its name or folder."""
    return isinstance(model, (str, os.PathLike))


def model_settings(model: Any, o: LoadingOptions) -> tuple[HookedModel | None, dict[str, Any]]:
    """A model that was given, with its hooks, and what settings say of it. One that is named is None: it is opened in its time."""
    if is_named(model):
        place = str(choose_device(o.device))
        return None, {"model": os.fspath(model), "source": "loaded", "dtype": o.dtype, "device": place}
    hooked = to_hooked(model)
    return hooked, {"source": "given", **describe(hooked)}
