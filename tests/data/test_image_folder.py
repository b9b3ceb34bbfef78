from collections import Counter

import pytest
import torch

from lightning_soup.data.image_folder import ImageFolderDataModule
from lightning_soup.data.transforms import Augmentation
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.images import write_folders
from tests.helpers.loaders import read

CLASSES = ["bird", "cat", "dog"]
SMALL = {"img_size": 16, "batch_size": 4, "num_workers": 0}


@pytest.fixture
def root(tmp_path):
    for seed, name in enumerate(("train", "val", "test")):
        write_folders(tmp_path / name, CLASSES, count=5, seed=seed)
    return tmp_path


def test_train_val_and_test_folders(root):
    datamodule = ImageFolderDataModule(str(root), **SMALL)
    assert datamodule.class_names == CLASSES
    assert datamodule.num_classes == 3
    assert datamodule.test_names == ["test"]
    datamodule.setup("fit")
    images, targets = read(datamodule.train_dataloader())
    assert images.shape == (15, 3, 16, 16)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert Counter(targets.tolist()) == {0: 5, 1: 5, 2: 5}
    assert read(datamodule.val_dataloader())[1].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    datamodule.setup("test")
    (loader,) = datamodule.test_dataloader()
    assert torch.equal(read(loader)[0], read(datamodule.predict_dataloader())[0])


def test_the_crop_of_evaluation_can_be_given(root):
    model = "vit_base_patch32_clip_224.openai"
    datamodule = ImageFolderDataModule(str(root), model_name=model, crop_pct=1.0, num_workers=0)
    assert ImageFolderDataModule(str(root), model_name=model).preprocessing.crop_pct == 0.9  # what timm says
    assert datamodule.preprocessing.crop_pct == 1.0


def test_validation_share_of_the_training_folder(root):
    def val(seed):
        datamodule = ImageFolderDataModule(str(root), val="none", val_fraction=0.4, seed=seed, **SMALL)
        datamodule.setup("fit")
        assert len(read(datamodule.train_dataloader())[1]) == 9
        used = set(datamodule._train.indices), set(datamodule._val.indices)
        assert not used[0] & used[1]
        images = read(datamodule.val_dataloader())[0]
        assert torch.equal(images, read(datamodule.val_dataloader())[0])  # not augmented
        return images

    assert len(val(0)) == 6
    assert torch.equal(val(0), val(0))
    assert not torch.equal(val(0), val(1))


def test_shifted_sets_are_matched_by_class_name(root, tmp_path):
    write_folders(root / "sketch", ["dog", "bird"], count=2)  # without cats, so dogs are class 1 here
    elsewhere = write_folders(tmp_path / "other" / "night", CLASSES, count=1)
    datamodule = ImageFolderDataModule(str(root), shifted=["sketch", str(elsewhere)], **SMALL)
    assert datamodule.test_names == ["test", "sketch", "night"]
    datamodule.setup("test")
    targets = [read(loader)[1].tolist() for loader in datamodule.test_dataloader()]
    assert targets[1:] == [[0, 0, 2, 2], [0, 1, 2]]
    named = ImageFolderDataModule(str(root), shifted={"drawn": "sketch"}, **SMALL)
    assert named.test_names == ["test", "drawn"]


def test_preprocessing_and_augmentation_are_used(root):
    datamodule = ImageFolderDataModule(
        str(root), model_name="vit_tiny_patch16_224", img_size=16, mean=[0.0] * 3, std=[1.0] * 3, num_workers=0,
        augmentation=Augmentation(re_prob=1.0),
    )  # fmt: skip
    datamodule.setup("fit")
    assert 0 <= read(datamodule.val_dataloader())[0].min() <= read(datamodule.val_dataloader())[0].max() <= 1
    assert read(datamodule.train_dataloader())[0].min() < 0  # erased by noise
    assert datamodule.preprocessing.crop_pct == 0.9  # the model's


def test_workers(root):
    datamodule = ImageFolderDataModule(str(root), **{**SMALL, "num_workers": 1})
    datamodule.setup("validate")
    assert len(read(datamodule.val_dataloader())[1]) == 15


