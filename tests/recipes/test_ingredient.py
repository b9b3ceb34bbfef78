import json

import pytest
import torch

from lightning_soup.errors import RecipeError, UnreadableCheckpoint
from lightning_soup.recipes import Ingredient, UniformSoup, gather_ingredients
from lightning_soup.weights import open_checkpoint, save_weights


def save(path, value=1.0):
    return save_weights({"w": torch.full((2, 2), value)}, path)


def run_folder(path, accuracy, files=("last.ckpt",)):
    for name in files:
        save(path / "checkpoints" / name, accuracy)
    record = {"status": "finished", "setting": {"model.lr": 0.1}, "seed": 3, "metrics": {"val_acc": accuracy}}
    (path / "run.json").write_text(json.dumps({**record, "checkpoint": f"checkpoints/{files[0]}"}))
    return path


def test_patterns_are_sorted_by_number(tmp_path):
    for i in (1, 2, 10):
        save(tmp_path / f"run-{i}" / "last.pt", float(i))
    found = gather_ingredients([str(tmp_path / "run-*" / "*.pt")])
    assert [item.name for item in found] == ["run-1", "run-2", "run-10"]


def test_run_folders_bring_metrics_and_settings(tmp_path):
    found = gather_ingredients([run_folder(tmp_path / "000-a", 0.5), run_folder(tmp_path / "001-b", 0.75)])
    assert [item.metrics["val_acc"] for item in found] == [0.5, 0.75]
    assert found[0].hparams == {"model.lr": 0.1}
    assert [item.name for item in found] == ["000-a", "001-b"]
    by_file = gather_ingredients(str(tmp_path / "*" / "checkpoints" / "*.ckpt"))
    assert [item.metrics["val_acc"] for item in by_file] == [0.5, 0.75]


def test_a_run_folder_without_record(tmp_path):
    save(tmp_path / "run" / "checkpoints" / "a.ckpt")
    assert Ingredient.from_path(tmp_path / "run").weights.path.name == "a.ckpt"
    save(tmp_path / "run" / "checkpoints" / "b.ckpt")
    with pytest.raises(RecipeError, match=r"2 checkpoints \(a\.ckpt, b\.ckpt\)"):
        Ingredient.from_path(tmp_path / "run")


def test_a_file_named_twice_is_taken_once(tmp_path):
    save(tmp_path / "a.pt")
    save(tmp_path / "b.pt")
    assert len(gather_ingredients([tmp_path / "a.pt", str(tmp_path / "*.pt"), tmp_path / "." / "b.pt"])) == 2


def test_nothing_found(tmp_path):
    with pytest.raises(RecipeError, match="matches no file"):
        gather_ingredients([str(tmp_path / "*.ckpt")])
    with pytest.raises(RecipeError, match="no ingredients given"):
        gather_ingredients([])
    with pytest.raises(UnreadableCheckpoint, match="no such file"):
        gather_ingredients([tmp_path / "gone.ckpt"])


def test_a_damaged_run_record(tmp_path):
    (run_folder(tmp_path / "run", 0.5) / "run.json").write_text("{")
    with pytest.raises(RecipeError, match="not valid JSON"):
        gather_ingredients([tmp_path / "run"])


def test_names_with_brackets_are_not_patterns(tmp_path):
    save(tmp_path / "run[1].pt")
    assert gather_ingredients([tmp_path / "run[1].pt"])[0].name == "run[1].pt"


def test_metrics_of_a_run_are_those_of_its_recorded_file(tmp_path):
    folder = run_folder(tmp_path / "run", 0.5, files=("best.ckpt", "other.ckpt"))
    best, other = (Ingredient.from_path(folder / "checkpoints" / name) for name in ("best.ckpt", "other.ckpt"))
    assert best.metrics == {"val_acc": 0.5}
    assert other.metrics == {}
    assert other.hparams == {"model.lr": 0.1}


def test_labels_with_dots_stay_apart(tmp_path):
    for name in ("lr0.1", "lr0.2"):
        save(tmp_path / name / "last.ckpt")
    assert [item.name for item in gather_ingredients(str(tmp_path / "*" / "last.ckpt"))] == ["lr0.1", "lr0.2"]


def test_one_file_under_two_labels(tmp_path):
    opened = open_checkpoint(save(tmp_path / "a.pt"))
    first, second = Ingredient(opened, label="first"), Ingredient(opened, label="second")
    assert [first.weights.label, second.weights.label, first.weights.label] == ["first", "second", "first"]


@pytest.mark.parametrize("record", [{"status": 1}, [], {"checkpoint": "x", "metrics": {"a": "good"}, "setting": {}}])
def test_a_run_record_of_another_program_is_passed_over(tmp_path, record):
    save(tmp_path / "run" / "checkpoints" / "a.ckpt")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    found = Ingredient.from_path(tmp_path / "run")
    assert found.weights.path.name == "a.ckpt"
    assert found.metrics == {}


def test_one_path_is_no_list_of_ingredients(tmp_path):
    with pytest.raises(RecipeError, match="expected a list of ingredients, got one str"):
        UniformSoup().cook("runs/*.ckpt")


@pytest.mark.parametrize("foreign", [[1, 2], None, "text", {"a": 1}])
def test_metadata_of_other_programs_is_passed_over(tmp_path, foreign):
    content = {"state_dict": {"w": torch.ones(2, 2)}, "callbacks": foreign, "hyper_parameters": foreign}
    torch.save({**content, "pytorch-lightning_version": "2.4.0"}, tmp_path / "a.ckpt")
    found = Ingredient.from_path(tmp_path / "a.ckpt")
    assert found.hparams == (foreign if isinstance(foreign, dict) else {})
    assert found.metrics == {}


def test_soups_among_checkpoints_are_left_out_of_a_pattern_and_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        save_weights({"w": torch.ones(2)}, tmp_path / name)
    for name in ("soup-v1.pt", "soup-v2.pt"):
        save_weights({"w": torch.ones(2)}, tmp_path / name, provenance={"recipe": "x"})
    with pytest.warns(UserWarning, match=r"\*\.pt: left out soup-v1\.pt, soup-v2\.pt, which are soups themselves"):
        found = gather_ingredients("*.pt")
    assert [item.name for item in found] == ["a", "b"]
    assert len(gather_ingredients("soup-*.pt")) == 2  # nothing else there: they are meant
    assert len(gather_ingredients(["a.pt", "soup-v1.pt"])) == 2


def test_paths_that_the_system_cannot_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("loop", "~x.pt"):
        with pytest.raises(UnreadableCheckpoint, match="no such file"):
            gather_ingredients([name], output="~y.pt")
