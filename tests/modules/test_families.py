from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from lightning_soup import AwareNet, Family
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.families import FamilyInput, build_family
from tests.helpers.boring import TinyData
from tests.helpers.trainers import quiet_trainer

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = [0.5] * 3, [0.5] * 3


def normalised(images, mean, std):
    return (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def test_each_family_has_its_normalisation():
    images = torch.rand(2, 3, 8, 8)
    found = FamilyInput(None, *HALF)(normalised(images, *IMAGENET), *IMAGENET)
    torch.testing.assert_close(found, normalised(images, *HALF))
    same = normalised(images, *HALF)
    assert FamilyInput(None, *HALF)(same, *HALF) is same
    assert FamilyInput(None, None, None)(same, None, None) is same


def test_bytes_are_normalised_as_numbers():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    found = FamilyInput(None, *HALF)(images, [0.0] * 3, [1 / 255] * 3)
    torch.testing.assert_close(found, normalised(images / 255, *HALF), atol=1e-5, rtol=0)


def test_each_family_has_its_size():
    images = torch.rand(2, 3, 16, 16)
    found = FamilyInput((12, 12), None, None)(images, None, None)
    torch.testing.assert_close(found, interpolate(images, (12, 12), mode="bicubic", antialias=True))
    assert FamilyInput((16, 16), None, None)(images, None, None) is images
    half = images.bfloat16()  # for which there is no such kernel
    found = FamilyInput((12, 12), *HALF)(half, *IMAGENET)
    assert found.dtype == torch.bfloat16
    assert found.shape == (2, 3, 12, 12)


@pytest.mark.parametrize(
    ("family", "size", "mean"),
    [
        (Family("resnet18"), None, IMAGENET[0]),
        (Family("legacy_xception", img_size=299), (299, 299), HALF[0]),
        (Family("vit_tiny_patch16_224", model_args={"depth": 1}), (224, 224), HALF[0]),
        (Family("vit_tiny_patch16_224", img_size=64, model_args={"depth": 1}), (64, 64), HALF[0]),
        (Family("vit_tiny_patch16_224", model_args={"depth": 1, "img_size": 32}), (32, 32), HALF[0]),
        (Family("resnet18", normalization="data"), None, None),
        (Family("resnet18", mean=[0.1] * 3, std=[0.2] * 3), None, [0.1] * 3),
        (Family(modules=[nn.Flatten()]), None, None),
    ],
)
def test_what_a_family_wants(family, size, mean):
    networks, given = build_family(family, 1, 2, 3, soup=False)
    assert given.size == size
    assert given.mean == mean
    if family.img_size == 64:
        assert networks[0].patch_embed.img_size == (64, 64)


def test_timms_normalisation_is_for_three_channels():
    _, given = build_family(Family("test_byobnet"), 1, 2, 1, soup=False)
    assert given.mean is None
    with pytest.raises(UnsupportedSetup, match="3 means, but images have 1 channels"):
        build_family(Family("test_byobnet", mean=[0.1] * 3, std=[0.2] * 3), 1, 2, 1, soup=False)


def test_the_normalisation_of_the_data_is_asked_for():
    module = AwareNet([Family("test_byobnet", members=1)], num_classes=3)
    with pytest.raises(UnsupportedSetup, match="test_byobnet have a normalisation of their own"):
        quiet_trainer().test(module, datamodule=TinyData(), verbose=False)


def test_the_normalisation_of_the_data_is_asked_for_without_a_trainer():
    with pytest.raises(UnsupportedSetup, match=r"Give AwareNet\(data_mean"):
        AwareNet(["test_byobnet"], 1)(torch.rand(2, 3, 32, 32))


def test_files_and_folders_of_any_name(tmp_path):
    (tmp_path / "run[1]").mkdir()
    path = tmp_path / "run[1]" / "a.pt"
    torch.save(nn.Linear(4, 2).state_dict(), path)
    for given in (path, str(path)):
        assert Family("resnet18", checkpoints=[given]).files() == [str(path)]
    assert Family("resnet18", checkpoints=[tmp_path / "run*" / "*.pt"]).files() == [str(path)]


def test_members_differ():
    networks, _ = build_family(Family("test_byobnet"), 3, 2, 3, soup=False)
    first, second, third = (network.state_dict()["stem.conv.weight"] for network in networks)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_weights_under_a_prefix(tmp_path):
    source, target = nn.Linear(4, 2), nn.Linear(4, 2)
    torch.save({"state_dict": {f"net.{name}": value for name, value in source.state_dict().items()}}, tmp_path / "a.pt")
    family = Family(modules=[target], checkpoints=[str(tmp_path / "a.pt")], prefix="net.")
    build_family(family, 1, 2, 3, soup=False)
    assert torch.equal(source.weight, target.weight)
    with pytest.raises(UnsupportedSetup, match="does not fit"):
        build_family(Family(modules=[target], checkpoints=[str(tmp_path / "a.pt")]), 1, 2, 3, soup=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either model, .* or modules"),
        ({"model": "resnet18", "modules": [nn.Flatten()]}, "either model, .* or modules"),
        ({"model": "resnet18", "members": 0}, "members=0"),
        ({"model": "resnet18", "img_size": -1}, "img_size=-1"),
        ({"model": "resnet18", "mean": [0.5]}, "mean and std together"),
        ({"model": "resnet18", "mean": [0.5], "std": [0.5, 0.5]}, "mean and std together"),
        ({"model": "resnet18", "pretrained": True, "checkpoints": ["a"]}, "pretrained beside checkpoints"),
        ({"model": "resnet18", "normalization": "imagenet"}, "'model' or 'data'"),
    ],
)
def test_families_that_cannot_be(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        Family(**options)


@pytest.mark.parametrize("given", ["a.ckpt", Path("a.ckpt")])
def test_one_file_is_given_as_a_list(given):
    with pytest.raises(UnsupportedSetup, match=r"checkpoints='a.ckpt', expected a list of files or patterns"):
        Family("resnet18", checkpoints=given)


def test_counts_that_disagree(tmp_path):
    with pytest.raises(UnsupportedSetup, match="2 checkpoints, 0 modules and members=3"):
        Family("resnet18", members=3, checkpoints=["a", "b"]).count(1)
    with pytest.raises(UnsupportedSetup, match="0 checkpoints, 2 modules and members=1"):
        Family(modules=[nn.Flatten(), nn.Flatten()], members=1).count(1)
    assert Family("resnet18").count(3) == 3
    assert Family("resnet18", checkpoints=["a", "b"]).count(3) == 2
