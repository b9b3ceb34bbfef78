"""What masks save, counted by hand."""

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.costs import cost_table, layer_costs
from lightning_soup.layers.masks import Masks
from lightning_soup.layers.prunable_weights import prunable
from lightning_soup.layers.pruning import prune_
from lightning_soup.layers.semi_structured import to_semi_structured_


def test_by_hand():
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 25, 10))
    masks = Masks(
        {
            "0.weight": torch.arange(72).reshape(4, 2, 3, 3) < 18,
            "2.weight": torch.zeros(10, 100, dtype=torch.bool),
        }
    )
    first, second = layer_costs(module, masks, torch.rand(1, 2, 5, 5))
    assert (first.weights, first.kept, first.dense_bytes, first.sparse_bytes) == (72, 18, 288, 18 * 4 + 9)
    assert (first.flops, first.kept_flops) == (2 * 72 * 25, 2 * 18 * 25)
    assert (second.kept, second.sparse_bytes, second.flops, second.kept_flops) == (0, 125, 2000, 0)


def test_a_vit_and_its_table():
    module = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10).train()
    weights = prunable(module)
    masks = prune_(weights, 0.75)
    costs = layer_costs(module, masks, torch.rand(1, 3, 224, 224))
    assert module.training
    assert all(cost.flops > 0 for cost in costs)
    assert sum(cost.kept for cost in costs) == masks.size - masks.pruned
    console = Console(width=120, record=True)
    console.print(cost_table(costs))
    text = console.export_text()
    assert "blocks.1.mlp.fc2.weight" in text
    assert "25.0%" in text.splitlines()[-2]


def test_attention_of_torch_is_counted():
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    masks = Masks.full({"in_proj_weight": module.in_proj_weight, "out_proj.weight": module.out_proj.weight})
    inputs = [torch.rand(1, 4, 8)] * 3
    assert [cost.flops for cost in layer_costs(module, masks, *inputs)] == [2 * 4 * 8 * 24, 2 * 4 * 8 * 8]
    assert torch.backends.mha.get_fastpath_enabled()


def test_without_inputs_there_are_no_operations():
    module = nn.Linear(2, 2)
    [cost] = layer_costs(module, Masks.full({"weight": module.weight}))
    assert (cost.flops, cost.weights) == (0, 4)


@pytest.mark.parametrize("attribute", ["module", "net"])
def test_a_compiled_part_under_any_name(attribute):
    module = nn.Module()
    module.add_module(attribute, torch.compile(nn.Linear(4, 2)))
    name = "weight" if attribute == "module" else "net.weight"  # as in files, which drop a "module." before all names
    (cost,) = layer_costs(module, Masks({name: torch.ones(2, 4, dtype=torch.bool)}))
    assert (cost.name, cost.weights) == (name, 8)


def test_masks_of_another_model():
    with pytest.raises(UnsupportedSetup, match=r"for Linear holds the masks of another model.*other: mask"):
        layer_costs(nn.Linear(4, 2), Masks({"other": torch.ones(2, 4, dtype=torch.bool)}))


class TestSemiStructured:
    def test_what_is_not_two_of_four_is_refused(self):
        module = nn.Sequential(nn.Linear(8, 8))
        with pytest.raises(UnsupportedSetup, match="no linear layer has a mask of two in each four"):
            to_semi_structured_(module, Masks.full(dict(module.named_parameters())))

    def test_devices_that_cannot_are_refused(self):
        module = nn.Sequential(nn.Linear(8, 8))
        masks = prune_(prunable(module), 0.5, selection="2:4")
        with pytest.raises(UnsupportedSetup, match="cpu has no semi-structured products"):
            to_semi_structured_(module, masks)

    def test_linear_layers_are_put_into_that_form(self, monkeypatch):
        module = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 1), nn.Linear(8, 8))
        masks = prune_(prunable(module, exclude=["2.*"]), 0.5, selection="2:4")
        monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone() + 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        before = module[0].weight.detach().clone()

        class OnCuda:
            type = "cuda"

        monkeypatch.setattr(nn.Parameter, "device", OnCuda(), raising=False)
        assert to_semi_structured_(module, masks) == ["0.weight"]
        assert torch.equal(module[0].weight, before + 1)
        assert not module[0].weight.requires_grad
