"""The rule of the phases on published cells, and its corners."""

import math

import pytest

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.landscape import Cell, Thresholds, assign, calibrate

# Of Yang et al.'s grid (batch, width): loss, trace, mc, CKA, phase.
PUBLISHED = {
    (1024, 2): (0.591, 3613, -18.72, 0.437, "I"),
    (64, 4): (0.316, 1366, -13.43, 0.468, "I"),
    (24, 1): (1.585, 5732, -11.45, math.nan, "I"),
    (16, 64): (0.116, 504, 2.84, 0.511, "II"),
    (24, 128): (0.090, 812, 1.35, 0.468, "II"),
    (1024, 6): (0.0044, 368, -18.73, 0.396, "III"),
    (256, 8): (0.0031, 103, -9.28, 0.537, "III"),
    (724, 45): (0.0010, 104, -0.010, 0.629, "IV-A"),
    (1024, 128): (0.0013, 157, -0.006, 0.634, "IV-A"),
    (92, 64): (0.0014, 34.0, -0.006, 0.773, "IV-B"),
    (64, 128): (0.0012, 41.9, 0, 0.788, "IV-B"),
}


@pytest.mark.parametrize("setting", PUBLISHED)
def test_published_cells(setting):
    loss, trace, mc, similarity, phase = PUBLISHED[setting]
    assert assign(Cell(loss, trace, mc, similarity)) == phase


def test_what_is_not_determined():
    assert assign(Cell(math.nan, 1, 0, 0.9)) == "undetermined"
    assert assign(Cell(0.1, math.inf, 0, 0.9)) == "undetermined"
    assert assign(Cell(0.1, 1, 0, 0.9, seeds=1)) == "undetermined"
    assert assign(Cell(0.1, 1, 0, math.nan)) == "undetermined"  # the last branch needs it
    assert assign(Cell(0.1, 500, 0, math.nan)) == "II"
    # Flat and connected, since nothing was learned.
    assert assign(Cell(2.3, 1, 3, 0.9, train_accuracy=11.0, majority=11.3)) == "undetermined"
    assert assign(Cell(2.3, 1, 3, 0.9, train_accuracy=50.0, majority=11.3)) == "II"


def test_sharp_by_loss():
    at = Thresholds(sharp_by="loss")
    assert assign(Cell(0.06, 1, 0, 0.9), at) == "II"
    assert assign(Cell(0.04, 10**6, 0, 0.9), at) == "IV-B"
    assert assign(Cell(0.04, math.nan, 0, 0.9), at) == "IV-B"


def test_negative_traces_are_flat():
    assert assign(Cell(0.01, -3.0, 0, 0.9)) == "IV-B"


def test_thresholds_are_proposed():
    cells = [Cell(loss, trace, mc, similarity) for loss, trace, mc, similarity, _ in PUBLISHED.values()]
    found = calibrate(cells)
    assert 157 < found.trace < 812
    assert 0.62 < found.similar < 0.79
    with pytest.raises(UnsupportedSetup, match="1 of 2 settings have a positive trace"):
        calibrate([Cell(0, 1, 0), Cell(0, -1, 0)])


def test_bad_thresholds():
    for options in ({"mc": -1.0}, {"trace": math.nan}, {"sharp_by": "colour"}):
        with pytest.raises(UnsupportedSetup, match="expected finite numbers"):
            Thresholds(**options)
