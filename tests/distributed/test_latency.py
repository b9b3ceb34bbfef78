"""The model of message times and of waiting."""

import math

import pytest

from lightning_soup.distributed.latency import expected_maximum, ring_bytes, simulate_blocking, tree_to_pair


@pytest.mark.parametrize(("sigma", "expected"), [(1.0, 2.506881), (0.1, 1.061667)])
def test_the_slower_of_two(sigma: float, expected: float) -> None:
    assert expected_maximum(0.0, sigma) == pytest.approx(expected, abs=1e-6)


def test_ratios() -> None:
    assert tree_to_pair(1024) == 10
    assert ring_bytes(1000, 4) == 2 * 0.75 * 4000


def test_pairs_wait_less_than_all_do() -> None:
    found = simulate_blocking(256, 20, 30, sigma=0.5)
    assert found.alone < found.pairs < found.everyone
    assert math.isclose(simulate_blocking(256, 20, 30, sigma=1e-9).everyone, 1.0, rel_tol=1e-6)
    dearer = simulate_blocking(256, 20, 30, sigma=0.5, transfer=0.1)
    assert dearer.everyone - found.everyone == pytest.approx(2 * 8 * 0.1 * 30 / (20 * 30), rel=0.05)
