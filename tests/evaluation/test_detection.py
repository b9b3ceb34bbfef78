import math

import pytest
import torch
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_auroc,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from lightning_soup.evaluation.detection import AUC, detection_metrics
from tests.helpers.two_ranks import run_on_two_ranks

TARGETS = torch.tensor([0, 0, 1, 1, 1, 0])
SCORES = torch.tensor([0.1, 0.5, 0.5, 0.8, 0.3, 0.2], dtype=torch.float64)


def both(scores):
    return torch.stack([1 - scores, scores], dim=1)


def measured(probabilities, targets, classes, positive=1):
    metrics = detection_metrics(classes, positive)
    for part in range(2):  # in two batches
        metrics.update(probabilities[part::2], targets[part::2])
    return {name: float(value) for name, value in metrics.compute().items()}


def test_golden():
    found = measured(both(SCORES), TARGETS, 2)
    assert found["auc"] == pytest.approx(0.8333333333333334)  # the tie counts half
    assert found["f1"] == pytest.approx(0.5)  # s > 0.5, strictly
    at_half = measured(both(SCORES + 1e-9), TARGETS, 2)
    assert at_half["f1"] == pytest.approx(0.6666666666666666)  # as s >= 0.5 would be


def test_the_other_class_can_be_the_positive_one():
    swapped = both(SCORES).flip(1)
    assert measured(swapped, 1 - TARGETS, 2, positive=0) == pytest.approx(measured(both(SCORES), TARGETS, 2))
    assert measured(both(SCORES), TARGETS, 2, positive=0)["f1"] == pytest.approx(2 / 3)


def test_several_classes_are_torchmetrics():
    torch.manual_seed(0)
    probabilities, targets = torch.rand(60, 4).softmax(1), torch.randint(4, (60,))
    found = measured(probabilities, targets, 4)
    for name, function in (
        ("auc", multiclass_auroc),
        ("f1", multiclass_f1_score),
        ("precision", multiclass_precision),
        ("recall", multiclass_recall),
    ):
        assert found[name] == pytest.approx(float(function(probabilities, targets, 4, average="macro")), abs=1e-6)


def test_a_class_that_is_not_there_does_not_count():
    torch.manual_seed(1)
    probabilities, targets = torch.rand(40, 3).softmax(1), torch.randint(2, (40,))
    found = measured(probabilities, targets, 3)
    present = [float(binary_auroc(probabilities[:, label], (targets == label).long())) for label in (0, 1)]
    assert found["auc"] == pytest.approx(sum(present) / 2, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_one_class_only_is_nan_and_a_warning(classes):
    metric = AUC()
    metric.update(torch.full((5, classes), 1 / classes), torch.ones(5, dtype=torch.long))
    with pytest.warns(UserWarning, match="all 5 samples are of the class 1, .*not defined"):
        assert metric.compute().isnan()


def test_a_probability_that_rounding_puts_above_1_makes_no_ties():
    positive = torch.tensor([1e-12, 3e-12, 2e-12, 1 + 1.2e-7])
    targets = torch.tensor([0, 1, 0, 1])
    assert measured(both(positive), targets, 2)["auc"] == 1


def test_a_probability_that_is_nan_has_no_rank():
    with pytest.warns(UserWarning, match="probabilities of 1 of 4 samples are NaN"):
        assert math.isnan(measured(both(torch.tensor([0.1, 0.9, math.nan, 0.3])), torch.tensor([0, 1, 1, 0]), 2)["auc"])


def test_a_probability_that_is_nan_is_no_hit():
    probabilities = torch.tensor([[math.nan] * 3, [0.2, 0.3, 0.5]])
    with pytest.warns(UserWarning, match="NaN"):
        found = measured(probabilities, torch.tensor([0, 2]), 3)
    assert (found["f1"], found["precision"], found["recall"]) == (0.5, 0.5, 0.5)


def test_nothing_detected_is_no_nan():
    found = measured(both(torch.full((4,), 0.1)), torch.tensor([0, 1, 0, 1]), 2)
    assert (found["f1"], found["precision"], found["recall"]) == (0, 0, 0)


def _on_a_rank():
    import os

    from torch import distributed

    rank = int(os.environ["LOCAL_RANK"])
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    metrics = detection_metrics(2)
    rows = slice(0, 3) if rank == 0 else slice(3, 6)
    metrics.update(both(SCORES)[rows], TARGETS[rows])
    found = {name: float(value) for name, value in metrics.compute().items()}
    distributed.destroy_process_group()
    return found


def test_ranks_judge_all_samples_together():
    alone = measured(both(SCORES), TARGETS, 2)
    for found in run_on_two_ranks(_on_a_rank):  # rank 1 by itself would have 0.5 and 1
        assert found == pytest.approx(alone)
