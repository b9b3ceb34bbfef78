import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_soup.callbacks import WeightEnsemble
from lightning_soup.data.reference import Reference
from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.modules import ZSCL
from lightning_soup.modules.clip_head import text_parameters
from lightning_soup.modules.optimization import warmup_cosine
from lightning_soup.weights import open_checkpoint
from tests.helpers.clip import RowData, changed, fit_clip, some_images, state
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks
from tests.helpers.zscl import TEXTS, noise, reference, tiny_zscl, write_teacher


@pytest.fixture
def teacher(tmp_path):
    return write_teacher(tmp_path)


class InOrder(RowData):
    """The same batches in every epoch, as a run that is resumed sees them."""

    def train_dataloader(self):
        return DataLoader(self.train, 8)


def ready(model):
    """A model as it is when training begins, without training it."""
    trainer = quiet_trainer(max_steps=0)
    trainer.fit(model, datamodule=RowData())
    return model


def batch():
    return some_images(), torch.tensor([0, 1, 2, 0])


def by_hand(model, old, images, text_side="teacher", temperature=2.0):
    """L_img and L_txt, one formula at a time."""
    tokens = model.tokenize(TEXTS)
    f_t, s_t = old.encode_image(images, normalize=True), old.encode_text(tokens, normalize=True)
    f_s = model.model.encode_image(images, normalize=True)
    s_s = s_t if text_side == "teacher" else model.model.encode_text(tokens, normalize=True)
    scale = model.model.logit_scale.exp()
    z_t, z_s = (scale * f_t @ s_t.T).detach(), scale * f_s @ s_s.T
    losses = []
    for a, b in ((z_t, z_s), (z_t.T, z_s.T)):
        rows = -(F.softmax(a / temperature, 1) * F.log_softmax(b / temperature, 1)).sum(1)
        losses.append(temperature**2 * rows.mean())
    return losses


@pytest.mark.parametrize("text_side", ["teacher", "student"])
def test_the_loss_is_that_of_the_paper(teacher, text_side):
    model = ready(tiny_zscl(1, teacher=teacher, text_side=text_side, distillation=0.5, consolidation=0.1))
    start = state(model)
    old = tiny_zscl(0).model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    images = next(reference().batches())
    l_img, l_txt = by_hand(model, old, images, text_side)
    l_wc = sum((value - start[name]).square().sum() for name, value in model.named_parameters())
    logits = model(batch()[0])
    expected = F.cross_entropy(logits, batch()[1], label_smoothing=0.2) + 0.5 * (l_img + l_txt) + 0.1 * l_wc
    torch.testing.assert_close(model.training_loss(batch()), expected)


@pytest.mark.parametrize(("text_side", "moves"), [("teacher", False), ("student", True)])
def test_in_teacher_mode_distillation_leaves_the_text_tower_alone(teacher, text_side, moves):
    model = ready(tiny_zscl(1, teacher=teacher, text_side=text_side))
    sum(model._distillation()).backward()
    found = [p.grad for p in text_parameters(model.model) if p.grad is not None and p.grad.abs().sum() > 0]
    assert bool(found) is moves
    assert model.model.visual.proj.grad.norm() > 0


def test_defaults_are_those_of_the_paper():
    hparams = tiny_zscl(lr=1e-5, warmup=100).hparams
    assert hparams.betas == (0.9, 0.999)
    assert [hparams[name] for name in ("distillation", "consolidation", "temperature", "weight_decay")] == [1, 1, 2, 0]
    assert (hparams.label_smoothing, hparams.text_side, hparams.texts_per_step) == (0.2, "teacher", None)
    signature = ZSCL.__init__.__kwdefaults__ or dict(
        zip(ZSCL.__init__.__code__.co_varnames[1:], ZSCL.__init__.__defaults__, strict=False)
    )
    assert (signature["lr"], signature["warmup"]) == (1e-5, 100)


def test_golden_schedule():
    rates = {step: warmup_cosine(step, 100, 1000) for step in (0, 49, 99, 100, 550, 1000)}
    assert rates == pytest.approx({0: 0.01, 49: 0.5, 99: 1, 100: 1, 550: 0.5, 1000: 0}, abs=1e-10)


def test_the_teacher_is_nowhere_in_the_module(teacher, tmp_path):
    model = tiny_zscl(1, teacher=teacher)
    names = set(model.state_dict())
    trainer = fit_clip(model, max_epochs=1)
    assert set(model.state_dict()) == names
    assert all(module is not model._teacher.model for module in model.modules())
    frozen = {id(parameter) for parameter in model._teacher.model.parameters()}
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not frozen & (optimized | {id(parameter) for parameter in model.parameters()})
    assert not any(parameter.requires_grad for parameter in model._teacher.model.parameters())
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    assert set(stored["state_dict"]) == names
    assert stored["zscl"]["teacher"] == model._teacher.digest
    assert "reference" not in stored["hyper_parameters"]


