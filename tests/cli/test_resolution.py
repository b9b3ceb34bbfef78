"""The command ``resolution``: the table, the picture, the choice, the test there."""

import json

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from matplotlib.axes import Axes

from lightning_soup import HandwritingDataModule, ImageClassifier, ResolutionSearch, save_weights
from lightning_soup.cli.main import main
from lightning_soup.cli.trainer import SoupTrainer
from lightning_soup.errors import IncompatibleIngredients, UnsupportedSetup
from lightning_soup.evaluation.resolution_table import Resolution, ResolutionChoice, SizeScore
from lightning_soup.runs.resolution_report import resolution_picture

SHAPE = {"patch_size": 7, "embed_dim": 8, "depth": 1, "num_heads": 1, "global_pool": "avg", "class_token": False}
MODEL = {"model_name": "vit_tiny_patch16_224", "img_size": 28, "in_chans": 1, "model_args": SHAPE}
DATA = {"train_size": 20, "val_size": 40, "corrupted": "none"}


def quiet(**options):
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    return SoupTrainer(**{**quiet, "enable_model_summary": False, "enable_checkpointing": False, **options})


def classifier(seed=0):
    torch.manual_seed(seed)
    return ImageClassifier(**MODEL)


@pytest.fixture
def config(tmp_path):
    held = {
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        "model": {"class_path": "lightning_soup.modules.ImageClassifier", "init_args": MODEL},
        "data": {"class_path": "lightning_soup.data.HandwritingDataModule", "init_args": DATA},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(held))
    return path


def test_the_command_writes_the_table_and_the_picture(config, tmp_path, capsys):
    weights = save_weights(classifier(5), tmp_path / "weights.safetensors")
    out = tmp_path / "out"
    arguments = ["--config", str(config), "--ckpt", str(weights), "--search.sizes", "[21, 35]", "--output", str(out)]
    main(["resolution", *arguments])
    told = capsys.readouterr().out
    assert "training" in told
    assert "(test)" in told
    held = json.loads((out / "resolution.json").read_text())
    assert list(held["scores"]["val"]) == ["21", "35", "28"]
    assert held["chosen"]["val"] in held["scores"]["val"]
    assert held["test"].keys() == {"test", "mnist"}
    assert (out / "resolution.png").read_bytes().startswith(b"\x89PNG")
    expected = ResolutionSearch(sizes=[21, 35]).run(classifier(5), HandwritingDataModule(**DATA))
    assert {size: row["metric"] for size, row in held["scores"]["val"].items()} == {
        str(one): score.metric for one, score in expected.scores["val"].items()
    }
    before = (out / "table.json").read_text()
    main(["resolution", *arguments, "--test", "false"])
    assert (out / "table.json").read_text() == before


def test_bad_input_is_one_message_and_nothing_is_written(config, tmp_path, capsys):
    out = tmp_path / "out"
    for arguments, message in (
        (["--search.sizes", "[20]"], "no multiple of the patch size 7"),
        (["--search.sizes", "[]"], "at least one size"),
        (["--search.split", "test"], "force=True"),
        (["--ckpt", str(tmp_path / "none.ckpt")], "none.ckpt"),
        (["--search.metric", "nll"], "min_gain"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["resolution", "--config", str(config), "--output", str(out), *arguments])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_the_files_are_json_that_all_readers_know(tmp_path):
    search = ResolutionSearch(sizes=[21], metric="nll", min_gain=0.1)
    quiet(precision="bf16-true").resolution(
        classifier(), HandwritingDataModule(**DATA), search=search, output=str(tmp_path), test=False
    )

    def refused(value):
        raise AssertionError(value)

    held = json.loads((tmp_path / "resolution.json").read_text(), parse_constant=refused)
    assert held["scores"]["val"]["21"]["error"] is None


def test_data_may_ask_for_the_trainer(tmp_path):
    class Asking(HandwritingDataModule):
        def setup(self, stage):
            assert self.trainer.world_size == 1
            super().setup(stage)

    found = quiet().resolution(classifier(), Asking(**DATA), search=ResolutionSearch(sizes=[21]), output=str(tmp_path))
    assert found.scores["val"]


def test_a_picture_of_many_tasks():
    score = SizeScore(0.5, 0.1, 17.0, 0.0, 10)
    tasks = [f"task {number}" for number in range(9)]
    train = Resolution((28, 28))
    rows = {task: {train: score} for task in tasks}
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        own = Axes.errorbar
        patch.setattr(Axes, "errorbar", lambda *a, **k: seen.append(k["label"]) or own(*a, **k))
        resolution_picture(ResolutionChoice(rows, dict.fromkeys(tasks, train), train, "best", "acc", "val"))
    assert seen == tasks


def test_from_python_with_loggers(tmp_path):
    trainer = quiet(logger=CSVLogger(tmp_path))
    found = trainer.resolution(
        classifier(), HandwritingDataModule(**DATA), search=ResolutionSearch(sizes=[21]), output=str(tmp_path / "out")
    )
    assert str(found.train) == "28"
    (table,) = tmp_path.rglob("metrics.csv")
    assert {"resolution/val/21", "resolution/val/28"} <= set(table.read_text().splitlines()[0].split(","))


def test_what_cannot_be(tmp_path):
    with pytest.raises(UnsupportedSetup, match="needs a data module"):
        quiet().resolution(classifier(), output=str(tmp_path))
    with pytest.raises(UnsupportedSetup, match="the Trainer has 2"):
        quiet(devices=2, strategy="ddp").resolution(classifier(), HandwritingDataModule(**DATA))
    torch.manual_seed(0)
    wider = ImageClassifier(**{**MODEL, "model_args": {**SHAPE, "embed_dim": 16}})
    path = save_weights(wider, tmp_path / "wider.safetensors")
    with pytest.raises(IncompatibleIngredients):
        quiet().resolution(classifier(), HandwritingDataModule(**DATA), ckpt=str(path), output=str(tmp_path))
