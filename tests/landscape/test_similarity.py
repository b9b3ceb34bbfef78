"""CKA by hand, its invariances, and its minibatches."""

import math

import pytest
import torch

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.landscape import MinibatchCKA, cka

X = torch.tensor([(1.0, 0), (0, 1), (-1, 0), (0, -1), (2, 1)])
Y = torch.tensor([(1.0, 2), (0, 1), (-1, -2), (1, -1), (3, 2)])


def test_by_hand():
    assert cka(X, Y) == pytest.approx(0.8918481564, abs=1e-9)
    assert cka(X, Y, debiased=True) == pytest.approx(0.8816472805, abs=1e-9)
    assert cka(X, X @ torch.diag(torch.tensor([10.0, 1.0]))) == pytest.approx(0.9023282103, abs=1e-9)
    a, b = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[1.0], [4], [9], [16]])
    assert cka(a, b) == pytest.approx(0.9689922481, abs=1e-9)
    assert cka(a, b, debiased=True) == pytest.approx(0.9994562262, abs=1e-9)


def test_rotation_scale_and_shift_change_nothing():
    angle = 0.7
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    for debiased in (False, True):
        assert cka(X, 3 * X @ rotation + 7, debiased) == pytest.approx(1, abs=1e-6)
        assert cka(3 * X @ rotation + 7, Y, debiased) == pytest.approx(cka(X, Y, debiased), abs=1e-6)
        assert cka(X, Y, debiased) == pytest.approx(cka(Y, X, debiased), abs=1e-12)


def test_in_the_space_of_samples_it_is_the_same():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 30, generator=generator), torch.randn(8, 20, generator=generator)
    wide = cka(x, y)
    a, b = (m.double() - m.double().mean(0) for m in (x, y))
    expected = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert wide == pytest.approx(float(expected), rel=1e-9)


def test_minibatches_have_no_bias():
    generator = torch.Generator().manual_seed(0)
    biased, found = [], MinibatchCKA()
    for _ in range(60):
        x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 8, generator=generator)
        biased.append(cka(x, y))
        found.update(x, y)
    assert sum(biased) / 60 > 0.3  # of features that have nothing in common
    assert abs(found.compute()) < 0.05
    assert MinibatchCKA is type(found)
    whole = MinibatchCKA()
    whole.update(X, Y)
    assert whole.compute() == pytest.approx(cka(X, Y, debiased=True))


def test_what_is_constant_is_like_nothing():
    assert math.isnan(cka(X, torch.ones(5, 2)))
    assert math.isnan(cka(X, torch.ones(5, 2), debiased=True))


def test_bad_input():
    with pytest.raises(UnsupportedSetup, match=r"got \[5, 2\] and \[4, 2\]"):
        cka(X, Y[:4])
    with pytest.raises(UnsupportedSetup, match="n of 4 or more"):
        cka(X[:3], Y[:3], debiased=True)
    with pytest.raises(UnsupportedSetup, match="NaN"):
        cka(X, Y * math.nan)
    with pytest.raises(UnsupportedSetup, match="call update first"):
        MinibatchCKA().compute()
