"""Outcomes and the logit ensemble."""

import math

import pytest
import torch

from lightning_soup.errors import LightningSoupError
from lightning_soup.evaluation.outcomes import Outcome, ensemble

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0], [0.0, 0.5]])
TARGETS = torch.tensor([0, 0, 0, 1])


def test_correct_and_accuracy():
    outcome = Outcome(LOGITS, TARGETS)
    assert outcome.correct.dtype == torch.bool
    assert outcome.correct.tolist() == [True, False, True, True]
    assert outcome.accuracy == 0.75


def test_nll_is_the_mean_negative_log_likelihood():
    margins = [2.0, -1.0, 2.0, 0.5]  # the target's logit minus the other's
    expected = sum(math.log1p(math.exp(-m)) for m in margins) / 4
    assert Outcome(LOGITS, TARGETS).nll == pytest.approx(expected, rel=1e-6)
    assert Outcome(LOGITS.half(), TARGETS).nll == pytest.approx(expected, rel=1e-3)


def test_a_row_with_nan_is_wrong_and_an_excluded_class_is_not_a_nan():
    logits = torch.tensor([[math.nan, 0.0], [0.0, -math.inf]])
    assert Outcome(logits, torch.tensor([0, 0])).correct.tolist() == [False, True]


def test_ensemble_averages_raw_logits_not_probabilities():
    # One model is very sure, two are mildly of the other opinion: the mean logit follows the sure one (4
    # against 2 · 1), the mean probability would follow the majority.
    sure = Outcome(torch.tensor([[4.0, 0.0]]), torch.tensor([0]))
    mild = Outcome(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    result = ensemble([sure, mild, mild])
    assert torch.allclose(result.logits, torch.tensor([[4 / 3, 2 / 3]]))
    assert result.correct.tolist() == [True]


def test_ensemble_of_one_is_that_model_and_inputs_are_left_alone():
    first, before = Outcome(LOGITS.clone(), TARGETS), LOGITS.clone()
    ensemble([first, Outcome(LOGITS * 3, TARGETS)])
    assert torch.equal(first.logits, before)
    assert torch.equal(ensemble([first]).logits, before)


def test_ensemble_streams_and_accumulates_half_precision_in_float32():
    outcomes = (Outcome(torch.full((1, 2), 0.1, dtype=torch.float16), torch.tensor([0])) for _ in range(72))
    result = ensemble(outcomes)
    assert result.logits.dtype == torch.float32
    assert result.logits[0, 0].item() == pytest.approx(torch.tensor(0.1).half().item(), rel=1e-5)


def test_ensemble_keeps_the_groups():
    groups = torch.tensor([0, 0, 1, 1])
    assert torch.equal(ensemble([Outcome(LOGITS, TARGETS, groups)] * 2).groups, groups)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Outcome(LOGITS, TARGETS.flip(0)), "Outcome 1 is not of the same test set.*shuffle=False"),
        (Outcome(LOGITS[:2], TARGETS[:2]), r"Outcome 1 .*\[2, 2\] against \[4, 2\]"),
    ],
)
def test_ensemble_refuses_other_test_sets(other, message):
    with pytest.raises(LightningSoupError, match=message):
        ensemble([Outcome(LOGITS, TARGETS), other])


def test_ensemble_of_nothing():
    with pytest.raises(LightningSoupError, match="at least one model; got none"):
        ensemble([])


@pytest.mark.parametrize(
    ("logits", "targets", "groups", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), None, r"logits \[3\]"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), None, r"targets \[2\]"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), None, "N > 0"),
        (
            torch.zeros(2, 2),
            torch.tensor([0, 2]),
            None,
            "from 0 to 2, but the logits have 2 classes.*num_classes",
        ),
        (torch.zeros(2, 2), torch.tensor([-1, 1]), None, "from -1 to 1"),
        (torch.zeros(2, 2), torch.tensor([0, 1]), torch.zeros(3), r"expected \[2\], got \[3\]"),
    ],
)
def test_outcome_refuses_what_does_not_belong_together(logits, targets, groups, message):
    with pytest.raises(LightningSoupError, match=message):
        Outcome(logits, targets, groups)
