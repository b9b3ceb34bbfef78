"""Rows and N of M: what is pruned together."""

import pytest
import torch

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.masks import Masks
from lightning_soup.layers.pruning import prune_
from tests.layers.test_pruning import layers


class TestRows:
    def test_the_weakest_rows_go(self) -> None:
        tensors = layers()
        norms = {name: tensor.flatten(1).norm(dim=1) for name, tensor in tensors.items()}
        masks = prune_(tensors, 0.5, selection="rows")
        for name, mask in masks.items():
            kept = mask.flatten(1).all(1)
            assert torch.equal(kept, mask.flatten(1).any(1))
            assert int(kept.sum()) == len(kept) - round(len(kept) / 2)
            assert norms[name][kept].min() > norms[name][~kept].max()

    def test_rows_of_which_some_elements_are_left(self) -> None:
        tensors = {"w": torch.tensor([[5.0, 5], [0, 9], [1, 1], [0, 0]])}
        masks = Masks({"w": torch.tensor([[1, 1], [0, 1], [1, 1], [0, 0]]).bool()})
        assert prune_(tensors, 0.5, masks, "rows")["w"].int().tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]

    def test_live_rows_of_zeros_are_not_taken_for_pruned_ones(self) -> None:
        tensors, masks = {"w": torch.zeros(2, 2)}, Masks({"w": torch.tensor([[True, True], [False, False]])})
        assert prune_(tensors, 0.5, masks, "rows") == masks

    def test_equal_rows_go_in_order(self) -> None:
        kept = prune_({"w": torch.ones(200, 2)}, 0.5, selection="rows")["w"]
        assert kept[:, 0].tolist() == [False] * 100 + [True] * 100

    def test_of_survivors(self) -> None:
        tensors = {"w": torch.arange(1.0, 11).reshape(10, 1).repeat(1, 3)}
        masks = prune_(tensors, 0.5, selection="rows")
        masks = prune_(tensors, 0.5, masks, selection="rows", of="survivors")
        assert masks["w"][:, 0].tolist() == [False] * 7 + [True] * 3


class TestGroups:
    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (6, 8)])
    def test_every_group_of_inputs(self, n: int, m: int) -> None:
        tensors = {"conv": torch.randn(6, 8, 3, 3), "linear": torch.randn(5, 16)}
        for name, mask in prune_(tensors, 1 - n / m, selection=f"{n}:{m}").items():
            assert mask.shape == tensors[name].shape
            assert mask.is_contiguous()
            groups = mask.movedim(1, -1).unflatten(-1, (-1, m))
            assert (groups.sum(-1) == n).all()

    def test_equals_go_in_order(self) -> None:
        kept = prune_({"w": torch.ones(2, 128)}, 0.5, selection="64:128")["w"]
        assert kept.tolist() == [[False] * 64 + [True] * 64] * 2

    def test_what_is_pruned_stays_so(self) -> None:
        first = Masks({"w": torch.tensor([[False, False, False, True]])})
        assert prune_({"w": torch.ones(1, 4)}, 0.5, first, "2:4")["w"].tolist() == [[False, False, False, True]]
        second = Masks({"w": torch.tensor([[True, False, True, True]])})
        assert prune_({"w": torch.tensor([[0.0, 0, 1, 2]])}, 0.25, second, "3:4") == second  # the live zero stays

    def test_shares_that_binary_numbers_round(self) -> None:
        assert prune_({"w": torch.rand(2, 3)}, 1 / 3, selection="2:3").pruned == 2

    def test_odd_inputs_are_named(self) -> None:
        with pytest.raises(UnsupportedSetup, match=r"divide by 4, but not these: b \(2, 6\)\. Exclude"):
            prune_({"a": torch.ones(2, 4), "b": torch.ones(2, 6)}, 0.5, selection="2:4")

    def test_another_amount(self) -> None:
        with pytest.raises(UnsupportedSetup, match=r"2:4 prunes 0\.5 of the weights at once, not 0\.7"):
            prune_({"a": torch.ones(2, 4)}, 0.7, selection="2:4")
