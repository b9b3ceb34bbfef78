"""CheckpointTrail at its edges: tied tensors, extra state, parameters unfrozen later, what is refused at once."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_soup.callbacks import CheckpointTrail, ModelSoup
from lightning_soup.errors import RecipeError, UnwritableOutput
from lightning_soup.recipes import EvolutionarySoup
from lightning_soup.weights import open_checkpoint
from tests.callbacks.test_checkpoint_trail import fit, kept
from tests.helpers.averages import FrozenFirst
from tests.helpers.boring import TinyClassifier


class Tied(TinyClassifier):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("nothing_wide", torch.empty(0, 3))


@pytest.mark.filterwarnings("ignore:CheckpointTrail. the weights are trained in 16 bits")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_tied_tensors_are_written_once(tmp_path, precision):
    trail = CheckpointTrail(every=6, keep=3)
    fit(tmp_path, trail, Tied(), precision=precision)
    found = open_checkpoint(trail.files[-1])
    assert found.ties == (("first.weight", "second.weight"),)
    assert {spec.dtype for spec in found.specs.values()} == {torch.float32}
    assert [tuple(found[name].shape) for name in ("nothing", "nothing_wide")] == [(0,), (0, 3)]


class WithState(TinyClassifier):
    def get_extra_state(self):
        return {"scale": 3, "amax": torch.ones(2)}

    def set_extra_state(self, state):
        self.found = state


def test_extra_state_goes_into_the_files(tmp_path):
    trail = CheckpointTrail(every=3, keep=6)
    soup = ModelSoup(EvolutionarySoup(budget=10), trail=True, monitor="val_loss")
    fit(tmp_path, trail, WithState(), callbacks=[soup])
    assert WithState.load_from_checkpoint(trail.files[0]).found["scale"] == 3
    assert len(soup.soup.history) == 10


class Unfreeze(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(trainer.current_epoch > 0)


def test_parameters_that_are_unfrozen_on_the_way(tmp_path):
    trail = CheckpointTrail(every=3, keep=6, frozen=False)
    with pytest.warns(UserWarning, match=r"other parameters are trained from step 9 on \(net.0.bias, …\)") as told:
        fit(tmp_path, trail, FrozenFirst(), callbacks=[Unfreeze()])
    assert len([w for w in told if "other parameters" in str(w.message)]) == 1
    assert kept(trail) == [3, 6, 9, 12, 15, 18]
    whole = CheckpointTrail(every=3, keep=6)
    fit(tmp_path, whole, FrozenFirst(), callbacks=[Unfreeze()])
    assert len({tuple(open_checkpoint(file)) for file in whole.files}) == 1


def test_what_a_recipe_lacks_is_said_before_training(tmp_path):
    class NeverTrained(TinyClassifier):
        def training_step(self, batch, batch_idx):
            raise AssertionError("training has begun")

    def refused(message, error=RecipeError, **options):
        soup = ModelSoup(EvolutionarySoup(budget=10, **options), trail=True, monitor="val_loss")
        with pytest.raises(error, match=message):
            fit(tmp_path, CheckpointTrail(every=3, keep=6), NeverTrained(), callbacks=[soup])

    refused("there is no third split to choose on", third="require")
    (tmp_path / "search.json").touch()
    refused("search.json'.: the file is there already", record=str(tmp_path / "search.json"))
    refused("cannot be written", UnwritableOutput, record=str(tmp_path / "search.json" / "below.json"))
    assert not list((tmp_path / "trail").glob("*"))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_resumed_fit_goes_on_with_its_search(tmp_path):
    record = tmp_path / "search.json"

    def run(**options):
        trail = CheckpointTrail(every=3, keep=6)
        soup = ModelSoup(EvolutionarySoup(budget=10, record=str(record)), trail=True, monitor="val_loss")
        trainer, _, _ = fit(tmp_path, trail, callbacks=[soup], **options)
        return trainer, soup.soup

    trainer, first = run()
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    written = record.stat().st_mtime_ns
    _, again = run(ckpt_path=str(tmp_path / "end.ckpt"))
    assert again.history == first.history
    assert record.stat().st_mtime_ns == written
