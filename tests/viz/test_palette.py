"""One meaning, one look; and looks that differ also for those who see fewer colours."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from causal_probe import viz
from causal_probe.viz.palette import (
    BLUE,
    DIVERGING,
    EXTRA,
    GRID,
    INK,
    MISSING,
    MUTED,
    PLAIN,
    RIGHT,
    SEQUENTIAL,
    VERMILLION,
)

#: Machado, Oliveira, Fernandes (2009), "A physiologically-based model for simulation of color vision deficiency", at full
#: severity: matrices on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip
#: A difference of 1 is just seen where two fields touch; lines apart from one another need more.
ENOUGH = 15.0


def lab(colour: object, deficiency: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as it looks under a deficiency."""
    rgb = np.asarray(to_rgb(colour))  # type: ignore[arg-type]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(DEFICIENCIES[deficiency] @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_the_simulation_itself() -> None:
    assert lab("white", "none") == pytest.approx([100, 0, 0], abs=0.1)
    assert lab("black", "none") == pytest.approx([0, 0, 0], abs=0.1)
    # Red and green of one lightness: far apart to most, near to those who are tested for.
    red, green = (0.75, 0.3, 0.2), (0.45, 0.5, 0.15)
    apart = {name: np.linalg.norm(lab(red, name) - lab(green, name)) for name in DEFICIENCIES}
    assert apart["deuteranopia"] < 0.5 * apart["none"]
    for name in DEFICIENCIES:  # grey stays grey
        assert lab("0.5", name)[1:] == pytest.approx([0, 0], abs=1.5)


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_edges_differ_in_colour(deficiency: str) -> None:
    for one, other in itertools.combinations((RIGHT, MISSING, EXTRA), 2):
        distance = np.linalg.norm(lab(one.colour, deficiency) - lab(other.colour, deficiency))
        assert distance > ENOUGH, (one.name, other.name, distance)


def test_edges_differ_in_their_line_too() -> None:
    assert len({str(style.line) for style in (RIGHT, MISSING, EXTRA)}) == 3
    assert PLAIN.colour == INK


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_a_heat_map_has_one_order(deficiency: str) -> None:
    """Darker is more; and of a diverging map the two sides are told apart where they are as dark."""
    lightness = [lab(SEQUENTIAL(value), deficiency)[0] for value in np.linspace(0, 1, 33)]
    assert (np.diff(lightness) < 0).all()
    for value in (0.3, 0.5, 0.75):
        positive, negative = (lab(DIVERGING(0.5 + side * value / 2), deficiency) for side in (1, -1))
        assert np.linalg.norm(positive - negative) > ENOUGH
    for side in (1, -1):
        shades = [lab(DIVERGING(0.5 + side * value / 2), deficiency)[0] for value in np.linspace(0, 1, 17)]
        assert (np.diff(shades) < 0).all()


def test_pages_have_the_same_colours() -> None:
    page = viz.Report("T", [], {}, {}, "").to_html()
    named = dict(re.findall(r"--(ink|muted|line|blue): (#[0-9a-f]{6})", page))
    assert named == {"ink": INK, "muted": MUTED, "line": GRID, "blue": BLUE}


def test_text_can_be_read() -> None:
    """WCAG 2: a contrast of 4.5 on white for text, 3 for lines."""

    def contrast(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 1.05 / (float(np.dot([0.2126, 0.7152, 0.0722], linear)) + 0.05)

    assert min(contrast(colour) for colour in (INK, MUTED)) > 4.5
    assert min(contrast(colour) for colour in (BLUE, VERMILLION, EXTRA.colour)) > 3
