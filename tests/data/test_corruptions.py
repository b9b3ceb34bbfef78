import pytest
import torch

from lightning_soup.data.corruptions import (
    CORRUPTIONS,
    add_noise,
    blur,
    corrupt,
    lower_contrast,
    occlude,
    rotate,
    shift,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def bright(count=8, size=28):
    """Images without dark pixels, so that covered and incoming background shows."""
    return 0.5 + 0.5 * torch.rand(count, 1, size, size, generator=generator(9))


def point(row, column, size=28):
    image = torch.zeros(1, 1, size, size)
    image[..., row, column] = 1
    return image


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_same_seed_same_images_and_the_input_is_left_alone(name):
    images = bright()
    before = images.clone()
    first = corrupt(images, name, seed=3)
    torch.rand(5)  # the global random state must not matter
    assert torch.equal(first, corrupt(images, name, seed=3))
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert 0 <= first.min() <= first.max() <= 1 + 1e-6
    assert not torch.equal(first, images)
    drawn = name not in ("blur", "contrast")
    assert torch.equal(first, corrupt(images, name, seed=4)) is not drawn


def test_noise_has_the_strength_it_says():
    grey = torch.full((50, 1, 28, 28), 0.5)
    noisy = add_noise(grey, generator(), sigma=0.1)
    assert (noisy - grey).std().item() == pytest.approx(0.1, rel=0.02)


def test_blur_twice_spreads_a_point_over_5_by_5_and_keeps_its_sum():
    blurred = blur(point(14, 14), generator())
    assert int((blurred > 0).sum()) == 25
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    assert blurred[0, 0, 14, 14].item() == pytest.approx(9 / 81)


def test_rotation_turns_by_the_angle_both_ways():
    images = point(14, 24).expand(40, 1, 28, 28)  # 10.5 right of the centre
    turned = rotate(images, generator(), degrees=90).flatten(1).argmax(1)
    rows, columns = turned // 28, turned % 28
    assert set(rows.tolist()) == {3, 24}  # up and down
    assert set(columns.tolist()) <= {13, 14}


def test_occlusion_covers_one_square_in_each_image():
    covered = occlude(bright(30), generator(), size=7) == 0
    assert covered.sum(dim=(1, 2, 3)).tolist() == [49] * 30
    assert covered.any(3).sum(dim=(1, 2)).tolist() == [7] * 30
    assert covered.any(2).sum(dim=(1, 2)).tolist() == [7] * 30
    corners = torch.stack([mask[0].nonzero()[0] for mask in covered])
    assert all(len(set(axis.tolist())) > 10 for axis in corners.T)


def test_shift_moves_by_exactly_two_pixels_along_both_axes():
    images = bright(40)
    seen = set()
    for before, after in zip(images, shift(images, generator(), pixels=2), strict=True):
        matches = [
            (down, right)
            for down in (-2, 2)
            for right in (-2, 2)
            if torch.equal(after[:, 2:-2, 2:-2], before.roll((down, right), (1, 2))[:, 2:-2, 2:-2])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
        assert int((after == 0).sum()) == 2 * 28 + 2 * 26
    assert len(seen) == 4


def test_shift_keeps_the_channels_apart():
    images = torch.stack([bright(1)[0, 0], torch.zeros(28, 28)])[None]
    assert shift(images, generator())[:, 1].abs().max() == 0


def test_contrast_keeps_the_mean_and_scales_the_deviation():
    images = bright()
    low = lower_contrast(images, generator(), factor=0.35)
    torch.testing.assert_close(low.mean(dim=(1, 2, 3)), images.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(low.std(dim=(1, 2, 3)), 0.35 * images.std(dim=(1, 2, 3)))
