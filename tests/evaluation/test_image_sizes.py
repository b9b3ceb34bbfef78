"""Golden cases of MindVL's sizes, and models at other sizes."""

import open_clip
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.image_sizes import patch_of, resized, smart_resize, snapped, timm_at_size, tokens_of
from lightning_soup.modules.clip_models import build_clip, clip_at_size

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 4, "image_size": 16},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}


def vit(**options):
    torch.manual_seed(0)
    shape = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, "img_size": 16, **options}).eval()


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((100, 200), {}, (112, 196)),
        ((1080, 1920), {}, (728, 1316)),
        ((3000, 4000), {}, (840, 1148)),
        ((50, 50), {}, (56, 56)),
        ((42, 70), {}, (56, 56)),  # ties to even
        ((14, 14), {}, (56, 56)),
        ((100, 200), {"min_pixels": 64 * 784, "max_pixels": 1280 * 784}, (168, 336)),
        ((100, 200), {"min_pixels": 256 * 784}, (336, 644)),
        ((31, 639), {"max_pixels": 20 * 784}, (28, 560)),  # never a side of 0
        ((16, 2048), {"factor": 32, "min_pixels": 65536, "max_pixels": 2**24}, (32, 2912)),
    ],
)
def test_smart_resize(size, options, expected):
    assert smart_resize(*size, **options) == expected


def test_tokens_of_an_image():
    height, width = smart_resize(1080, 1920)
    assert height * width // 28**2 == 1222


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 300), "200 times"),
        ((0, 10), "1 or more"),
        ((10, 10, 28, 100, 50), "lowest ≤ highest"),
        ((9, 9, 28, 0, 5), "1 ≤"),
    ],
)
def test_sizes_that_cannot_be(arguments, message):
    with pytest.raises(UnsupportedSetup, match=message):
        smart_resize(*arguments)


def test_snapping():
    assert [snapped(size, 16, "nearest") for size in (200, 196, 7)] == [208, 192, 16]
    assert snapped(224, 16) == 224
    with pytest.raises(UnsupportedSetup, match=r"200 is no multiple of the patch size 16\. The nearest is 208"):
        snapped(200, 16)
    with pytest.raises(UnsupportedSetup, match="1 pixel or more"):
        snapped(0, 16, "nearest")


def test_tokens_of_models():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert tokens_of(model, (224, 224)) == 197
    assert tokens_of(model, (240, 240)) == 226
    assert tokens_of(timm.create_model("test_byobnet"), (224, 160)) == 35  # squares of 32 pixels
    assert patch_of(timm.create_model("test_byobnet")) is None
    clip = build_clip(CLIP)
    assert patch_of(clip) == (4, 4)
    assert tokens_of(clip, (16, 16)) == 17


@pytest.mark.parametrize(
    ("name", "patch"), [("pvt_v2_b0", 4), ("vit_tiny_r_s16_p8_224", 32), ("vitamin_small_224", 16)]
)
def test_patches_that_overlap_or_are_cut_from_features(name, patch):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert patch_of(model) == (patch, patch)


def test_images_of_bytes_stay_within_their_range():
    images = torch.tensor([[0, 0, 255, 255]], dtype=torch.uint8).repeat(4, 1)[None, None]
    found, exact = resized(images, (8, 8)), resized(images.float(), (8, 8))
    assert exact.min() < -1
    assert exact.max() > 256
    assert torch.equal(found, exact.round().clamp(0, 255).to(torch.uint8))


def test_resizing_is_in_float32_with_antialias():
    images = torch.rand(2, 1, 16, 16)
    expected = nn.functional.interpolate(images, (10, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(resized(images, (10, 12)), expected)
    assert resized(images, (16, 16)) is images
    found = resized(images.bfloat16(), (10, 12))
    assert found.dtype == torch.bfloat16


def test_golden_resampling():
    grid = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 1, 2, 2)
    found = resized(grid, (4, 4))[0, 0]
    expected = [-0.264705882353, 0.030672268908, 0.616386554622, 0.911764705882]
    torch.testing.assert_close(found[0], torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[2:], 3 - found[:2].flip(0).flip(1))
    small = resized(torch.arange(16.0).view(1, 1, 4, 4), (2, 2))[0, 0]
    expected = [[2.933884297521, 4.760330578512], [10.239669421488, 12.066115702479]]
    torch.testing.assert_close(small, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_vit_at_another_size_is_a_copy():
    model = vit()
    own, kept = model.pos_embed, model.pos_embed.clone()
    changed = timm_at_size(model, (24, 16))
    assert changed is not model
    assert model.pos_embed is own
    assert torch.equal(own, kept)
    assert changed(torch.rand(1, 3, 24, 16)).shape == (1, 3)
    torch.testing.assert_close(changed.pos_embed, resample_abs_pos_embed(own, (6, 4), (4, 4), num_prefix_tokens=1))
    assert timm_at_size(model, (16, 16)) is model
    dynamic = vit(dynamic_img_size=True)
    assert timm_at_size(dynamic, (24, 16)) is dynamic
    dynamic.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 24, 16)
    assert torch.equal(dynamic(images), changed(images))
    network = timm.create_model("test_byobnet")
    assert timm_at_size(network, (99, 50)) is network


def test_pixels_at_the_margins_are_not_left_out():
    with pytest.raises(UnsupportedSetup, match="cannot take images of 16×18: its patches are 4×4"):
        timm_at_size(vit(), (16, 18))


def test_a_size_that_windows_do_not_divide():
    with pytest.raises(UnsupportedSetup, match=r"cannot take images of 10×10"):
        timm_at_size(timm.create_model("maxvit_pico_rw_256"), (10, 10))


def test_an_open_clip_model_at_another_size():
    torch.manual_seed(0)
    model = build_clip(CLIP).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    changed = clip_at_size(model, CLIP, (24, 24))
    reference = open_clip.CLIP(**{**CLIP, "vision_cfg": {**CLIP["vision_cfg"], "image_size": 24}}).eval()
    state = {name: value.clone() for name, value in before.items()}
    open_clip.model.resize_pos_embed(state, reference)
    reference.load_state_dict(state)
    images = torch.rand(2, 3, 24, 24)
    torch.testing.assert_close(changed.encode_image(images), reference.encode_image(images))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert clip_at_size(model, CLIP, (16, 16)) is model
    assert not changed.training


def test_another_grid_with_as_many_tokens_is_resampled():
    torch.manual_seed(0)
    model = build_clip(CLIP)
    changed = clip_at_size(model, CLIP, (8, 32))  # 2×8 instead of 4×4
    own, found = model.visual.positional_embedding, changed.visual.positional_embedding
    assert own.shape == found.shape
    expected = resample_abs_pos_embed(own[None], (2, 8), (4, 4), num_prefix_tokens=1)[0]
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[0], own[0])  # the class token
    assert not torch.equal(found, own)


def test_an_open_clip_model_with_a_tower_of_timm():
    tower = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "token", "timm_proj": "linear"}
    config = {**CLIP, "vision_cfg": tower}
    model = build_clip(config).eval()
    changed = clip_at_size(model, config, (48, 64))
    assert changed.encode_image(torch.rand(1, 3, 48, 64)).shape == (1, 16)
    assert model.encode_image(torch.rand(1, 3, 224, 224)).shape == (1, 16)


def test_a_size_that_clips_patches_do_not_divide():
    with pytest.raises(UnsupportedSetup, match=r"18×18: its patches are 4×4"):
        clip_at_size(build_clip(CLIP), CLIP, (18, 18))
