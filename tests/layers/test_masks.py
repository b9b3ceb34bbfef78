"""Masks: how they are applied, counted, and written."""

import math

import pytest
import torch
from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.masks import Masks


def _masks() -> Masks:
    return Masks({"a": torch.tensor([[True, False, True]]), "b": torch.tensor([[False], [True]])})


class TestApply:
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str
    )
    def test_what_is_pruned_is_plus_zero_and_the_rest_untouched(self, dtype: torch.dtype) -> None:
        values = torch.tensor([1.5, math.nan, math.inf, -math.inf, -0.0, -2.0])
        for row in (values, values.flip(0)):
            kept = torch.tensor([True, False, False, False, False, True])
            tensor = row.to(dtype)
            before = tensor.clone().view(torch.uint8).reshape(6, -1)
            Masks({"w": kept}).apply_({"w": tensor})
            after = tensor.view(torch.uint8).reshape(6, -1)
            assert torch.equal(after[kept], before[kept])
            assert not after[~kept].any()

    def test_views_and_parameters(self) -> None:
        whole = torch.ones(3, 2)
        Masks({"w": torch.tensor([[True, False, True], [False, True, True]])}).apply_({"w": whole.T})
        assert torch.equal(whole, torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        layer = nn.Linear(2, 1)
        Masks({"weight": torch.tensor([[False, True]])}).apply_(dict(layer.named_parameters()))
        assert layer.weight[0, 0] == 0
        assert layer.weight.requires_grad

    def test_autograd_sees_the_change(self) -> None:
        weight = torch.ones(2, requires_grad=True)
        result = weight.square().sum()
        Masks({"w": torch.tensor([True, False])}).apply_({"w": weight})
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()

    def test_other_names_are_left_alone(self) -> None:
        tensor = torch.ones(2)
        _masks().apply_({"c": tensor})
        assert torch.equal(tensor, torch.ones(2))


class TestCounts:
    def test_counts(self) -> None:
        masks = _masks()
        assert (masks.pruned, masks.size, masks.sparsity) == (2, 5, 0.4)
        assert repr(masks) == "Masks(2 tensors, 2 of 5 pruned)"
        assert Masks.full({"a": torch.rand(2, 2)}).pruned == 0

    def test_equality(self) -> None:
        assert _masks() == _masks()
        assert _masks() != Masks.full(dict(_masks()))
        assert _masks() != Masks({"a": _masks()["a"]})
        assert _masks() != 1

    def test_other_types_than_bool(self) -> None:
        with pytest.raises(TypeError, match=r"the mask of a is torch\.float32: expected bool"):
            Masks({"a": torch.ones(2)})


class TestFiles:
    @pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
    def test_a_bit_an_element_and_back(self, count: int) -> None:
        mask = torch.rand(count, 3, generator=torch.Generator().manual_seed(count)) < 0.5
        state = Masks({"w": mask}).state()
        assert state["bits"]["w"].numel() == -(-count * 3 // 8)
        assert Masks.from_state(state) == Masks({"w": mask})

    def test_the_safe_loader_reads_them(self, tmp_path) -> None:
        torch.save(_masks().state(), tmp_path / "masks.pt")
        assert Masks.from_state(torch.load(tmp_path / "masks.pt", weights_only=True)) == _masks()

    @pytest.mark.parametrize("damage", [None, torch.ones(1), torch.ones(0).byte(), torch.ones(2).byte(), b"1"], ids=str)
    def test_damage_is_named(self, damage) -> None:
        state = _masks().state()
        state["bits"]["a"] = damage
        with pytest.raises(UnsupportedSetup, match="the mask of a is damaged: expected 1 bytes"):
            Masks.from_state(state)

    def test_other_states(self) -> None:
        for found in ("bits", "shapes", "weights"):
            with pytest.raises(UnsupportedSetup, match=f"expected bits and shapes, found {found}"):
                Masks.from_state({found: {}})

    def test_masks_of_a_large_other_model(self) -> None:
        many = {f"layer{number}": torch.ones(1, 1) for number in range(12)}
        with pytest.raises(UnsupportedSetup, match=r"12 tensors differ: .*layer9: mask missing, weights \(1, 1\). Use"):
            Masks({}).check(many, "the checkpoint")

    def test_masks_of_another_model(self) -> None:
        with pytest.raises(UnsupportedSetup, match=r"(?s)the checkpoint holds the masks of another model.*3 tensors.*"):
            _masks().check({"a": torch.rand(1, 4), "c": torch.rand(1)}, "the checkpoint")
        _masks().check({"a": torch.rand(1, 3), "b": torch.rand(2, 1)}, "the checkpoint")
