"""What SalsaPPO is held to, over several runs with one module: fits, validations, tests, predictions."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_soup.modules.alignment import SalsaPPO
from tests.helpers.salsa import assert_same, count_digits, data, fit, module, weights_of, write_pair
from tests.helpers.trainers import quiet_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint that ended"
)
SHORT = {"max_epochs": 1, "limit_train_batches": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models from one start, and prompts."""
    return write_pair(tmp_path_factory.mktemp("frozen"))


class Saves(Callback):
    """After each epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def test_validating_what_was_trained_just_now(folder, tmp_path):
    """θ_1 is known still: without a reference the divergence from it is not that of the policy from itself."""
    for options in ({"reference": None}, {}):
        found = module(folder, **options)
        logged = dict(fit(found, folder, tmp_path).callback_metrics)
        trainer = quiet_trainer(default_root_dir=tmp_path)
        trainer.validate(found, data(folder), verbose=False)
        assert len(trainer.callback_metrics) == 5
        for name, value in trainer.callback_metrics.items():
            assert value == logged[name] != 0, name


def test_a_loaded_policy_does_not_know_what_it_started_from(folder, tmp_path):
    trainer = fit(module(folder, reference=None), folder, tmp_path, **SHORT)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = SalsaPPO.load_from_checkpoint(tmp_path / "x.ckpt", reward=count_digits)
    again = quiet_trainer(default_root_dir=tmp_path)
    again.validate(loaded, data(folder), verbose=False)
    assert set(again.callback_metrics) == {"val_reward", "val_length"}  # and no KL of 0


@pytest.mark.parametrize("options", [{"reference": None}, {}], ids=["plain", "soup"])
def test_a_module_that_was_trained_already_is_resumed(folder, tmp_path, options):
    """As in a notebook; what it is held to is not the policy as it is by then."""
    found = module(folder, **options)
    fit(found, folder, tmp_path, Saves(tmp_path / "x.ckpt"), **SHORT)
    digest, start = found._frozen.digest, weights_of(found._frozen.models["start"])
    fit(found, folder, tmp_path, ckpt_path=tmp_path / "x.ckpt", **{**SHORT, "max_epochs": 2})
    assert found.batches == 2
    assert found._frozen.digest == digest
    assert_same(weights_of(found._frozen.models["start"]), start)


def test_there_is_one_copy_of_the_reference(folder, tmp_path):
    found = module(folder, kl_to_start=False)
    fit(found, folder, tmp_path, **SHORT)
    held = found._frozen.models["reference"]
    quiet_trainer(default_root_dir=tmp_path).validate(found, data(folder), verbose=False)
    assert found._frozen.models == {"reference": held}  # not read anew for every validation


def test_testing_alone(folder, tmp_path):
    """The reference comes to the policy's device and type here, too."""
    found = module(folder)
    seen = []

    class Watch(Callback):
        def on_test_batch_start(self, trainer, pl_module, *_):
            seen.append(next(pl_module._frozen.models["reference"].parameters()).dtype)

    trainer = quiet_trainer(default_root_dir=tmp_path, precision="bf16-true", callbacks=[Watch()])
    trainer.test(found, data(folder, test=str(folder / "prompts.jsonl")), verbose=False)
    assert seen == [torch.bfloat16] * 4
    assert trainer.callback_metrics["test_kl"] != 0


def test_predictions_need_neither_reward_nor_reference(folder):
    """And padding on the left changes none, also where positions are learned."""
    config = {"model_type": "gpt2", "vocab_size": 80, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
    for found in (SalsaPPO(str(folder / "a")), SalsaPPO(model_config={**config, "eos_token_id": 2, "bos_token_id": 1})):
        alone = {"input_ids": torch.tensor([1, 5, 9]), "attention_mask": torch.ones(3, dtype=torch.long)}
        padded = {"input_ids": torch.tensor([0, 0, 1, 5, 9]), "attention_mask": torch.tensor([0, 0, 1, 1, 1])}
        first, second = (quiet_trainer().predict(found, DataLoader([row]))[0] for row in (alone, padded))
        torch.testing.assert_close(second[:, 2:], first, rtol=0, atol=1e-5)


def test_a_policy_that_no_trainer_has_trained_is_saved(folder, tmp_path):
    trainer, found = quiet_trainer(default_root_dir=tmp_path), module(folder)
    trainer.strategy.connect(found)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit(module(folder), folder, tmp_path, ckpt_path=tmp_path / "x.ckpt", **SHORT)


def test_copies(folder, tmp_path):
    """A launcher pickles the module; a copy has a reference of its own."""
    found = module(folder)
    pickle.loads(pickle.dumps(found))
    fit(found, folder, tmp_path, **SHORT)
    copied = copy.deepcopy(found)
    assert copied._frozen._module is copied
    assert copied._frozen.models["reference"] is not found._frozen.models["reference"]
