"""What reaches the trackers: with W&B offline and disabled, and with a stand-in for a run that is online."""

import csv
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_soup.evaluation.resolution_table import Resolution, ResolutionChoice, SizeScore
from lightning_soup.modules import AwareNet
from lightning_soup.recipes import UniformSoup
from lightning_soup.runs.continual import ContinualResult
from lightning_soup.runs.resolution_report import log_resolution
from lightning_soup.runs.tracking import log_continual, log_report, log_soup
from tests.helpers.adapters import write_adapter
from tests.helpers.families import HeldOutData, three_families
from tests.helpers.reports import fake_report, soup, trial
from tests.helpers.trainers import quiet_trainer

SOURCE = "wandb:team/digits/model-{}:v0"


@pytest.fixture(scope="module")
def report():
    return fake_report(k=3, tests=["uci_test", "mnist"])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "soup.safetensors"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def offline(tmp_path):
    # As an argument: wandb reads WANDB_MODE once per process.
    logger = WandbLogger(project="digits", save_dir=tmp_path, mode="offline")
    yield logger
    wandb.finish()


def ours(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("lightning_soup")]


def from_artifacts(made):
    """The same soup, its ingredients downloaded from W&B."""
    ingredients = []
    for i, ingredient in enumerate(made.ingredients):
        opened = ingredient.weights
        ingredient = replace(ingredient, source=SOURCE.format(i))
        ingredient.__dict__["weights"] = opened  # as gather_ingredients leaves it: opened once
        ingredients.append(ingredient)
    return replace(made, ingredients=tuple(ingredients))


class OnlineRun:
    """The calls that a run would get."""

    id = "1a2b"

    def __init__(self, error=None):
        self.logged, self.used, self.artifacts, self.error = {}, [], [], error

    def log(self, content):
        self.logged |= content

    def use_artifact(self, name):
        if self.error is not None:
            raise self.error
        self.used.append(name)

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)


class OnlineLogger(WandbLogger):
    def __init__(self, run):
        self.run = run

    @property
    def experiment(self):
        return self.run

    def log_metrics(self, metrics, step=None):
        self.run.log(dict(metrics))


def test_a_merged_adapter_is_logged_as_the_folder_that_it_is(offline, tmp_path, monkeypatch):
    artifacts = []
    monkeypatch.setattr(offline.experiment, "log_artifact", artifacts.append)
    layer = {"layer": (torch.ones(1, 2), torch.ones(2, 1))}
    folders = [write_adapter(tmp_path / str(number), layer) for number in range(2)]
    with pytest.warns(UserWarning, match="hold the same weights"):
        merged = UniformSoup().cook(folders)
    log_soup([offline], merged, merged.save(tmp_path / "merged"))
    assert set(artifacts[-1].manifest.entries) == {"adapter_config.json", "adapter_model.safetensors"}


def test_offline_keeps_tables_pictures_scalars_and_the_model(report, file, offline, tmp_path, monkeypatch, caplog):
    artifacts = []
    run = offline.experiment
    monkeypatch.setattr(
        run, "log_artifact", lambda artifact, keep=run.log_artifact: artifacts.append(artifact) or keep(artifact)
    )
    with caplog.at_level(logging.WARNING):
        log_report([offline], report, file)
    [artifact] = [artifact for artifact in artifacts if artifact.type == "model"]  # wandb logs tables as artifacts, too
    assert artifact.name.startswith("soup-")
    assert list(artifact.manifest.entries) == ["soup.safetensors"]
    assert not ours(caplog)  # no ingredient is an artifact: nothing to warn of
    summary = dict(run.summary)
    assert summary["report/uniform_soup/uci_test_gain"] == pytest.approx(
        report.comparisons[2].tests["uci_test"].gain.mean
    )
    assert summary["report/best_single/mnist_accuracy"] == pytest.approx(
        report.comparisons[1].tests["mnist"].accuracy.mean
    )
    wandb.finish()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    pictures = {p.name.rsplit("_", 2)[0] for p in (folder / "files/media/images/report").iterdir()}
    assert pictures == {picture.name for picture in report.pictures}
    tables = {
        p.name.removesuffix(".table.json").rsplit("_", 2)[0]: json.loads(p.read_text())
        for p in folder.rglob("*.table.json")
    }
    assert set(tables) == {"comparison", "greedy_soup", "learned_soup_per_tensor", "WiSE-FT_α_0.9"}
    comparison = [dict(zip(tables["comparison"]["columns"], row, strict=True)) for row in tables["comparison"]["data"]]
    assert [row["model"] for row in comparison] == [row.label for row in report.comparisons]
    assert comparison[1]["mnist gain"] is None
    assert comparison[2]["mnist verdict"] == report.comparisons[2].tests["mnist"].verdict
    greedy = tables["greedy_soup"]
    assert greedy["columns"] == ["trial", "tried", "score", "kept", "reason", "distance"]
    assert greedy["data"][1][:5] == [2, "run-1-lr1.2e-03", 0.952, False, "0.9550 → 0.9520"]


