import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.modules.zero_shot import fill
from lightning_soup.weights import combine
from tests.helpers.clip import ROWS, TINY_CLIP, WAYS, RowData, Unnamed, changed, fit_clip, some_images, state, tiny_clip
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import run_on_two_ranks


def rows_by_hand(model, templates):
    """w_c = normalise(mean_t normalise(e_ct)), one text at a time."""
    rows = []
    for name in model.classnames:
        texts = [
            F.normalize(model.model.encode_text(model.tokenize([t.replace("{}", name)]))[0], dim=0) for t in templates
        ]
        rows.append(F.normalize(torch.stack(texts).mean(0), dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize(("train", "head"), WAYS)
@pytest.mark.parametrize("siglip", [False, True])
def test_untrained_it_is_the_zero_shot_classifier(train, head, siglip):
    config = {**TINY_CLIP, "init_logit_bias": -7.0} if siglip else TINY_CLIP
    model = tiny_clip(train=train, head=head, model_config=config).eval()
    with torch.no_grad():
        features = F.normalize(model.model.encode_image(some_images()), dim=-1)
        expected = model.model.logit_scale.exp() * features @ rows_by_hand(model, model.templates).T
        torch.testing.assert_close(model(some_images()), expected + (-7.0 if siglip else 0.0))
        assert expected.std() > 0.1
    if head == "trained":
        assert model.head.bias.tolist() == [-7.0 if siglip else 0.0] * 3


@pytest.mark.parametrize(("train", "head"), WAYS)
def test_what_learns_and_what_stays(train, head):
    model = tiny_clip(train=train, head=head)
    before = state(model)
    trainer = fit_clip(model, max_epochs=1)
    parts = {
        "visual" if name.startswith("model.visual.") else "head" if name.startswith("head.") else "text"
        for name in changed(model, before)
    }
    assert (
        parts
        == {"both": {"visual", "text"}, "image": {"visual", *(["head"] * (head == "trained"))}, "head": {"head"}}[train]
    )
    assert model.model.logit_scale == before["model.logit_scale"]
    decayed = {
        id(p) for group in trainer.optimizers[0].param_groups if group["weight_decay"] > 0 for p in group["params"]
    }
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert id(model.model.visual.positional_embedding) not in decayed
    assert all(parameter.ndim > 1 for parameter in learning if id(parameter) in decayed)
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(parameter) for parameter in learning}


@pytest.mark.parametrize(("train", "head"), WAYS[:3])
def test_it_learns_and_logs(train, head):
    model = tiny_clip(train=train, head=head)
    trainer = fit_clip(model, max_epochs=20)
    assert trainer.callback_metrics["val_acc"] > 0.9
    assert {"train_loss", "val_loss", "val_acc"} <= trainer.callback_metrics.keys()
    main, dark = trainer.test(model, datamodule=RowData(), verbose=False)
    assert main.keys() == {"test_acc", "test_loss"}
    assert dark.keys() == {"test_acc/dark", "test_loss/dark"}
    with torch.no_grad():
        images, targets = RowData().test[0].tensors
        assert main["test_acc"] == pytest.approx((model.eval()(images).argmax(1) == targets).float().mean().item())


def test_both_towers_train_on_one_sentence_and_are_judged_by_all():
    model = tiny_clip(label_smoothing=0.2)
    images, targets = some_images(), torch.tensor([0, 1, 2, 0])
    features = model.encode_image(images)
    logits = model.logit_scale() * features @ model.encode_text(model.tokenize(fill(ROWS, ["the {} row"]))).T
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2)
    torch.testing.assert_close(model.training_loss((images, targets)), expected)
    model.training_loss((images, targets)).backward()
    assert model.model.token_embedding.weight.grad.norm() > 0
    assert model.model.visual.proj.grad.norm() > 0
    model.eval()
    with torch.no_grad():
        logits = model.logit_scale() * model.encode_image(images) @ rows_by_hand(model, model.templates).T
        torch.testing.assert_close(model.validation_step((images, targets)), F.cross_entropy(logits, targets))
    assert tiny_clip(templates="openai").train_template == "a photo of a {}."
    assert tiny_clip(templates="openai", train_template="my {}").train_template == "my {}"


def test_the_head_follows_whatever_is_written_into_the_text_tower():
    model, other = tiny_clip(0).eval(), tiny_clip(1).eval()
    images = some_images()
    with torch.no_grad():
        first, second = model(images), other(images)
        combine([state(other)], [1.0], model.state_dict())
        assert torch.equal(model(images), second)
        for parameter, value in zip(model.parameters(), tiny_clip(0).parameters(), strict=True):
            parameter.data.copy_(value)  # which torch's version counters do not see
        assert torch.equal(model(images), first)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(images), second)


