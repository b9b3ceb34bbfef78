"""CLIPClassifier at rest and mixed: checkpoints, starts, soups, averages."""

import copy
import json
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_soup.callbacks import EqualAverage
from lightning_soup.cli.trainer import SoupTrainer
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.modules import CLIPClassifier
from lightning_soup.recipes import InterpolatedSoup, LearnedSoup
from lightning_soup.weights import combine, open_checkpoint, save_weights
from tests.helpers.clip import ROWS, TINY_CLIP, WAYS, RowData, Unnamed, changed, fit_clip, some_images, state, tiny_clip
from tests.helpers.trainers import quiet_trainer


@pytest.mark.parametrize(("train", "head"), WAYS)
def test_checkpoints_need_nothing_but_their_file(train, head, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(TINY_CLIP))
    (tmp_path / "names.txt").write_text("\n".join(ROWS))
    model = tiny_clip(
        train=train, head=head, model_config=str(tmp_path / "config.json"), classnames=str(tmp_path / "names.txt")
    )
    saver = ModelCheckpoint(tmp_path / "out")
    fit_clip(model, callbacks=[saver], enable_checkpointing=True)
    for name in ("config.json", "names.txt"):
        (tmp_path / name).unlink()
    monkeypatch.setattr(CLIPClassifier, "_start_head", lambda *_: pytest.fail("built a head that is loaded"))
    back = CLIPClassifier.load_from_checkpoint(saver.best_model_path)
    assert back.classnames == ROWS
    assert back.hparams.train == train
    with torch.no_grad():
        assert torch.equal(back.eval()(some_images()), model.eval()(some_images()))
    torch.load(saver.best_model_path, weights_only=True)


def test_other_classes_are_kept_in_checkpoints(tmp_path):
    model = tiny_clip(train="head", templates="simple")
    model.set_classes(["red", "green"], ["{} things"])
    trainer = quiet_trainer(max_epochs=1)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    back = CLIPClassifier.load_from_checkpoint(tmp_path / "x.ckpt")
    assert back.train_template == "a photo of a {}."
    with torch.no_grad():
        assert torch.equal(back.eval()(some_images()), model.eval()(some_images()))


def test_a_trained_soup_judges_other_classes_by_its_text_tower(tmp_path):
    model = tiny_clip(train="image")
    saver = ModelCheckpoint(tmp_path)
    fit_clip(model, callbacks=[saver], enable_checkpointing=True, max_epochs=1)
    others = ["red", "green", "blue", "white"]
    loaded = CLIPClassifier.load_from_checkpoint(saver.best_model_path, head="text", classnames=others)
    fresh = tiny_clip(train="image", head="text", classnames=others, checkpoint_path=saver.best_model_path)
    model.set_classes(others)
    assert model.head is None
    assert model.num_classes == 4
    with torch.no_grad():
        assert torch.equal(loaded.eval()(some_images()), model.eval()(some_images()))
        assert torch.equal(fresh.eval()(some_images()), model(some_images()))
    with pytest.raises(
        UnsupportedSetup, match="The checkpoint has a head for 3 classes of dimension 16, but classnames names 4"
    ):
        CLIPClassifier.load_from_checkpoint(saver.best_model_path, classnames=others)


def test_a_trained_head_of_the_same_classes_in_another_order(tmp_path):
    model = tiny_clip(train="image")
    saver = ModelCheckpoint(tmp_path)
    fit_clip(model, callbacks=[saver], enable_checkpointing=True, max_epochs=1)
    path, moved = saver.best_model_path, ["Middle", "top", "bottom"]
    message = r"has a head trained with 'Middle' as class 1, but classnames has it as class 0\. .*top, middle, bottom"
    with pytest.raises(UnsupportedSetup, match=r"\.ckpt " + message):
        tiny_clip(train="image", checkpoint_path=path, classnames=moved)
    with pytest.raises(UnsupportedSetup, match="The checkpoint " + message):
        quiet_trainer().validate(tiny_clip(train="image", classnames=moved), Unnamed(), ckpt_path=path)
    tiny_clip(train="image", checkpoint_path=path, classnames=moved, reset_head=True)
    tiny_clip(train="image", checkpoint_path=path, classnames=["upper", "middle", "lower"])  # other words for them
    with pytest.warns(UserWarning, match=r"trained for top, middle, bottom, and none of them .*take head='text'"):
        tiny_clip(train="image", checkpoint_path=path, classnames=["red", "green", "blue"])


@pytest.mark.parametrize("file", ["start.safetensors", "start.pt"])
def test_starting_from_a_checkpoint(file, tmp_path):
    probe = tiny_clip(1, train="head")
    fit_clip(probe, max_epochs=1)
    path = str(tmp_path / file)
    torch.save(probe.state_dict(), path) if file.endswith("pt") else save_weights(probe, path)
    taken = tiny_clip(2, train="image", checkpoint_path=path)
    assert all(torch.equal(value, probe.state_dict()[name]) for name, value in taken.state_dict().items())
    anew = tiny_clip(2, train="image", checkpoint_path=path, reset_head=True)
    assert torch.equal(anew.head.weight, tiny_clip(1, train="image").head.weight)
    assert taken.hparams.checkpoint_path is None
    with pytest.raises(UnsupportedSetup, match=r"start\.\w+ has a head for 3 classes .*reset_head=True"):
        tiny_clip(2, train="image", checkpoint_path=path, classnames=["a", "b"])
    assert tiny_clip(2, train="image", checkpoint_path=path, classnames=["a", "b"], reset_head=True).num_classes == 2


