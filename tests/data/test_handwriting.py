import math

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_soup.data.corruptions import CORRUPTIONS, corrupt
from lightning_soup.data.handwriting import AUGMENTATIONS, MEAN, STD, Affine, HandwritingDataModule, InMemoryImages
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.loaders import contents, read


def ready(*args, **kwargs):
    datamodule = HandwritingDataModule(*args, **kwargs)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def test_the_case_of_few_labels():
    datamodule = ready()
    images, targets = next(iter(datamodule.train_dataloader()))
    assert images.shape == (64, 1, 28, 28)
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert torch.bincount(read(datamodule.train_dataloader())[1]).tolist() == [20] * 10
    assert len(read(datamodule.val_dataloader())[1]) == 361
    assert datamodule.test_names == ["test", "corrupted", "mnist"]
    sizes = [len(read(loader)[1]) for loader in datamodule.test_dataloader()]
    assert sizes == [630, 6 * 630, 1000]
    assert torch.equal(read(datamodule.predict_dataloader())[0], read(datamodule.test_dataloader()[0])[0])
    assert datamodule.num_classes == len(datamodule.class_names) == 10


def test_no_image_is_in_two_sets_and_the_seed_decides():
    datamodule, again, other = ready(seed=3), ready(seed=3), ready(seed=4)
    sets = [contents(d) for d in (datamodule.train_dataloader(), datamodule.val_dataloader())]
    sets.append(contents(datamodule.test_dataloader()[0]))
    assert len(set.union(*sets)) == 200 + 361 + 630
    for mine, theirs in zip(datamodule.test_dataloader(), again.test_dataloader(), strict=True):
        assert torch.equal(read(mine)[0], read(theirs)[0])
    assert contents(other.test_dataloader()[0]) != sets[2]


def test_held_out_images_of_mnist_are_the_same_trained_on_or_left_behind():
    pretraining = ready("mnist", train_size=4000, val_size=0, seed=2)
    finetuning = ready("digits", seed=2)
    held_out = contents(pretraining.test_dataloader()[0])
    assert contents(finetuning.test_dataloader()[-1]) == held_out
    assert not held_out & contents(pretraining.train_dataloader())
    assert len(held_out) == 1000
    assert pretraining.val_dataloader() == []
    assert pretraining.test_names == ["test", "corrupted", "digits"]


def test_groups_name_the_image_behind_each_corruption():
    module = ready(seed=7)
    groups = module.test_groups["corrupted"]
    targets, joined = read(module.test_dataloader()[0])[1], read(module.test_dataloader()[1])[1]
    assert torch.equal(targets[groups], joined)
    assert len(groups.unique()) * 6 == len(joined)
    assert ready(corrupted="apart").test_groups == {}


def test_corruptions_apart_are_the_joined_ones():
    joined, apart, none = (ready(corrupted=how, seed=7) for how in ("joined", "apart", "none"))
    assert apart.test_names == ["test", *CORRUPTIONS, "mnist"]
    assert none.test_names == ["test", "mnist"]
    assert len(none.test_dataloader()) == 2
    parts = [read(loader) for loader in apart.test_dataloader()[1:-1]]
    images, targets = read(joined.test_dataloader()[1])
    assert torch.equal(torch.cat([part[0] for part in parts]), images)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)
    clean = apart._tests[0].images
    torch.testing.assert_close(parts[0][0] * STD + MEAN, corrupt(clean, "noise", seed=7))


def test_classes_are_parts_of_one_split():
    whole = ready(train_size=200)
    tasks = [ready(train_size=200, classes=classes) for classes in ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])]
    for loader in ("train_dataloader", "val_dataloader"):
        parts = [contents(getattr(task, loader)()) for task in tasks]
        assert not parts[0] & parts[1]
        assert parts[0] | parts[1] == contents(getattr(whole, loader)())
    for task, classes in zip(tasks, ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]), strict=True):
        for test in task.test_dataloader():
            assert sorted(set(read(test)[1].tolist())) == classes
        assert task.num_classes == 10


def test_only_training_images_are_augmented_and_pixels_are_normalised():
    plain, augmented = ready(augment="none"), ready(augment="strong")
    assert contents(plain.train_dataloader()) != contents(augmented.train_dataloader())
    assert contents(plain.val_dataloader()) == contents(augmented.val_dataloader())
    images = read(plain.val_dataloader())[0] * STD + MEAN
    assert images.min().item() == pytest.approx(0, abs=1e-6)
    assert 0.9 < images.max() <= 1 + 1e-6
    assert read(augmented.train_dataloader())[0].min().item() == pytest.approx(-MEAN / STD, abs=1e-5)  # background


