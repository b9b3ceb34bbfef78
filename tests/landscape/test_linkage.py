import pytest
import torch

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.landscape.linkage import average_linkage


def test_against_a_known_tree():
    """Points 0, 1, 5, 7, 20 on a line."""
    points = torch.tensor([0.0, 1, 5, 7, 20])
    joins = average_linkage((points[:, None] - points[None]).abs())
    assert [(set(join.members), join.height) for join in joins] == [
        ({0, 1}, 1.0),
        ({2, 3}, 2.0),
        ({0, 1, 2, 3}, 5.5),
        ({0, 1, 2, 3, 4}, pytest.approx((20 + 19 + 15 + 13) / 4)),
    ]
    assert sorted(joins[-1].members) == [0, 1, 2, 3, 4]


def test_one_alone_and_bad_input():
    assert average_linkage(torch.zeros(1, 1)) == []
    for wrong in (torch.zeros(2, 3), torch.full((2, 2), float("nan"))):
        with pytest.raises(UnsupportedSetup, match="square matrix"):
            average_linkage(wrong)
