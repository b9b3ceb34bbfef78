import copy

import open_clip
import pytest
import timm
import torch
import torchvision
from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers import convert_to_dense, use_experts
from lightning_soup.layers.conversion import experts_of
from lightning_soup.layers.feed_forward import choose, find_feed_forwards
from lightning_soup.modules.optimization import parameter_groups
from tests.helpers.clip import TINY_CLIP

SMALL = {"img_size": 32, "num_classes": 3}
VIT = {**SMALL, "patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 2}


def swin():
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 2), num_heads=(2, 4))


MODELS = {
    "ViT": (lambda: timm.create_model("vit_tiny_patch16_224", **VIT), 4, torch.rand(2, 3, 32, 32)),
    "DeiT": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **VIT), 4, torch.rand(2, 3, 32, 32)),
    "EVA": (
        lambda: timm.create_model("eva02_tiny_patch14_224", **{**VIT, "patch_size": 16}),
        4,
        torch.rand(2, 3, 32, 32),
    ),
    "Swin": (swin, 3, torch.rand(1, 3, 56, 56)),
    "open_clip": (lambda: open_clip.CLIP(**copy.deepcopy(TINY_CLIP)).visual, 1, torch.rand(2, 3, 8, 8)),
    "torchvision": (
        lambda: torchvision.models.VisionTransformer(32, 16, 4, 2, 24, 48, num_classes=3),
        4,
        torch.rand(2, 3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_converted_and_back(name):
    make, count, images = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    before, plain = model(images), {key: value.clone() for key, value in model.state_dict().items()}
    assert len(find_feed_forwards(model)) == count
    replaced = use_experts(model, 4, "all")
    assert len(replaced) == len(experts_of(model)) == count
    torch.testing.assert_close(model(images), before)
    assert torch.equal(model(images), before)  # copies, and their mean is exactly what was there
    model.train()
    (model(images) ** 2).mean().backward()
    assert all(p.grad is not None for layer in experts_of(model).values() for p in layer.parameters())
    assert convert_to_dense(model.eval()) == replaced
    assert list(model.state_dict()) == list(plain)
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(images), before)


def test_both_towers_of_clip_or_one_by_a_pattern():
    model = open_clip.CLIP(**copy.deepcopy(TINY_CLIP))
    assert len(find_feed_forwards(model)) == 2
    assert use_experts(model, 2, "all", target=["visual.*.mlp"]) == ["visual.transformer.resblocks.0.mlp"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", "abcde"), ("every_other", "bd"), ("last_2", "de"), ([0, 3], "ad"), ([-1, 0, 4], "ae")],
)
def test_which_are_chosen(layers, expected):
    assert "".join(choose(list("abcde"), layers)) == expected


@pytest.mark.parametrize("layers", ["some", "last_0", "last_6", [], [5], [-6], ["a"], [True], "every_other_"])
def test_layers_that_match_nothing(layers):
    with pytest.raises(UnsupportedSetup, match="the model has 5 feed-forward networks: a, b, c, d, e"):
        choose(list("abcde"), layers)


def test_one_network_has_no_other():
    with pytest.raises(UnsupportedSetup, match="layers='every_other'"):
        choose(["a"], "every_other")


def block(*layers, **more):
    holder = nn.Module()
    holder.mlp = nn.Sequential(*layers)
    for name, part in more.items():
        setattr(holder, name, part)
    return holder


class SplitBlock(nn.Module):
    """As Hugging Face's: the residual is inside the second half."""

    def __init__(self):
        super().__init__()
        self.intermediate, self.output = nn.Linear(4, 8), nn.Linear(8, 4)


class Mixing(nn.Module):
    """Looks at other tokens."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x - x.mean(1, keepdim=True)))


def tied():
    one = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    return nn.ModuleList([block(one), block(one)])


REFUSED = {
    "BatchNorm": (
        lambda: block(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
        "has BatchNorm, whose statistics",
    ),
    "a convolution": (lambda: timm.create_model("pvt_v2_b0"), "has a convolution"),
    "one layer": (lambda: block(nn.Linear(4, 4)), "has 1 Linear layers"),
    "another width": (lambda: block(nn.Linear(4, 8), nn.Linear(8, 5)), "or changes its width"),
    "mixed tokens": (lambda: block(Mixing()), "does not work on each token by itself"),
    "not runnable": (lambda: block(nn.Linear(4, 8), nn.Linear(6, 4)), r"cannot be run on tokens \[1, 3, 4\]"),
    "tied": (tied, "shares parameters with another part"),
    "split": (SplitBlock, "split over intermediate and output"),
    "torch's own": (lambda: nn.TransformerEncoderLayer(4, 2), "split over linear1 and linear2"),
    "no transformer": (lambda: nn.Sequential(nn.Linear(4, 4)), "has no module that is called mlp, ffn"),
    "nothing": (nn.Module, "has no parameters yet.*use_experts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shared_out_is_refused_with_its_reason(name):
    make, message = REFUSED[name]
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(UnsupportedSetup, match=message):
        use_experts(model, layers="all")
    assert list(model.state_dict()) == keys


def test_looking_changes_neither_modes_nor_the_random_stream():
    model = timm.create_model("vit_tiny_patch16_224", **VIT, proj_drop_rate=0.5)
    state = torch.random.get_rng_state()
    find_feed_forwards(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(part.training for part in model.modules())


def test_a_model_without_storage_is_judged_by_its_structure():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", **VIT)
    assert len(find_feed_forwards(model)) == 4


def test_experts_are_in_the_groups_of_their_layer():
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    use_experts(model, 3, "all")
    groups = parameter_groups(model, 1.0, 0.1, layer_decay=0.5)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for number, part in enumerate(model.blocks):
        for expert in part.mlp.experts:
            assert rate[id(expert.fc1.weight)] == rate[id(part.attn.qkv.weight)] == 0.5 ** (4 - number)
            assert decay[id(expert.fc1.weight)] == 0.1
            assert decay[id(expert.fc1.bias)] == 0
