import json
import logging
import os

import pytest
import torch
from jsonargparse import auto_cli

from lightning_soup.cli.sweep import fingerprint, sweep
from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.recipes import GreedySoup
from lightning_soup.weights import open_checkpoint
from tests.helpers.boring import TinyClassifier
from tests.helpers.sweeps import base_config, write_yaml

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")  # data of 100 samples

GRID = {"method": "grid", "name": "my sweep/1", "parameters": {"model.lr": {"values": [0.01, 0.05]}}}


class Fragile(TinyClassifier):
    """Counts its trainings, and does not survive a large learning rate."""

    trained = 0

    def on_fit_start(self):
        Fragile.trained += 1
        if self.hparams.lr > 1:
            raise FloatingPointError("the loss is NaN; lower the learning rate")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Fragile.trained = 0
    base = base_config(max_epochs=1)
    base["model"] = {"class_path": f"{__name__}.Fragile"}
    write_yaml(tmp_path / "base.yaml", base)


def command(tmp_path, sweep_file, *arguments):
    write_yaml(tmp_path / "sweep.yaml", sweep_file)
    return auto_cli(sweep, args=["base.yaml", "sweep.yaml", *arguments])


def with_values(*values):
    return {**GRID, "parameters": {"model.lr": {"values": list(values)}, "seed_everything": {"value": 1}}}


def test_the_command_trains_each_setting_once(tmp_path, capsys):
    result = command(tmp_path, GRID, "--seed=4")
    assert [run.setting for run in result.finished] == [{"model.lr": 0.01}, {"model.lr": 0.05}]
    assert [run.seed for run in result.runs] == [4, 5]
    assert result.folder.as_posix() == "runs/my-sweep-1"
    assert all(open_checkpoint(path).metadata["hyper_parameters"]["lr"] for path in result.checkpoints)
    lines = capsys.readouterr().out.splitlines()
    assert any("model.lr" in line and "val_acc" in line for line in lines)
    for run in result.runs:
        (row,) = [line for line in lines if run.folder.name in line]
        assert f"{run.setting['model.lr']:.4g}" in row
        assert f"{run.metrics['val_acc']:.4g}" in row
    assert command(tmp_path, GRID, "--seed=4") == result
    assert Fragile.trained == 2
    assert command(tmp_path, with_values(0.01), "--folder=other").folder.name == "other"


def test_a_changed_base_config_trains_anew(tmp_path):
    command(tmp_path, with_values(0.01))
    base = (tmp_path / "base.yaml").read_text()
    (tmp_path / "base.yaml").write_text("# a comment\n" + base)
    command(tmp_path, with_values(0.01))
    assert Fragile.trained == 1
    (tmp_path / "base.yaml").write_text(base.replace("max_epochs: 1", "max_epochs: 2"))
    command(tmp_path, with_values(0.01))
    assert Fragile.trained == 2


def test_failed_runs_are_named_at_the_end_and_the_rest_is_trained(tmp_path, capsys):
    result = command(tmp_path, with_values(5.0, 0.01))
    assert len(result.finished) == 1
    captured = capsys.readouterr()
    (row,) = [line for line in captured.out.splitlines() if result.failed[0].folder.name in line]
    assert "failed" in row
    assert (
        f"failed: {result.failed[0].folder} (model.lr=5, seed_everything=1): "
        "FloatingPointError: the loss is NaN; lower the learning rate\n"
    ) in captured.err
    with pytest.raises(LightningSoupError, match="none of the 2 runs finished"):
        command(tmp_path, with_values(5.0, 6.0))


def test_nothing_is_trained_before_all_is_checked(tmp_path):
    sweep_file = with_values(0.01)
    sweep_file["parameters"]["model.lrr"] = {"value": 1}
    with pytest.raises(UnsupportedSetup, match=r"sweep.yaml: there is no option model.lrr"):
        command(tmp_path, sweep_file)
    with pytest.raises(UnsupportedSetup, match=r"sweep.yaml: model.lr does not take 'high'"):
        command(tmp_path, with_values(0.01, "high"))
    assert Fragile.trained == 0
    assert not (tmp_path / "runs").exists()


def test_a_metric_nobody_logged_is_said_with_those_that_were(tmp_path, capsys):
    command(tmp_path, with_values(0.01), "--metric=val_f1")
    assert "No run logged 'val_f1'; logged: val_acc, val_loss." in capsys.readouterr().err


