import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.training_evaluator import TrainingEvaluator
from tests.helpers.boring import TinyClassifier, TinyData


def loss_and_accuracy(module, tensors):
    x, y = tensors
    with torch.no_grad():
        logits = module.net(x)
    return float(nn.functional.cross_entropy(logits, y)), float((logits.argmax(1) == y).float().mean())


def test_all_samples_whatever_the_batches_of_training():
    data, module = TinyData(batch_size=7), TinyClassifier()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    found = TrainingEvaluator(module, data).figures(weights)
    assert (found["val_loss"], found["val_acc"]) == pytest.approx(loss_and_accuracy(module, data.train.tensors))
    assert TrainingEvaluator(module, data, "val_acc").score(weights) == pytest.approx(found["val_acc"])


def test_some_samples_are_the_same_each_time_and_leave_the_random_state_alone():
    data, module = TinyData(), TinyClassifier()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    batches = [list(TrainingEvaluator(module, data, samples=20).batches_of(8)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(x) for x, _ in batches[0]] == [8, 8, 4]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*batches, strict=True))
    x = torch.cat([x for x, _ in batches[0]])
    rows = {tuple(row.tolist()) for row in data.train.tensors[0]}
    assert len({tuple(row.tolist()) for row in x} & rows) == 20


def test_limits_on_validation_batches_are_not_for_these_samples():
    data, module = TinyData(), TinyClassifier()
    trainer = Trainer(devices=1, logger=False, enable_checkpointing=False, limit_val_batches=1, accelerator="cpu")
    trainer.validate_loop.verbose = False
    evaluator = TrainingEvaluator(module, data, trainer=trainer, samples=90)
    evaluator._held = evaluator.batches_of(16)  # several batches
    whole = TrainingEvaluator(module, data, samples=90).figures(module.state_dict())
    assert evaluator.figures(module.state_dict())["val_loss"] == pytest.approx(whole["val_loss"])
    assert trainer.limit_val_batches == 1
    assert sum(len(x) for x, _ in evaluator.batches(0, 20)) == 90


def test_a_metric_of_one_of_several_validation_loaders_is_that_without_its_number():
    module = TinyClassifier()
    evaluator = TrainingEvaluator(module, TinyData(), "val_acc/dataloader_idx_1")
    assert evaluator.score(module.state_dict()) == evaluator.figures(module.state_dict())["val_acc"]


def test_gradients_are_of_training_samples():
    data, module = TinyData(), TinyClassifier()
    evaluator = TrainingEvaluator(module, data, "val_acc")
    (batch,) = evaluator.batches(0, 96)
    assert sorted(batch[0][:, 0].tolist()) == sorted(data.train.tensors[0][:, 0].tolist())


class Augmented(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.randn(8), index % 3


class Given(LightningDataModule):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def train_dataloader(self):
        return self.data if isinstance(self.data, DataLoader) else DataLoader(self.data, 4)


def _mixed(samples):
    x, y = torch.utils.data.default_collate(samples)
    return torch.lerp(x, x.flip(0), float(torch.rand(()))), y


def _named(samples):
    x, y = torch.utils.data.default_collate(samples)
    return {"x": x, "y": y}


class Seldom(Augmented):
    def __getitem__(self, index):
        return torch.full((8,), float(torch.rand(()) < 0.5)), index % 3


def test_samples_that_change_are_told():
    with pytest.warns(UserWarning, match="augmented at random"):
        TrainingEvaluator(TinyClassifier(), Given(Augmented())).figures(TinyClassifier().state_dict())


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TinyData().train, 4, collate_fn=_mixed),
        DataLoader(Augmented(), 4, collate_fn=_named),
        DataLoader(Seldom(), 4),
    ],
    ids=["mixed in batches", "mappings", "half of the time"],
)
def test_samples_that_change_are_found_whatever_the_batches(loader):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="augmented at random"):
        TrainingEvaluator(TinyClassifier(), Given(loader)).batches_of(4)


@pytest.mark.parametrize("told", [False, True])
def test_data_that_is_iterated_over_is_refused(told):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

    if told:
        Endless.__len__ = lambda self: 12
    with pytest.raises(UnsupportedSetup, match="Given: the training data has no length"):
        TrainingEvaluator(TinyClassifier(), Given(Endless())).figures(TinyClassifier().state_dict())
