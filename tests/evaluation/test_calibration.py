"""Calibration by hand."""

import math

import pytest
import torch

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.calibration import (
    brier_score,
    calibrated_nll,
    calibration,
    expected_calibration_error,
    fit_temperature,
    label_accuracy,
    label_nll,
    macro_f1,
)


def margins(count=400):
    """Two classes, margin 2, right in three of four."""
    logits = torch.tensor([[2.0, 0.0]]).repeat(count, 1)
    return logits, (torch.arange(count) % 4 == 3).long()


def test_temperature_in_closed_form():
    logits, targets = margins()
    assert fit_temperature(logits, targets) == pytest.approx(2 / math.log(3), abs=1e-8)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    plain = float(torch.nn.functional.cross_entropy(logits, targets))
    assert plain == pytest.approx(0.626928011, abs=1e-6)
    scaled = torch.nn.functional.cross_entropy(logits / (2 / math.log(3)), targets)
    assert float(scaled) == pytest.approx(0.562335145, abs=1e-6)
    assert entropy == pytest.approx(0.562335145, abs=1e-8)
    assert calibrated_nll(logits, targets) == pytest.approx(entropy, abs=0.02)  # halves are not three to one


def test_temperature_does_not_care_for_scale_and_shift():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 5, generator=generator) * 3
    targets = torch.where(
        torch.rand(50, generator=generator) < 0.7, logits.argmax(1), torch.randint(5, (50,), generator=generator)
    )
    one = fit_temperature(logits, targets)
    assert fit_temperature(4 * logits + 100, targets) == pytest.approx(4 * one, rel=1e-6)
    grid = torch.linspace(0.5 * one, 2 * one, 2001).tolist()
    losses = [float(torch.nn.functional.cross_entropy(logits.double() / t, targets)) for t in grid]
    assert grid[losses.index(min(losses))] == pytest.approx(one, rel=1e-3)
    assert calibrated_nll(3 * logits, targets) == pytest.approx(calibrated_nll(logits, targets), rel=1e-6)


def test_brier_by_hand():
    logits = torch.tensor([[2.0, 0], [0, 1], [1, 1]])
    assert brier_score(logits, torch.tensor([0, 0, 1])) == pytest.approx(0.532437321, abs=1e-6)


def test_calibration_error_by_hand():
    logits, targets = margins(8)
    confidence = 1 / (1 + math.exp(-2))
    assert expected_calibration_error(logits, targets) == pytest.approx(confidence - 0.75, abs=1e-6)
    assert expected_calibration_error(torch.tensor([[50.0, 0]]), torch.tensor([0])) == pytest.approx(0, abs=1e-9)


def test_f1_by_hand():
    logits = torch.eye(3)[[0, 0, 1, 1]] * 5
    # Class 0: 2/3 of (2 hits... one right, one wrong); class 1 both right; class 2 once, never found.
    assert macro_f1(logits, torch.tensor([0, 2, 1, 1])) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_labels_against_experts():
    p, experts = torch.tensor([[1.0, 0], [0.5, 0.5], [0, 1]]), torch.tensor([0, 1, 0])
    assert label_accuracy(p, experts) == pytest.approx(1 / 3)
    expected = -(math.log(0.995) + math.log(0.5) + math.log(0.005)) / 3
    assert label_nll(p, experts) == pytest.approx(expected, abs=1e-6)


def test_all_of_them_and_bad_input():
    assert set(calibration(*margins(40))) == {"cll", "nll", "temperature", "brier", "ece", "macro_f1", "accuracy"}
    for logits, targets in (
        (torch.ones(3), torch.ones(3)),
        (torch.ones(3, 2), torch.ones(2)),
        (torch.ones(0, 2), torch.ones(0)),
    ):
        with pytest.raises(UnsupportedSetup, match="expected finite logits"):
            brier_score(logits, targets.long())
    with pytest.raises(UnsupportedSetup, match="finite"):
        brier_score(torch.full((2, 2), math.nan), torch.zeros(2).long())