def test_offline_lineage_is_one_warning_and_stays_in_the_metadata(report, file, offline, caplog, monkeypatch):
    artifacts = []
    monkeypatch.setattr(offline.experiment, "log_artifact", artifacts.append)
    made = from_artifacts(report.of_kind("soup")[1].soup)
    with caplog.at_level(logging.WARNING, "lightning_soup"):
        log_soup([offline], made, file)
    [message] = ours(caplog)
    assert "could not record which artifacts" in message
    assert [i["source"] for i in artifacts[-1].metadata["ingredients"]] == [SOURCE.format(i) for i in range(3)]


def test_disabled_runs_go_through(report, file, tmp_path):
    logger = WandbLogger(project="digits", save_dir=tmp_path, mode="disabled")
    log_report([logger], report, file)
    assert logger.experiment.disabled
    wandb.finish()


def test_online_lineage_and_metadata(report, file, caplog):
    run = OnlineRun()
    made = from_artifacts(report.of_kind("soup")[1].soup)
    log_soup([OnlineLogger(run)], made, file)
    assert run.used == ["team/digits/model-0:v0", "team/digits/model-1:v0", "team/digits/model-2:v0"]
    assert not ours(caplog)
    [artifact] = run.artifacts
    assert artifact.name == "soup-1a2b"
    metadata = artifact.metadata
    assert (metadata["recipe"], metadata["metric"], metadata["mode"]) == ("GreedySoup", "val_acc", "max")
    assert metadata["score"] == pytest.approx(0.958)
    assert metadata["per_tensor"] is False
    assert metadata["ingredients"][1] == {
        "label": "run-1-lr1.2e-03", "source": "wandb:team/digits/model-1:v0",
        "digest": made.ingredients[1].weights.digest(), "coefficient": 0.0, "step": 100, "metrics": {"val_acc": 0.9},
    }  # fmt: skip


def test_metadata_of_per_tensor_coefficients_are_means_over_elements(report, file):
    run = OnlineRun()
    made = report.of_kind("soup")[2].soup
    log_soup([OnlineLogger(run)], made, file)
    shares = [i["coefficient"] for i in run.artifacts[0].metadata["ingredients"]]
    assert shares == pytest.approx(list(made.shares()))
    assert sum(shares) == pytest.approx(1)
    assert run.artifacts[0].metadata["per_tensor"] is True


def test_metadata_shows_a_min_metric_as_it_is_and_survives_infinity(file):
    made = soup("GreedySoup", ["a", "b"], (0.5, 0.5), -0.25, [trial("a", -0.25), trial("b", None)], mode="min")
    made.ingredients[0].metrics["train_loss"] = float("inf")
    run = OnlineRun()
    log_soup([OnlineLogger(run)], made, file, label="a [min] soup")
    assert run.artifacts[0].metadata["score"] == 0.25
    assert run.artifacts[0].metadata["ingredients"][0]["metrics"] == {"val_acc": 0.9, "train_loss": None}
    assert [row[2] for row in run.logged["history/a_min_soup"].data] == [0.25, None]


