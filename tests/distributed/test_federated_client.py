"""What a client's Trainer is given and leaves behind, modules that take no steps, and options that cannot work."""

import gc
import random
import signal

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_soup.distributed import AverageAll, Bernoulli, FedAU, FederatedSimulation
from lightning_soup.distributed.federated_client import evaluate_locally, train_locally
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.boring import TinyClassifier, TinyData

pytestmark = pytest.mark.filterwarnings("ignore:.*clients have fewer than 10 closed gaps")


def train(module, steps=5, data=None, **options):
    return train_locally(module, TinyData() if data is None else data, module.state_dict(), steps, **options)


class Adam(TinyClassifier):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def test_a_client_keeps_no_trainer_nor_the_state_of_an_optimizer():
    class Large(Adam):
        def __init__(self):
            super().__init__()
            self.large = nn.Parameter(torch.ones(12345))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.large.sum()

    data, module = [TinyData() for _ in range(3)], Large()
    gc.collect()
    gc.disable()  # what cycles keep until they are looked for counts, too
    try:
        found = [train(module, 1, part).weights for part in data]
        assert [part.trainer for part in data] == [None] * 3
        kept = sum(isinstance(one, torch.Tensor) and one.shape == (12345,) for one in gc.get_objects())
    finally:
        gc.enable()
    assert all(weights["large"].shape == (12345,) for weights in found)
    assert kept <= 4  # the parameter and a view of it in each reply: no gradient, no moments
    owner = object()
    data[0].trainer = owner
    train(TinyClassifier(), 1, data[0])
    assert data[0].trainer is owner


def test_callbacks_begin_anew_in_every_training():
    class Steps(Callback):
        def __init__(self):
            self.seen = 0

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen += 1
            pl_module.log("seen", float(self.seen))

    counter = Steps()
    simulation = FederatedSimulation(
        TinyClassifier(),
        [TinyData(), TinyData()],
        AverageAll(2),
        Bernoulli([1.0, 1.0]),
        local_steps=3,
        trainer={"callbacks": counter},
    )
    simulation.run(2)
    assert [row["seen"] for row in simulation.history] == [3, 3]
    assert counter.seen == 0
    assert train(TinyClassifier(), 4, trainer={"callbacks": [counter]}).metrics["seen"] == 4


class Manual(TinyClassifier):
    """Takes an optimizer step every so many batches, by a counter of its own."""

    def __init__(self, every):
        super().__init__()
        self.automatic_optimization, self.every, self.batches = False, every, 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        self.manual_backward(super().training_step(batch, batch_idx))
        if self.every and self.batches % self.every == 0:
            self.optimizers().step()


def test_a_module_that_never_steps_is_told_and_does_not_hang():
    module = Manual(every=0)
    with pytest.raises(UnsupportedSetup, match=r"client 'n' took none of 5 local steps: .* takes no optimizer step"):
        train(module, client="n")
    assert module.batches == 60  # ten epochs of six
    rare = Manual(every=20)  # one step in more than three epochs
    before = {name: value.clone() for name, value in rare.state_dict().items()}
    found = train(rare, 4).weights
    assert rare.batches == 80
    assert not torch.equal(found["net.0.weight"], before["net.0.weight"])


def test_several_optimizers_count_together():
    class Two(Manual):
        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(TinyClassifier.training_step(self, batch, batch_idx))
                optimizer.step()
                self.batches += 1

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 3)]

    module = Two(every=1)
    train(module, 4)
    assert module.batches == 4


def test_a_seed_is_that_of_all_generators():
    class Drawn(TinyClassifier):
        def training_step(self, batch, batch_idx):
            for name, value in (("python", random.random()), ("numpy", np.random.rand()), ("torch", torch.rand(()))):
                self.log(name, value)
            return super().training_step(batch, batch_idx)

    first, again, other = (train(Drawn(), 2, seed=seed).metrics for seed in (1, 1, 2))
    assert first == again
    assert all(first[name] != other[name] for name in ("python", "numpy", "torch"))


def test_every_client_and_round_has_its_seed():
    class Drawn(TinyClassifier):
        def training_step(self, batch, batch_idx):
            drawn.append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    drawn = []
    data = [TinyData(), TinyData()]
    FederatedSimulation(Drawn(), data, AverageAll(2), Bernoulli([1.0] * 2), local_steps=1).run(2)
    assert len(set(drawn)) == 4


def test_training_does_not_validate_unless_asked_for():
    class Unvalidated(TinyClassifier):
        def validation_step(self, batch, batch_idx):
            seen.append(batch_idx)

    seen = []
    train(Unvalidated(), 12)
    assert seen == []
    train(Unvalidated(), 12, trainer={"limit_val_batches": 1})
    assert seen == [0, 0]


def test_frozen_parameters_stay():
    module = TinyClassifier()
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.clone()
    rule = FedAU(3)
    simulation = FederatedSimulation(module, [TinyData() for _ in range(3)], rule, Bernoulli([0.4] * 3, seed=3))
    simulation.run(6)
    assert max(row["weight_max"] for row in simulation.history) > 1
    assert torch.equal(module.net[0].weight, before)
    assert not module.net[0].weight.requires_grad


def test_ctrl_c_is_ctrl_c_and_works_again():
    class Interrupted(TinyClassifier):
        def training_step(self, batch, batch_idx):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        simulation = FederatedSimulation(Interrupted(), [TinyData()], AverageAll(1), Bernoulli([1.0]))
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                simulation.run(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert simulation.pattern.round == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_validation_as_it_is_asked_for():
    class Untested(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

    module, data = TinyClassifier(), TinyData(batch_size=10)
    seen = []
    module.validation_step = lambda batch, batch_idx: seen.append(batch_idx)
    evaluate_locally(module, data, module.state_dict())
    assert seen == [0, 1, 2, 3, 4, 5]
    evaluate_locally(module, data, module.state_dict(), trainer={"limit_val_batches": 2})
    assert seen[6:] == [0, 1]
    assert data.trainer is None
    untested = Untested()
    assert evaluate_locally(untested, data, untested.state_dict()).metrics == {}
    with pytest.raises(UnsupportedSetup, match="client 'n': the global weights do not fit Untested"):
        evaluate_locally(Untested(), data, module.state_dict(), client="n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acelerator": "cpu"}, "'acelerator' is no option of Lightning's Trainer"),
        ({"devices": [0, 1]}, r"one device, got devices=\[0, 1\]"),
        ({"devices": "auto"}, "one device, got devices='auto'"),
        ({"num_nodes": 2}, "num_nodes=2"),
        ({"fast_dev_run": True}, "fast_dev_run is decided by local_steps"),
    ],
)
def test_wrong_options_of_the_trainer(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        train(TinyClassifier(), trainer=options)


def test_one_device_may_be_named():
    from lightning_soup.distributed.federated_client import check_trainer_options

    assert check_trainer_options({"devices": [1], "accelerator": "gpu"})["devices"] == [1]


def test_examples_are_those_of_the_training_data():
    assert train(TinyClassifier()).examples == 96
    assert train(TinyClassifier(), data=DataLoader(TinyData().val, 10)).examples == 60

    class Several(TinyClassifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", 0.0)

    one, two = TinyData().val_dataloader(), TinyData().train_dataloader()
    for loaders in ([one, two], {"a": one, "b": two}):
        module = Several()
        assert evaluate_locally(module, loaders, module.state_dict()).examples == 156