def test_the_teacher_of_the_second_task_is_the_model_before_the_first(teacher, tmp_path):
    first = tiny_zscl(0, teacher=teacher)
    initial = state(first.model)
    trainer = fit_clip(first, callbacks=[WeightEnsemble(every=3)])
    path = str(tmp_path / "task-1.ckpt")
    trainer.save_checkpoint(path, weights_only=True)
    second = tiny_zscl(7, teacher=teacher, checkpoint_path=path)
    assert changed(second.model, initial)
    assert not changed(second.model, {k.removeprefix("model."): v for k, v in open_checkpoint(path).items()})
    fit_clip(second)
    assert not changed(second._teacher.model, initial)
    assert changed(second.model, initial)
    assert second._teacher.digest == first._teacher.digest


def test_the_next_task_starts_from_the_weight_ensemble(teacher, tmp_path):
    model = tiny_zscl(0, teacher=teacher)
    start = state(model)
    trail = []
    model.on_train_batch_end = lambda *_: trail.append(state(model))
    trainer = fit_clip(model, max_epochs=1, callbacks=[WeightEnsemble(every=2)])
    path = str(tmp_path / "end.ckpt")
    trainer.save_checkpoint(path, weights_only=True)
    again = tiny_zscl(3, checkpoint_path=path)
    terms = [start, trail[0], trail[2], trail[4]]  # six steps: k = 0, 2, 4
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, sum(term[name] for term in terms) / 4, atol=1e-6, rtol=0)


def test_start_as_the_teacher_is_the_model_of_the_task_before(teacher, tmp_path):
    path = write_teacher(tmp_path, seed=4)
    model = tiny_zscl(0, checkpoint_path=path, teacher="start", reference="task", consolidation=0)
    fit_clip(model, max_epochs=1)
    assert not changed(model._teacher.model, dict(open_checkpoint(path)))
    assert model._held_to.texts == ["the top row", "the middle row", "the bottom row"]
    assert len(model._held_to.images) == 48
    assert model._held_to.batch_size == 8


def test_training_is_the_same_with_a_teacher_and_without_as_far_as_chance_goes(teacher):
    seen = []

    def orders(model):
        order = []
        model.on_train_batch_start = lambda batch, index: order.append(batch[1].tolist())
        fit_clip(model)
        seen.append(order)

    orders(tiny_zscl(0, teacher=teacher))
    orders(tiny_zscl(0, distillation=0, consolidation=0, reference=None))
    assert seen[0] == seen[1]


def test_plain_fine_tuning_needs_neither_teacher_nor_reference():
    model = tiny_zscl(distillation=0, consolidation=0, reference=None)
    trainer = fit_clip(model, max_epochs=20)
    assert trainer.callback_metrics["val_acc"] > 0.9
    assert model._teacher is None


def test_distillation_and_consolidation_hold_it_back(teacher):
    """Similarities of the reference move less with distillation, weights less with consolidation."""

    def moved(**options):
        model = tiny_zscl(0, teacher=teacher, **options)
        before = state(model)
        fit_clip(model, max_epochs=8)
        l_img, _ = by_hand(model.eval(), tiny_zscl(0).model, noise())
        weights = sum((value - before[name]).square().sum().item() for name, value in model.state_dict().items())
        return l_img.item(), weights

    free, distilled = moved(distillation=0, consolidation=0), moved(consolidation=0)
    held = moved(distillation=0)
    floor = by_hand(tiny_zscl(0), tiny_zscl(0).model, noise())[0].item()
    assert distilled[0] - floor < 0.3 * (free[0] - floor)
    assert held[1] < 0.3 * free[1]


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "options",
    [{}, {"texts_per_step": 2}, {"text_side": "student"}, {"reference": "task"}],
    ids=["all", "some texts", "student", "task"],
)
@pytest.mark.parametrize("step", [6, 12])  # a plain loader begins an interrupted epoch anew
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint")
def test_resuming_is_bit_exact(teacher, tmp_path, options, step):
    def train(path=None, **trainer_options):
        model = tiny_zscl(0, teacher=teacher, **options)
        callbacks = [WeightEnsemble(every=2)]
        if path is None:
            callbacks.append(ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}"))
        trainer = quiet_trainer(max_epochs=3, callbacks=callbacks, **trainer_options)
        trainer.fit(model, datamodule=InOrder(), ckpt_path=path)
        return model

    whole = train(enable_checkpointing=True)
    resumed = train(str(tmp_path / f"step={step}.ckpt"))
    assert not changed(resumed, state(whole))
    assert resumed._position == whole._position == 18
    if options.get("reference") != "task":
        assert torch.equal(next(resumed._batches), next(whole._batches))


def test_a_second_fit_starts_anew(teacher):
    model = tiny_zscl(0, teacher=teacher)
    fit_clip(model, max_epochs=1)
    after = state(model)
    fit_clip(model, max_epochs=0)
    assert model._position == 0
    assert all(torch.equal(value, after[name]) for name, value in model._start.items())


