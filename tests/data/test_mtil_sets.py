"""The 11 sets of ZSCL's multi-domain benchmark through TorchvisionDataModule, from files as torchvision reads them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from lightning_soup.data.torchvision_sets import SETS, TorchvisionDataModule
from lightning_soup.data.transforms import Augmentation
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.clip import fit_clip, tiny_clip
from tests.helpers.torchvision_files import FLOWERS, MTIL, colour, without_md5, write_mtil

GENTLE = Augmentation(scale=(0.9, 1.0), color_jitter=0.0)
NAMED = [name for name in MTIL if name != "Flowers102" or hasattr(torchvision.datasets.Flowers102, "classes")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with without_md5():
        yield write_mtil(tmp_path_factory.mktemp("mtil"))


def module(name, root, **options):
    settings = {"img_size": 16, "mean": [0.0] * 3, "std": [1.0] * 3, "augmentation": GENTLE, "num_workers": 0}
    return TorchvisionDataModule(name, str(root), **{**settings, "batch_size": 8, **options})


def read(loader):
    images, targets = zip(*loader, strict=True)
    assert all(batch.shape[1:] == (3, 16, 16) and len(batch) <= 8 for batch in images)
    return torch.cat(images), torch.cat(targets)


def files(view):
    """What tells the images of a view apart, as they lie on disk."""
    return [np.asarray(view.images[i][0]).tobytes() for i in view.indices]


@pytest.mark.parametrize("name", NAMED)
def test_images_labels_and_names_agree(name, root):
    datamodule = module(name, root)
    datamodule.prepare_data()
    datamodule.setup()
    names = datamodule.class_names
    assert datamodule.num_classes == len(names) == (102 if name == "Flowers102" else len(MTIL[name]))
    colours = torch.tensor(np.stack([colour(name, index) for index in range(len(MTIL[name]))])) / 255
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader(), *datamodule.test_dataloader()):
        images, targets = read(loader)
        assert targets.dtype == torch.int64
        assert 0 <= targets.min() <= targets.max() < len(names)
        seen = torch.cdist(images.mean((2, 3)), colours.float()).argmin(1)
        assert [names[target] for target in targets] == [MTIL[name][index] for index in seen]


@pytest.mark.parametrize("name", MTIL)
def test_parts_are_disjoint_and_complete(name, root):
    datamodule = module(name, root)
    datamodule.setup()
    parts = [files(view) for view in (datamodule._train, datamodule._val, *datamodule._tests)]
    together = [image for part in parts for image in part]
    parts_written = 3 if SETS[name].val or SETS[name].test is None else 2
    assert len(set(together)) == len(together) == 3 * len(MTIL[name]) * parts_written
    if SETS[name].val:
        assert {len(part) for part in parts} == {3 * len(MTIL[name])}


@pytest.mark.parametrize("name", NAMED)
def test_class_names_are_words(name, root):
    names = module(name, root).class_names
    assert len(set(names)) == len(names)
    assert all(word == word.strip() and "__" not in word for word in names)
    assert all(word.isdigit() for word in names) if name == "MNIST" else not any(word.isdigit() for word in names)
    if name == "Flowers102":
        assert [names[number] for number in FLOWERS] == MTIL[name]
    else:
        assert names == MTIL[name]


def test_the_split_does_not_depend_on_the_order_of_the_file_system(root, monkeypatch):
    def split():
        datamodule = module("SUN397", root)
        datamodule.setup()
        return [files(view) for view in (datamodule._train, datamodule._val, *datamodule._tests)]

    before, listed = split(), Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed(list(listed(path, pattern))))
    assert split() == before


def test_flowers_without_names_are_refused_by_text_heads_only(root, monkeypatch):
    monkeypatch.delattr(torchvision.datasets.Flowers102, "classes", raising=False)  # as before torchvision 0.22
    datamodule = module("Flowers102", root, img_size=8)
    assert datamodule.class_names is None
    assert datamodule.num_classes == 102
    with pytest.raises(UnsupportedSetup, match=r"The classes have no names: .*Give classnames"):
        fit_clip(tiny_clip(classnames=None), datamodule, fast_dev_run=True)
    fit_clip(tiny_clip(classnames=[f"flower {number}" for number in range(102)]), datamodule, fast_dev_run=True)