def test_cooking_the_ingredients(tmp_path):
    result = command(tmp_path, with_values(0.01, 5.0, 0.05), "--cook=UniformSoup")
    soup = open_checkpoint(tmp_path / "runs" / "my-sweep-1" / "soup.safetensors")
    a, b = [open_checkpoint(path) for path in result.checkpoints]
    for name, tensor in soup.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2)


def test_the_recipe_gets_metric_and_mode_and_may_come_from_yaml(tmp_path, monkeypatch):
    given = {}

    def soup(self, model, datamodule=None, **arguments):
        given.update(arguments, lr=model.hparams.lr, data=datamodule)

    monkeypatch.setattr("lightning_soup.cli.trainer.SoupTrainer.soup", soup)
    write_yaml(tmp_path / "options.yaml", {"cook": {"class_path": "GreedySoup", "init_args": {"strict": True}}})
    result = command(tmp_path, with_values(0.02), "--config=options.yaml", "--metric=val_loss", "--mode=min")
    assert given.pop("data") is not None
    assert given == {
        "ingredients": [str(result.runs[0].checkpoint)],
        "recipe": GreedySoup(strict=True),
        "output": "runs/my-sweep-1/soup.safetensors",
        "metric": "val_loss",
        "mode": "min",
        "lr": 0.02,
    }


def test_lightning_is_quiet_meanwhile_and_speaks_again_afterwards(tmp_path, caplog):
    for name in ("lightning.pytorch", "lightning.fabric"):
        caplog.set_level(logging.INFO, name)
    command(tmp_path, with_values(0.01))
    assert [record for record in caplog.records if record.levelno == logging.INFO] == []
    assert {logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")} == {logging.INFO}


def test_progress_is_by_lines_where_lightnings_own_bar_is_shown(tmp_path, capsys):
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text().replace("enable_progress_bar: false", "enable_progress_bar: true"))
    command(tmp_path, GRID)
    assert "Training ingredients: 2 of 2 done" in capsys.readouterr().err


def test_fingerprint_is_of_values_and_of_named_files(tmp_path):
    weights = tmp_path / "start.ckpt"
    weights.write_bytes(b"one")
    content = {"model": {"checkpoint_path": "start.ckpt"}, "list": [{"path": str(weights)}], "lr": 0.1}
    base = write_yaml(tmp_path / "named.yaml", content)
    first = fingerprint(base)
    base.write_text("# comment\n" + json.dumps(dict(reversed(content.items()))))
    assert fingerprint(base) == first
    weights.write_bytes(b"two")
    assert fingerprint(base) != first
    weights.write_bytes(b"one")
    assert fingerprint(base) == first
    assert fingerprint(write_yaml(base, {**content, "lr": 0.2})) != first
    fingerprint(write_yaml(base, {"text": "a long text that names no file" * 100, "nul": "\0"}))


def test_fingerprint_counts_files_that_settings_name(tmp_path):
    start = tmp_path / "start.ckpt"
    start.write_bytes(b"one")
    base, settings = write_yaml(tmp_path / "named.yaml", {"lr": 0.1}), [{"model.checkpoint_path": str(start)}]
    first = fingerprint(base, settings)
    start.write_bytes(b"two")
    assert fingerprint(base, settings) != first


def test_fingerprint_of_large_files_is_their_size_and_date(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_soup.cli.sweep._LARGE", 2)
    data = tmp_path / "data.bin"
    data.write_bytes(b"one")
    base = write_yaml(tmp_path / "named.yaml", {"path": str(data)})
    first = fingerprint(base)
    os.utime(data, ns=(0, 0))
    assert fingerprint(base) != first
    second = fingerprint(base)
    data.write_bytes(b"two")
    os.utime(data, ns=(0, 0))
    assert fingerprint(base) == second


@pytest.mark.slow
def test_jobs(tmp_path):
    here = command(tmp_path, with_values(0.01, 0.05, 5.0), "--folder=here")
    apart = command(tmp_path, with_values(0.01, 0.05, 5.0), "--folder=apart", "--jobs=2")
    assert [run.folder.name for run in apart.runs] == [run.folder.name for run in here.runs]
    assert apart.failed[0].error == "FloatingPointError: the loss is NaN; lower the learning rate"
    for ours, theirs in zip(here.finished, apart.finished, strict=True):
        assert ours.metrics == theirs.metrics
        a, b = open_checkpoint(ours.checkpoint), open_checkpoint(theirs.checkpoint)
        assert all((a[name] == b[name]).all() for name in a)
        assert "Trainer.fit" in (theirs.folder / "log.txt").read_text()
