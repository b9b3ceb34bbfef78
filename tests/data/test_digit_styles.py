import pytest
import torch

from lightning_soup.data.digit_images import read_images
from lightning_soup.data.digit_styles import STYLES, DigitStyleReference, DigitStylesDataModule, class_names, digits
from lightning_soup.data.handwriting import MEAN, STD
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules import CLIPClassifier
from tests.helpers.loaders import contents, keys, read
from tests.helpers.trainers import quiet_trainer

PARTS = {"pretrain": 300, "reference": 300, "train": 500, "test": 630}


def ready(*args, **kwargs):
    datamodule = DigitStylesDataModule(*args, **kwargs)
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


@pytest.mark.parametrize("seed", [0, 7])
def test_the_four_sets_share_no_image(seed):
    sets = {part: set(keys(digits(part, seed)[0])) for part in PARTS}
    assert {part: len(found) for part, found in sets.items()} == PARTS
    assert len(set.union(*sets.values())) == sum(PARTS.values()) == 1730
    assert set.union(*sets.values()) <= set(keys(read_images("digits")[0]))


@pytest.mark.parametrize("part", PARTS)
def test_classes_are_balanced_and_labels_belong_to_their_images(part):
    images, labels = digits(part, 3)
    assert torch.bincount(labels, minlength=10).tolist() == [PARTS[part] // 10] * 10
    truth = dict(zip(keys(read_images("digits")[0]), read_images("digits")[1].tolist(), strict=True))
    assert [truth[key] for key in keys(images)] == labels.tolist()


def test_the_seed_decides_which_image_is_where():
    for part in PARTS:
        assert torch.equal(digits(part, 1)[0], digits(part, 1)[0])
        assert set(keys(digits(part, 1)[0])) != set(keys(digits(part, 2)[0]))


def small():
    images = torch.zeros(1, 1, 4, 4)
    images[0, 0] = torch.tensor([[0.0, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.9], [0.0] * 4, [0.6, 0.0, 0.0, 0.0]])
    return images


STYLED = {
    "plain": [[0.0, 0.2, 0.0, 0.0], [0.0, 0.0, 0.0, 0.9], [0.0, 0.0, 0.0, 0.0], [0.6, 0.0, 0.0, 0.0]],
    "inverted": [[1.0, 0.8, 1.0, 1.0], [1.0, 1.0, 1.0, 0.1], [1.0, 1.0, 1.0, 1.0], [0.4, 1.0, 1.0, 1.0]],
    "turned": [[0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.6]],
    "rolled": [[0.0, 0.0, 0.0, 0.2], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.6, 0.0]],
    "crossed": [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("style", STYLES)
def test_a_style_does_what_it_says_and_leaves_its_input_alone(style):
    images = small()
    torch.testing.assert_close(STYLES[style](images)[0, 0], torch.tensor(STYLED[style]))
    assert torch.equal(images, small())


def test_one_style_has_ten_classes_and_all_have_fifty():
    one, every = ready("inverted"), ready()
    assert one.class_names == [f"inverted {digit}" for digit in range(10)]
    assert every.class_names == [f"{style} {digit}" for style in STYLES for digit in range(10)]
    assert one.test_names == every.test_names == ("test",)
    assert [len(read(one.train_dataloader())[1]), len(read(one.test_dataloader()[0])[1])] == [500, 630]
    assert [len(read(every.train_dataloader())[1]), len(read(every.test_dataloader()[0])[1])] == [2500, 3150]
    assert torch.bincount(read(every.train_dataloader())[1]).tolist() == [50] * 50


@pytest.mark.parametrize("style", STYLES)
def test_all_holds_each_style_under_its_own_classes(style):
    first = 10 * list(STYLES).index(style)
    images, targets = read(ready().test_dataloader()[0])
    mine = (targets >= first) & (targets < first + 10)
    alone, labels = read(ready(style).test_dataloader()[0])
    assert torch.equal(images[mine], alone)
    assert torch.equal(targets[mine] - first, labels)
    plain, _ = digits("test", 0)
    torch.testing.assert_close(alone * STD + MEAN, STYLES[style](plain), atol=1e-6, rtol=0)


def test_pretraining_and_training_share_no_image_in_any_style_and_are_tested_alike():
    train, pretrain = ready(), ready(part="pretrain")
    assert len(read(pretrain.train_dataloader())[1]) == 5 * 300
    assert not contents(train.train_dataloader()) & contents(pretrain.train_dataloader())
    assert not contents(train.test_dataloader()[0]) & contents(train.train_dataloader())
    assert torch.equal(read(train.test_dataloader()[0])[0], read(pretrain.test_dataloader()[0])[0])
    assert torch.equal(read(train.predict_dataloader())[0], read(train.test_dataloader()[0])[0])


def test_training_is_shuffled_in_batches_of_the_size_asked_for():
    datamodule = ready("rolled", batch_size=30)
    torch.manual_seed(1)
    first, again = read(datamodule.train_dataloader()), read(datamodule.train_dataloader())
    assert not torch.equal(first[1], again[1])
    assert sorted(keys(first[0])) == sorted(keys(again[0]))
    assert [len(batch[1]) for batch in datamodule.train_dataloader()] == [30] * 16 + [20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "bold"}, "style='bold': expected one of plain, inverted, turned, rolled, crossed, all"),
        ({"part": "reference"}, "part='reference': expected one of train, pretrain"),
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        DigitStylesDataModule(**options)


def drawn(reference):
    """The reference's images, and the style of each."""
    plain, _ = digits("reference", reference.seed)
    images = torch.stack([reference.images[i][0] for i in range(len(reference.images))]) * STD + MEAN
    alike = torch.stack([(style(plain) - images).abs().amax((1, 2, 3)) < 1e-5 for style in STYLES.values()], 1)
    return images, alike


def test_the_reference_has_every_image_once_in_one_style_drawn_at_random():
    images, alike = drawn(DigitStyleReference(seed=2))
    assert len(images) == 300
    assert (alike.sum(1) == 1).all()
    assert all(30 < count < 90 for count in alike.sum(0).tolist())


def test_the_reference_names_all_classes_and_goes_without_labels():
    reference = DigitStyleReference(batch_size=40)
    assert reference.texts == DigitStylesDataModule().class_names
    assert len(reference.texts) == 50
    assert next(reference.batches()).shape == (40, 1, 28, 28)


def test_the_reference_is_the_same_every_time_and_the_seed_decides():
    first, again, other = (DigitStyleReference(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(drawn(first)[1], drawn(again)[1])
    assert torch.equal(next(first.batches(5)), next(again.batches(5)))
    assert not torch.equal(drawn(first)[1], drawn(other)[1])
    torch.manual_seed(123)  # the run's stream neither decides nor moves
    before = torch.get_rng_state()
    assert torch.equal(next(DigitStyleReference(seed=1).batches(5)), next(first.batches(5)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_reference_belongs_to_no_task():
    plain = set(keys(digits("reference", 4)[0]))
    for part in ("train", "pretrain", "test"):
        assert not plain & set(keys(digits(part, 4)[0]))


def test_predict():
    """Lightning builds the loader of predict anew, from how it was built."""
    vision = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 14, "image_size": 28}
    text = {"context_length": 8, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    model = CLIPClassifier(model_config=config, templates=["{}"], classnames=class_names("plain"))
    found = quiet_trainer().predict(model, datamodule=DigitStylesDataModule("plain"))
    assert sum(map(len, found)) == 630