def test_the_head_is_not_built_anew_for_every_batch(monkeypatch):
    model = tiny_clip()
    built = []
    original = model.class_weights
    monkeypatch.setattr(model, "class_weights", lambda *args: built.append(1) or original(*args))
    quiet_trainer().validate(model, datamodule=RowData(), verbose=False)
    assert len(built) == 1


def test_a_head_made_in_inference_mode_serves_training():
    model = tiny_clip(train="image", head="text")
    with torch.inference_mode():
        model(some_images())
    model.training_loss((some_images(), torch.tensor([0, 1, 2, 0]))).backward()
    assert model.model.visual.proj.grad is not None


def test_the_validation_loss_can_be_differentiated_to_the_text_tower():
    model = tiny_clip().eval()
    model.validation_step((some_images(), torch.tensor([0, 1, 2, 0]))).backward()
    assert model.model.token_embedding.weight.grad.norm() > 0


def test_grey_images_are_repeated_in_three_channels():
    model = tiny_clip().eval()
    grey = some_images()[:, :1]
    with torch.no_grad():
        assert torch.equal(model(grey), model(grey.repeat(1, 3, 1, 1)))


def test_class_weights_of_any_classes_and_templates():
    model = tiny_clip()
    rows = model.class_weights(["cat", "dog"], "openai")
    assert rows.shape == (2, 16)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(2))
    with pytest.raises(UnsupportedSetup, match=r"has no \{\}"):
        model.class_weights(["cat", "dog"], ["a photo"])


def test_class_names_from_the_data():
    model = tiny_clip(classnames=None)
    with pytest.raises(UnsupportedSetup, match="The classes have no names yet"):
        model(some_images())
    fit_clip(model, RowData(["the_top", "b", "c"]), max_epochs=1)
    assert model.classnames == ["the top", "b", "c"]
    quiet_trainer().validate(model, datamodule=RowData(["x", "y", "z"]), verbose=False)
    assert model.classnames == ["x", "y", "z"]
    with pytest.raises(UnsupportedSetup, match="classnames is not given, and there is no data module with class_names"):
        fit_clip(tiny_clip(classnames=None), RowData(None))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["top", "bottom"], r"The data has 2 classes \(top, bottom\), classnames names 3 \(top, middle, bottom\)"),
        (["Top", "bottom", "middle"], r"'middle' as class 1, but in the data it is class 2: the order differs"),
    ],
)
def test_class_names_that_disagree_with_the_data(names, message):
    with pytest.raises(UnsupportedSetup, match=message):
        fit_clip(tiny_clip(), RowData(names))
    fit_clip(tiny_clip(), RowData(["0", "1", "2"]), max_epochs=1, limit_train_batches=1)  # numbers say nothing


def test_class_names_of_which_the_data_has_none():
    with pytest.warns(
        UserWarning, match=r"No class of the data \(red, green, blue\) is in classnames \(top, .*ckpt_path"
    ):
        quiet_trainer().validate(tiny_clip(), RowData(["red", "green", "blue"]), verbose=False)


def test_images_of_the_wrong_size_are_refused_before_a_step():
    model = tiny_clip()
    before = state(model)
    with pytest.raises(UnsupportedSetup, match=r"takes images \[B, 3, 8, 8\], the data gives \[8, 3, 12, 12\]"):
        fit_clip(model, RowData(size=12), num_sanity_val_steps=0)
    assert not changed(model, before)
    with pytest.raises(UnsupportedSetup, match=r"the data gives \[4, 2, 8, 8\]"):
        model(torch.rand(4, 2, 8, 8))


def test_classes_that_compete_on_a_test_set():
    data = RowData()
    data.test_classes = {"dark": [[0, 1], [2]]}
    model = tiny_clip().eval()
    _, dark = quiet_trainer().test(model, datamodule=data, verbose=False)
    with torch.no_grad():
        images, targets = data.test[1].tensors
        logits = model(images)
    logits, targets = torch.stack([logits[:, :2].amax(1), logits[:, 2]], 1), (targets == 2).long()
    assert dark["test_acc/dark"] == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert dark["test_loss/dark"] == pytest.approx(F.cross_entropy(logits, targets).item(), abs=1e-5)
    outcome = ModuleEvaluator(model, data).outcomes(state(model))["dark"]
    assert outcome.accuracy == pytest.approx(dark["test_acc/dark"])


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([[0], [1], [2, 3]], r"training classes \[3\], but the model has 3"),
        ([[0, 1], [1, 2]], r"training classes \[1\] belong to two"),
        ([[0, 1], [2], []], "each with at least one training class"),
    ],
)
def test_competing_classes_that_cannot_work(classes, message):
    data = RowData()
    data.test_classes = {"dark": classes}
    with pytest.raises(LightningSoupError, match=message):
        quiet_trainer().test(tiny_clip(), datamodule=data, verbose=False)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(("train", "head"), WAYS[:3])
