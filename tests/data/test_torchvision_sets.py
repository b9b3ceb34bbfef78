import inspect

import pytest
import torchvision

from lightning_soup.data.torchvision_sets import SETS, TorchvisionDataModule
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.images import write_folders, write_mnist
from tests.helpers.loaders import contents, read

SMALL = {"img_size": 12, "batch_size": 8, "num_workers": 0}
FAKE = {"size": 30, "image_size": [3, 12, 12], "num_classes": 4}


@pytest.mark.parametrize("name", SETS)
def test_records_agree_with_the_constructors(name):
    constructor = getattr(torchvision.datasets, name)
    parameters = {
        name: parameter
        for base in inspect.getmro(constructor)
        if base is not object and "__init__" in vars(base)
        for name, parameter in inspect.signature(base).parameters.items()
    }
    record = SETS[name]
    asked = {**record.args, **record.train, **(record.val or {}), **(record.test or {})}
    assert asked.keys() <= parameters.keys()
    assert ("root" in inspect.signature(constructor).parameters) is record.on_disk
    if record.download:
        assert "download" in parameters
    if record.test is None:
        assert not {"train", "split"} & parameters.keys()


def test_a_set_in_one_piece_is_split_by_the_seed():
    def parts(seed):
        datamodule = TorchvisionDataModule("FakeData", set_args=FAKE, seed=seed, **SMALL)
        datamodule.prepare_data()
        datamodule.setup()
        return [
            datamodule._train.indices, datamodule._val.indices, datamodule._tests[0].indices,
        ], datamodule  # fmt: skip

    (train, val, test), datamodule = parts(0)
    assert (len(train), len(val), len(test)) == (22, 2, 6)
    assert sorted([*train, *val, *test]) == list(range(30))
    assert parts(0)[0] == [train, val, test]
    assert parts(1)[0] != [train, val, test]
    assert datamodule.class_names == ["0", "1", "2", "3"]
    assert datamodule.num_classes == 4
    images, targets = read(datamodule.val_dataloader())
    whole = torchvision.datasets.FakeData(**FAKE)
    assert targets.tolist() == [int(whole[i][1]) for i in val]
    assert images.shape == (2, 3, 12, 12)


def test_the_crop_of_evaluation_can_be_given():
    datamodule = TorchvisionDataModule("FakeData", set_args=FAKE, crop_pct=0.5, **SMALL)
    assert datamodule.preprocessing.crop_pct == 0.5


def test_a_set_with_a_train_flag(tmp_path):
    datamodule = TorchvisionDataModule("MNIST", str(write_mnist(tmp_path)), val_fraction=0.25, **SMALL)
    assert datamodule.class_names == [str(digit) for digit in range(10)]
    datamodule.setup("fit")
    datamodule.setup("test")
    assert len(read(datamodule.train_dataloader())[1]) == 30
    val, test = datamodule.val_dataloader(), datamodule.test_dataloader()
    assert len(read(val)[1]) == 10
    assert read(test[0])[1].tolist() == [i % 10 for i in range(20)]
    assert read(test[0])[0].shape == (20, 3, 12, 12)  # grey images get three channels
    assert not contents(val) & contents(test[0])


def test_a_set_with_its_own_validation_part(tmp_path):
    asked = []

    def flowers(root, split, download):
        asked.append((split, download))
        return torchvision.datasets.FakeData(size={"train": 12, "val": 5, "test": 7}[split], image_size=(3, 9, 9))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets, "Flowers102", flowers)
        datamodule = TorchvisionDataModule("Flowers102", str(tmp_path), download=True, **SMALL)
        datamodule.prepare_data()
        assert asked == [("train", True), ("val", True), ("test", True)]
        datamodule.setup()
    assert all(download is False for _, download in asked[3:])
    loaders = datamodule.train_dataloader(), datamodule.val_dataloader(), *datamodule.test_dataloader()
    assert [len(loader.dataset) for loader in loaders] == [12, 5, 7]


@pytest.mark.parametrize(
    ("name", "names", "count"), [("SVHN", list("0123456789"), 10), ("GTSRB", None, 43), ("Flowers102", None, 102)]
)
def test_numbers_are_the_names_of_digits_only(monkeypatch, name, names, count):
    monkeypatch.setattr(torchvision.datasets, name, lambda **_: torchvision.datasets.FakeData(**FAKE))
    datamodule = TorchvisionDataModule(name, **SMALL)
    assert datamodule.class_names == names
    assert datamodule.num_classes == count


def test_shifted_sets_of_torchvision_and_in_folders(tmp_path):
    write_mnist(tmp_path)
    folder = write_folders(tmp_path / "scans", ["9", "3"], count=2)
    datamodule = TorchvisionDataModule(
        "MNIST",
        str(tmp_path),
        shifted={"scans": str(folder), "fake": "FakeData"},
        shifted_args={"fake": {"size": 5, "image_size": [3, 9, 9]}},
        **SMALL,
    )
    assert datamodule.test_names == ["test", "scans", "fake"]
    datamodule.setup("test")
    targets = [read(loader)[1].tolist() for loader in datamodule.test_dataloader()]
    assert targets[1] == [3, 3, 9, 9]
    assert len(targets[2]) == 5


def test_folders_with_the_sets_own_class_names(tmp_path):
    write_folders(tmp_path / "eurosat" / "2750", ["Forest", "River"], count=5)
    write_folders(tmp_path / "winter", ["River"], count=1)
    datamodule = TorchvisionDataModule("EuroSAT", str(tmp_path), shifted=[str(tmp_path / "winter")], **SMALL)
    datamodule.setup("test")
    assert datamodule.class_names == ["Forest", "River"]
    assert read(datamodule.test_dataloader()[1])[1].tolist() == [1]


def test_shifted_sets_with_other_classes_are_refused(tmp_path):
    write_mnist(tmp_path)
    write_mnist(tmp_path, name="FashionMNIST")
    with pytest.raises(UnsupportedSetup, match=r"shifted set FashionMNIST are not those .*unknown: T-shirt/top"):
        TorchvisionDataModule("MNIST", str(tmp_path), shifted=["FashionMNIST"], **SMALL).setup("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cifar10"}, r"Did you mean CIFAR10\? Available: CIFAR10, CIFAR100, .*USPS\."),
        ({"name": "Kinetics"}, "name='Kinetics' is not a classification set"),
        ({"shifted": ["nowhere/sketch"]}, "nowhere/sketch is neither an existing folder nor a set"),
        ({"shifted_args": {"other": {}}}, "shifted_args for other, but the shifted sets are: none"),
        ({"test_fraction": 0.0}, "test_fraction=0.0"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        TorchvisionDataModule(**{"name": "MNIST", **SMALL, **options})


@pytest.mark.parametrize(
    ("name", "set_args", "message"),
    [
        ("CIFAR10", {}, r"could not open CIFAR10 \(train\) in .*\n.*pass download=True"),
        ("ImageNet", {}, r"could not open ImageNet \(train\) in .*\n.*put its files there"),
        ("CIFAR10", {"colour": 1}, r"colour"),
    ],
)
def test_what_is_not_on_disk(tmp_path, name, set_args, message):
    with pytest.raises(UnsupportedSetup, match=message):
        TorchvisionDataModule(name, str(tmp_path), set_args=set_args, **SMALL).setup("fit")
