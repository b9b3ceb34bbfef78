"""Pruning image-text models: two towers, projections without layers, heads written in words, and frozen teachers."""

from functools import partial

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_soup.callbacks import SparseModelSoup
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.recipes import GreedySoup
from tests.callbacks.test_live_average_contract import CutAt
from tests.callbacks.test_sparsity_mask import Watch
from tests.helpers.clip import RowData, fit_clip, some_images, tiny_clip
from tests.helpers.trainers import quiet_trainer
from tests.helpers.zscl import reference, tiny_zscl, write_teacher

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*hold the same weights",
        ".*weights to prune are frozen",
        "Be aware that when using `ckpt_path`",
        ".*has files of another fit, which this one writes over",
    )
]
KINDS = {
    "both towers": tiny_clip,
    "image tower and a head": partial(tiny_clip, train="image", head="trained"),
    "zscl": tiny_zscl,
}


def fitted(make, folder, cut=0, ckpt_path=None):
    """A sparse soup with a checkpoint after each epoch, interrupted or resumed."""
    options = {"cycles": 2, "copies": 2, "retrain_epochs": 1, "dense_epochs": 1, "monitor": "val_acc"}
    soup = SparseModelSoup(0.5, **options, recipe=GreedySoup(), dirpath=folder)
    keep, watch = ModelCheckpoint(dirpath=f"{folder}/ckpt", save_top_k=-1, filename="{step}"), Watch(soup)
    seed_everything(0, verbose=False)
    module = make()
    trainer = quiet_trainer(max_epochs=-1, callbacks=[soup, keep, CutAt(cut), watch], enable_checkpointing=True)
    trainer.fit(module, datamodule=RowData(), ckpt_path=ckpt_path)
    assert watch.broken == []
    return soup, module, trainer


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_resumed_tested_and_loaded(kind, tmp_path):
    given = {"teacher": write_teacher(tmp_path), "reference": reference()} if kind == "zscl" else {}
    make = partial(KINDS[kind], **given)
    soup, module, trainer = fitted(make, str(tmp_path / "whole"))
    assert soup.sparsity_reached == pytest.approx(0.5, abs=1e-3)
    assert {"model.text_projection", "model.visual.proj"} <= set(soup.masks)
    assert not any("embedding" in name for name in soup.masks)
    with pytest.raises(RuntimeError, match="power cut"):
        fitted(make, str(tmp_path / "cut"), cut=20)
    _, again, _ = fitted(make, str(tmp_path / "cut"), ckpt_path=tmp_path / "cut" / "ckpt" / "step=18.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

    assert len(trainer.test(module, datamodule=RowData(), verbose=False)) == 2
    loaded = type(module).load_from_checkpoint(tmp_path / "whole" / "cycle=2-soup.ckpt", **given)
    torch.testing.assert_close(loaded.eval()(some_images()), module.eval()(some_images()), rtol=0, atol=0)


def test_the_ends_of_two_towers_are_to_be_named():
    soup = SparseModelSoup(0.5, copies=1, retrain_epochs=1, skip_head=True)
    with pytest.raises(UnsupportedSetup, match=r"skip_head: .* but model\.text_projection comes before"):
        fit_clip(tiny_clip(), max_epochs=-1, callbacks=[soup])