def test_another_teacher_is_noticed_on_resuming(teacher, tmp_path):
    trainer = fit_clip(tiny_zscl(0, teacher=teacher))
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(UnsupportedSetup, match=r"was trained with the teacher xxh3.*Give the same teacher"):
        quiet_trainer(max_epochs=3).fit(
            tiny_zscl(0, teacher=write_teacher(tmp_path, 5)), datamodule=RowData(), ckpt_path=path
        )


def test_a_checkpoint_needs_nothing_but_its_file(teacher, tmp_path):
    model = tiny_zscl(0, teacher=teacher)
    trainer = fit_clip(model)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    back = ZSCL.load_from_checkpoint(path)
    assert not changed(back, state(model))
    assert back.hparams.teacher == teacher
    assert quiet_trainer().test(back, datamodule=RowData(), verbose=False)


# ------------------------------------------------------------------------------------------------- ranks and precisions


def _on_a_rank(teacher):
    model = tiny_zscl(0, teacher=teacher)
    trainer = quiet_trainer(devices=2, strategy="ddp", max_epochs=1, callbacks=[WeightEnsemble(every=2)])
    trainer.fit(model, datamodule=RowData())
    images = next(model._held_to.batches(0, model.global_rank))
    ddp = trainer.strategy.model
    inside = sum(parameter.numel() for parameter in (ddp or model).parameters())
    return {name: value.tolist() for name, value in model.state_dict().items()}, images.sum().item(), inside


def test_a_checkpoint_names_no_option_that_the_class_lacks(teacher, tmp_path):
    """LightningCLI builds the model of `test --ckpt_path` from all of them."""
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(tiny_zscl(teacher=teacher), datamodule=RowData())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    found = torch.load(tmp_path / "end.ckpt", weights_only=True)["hyper_parameters"]
    assert not found.keys() - inspect.signature(ZSCL).parameters.keys()
    assert found["distillation"] == 1.0


def test_a_file_of_weights_only_holds_no_second_set_of_weights(teacher, tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(tiny_zscl(teacher=teacher), datamodule=RowData())
    for weights_only in (True, False):
        trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=weights_only)
        found = torch.load(tmp_path / "end.ckpt", weights_only=True)
        assert bool(found["zscl"]["start"]) is not weights_only


def test_ranks_agree_and_see_other_reference_images(teacher):
    (first, images, count), (second, others, _) = run_on_two_ranks(_on_a_rank, teacher)
    assert first == second
    assert images != others
    assert count == sum(parameter.numel() for parameter in tiny_zscl().parameters())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_precisions(teacher, precision):
    model = tiny_zscl(0, teacher=teacher)
    trainer = fit_clip(model, max_epochs=1, precision=precision)
    assert torch.isfinite(trainer.callback_metrics["train_loss"])
    assert copy.deepcopy(model._teacher.texts).dtype == model.dtype


# ----------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_side": "both"}, "text_side='both'"),
        ({"texts_per_step": 0}, "texts_per_step=0"),
        ({"distillation": -1.0}, "distillation=-1"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"consolidation": -0.1}, "consolidation=-0.1"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        tiny_zscl(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": None}, "distillation=1.0 needs reference"),
        ({"teacher": None}, "distillation=1.0 needs teacher"),
        ({"teacher": "start"}, "'start' beside checkpoint_path"),
        ({"reference": reference(images=noise(size=12))}, r"reference images do not fit.*\[B, 3, 8, 8\].*3, 12, 12"),
        ({"reference": reference(images=[noise(size=12)[0]])}, "reference images do not fit"),
        ({"reference": reference(images=DataLoader([], 2))}, "no images: DataLoader is empty"),
        ({"classnames": ["up", "down"]}, "data has 3 classes"),
        ({"teacher": "missing.ckpt"}, r"missing\.ckpt"),
        ({"teacher": "openai"}, "openai"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_training(teacher, options, message, monkeypatch):
    model = tiny_zscl(**{"teacher": teacher, **options})
    monkeypatch.setattr(model, "training_step", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(LightningSoupError, match=message):
        quiet_trainer(max_steps=1).fit(model, datamodule=RowData())


def test_a_teacher_of_another_architecture(tmp_path):
    from tests.helpers.clip import TINY_CLIP

    torch.save(tiny_zscl(model_config={**TINY_CLIP, "embed_dim": 8}).model.state_dict(), tmp_path / "other.pt")
    with pytest.raises(UnsupportedSetup, match="does not fit the model"):
        ready(tiny_zscl(teacher=str(tmp_path / "other.pt")))


def test_an_empty_reference():
    with pytest.raises(UnsupportedSetup, match="no images: Tensor is empty"):
        Reference(torch.zeros(0, 3, 8, 8), TEXTS)
