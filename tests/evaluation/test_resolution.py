"""The search over image sizes: rules, candidates, files, tasks, models."""

import json
import math

import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soup import (
    CLIPClassifier,
    ImageClassifier,
    ImageFolderDataModule,
    Resolution,
    ResolutionSearch,
    smart_resize,
)
from lightning_soup.errors import LightningSoupError, RecipeError, UnsupportedSetup
from lightning_soup.evaluation.image_sizes import resized
from lightning_soup.evaluation.resolution_table import SizeScore, choose
from tests.evaluation.test_image_sizes import CLIP
from tests.helpers.trainers import quiet_trainer

SHAPE = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


def classifier(**options):
    torch.manual_seed(0)
    module = ImageClassifier("vit_tiny_patch16_224", 3, img_size=16, in_chans=1, model_args={**SHAPE, **options})
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # so that answers differ
    return module


def loader(count=20, size=16, seed=0, channels=1):
    torch.manual_seed(seed)
    return DataLoader(TensorDataset(torch.rand(count, channels, size, size), torch.arange(count) % 3), 8)


class Sets(LightningDataModule):
    test_names = ("near", "far")

    def val_dataloader(self):
        return loader(seed=1)

    def test_dataloader(self):
        return [loader(seed=2), loader(seed=3)]


def square(side):
    return Resolution((side, side))


