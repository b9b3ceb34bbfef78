"""CrowdDataModule: which item gets which row, what is kept in files, and tables that do not fit the items."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from lightning_soup.data import (
    CrowdDataModule,
    HandwritingDataModule,
    ImageFolderDataModule,
    SimulatedCrowd,
    read_votes,
    soft_labels,
)
from lightning_soup.data.crowd_items import SoftTargets, item_names
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.images import write_folders
from tests.helpers.loaders import read
from tests.helpers.trainers import quiet_trainer

CLASSES = ("0", "1", "2")


class Points(LightningDataModule):
    """Twelve training items, each of which is its own number; three classes; validation and two test sets."""

    num_classes, test_names, test_groups = 3, ("test", "far"), {"far": torch.zeros(4)}

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(12.0)[:, None], torch.arange(12) % 3), 5, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(-torch.ones(4, 1), torch.ones(4).long()), 4)

    def test_dataloader(self):
        return [self.val_dataloader(), self.val_dataloader()]

    predict_dataloader = val_dataloader


def write(path, votes):
    path.write_text("task,worker,label\n" + "".join(f"{task},{worker},{label}\n" for task, worker, label in votes))
    return str(path)


def two_each(tasks=range(12)):
    """Votes of two workers, the second of which is wrong on every third task."""
    return [(i, w, (int(i) % 3 + (w == 2 and int(i) % 4 == 0)) % 3) for i in tasks for w in (1, 2)]


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "votes.csv", two_each())


def ready(items, votes, **options):
    data = CrowdDataModule(items, votes, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def by_item(loader):
    points, rows = read(loader)
    return dict(zip(points.flatten().int().tolist(), rows, strict=True))


def test_each_item_gets_its_own_row(table):
    data = ready(Points(), table)
    votes = read_votes(table, CLASSES)
    wanted = dict(zip(votes.items, torch.from_numpy(soft_labels(votes)).float(), strict=True))
    found = by_item(data.train_dataloader())
    assert sorted(found) == list(range(12))
    for number, row in found.items():
        assert torch.equal(row, wanted[str(number)])
    assert data.labels.dtype == torch.float32
    assert [len(batch[0]) for batch in data.train_dataloader()] == [5, 5, 2]
    torch.manual_seed(0)
    first, second = (read(data.train_dataloader())[0] for _ in range(2))
    assert not torch.equal(first, second)  # shuffled


def test_the_other_sets_are_those_of_the_items(table):
    data = ready(Points(), table)
    assert (data.num_classes, data.class_names, list(data.test_names)) == (3, list(CLASSES), ["test", "far"])
    assert read(data.val_dataloader())[1].tolist() == [1] * 4
    assert len(data.test_dataloader()) == 2
    assert data.third_dataloader() == []
    assert list(data.test_groups) == ["far"]
    assert data.test_classes == {}
    assert data.preprocessing is None
    assert len(read(data.predict_dataloader())[1]) == 4
    data.teardown("fit")


def test_only_what_a_stage_needs_is_made(table):
    data = CrowdDataModule(Points(), table)
    shutil.move(table, f"{table}.away")
    data.setup("validate")
    data.setup("test")
    with pytest.raises(UnsupportedSetup, match=r"votes\.csv: there is no such file"):
        data.setup("fit")


def test_validation_by_the_crowd(table):
    data = ready(Points(), table, val_fraction=0.25, seed=3)
    train, val = by_item(data.train_dataloader()), by_item(data.val_dataloader())
    assert (len(train), len(val)) == (9, 3)
    assert not set(train) & set(val)
    whole = by_item(ready(Points(), table).train_dataloader())
    assert all(torch.equal(row, whole[number]) for number, row in (train | val).items())
    assert set(by_item(ready(Points(), table, val_fraction=0.25, seed=3).val_dataloader())) == set(val)
    assert set(by_item(ready(Points(), table, val_fraction=0.25, seed=4).val_dataloader())) != set(val)
    validating = CrowdDataModule(Points(), table, val_fraction=0.25, seed=3)
    validating.setup("validate")
    assert set(by_item(validating.val_dataloader())) == set(val)


def test_classes_weigh_by_how_rare_they_are(tmp_path):
    votes = [(i, 1, 0 if i < 8 else 1) for i in range(12)]
    data = ready(Points(), write(tmp_path / "votes.csv", votes), method="standard")
    assert data.class_weights == [12 / (3 * 8), 12 / (3 * 4), 0.0]


# --------------------------------------------------------------------------------------------------------------- files


def test_labels_are_made_once(table, tmp_path, monkeypatch):
    first = ready(Points(), table).labels
    (kept,) = (tmp_path / ".soft_labels").iterdir()
    monkeypatch.setattr("lightning_soup.data.crowd.soft_labels", lambda *_: pytest.fail("made again"))
    assert torch.equal(ready(Points(), table).labels, first)
    kept.write_bytes(kept.read_bytes()[:50])  # damaged
    monkeypatch.undo()
    assert torch.equal(ready(Points(), table).labels, first)
    assert len(kept.read_bytes()) > 50  # and mended


@pytest.mark.parametrize(
    "change",
    [
        {"method": "wawa"},
        {"methods": ["wawa", "mace"]},
        {"weights": [1, 1, 1, 1, 1, 1, 2]},
        {"rows": [*two_each()[:-1], (11, 2, 0)]},
    ],
)
def test_other_labels_have_another_file(table, tmp_path, change):
    first = ready(Points(), table).labels
    if "rows" in change:
        write(tmp_path / "votes.csv", change.pop("rows"))
    assert not torch.equal(ready(Points(), table, **change).labels, first)
    assert len(list((tmp_path / ".soft_labels").iterdir())) == 2


def test_another_version_has_another_file(table, tmp_path, monkeypatch):
    ready(Points(), table)
    monkeypatch.setattr("lightning_soup.data.label_cache.VERSION", 2)
    ready(Points(), table)
    assert len(list((tmp_path / ".soft_labels").iterdir())) == 2


def test_the_order_of_rows_is_no_change(table, tmp_path):
    first = ready(Points(), table, cache=str(tmp_path / "kept")).labels
    write(tmp_path / "votes.csv", two_each()[::-1])
    assert torch.equal(ready(Points(), table, cache=str(tmp_path / "kept")).labels, first)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert not (tmp_path / ".soft_labels").exists()


def test_a_folder_that_cannot_be_written(table, tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="Soft labels are not kept, and made anew by every process: .*file"):
        data = ready(Points(), table, cache=str(tmp_path / "file"))
    assert torch.equal(data.labels, ready(Points(), table).labels)


def test_labels_that_are_none_are_made_again(table, tmp_path):
    first = ready(Points(), table).labels
    (kept,) = (tmp_path / ".soft_labels").iterdir()
    content = kept.read_bytes()
    kept.write_bytes(content[:-8] + np.float64(0.9).tobytes())  # a file of safetensors all the same
    assert torch.equal(ready(Points(), table).labels, first)
    assert kept.read_bytes() == content


def test_a_disk_that_becomes_full(table, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("lightning_soup.data.label_cache.save_file", full)
    with pytest.warns(UserWarning, match="Soft labels are not kept, and made anew by every process: No space left"):
        assert len(ready(Points(), table).labels) == 12


# --------------------------------------------------------------------------------------------------------------- items


class Splits(Points):
    """Splits anew whenever it is set up, and changes batches on the device."""

    def setup(self, stage=None):
        self.parts = torch.randperm(12).split([8, 4])
        self.times = getattr(self, "times", 0) + 1

    def loader(self, part, **options):
        points = TensorDataset(torch.arange(12.0)[:, None], torch.arange(12) % 3)
        return DataLoader(Subset(points, self.parts[part].tolist()), 3, **options)

    def train_dataloader(self):
        return self.loader(0, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return self.loader(1)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 100, batch[1]

    def state_dict(self):
        return {"parts": self.parts}

    def load_state_dict(self, state):
        self.parts = state["parts"]


def test_items_that_are_split_at_random(table):
    data = CrowdDataModule(Splits(), table)
    for times in (1, 2):
        data.setup("fit")
        assert data.items.times == times
        train, val = (set(data.items.parts[part].tolist()) for part in (0, 1))
        assert {int(data._train.items[place][0]) for place in data._train.indices} == train
        assert set(read(data.val_dataloader())[0].flatten().int().tolist()) == val
        assert [len(batch[0]) for batch in data.train_dataloader()] == [3, 3]  # the last one is dropped
    by_crowd = ready(Splits(), table, val_fraction=0.5)
    assert [len(batch[0]) for batch in by_crowd.val_dataloader()] == [3, 1]


def test_items_that_are_set_up_once_are_labelled_once(table, monkeypatch):
    items = HandwritingDataModule(train_size=10, val_size=0)
    data = CrowdDataModule(items, SimulatedCrowd(), method="standard")
    data.setup("fit")
    first = data.labels
    data.setup("fit")
    assert data.labels is first


def test_what_items_do_on_the_device_and_keep(table, tmp_path):
    class Means(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 3)

        def training_step(self, batch, batch_idx):
            assert batch[0].min() >= 100
            return self.layer(batch[0]).mean()

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = CrowdDataModule(Splits(), table)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Means(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.equal(torch.load(tmp_path / "end.ckpt")["CrowdDataModule"]["parts"][0], data.items.parts[0])
    again = CrowdDataModule(Splits(), table)
    again.load_state_dict({"parts": data.items.parts})
    assert again.items.parts is data.items.parts
    assert not is_overridden("on_after_batch_transfer", CrowdDataModule(Points(), table))  # the module's own is asked


def test_the_name_of_a_table_as_a_path(table):
    data = ready(Points(), Path(table), methods=["wawa", "mace"], weights=np.ones(2))
    assert torch.equal(data.labels, ready(Points(), table, methods=["wawa", "mace"]).labels)
    with pytest.raises(UnsupportedSetup, match=r"votes\.csv: no votes on 2 of the 12"):
        ready(Points(), Path(write(Path(table), two_each(range(10)))))


def test_names_of_items():
    parts = Subset(TensorDataset(torch.zeros(5)), [4, 1])
    assert item_names(parts) == ["4", "1"]


def test_images_by_their_paths(tmp_path):
    for part in ("train", "val", "test"):
        write_folders(tmp_path / part, ["cat", "dog"])
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)]
    assert (tmp_path / "train" / names[0]).is_file()
    votes = write(tmp_path / "votes.csv", [(name, w, "dog" if w else "cat") for name in names for w in range(2)])
    items = ImageFolderDataModule(str(tmp_path), img_size=8, num_workers=0, batch_size=4)
    data = ready(items, votes, method="standard")
    images, rows = read(data.train_dataloader())
    assert images.shape == (6, 3, 8, 8)
    assert rows.tolist() == [[0.5, 0.5]] * 6
    assert data.class_names == ["cat", "dog"]
    assert data.preprocessing is items.preprocessing


def test_images_that_lie_in_no_class(tmp_path):
    for part in ("val", "test"):
        write_folders(tmp_path / part, ["cat", "dog"])
    write_folders(tmp_path / "flat", ["monday", "tuesday"])
    names = [f"{day}/{number}.png" for day in ("monday", "tuesday") for number in range(3)]
    votes = write(tmp_path / "votes.csv", [(name, 1, "dog" if "tues" in name else "cat") for name in names])
    items = ImageFolderDataModule(str(tmp_path), train="val", img_size=8, num_workers=0, batch_size=4)
    data = ready(items, votes, method="standard", images=str(tmp_path / "flat"), val_fraction=1 / 3)
    assert len(data.train_dataloader().dataset) == 4
    images, rows = read(data.val_dataloader())
    assert images.shape == (2, 3, 8, 8)
    for (image, row), index in zip(zip(images, rows, strict=True), data._val.indices, strict=True):
        assert row.tolist() == [float(index < 3), float(index >= 3)]
        assert torch.equal(image, data._val.items[index])
    assert torch.equal(images, read(data.val_dataloader())[0])  # without random changes
    with pytest.raises(UnsupportedSetup, match=r"needs a data module over image files, .* Points does not"):
        CrowdDataModule(Points(), votes, images=str(tmp_path / "flat")).setup("fit")
    with pytest.raises(UnsupportedSetup, match=r"The images that votes are on: .*nowhere is no folder"):
        ready(items, votes, images=str(tmp_path / "nowhere"))


def test_votes_on_what_is_held_out_of_the_same_set_only_judge_workers(tmp_path):
    for part in ("train", "test"):
        write_folders(tmp_path / part, ["cat", "dog"], count=5)
    names = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(5)]
    votes = write(tmp_path / "votes.csv", [(name, 1, name[:3]) for name in names])
    items = ImageFolderDataModule(str(tmp_path), img_size=8, num_workers=0, val_fraction=0.2)
    data = ready(items, votes, method="standard")
    assert len(data.labels) == 8
    assert len(read(data.val_dataloader())[1]) == 2


def test_digits_and_a_simulated_crowd():
    items = HandwritingDataModule(train_size=40, val_size=20, third_size=10, corrupted="none", augment="strong")
    data = ready(items, SimulatedCrowd(seed=1), method="standard")
    state = torch.get_rng_state()
    data = ready(items, SimulatedCrowd(seed=1), method="standard")
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the state of the run
    truth = items.train_dataloader().dataset.targets
    assert data.labels.shape == (40, 10)
    assert (data.labels.argmax(1) == truth).float().mean() > 0.5
    images, rows = read(data.train_dataloader())
    assert images.shape == (40, 1, 28, 28)
    assert rows.sum(1) == pytest.approx(torch.ones(40))
    assert data.test_names == ["test", "mnist"]
    assert len(read(data.third_dataloader())[1]) == 10
    held_out = ready(items, SimulatedCrowd(seed=1), val_fraction=0.5)
    assert torch.equal(read(held_out.val_dataloader())[0], read(held_out.val_dataloader())[0])


def test_a_set_serves_batches_and_single_items():
    rows = torch.eye(3)
    whole, plain = TensorDataset(torch.arange(5.0)), torch.arange(5.0)
    for items in (whole, plain):
        found = SoftTargets(items, [4, 0, 2], rows)
        assert [(float(x), row.tolist()) for x, row in found.__getitems__([2, 0])] == [(2, [0, 0, 1]), (4, [1, 0, 0])]
        assert float(found[1][0]) == 0
        assert len(found) == 3


# -------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*two_each(), ("12", 1, 0), ("cat.png", 2, 0)],
            r"2 tasks are not among the items of Points, such as '12', 'cat.png' in rows 26, 27; expected .* '0', '1'",
        ),
        (two_each(range(10)), r"no votes on 2 of the 12 items to train on, such as '10', '11': .* unvoted: drop"),
        ([*two_each(), (0, 1, 0)], r"worker '1' voted more than once on task '0', in rows 2, 26"),
        ([*two_each(), (3, 3, "cat")], r"labels outside the class list in row 26, such as 'cat'; expected one of 0, 1"),
        ([], "there are no votes"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, rows, message):
    path = write(tmp_path / "votes.csv", rows)
    with pytest.raises(UnsupportedSetup, match=rf"votes\.csv: .*{message}"):
        ready(Points(), path)


def test_items_without_votes_can_be_left_out(tmp_path):
    path = write(tmp_path / "votes.csv", two_each(range(3, 10)))
    data = ready(Points(), path, unvoted="drop")
    assert sorted(by_item(data.train_dataloader())) == list(range(3, 10))

    path = write(tmp_path / "votes.csv", [(0, 1, 0)])
    held_out = Points()
    held_out.train_dataloader = lambda: DataLoader(Subset(Points().train_dataloader().dataset, range(1, 12)), 5)
    with pytest.raises(UnsupportedSetup, match="no votes on 11 of the 11 items to train on"):
        ready(held_out, path, unvoted="drop")


def test_items_are_told_of_every_stage(table):
    told = []

    class Told(Points):
        def prepare_data(self):
            told.append("prepare")

        def setup(self, stage):
            told.append(f"{stage} {self.trainer}")

        def teardown(self, stage):
            told.append(f"end of {stage}")

    data = CrowdDataModule(Told(), table)
    data.prepare_data()
    data.trainer = "trainer"  # any object: they are only told
    data.setup("test")
    data.teardown("test")
    assert told == ["prepare", "test trainer", "end of test"]


def test_duplicates_can_be_kept(tmp_path):
    path = write(tmp_path / "votes.csv", [*two_each(), (1, 1, 2)])
    data = ready(Points(), path, duplicates="keep", method="standard")
    assert by_item(data.train_dataloader())[1] == pytest.approx(torch.tensor([0, 2 / 3, 1 / 3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method='best'"),
        ({"weights": [1.0]}, "expected 7 numbers"),
        ({"unvoted": "keep"}, "unvoted='keep'"),
        ({"duplicates": "drop"}, "duplicates='drop'"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        CrowdDataModule(Points(), "votes.csv", **options)


def test_data_modules_that_cannot_be(table):
    with pytest.raises(UnsupportedSetup, match="A SimulatedCrowd votes by true labels"):
        CrowdDataModule(Points(), SimulatedCrowd(), images="folder")
    points = Points()
    points.num_classes = 0
    with pytest.raises(UnsupportedSetup, match="Points names no classes"):
        ready(points, table)

    class Streams(Points):
        def train_dataloader(self):
            return [super().train_dataloader()]

    with pytest.raises(UnsupportedSetup, match=r"one DataLoader over a set with a length, .* is a list"):
        ready(Streams(), table)

    class Weighted(Points):
        def train_dataloader(self):
            return DataLoader(super().train_dataloader().dataset, 5, sampler=WeightedRandomSampler(torch.ones(12), 12))

    with pytest.raises(UnsupportedSetup, match=r"drawn by a WeightedRandomSampler, which does not know"):
        ready(Weighted(), table)
    with pytest.raises(UnsupportedSetup, match=r"items is a Points, votes a dict: expected .* the name of a file"):
        CrowdDataModule(Points(), {"task": []})
    with pytest.raises(UnsupportedSetup, match=r"items is a list, votes a str: expected a LightningDataModule"):
        CrowdDataModule([], table)


def test_no_warnings_of_its_own(table):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(Points(), table)
    assert np.isfinite(ready(Points(), table).labels.numpy()).all()
