"""BatchNorm statistics of an average: estimated anew on any number of ranks, and without a trace in training."""

import logging
import warnings

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_soup.callbacks import EqualAverage
from tests.helpers.averages import assert_close, equal, fit, loaders, values_of
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.two_ranks import run_on_two_ranks

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Watched(TinyClassifier):
    """Keeps the inputs from which its statistics were estimated last."""

    def __init__(self):
        super().__init__(batch_norm=True)

    def on_validation_start(self):
        self.estimated_from = getattr(self, "estimated_from", [])[-6:]

    def validation_step(self, batch, batch_idx):
        if self.net[1].training:
            self.estimated_from.append(batch[0])
        return super().validation_step(batch, batch_idx)


class Sharded(Watched):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def _recalibrate(average_and_plain, strategy, module):
    fits = [fit(a, module=module, devices=2, strategy=strategy(), data=loaders(8)) for a in average_and_plain]
    (_, recalibrated, trail), (_, _, plain) = fits
    assert_close(recalibrated, equal({}, trail[2::2]))
    return {
        "statistics": [recalibrated.net[1].get_buffer(name).numpy() for name in STATISTICS],
        "estimated from": torch.cat(recalibrated.estimated_from[-6:]).numpy(),
        "weights": {name: value.numpy() for name, value in values_of(recalibrated).items()},
        "as without": all(torch.equal(a[n], b[n]) for a, b in zip(trail, plain, strict=True) for n in a),
    }


def _on_a_rank():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found = {}
    sharding = lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)  # noqa: E731
    for name, strategy, module in (("ddp", lambda: "ddp", Watched), ("fsdp2", sharding, Sharded)):
        average = EqualAverage(start=0, every=2, buffers="recalibrate")
        found[name] = _recalibrate([average, []], strategy, module)
    return found


def test_two_ranks_estimate_the_statistics_of_all_data_together_and_leave_training_alone():
    ranks = run_on_two_ranks(_on_a_rank)
    for strategy in ("ddp", "fsdp2"):
        first, second = [rank[strategy] for rank in ranks]
        assert [first["as without"], second["as without"]] == [True, True]
        inputs = [torch.from_numpy(rank["estimated from"]) for rank in (first, second)]
        together = torch.cat(inputs)
        assert {tuple(row.tolist()) for row in together} == {tuple(x.tolist()) for x, _ in TinyData().train}
        # The same weights, in one process, over the batches of both ranks:
        module = TinyClassifier(batch_norm=True)
        weights = {name: torch.from_numpy(value).float() for name, value in first["weights"].items()}
        module.load_state_dict(weights, strict=False)
        with torch.no_grad():
            hidden = [module.net[0](batch) for rank in inputs for batch in rank.split(8)]
        mean, variance = (
            torch.stack(parts).mean(0) for parts in ([h.mean(0) for h in hidden], [h.var(0) for h in hidden])
        )
        for a, b in zip(first["statistics"], second["statistics"], strict=True):
            assert (a == b).all()
        torch.testing.assert_close(torch.from_numpy(first["statistics"][0]), mean)
        torch.testing.assert_close(torch.from_numpy(first["statistics"][1]), variance)
        assert first["statistics"][2] == 6


@pytest.mark.parametrize("batches", [2, 100])
def test_the_order_that_a_generator_of_the_user_gives_to_training_is_unchanged(batches):
    def shuffled():
        data = TinyData()
        own = torch.Generator().manual_seed(5)
        return [DataLoader(data.train, 16, shuffle=True, generator=own), DataLoader(data.val, 16)]

    average = EqualAverage(start=0, every=1, buffers="recalibrate", recalibrate_batches=batches)
    _, _, trail = fit(average, module=Watched, data=shuffled(), val_check_interval=0.5)
    _, _, plain = fit([], module=Watched, data=shuffled(), val_check_interval=0.5)
    for a, b in zip(trail, plain, strict=True):
        assert_close(a, b, atol=0)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_statistics_that_are_frozen_are_left_to_the_layers_that_rely_on_them():
    class Frozen(TinyClassifier):
        def __init__(self):
            super().__init__(batch_norm=True)
            self.net.insert(2, torch.nn.BatchNorm1d(16))
            self.net[1].eval()

    def run(batches):
        module = fit(EqualAverage(every=2, buffers="recalibrate", recalibrate_batches=batches), module=Frozen)[1]
        return module.net[1], module.net[2]

    frozen, trained = run(6)
    assert torch.equal(frozen.running_mean, torch.zeros(16))
    assert torch.equal(frozen.running_var, torch.ones(16))
    assert not torch.equal(trained.running_mean, run(1)[1].running_mean)  # estimated, and on these batches
