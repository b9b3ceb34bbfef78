import os
import sys

import pytest

from lightning_soup.runs.ray_files import Place, look


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A command given in `tmp_path`, with its runs in `runs`, and this process somewhere else."""
    monkeypatch.setenv("WANDB_PROJECT", "soups")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in ("runs", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    found = Place.here()
    (tmp_path / "runs" / found.mark).touch()
    monkeypatch.chdir("elsewhere")
    return found


def relative(tmp_path):
    return (tmp_path / "runs").relative_to(tmp_path)


def test_relative_paths_imports_and_where_wandb_logs_are_those_of_the_command(place, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path / "modules")])
    monkeypatch.setenv("WANDB_PROJECT", "of the cluster")
    monkeypatch.setenv("WANDB_API_KEY", "of the node")
    before = list(sys.path)
    place.enter()
    assert os.getcwd() == str(tmp_path)
    assert str(tmp_path / "modules") in sys.path
    assert sys.path[: len(before)] == before
    place.enter()
    assert sys.path.count(str(tmp_path / "modules")) == 1
    assert os.environ["WANDB_PROJECT"] == "soups"
    assert os.environ["WANDB_API_KEY"] == "of the node"
    assert "secret" not in str(place)


def test_a_node_that_shares_the_files(place, tmp_path):
    assert look(relative(tmp_path), place, lambda: [1], [1]) is None
    assert look(relative(tmp_path), place, None, None) is None


def test_a_node_without_the_current_folder(place, tmp_path):
    gone = Place(str(tmp_path / "gone"), place.path, {}, place.mark)
    assert look(relative(tmp_path), gone, None, None) == (
        f"does not have the current folder {tmp_path / 'gone'}: No such file or directory"
    )


def test_a_node_with_a_folder_of_the_same_name_that_is_another(place, tmp_path):
    (tmp_path / "runs" / place.mark).rename(tmp_path / "runs" / Place.here().mark)
    assert look(relative(tmp_path), place, None, None) == (f"does not see the folder of the runs, {tmp_path / 'runs'}")


def test_a_node_that_may_not_write(place, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert look(relative(tmp_path), place, None, None).startswith("may not write to the folder of the runs")


def test_a_node_with_other_files(place, tmp_path):
    assert look(relative(tmp_path), place, lambda: [2], [1]) == (
        "has another version of the config, or of a file that it names"
    )
