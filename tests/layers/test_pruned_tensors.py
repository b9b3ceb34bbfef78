"""Pruning and masks of every kind of tensor: types, layouts, sizes, values, devices; copies of masks."""

import copy
import os
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.overrides import TorchFunctionMode

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers import thresholds
from lightning_soup.layers.masks import Masks
from lightning_soup.layers.pruning import erk_densities, prune_
from lightning_soup.layers.thresholds import above, kth_smallest

EVERY = ["global", "uniform", "lamp", "erk", "random", "rows", "2:4"]
HALF = Masks({"w": torch.tensor([[True, False], [False, True]])})


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("selection", EVERY)
class TestEverySelection:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_types(self, selection: str, dtype: torch.dtype) -> None:
        weights = {"a": _random(8, 8, dtype=dtype), "b": _random(4, 8, dtype=dtype, seed=1)}
        assert prune_(weights, 0.5, selection=selection).pruned == 48
        assert sum(int((tensor == 0).sum()) for tensor in weights.values()) == 48

    def test_mixed_types(self, selection: str) -> None:
        types = [torch.float16, torch.float64, torch.bfloat16, torch.float32]
        weights = {str(t): _random(8, 8, dtype=t, seed=i) for i, t in enumerate(types)}
        assert prune_(weights, 0.5, selection=selection).pruned == 128

    @pytest.mark.parametrize("values", ["normal", "ties"])
    def test_channels_last(self, selection: str, values: str) -> None:
        plain = _random(8, 4, 3, 3) if values == "normal" else _random(8, 4, 3, 3).round()
        last = plain.clone(memory_format=torch.channels_last)
        expected = prune_({"w": plain}, 0.5, selection=selection)
        found = prune_({"w": last}, 0.5, selection=selection)
        assert found == expected
        assert found["w"].is_contiguous()
        assert torch.equal(last, plain)
        assert last.is_contiguous(memory_format=torch.channels_last)

    def test_nothing_in_a_tensor(self, selection: str) -> None:
        weights = {"none": torch.zeros(0, 4), "some": _random(4, 4)}
        assert prune_(weights, 0.5, selection=selection).pruned == 8
        assert prune_({"none": torch.zeros(0, 4)}, 0.5, selection=selection).sparsity == 0

    def test_tensors_of_inference_mode(self, selection: str) -> None:
        with torch.inference_mode():
            weight = _random(4, 4)
        assert prune_({"w": weight}, 0.5, selection=selection).pruned == 8

    def test_parameters_stay_leaves(self, selection: str) -> None:
        weight = nn.Parameter(_random(4, 4))
        masks = prune_({"w": weight}, 0.5, selection=selection)
        assert weight.is_leaf
        assert not masks["w"].requires_grad

    @pytest.mark.parametrize(
        ("tensor", "message"),
        [
            (torch.empty(4, 4, device="meta"), "w is on the meta device: expected a whole tensor with values"),
            (torch.eye(4).to_sparse(), r"w is a Tensor of layout torch\.sparse_coo: expected a whole tensor"),
            (torch.ones(4, 4, dtype=torch.int64), r"w is torch\.int64: expected float64, float32, float16, bfloat16"),
            (torch.ones(4, 4).to(torch.float8_e5m2), r"w is torch\.float8_e5m2: expected float64"),
            (torch.ones(4, 4, dtype=torch.complex64), r"w is torch\.complex64: expected float64"),
        ],
        ids=lambda value: "" if isinstance(value, Tensor) else value[:16],
    )
    def test_what_has_no_magnitudes_is_named(self, selection: str, tensor: Tensor, message: str) -> None:
        with pytest.raises(UnsupportedSetup, match=message):
            prune_({"w": tensor}, 0.5, selection=selection)


@pytest.mark.parametrize("selection", ["global", "uniform", "lamp", "erk", "random"])
def test_vectors(selection: str) -> None:
    assert prune_({"w": _random(8)}, 0.5, selection=selection).pruned == 4


