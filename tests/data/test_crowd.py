"""Training on votes: which item gets which row, the cache, and what is refused."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_soup.callbacks import ExponentialAverage
from lightning_soup.cli.soup_cli import SoupCLI
from lightning_soup.data import CrowdDataModule, HandwritingDataModule, read_votes, soft_labels
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.distillation import soft_target_kl
from tests.helpers.trainers import quiet_trainer
from tests.modules.test_classifier import TINY, ImageClassifier, Shapes

CLASSES = ["top", "middle", "bottom"]


class NamedShapes(Shapes):
    class_names = CLASSES


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("task", "worker", "label"), *rows])
    return str(path)


def votes_of(path, count=48, skip=()):
    """Three votes an item: two right, one from a worker who always says `top`."""
    truth = [int(target) for target in Shapes().train.tensors[1]][:count]
    rows = [(i, worker, CLASSES[t]) for i, t in enumerate(truth) if i not in skip for worker in ("u", "v")]
    return write(path, [*rows, *((i, "lazy", "top") for i in range(count) if i not in skip)])


def test_the_loss_by_hand():
    p, logits = torch.tensor([(0.75, 0.25, 0), (0, 1, 0)]), torch.tensor([(1.0, 0, -1), (0, 2, 0)])
    assert float(soft_target_kl(logits, p)) == pytest.approx(0.167407793, abs=1e-7)
    q = logits.clone().requires_grad_()
    soft_target_kl(q, p).backward()
    again = logits.clone().requires_grad_()
    F.cross_entropy(again, p).backward()
    torch.testing.assert_close(q.grad, again.grad)
    one_hot = F.one_hot(torch.tensor([0, 2]), 3).float()
    torch.testing.assert_close(soft_target_kl(logits, one_hot), F.cross_entropy(logits, torch.tensor([0, 2])))
    smooth = F.cross_entropy(logits, torch.tensor([0, 2]), label_smoothing=0.1)
    p = 0.9 * one_hot + 0.1 / 3
    entropy = -(p * p.log()).sum(1).mean()
    torch.testing.assert_close(soft_target_kl(logits, one_hot, 0.1), smooth - entropy)


def test_items_get_their_rows(tmp_path):
    data = CrowdDataModule(votes_of(tmp_path / "v.csv"), NamedShapes(), method="standard")
    data.trainer = None
    data.prepare_data()
    data.setup("fit")
    rows = {tuple(image.flatten().tolist()): row for image, row in data._train}
    truth = Shapes().train
    for image, target in zip(*truth.tensors, strict=True):
        expected = torch.zeros(3)
        expected[int(target)] += 2 / 3
        expected[0] += 1 / 3
        torch.testing.assert_close(rows[tuple(image.flatten().tolist())], expected)
    batch = next(iter(data.train_dataloader()))
    assert batch[1].shape == (8, 3)
    assert next(iter(data.val_dataloader()))[1].ndim == 1  # experts' labels, as they were
    assert data.test_names == ("test", "dark")


def fit(module, data, **options):
    trainer = quiet_trainer(**{"max_epochs": 2, **options})
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.mark.parametrize("options", [{}, {"mixup": 0.4}, {"label_smoothing": 0.1}, {"train_sizes": [8, 12]}])
def test_a_classifier_learns_from_them(tmp_path, options):
    torch.manual_seed(0)
    data = CrowdDataModule(votes_of(tmp_path / "v.csv"), NamedShapes())
    module = ImageClassifier(**TINY, targets="soft", **options)
    trainer = fit(module, data, max_epochs=12, callbacks=[ExponentialAverage(decay=0.5)])
    assert trainer.callback_metrics["val_acc"] > 0.6
    trainer.test(module, datamodule=data, verbose=False)
    assert "test_acc/dark" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert ImageClassifier.load_from_checkpoint(tmp_path / "x.ckpt").hparams.targets == "soft"


def test_digits_and_their_augmentation(tmp_path):
    items = HandwritingDataModule(train_size=20, val_size=20, augment="mild")
    draw = np.random.default_rng(0)
    rows = [(i, f"w{w}", int(draw.integers(10))) for i in range(20) for w in range(3)]
    data = CrowdDataModule(write(tmp_path / "v.csv", rows), items)
    fit(
        ImageClassifier("vit_tiny_patch16_224", img_size=28, in_chans=1, model_args=TINY["model_args"], targets="soft"),
        data,
    )
    votes = read_votes(tmp_path / "v.csv", [str(d) for d in range(10)])
    np.testing.assert_allclose(data.labels, soft_labels(votes))


def test_the_cache(tmp_path, monkeypatch):
    path = votes_of(tmp_path / "v.csv")

    def prepared(method="mean"):
        data = CrowdDataModule(path, NamedShapes(), method=method, cache=str(tmp_path / "cache"))
        data.prepare_data()
        return data._soft()[1]

    first = prepared()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    prepared("standard")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr("lightning_soup.data.crowd.soft_labels", lambda *_: pytest.fail("computed again"))
    assert (prepared() == first).all()
    monkeypatch.undo()
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    assert (prepared() == first).all()
    votes_of(tmp_path / "v.csv", skip=(47,))  # another table
    assert len(prepared()) == 47


def test_items_without_votes(tmp_path):
    path = votes_of(tmp_path / "v.csv", skip=(3, 9))
    data = CrowdDataModule(path, NamedShapes())
    with pytest.raises(UnsupportedSetup, match=r"v\.csv: 2 of 48 training items have no vote, the first is item 3"):
        fit(ImageClassifier(**TINY, targets="soft"), data)
    data = CrowdDataModule(path, NamedShapes(), drop_unvoted=True)
    fit(ImageClassifier(**TINY, targets="soft"), data)
    assert len(data._train) == 46


def test_bad_input(tmp_path):
    path = votes_of(tmp_path / "v.csv")
    with pytest.raises(UnsupportedSetup, match="method='vote'"):
        CrowdDataModule(path, NamedShapes(), method="vote")
    with pytest.raises(UnsupportedSetup, match="Shapes has no class_names"):
        CrowdDataModule(path, Shapes())
    strange = write(tmp_path / "strange.csv", [("48", "u", "top"), ("cat.png", "u", "middle")])
    with pytest.raises(
        UnsupportedSetup, match=r"2 tasks are no training items, the first is '48'; expected numbers from 0"
    ):
        fit(ImageClassifier(**TINY, targets="soft"), CrowdDataModule(strange, NamedShapes()))
    with pytest.raises(UnsupportedSetup, match="gives soft labels, but targets='hard'"):
        fit(ImageClassifier(**TINY), CrowdDataModule(path, NamedShapes()))
    with pytest.raises(UnsupportedSetup, match="the training data has class numbers"):
        fit(ImageClassifier(**TINY, targets="soft"), Shapes())
    with pytest.raises(UnsupportedSetup, match="expected hard or soft"):
        ImageClassifier(**TINY, targets="fuzzy")


def test_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = votes_of(tmp_path / "v.csv")
    (tmp_path / "given.yaml").write_text(
        f"""
trainer: {{max_epochs: 1, accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false,
  enable_model_summary: false}}
model:
  class_path: lightning_soup.modules.ImageClassifier
  init_args: {{model_name: {TINY["model_name"]}, img_size: 8, in_chans: 1, num_classes: 3, targets: soft,
    model_args: {TINY["model_args"]}}}
data:
  class_path: lightning_soup.data.CrowdDataModule
  init_args:
    votes: {path}
    items: {{class_path: tests.data.test_crowd.NamedShapes}}
    method: centroid
"""
    )
    cli = SoupCLI(["fit", "--config", "given.yaml"])
    assert cli.trainer.callback_metrics["val_loss"].isfinite()
