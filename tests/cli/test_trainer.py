"""SoupTrainer.soup from Python and from the command line."""

import json

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_soup.cli.main import main
from lightning_soup.cli.trainer import SoupTrainer
from lightning_soup.errors import UnsupportedSetup, UnwritableOutput
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.recipes import GreedySoup, UniformSoup, recook
from lightning_soup.runs.cooking import measure
from lightning_soup.weights import open_checkpoint
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.ingredients import tiny_run
from tests.helpers.trainers import quiet_trainer

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


def test_data_without_validation_are_refused(tmp_path):
    class NoValidation(LightningDataModule):
        def train_dataloader(self):
            return TinyData().train_dataloader()

    with pytest.raises(UnsupportedSetup, match=r"NoValidation has no val_dataloader\(\)"):
        SoupTrainer(**QUIET).soup(TinyClassifier(), NoValidation(), ingredients=["x"], output=str(tmp_path / "s.pt"))


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


@pytest.fixture(scope="module")
def batch_normed(tmp_path_factory):
    """A start and two fine-tunes of it, with BatchNorm."""
    folder = tmp_path_factory.mktemp("batch-normed")
    torch.manual_seed(5)
    module = TinyClassifier(batch_norm=True)
    files = []
    for run in ("start", "a", "b"):
        trainer = quiet_trainer(max_epochs=2)
        trainer.fit(module, datamodule=TinyData())
        files.append(folder / f"{run}.ckpt")
        trainer.save_checkpoint(files[-1])
        module = TinyClassifier.load_from_checkpoint(files[0])
    return [str(file) for file in files]


def recalibrated(files, output, datamodule=None, **options):
    soup = SoupTrainer(**QUIET).soup(
        TinyClassifier(batch_norm="start" in files[0]),
        datamodule or TinyData(),
        ingredients=files[-2:],
        output=str(output),
        recalibrate=True,
        **options,
    )
    return soup, open_checkpoint(output)


def test_recalibration_and_what_the_report_tells_of_it(tmp_path, batch_normed, capsys):
    options = {"recipe": GreedySoup(), "beside": [UniformSoup()], "metric": "val_loss"}
    soup, saved = recalibrated(batch_normed, tmp_path / "soup.ckpt", **options)
    inputs = TinyData().train.tensors[0] @ saved["net.0.weight"].T + saved["net.0.bias"]
    torch.testing.assert_close(saved["net.1.running_mean"], inputs.mean(0))
    evaluator = ModuleEvaluator(TinyClassifier(batch_norm=True), TinyData(), "val_loss")
    plain = GreedySoup().cook(batch_normed[1:], evaluator)
    values = {"before": plain.score, "after": evaluator.score(saved)}
    assert [trial.score for trial in soup.history] == [*(trial.score for trial in plain.history), None]
    assert soup.history[-1].values == pytest.approx(values)
    assert values["before"] != values["after"] == pytest.approx(soup.score)
    told = f"val_loss {-values['before']:.4f} → {-values['after']:.4f}"
    assert f"BatchNorm recalibrated: {told}" in capsys.readouterr().out
    report = json.loads((tmp_path / "soup_report" / "report.json").read_text())
    assert sum("BatchNorm statistics were estimated anew" in note for note in report["notes"]) == 2  # both soups
    assert told in (tmp_path / "soup_report" / "report.html").read_text()
    with pytest.warns(UserWarning, match="copied from it, not cooked again"):
        again = recook(tmp_path / "soup.ckpt")
    assert open_checkpoint(again).digest() == saved.digest()


def test_the_curve_of_a_report_leads_to_the_recalibrated_soup(tmp_path, batch_normed, monkeypatch):
    reports = []

    def kept(*arguments, **options):
        reports.append(measure(*arguments, **options))
        return reports[0]

    monkeypatch.setattr("lightning_soup.cli.trainer.measure", kept)
    recalibrated(batch_normed, tmp_path / "soup.ckpt", init=batch_normed[0])
    (soup,), curve = reports[0].of_kind("soup"), reports[0].of_kind("interpolation")
    assert curve[-1].alpha == 1.0
    torch.testing.assert_close(curve[-1].outcomes["test"].logits, soup.outcomes["test"].logits)
    assert not torch.allclose(curve[-2].outcomes["test"].logits, soup.outcomes["test"].logits)


def test_recalibration_without_batch_norm_changes_nothing_and_says_so(tmp_path):
    _, files = tiny_run()
    paths = [str(file) for file in files]
    SoupTrainer(**QUIET).soup(
        TinyClassifier(), TinyData(), ingredients=paths[-2:], output=str(tmp_path / "plain.pt"), report=False
    )
    with pytest.warns(UserWarning, match="nothing was recalibrated: the model has no BatchNorm layer"):
        soup, saved = recalibrated(paths, tmp_path / "soup.pt", report=False)
    assert saved.digest() == open_checkpoint(tmp_path / "plain.pt").digest()
    assert not soup.statistics


def test_recalibration_needs_training_data(tmp_path, batch_normed, monkeypatch):
    class Untrained(LightningDataModule):
        def val_dataloader(self):
            return TinyData().val_dataloader()

    monkeypatch.setattr(ModuleEvaluator, "score", lambda *_: pytest.fail("evaluated first"))
    with pytest.raises(UnsupportedSetup, match=r"Untrained has no train_dataloader\(\)\. Add one, or pass --recal"):
        recalibrated(batch_normed, tmp_path / "soup.ckpt", Untrained())


def test_recalibration_from_the_command_line(config, batch_normed, capsys):
    main(["soup", "--config", "config.yaml", "--model.batch_norm", "true", "--recalibrate", "true", "--report", "false",
          "--ingredients", *batch_normed[1:]])  # fmt: skip
    assert "BatchNorm recalibrated: val_acc" in capsys.readouterr().out
    assert "net.1.running_var" in open_checkpoint("soup.safetensors").provenance["statistics"]["tensors"]


def test_recalibration_without_a_model(config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["soup", "--ingredients", "a.ckpt", "b.ckpt", "--recalibrate", "true"])
    assert stop.value.code == 1
    assert "Give --config, or --model and --data; or go without --recalibrate." in capsys.readouterr().err
