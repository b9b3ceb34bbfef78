"""SoupTrainer.soup from Python and from the command line."""

import json

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lightning_soup.cli.main import main
from lightning_soup.cli.trainer import SoupTrainer
from lightning_soup.errors import UnsupportedSetup, UnwritableOutput
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.recipes import GreedySoup, UniformSoup
from lightning_soup.weights import open_checkpoint
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.ingredients import tiny_run

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "model": {"class_path": "tests.helpers.boring.TinyClassifier"},
        "data": {"class_path": "tests.helpers.boring.TinyData"},
        "trainer": QUIET,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_from_python(tmp_path):
    start, files = tiny_run()
    module = TinyClassifier()
    soup = SoupTrainer(**QUIET).soup(
        module,
        TinyData(),
        ingredients=[str(file) for file in files],
        recipe=GreedySoup(),
        beside=[UniformSoup()],
        init=str(start),
        output=str(tmp_path / "out" / "soup.ckpt"),
    )
    assert soup.score == pytest.approx(ModuleEvaluator(TinyClassifier(), TinyData()).score(module.state_dict()))
    restored = TinyClassifier.load_from_checkpoint(tmp_path / "out" / "soup.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), module.parameters(), strict=True))
    report = json.loads((tmp_path / "out" / "soup_report" / "report.json").read_text())
    assert "GreedySoup" in json.dumps(report)
    assert "<html" in (tmp_path / "out" / "soup_report" / "report.html").read_text()
    assert list((tmp_path / "out").rglob("*probe*")) == []


def test_from_the_command_line(config, capsys):
    _, files = tiny_run()
    pattern = str(files[0].parent.parent / "run-*" / "*.ckpt")
    main(["soup", "--config", "config.yaml", "--recipe", "lightning_soup.recipes.GreedySoup", "--recipe.strict", "true",
          "--ingredients", pattern, "--output", "soup.safetensors"])  # fmt: skip
    assert open_checkpoint("soup.safetensors").provenance["recipe"] == "GreedySoup(strict=True)"
    assert "soup_report/report.html" in capsys.readouterr().out.replace("\n", "")


def test_a_config_that_names_everything(config):
    _, files = tiny_run()
    settings = yaml.safe_load((config / "config.yaml").read_text())
    settings |= {
        "ingredients": [str(file) for file in files],
        "recipe": {"class_path": "LearnedSoup", "init_args": {"epochs": 2, "by": "tensor"}},
        "beside": [{"class_path": "UniformSoup"}],
        "output": "soup.ckpt",
        "metric": "val_loss",
        "mode": "min",
        "report": False,
    }
    (config / "soup.yaml").write_text(yaml.safe_dump(settings))
    main(["soup", "--config", "soup.yaml"])
    record = open_checkpoint("soup.ckpt").provenance
    assert record["recipe"] == "LearnedSoup(by=tensor, epochs=2)"
    assert record["score"] < 0
    assert not (config / "soup_report").exists()


def failing(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["soup", "--config", "config.yaml", *arguments])
    return stop.value.code


def test_an_unknown_metric(config, capsys):
    _, files = tiny_run()
    paths = [str(file) for file in files]
    assert failing("--ingredients", *paths, "--metric", "val_auc", "--recipe", "GreedySoup") == 1
    shown = capsys.readouterr().err
    assert "'val_auc' is not logged in validation. Logged: val_acc, val_loss" in shown
    assert "Traceback" not in shown
    assert sorted(path.name for path in config.iterdir()) == ["config.yaml"]


def test_another_model_than_the_ingredients(config, capsys):
    _, files = tiny_run()
    assert failing("--ingredients", *map(str, files), "--model.batch_norm", "true") == 1
    assert "net.1.weight" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(ModuleEvaluator, "score", lambda *_: pytest.fail("evaluated first"))
    with pytest.raises(UnwritableOutput):
        SoupTrainer(**QUIET).soup(
            TinyClassifier(), TinyData(), ingredients=["x"], output=str(tmp_path / "taken" / "soup.safetensors")
        )


def test_more_than_one_device_is_refused(tmp_path):
    trainer = SoupTrainer(**{**QUIET, "devices": 2, "strategy": "ddp_fork"})
    with pytest.raises(UnsupportedSetup, match=r"--trainer\.devices=1"):
        trainer.soup(TinyClassifier(), TinyData(), ingredients=["x"], output=str(tmp_path / "soup.pt"))


@pytest.mark.parametrize("loaders", [None, "empty"])
def test_a_soup_is_kept_where_the_test_data_allow_no_report(tmp_path, loaders):
    class Untestable(TinyData):
        def test_dataloader(self):
            return None if loaders is None else [DataLoader(test, 100, drop_last=True) for test in self.test]

    _, files = tiny_run()
    output = tmp_path / "soup.ckpt"
    with pytest.warns(UserWarning, match="no report was written"):
        SoupTrainer(**QUIET).soup(
            TinyClassifier(), Untestable(), ingredients=[str(file) for file in files], output=str(output)
        )
    assert open_checkpoint(output).provenance is not None
    assert not (tmp_path / "soup_report").exists()