@pytest.mark.parametrize("selection", ["rows", "2:4"])
def test_vectors_have_no_rows(selection: str) -> None:
    with pytest.raises(UnsupportedSetup, match=r"w is \(4,\): expected rows and inputs"):
        prune_({"w": torch.ones(4)}, 0.5, selection=selection)


def test_erk_of_nothing() -> None:
    assert erk_densities([(0, 4), (2, 2)], 0.5) == [1, 0.5]
    assert erk_densities([(0, 4)], 0.5) == [1]


def test_sharded_tensors_are_named(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(UnsupportedSetup, match="w is a DTensor of layout"):
            prune_({"w": sharded}, 0.5)
    finally:
        torch.distributed.destroy_process_group()


class TestValues:
    def test_a_value_of_64_bits_is_not_rounded_to_compare_it(self) -> None:
        """The float32 is larger by less than it can tell; rounded, the two would be equal and both be pruned."""
        single = torch.tensor([[0.1, 1.0]])
        double = single.double() - 1e-12
        masks = prune_({"a": single, "b": double}, 0.25)
        assert masks["a"].tolist() == [[True, True]]
        assert masks["b"].tolist() == [[False, True]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_subnormal_weights_are_ranked(self, dtype: torch.dtype) -> None:
        tiny = torch.arange(100, 0, -1, dtype=torch.float64) * torch.finfo(dtype).smallest_normal / 128
        weight = tiny.to(dtype).reshape(10, 10)
        assert prune_({"w": weight}, 0.5)["w"].flatten().tolist() == [True] * 50 + [False] * 50

    @pytest.mark.parametrize("scale", [1e-30, 1e37])
    def test_rows_whose_squares_float32_cannot_hold(self, scale: float) -> None:
        weight = torch.arange(8.0, 0, -1).reshape(8, 1).repeat(1, 4) * scale
        assert prune_({"w": weight}, 0.5, selection="rows")["w"][:, 0].tolist() == [True] * 4 + [False] * 4

    def test_minus_zero_is_zero(self) -> None:
        weight = torch.tensor([[2.0, -0.0, 1, 0.0]])
        assert prune_({"w": weight}, 0.25)["w"].tolist() == [[True, False, True, True]]
        assert not weight[0, 1].signbit()

    def test_equals_are_not_collected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(thresholds, "_FEW", 10)
        monkeypatch.setattr(thresholds, "_CHUNK", 64)
        masks = prune_({"a": torch.full((20, 20), 0.25), "b": torch.full((20, 20), -0.25)}, 0.5)
        assert not masks["a"].any()
        assert masks["b"].all()


class TestShared:
    @pytest.mark.parametrize("selection", EVERY)
    def test_masks_in_another_order(self, selection: str) -> None:
        weights = {"a": _random(4, 4), "b": _random(4, 4, seed=1)}
        kept = {name: torch.ones(4, 4, dtype=torch.bool) for name in ("b", "a")}
        kept["a"][0, 0] = False
        found = prune_(weights, 0.5, Masks(kept), selection)
        assert list(found) == ["a", "b"]
        assert not found["a"][0, 0]

    def test_views_of_one_tensor(self) -> None:
        whole = _random(4, 8)
        masks = prune_({"left": whole[:, :4], "right": whole[:, 4:]}, 0.5)
        assert torch.equal(whole != 0, torch.cat([masks["left"], masks["right"]], 1))


class TestOneThread:
    def test_small_work_is_not_spread(self) -> None:
        """Many short operations wait for one another where another process takes a core."""

        class Threads(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                name = getattr(function, "__name__", "")
                if name in ("bitwise_and_", "abs", "abs_"):
                    seen.setdefault(name, set()).add(torch.get_num_threads())
                return function(*args, **(kwargs or {}))

        seen: dict[str, set[int]] = {}
        torch.set_num_threads(2)
        try:
            with Threads():
                value, *_ = kth_smallest([_random(1000)], 500, absolute=True)
                above([_random(1000)], value, 0, absolute=True)
                HALF.apply_({"w": torch.ones(2, 2)})
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(1)
        assert seen == {"bitwise_and_": {1}, "abs": {1}, "abs_": {1}}


class TestMasksBeside:
    def test_one_mask_for_tensors_of_several_types(self) -> None:
        """Weights, and moments of another type."""
        for _ in range(2):
            for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
                tensor = torch.ones(2, 2, dtype=dtype)
                HALF.apply_({"w": tensor})
                assert tensor.tolist() == [[1, 0], [0, 1]]

    def test_masks_of_several_tensors_are_told_apart(self) -> None:
        masks = Masks({"a": torch.tensor([[True, False]]), "b": torch.tensor([[False, True]])})
        tensors = {name: torch.ones(1, 2) for name in ("b", "a")}
        masks.apply_(tensors)
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [[1, 0]], "b": [[0, 1]]}

    def test_on_several_devices(self) -> None:
        masks = Masks(dict(HALF))
        masks.apply_({"w": torch.empty(2, 2, device="meta")})
        tensor = torch.ones(2, 2)
        masks.apply_({"w": tensor})
        assert tensor.tolist() == [[1, 0], [0, 1]]
        assert Masks.full({"w": torch.empty(2, 2, device="meta")})["w"].device.type == "meta"

    @pytest.mark.parametrize("shape", [(2, 1), (2, 3), (4,)])
    def test_another_shape_is_not_stretched(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(UnsupportedSetup, match=r"the mask of w is \(2, 2\), the tensor \("):
            HALF.apply_({"w": torch.ones(shape)})

    def test_masks_have_the_layout_of_what_they_are_laid_over(self) -> None:
        """Else it takes three times as long."""
        weight = _random(4, 4, 3, 3).to(memory_format=torch.channels_last)
        masks = Masks.full({"w": weight})
        masks.apply_({"w": weight})
        assert next(iter(masks._words.values())).stride() == weight.stride()

    def test_nothing_is_remembered_for_once(self) -> None:
        masks, tensor = Masks(dict(HALF)), torch.ones(2, 2)
        masks.apply_({"w": tensor}, once=True)
        assert tensor.tolist() == [[1, 0], [0, 1]]
        assert not masks._words
        assert not prune_({"w": tensor}, 0.75, masks)._words
        masks.apply_({"w": tensor})
        assert list(masks._words) == [("w", 4, tensor.device)]


class TestCopies:
    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_they_are_equal_and_work(self, duplicate) -> None:
        masks = Masks(dict(HALF))
        masks.apply_({"w": torch.ones(2, 2)})
        again, tensor = duplicate(masks), torch.ones(2, 2)
        again.apply_({"w": tensor})
        assert again == masks
        assert tensor.tolist() == [[1, 0], [0, 1]]

    def test_files_hold_no_more_than_the_masks(self) -> None:
        masks = Masks({"w": torch.ones(100, 100, dtype=torch.bool)})
        before = len(pickle.dumps(masks))
        masks.apply_({"w": torch.ones(100, 100)})
        assert len(pickle.dumps(masks)) == before

    def test_masks_made_in_inference_mode_train(self) -> None:
        with torch.inference_mode():
            masks = prune_({"w": _random(4, 4)}, 0.5)
        weight = _random(4, 4).requires_grad_()
        masks.apply_({"w": weight})
        weight.square().sum().backward()
        masks.apply_({"w": weight.grad})
        assert not weight.grad[~masks["w"]].any()

    def test_a_forked_process_applies_them(self) -> None:
        masks = Masks(dict(HALF))
        masks.apply_({"w": torch.ones(2, 2)})
        child = os.fork()
        if not child:
            tensor = torch.ones(2, 2)
            masks.apply_({"w": tensor})
            found = prune_({"w": tensor}, 0.75, masks).pruned
            os._exit(0 if found == 3 else 1)
        assert os.waitpid(child, 0)[1] == 0