def test_a_server_that_refuses_lineage_does_not_fail_the_run(report, file, caplog):
    run = OnlineRun(error=wandb.errors.CommError("no such artifact"))
    with caplog.at_level(logging.WARNING, "lightning_soup"):
        log_soup([OnlineLogger(run)], from_artifacts(report.of_kind("soup")[0].soup), file)
    [message] = ours(caplog)
    assert "no such artifact" in message
    assert len(run.artifacts) == 1


def test_without_a_file_there_is_no_artifact(report):
    run = OnlineRun()
    log_soup([OnlineLogger(run)], report.of_kind("soup")[1].soup)
    assert list(run.logged) == ["history/soup"]
    assert run.artifacts == []


def test_other_loggers_get_the_numbers(report, file, tmp_path):
    logger = CSVLogger(tmp_path)
    log_report([logger], report, file)
    with open(f"{logger.log_dir}/metrics.csv") as metrics:
        [row] = csv.DictReader(metrics)
    assert float(row["report/mean_ingredient/mnist_gain"]) == pytest.approx(
        report.comparisons[0].tests["mnist"].gain.mean
    )


def test_no_loggers_no_work():
    log_report([], SimpleNamespace(comparisons=[], of_kind=lambda kind: []))


def test_a_continual_run_is_a_matrix_curves_and_pictures(offline, tmp_path):
    names = ("red", "green")
    matrix = {"red": {"red": 90.0, "green": 40.0}, "green": {"red": 70.0, "green": 80.0}}
    result = ContinualResult(tmp_path, names, {}, {"red": 50.0, "green": 45.0}, matrix)
    run = offline.experiment
    log_continual([offline, CSVLogger(tmp_path, version=0)], result)
    assert run.summary["continual/transfer"] == 40.0
    assert run.summary["continual/forget"] == -20.0
    assert run.summary["accuracy/green"] == 80.0
    wandb.finish()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    pictures = {p.name.rsplit("_", 2)[0] for p in (folder / "files/media/images/continual").iterdir()}
    assert pictures == {"heatmap", "curves", "metrics"}
    [table] = (folder / "files/media/table/continual").iterdir()
    assert json.loads(table.read_text())["data"][0] == ["zero-shot", 50.0, 45.0]
    with open(tmp_path / "lightning_logs/version_0/metrics.csv") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["accuracy/red"] for row in rows if row["accuracy/red"]] == ["50.0", "90.0", "70.0"]


def test_one_task_has_no_transfer_to_log(tmp_path):
    run = OnlineRun()
    log_continual([OnlineLogger(run)], ContinualResult(tmp_path, ("red",), {}, {"red": 50.0}, {"red": {"red": 90.0}}))
    assert run.logged["continual/last"] == 90.0
    assert "continual/transfer" not in run.logged


def test_a_search_over_sizes_is_numbers_and_a_picture(offline, tmp_path):
    sizes = [Resolution((side, side)) for side in (192, 224)]
    row = {size: SizeScore(0.7 + i / 10, 0.02, 145.0 + i, 0.001, 100) for i, size in enumerate(sizes)}
    found = ResolutionChoice({"val": row}, {"val": sizes[1]}, sizes[0], "best", "acc", "val")
    log_resolution([offline, CSVLogger(tmp_path / "csv")], found, {"test": {sizes[1]: row[sizes[1]]}})
    summary = offline.experiment.summary
    assert summary["resolution/val/192"] == 0.7
    assert summary["resolution/test/test/224"] == pytest.approx(0.8)
    wandb.finish()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    assert list((folder / "files/media/images/resolution").glob("*.png"))
    [table] = (tmp_path / "csv").rglob("metrics.csv")
    assert "resolution/val/224" in table.read_text()


def test_the_weights_of_families_are_a_picture(offline, tmp_path):
    trainer = quiet_trainer(max_epochs=2, logger=offline)
    trainer.fit(AwareNet(three_families(), num_classes=3), datamodule=HeldOutData())
    assert offline.experiment.summary["alpha/good"] > 0.3
    wandb.finish()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    assert list((folder / "files/media/images/ensemble").glob("*.png"))
