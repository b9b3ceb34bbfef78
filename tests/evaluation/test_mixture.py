"""Golden cases of AWARE-NET's two tiers."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, nll_loss

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.mixture import (
    entropy,
    family_log_probabilities,
    learn_weights,
    log_alpha,
    log_probabilities,
    mix,
    stack_families,
)

LOGITS = [[2, 1, 0], [-1, 0, 1], [0.5, 0.5, -2]]  # of families, one logit a member


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, double(expected), rtol=0, atol=tolerance)


def binary_families():
    return [[double([[z]]) for z in row] for row in LOGITS]


def binary_log_p():
    return stack_families(binary_families(), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("w", "alpha"),
    [
        ([0.5, 1, 1.5], [0.186323723226, 0.307195885718, 0.506480391056]),
        ([1, 1, 1], [1 / 3] * 3),
        ([1 / 3] * 3, [1 / 3] * 3),
    ],
)
def test_alpha_is_the_softmax_of_w(w, alpha):
    close(log_alpha(double(w)).exp(), alpha, 1e-11)


@pytest.mark.parametrize(
    ("label", "loss", "gradient"),
    [
        (1, 0.6634696339384074, [-0.068331349295, 0.008982866205, 0.05934848309]),
        (0, 0.7237324928752225, [0.072575798646, -0.009540843195, -0.063034955451]),
    ],
)
def test_binary_loss_and_gradient(label, loss, gradient):
    w = double([0.5, 1, 1.5]).requires_grad_()
    log_p = binary_log_p()
    close(log_p[0, :, 1].exp(), [0.703951885536, 0.5, 0.454707194809])
    mixed = mix(log_p, log_alpha(w))
    close(mixed[0, 1].exp().detach(), 0.515061156986649)
    found = nll_loss(mixed, torch.tensor([label]))
    found.backward()
    close(found.detach(), loss)
    close(w.grad, gradient)
    assert abs(float(w.grad.sum())) < 1e-12  # softmax does not see a shift


def test_one_step_of_sgd():
    w = torch.nn.Parameter(double([0.5, 1, 1.5]))
    optimizer = torch.optim.SGD([w], lr=0.5)
    nll_loss(mix(binary_log_p(), log_alpha(w)), torch.tensor([1])).backward()
    optimizer.step()
    close(w.detach(), [0.534165674647, 0.995508566898, 1.470325758455])
    close(log_alpha(w).exp().detach(), [0.194689917838, 0.308817664506, 0.496492417657])


def test_the_mean_of_probabilities_and_not_of_logits():
    members = [double([[z]]) for z in (-4, 4, 4)]
    close(family_log_probabilities(members)[0, 1].exp(), 0.6606712633459695)


def test_outputs_are_log_probabilities():
    log_p = double([[0.8, 0.2]]).log()
    target = torch.tensor([0])
    close(nll_loss(mix(log_p[:, None], double([0.0])), target), 0.2231435513142097)
    close(cross_entropy(log_p.exp(), target), 0.43748795048588573)  # what a second softmax would give
    members = [[torch.randn(5, 4, dtype=torch.float64)] for _ in range(3)]
    mixed = mix(stack_families(members, "abc"), log_alpha(double([0.1, 0.5, -2])))
    close(mixed.exp().sum(1), [1.0] * 5, 1e-12)
    torch.testing.assert_close(cross_entropy(mixed, torch.arange(5) % 4), nll_loss(mixed, torch.arange(5) % 4))


def test_several_classes():
    families = [[double([[3, 1, 0]]), double([[1, 2, 0]])], [double([[0, 0, 4]]), double([[0, 1, 3]])]]
    weights = log_alpha(double([0.2, -0.1]))
    close(weights.exp(), [0.574442516812, 0.425557483188])
    mixed = mix(stack_families(families, ["F1", "F2"]), weights)
    close(mixed[0].exp(), [0.325345318506, 0.251928408755, 0.422726272738])
    close(nll_loss(mixed, torch.tensor([0])), 1.122868142244299)


def test_the_best_weights():
    targets = torch.tensor([1, 1, 0, 0])
    scores = double([[0.9, 0.6, 0.2, 0.4], [0.5, 0.9, 0.4, 0.1]])
    log_p = torch.stack([1 - scores, scores], dim=-1).log().transpose(0, 1)
    w = learn_weights(log_p, targets)
    close(log_alpha(w).exp()[0], 0.57906905, 1e-6)
    close(nll_loss(mix(log_p, log_alpha(w)), targets), 0.3216150235, 1e-9)
    close(nll_loss(mix(log_p, double([0.5, 0.5]).log()), targets), 0.3221785082, 1e-9)
    for family, alone in enumerate((0.3375388286, 0.3536734589)):
        close(nll_loss(log_p[:, family], targets), alone, 1e-9)
    with torch.inference_mode():  # inside the loops of a Trainer
        torch.testing.assert_close(learn_weights(log_p.clone(), targets), w)


def test_a_family_that_knows_nothing_gets_nothing_but_the_floor():
    targets = torch.arange(40) % 2
    good = torch.nn.functional.one_hot(targets).double().mul(0.8).add(0.1)
    log_p = torch.stack([good, torch.full_like(good, 0.5)], dim=1).log()
    assert float(log_alpha(learn_weights(log_p, targets))[1].exp()) < 1e-6
    w = learn_weights(log_p, targets, min_alpha=0.1)
    close(log_alpha(w, 0.1).exp(), [0.9, 0.1], 1e-5)
    alike = torch.stack([good, good, good], dim=1).log()
    close(learn_weights(alike, targets), [0.0] * 3, 1e-12)  # no gradient, so they stay alike


def test_a_floor():
    alpha = log_alpha(double([5.0, 0.0, -30.0]), 0.05).exp()
    assert float(alpha.min()) >= 0.05
    close(alpha.sum(), 1.0, 1e-12)


@pytest.mark.parametrize("floor", [-0.1, 0.34, 1.0])
def test_a_floor_that_cannot_be(floor):
    with pytest.raises(UnsupportedSetup, match=r"min_alpha=.*3 families"):
        learn_weights(torch.zeros(2, 3, 2), torch.tensor([0, 1]), floor)


def test_nothing_to_learn_from():
    with pytest.raises(UnsupportedSetup, match="there are none"):
        learn_weights(torch.zeros(0, 3, 2), torch.zeros(0, dtype=torch.long))


def test_entropy():
    close(entropy(double([0.25] * 4).log()), math.log(4))
    close(entropy(double([1.0, 0.0]).log()), 0.0)
    assert not entropy(torch.tensor([0.0, -math.inf])).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_widened_before_they_saturate(dtype):
    z = torch.tensor([[9.0], [-18.0]], dtype=dtype)  # where a sigmoid of 16 bits is 1 and 0
    log_p = log_probabilities(z)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p[:, 1], torch.nn.functional.logsigmoid(z.float())[:, 0])
    assert (log_p < 0).all()
    mixed = mix(stack_families([[z], [-z]], "ab"), log_alpha(torch.zeros(2, dtype=dtype)))
    assert mixed.dtype == torch.float32


def test_the_gradient_of_a_member():
    z = double([[0.7], [-0.2]]).requires_grad_()
    others = double([[1.0], [0.3]])
    weights = log_alpha(double([0.3, -0.4]))
    families = [[z, others], [others]]
    nll_loss(mix(stack_families(families, "ab"), weights), torch.tensor([1, 1]), reduction="sum").backward()
    s = z.detach().sigmoid()[:, 0]
    p_k = torch.stack([(s + others.sigmoid()[:, 0]) / 2, others.sigmoid()[:, 0]])
    p = (weights.exp()[:, None] * p_k).sum(0)
    close(z.grad[:, 0], (-1 / p * weights.exp()[0] / 2 * s * (1 - s)).tolist())  # (dL/dp) α_k/n_k s(1−s)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (None, "each of the families a, b; got a NoneType"),
        ({"a": [torch.zeros(2, 3)], "b": [torch.zeros(2, 3)]}, "got a dict"),
        ([[torch.zeros(2, 3)]], r"families a, b; got lists of \[1\]"),
        ([[(torch.zeros(2, 3),)], [torch.zeros(2, 3)]], "Member 1 of the family a gives a tuple"),
        ([[torch.zeros(2, 3)], []], r"got lists of \[1, 0\]"),
        ([[torch.zeros(2, 3)], [torch.zeros(2, 4)]], r"Member 1 of the family b .*\[2, 4\]; expected \[batch, 3\]"),
        ([[torch.zeros(2, 3), torch.zeros(3, 3)], [torch.zeros(2, 3)]], "Member 2 of the family a"),
        ([[torch.zeros(2)], [torch.zeros(2)]], r"expected \[batch, classes\]"),
        ([[torch.zeros(2, 1)], [torch.zeros(2, 3)]], r"Member 1 of the family b .*expected \[batch, 2\]"),
    ],
)
def test_members_that_do_not_fit_together(logits, message):
    with pytest.raises(UnsupportedSetup, match=message):
        stack_families(logits, ["a", "b"])


def test_one_logit_and_two_are_the_same_thing():
    z = torch.randn(6, 1)
    both = torch.cat([torch.zeros_like(z), z], dim=1)
    torch.testing.assert_close(log_probabilities(z), log_probabilities(both))
    assert stack_families([[z], [both]], "ab").shape == (6, 2, 2)
