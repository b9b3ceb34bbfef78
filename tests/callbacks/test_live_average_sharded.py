"""Live averages of sharded parameters: FSDP2 on two CPU processes, with shards of unequal size."""

import logging
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lightning_soup.callbacks import ExponentialAverage, LatestAverage, WeightEnsemble
from lightning_soup.errors import UnsupportedSetup
from tests.helpers.averages import ROWS, fit, loaders, values_of
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


def _sharded_fit(average, distributed, **options):
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )
    return fit(average, module=Sharded, devices=2, strategy=strategy, data=loaders(8), **options)


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