def accuracy(module, given, size):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=size, in_chans=1, **SHAPE).eval()
    own = timm.layers.resample_abs_pos_embed(module.model.pos_embed, (size // 4, size // 4), num_prefix_tokens=1)
    model.load_state_dict({**module.model.state_dict(), "pos_embed": own})
    images, labels = given.dataset.tensors
    with torch.no_grad():
        return float((model(resized(images, (size, size))).argmax(1) == labels).float().mean())


# --------------------------------------------------------------------------------------------------------------- rules

GOLDEN = {192: 76.1, 208: 77.0, 224: 77.4, 240: 77.9, 256: 77.9, 288: 77.2}


def golden(**changes):
    found = {}
    for side, percent in {**GOLDEN, **changes}.items():
        a = percent / 100
        found[square(side)] = SizeScore(a, math.sqrt(a * (1 - a) / 1000), (side / 16) ** 2 + 1, 0.0, 1000)
    return found


@pytest.mark.parametrize(("rule", "side"), [("best", 240), ("one_se", 208), ("keep_train", 224)])
def test_golden_rules(rule, side):
    assert choose(golden(), square(224), rule) == square(side)


def test_the_size_of_training_is_left_for_more_than_chance_only():
    error = golden()[square(240)].error
    assert 100 * error == pytest.approx(1.312093747)
    assert 100 * (golden()[square(240)].metric - error) == pytest.approx(76.587906253)
    better = golden()
    better[square(256)] = SizeScore(0.774 + 0.0132, 0.01295, 257, 0.0, 1000)
    assert choose(better, square(224)) == square(256)
    assert choose(golden(), square(224), min_gain=0.004) == square(240)
    assert choose(golden(), square(224), min_gain=0.006) == square(224)


def test_smaller_may_be_better():
    losses = {side: SizeScore(value, math.nan, side, 0.0, 10) for side, value in ((1, 0.5), (2, 0.4), (3, 0.39))}
    assert choose(losses, 1, "best", "min") == 3
    assert choose(losses, 1, "one_se", "min", min_gain=0.05) == 2
    assert choose(losses, 1, "keep_train", "min", min_gain=0.05) == 3
    assert choose(losses, 1, "keep_train", "min", min_gain=0.2) == 1


# ----------------------------------------------------------------------------------------------------------- the search


def test_each_size_is_that_of_a_model_built_for_it():
    module, data = classifier(), loader()
    own, state = module.model, {name: value.clone() for name, value in module.state_dict().items()}
    found = ResolutionSearch(sizes=[12, 24]).run(module, data)
    row = found.scores["val"]
    assert list(row) == [square(12), square(24), square(16)]  # that of training is always there
    for candidate, score in row.items():
        assert score.metric == pytest.approx(accuracy(module, data, candidate.size[0]))
        assert score.tokens == (candidate.size[0] // 4) ** 2 + 1
        assert score.images == 20
        assert 0 < score.seconds < 1
        assert score.error == pytest.approx(math.sqrt(score.metric * (1 - score.metric) / 20))
    assert found.train == square(16)
    assert found.selection_split == "val"
    assert module.model is own
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert module.training


def test_the_usual_grid():
    found = ResolutionSearch().run(classifier(), loader())
    assert [candidate.size[0] for candidate in found.scores["val"]] == [12, 16, 20, 24]  # once each, after rounding


def test_sizes_that_become_one_are_evaluated_once():
    module = classifier(dynamic_img_size=True)
    seen = []
    module.model.register_forward_hook(lambda _, inputs, __: seen.append((len(inputs[0]), inputs[0].shape[-1])))
    ResolutionSearch(sizes=[19, 20, 21, 16], snap="nearest").run(module, loader())
    batches = [shape for shape in seen if shape[0] > 1]
    assert batches == [(8, 20), (8, 20), (4, 20), (8, 16), (8, 16), (4, 16)]


def test_images_are_loaded_once():
    class Counted(TensorDataset):
        taken = 0

        def __getitem__(self, index):
            Counted.taken += 1
            return super().__getitem__(index)

    data = DataLoader(Counted(*loader().dataset.tensors), 8)
    ResolutionSearch(sizes=[12, 20, 24]).run(classifier(), data)
    assert Counted.taken <= 20 + 8  # and a batch to see its shape


@pytest.mark.parametrize("metric", ["nll", "auc", "f1"])
def test_other_metrics(metric):
    found = ResolutionSearch(sizes=[12, 24], metric=metric, min_gain=0.0).run(classifier(), loader())
    row = found.scores["val"]
    best = (min if metric == "nll" else max)(row, key=lambda one: row[one].metric)
    assert row[found.choice].metric == row[best].metric
    assert math.isnan(row[best].error)


def test_a_choice_for_each_task_or_one_for_all():
    module, data = classifier(), {"a": loader(seed=1), "b": loader(seed=5), "c": loader(seed=9)}
    apart = ResolutionSearch(sizes=[12, 20, 24, 28], rule="best", per_task=True).run(module, data)
    for task, row in apart.scores.items():
        assert apart.chosen[task] == choose(row, square(16), "best")
    together = ResolutionSearch(sizes=[12, 20, 24, 28], rule="best").run(module, data)
    mean = {one: sum(row[one].metric for row in together.scores.values()) for one in together.scores["a"]}
    assert mean[together.choice] == max(mean.values())
    if len(set(apart.chosen.values())) > 1:
        with pytest.raises(UnsupportedSetup, match="sizes of their own"):
            _ = apart.choice


def test_the_test_data_is_for_the_report():
    module, data = classifier(), Sets()
    search = ResolutionSearch(sizes=[12, 20])
    found = search.run(module, data)
    scores = search.evaluate(module, data, found.choice)
    assert list(scores) == ["near", "far"]
    forced = ResolutionSearch(sizes=[12], split="test", force=True).run(module, data)
    assert forced.selection_split == "test"
    assert list(forced.scores) == ["near", "far"]


def test_the_table_is_gone_on_with(tmp_path):
    module, data, table = classifier(), loader(), tmp_path / "deep" / "table.json"
    first = ResolutionSearch(sizes=[12]).run(module, data, table)
    seen = []
    module.model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    second = ResolutionSearch(sizes=[12, 20]).run(module, data, table)
    assert second.scores["val"][square(12)] == first.scores["val"][square(12)]
    assert sum(count for count in seen if count > 1) <= 20  # the new size alone; its copy has the hook too
    module.model.head.bias.data += 1  # other weights
    third = ResolutionSearch(sizes=[12]).run(module, data, table)
    assert third.scores["val"].keys() == first.scores["val"].keys()
    assert len(json.loads(table.read_text())["rows"]) == 2
    table.write_text("[]")
    for path in (table, tmp_path):
        with pytest.raises(UnsupportedSetup, match="not the table of a search"):
            ResolutionSearch(sizes=[12]).run(module, data, path)


def test_rows_of_other_data_and_other_options_are_not_gone_on_with(tmp_path):
    table = tmp_path / "table.json"

    def rows(module, data, **options):
        ResolutionSearch(bounds=[(100, 300)], **options).run(module, data, table)
        return len(json.loads(table.read_text())["rows"])

    assert rows(classifier(), loader()) == 2
    assert rows(classifier(), loader()) == 2
    assert rows(classifier(), loader(seed=1)) == 4
    assert rows(classifier(), loader(seed=1), factor=8) == 5  # the row of one size is the same
    assert rows(classifier(), loader(seed=1, count=28), factor=8) == 7


def test_rows_of_files(folder, tmp_path):
    module, table = Probe(), tmp_path / "table.json"
    found = [ResolutionSearch(sizes=[16]).run(module, of_files(folder), table) for _ in range(2)]
    assert found[0].scores == found[1].scores
    Image.new("RGB", (40, 40)).save(folder / "val" / "cat" / "0.png")
    ResolutionSearch(sizes=[16]).run(module, of_files(folder), table)
    assert len(json.loads(table.read_text())["rows"]) == 4


def test_rows_of_other_class_names(tmp_path):
    data = DataLoader(TensorDataset(torch.rand(9, 3, 16, 16), torch.arange(9) % 2), 4)
    for names in (["cat", "dog"], ["hat", "cup"]):
        torch.manual_seed(0)
        module = CLIPClassifier(model_config=CLIP, classnames=names, train="both", head="text")
        ResolutionSearch(sizes=[12]).run(module, data, tmp_path / "table.json")
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 4


def test_a_search_that_breaks_off_leaves_the_model_and_its_table(tmp_path):
    module, own = (made := classifier()), made.model

    class Broken(TensorDataset):
        def __getitem__(self, index):
            if Broken.left == 0:
                raise ValueError("broken")
            Broken.left -= 1
            return super().__getitem__(index)

    Broken.left = 8 + 11
    data = DataLoader(Broken(*loader().dataset.tensors), 8)
    with pytest.raises(ValueError, match="broken"):
        ResolutionSearch(sizes=[12]).run(module, data, tmp_path / "table.json")
    assert module.model is own
    assert module.training


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path):
    """Images of several sizes and shapes."""
    torch.manual_seed(0)
    for part in ("train", "val", "test"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for number, size in enumerate(((40, 40), (30, 60), (64, 32), (40, 40))):
                pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / part / label / f"{number}.png")
    return tmp_path


def of_files(folder, **options):
    return ImageFolderDataModule(str(folder), **{"img_size": 32, "batch_size": 3, "num_workers": 0, **options})


class Probe(LightningModule):
    """Keeps the images that it is given."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.model(images)


def test_each_size_is_made_from_the_files_own_pixels(folder):
    module = Probe()
    found = ResolutionSearch(sizes=[16, 48]).run(module, of_files(folder))
    assert found.train == square(32)
    for side in (16, 48):
        reference = of_files(folder, img_size=side)
        reference.setup("validate")
        expected = torch.cat([images for images, _ in reference.val_dataloader()])
        own = [images for images in module.seen if images.shape[-1] == side and len(images) > 1]
        torch.testing.assert_close(torch.cat(own), expected)


def test_files_are_decoded_once(folder, monkeypatch):
    opened = []
    own = Image.open
    monkeypatch.setattr(Image, "open", lambda *given: opened.append(given) or own(*given))
    ResolutionSearch(sizes=[16, 24, 40, 48]).run(Probe(), of_files(folder))
    assert len(opened) == 8


def test_bounds_keep_the_aspect_ratio(folder):
    module = Probe()
    bounds = (1000, 1600)
    found = ResolutionSearch(bounds=[bounds], factor=4).run(module, of_files(folder))
    expected = sorted([smart_resize(h, w, 4, *bounds) for w, h in ((40, 40), (30, 60), (64, 32), (40, 40))] * 2)
    seen = [images for images in module.seen if tuple(images.shape[-2:]) != (32, 32) and images.any()]
    shapes, counts = [tuple(images.shape[-2:]) for images in seen], [len(images) for images in seen]
    assert sorted(shape for shape, count in zip(shapes, counts, strict=True) for _ in range(count)) == expected
    assert found.scores["val"][Resolution(bounds=bounds)].images == 8


def test_bounds_of_batches_in_sizes_of_their_own():
    module = Probe()
    shapes = [(16, 32), (32, 16), (24, 24), (16, 32)]
    data = DataLoader([(torch.rand(3, *shape), number % 2) for number, shape in enumerate(shapes)], 1)
    found = ResolutionSearch(bounds=[(2000, 3000)], factor=4, train_size=20).run(module, data)
    seen = [tuple(images.shape[2:]) for images in module.seen if images.any()]
    assert sorted(seen[:4]) == sorted(smart_resize(*shape, 4, 2000, 3000) for shape in shapes)
    assert {score.images for score in found.scores["val"].values()} == {4}


def test_bounds_of_a_network_of_one_size():
    module = ImageClassifier("mixer_s32_224", 3, in_chans=1)
    with pytest.raises(UnsupportedSetup, match=r"MlpMixer cannot take images of 192×192 with 1 channels"):
        ResolutionSearch(bounds=[(30000, 40000)], factor=32).run(module, loader(size=224, count=3))


def test_bounds_of_a_vit(folder):
    torch.manual_seed(0)
    module = ImageClassifier("vit_tiny_patch16_224", 2, img_size=32, model_args=SHAPE)
    found = ResolutionSearch(bounds=[(400, 900), (900, 1600)], rule="best").run(module, of_files(folder))
    small, large = (found.scores["val"][Resolution(bounds=bounds)] for bounds in ((400, 900), (900, 1600)))
    assert small.tokens < large.tokens
    assert {len(str(one)) > 2 for one in found.scores["val"]} == {True, False}


# -------------------------------------------------------------------------------------------------------------- models


def test_a_clip_classifier():
    torch.manual_seed(0)
    module = CLIPClassifier(model_config=CLIP, classnames=["cat", "dog", "cow"])
    own = module.model
    data = DataLoader(TensorDataset(torch.rand(9, 3, 16, 16), torch.arange(9) % 3), 4)
    found = ResolutionSearch(sizes=[12, 24]).run(module, data)
    assert [score.tokens for score in found.scores["val"].values()] == [10, 37, 17]
    assert all(score.seconds > 0 for score in found.scores["val"].values())
    assert module.model is own


def test_a_network_with_convolutions_takes_any_size():
    module = ImageClassifier("test_byobnet", 3, in_chans=1)
    found = ResolutionSearch(sizes=[32, 50], train_size=40).run(module, loader(size=40))
    assert [str(one) for one in found.scores["val"]] == ["32", "50", "40"]


def test_a_model_of_one_size_is_refused_before_anything_is_evaluated():
    module = ImageClassifier("mixer_s32_224", 3, in_chans=1)
    with pytest.raises(UnsupportedSetup, match=r"MlpMixer cannot take images of 192×192"):
        ResolutionSearch(sizes=[192], train_size=224).run(module, loader(size=224, count=3))
    assert module.training


class Judge(LightningModule):
    """Has no forward, and what its predict_step gives is for the test to say."""

    def __init__(self, name, answer=lambda logits: logits):
        super().__init__()
        setattr(self, name, classifier().model)
        self.name, self.answer = name, answer

    def predict_step(self, batch):
        return self.answer(getattr(self, self.name)(batch[0]))


def test_a_module_that_only_predicts():
    found = ResolutionSearch(sizes=[12]).run(Judge("model"), loader())
    expected = ResolutionSearch(sizes=[12]).run(classifier(), loader())
    assert found.scores["val"][square(12)].metric == expected.scores["val"][square(12)].metric
    with pytest.raises(UnsupportedSetup, match=r"Judge cannot take images of 12×12 .* or name its network 'model'"):
        ResolutionSearch(sizes=[12]).run(Judge("net"), loader())
    with pytest.raises(RecipeError, match=r"predict_step must return logits \[batch, classes\], got dict\. Change it"):
        ResolutionSearch(sizes=[12]).run(Judge("model", lambda logits: {"logits": logits}), loader())


def test_a_compiled_module():
    module = classifier()
    compiled = torch.compile(module, backend="eager")
    found, expected = (ResolutionSearch(sizes=[12]).run(one, loader()) for one in (compiled, module))
    assert found.scores["val"][square(12)].metric == expected.scores["val"][square(12)].metric
    assert (
        ResolutionSearch().evaluate(compiled, loader(), square(12))["test"].metric
        == found.scores["val"][square(12)].metric
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_in_the_precision_of_a_trainer(precision):
    trainer, module, search = quiet_trainer(precision=precision), classifier(), ResolutionSearch(sizes=[12, 24])
    found = search.run(module, loader(), trainer=trainer)
    assert all(0 <= score.metric <= 1 for score in found.scores["val"].values())
    again = search.evaluate(module, loader(), square(24), trainer=trainer)["test"]
    assert again.metric == found.scores["val"][square(24)].metric


def test_a_module_of_half_precision():
    module, (images, labels) = classifier().bfloat16(), loader().dataset.tensors
    found = ResolutionSearch(sizes=[12]).run(module, DataLoader(TensorDataset(images.bfloat16(), labels), 8))
    assert found.scores["val"][square(12)].images == 20


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": []}, "at least one size"),
        ({"bounds": []}, "at least one size"),
        ({"sizes": 224}, "sizes=224: a search needs"),
        ({"sizes": [(224,)]}, "sizes holds \\(224,\\): expected whole numbers, height and width"),
        ({"bounds": [100]}, "bounds holds 100: expected whole numbers, the lowest and highest"),
        ({"min_gain": math.nan}, "min_gain=nan"),
        ({"rule": "luck"}, "'keep_train', 'best' or 'one_se'"),
        ({"snap": "up"}, "'error' or 'nearest'"),
        ({"metric": "bleu"}, "'acc', 'nll', 'auc' or 'f1'"),
        ({"metric": "nll"}, "Give min_gain"),
        ({"min_gain": -1.0}, "min_gain"),
        ({"split": "train"}, "'val' or 'test'"),
        ({"split": "test"}, "force=True"),
        ({"factor": 0}, "factor=0"),
        ({"bounds": [(100, 50)]}, "lowest ≤ highest"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        ResolutionSearch(**options)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [([18], "no multiple of the patch size 4"), ([0], "1 pixel or more"), ([(16, 18)], "no multiple")],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(UnsupportedSetup, match=message):
        ResolutionSearch(sizes=sizes).run(classifier(), loader())


def test_a_factor_that_patches_do_not_divide():
    with pytest.raises(UnsupportedSetup, match="factor=6: expected a multiple of the patch size 4"):
        ResolutionSearch(bounds=[(100, 300)], factor=6).run(classifier(), loader())


def test_data_that_cannot_be():
    class Nothing(LightningDataModule):
        def val_dataloader(self):
            return []

    with pytest.raises(UnsupportedSetup, match="no val data"):
        ResolutionSearch().run(classifier(), Nothing())
    with pytest.raises(UnsupportedSetup, match="no val data"):
        ResolutionSearch().run(classifier(), LightningDataModule())
    with pytest.raises(UnsupportedSetup, match="images \\[B, C, H, W\\]"):
        ResolutionSearch().run(classifier(), DataLoader(TensorDataset(torch.rand(4, 3), torch.arange(4)), 2))


def test_nan_is_not_chosen_from():
    module = classifier()
    module.model.head.weight.data.fill_(math.nan)
    with pytest.raises(LightningSoupError, match=r"acc is NaN at 12"):
        ResolutionSearch(sizes=[12]).run(module, loader())
