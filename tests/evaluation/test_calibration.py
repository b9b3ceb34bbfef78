"""Measures of probabilities: closed forms, plain loops, and what cannot be."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from lightning_soup.errors import LightningSoupError
from lightning_soup.evaluation import label_quality, measure_calibration, nll_weights
from lightning_soup.evaluation.calibration import brier_score, calibrated_nll, fit_temperature


def margin_2(count=400):
    """Two classes, logits (2, 0), three of four right."""
    return torch.tensor([[2.0, 0.0]]).repeat(count, 1), (torch.arange(count) % 4 == 0).long()


def random_logits(seed=0, count=200, classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, generator=generator)
    return logits, (logits + 3 * torch.randn(count, classes, generator=generator)).argmax(1)


def test_golden_temperature():
    logits, targets = margin_2()
    assert fit_temperature(logits, targets) == pytest.approx(2 / math.log(3), abs=1e-9)
    found = measure_calibration(logits, targets)
    assert found.nll == pytest.approx(0.626928011, abs=1e-9)
    assert found.temperature == pytest.approx(1.820478453, abs=1e-9)
    least = torch.nn.functional.cross_entropy(logits.double() / found.temperature, targets).item()
    assert least == pytest.approx(0.562335145, abs=1e-9)
    assert found.cll == pytest.approx(least, abs=5e-3)  # its halves are not exactly three to one
    assert found.accuracy == 0.75


def test_golden_brier():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert brier_score(logits.softmax(1), torch.tensor([0, 0, 1])) == pytest.approx(0.532437321, abs=1e-9)
    assert brier_score(torch.eye(2), torch.tensor([0, 1])) == 0
    assert brier_score(torch.eye(2), torch.tensor([1, 0])) == 2


def test_against_plain_loops():
    logits, targets = random_logits()
    q = logits.double().softmax(1).tolist()
    y = targets.tolist()
    top = [max(row) for row in q]
    right = [row.index(max(row)) == label for row, label in zip(q, y, strict=True)]
    ece = 0.0
    for b in range(15):
        inside = [i for i, p in enumerate(top) if b / 15 < p <= (b + 1) / 15]
        if inside:
            ece += abs(sum(right[i] for i in inside) - sum(top[i] for i in inside)) / len(y)
    f1 = []
    for c in range(4):
        said, is_c = [row.index(max(row)) == c for row in q], [label == c for label in y]
        both = sum(a and b for a, b in zip(said, is_c, strict=True))
        f1.append(2 * both / (sum(said) + sum(is_c)))
    found = measure_calibration(logits, targets)
    assert found.ece == pytest.approx(ece, abs=1e-6)
    assert found.macro_f1 == pytest.approx(sum(f1) / 4, abs=1e-6)
    assert found.accuracy == pytest.approx(sum(right) / len(y))
    assert found.nll == pytest.approx(-sum(math.log(row[label]) for row, label in zip(q, y, strict=True)) / len(y))


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_confidence_does_not_matter_after_scaling(scale):
    logits, targets = random_logits()
    assert calibrated_nll(scale * logits, targets) == pytest.approx(calibrated_nll(logits, targets), abs=1e-6)
    assert fit_temperature(scale * logits, targets) == pytest.approx(scale * fit_temperature(logits, targets), rel=1e-5)


def test_the_calibrated_loss_is_the_mean_of_five_other_halves():
    logits, targets = random_logits(count=51)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(5):
        order = torch.randperm(51, generator=generator)
        T = min(np.exp(np.linspace(-3, 3, 4001)), key=lambda T, half=order[:25]: nll(logits[half] / T, targets[half]))
        losses.append(nll(logits[order[25:]] / T, targets[order[25:]]))
    assert calibrated_nll(logits, targets, seed=3) == pytest.approx(sum(losses) / 5, abs=1e-4)
    assert calibrated_nll(logits, targets, seed=4) != calibrated_nll(logits, targets, seed=3)


def nll(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets).item()


def test_all_right_and_all_wrong_have_an_end():
    logits = torch.tensor([[4.0, 0.0], [3.0, 0.0]])
    assert fit_temperature(logits, torch.tensor([0, 0])) == pytest.approx(1e-3)
    assert fit_temperature(logits, torch.tensor([1, 1])) == pytest.approx(1e3)
    assert all(math.isfinite(value) for value in asdict(measure_calibration(logits, torch.tensor([0, 0]))).values())


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), r"logits \[3, 2\] and targets \[2\]"),
        (torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), "N ≥ 2"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "not all class numbers: expected 0 to 1"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), "not all class numbers"),
        (torch.tensor([[0.0, 1], [math.nan, 1]]), torch.tensor([0, 1]), "logits of sample 1 are not finite"),
    ],
)
def test_what_cannot_be_measured(logits, targets, message):
    with pytest.raises(LightningSoupError, match=message):
        measure_calibration(logits, targets)


def test_numbers_that_cannot_be():
    with pytest.raises(LightningSoupError, match="splits=0"):
        measure_calibration(*random_logits(), splits=0)
    with pytest.raises(LightningSoupError, match="bins=0"):
        measure_calibration(*random_logits(), bins=0)


LABELS = np.array([[0.7, 0.3, 0], [0.2, 0.5, 0.3], [1, 0, 0]])


def test_quality_of_labels():
    found = label_quality(LABELS, [0, 2, 1])
    assert found.accuracy == pytest.approx(1 / 3)
    smooth = [0.99 * p + 0.01 / 3 for p in (0.7, 0.3, 0.0)]
    assert found.nll == pytest.approx(-sum(map(math.log, smooth)) / 3)
    entropies = [0.7 * math.log(0.7) + 0.3 * math.log(0.3), sum(p * math.log(p) for p in (0.2, 0.5, 0.3)), 0]
    assert found.entropy == pytest.approx(-sum(entropies) / 3)


def test_weights_go_with_one_over_nll():
    labels = {"good": LABELS, "uniform": np.full((3, 3), 1 / 3)}
    experts = np.array([0, 1, 0])
    found = nll_weights(labels, experts)
    good, uniform = (label_quality(p, experts).nll for p in labels.values())
    assert uniform == pytest.approx(math.log(3))
    assert found == pytest.approx({"good": uniform / (good + uniform), "uniform": good / (good + uniform)})
    with pytest.raises(LightningSoupError, match="one method or more"):
        nll_weights({}, experts)


@pytest.mark.parametrize(
    ("experts", "smoothing", "message"),
    [
        ([0, 1], 0.01, r"Labels \[3, 3\] and experts' labels \[2\]"),
        ([0, 1, 3], 0.01, "expected 0 to 2"),
        ([0.0, 1.0, 2.0], 0.01, "class numbers"),
        ([0, 1, 2], 0.0, "smoothing=0.0"),
    ],
)
def test_labels_that_cannot_be_judged(experts, smoothing, message):
    with pytest.raises(LightningSoupError, match=message):
        label_quality(LABELS, experts, smoothing)


@pytest.mark.parametrize("labels", [2 * LABELS, LABELS - 0.1, np.full((3, 3), np.nan)])
def test_logits_are_no_labels(labels):
    with pytest.raises(LightningSoupError, match="not all distributions"):
        label_quality(labels, [0, 1, 2])
