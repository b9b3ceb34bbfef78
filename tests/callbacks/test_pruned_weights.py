"""PrunedWeights: what it finds in a module and its optimizers, and keeps at zero."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_soup.callbacks.pruned_weights import PrunedWeights
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.layers.masks import Masks
from lightning_soup.layers.pruning import prune_
from tests.helpers.boring import TinyClassifier


def _pruned(module: nn.Module) -> PrunedWeights:
    pruned = PrunedWeights(module)
    pruned.masks = prune_(pruned.tensors, 0.5)
    return pruned


class TestPrune:
    ALONE = SimpleNamespace(is_global_zero=True, world_size=1)

    def test_the_options_arrive(self):
        found = []
        for seed in (1, 2):
            torch.manual_seed(0)
            pruned = _pruned(TinyClassifier())
            first = pruned.masks
            pruned.prune(self.ALONE, 0.5, "random", "survivors", seed)
            assert pruned.masks.pruned == round(first.size * 0.75)
            found.append(pruned.masks)
        assert found[0] != found[1]

    def test_what_is_pruned_stays_so_whatever_was_written_there(self):
        pruned = _pruned(TinyClassifier())
        first = pruned.masks
        with torch.no_grad():
            for tensor in pruned.tensors.values():
                tensor += 9
        pruned.prune(self.ALONE, 0.75, "global")
        assert not any((mask & ~first[name]).any() for name, mask in pruned.masks.items())
        assert pruned.holds()

    def test_other_ranks_take_what_rank_0_chose(self):
        chosen = _pruned(TinyClassifier()).masks
        pruned = PrunedWeights(TinyClassifier())
        strategy = SimpleNamespace(broadcast=lambda given: (None, chosen.state()))
        pruned.prune(SimpleNamespace(is_global_zero=False, world_size=2, strategy=strategy), 0.5, "global")
        assert pruned.masks == chosen
        assert all(torch.equal(tensor != 0, chosen[name]) for name, tensor in pruned.tensors.items())

    def test_they_raise_what_rank_0_raised(self):
        strategy = SimpleNamespace(broadcast=lambda given: (NonFiniteWeights("x"), None))
        with pytest.raises(NonFiniteWeights, match="x"):
            PrunedWeights(TinyClassifier()).prune(
                SimpleNamespace(is_global_zero=False, world_size=2, strategy=strategy), 0.5, "global"
            )


def test_gradients_of_some_weights_only():
    module = TinyClassifier()
    pruned = _pruned(module)
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)
    pruned.mask_gradients()
    assert torch.equal(module.net[0].weight.grad != 0, pruned.masks["net.0.weight"])
    assert module.net[3].weight.grad is None


def test_only_states_of_the_shape_of_the_weights_are_masked():
    module = nn.Linear(3, 2, bias=False)
    pruned, optimizer = _pruned(module), torch.optim.SGD(module.parameters(), 0.1)
    state = optimizer.state[module.weight]
    state["moment"], state["counts"] = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.int64)
    state["rows"], state["step"], state["name"] = torch.ones(2), torch.tensor(1.0), "x"
    pruned.mask_optimizer(optimizer)
    assert torch.equal(state["moment"] != 0, pruned.masks["weight"])
    assert all(state[key].all() for key in ("counts", "rows", "step"))


def test_the_norm_neither_overflows_nor_is_rounded():
    module = nn.Linear(2, 2, bias=False).half()
    nn.init.constant_(module.weight, 6e4)
    assert PrunedWeights(module).norm() == pytest.approx(2 * 6e4, rel=1e-3)
    module = nn.Linear(300, 300, bias=False)
    assert PrunedWeights(module).norm() == pytest.approx(float(module.weight.detach().double().norm()), rel=1e-12)


def test_the_very_same_tensors():
    module = TinyClassifier()
    pruned = PrunedWeights(module)
    assert pruned.is_of(PrunedWeights(module).tensors)
    assert not pruned.is_of(PrunedWeights(TinyClassifier()).tensors)
    assert not pruned.is_of({"net.0.weight": module.net[0].weight})
    assert not PrunedWeights(module, exclude=["net.3.*"]).is_of(pruned.tensors)


def test_masks_of_a_file():
    module = TinyClassifier()
    pruned, masks = PrunedWeights(module), prune_(PrunedWeights(TinyClassifier()).tensors, 0.5)
    pruned.resume(masks.state(), "the file")
    assert pruned.masks == masks
    with pytest.raises(UnsupportedSetup, match="the file holds the masks of another model"):
        pruned.resume(Masks({"w": torch.ones(1, 1, dtype=torch.bool)}).state(), "the file")
    assert pruned.masks == masks


def test_names_are_those_of_files_also_of_compiled_parts():
    module = TinyClassifier()
    module.net[0] = torch.compile(module.net[0], backend="eager")
    assert list(PrunedWeights(module).tensors) == ["net.0.weight", "net.3.weight"]
    assert list(PrunedWeights(module, exclude=["net.0.weight"]).tensors) == ["net.3.weight"]
