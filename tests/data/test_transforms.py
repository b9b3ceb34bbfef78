import open_clip
import pytest
import torch
from PIL import Image

from lightning_soup.data.transforms import Augmentation, Preprocessing, check_model_name
from lightning_soup.errors import UnsupportedSetup


def test_size_and_normalisation_are_the_models():
    vit = Preprocessing("vit_tiny_patch16_224")
    assert (vit.input_size, vit.mean, vit.std) == ((3, 224, 224), (0.5,) * 3, (0.5,) * 3)
    assert (vit.interpolation, vit.crop_pct) == ("bicubic", 0.9)
    tagged = Preprocessing("vit_base_patch16_224.augreg_in21k", img_size=96, std=[1.0, 2.0, 4.0])
    assert (tagged.input_size, tagged.mean, tagged.std) == ((3, 96, 96), (0.5,) * 3, (1.0, 2.0, 4.0))
    assert Preprocessing(img_size=32).mean == pytest.approx((0.485, 0.456, 0.406))  # ImageNet's


def test_clip_is_evaluated_as_its_authors_do():
    generator = torch.Generator().manual_seed(0)
    image = Image.fromarray(torch.randint(0, 256, (300, 260, 3), generator=generator, dtype=torch.uint8).numpy())
    ours = Preprocessing("vit_base_patch32_clip_224.openai", crop_pct=1.0).evaluate()
    torch.testing.assert_close(ours(image), open_clip.image_transform(224, is_train=False)(image))
    for crop_pct in (0.0, 1.5):
        with pytest.raises(UnsupportedSetup, match=rf"crop_pct={crop_pct}: expected a share"):
            Preprocessing(img_size=8, crop_pct=crop_pct)


def test_evaluation_transform_is_fixed_and_normalised():
    transform = Preprocessing(img_size=16, mean=[0.2, 0.4, 0.6], std=[0.1, 0.2, 0.5]).evaluate()
    image = Image.new("RGB", (40, 30), (51, 102, 255))
    result = transform(image)
    assert result.shape == (3, 16, 16)
    expected = torch.tensor([0.0, 0.0, 0.8]).view(3, 1, 1).expand(3, 16, 16)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    framed = Image.new("RGB", (40, 40), (255, 255, 255))
    framed.paste((0, 0, 0), (4, 4, 36, 36))
    cropped = Preprocessing("vit_tiny_patch16_224", 32, mean=[0] * 3, std=[1] * 3)
    cropped.crop_pct = 0.8  # the middle 32 pixels of 40
    assert cropped.evaluate()(framed).max() == 0


def test_training_transform_follows_the_augmentation():
    image = Image.new("RGB", (32, 32))
    image.paste((255, 255, 255), (0, 0, 16, 32))  # the left half is white
    preprocessing = Preprocessing(img_size=32, mean=[0, 0, 0], std=[1, 1, 1])
    nothing = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0}
    plain = preprocessing.train(Augmentation(**nothing))(image)
    assert plain[:, :, :15].min() == 1
    assert plain[:, :, 17:].max() == 0
    mirrored = preprocessing.train(Augmentation(**{**nothing, "hflip": 1.0}))(image)
    assert torch.equal(mirrored, plain.flip(2))
    erased = preprocessing.train(Augmentation(**nothing, re_prob=1.0))(image)
    assert not torch.equal(erased, plain)
    cropped = preprocessing.train(Augmentation(**{**nothing, "scale": (0.1, 0.1)}))
    assert len({float(cropped(image).mean()) for _ in range(8)}) > 1
    torch.manual_seed(0)
    policy = preprocessing.train(Augmentation(auto_augment="rand-m9-mstd0.5"))
    assert policy(image).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_pach16_224", "Closest names: vit_base_patch16_224,"),
        ("vit_tiny_patch16_224.mine", "no tag 'mine'. With tags it has: vit_tiny_patch16_224.augreg_in21k,"),
        ("zzzzzzzzzzzz", "timm.list_models"),
    ],
)
def test_unknown_model_names(name, message):
    with pytest.raises(UnsupportedSetup) as raised:
        check_model_name(name)
    assert message in str(raised.value)
    with pytest.raises(UnsupportedSetup):
        Preprocessing(name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Preprocessing(), "Neither model_name nor img_size"),
        (lambda: Preprocessing(img_size=0), "img_size=0"),
        (lambda: Preprocessing(img_size=8, mean=[0.5]), r"mean=\[0.5\]: expected three numbers"),
        (lambda: Augmentation(hflip=1.5), "hflip=1.5: a probability"),
        (lambda: Augmentation(re_prob=-0.1), "re_prob=-0.1: a probability"),
        (lambda: Augmentation(scale=(0.9, 0.5)), r"scale=\(0.9, 0.5\)"),
        (lambda: Augmentation(ratio=(0.0, 1.0)), r"ratio=\(0.0, 1.0\)"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(UnsupportedSetup, match=message):
        make()


def test_at_another_size():
    plain = Preprocessing(img_size=16, mean=[0.2, 0.4, 0.6], std=[0.1, 0.2, 0.5])
    wide = plain.at_size((8, 24))
    assert (wide.input_size, plain.input_size) == ((3, 8, 24), (3, 16, 16))  # the one asked is left alone
    assert (wide.mean, wide.std, wide.crop_pct, wide.interpolation) == (
        plain.mean,
        plain.std,
        plain.crop_pct,
        plain.interpolation,
    )
    image = Image.new("RGB", (40, 30), (51, 102, 153))
    found = wide.evaluate()(image)
    assert found.shape == (3, 8, 24)
    torch.testing.assert_close(found, torch.zeros(3, 8, 24), atol=1e-6, rtol=0)


def test_the_whole_image_at_exactly_a_size():
    # Left black, right white: a crop would move the border from the middle or lose an edge.
    image = Image.new("RGB", (64, 16))
    image.paste((255, 255, 255), (32, 0, 64, 16))
    transform = Preprocessing(img_size=16, mean=[0.5] * 3, std=[0.5] * 3, crop_pct=0.5).exactly((12, 20))
    found = transform(image)
    assert found.shape == (3, 12, 20)
    assert found[:, :, :8].max() < -0.9
    assert found[:, :, 12:].min() > 0.9
    torch.testing.assert_close(found[:, :, 9:11].mean(), torch.tensor(0.0), atol=0.05, rtol=0)
