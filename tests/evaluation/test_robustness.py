import math

import pytest
import torch

from lightning_soup.errors import LightningSoupError
from lightning_soup.evaluation import ModuleEvaluator, Robustness
from lightning_soup.evaluation.outcomes import Outcome, ensemble
from lightning_soup.evaluation.robustness import project, project_targets
from tests.helpers.boring import TinyClassifier, TinyData

LOGITS = torch.tensor([[1.0, 5.0, 2.0, 0.0], [3.0, 0.0, 1.0, 9.0]])


def test_a_subset_competes_before_the_argmax():
    targets = torch.tensor([2, 0])
    assert Outcome(LOGITS, targets).correct.tolist() == [False, False]
    outcome = Outcome(LOGITS, targets, classes=[[2], [0]])
    assert outcome.correct.tolist() == [True, True]
    assert outcome.nll == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2)
    assert torch.equal(outcome.logits, LOGITS)  # whole: an ensemble needs them so


def test_the_largest_logit_of_a_class_stands_for_it():
    classes = [[0, 1], [2, 3]]
    assert project(LOGITS, classes).tolist() == [[5.0, 2.0], [3.0, 9.0]]
    assert project_targets(torch.tensor([0, 1, 2, 3]), classes).tolist() == [0, 0, 1, 1]
    assert Outcome(LOGITS, torch.tensor([0, 2]), classes=classes).accuracy == 1.0


def test_g6_soup_is_not_the_ensemble_and_maxima_come_last():
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 3.0])
    x = torch.tensor(2.0)
    soup = b.mean() * torch.relu(a.mean() * x)
    together = (b * torch.relu(a * x)).mean()
    assert (soup / x).item() == 4
    assert (together / x).item() == 5
    classes, targets = [[0, 1], [2]], torch.tensor([0])
    models = [
        Outcome(torch.tensor([logits]), targets, classes=classes) for logits in ([2.0, 0.0, 1.5], [0.0, 2.0, 1.5])
    ]
    assert project(ensemble(models).logits, classes)[0, 0].item() == 1  # the maximum of means
    assert torch.stack([project(model.logits, classes)[0, 0] for model in models]).mean().item() == 2  # the trap
    assert ensemble(models).correct.tolist() == [False]  # 1 against 1.5, where 2 would have won
    assert [model.accuracy for model in models] == [1.0, 1.0]


def test_a_row_with_nan_is_wrong_whoever_competes():
    logits = torch.tensor([[1.0, math.nan, 0.0]])
    assert Outcome(logits, torch.tensor([0]), classes=[[0], [2]]).accuracy == 0


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([[0]], "two or more"),
        ([[0], []], "each with at least one"),
        ([[0], [4]], r"training classes \[4\], but the model has 4 \(0 to 3\)"),
        ([[0, 1], [1, 2]], r"training classes \[1\] belong to two"),
    ],
)
def test_competing_classes_that_cannot_work(classes, message):
    with pytest.raises(LightningSoupError, match=message):
        Outcome(LOGITS, torch.tensor([0, 0]), classes=classes)


def test_images_whose_class_does_not_compete():
    with pytest.raises(LightningSoupError, match=r"images of the training classes \[1, 3\], which are not among"):
        _ = Outcome(LOGITS, torch.tensor([1, 3]), classes=[[0], [2]]).accuracy


def test_shifted_sets_weigh_equally_whatever_their_size():
    def outcome(right, wrong):
        return Outcome(torch.eye(2)[[0] * right + [1] * wrong], torch.zeros(right + wrong, dtype=torch.long))

    found = Robustness.of({"test": outcome(9, 1), "small": outcome(1, 1), "large": outcome(90, 10)})
    assert found.main == 0.9
    assert found.shifted == {"small": 0.5, "large": 0.9}
    assert found.mean == pytest.approx(0.7)
    assert math.isnan(Robustness.of({"test": outcome(1, 0)}).mean)
    with pytest.raises(LightningSoupError, match="got none"):
        Robustness.of({})


def test_the_evaluator_takes_the_classes_from_the_data():
    data = TinyData()
    data.test_classes = {"shifted": [[0, 2], [1]]}
    evaluator = ModuleEvaluator(TinyClassifier(), data)
    outcomes = evaluator.outcomes(evaluator.slot())
    assert outcomes["test"].classes is None
    assert outcomes["shifted"].classes == [[0, 2], [1]]
    assert outcomes["shifted"].accuracy > Outcome(outcomes["shifted"].logits, outcomes["shifted"].targets).accuracy
    assert all(outcome.classes is None for outcome in evaluator.outcomes(evaluator.slot(), "select").values())
