"""The golden cases (d)1, 2 and 5 of the ZSCL notes, in float64."""

import pytest
import torch
from torch import tensor

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.distillation import feature_distillation, similarities, weight_consolidation

Z_T = tensor([[2.0, 0, -2], [1, 1, 0]], dtype=torch.float64)
Z_S = tensor([[0.0, 0, 0], [1, 1, 0]], dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


def test_golden_distillation():
    l_img, l_txt = feature_distillation(Z_T, Z_S, temperature=2)
    close(l_img, 4.345961290849)
    close(l_txt, 2.855068198560)
    close(feature_distillation(Z_T, Z_S, temperature=1)[0], 1.057984748112)


def test_the_smallest_value_is_the_entropy_of_the_teacher():
    l_img, l_txt = feature_distillation(Z_T, Z_T, temperature=2)
    close(l_img, 3.813527877193)
    close(l_txt, 2.543863661396)


def test_golden_gradient():
    student = Z_S.clone().requires_grad_()
    teacher = Z_T.clone().requires_grad_()
    feature_distillation(teacher, student, temperature=2)[0].backward()
    close(student.grad, [[-0.331907622441, 0.088604862279, 0.243302760163], [0, 0, 0]])
    assert student.grad[0].sum().abs() < 1e-12
    assert teacher.grad is None


def test_golden_features():
    def features(*rows):
        return tensor(rows, dtype=torch.float64).requires_grad_()

    teacher, student = features((3, 4), (1, 0)), features((4, 3), (0, 2))
    texts = features((1, 0), (0, 5), (-1, -1))
    z_t, z_s = similarities(teacher, texts.detach(), 10.0), similarities(student, texts.detach(), 10.0)
    l_img, l_txt = feature_distillation(z_t, z_s, temperature=2)
    close(l_img, 12.038673772610)
    close(l_txt, 8.168658330568)
    (l_img + l_txt).backward()
    assert student.grad.norm() > 0
    assert texts.grad is None
    assert teacher.grad is None


def test_half_precision_is_summed_in_full():
    l_img, l_txt = feature_distillation(Z_T.bfloat16(), Z_S.bfloat16())
    assert (l_img.dtype, l_txt.dtype) == (torch.float32, torch.float32)
    assert l_img.item() == pytest.approx(4.345961290849, rel=1e-6)


def test_golden_consolidation():
    weights = [tensor(w, dtype=torch.float64, requires_grad=True) for w in ([[1.0, 2], [3, 4]], [0.5])]
    start = [tensor(w, dtype=torch.float64) for w in ([[1.0, 0], [0, 4]], [-0.5])]
    loss = weight_consolidation(weights, start)
    close(loss, 14.0)
    loss.backward()
    close(weights[0].grad, [[0.0, 4], [6, 0]])
    close(weights[1].grad, [2.0])


def test_what_cannot_be_compared():
    with pytest.raises(UnsupportedSetup, match=r"\[2, 3\] and \[3, 2\]"):
        feature_distillation(Z_T, Z_S.T)
    with pytest.raises(UnsupportedSetup, match="temperature 0"):
        feature_distillation(Z_T, Z_S, 0)
    with pytest.raises(UnsupportedSetup, match="1 tensors and 2 of the start"):
        weight_consolidation([Z_T], [Z_T, Z_S])
    with pytest.raises(UnsupportedSetup, match="0 tensors"):
        weight_consolidation([], [])
