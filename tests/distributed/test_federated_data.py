"""One training set in the parts of clients: sizes, labels, hooks, and bad input."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, TensorDataset

from lightning_soup.data import HandwritingDataModule
from lightning_soup.distributed import AverageAll, Bernoulli, FederatedSimulation
from lightning_soup.distributed.federated_data import ClientPart, client_parts, split_by_labels
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.boring import TinyClassifier, TinyData


def test_every_example_goes_to_one_client():
    labels = np.arange(103) % 10
    mixes = np.random.default_rng(0).dirichlet([0.1] * 10, size=8)
    found = split_by_labels(labels, mixes, seed=1)
    assert sorted(index for part in found for index in part) == list(range(103))
    assert {len(part) for part in found} == {12, 13}
    assert split_by_labels(labels, mixes, seed=1) == found
    assert split_by_labels(labels, mixes, seed=2) != found


@pytest.mark.parametrize("concentration", [1e-6, 0.1, 10.0])
def test_the_split_is_that_of_draws_one_by_one(concentration):
    labels = np.random.default_rng(3).integers(0, 5, 200)
    mixes = np.random.default_rng(4).dirichlet([concentration] * 5, size=7)
    draw = np.random.default_rng(5)
    left = [draw.permutation(np.flatnonzero(labels == label)).tolist() for label in range(5)]
    expected, order = [[] for _ in range(7)], []
    for _ in range(200):
        order = order or draw.permutation(7).tolist()
        client = order.pop(0)
        sizes = np.array([len(pool) for pool in left])
        q = np.where(sizes > 0, mixes[client], 0.0)
        label = draw.choice(5, p=q / q.sum() if q.sum() > 0 else sizes / sizes.sum())
        expected[client].append(left[label].pop())
    assert split_by_labels(labels, mixes, seed=5) == expected


def test_clients_have_the_labels_of_their_mix():
    labels = np.arange(4000) % 4
    mixes = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5]], dtype=float)
    found = split_by_labels(labels, mixes)
    shares = np.array([np.bincount(labels[part], minlength=4) / len(part) for part in found])
    assert shares == pytest.approx(mixes, abs=0.05)


def test_parts_of_a_data_module_keep_its_batches_and_hooks():
    class Hooked(TinyData):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert self.trainer is not None
            seen.append(batch[1].clone())
            return batch[0] * 0, batch[1]

    seen = []
    data = Hooked(batch_size=4)
    parts = client_parts(data, np.full((6, 3), 1 / 3))
    batches = list(parts[0].train_dataloader())
    assert [len(y) for _, y in batches] == [4] * 4
    assert {tuple(x.tolist()) for batch, _ in batches for x in batch} <= {tuple(x.tolist()) for x, _ in data.train}
    module = TinyClassifier()
    FederatedSimulation(module, parts, AverageAll(6), Bernoulli([1.0] * 6), local_steps=3).run(1)
    assert len(seen) == 18


def test_parts_shuffle_and_keep_collation_workers_and_all_hooks():
    class Hooked(TinyData):
        def train_dataloader(self):
            return DataLoader(self.train, 16, num_workers=1, collate_fn=as_list)

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [*batch, "before"]

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return [*batch, str(device)]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [*batch, dataloader_idx]

    def as_list(batch):
        return [len(batch)]

    [part] = client_parts(Hooked(), np.full((1, 3), 1 / 3))
    loader = part.train_dataloader()
    assert loader.num_workers == 1
    assert loader.collate_fn is as_list
    assert isinstance(loader.sampler, RandomSampler)
    batch = part.on_before_batch_transfer([16], 2)
    batch = part.transfer_batch_to_device(batch, torch.device("cpu"), 2)
    assert part.on_after_batch_transfer(batch, 2) == [16, "before", "cpu", 2]


def test_small_parts_are_batches_of_their_size():
    parts = client_parts(TinyData(batch_size=16), np.full((24, 3), 1 / 3))
    assert [len(y) for _, y in parts[0].train_dataloader()] == [4]


def test_parts_keep_how_batches_are_made():
    class Last(TinyData):
        def train_dataloader(self):
            return DataLoader(self.train, 16, shuffle=True, drop_last=True, worker_init_fn=print)

    class Batches(TinyData):
        def train_dataloader(self):
            return DataLoader(self.train, batch_sampler=BatchSampler(RandomSampler(self.train), 10, drop_last=True))

    data = Last()
    data.train = Subset(data.train, range(34))  # 17 each: BatchNorm cannot train on the one that is left
    parts = client_parts(data, np.full((2, 3), 1 / 3))
    assert [len(y) for _, y in parts[0].train_dataloader()] == [16]
    assert parts[0].train_dataloader().worker_init_fn is print
    assert ClientPart(data, [0], DataLoader(data.train, pin_memory=True)).train_dataloader().pin_memory
    FederatedSimulation(TinyClassifier(batch_norm=True), parts, AverageAll(2), Bernoulli([1.0] * 2)).run(1)
    parts = client_parts(Batches(), np.full((4, 3), 1 / 3))
    assert [len(y) for _, y in parts[0].train_dataloader()] == [10, 10]


def test_parts_keep_their_examples_when_the_data_are_set_up_again():
    class Shuffled(TinyData):
        def setup(self, stage):
            self.train = Subset(self.train, torch.randperm(96).tolist())

    torch.manual_seed(0)
    data = Shuffled()
    parts = client_parts(data, np.eye(3))
    before = [sorted(x.tolist() for x, _ in part.train_dataloader().dataset) for part in parts]
    data.setup("validate")
    assert [sorted(x.tolist() for x, _ in part.train_dataloader().dataset) for part in parts] == before


def test_real_digits():
    data = HandwritingDataModule(train_size=100, val_size=0)
    mixes = np.eye(10)
    for label, part in enumerate(client_parts(data, mixes)):
        targets = torch.cat([y for _, y in part.train_dataloader()])
        assert targets.tolist() == [label] * 10


def test_data_that_cannot_be_split():
    class Unlabelled(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.rand(10, 3)))

    with pytest.raises(UnsupportedSetup, match=r"no pairs \(input, label\)"):
        client_parts(Unlabelled(), np.full((2, 3), 1 / 3))

    class Measured(TinyData):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(4, 1), torch.tensor([0.0, 1.0, 1.5, 2.0])))

    class OneHot(TinyData):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(3, 1), torch.eye(3)))

    class Several(TinyData):
        def train_dataloader(self):
            return [super().train_dataloader()]

    for kind, message in (
        (Measured, "1.5 is no label"),
        (OneHot, r"no pairs \(input, label\)"),
        (Several, "Several.train_dataloader gave a list. Expected one DataLoader"),
        (LightningDataModule, "has no train_dataloader"),
    ):
        with pytest.raises(UnsupportedSetup, match=message):
            client_parts(kind(), np.full((2, 3), 1 / 3))
    with pytest.raises(UnsupportedSetup, match="3 training examples for 4 clients"):
        split_by_labels([0, 1, 2], np.full((4, 3), 1 / 3))
    with pytest.raises(UnsupportedSetup, match=r"labels from 1 to 3, .* 3 classes"):
        split_by_labels([1, 2, 3], np.full((2, 3), 1 / 3))
