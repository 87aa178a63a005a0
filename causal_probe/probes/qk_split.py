"""Sources of one's own: what a source has written to the stream, cut into parts that sum to it, such as the features of a dictionary."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causal_probe.arguments import checked
from causal_probe.errors import CausalProbeError
from causal_probe.probes.qk_stream import StreamParts, head_of

__all__ = ["Cut", "Parts", "covered", "cut_stream", "grouped", "parts_along"]

#: From an activation [batch, pos, d_model] to named parts of the same shape. What they don't sum to is a part of its own.
Parts = Callable[[Tensor], Mapping[str, Tensor]]
#: The part that holds what the others don't sum to.
REST = "error"
#: What hook points of the stream show, by name: all that was written before a layer; what a layer's MLP, or its attention, adds.
POINT = re.compile(r"(?:hook_embed|blocks\.(\d+)\.hook_(resid_pre|mlp_out|attn_out))")


@dataclass(frozen=True)
class Cut:
    """One activation that is cut into parts.

    Attributes
    ----------
    name
        In front of the parts' names.
    replaced
        The sources in whose place the parts stand.
    point
        The hook point whose value is cut; None for the sum of what the sources have written.
    parts
        The function.
    """

    name: str
    replaced: tuple[str, ...]
    point: str | None
    parts: Parts

    def __call__(self, value: Float[Tensor, "batch pos d_model"]) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """The parts and the rest, by the names of the new sources.

        Raises
        ------
        CausalProbeError
            If the function doesn't return named tensors of the activation's shape, or they are not finite.
        """
        found = self.parts(value.clone())
        if not isinstance(found, Mapping) or not all(isinstance(part, Tensor) for part in found.values()):
            raise CausalProbeError(
                f"The parts of {self.name} are a {type(found).__name__}; the function must return a dict from names to tensors of the activation's shape."
            )
        rest = value.clone()
        for name, part in found.items():
            if not isinstance(name, str) or not name or name == REST:
                raise CausalProbeError(
                    f"A part's name is text, and not {REST!r}, which is what the parts leave; found {name!r}."
                )
            if part.shape != value.shape or not bool(part.isfinite().all()):
                said = "holds values that are not finite" if part.shape == value.shape else f"is {list(part.shape)}"
                raise CausalProbeError(
                    f"The part {name!r} of {self.name} {said}; finite numbers of the shape {list(value.shape)} were expected."
                )
            rest = rest - part.detach().to(rest)
        named = {**{name: part.detach().to(value) for name, part in found.items()}, REST: rest}
        return {f"{self.name}.{name}": part for name, part in named.items()}


def covered(point: str, names: tuple[str, ...], layer: int) -> tuple[str, tuple[str, ...], str | None]:
    """What a source's name or a hook point stands for: the name in front of its parts, the sources that it covers, and the point.

    >>> covered("blocks.1.hook_resid_pre", ("embed", "L0H0", "L0.mlp", "L1H0", "L1.mlp"), 2)
    ('stream1', ('embed', 'L0H0', 'L0.mlp'), 'blocks.1.hook_resid_pre')
    """
    if point in names:
        return point, (point,), None
    match = POINT.fullmatch(point)
    own = []
    name, value = point, None
    if match and match[1] is None:
        name, own = "embed", ["embed"]
    elif match and match[2] == "resid_pre" and int(match[1]) <= layer:
        name, value = f"stream{match[1]}", point
        own = [each for each in names if (place := re.match(r"L(\d+)", each)) is None or int(place[1]) < int(match[1])]
    elif match and match[2] == "mlp_out":
        name, own = f"L{match[1]}.mlp", [each for each in names if each == f"L{match[1]}.mlp"]
    elif match and match[2] == "attn_out":
        name, value = f"L{match[1]}.attn", point
        own = [each for each in names if (head := head_of(each)) and head[0] == int(match[1])]
    if not own:
        raise CausalProbeError(
            f"There is no source {point!r} below layer {layer} that could be cut into parts. Name one of {', '.join(names)}, or a hook point of the stream: "
            "hook_embed, blocks.N.hook_resid_pre, blocks.N.hook_attn_out, blocks.N.hook_mlp_out."
        )
    return name, tuple(own), value


def cut_stream(parts: StreamParts, cuts: list[Cut], value_of: Callable[[Cut], Tensor]) -> StreamParts:
    """The same stream with the parts in the place of what they are parts of."""
    written = {**parts.written}
    for cut in cuts:
        for source in cut.replaced:
            written.pop(source, None)
        written |= cut(value_of(cut))
    return replace(parts, written=written)


def grouped(groups: Mapping[Any, Any], sources: tuple[str, ...]) -> Callable[[str], str]:
    """From named groups of sources to a function from a source to its group; what is in none stands by itself.

    Raises
    ------
    CausalProbeError
        If a group is no list of names, a source is unknown or in two groups, or a group has the name of a source that isn't in it.

    >>> group = grouped({"words": ["embed", "L0.mlp"]}, ("embed", "L0H0", "L0.mlp"))
    >>> [group(source) for source in ("embed", "L0H0", "L0.mlp")]
    ['words', 'L0H0', 'words']
    """
    of: dict[str, str] = {}
    for name, members in groups.items():
        each = [members] if isinstance(members, str) else members
        if not isinstance(each, (list, tuple, set, frozenset)):
            raise CausalProbeError(
                f"`sources` has a group {name!r} of a {type(members).__name__}. A group is a list of sources' names."
            )
        for source in each:
            if source not in sources:
                raise CausalProbeError(f"The group {name!r} names {source!r}; the sources are {', '.join(sources)}.")
            if source in of:
                raise CausalProbeError(f"{source} is in two groups, {of[source]!r} and {name!r}; give it one.")
            of[source] = name
    if clash := [name for name in groups if name in sources and of.get(name) != name]:
        raise CausalProbeError(
            f"The group {clash[0]!r} has the name of a source that isn't in it; choose another name."
        )
    return lambda source: of.get(source, source)


@checked
def parts_along(directions: Mapping[str, Any], coefficients: Callable[[Tensor], Tensor] | None = None) -> Parts:
    """A function for ``parts`` of :func:`~causal_probe.probes.qk_attributions`: an activation's parts along named directions.

    Parameters
    ----------
    directions
        By name, a vector [d_model]: those of a probe, or the decoder's rows of a sparse autoencoder or transcoder. The activation's other
        features, the decoder's bias and what the dictionary doesn't explain are the part ``error``.
    coefficients
        From an activation [batch, pos, d_model] to how much of each direction it holds, [batch, pos, direction], such as
        ``lambda x: sae.encode(x)[..., chosen]``. By default those that come nearest to the activation (least squares; for one direction the projection).

    Raises
    ------
    CausalProbeError
        If there is no direction, or they are not vectors of one length; or, later, if there is not one coefficient for each.

    Examples
    --------
    >>> parts = parts_along({"first": [2.0, 0.0, 0.0]})
    >>> parts(torch.tensor([[[3.0, 4.0, 5.0]]]))
    {'first': tensor([[[3., 0., 0.]]])}
    """
    vectors = [torch.as_tensor(vector).detach() for vector in directions.values()]
    if not vectors or any(vector.ndim != 1 or vector.shape != vectors[0].shape for vector in vectors):
        raise CausalProbeError(
            f"Directions are vectors of one length, one or more; found {[list(vector.shape) for vector in vectors]}."
        )
    matrix = torch.stack([vector.double() for vector in vectors])

    def parts(value: Float[Tensor, "batch pos d_model"]) -> dict[str, Tensor]:
        along = matrix.to(value.device)
        if value.shape[-1] != along.shape[1]:
            raise CausalProbeError(f"The directions have {along.shape[1]} numbers, the activation {value.shape[-1]}.")
        how_much = value.double() @ torch.linalg.pinv(along) if coefficients is None else coefficients(value)
        if how_much.shape != (*value.shape[:2], len(along)):
            raise CausalProbeError(
                f"{len(along)} directions need coefficients [batch, pos, {len(along)}]; they are {list(how_much.shape)}."
            )
        return {name: (how_much[..., number, None] * along[number]).to(value) for number, name in enumerate(directions)}

    return parts
