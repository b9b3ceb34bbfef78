"""LengthAverage: MindVL's averages over sizes, with position embeddings brought to one grid first."""

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from lightning_soup.cli.main import main
from lightning_soup.errors import IncompatibleIngredients, RecipeError
from lightning_soup.modules import ImageClassifier
from lightning_soup.recipes import Ingredient, LengthAverage, recook
from lightning_soup.weights.positions import resample_positions
from lightning_soup.weights.weights_file import open_checkpoint
from tests.helpers.trainers import quiet_trainer

SHAPE = {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=tolerance)


def plane(height, width):
    """A grid of one dimension as a position embedding, 99 in front."""
    return torch.cat([torch.tensor([99.0]), torch.arange(float(height * width))]).view(1, -1, 1)


# -------------------------------------------------------------------------------------------------------------- golden


def test_golden_resampling():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 4, 1)
    found = resample_positions(values, (4, 4), (2, 2)).view(4, 4)
    close(found[0], [-0.264705882353, 0.030672268908, 0.616386554622, 0.911764705882])
    close(found[1], [0.326050420168, 0.621428571429, 1.207142857143, 1.502521008403])
    torch.testing.assert_close(found[2:], (3 - found[:2]).flip(0).flip(1))
    rough = resample_positions(values, (4, 4), (2, 2), antialias=False).view(4, 4)
    close(rough[0], [-0.31640625, 0.015625, 0.5625, 0.89453125])
    sixteen = torch.arange(16.0).view(1, 16, 1)
    small = resample_positions(sixteen, (2, 2), (4, 4)).view(2, 2)
    close(small, [[2.933884297521, 4.760330578512], [10.239669421488, 12.066115702479]], 1e-5)
    small = resample_positions(sixteen, (2, 2), (4, 4), antialias=False).view(2, 2)
    close(small, [[2.03125, 4.21875], [10.78125, 12.96875]], 1e-5)


def test_another_grid_with_as_many_tokens():
    found = resample_positions(plane(4, 4), (2, 8), (4, 4), prefix=1)
    assert float(found[0, 0, 0]) == 99
    expected = [2.258872143899, 2.514990649695, 3.057031102139, 3.597107438017]
    expected += [4.097107438017, 4.637183773894, 5.179224226338, 5.435342732134]
    close(found[0, 1:9, 0], expected, 1e-5)
    same = plane(4, 4)
    assert resample_positions(same, (4, 4), (4, 4), prefix=1) is same


def test_resampling_and_averaging_commute():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 17, 8)
    first = resample_positions((a + b) / 2, (6, 6), (4, 4), prefix=1)
    second = (resample_positions(a, (6, 6), (4, 4), prefix=1) + resample_positions(b, (6, 6), (4, 4), prefix=1)) / 2
    assert float((first - second).abs().max()) < 1e-6
    constant = resample_positions(torch.full((1, 16, 3), 2.5), (7, 5), (4, 4))
    torch.testing.assert_close(constant, torch.full((1, 35, 3), 2.5))
    expected = resample_abs_pos_embed(a, (6, 6), (4, 4), num_prefix_tokens=1)
    torch.testing.assert_close(resample_positions(a, (6, 6), (4, 4), prefix=1), expected)
    half = resample_positions(a.bfloat16(), (6, 6), (4, 4), prefix=1)  # for which there is no kernel
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(("group", "expected"), [("flat", 3.0), ("by_length", 3.5)])
def test_golden_averages(group, expected):
    files = [{"w": torch.tensor([[value, value]])} for value in (1.0, 3.0, 5.0)]
    recipe = LengthAverage(group=group, lengths=[2048, 2048, 4096], common_start="ignore")
    close(recipe.cook(files).weights()["w"], [[expected, expected]])


# ------------------------------------------------------------------------------------------------------------- ViTs


def vit(side, seed=0, **options):
    """A fine-tune of one start, whatever the size is."""

    def built(side):
        torch.manual_seed(0)
        return ImageClassifier("vit_tiny_patch16_224", 3, img_size=side, in_chans=1, model_args={**SHAPE, **options})

    module, start = built(side), built(16).state_dict()
    grid = module.model.patch_embed.grid_size
    own = resample_abs_pos_embed(start["model.pos_embed"], grid, (4, 4), num_prefix_tokens=1)
    module.load_state_dict({**start, "model.pos_embed": own})
    torch.manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.002 * torch.randn_like(parameter)
    return module


