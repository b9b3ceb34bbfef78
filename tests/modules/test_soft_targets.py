"""Soft targets: the loss, and ImageClassifier that learns from them with everything else that it can do."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_soup.callbacks import ModelSoup
from lightning_soup.data import CrowdDataModule
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.classifier import ImageClassifier
from lightning_soup.modules.soft_targets import are_soft, soft_target_kl
from lightning_soup.recipes import UniformSoup
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks
from tests.modules.test_classifier import TINY, Shapes, weights

P = torch.tensor([[0.75, 0.25, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
LOGITS = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
SOFT = {**TINY, "targets": "soft"}


class Crowd(CrowdDataModule):
    """Votes of three workers on the images of Shapes: the third is wrong on every fourth."""

    def __init__(self, folder, **options):
        path = folder / "votes.csv"
        rows = [(i, w, (i % 3 + (w == 2 and i % 4 == 0)) % 3) for i in range(48) for w in range(3)]
        path.write_text("task,worker,label\n" + "".join(f"{i},{w},{y}\n" for i, w, y in rows))
        super().__init__(NamedShapes(), str(path), **options)


class NamedShapes(Shapes):
    num_classes = 3


def fit(data, model=None, **options):
    seed_everything(0, verbose=False)
    model = model or ImageClassifier(**SOFT)
    trainer = quiet_trainer(**{"max_epochs": 2, **options})
    trainer.fit(model, datamodule=data)
    return trainer, model


def test_golden_loss():
    assert F.cross_entropy(LOGITS, P, reduction="none") == pytest.approx(torch.tensor([0.657606, 0.239545]), abs=1e-6)
    each = [soft_target_kl(LOGITS[i : i + 1], P[i : i + 1]).item() for i in range(2)]
    assert each == pytest.approx([0.095271, 0.239545], abs=1e-6)
    assert soft_target_kl(LOGITS, P).item() == pytest.approx(0.167407793, abs=1e-9)


def test_its_gradient_is_that_of_cross_entropy():
    logits = LOGITS.clone().requires_grad_()
    ours = torch.autograd.grad(soft_target_kl(logits, P), logits)[0]
    theirs = torch.autograd.grad(F.cross_entropy(logits, P), logits)[0]
    torch.testing.assert_close(ours, theirs)
    assert soft_target_kl(P.clamp_min(1e-30).log(), P).item() == pytest.approx(0, abs=1e-12)


def test_one_hot_targets_are_cross_entropy_with_smoothing_too():
    logits, targets = torch.randn(6, 4), torch.randint(4, (6,))
    rows = F.one_hot(targets, 4).float()
    torch.testing.assert_close(soft_target_kl(logits, rows), F.cross_entropy(logits, targets))
    smooth = 0.9 * rows + 0.1 / 4
    entropy = -(smooth * smooth.log()).sum(1).mean()
    found = soft_target_kl(logits, rows, label_smoothing=0.1)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets, label_smoothing=0.1) - entropy)


def test_weights_of_classes_go_by_the_likeliest_one():
    found = soft_target_kl(LOGITS, P, class_weights=[3.0, 0.5, 100.0])
    assert found.item() == pytest.approx((3 * 0.095271 + 0.5 * 0.239545) / 2, abs=1e-6)


def test_16_bits_are_summed_in_32():
    found = soft_target_kl(LOGITS.bfloat16(), P.bfloat16())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(0.1674078, abs=1e-3)


@pytest.mark.parametrize("targets", [torch.tensor([0, 1]), P[:, :2], P.long()])
def test_targets_that_are_no_rows(targets):
    with pytest.raises(UnsupportedSetup, match=r"expected rows of probabilities .* set targets: hard"):
        soft_target_kl(LOGITS, targets)
    assert are_soft(P)
    assert not are_soft(P.long())


def test_it_learns_from_a_crowd(tmp_path):
    trainer, model = fit(Crowd(tmp_path), max_epochs=8)
    assert trainer.callback_metrics["val_acc"] == 1
    first, second = trainer.test(model, datamodule=Crowd(tmp_path), verbose=False)
    assert first["test_acc"] == 1
    assert "test_acc/dark" in second


def test_the_step_is_the_loss_of_the_rows(tmp_path):
    data = Crowd(tmp_path)
    data.setup("fit")
    images, rows = next(iter(data.train_dataloader()))
    seed_everything(0, verbose=False)
    model = ImageClassifier(**SOFT).eval()
    loss = model.training_step((images, rows), 0)
    torch.testing.assert_close(loss, soft_target_kl(model(images), rows))


def test_one_hot_labels_train_as_class_numbers_do(tmp_path):
    """The third worker is outvoted, so the majority is the truth."""
    _, soft = fit(Crowd(tmp_path, method="majority"), seeded(SOFT))
    _, hard = fit(Shapes(), seeded(TINY))
    torch.testing.assert_close(weights(soft), weights(hard), atol=1e-5, rtol=1e-4)


def seeded(options):
    seed_everything(0, verbose=False)
    return ImageClassifier(**options)


def test_mixup_smoothing_sizes_and_weights_together(tmp_path):
    options = {"mixup": 0.4, "label_smoothing": 0.1, "train_sizes": [8, 12], "token_budget": 1.0}
    model = seeded({**SOFT, **options, "class_weights": [1.0, 2.0, 0.5]})
    trainer, model = fit(Crowd(tmp_path), model, max_epochs=1)
    assert math.isfinite(trainer.callback_metrics["train_loss"])
    images, rows = torch.rand(8, 1, 8, 8), torch.rand(8, 3).softmax(1)
    model.hparams.train_sizes, model.train_sizes = None, None
    model.eval()
    torch.manual_seed(4)
    found = model.training_loss((images, rows))
    torch.manual_seed(4)
    blend = torch.distributions.Beta(0.4, 0.4).sample()
    partner = torch.randperm(8)
    logits = model(torch.lerp(images[partner], images, blend))
    parts = [soft_target_kl(logits, targets, 0.1, [1.0, 2.0, 0.5]) for targets in (rows, rows[partner])]
    torch.testing.assert_close(found, blend * parts[0] + (1 - blend) * parts[1])


def test_an_adapter_learns_from_a_crowd(tmp_path):
    pytest.importorskip("peft")
    _, model = fit(Crowd(tmp_path), seeded({**SOFT, "lora": {"r": 2, "targets": ["qkv"]}}), max_epochs=1)
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in model.named_parameters())


def test_validation_on_rows(tmp_path):
    data = Crowd(tmp_path, val_fraction=0.25)
    trainer, model = fit(data)
    images, rows = data._val.items.tensors[0][data._val.indices], data._val.rows
    with torch.no_grad():
        logits = model.eval()(images)
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(F.cross_entropy(logits, rows).item(), abs=1e-5)
    right = (logits.argmax(1) == rows.argmax(1)).float().mean().item()
    assert trainer.callback_metrics["val_acc"].item() == pytest.approx(right)
    assert len({len(row[row > 0.01]) for row in rows}) > 1  # some are soft


def test_a_test_goes_without_the_table(tmp_path):
    data, model = Crowd(tmp_path), seeded(SOFT)
    (tmp_path / "votes.csv").unlink()
    trainer = quiet_trainer(max_epochs=1)
    assert trainer.test(model, datamodule=data, verbose=False)[0]["test_acc"] >= 0
    assert trainer.validate(model, datamodule=data, verbose=False)[0]["val_acc"] >= 0
    with pytest.raises(UnsupportedSetup, match=r"votes\.csv: there is no such file"):
        trainer.fit(model, datamodule=data)
    by_crowd = Crowd(tmp_path, val_fraction=0.25)
    trainer.validate(model, datamodule=by_crowd, verbose=False)
    assert (tmp_path / ".soft_labels").is_dir()  # kept for the next time


def test_balanced_weights_are_those_of_the_data(tmp_path):
    data = Crowd(tmp_path)
    _, model = fit(data, seeded({**SOFT, "class_weights": "balanced"}), max_epochs=1)
    assert model.class_weights == data.class_weights
    with pytest.raises(UnsupportedSetup, match=r"class_weights=balanced: there is NamedShapes, which knows none"):
        fit(NamedShapes(), seeded({**SOFT, "class_weights": "balanced"}))


def test_a_classifier_of_class_numbers_refuses_them_before_it_begins(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"Crowd trains on rows of probabilities, .* Set targets: soft"):
        fit(Crowd(tmp_path), seeded(TINY))


def test_a_head_with_more_classes_than_the_rows_is_refused_before_it_begins(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"rows of the data have 3 classes, .* model 5: .* Set num_classes=3"):
        fit(Crowd(tmp_path), seeded({**SOFT, "num_classes": 5}))
    fit(NamedShapes(), seeded({**TINY, "num_classes": 5}), max_epochs=1)  # class numbers may be fewer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "fuzzy"}, "targets='fuzzy': expected hard"),
        ({"class_weights": [1.0, 1.0, 1.0]}, "are for soft targets"),
        ({"targets": "soft", "class_weights": [1.0, 1.0]}, "expected 3 numbers of 0 or more"),
        ({"targets": "soft", "class_weights": [1.0, 1.0, -1.0]}, "expected 3 numbers of 0 or more"),
        ({"targets": "soft", "class_weights": "even"}, "or balanced"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        ImageClassifier(**{**TINY, **options})


def test_a_checkpoint_knows_its_targets(tmp_path):
    trainer, model = fit(Crowd(tmp_path), seeded({**SOFT, "class_weights": "balanced"}), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "end.ckpt")
    assert (again.hparams.targets, again.hparams.class_weights) == ("soft", "balanced")
    assert torch.equal(weights(again), weights(model))


def test_a_soup_of_trainings_on_a_crowd(tmp_path):
    kept = ModelCheckpoint(tmp_path / "kept", monitor="val_acc", mode="max", save_top_k=2)
    soup = ModelSoup(UniformSoup())
    fit(Crowd(tmp_path), max_epochs=3, callbacks=[kept, soup], enable_checkpointing=True)
    assert len(soup.soup.coefficients) == 2


def two_ranks(folder):
    data = Crowd(folder)
    _, model = fit(data, max_epochs=1, devices=2, strategy="ddp")
    return weights(model), data.labels


def test_two_ranks_have_the_same_labels(tmp_path):
    (first, labels), (second, others) = run_on_two_ranks(two_ranks, tmp_path)
    assert torch.equal(first, second)
    assert torch.equal(labels, others)
    assert len(list((tmp_path / ".soft_labels").iterdir())) == 1