def test_starting_from_a_bare_model_of_an_older_version(tmp_path):
    old = tiny_clip(1).model.state_dict()
    mask = torch.full((12, 12), float("-inf")).triu(1)
    torch.save({**old, "attn_mask": mask, "context_length": torch.tensor(12)}, tmp_path / "old.pt")
    model = tiny_clip(2, checkpoint_path=str(tmp_path / "old.pt"))
    assert not changed(model.model, old)
    config = {**TINY_CLIP, "embed_dim": 24}
    with pytest.raises(UnsupportedSetup, match=r"(?s)does not fit the model.*was built: model_name or model_config"):
        tiny_clip(2, checkpoint_path=str(tmp_path / "old.pt"), model_config=config)


def test_causal_masks_survive_soups(tmp_path):
    """Versions that keep the mask in the weights: its −∞ must neither become NaN nor be refused."""
    paths = []
    for seed in (1, 2):
        model = tiny_clip(seed).model
        model.register_buffer("attn_mask", model.attn_mask.clone())  # persistent, as it was
        assert model.attn_mask.isinf().any()
        paths.append(save_weights(model, tmp_path / f"{seed}.safetensors"))
    out = tmp_path / "soup.safetensors"
    combine([open_checkpoint(path) for path in paths], [0.3, 0.7], out)
    soup = open_checkpoint(out)
    assert torch.equal(soup["attn_mask"], model.attn_mask)
    model.load_state_dict(dict(soup))
    tokens = tiny_clip().tokenize(["a cat"])
    assert model.encode_text(tokens).isfinite().all()


def test_wise_ft_end_to_end(tmp_path):
    options = {"train": "image", "head": "trained"}
    start = tiny_clip(**options)
    save_weights(start, tmp_path / "start.safetensors")
    paths = []
    for number, lr in enumerate((4e-3, 6e-3)):
        saver = ModelCheckpoint(tmp_path / str(number))
        model = tiny_clip(9, checkpoint_path=str(tmp_path / "start.safetensors"), **{**options, "lr": lr})
        assert not changed(model, state(start))
        fit_clip(model, callbacks=[saver], enable_checkpointing=True, max_epochs=6)
        paths.append(saver.best_model_path)
    trainer = SoupTrainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module = tiny_clip(5, **options)
    soup = trainer.soup(
        module,
        RowData(),
        ingredients=paths,
        recipe=InterpolatedSoup(),
        init=str(tmp_path / "start.safetensors"),
        output=str(tmp_path / "wise.ckpt"),
    )
    alphas = {trial.values["alpha"]: trial.score for trial in soup.history}
    assert len(alphas) == 11
    assert soup.score == max(alphas.values())
    assert alphas[1.0] > alphas[0.0]
    evaluator = ModuleEvaluator(tiny_clip(3, **options), RowData())
    assert evaluator.score(state(start)) == alphas[0.0]
    chosen = next(alpha for alpha, score in alphas.items() if score == soup.score)
    ends = [open_checkpoint(path) for path in paths]
    for name, value in module.state_dict().items():
        mean = (ends[0][name].double() + ends[1][name].double()) / 2
        expected = (1 - chosen) * start.state_dict()[name].double() + chosen * mean
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    back = tiny_clip(7, checkpoint_path=str(tmp_path / "wise.ckpt"), **options)
    with torch.no_grad():
        assert torch.equal(back.eval()(some_images()), module.eval()(some_images()))
    report = json.loads((tmp_path / "wise_report" / "report.json").read_text())
    assert {point["alpha"] for point in report["curve_points"]} == {i / 10 for i in range(11)}


def test_fine_tunes_on_other_classes_average_under_text_heads(tmp_path):
    """Without a trained head the tensors are the same whatever the classes, and the soup is judged on both."""
    start = tiny_clip(train="image", head="text")
    save_weights(start, tmp_path / "start.safetensors")
    ends = []
    for names in (ROWS, ["one", "two", "three"]):
        model = tiny_clip(
            9, train="image", head="text", classnames=names, checkpoint_path=str(tmp_path / "start.safetensors")
        )
        fit_clip(model, RowData(names), max_epochs=8)
        ends.append(state(model))
    soup = combine(ends, [0.5, 0.5])
    for names in (ROWS, ["one", "two", "three"]):
        judge = tiny_clip(9, train="image", head="text", classnames=names)
        evaluator = ModuleEvaluator(judge, RowData(names))
        assert evaluator.score(soup) > evaluator.score(state(start))


def test_copies_and_pickles():
    model = tiny_clip(train="image").eval()
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(some_images()), model(some_images()))


@pytest.mark.parametrize(("train", "head"), WAYS[:2])
def test_a_live_average_is_what_validation_scores_and_what_is_left(train, head):
    model = tiny_clip(train=train, head=head)
    trainer = fit_clip(model, callbacks=[EqualAverage()], max_epochs=3)
    (result,) = quiet_trainer().validate(model, datamodule=RowData(), verbose=False)
    assert result["val_loss"] == pytest.approx(trainer.callback_metrics["val_loss"].item(), abs=1e-6)


@pytest.mark.parametrize(("train", "head"), WAYS[:2])
def test_learned_soups(train, head):
    start = tiny_clip(train=train, head=head)
    ends = []
    for seed in (1, 2):
        model = copy.deepcopy(start)
        fit_clip(model, max_epochs=2 * seed)
        ends.append(state(model))
    evaluator = ModuleEvaluator(start, RowData())
    assert evaluator.head() == (("head.weight", "head.bias") if head == "trained" else ())
    soup = LearnedSoup(epochs=2, batch_size=8).cook(ends, evaluator)
    if head == "text":  # elsewhere β scales the head
        assert sum(soup.shares()) == pytest.approx(1.0, abs=1e-5)
    assert soup.score >= min(evaluator.score(end) for end in ends)