def test_missing_folders_are_named_with_those_that_are_there(root):
    with pytest.raises(UnsupportedSetup, match=r"There is no folder .*/training\. .* has: test, train, val\."):
        ImageFolderDataModule(str(root), train="training", **SMALL).setup("fit")
    with pytest.raises(UnsupportedSetup, match=r"There is no folder .*/nowhere/train\."):
        ImageFolderDataModule(str(root / "nowhere"), **SMALL).setup("fit")
    without_test = ImageFolderDataModule(str(root), test="later", **SMALL)
    without_test.setup("fit")  # only testing needs it
    with pytest.raises(UnsupportedSetup, match=r"There is no folder .*/later"):
        without_test.setup("test")


def test_empty_class_folders_are_named(root):
    (root / "train" / "ant").mkdir()
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / "notes.txt").write_text("no image")
    with pytest.raises(UnsupportedSetup, match=r"No images in these class folders of .*/train: ant, eel\. .*\.jpg"):
        ImageFolderDataModule(str(root), val="none", **SMALL).setup("fit")


def test_a_folder_without_class_folders(root):
    (root / "flat").mkdir()
    (root / "flat" / "a.jpg").write_bytes(b"")
    with pytest.raises(UnsupportedSetup, match=r"flat has no folders in it. Expected one folder per class"):
        ImageFolderDataModule(str(root), train="flat", **SMALL).setup("fit")


@pytest.mark.parametrize("part", ["val", "test"])
def test_validation_and_test_need_all_classes(root, part):
    for image in (root / part / "cat").iterdir():
        image.unlink()
    (root / part / "cat").rmdir()
    with pytest.raises(UnsupportedSetup, match=f"{part} are not those .*missing: cat"):
        ImageFolderDataModule(str(root), **SMALL).setup(None)


def test_a_shifted_set_may_not_have_new_classes(root):
    write_folders(root / "sketch", ["dog", "wolf"])
    with pytest.raises(UnsupportedSetup, match=r"sketch are not those .*unknown: wolf.*may be missing here"):
        ImageFolderDataModule(str(root), shifted=["sketch"], **SMALL).setup("test")


@pytest.mark.parametrize("shifted", [["a/night", "b/night"], ["test"], {"test": "x"}])
def test_names_of_test_sets_are_unique(root, shifted):
    with pytest.raises(UnsupportedSetup, match=r"Two test sets are named (night|test) .*mapping"):
        ImageFolderDataModule(str(root), shifted=shifted, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"img_size": None}, "Neither model_name nor img_size"),
    ],
)
def test_values_out_of_range(root, options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        ImageFolderDataModule(str(root), **{**SMALL, **options})


def test_views_are_what_the_loaders_give(root):
    datamodule = ImageFolderDataModule(str(root), **SMALL)
    held_out = datamodule.views("val")
    assert list(held_out) == ["val"]
    pairs = [held_out["val"][i] for i in range(len(held_out["val"]))]
    images, targets = read(datamodule.val_dataloader())
    assert torch.equal(torch.stack([image for image, _ in pairs]), images)
    assert [target for _, target in pairs] == targets.tolist()
    tests = ImageFolderDataModule(str(root), shifted={"again": str(root / "test")}, **SMALL).views("test")
    assert list(tests) == ["test", "again"]
    assert all(len(view) == 15 for view in tests.values())


@pytest.mark.parametrize("val", ["val", "none"])
def test_a_third_split_is_taken_from_the_validation_images(root, val):
    options = {"val": val, "val_fraction": 0.4, **SMALL}

    def pictures(loader):
        return {tuple(image.flatten()[:40].tolist()) for image in read(loader)[0]}

    plain = ImageFolderDataModule(str(root), **options)
    plain.setup("fit")
    assert plain.third_dataloader() == []
    data = ImageFolderDataModule(str(root), third_fraction=1 / 3, **options)
    data.setup("fit")
    held_out, third = pictures(data.val_dataloader()), pictures(data.third_dataloader())
    assert held_out | third == pictures(plain.val_dataloader())
    assert not held_out & third
    assert len(third) == round(len(held_out | third) / 3)
    assert list(data._train.indices) == list(plain._train.indices)
    with pytest.raises(UnsupportedSetup, match="third_fraction=1"):
        ImageFolderDataModule(str(root), third_fraction=1.0, **options)
