"""Live averages of sharded parameters: FSDP2 on two CPU processes, with shards of unequal size."""

import logging
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lightning_soup.callbacks import EqualAverage, ExponentialAverage, LatestAverage, WeightEnsemble
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.averages import ROWS, EveryWeight, Unfreeze, equal, fit, loaders, values_of
from tests.helpers.boring import TinyClassifier
from tests.helpers.two_ranks import run_on_two_ranks

NAMED = {row.name: row for row in ROWS}
CASES = [(NAMED["ema"], True), (NAMED["ema"], False), (NAMED["lawa"], True), (NAMED["zscl"], False)]


class Sharded(TinyClassifier):
    """The last layer has three outputs: one rank holds two of them and the other one."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if not isinstance(self.net[0].weight, DTensor):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class FrozenSharded(Sharded):
    """Its first layer is not trained at first."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)


def _sharded_fit(average, distributed, module=Sharded, **options):
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )
    return fit(average, module=module, devices=2, strategy=strategy, data=loaders(8), **options)


def _difference(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def _train(folder):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found = {}
    for row, distributed in CASES:
        path = f"{folder}/{row.name}-{distributed}"
        whole, module, trail = _sharded_fit(row.make(), distributed, epochs=4)
        assert len({tuple(p.to_local().shape) for p in module.parameters()}) == 4
        off_reference = _difference(row.expected(trail), values_of(module))
        keep = ModelCheckpoint(dirpath=path, save_top_k=-1, filename="{epoch}")
        half = [row.make(), keep]
        _sharded_fit(half, distributed, epochs=4, max_steps=13, enable_checkpointing=True)
        again = [row.make(), ModelCheckpoint(dirpath=path)]
        options = {"ckpt_path": f"{path}/epoch=1.ckpt", "enable_checkpointing": True, "seed": 99}
        resumed, other, other_trail = _sharded_fit(again, distributed, epochs=4, **options)
        found[f"{row.name} {distributed}"] = {
            "off reference": off_reference,
            "resumed average": _difference(values_of(module), values_of(other)),
            "resumed live": _difference(trail[-1], other_trail[-1]),
            "samples": [whole.callbacks[0].samples, resumed.callbacks[0].samples],
        }
    return found


def test_l05_t02_sharded_averages_are_exact_and_resume_exactly(tmp_path):
    first, second = run_on_two_ranks(_train, str(tmp_path))
    assert first == second
    for name, found in first.items():
        assert found["off reference"] < 1e-6, name
        assert found["resumed average"] == 0, name
        assert found["resumed live"] == 0, name
        assert found["samples"][0] == found["samples"][1], name
    # A full file is read like any other.
    content = torch.load(tmp_path / "zscl-False" / "epoch=1.ckpt", weights_only=True)
    assert set(content["current_model_state"]) == set(content["state_dict"])


def _unfreeze(folder):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found = {}
    for name, make in UNFREEZING.items():
        options = {"module": FrozenSharded, "enable_checkpointing": True}
        keep = ModelCheckpoint(dirpath=f"{folder}/{name}", save_top_k=-1, filename="{epoch}")
        _, module, _ = _sharded_fit([Unfreeze(), make(), first := EveryWeight(), keep], False, **options)
        off = [_difference(equal({}, first.weights), values_of(module))]
        # The layer is still frozen when a run is resumed, and then goes on with its samples out of the file. Weights of
        # the two runs differ, because torch does not restore the optimizer's state of frozen shards.
        for epoch in (0, 1):
            path = f"{folder}/{name}/epoch={epoch}.ckpt"
            again = [Unfreeze(), make(), second := EveryWeight(), ModelCheckpoint(dirpath=folder)]
            _, module, _ = _sharded_fit(again, False, ckpt_path=path, **options)
            steps = 6 * (epoch + 1)
            taken = [*first.weights[:steps], *second.weights[steps - 18 :]]  # loading takes a step, only for the state
            off.append(_difference(equal({}, taken), values_of(module)))
        moved = float((first.weights[-1]["net.0.weight"] - first.weights[0]["net.0.weight"]).abs().max())
        found[name] = {"off reference": off, "steps": len(first.weights), "moved": moved}
    return found


UNFREEZING = {"mean": lambda: EqualAverage(start=0, every=1), "ring": lambda: LatestAverage(18, every=1)}


@pytest.mark.slow
def test_a_sharded_layer_that_is_unfrozen_is_averaged_from_its_first_step_and_resumed(tmp_path):
    first, second = run_on_two_ranks(_unfreeze, str(tmp_path))
    assert first == second
    for name, found in first.items():
        assert found["steps"] == 18, name
        assert found["moved"] > 0.01, name
        assert max(found["off reference"]) < 1e-6, name


def _refused(folder):
    keep = ModelCheckpoint(dirpath=folder, save_weights_only=True)
    with pytest.raises(UnsupportedSetup, match="save_weights_only=False"):
        _sharded_fit([ExponentialAverage(0.5), keep], True, enable_checkpointing=True)


def test_weights_only_files_of_shards_are_refused_before_training(tmp_path):
    run_on_two_ranks(_refused, str(tmp_path))


@pytest.mark.parametrize("make", [ExponentialAverage, LatestAverage, WeightEnsemble])
def test_t01_strategies_with_flattened_shards_are_refused_by_name(make):
    from types import SimpleNamespace

    trainer = SimpleNamespace(strategy=object.__new__(FSDPStrategy), callbacks=[])
    with pytest.raises(UnsupportedSetup, match=r"FSDPStrategy.*ModelParallelStrategy"):
        make().setup(trainer, TinyClassifier(), "fit")