def test_augmentation_is_new_in_every_epoch_and_repeats_with_the_seed():
    datamodule = ready(augment="strong")
    torch.manual_seed(5)
    first, second = (read(datamodule.train_dataloader()) for _ in range(2))
    torch.manual_seed(5)
    again = read(datamodule.train_dataloader())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0].sort(0).values, second[0].sort(0).values)


def test_worker_processes_serve_the_same_images():
    assert contents(ready(num_workers=1).val_dataloader()) == contents(ready().val_dataloader())


def test_a_set_can_be_read_one_by_one_and_by_loaders_of_ones_own():
    images = InMemoryImages(torch.rand(10, 1, 4, 4), torch.arange(10))
    one, target = images[3]
    assert target == 3
    torch.testing.assert_close(one, (images.images[3] - MEAN) / STD)
    batch, targets = next(iter(DataLoader(images, batch_size=4)))
    assert batch.shape == (4, 1, 4, 4)
    assert targets.tolist() == [0, 1, 2, 3]
    assert torch.equal(batch[3], one)


@pytest.mark.parametrize(
    ("affine", "x", "y"),
    [
        (Affine(translate=2), 2 * 2 / 28, 2 * 2 / 28),  # 2 pixels of 28 on an axis from −1 to 1
        (Affine(degrees=15), 0, 0),
        (Affine(scale=0.15), 0, 0),
    ],
)
def test_affine_stays_within_its_ranges(affine, x, y, monkeypatch):
    """The matrices that the images are sampled with: angle, zoom and offsets at the ends of the random range."""
    seen = {}
    affine_grid = torch.nn.functional.affine_grid
    monkeypatch.setattr(
        "lightning_soup.data.handwriting.F.affine_grid",
        lambda theta, size, **kw: seen.update(theta=theta) or affine_grid(theta, size, **kw),
    )
    affine(torch.rand(2000, 1, 28, 28))
    theta = seen["theta"]
    zoom = 1 / theta[:, :, :2].det().sqrt()
    angle = torch.rad2deg(torch.atan2(theta[:, 1, 0], theta[:, 0, 0]))
    for found, most in ((angle, affine.degrees), (zoom - 1, affine.scale), (theta[:, 0, 2], x), (theta[:, 1, 2], y)):
        assert found.abs().max().item() == pytest.approx(most, rel=0.02, abs=1e-5)
        assert found.mean().item() == pytest.approx(0, abs=0.06 * most + 1e-6)


def test_affine_with_nothing_to_do_changes_nothing():
    images = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(Affine()(images), images, atol=1e-5, rtol=0)


def test_named_augmentations():
    assert AUGMENTATIONS["none"] is None
    assert HandwritingDataModule(augment="mild").augment == Affine(10, 1, 0.10)
    assert HandwritingDataModule(augment=Affine(degrees=3)).augment == Affine(3, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "usps"}, "domain='usps': expected one of digits, mnist"),
        ({"train_size": 5}, "train_size=5"),
        ({"val_size": 3}, "val_size=3"),
        ({"classes": [3, 11]}, r"classes=\[3, 11\]"),
        ({"classes": []}, r"classes=\[\]"),
        ({"augment": "wild"}, "augment='wild': expected one of none, mild, strong"),
        ({"corrupted": "both"}, "corrupted='both': expected one of joined, apart, none"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        HandwritingDataModule(**options)


@pytest.mark.parametrize("options", [{"degrees": -1}, {"scale": 1.0}, {"translate": -1}, {"degrees": math.inf}])
def test_affine_out_of_range(options):
    with pytest.raises(UnsupportedSetup, match="expected 0 ≤ degrees"):
        Affine(**options)


def test_too_many_images_is_an_error_before_training():
    with pytest.raises(UnsupportedSetup, match="Ask for fewer images"):
        ready(train_size=900)


def test_a_third_split_is_of_what_is_left():
    plain, data = HandwritingDataModule(), HandwritingDataModule(third_size=50)
    for one in (plain, data):
        one.setup()
    assert plain.third_dataloader() == []
    assert len(data.third_dataloader().dataset) == 50
    assert torch.equal(plain._val.images, data._val.images)
    assert torch.equal(plain._train.images, data._train.images)
    others = torch.cat([data._train.images, data._val.images, data._tests[0].images]).flatten(1)
    assert not any((image.flatten() == others).all(1).any() for image in data._third.images)
    with pytest.raises(UnsupportedSetup, match="third_size=5"):
        HandwritingDataModule(third_size=5)
    with pytest.raises(UnsupportedSetup, match="third_size=900 need"):
        HandwritingDataModule(third_size=900).setup()
