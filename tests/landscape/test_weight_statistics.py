import math

import pytest
import torch

from lightning_soup.landscape.weight_statistics import effective_rank, weight_statistics


def networks():
    generator = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(30, 20, generator=generator), "b": torch.randn(7, generator=generator)}
    rows = [{n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in start.items()} for _ in range(3)]
    return start, rows


def flat(row):
    return torch.cat([value.double().flatten() for value in row.values()])


def test_distances_and_angles():
    start, rows = networks()
    found = weight_statistics(rows, start)
    x, origin = torch.stack([flat(row) for row in rows]), flat(start)
    torch.testing.assert_close(found.distances, torch.cdist(x, x), rtol=1e-5, atol=1e-6)
    updates = x - origin
    unit = updates / updates.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.cosines, unit @ unit.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.lengths, updates.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.norms, x.norm(dim=1), rtol=1e-5, atol=0)
    assert 2.8 < found.rank <= 3
    without = weight_statistics(rows)
    torch.testing.assert_close(without.distances, torch.cdist(x, x), rtol=1e-5, atol=1e-6)
    assert without.cosines is None
    assert without.lengths is None
    assert without.rank == pytest.approx(2, abs=0.1)  # three points span a plane
    by_tensor = found.distances_by_tensor()
    a = torch.stack([row["a"].double().flatten() for row in rows])
    torch.testing.assert_close(by_tensor["a"], torch.cdist(a, a), rtol=1e-5, atol=1e-6)


def test_effective_rank_by_hand():
    assert effective_rank(torch.eye(4)) == pytest.approx(4)
    assert effective_rank(torch.ones(4, 4)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(2 * math.log(2) - 0.75 * math.log(3))
    )
    assert effective_rank(torch.zeros(3, 3)) == 0