def test_low_precision(precision, train, head):
    trainer = fit_clip(tiny_clip(train=train, head=head), precision=precision, max_epochs=12)
    assert trainer.callback_metrics["val_acc"] > 0.6


@pytest.mark.parametrize(("train", "head"), WAYS[:3])
def test_in_mixed_precision_the_head_works_in_full(train, head):
    """Rounding the logits to bfloat16 makes classes tie: near 25, its steps are 1/8."""
    model = tiny_clip(train=train, head=head, model_config={**TINY_CLIP, "init_logit_bias": -7.0}).eval()
    images = some_images(64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, features = model(images), model.encode_image(images)
    with torch.no_grad():
        rows = model.logit_scale() * model.class_weights(ROWS, model.templates)
        assert features.dtype == torch.bfloat16  # the towers are in it
        torch.testing.assert_close(logits, features.float() @ rows.T - 7.0)
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize(("train", "head"), WAYS[:3])
def test_a_compiled_model_learns_the_same(train, head):
    plain, compiled = tiny_clip(train=train, head=head), tiny_clip(train=train, head=head)
    compiled.model = torch.compile(compiled.model, backend="eager")
    for model in (plain, compiled):
        fit_clip(model, max_epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), compiled.parameters(), strict=True))


def test_a_training_sentence_that_is_cut_before_the_name():
    with pytest.raises(UnsupportedSetup, match=r"'top' and 'middle' become the same tokens"):
        fit_clip(tiny_clip(train_template="one word " * 20 + "{}"), num_sanity_val_steps=0)


def test_classes_of_one_name_may_be_two_folders():
    with pytest.warns(UserWarning, match="several classes have one name"):
        model = tiny_clip(classnames=["crane", "crane", "bottom"], train="image")
    fit_clip(model, RowData(["crane", "crane_machine", "bottom"]), max_epochs=1, limit_train_batches=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "text"}, r"train='text': expected one of both, image, head"),
        ({"head": "linear"}, r"head='linear': expected one of text, trained"),
        ({"train": "both", "head": "trained"}, r"the text tower, which would learn nothing"),
        ({"train": "head", "head": "text"}, r"nothing would be trained"),
        ({"train": "image", "classnames": None}, r"head='trained' needs classnames"),
        ({"classnames": []}, r"expected the names of at least two classes"),
        ({"templates": ["a photo"]}, r"has no \{\}"),
        ({"train_template": "a photo"}, r"has no \{\}"),
        ({"lr": 0.0}, r"lr=0\.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0"),
        ({"train": "image", "head_device": "gpu"}, r"head_device='gpu' cannot be used: .* Expected auto, cpu"),
        ({"train": "image", "head_device": "cuda:77"}, r"head_device='cuda:77' cannot be used"),
        ({"pretrained": "openai"}, r"pretrained='openai' beside model_config"),
        ({"model_config": None, "pretrained": "openai", "checkpoint_path": "x.pt"}, r"beside checkpoint_path='x\.pt'"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        tiny_clip(**options)


def test_importing_the_room_is_light():
    code = (
        "import sys, lightning_soup, lightning_soup.modules\n"
        "heavy = {'open_clip', 'wandb', 'transformers', 'timm', 'lightning'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "assert 'CLIPClassifier' in lightning_soup.__all__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_names_of_imagenet_are_kept_by_that_name():
    model = tiny_clip(classnames="imagenet", templates=["a {}"])
    assert model.hparams.classnames == "imagenet"
    assert model.num_classes == 1000


def _fit_on_a_rank():
    model = tiny_clip()
    fit_clip(model, devices=2, strategy="ddp")
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])[-2000:].tolist()


def test_two_ranks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises a single device for tests
        mine, other = run_on_two_ranks(_fit_on_a_rank)
    assert mine == other


def test_data_without_class_names_or_test_names():
    (result,) = quiet_trainer().validate(tiny_clip(), datamodule=Unnamed(), verbose=False)
    assert result.keys() == {"val_acc", "val_loss"}


def test_the_model_at_another_size():
    model = tiny_clip().eval()
    own, before = model.model, state(model)
    size = model.model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    changed = model.model_at_size((2 * side, 2 * side))
    images = torch.rand(2, 3, 2 * side, 2 * side)
    assert changed.encode_image(images).shape == (2, changed.visual.output_dim)
    tokens = model.tokenize(["a b", "c"])
    torch.testing.assert_close(changed.encode_text(tokens), own.encode_text(tokens))
    for name, value in changed.state_dict().items():
        if "visual.positional_embedding" not in name:
            assert torch.equal(value, own.state_dict()[name])
    assert model.model is own
    assert not changed.training
    assert not [name for name, value in state(model).items() if not torch.equal(value, before[name])]
    assert model.model_at_size((side, side)) is own
