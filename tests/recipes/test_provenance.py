import shutil

import pytest
import torch

from lightning_soup.errors import RecipeError, UnwritableOutput
from lightning_soup.recipes import Ingredient, LearnedSoup, UniformSoup, gather_ingredients, recook
from lightning_soup.weights import open_checkpoint, save_weights
from tests.recipes.test_recipes import Regression, fine_tunes


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "runs"
    for i, weights in enumerate(fine_tunes(3)):
        save_weights(weights, folder / f"run-{i}.pt")
    return sorted(folder.glob("*.pt"))


@pytest.mark.parametrize("name", ["soup.safetensors", "soup.pt"])
@pytest.mark.parametrize("recipe", [UniformSoup(), LearnedSoup(by="tensor", epochs=2)], ids=["uniform", "learned"])
def test_recook_gives_the_same_bytes(files, tmp_path, name, recipe):
    soup = recipe.cook(gather_ingredients(files), Regression())
    path = soup.save(tmp_path / "out" / name)
    again = recook(path)
    assert again.read_bytes() == path.read_bytes()
    record = open_checkpoint(again).provenance
    assert record["recipe"] == str(recipe)
    assert [item["label"] for item in record["ingredients"]] == ["run-0", "run-1", "run-2"]


def test_saving_twice_gives_the_same_bytes(files, tmp_path):
    soup = UniformSoup().cook(gather_ingredients(files))
    assert soup.save(tmp_path / "a.safetensors").read_bytes() == soup.save(tmp_path / "b.safetensors").read_bytes()


def test_the_whole_tree_may_be_moved(files, tmp_path):
    UniformSoup().cook(gather_ingredients(files)).save(tmp_path / "runs" / "soup.safetensors")
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    again = recook(tmp_path / "elsewhere" / "soup.safetensors", tmp_path / "copies" / "again.safetensors")
    assert recook(again).exists()  # its sources are named relative to its own place


def test_changed_and_missing_ingredients_are_named(files, tmp_path):
    path = UniformSoup().cook(gather_ingredients(files)).save(tmp_path / "soup.safetensors")
    weights = {name: value.clone() for name, value in open_checkpoint(files[1]).items()}
    weights["2.bias"][0] += 1e-3
    save_weights(weights, files[1])
    files[2].unlink()
    with pytest.raises(RecipeError, match=r"(?s)run-1: .*has changed.*run-2: .*does not exist"):
        recook(path)
    assert not list(tmp_path.glob("*recooked*"))


def test_a_soup_that_was_changed_afterwards(files, tmp_path):
    path = UniformSoup().cook(gather_ingredients(files)).save(tmp_path / "soup.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="was changed after it was cooked"):
        recook(path)


def test_files_without_provenance(files):
    with pytest.raises(RecipeError, match="no provenance"):
        recook(files[0])


def test_ingredients_in_memory_cannot_be_opened_again(tmp_path):
    path = (
        UniformSoup().cook([Ingredient(w, label=f"w{i}") for i, w in enumerate(fine_tunes(2))]).save(tmp_path / "s.pt")
    )
    with pytest.raises(RecipeError, match="w0: was in memory only"):
        recook(path)


def test_output_errors(files, tmp_path):
    soup = UniformSoup().cook(gather_ingredients(files))
    with pytest.raises(UnwritableOutput, match="unknown suffix"):
        soup.save(tmp_path / "soup.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableOutput, match="cannot be written"):
        soup.save(tmp_path / "file" / "soup.safetensors")


def test_a_torch_soup_keeps_the_shape_of_its_ingredients(tmp_path):
    paths = []
    for i, weights in enumerate(fine_tunes(2)):
        paths.append(tmp_path / f"{i}.pth")
        torch.save({"model": {f"module.{n}": v for n, v in weights.items()}, "epoch": 3}, paths[-1])
    path = UniformSoup().cook(gather_ingredients(paths)).save(tmp_path / "soup.pth")
    content = torch.load(path, weights_only=True)
    assert set(content["model"]) == {f"module.{n}" for n in fine_tunes(1)[0]}


def test_recook_through_a_linked_folder(files, tmp_path):
    real = tmp_path / "deep" / "real"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    path = UniformSoup().cook(gather_ingredients(files)).save(tmp_path / "link" / "soup.safetensors")
    assert recook(path).exists()
    assert recook(real / "soup.safetensors").exists()