def saved(module, path):
    trainer = quiet_trainer(max_epochs=0)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture
def files(tmp_path):
    """Three fine-tunes, at 16, 24 and 24 pixels."""
    return [saved(vit(side, seed), tmp_path / f"{seed}.ckpt") for seed, side in enumerate((16, 24, 24))]


@pytest.mark.parametrize(("target", "grid"), [(None, 4), (24, 6), (32, 8)])
def test_position_embeddings_are_brought_to_one_grid_first(files, target, grid, tmp_path):
    recipe = LengthAverage(target_size=target)
    soup = recipe.cook(files)
    found, opened = soup.weights(), [open_checkpoint(file) for file in files]
    own = [file["model.pos_embed"] for file in opened]
    expected = sum(
        resample_abs_pos_embed(value, (grid, grid), (side, side), num_prefix_tokens=1)
        for value, side in zip(own, (4, 6, 6), strict=True)
    )
    torch.testing.assert_close(found["model.pos_embed"], expected / 3)
    name = "model.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(found[name], sum(file[name].double() for file in opened).div(3).float())
    path = soup.save(tmp_path / "soup.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(path)
    side = 4 * grid
    assert loaded.hparams.img_size == side
    assert loaded.eval()(torch.rand(2, 1, side, side)).shape == (2, 3)
    assert recook(path, tmp_path / "again.ckpt") is not None
    assert (tmp_path / "again.ckpt").read_bytes() == path.read_bytes()
    assert len(soup.notes) == 1
    assert f"grid of {grid}×{grid}" in soup.notes[0]


def test_by_the_lengths_that_files_say(files):
    soup = LengthAverage(group="by_length").cook(files)
    assert soup.coefficients == (0.5, 0.25, 0.25)
    told = [Ingredient(file, hparams={"tokens": n}) for file, n in zip(files, (1, 1, 2), strict=True)]
    assert LengthAverage(group="by_length", length_key="tokens").cook(told).coefficients == (0.25, 0.25, 0.5)


def test_dynamic_sizes_share_one_grid(tmp_path):
    modules = [vit(24, seed, dynamic_img_size=True) for seed in (1, 2)]
    soup = LengthAverage(lengths=[20, 28]).cook(modules)
    assert not soup.notes
    name = "model.head.weight"
    expected = (modules[0].state_dict()[name] + modules[1].state_dict()[name]) / 2
    torch.testing.assert_close(soup.weights()[name], expected)


def test_rectangles_need_their_size():
    modules = [vit(side, seed) for seed, side in ((1, (16, 32)), (2, (24, 24)))]
    with pytest.raises(IncompatibleIngredients, match="grid cannot be told"):
        LengthAverage().cook(modules)
    soup = LengthAverage(lengths=[(16, 32), (24, 24)], target_size=(24, 24)).cook(modules)
    own = modules[0].state_dict()["model.pos_embed"]
    expected = resample_abs_pos_embed(own, (6, 6), (4, 8), num_prefix_tokens=1)
    expected = (expected + modules[1].state_dict()["model.pos_embed"]) / 2
    torch.testing.assert_close(soup.weights()["model.pos_embed"], expected)


def test_files_say_the_size_of_rectangles(tmp_path):
    modules = {size: vit(size, seed) for seed, size in enumerate(((8, 32), (16, 32), (16, 16)))}
    wide, large, square = (saved(module, tmp_path / f"{h}x{w}.ckpt") for (h, w), module in modules.items())
    for files, new in (((square, large), (4, 4)), ((large, wide), (4, 8)), ((wide, square), (2, 8))):
        found = LengthAverage().cook(files).weights()["model.pos_embed"]  # the last two have as many tokens
        own = [open_checkpoint(file) for file in files]
        grids = [[side // 4 for side in file.metadata["hyper_parameters"]["img_size"]] for file in own]
        expected = sum(
            resample_abs_pos_embed(file["model.pos_embed"], new, grid, num_prefix_tokens=1)
            for file, grid in zip(own, grids, strict=True)
        )
        torch.testing.assert_close(found, expected / 2)


def test_a_file_that_says_no_size_has_the_grid_of_another_one(tmp_path):
    told, untold = saved(vit((8, 32), 1), tmp_path / "told.ckpt"), vit((8, 32), 2)
    for files in ([told, untold], [untold, told]):
        (plan,) = LengthAverage(target_size=16).cook(files).resampled.values()
        assert plan.old == ((2, 8), (2, 8))
    (plan,) = LengthAverage(lengths=[(8, 32), 16]).cook([told, vit(16, 3)]).resampled.values()
    assert plan.old == ((2, 8), (4, 4))
    assert not LengthAverage(lengths=[2048, 4096]).cook([untold, vit((8, 32), 3)]).resampled


def test_models_of_many_sizes_keep_the_grid_that_they_were_built_with(tmp_path):
    files = [saved(vit((16, 32), n, dynamic_img_size=True), tmp_path / f"{n}.ckpt") for n in (1, 2)]
    assert not LengthAverage(lengths=[(16, 24), (16, 32)]).cook(files).resampled


def test_a_small_grid_is_not_taken_for_register_tokens(tmp_path):
    shape = {**SHAPE, "reg_tokens": 4, "no_embed_class": True}
    modules = [ImageClassifier("vit_tiny_patch16_224", 3, img_size=12, model_args=shape) for _ in range(2)]
    files = [saved(module, tmp_path / f"{number}.ckpt") for number, module in enumerate(modules)]
    soup = LengthAverage(target_size=16, common_start="ignore").cook(files)
    assert soup.resampled["model.pos_embed"].old == ((3, 3), (3, 3))


def test_a_square_may_be_given_by_one_side(files):
    soup = LengthAverage(group="by_length", lengths=[(16, 16), 24, (24, 24)]).cook(files)
    assert soup.coefficients == (0.5, 0.25, 0.25)


def test_open_clip():
    torch.manual_seed(0)
    parts = {"visual.conv1.weight": (8, 3, 4, 4), "visual.class_embedding": (8,), "visual.proj": (8, 8)}
    start = {name: torch.randn(*shape) for name, shape in parts.items()}
    files = [{**start, "visual.positional_embedding": torch.randn(1 + n * n, 8)} for n in (4, 6)]
    found = LengthAverage(common_start="ignore").cook(files).weights()["visual.positional_embedding"]
    own = [file["visual.positional_embedding"] for file in files]
    small = resample_abs_pos_embed(own[1][None], (4, 4), (6, 6), num_prefix_tokens=1)[0]
    torch.testing.assert_close(found, (own[0] + small) / 2)


def test_from_the_command_line(files, tmp_path, capsys):
    out = tmp_path / "soup.ckpt"
    recipe = ["--recipe", "lightning_soup.recipes.LengthAverage", "--recipe.target_size", "24"]
    main(["soup", "--ingredients", *map(str, files), *recipe, "--output", str(out)])
    assert open_checkpoint(out).specs["model.pos_embed"].shape == (1, 37, 8)
    main(["recook", str(out)])
    assert (tmp_path / "soup.recooked.ckpt").read_bytes() == out.read_bytes()


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "mean"}, "flat or by_length"),
        ({"lengths": [0, 1, 2]}, "1 or more"),
        ({"target_size": 0}, "1 or more"),
        ({"lengths": [1.5, 2, 2]}, "1.5: expected a number"),
        ({"lengths": [16, 24]}, "2 lengths given for 3 ingredients"),
        ({"target_size": 18}, "multiples"),
        ({"group": "by_length", "length_key": "tokens"}, "length of 0.ckpt is not known"),
    ],
)
def test_options_that_cannot_be(files, options, message):
    with pytest.raises(RecipeError, match=message):
        LengthAverage(**options).cook(files)


def test_other_differences_stay_errors(files, tmp_path):
    wider = saved(vit(24, 3, embed_dim=16), tmp_path / "wider.ckpt")
    with pytest.raises(IncompatibleIngredients):
        LengthAverage().cook([files[0], wider])
    with pytest.raises(RecipeError, match="no position embeddings"):
        LengthAverage(target_size=24, common_start="ignore").cook([{"w": torch.ones(2)}, {"w": torch.ones(2)}])
