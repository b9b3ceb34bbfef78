"""What is pruned: the golden cases, exact counts, ties, and masks that only grow."""

import math

import pytest
import torch
from torch import Tensor

from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.layers.masks import Masks
from lightning_soup.layers.pruning import cubic_sparsity, cycle_amounts, erk_densities, lamp_scores, prune_

EVERY = ["global", "uniform", "lamp", "erk", "random", "rows"]


def _two() -> dict[str, Tensor]:
    return {
        "A": torch.tensor([[0.1, -0.2, 0.3, -0.4]], dtype=torch.float64),
        "B": torch.tensor([[1, -1.5, 2.5, 3]], dtype=torch.float64),
    }


def layers(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"conv": (8, 4, 3, 3), "wide": (16, 40), "narrow": (10, 16)}
    return {n: torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def _counts(amounts: list[tuple[float, str]], size: int) -> list[int]:
    """How many are pruned after each cycle."""
    tensors = {"w": torch.rand(size, 1, generator=torch.Generator().manual_seed(0))}
    masks, found = None, []
    for amount, of in amounts:
        masks = prune_(tensors, amount, masks, of=of)
        found.append(masks.pruned)
    return found


class TestSchedules:
    """Golden cases 1 and 5."""

    def test_shares_of_survivors(self) -> None:
        (first, of), *_ = cycle_amounts(0.9, 3, "compound")
        assert first == pytest.approx(0.5358411166387221, abs=1e-12)
        assert of == "survivors"
        reached = [amount for amount, _ in cycle_amounts(0.9, 3)]
        assert reached == pytest.approx([0.5358411166387221, 0.7845565309968117, 0.9], abs=1e-12)
        assert reached[-1] == 0.9
        assert cycle_amounts(0.1, 3)[-1] == (0.1, "all")  # not 1 - (1 - 0.1), which is less
        assert [a for a, _ in cycle_amounts(0.98, 3)][:2] == pytest.approx([0.7285582383405094, 0.9263193700271922])

    def test_both_roundings(self) -> None:
        assert _counts(cycle_amounts(0.9, 3, "compound"), 100) == [54, 79, 90]
        assert _counts(cycle_amounts(0.9, 3, "direct"), 100) == [54, 78, 90]

    @pytest.mark.parametrize(("amount", "size", "count"), [(0.5, 1, 0), (0.5, 5, 2), (0.25, 10, 2), (0.75, 10, 8)])
    def test_halves_go_to_even(self, amount: float, size: int, count: int) -> None:
        assert _counts([(amount, "all")], size) == [count]

    def test_gradual(self) -> None:
        found = [cubic_sparsity(0.9, t) for t in (0, 1 / 4, 1 / 2, 3 / 4, 1)]
        assert found == pytest.approx([0, 0.5203125, 0.7875, 0.8859375, 0.9], abs=1e-12)
        assert (cubic_sparsity(0.9, -1), cubic_sparsity(0.9, 7)) == (0, 0.9)

    @pytest.mark.parametrize("sparsity", [0, 1, -0.1, 1.5, math.nan, "0.9"])
    def test_sparsity_out_of_range(self, sparsity: float) -> None:
        with pytest.raises(UnsupportedSetup, match="expected a share above 0 and below 1"):
            cycle_amounts(sparsity, 3)

    def test_other_options(self) -> None:
        with pytest.raises(UnsupportedSetup, match="cycles=0: expected 1 or more"):
            cycle_amounts(0.5, 0)
        with pytest.raises(UnsupportedSetup, match="rounding='up': expected direct or compound"):
            cycle_amounts(0.5, 1, "up")


class TestGolden:
    """Golden case 2."""

    @pytest.mark.parametrize(
        ("selection", "amount", "kept"),
        [
            ("global", 0.5, [[0, 0, 0, 0], [1, 1, 1, 1]]),
            ("uniform", 0.5, [[0, 0, 1, 1], [0, 0, 1, 1]]),
            ("lamp", 0.625, [[0, 0, 0, 1], [0, 0, 1, 1]]),
        ],
    )
    def test_two_tensors(self, selection: str, amount: float, kept: list[list[int]]) -> None:
        tensors = _two()
        masks = prune_(tensors, amount, selection=selection)
        assert [mask.int().tolist()[0] for mask in masks.values()] == kept
        for name, tensor in tensors.items():
            assert torch.equal(tensor, _two()[name] * masks[name])

    def test_lamp_scores(self) -> None:
        a, b = (lamp_scores(tensor)[0].tolist() for tensor in _two().values())
        assert a == pytest.approx([1 / 30, 4 / 29, 9 / 25, 1], abs=1e-12)
        assert b == pytest.approx([0.054054054054054, 0.128571428571429, 0.409836065573771, 1], abs=1e-12)

    def test_lamp_of_equals_and_zeros(self) -> None:
        assert lamp_scores(torch.tensor([[2.0, -2, 1, 0]]).double())[0].tolist() == pytest.approx([0.5, 0.5, 1 / 9, 0])
        assert lamp_scores(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_lamp_of_squares_that_the_type_cannot_hold(self, dtype: torch.dtype) -> None:
        weight = torch.tensor([[300.0, 1e-3, 2e-3, 400]]).to(dtype)
        if dtype == torch.float32:
            weight *= 1e-25
        exact = weight.double().square()
        found = lamp_scores(weight).double()
        torch.testing.assert_close(found, exact / (exact * (exact >= exact.mT)).sum(1), rtol=1e-6, atol=0)

    def test_erk(self) -> None:
        shapes = [(8, 3, 3, 3), (16, 8, 3, 3), (10, 16)]
        found = erk_densities(shapes, 0.8)
        assert found == pytest.approx([0.32947742262810764, 0.10901826484018266, 0.6802739726027398], abs=1e-12)
        assert found[0] * 216 / 17 == pytest.approx(4.186301369863014, abs=1e-12)
        tensors = {str(s): torch.rand(s, generator=torch.Generator().manual_seed(0)) for s in shapes}
        masks = prune_(tensors, 0.8, selection="erk")
        assert [int(mask.sum()) for mask in masks.values()] == [71, 126, 109]

    def test_erk_keeps_small_tensors_whole(self) -> None:
        found = erk_densities([(8, 3, 3, 3), (64, 32, 3, 3), (10, 64)], 0.8)
        assert found == pytest.approx([1, 0.16284722222222223, 1], abs=1e-12)
        assert erk_densities([(4, 4), (2, 2)], 0.0) == [1, 1]

    def test_two_of_four(self) -> None:
        row = {"w": torch.tensor([[0.1, -0.9, 0.5, 0.05, 0.3, 0.3, -0.3, 0.3]])}
        assert prune_(row, 0.5, selection="2:4")["w"].int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]


class TestExact:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("selection", ["global", "uniform", "lamp", "erk", "random"])
    def test_counts_are_exact_and_masks_only_grow(self, selection: str, dtype: torch.dtype) -> None:
        tensors, before = layers(dtype=dtype), None
        for amount in (0.0, 0.013, 0.3, 0.62, 0.9, 0.9, 0.999, 1.0):
            masks = prune_(tensors, amount, before, selection, seed=int(1000 * amount))
            assert masks.pruned == round(masks.size * amount)
            for name, tensor in tensors.items():
                assert before is None or not (masks[name] & ~before[name]).any()
                assert not tensor[~masks[name]].any()
            before = masks
            with torch.no_grad():  # as retraining would
                for number, (name, tensor) in enumerate(tensors.items()):
                    draw = torch.Generator().manual_seed(number)
                    tensor += torch.randn(tensor.shape, generator=draw).to(dtype) * masks[name]

    def test_global_takes_the_smallest(self) -> None:
        tensors = layers()
        values = torch.cat([tensor.flatten() for tensor in tensors.values()]).abs()
        kept = torch.cat([mask.flatten() for mask in prune_(tensors, 0.7).values()])
        assert values[kept].min() > values[~kept].max()

    def test_equals_are_pruned_in_order(self) -> None:
        tensors = {"a": torch.tensor([[1.0, -1, 5]]), "b": torch.tensor([[1.0], [-1], [1]])}
        masks = prune_(tensors, 0.5)
        assert masks["a"].tolist() == [[False, False, True]]
        assert masks["b"].tolist() == [[False], [True], [True]]

    @pytest.mark.parametrize("selection", ["global", "uniform", "random", "lamp"])
    def test_live_zeros_are_not_taken_for_pruned_ones(self, selection: str) -> None:
        for kept, expected in (([1, 1, 1, 0, 1, 0], [0, 1, 1, 0, 1, 0]), ([0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1])):
            masks = Masks({"w": torch.tensor([kept]).bool()})
            found = prune_({"w": torch.tensor([[0.0, 3, 0, 0, 0, 0]])}, 0.5, masks, selection)
            assert found.pruned == 3
            assert not (found["w"] & ~masks["w"]).any()
            assert selection == "random" or found["w"].int().tolist() == [expected]

    def test_live_zeros_of_several_tensors(self) -> None:
        tensors = {"a": torch.tensor([[0.0, 1, 0]]), "b": torch.tensor([[0.0, 0, 1]])}
        assert [m.int().tolist() for m in prune_(tensors, 0.5).values()] == [[[0, 1, 0]], [[0, 1, 1]]]

    @pytest.mark.parametrize("selection", [*EVERY, "1:2"])
    def test_given_masks_stay_as_they_are(self, selection: str) -> None:
        tensors = layers()
        masks = prune_(tensors, 0.25, selection="random")
        before = Masks({name: mask.clone() for name, mask in masks.items()})
        found = prune_(tensors, 0.5, masks, selection)
        assert masks == before
        assert found.pruned > masks.pruned

    @pytest.mark.parametrize("selection", [*EVERY, "1:2"])
    def test_transposed_masks(self, selection: str) -> None:
        mask, weight = torch.ones(8, 4, dtype=torch.bool), torch.zeros(4, 8)
        mask[:4, 0] = False
        found = prune_({"w": weight}, 0.5, Masks({"w": mask.T}), selection)["w"]
        assert found.is_contiguous()
        assert not found[0, :4].any()

    def test_uniform_takes_the_same_share_of_what_is_left(self) -> None:
        tensors = {name: torch.arange(1.0, 11).reshape(1, 10) for name in ("a", "b")}
        masks = Masks({"a": torch.arange(10).reshape(1, 10) >= 5, "b": torch.ones(1, 10, dtype=torch.bool)})
        found = prune_(tensors, 0.5, masks, "uniform")
        assert [int(mask.sum()) for mask in found.values()] == [10 - 7, 10 - 3]  # 5 + 5/3 and 10/3
        found = prune_({name: torch.rand(1, 5) for name in ("a", "b")}, 0.5, selection="uniform")
        assert [int(mask.sum()) for mask in found.values()] == [5 - 3, 5 - 2]  # between equals the lower goes first

    @pytest.mark.parametrize("selection", ["uniform", "erk"])
    def test_another_selection_goes_on_from_masks(self, selection: str) -> None:
        tensors = _two()
        found = prune_(tensors, 0.625, prune_(tensors, 0.5), selection)
        assert [mask.int().tolist()[0] for mask in found.values()] == [[0, 0, 0, 0], [0, 1, 1, 1]]

    def test_weights_that_came_back_are_not_ranked(self) -> None:
        masks = Masks({"w": torch.tensor([[True, True, False, True]])})
        tensors = {"w": torch.tensor([[1.0, 2, 100, 3]])}
        assert prune_(tensors, 0.5, masks)["w"].tolist() == [[False, True, False, True]]
        assert tensors["w"].tolist() == [[0, 2, 0, 3]]

    def test_random_is_that_of_its_seed(self) -> None:
        same = [prune_(layers(), 0.5, selection="random", seed=s) for s in (1, 1, 2)]
        assert same[0] == same[1] != same[2]

    def test_non_contiguous_weights(self) -> None:
        whole = layers()["wide"]
        masks = prune_({"w": whole.T}, 0.5)
        assert masks["w"].T.contiguous().equal(prune_({"w": layers()["wide"]}, 0.5)["w"])
        assert torch.count_nonzero(whole) == whole.numel() // 2


class TestBadInput:
    @pytest.mark.parametrize("selection", ["magnitude", "4:2", "4:4", "0:4", "2:4:8", "", None])
    def test_unknown_selection(self, selection: str) -> None:
        with pytest.raises(UnsupportedSetup, match="expected global, uniform, lamp, erk, random, rows, or N:M"):
            prune_({"w": torch.ones(2, 2)}, 0.5, selection=selection)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("selection", EVERY)
    def test_not_finite(self, selection: str, value: float) -> None:
        tensors = _two()
        tensors["B"][0, 1] = value
        with pytest.raises(NonFiniteWeights, match="B has a NaN or an infinite value"):
            prune_(tensors, 0.5, selection=selection)

    def test_large_weights_whose_sum_overflows_are_finite(self) -> None:
        prune_({"w": torch.full((2, 2), 6e4, dtype=torch.float16)}, 0.5)

    @pytest.mark.parametrize("selection", EVERY)
    def test_less_than_is_pruned_already(self, selection: str) -> None:
        tensors = _two() | {"C": torch.rand(4, 1)}
        masks = prune_(tensors, 0.75, selection=selection)
        with pytest.raises(UnsupportedSetup, match="pruned already, more than the"):
            prune_(tensors, 0.1, masks, selection)

    @pytest.mark.parametrize("selection", ["global", "rows"])
    def test_of_neither(self, selection: str) -> None:
        with pytest.raises(UnsupportedSetup, match="of='survivor': expected all or survivors"):
            prune_(_two(), 0.5, selection=selection, of="survivor")

    @pytest.mark.parametrize("amount", [-0.1, 1.1, math.nan, "0.5"])
    def test_amount_out_of_range(self, amount: float) -> None:
        with pytest.raises(UnsupportedSetup, match="expected a share, 0 … 1"):
            prune_(_two(), amount)

    def test_masks_of_another_model(self) -> None:
        with pytest.raises(UnsupportedSetup, match="masks of another model"):
            prune_(_two(), 0.5, Masks.full(layers()))
