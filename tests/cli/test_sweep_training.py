import json
import os
import signal

import pytest
import torch
import yaml
from lightning.pytorch.loggers import WandbLogger

from lightning_soup.cli.soup_cli import SoupCLI
from lightning_soup.cli.sweep_training import RunCLI, flags, train_setting
from lightning_soup.errors import LightningSoupError
from lightning_soup.weights import open_checkpoint
from tests.helpers.boring import TinyClassifier
from tests.helpers.sweeps import base_config, write_yaml

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")  # data of 100 samples


class Getting(TinyClassifier):
    """Logs a made-up val_acc: best in the middle epoch."""

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", {0: 0.2, 1: 0.9, 2: 0.4}[self.current_epoch])
        self.log("val_loss", 1.0 + self.current_epoch)


class Interrupted(TinyClassifier):
    def training_step(self, batch, batch_idx):
        raise KeyboardInterrupt


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a setting in a folder under `tmp_path`, with nothing else to write to."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def run(setting=None, name="run", seed=0, model=None, **trainer):
        content = base_config(**trainer)
        if model is not None:
            content["model"] = {"class_path": f"{__name__}.{model}"}
        base = write_yaml(tmp_path / "base.yaml", content)
        (tmp_path / name).mkdir()
        trained = train_setting(setting or {}, tmp_path / name, seed, base=base, group="the sweep")
        assert os.listdir(elsewhere) == []
        return trained

    return run


def weights(trained):
    return torch.cat([tensor.flatten() for tensor in open_checkpoint(trained.checkpoint).values()])


def test_flags():
    setting = {"a": 0.0001, "b": True, "c": None, "d": "text", "e": [1, "x"], "f": {"k": 1}, "g": 1e-09}
    written = ["--a=0.0001", "--b=true", "--c=null", "--d=text", '--e=[1, "x"]', '--f={"k": 1}', "--g=1e-09"]
    assert flags(setting) == written


def test_without_a_checkpoint_callback_the_last_weights_are_saved(train, tmp_path):
    trained = train({"model.lr": 0.01}, max_epochs=3)
    assert trained.checkpoint.parent == tmp_path / "run" / "checkpoints"
    assert [path.name for path in trained.checkpoint.parent.iterdir()] == ["epoch=2-step=18.ckpt"]
    assert "optimizer_states" not in torch.load(trained.checkpoint, weights_only=True)
    assert set(trained.metrics) == {"val_acc", "val_loss"}
    assert all(type(value) is float for value in trained.metrics.values())
    assert open_checkpoint(trained.checkpoint).metadata["hyper_parameters"]["lr"] == 0.01
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "config.yaml"]


def test_settings_reach_the_model_by_either_name_and_the_seed_decides_the_rest(train):
    first = train({"model.lr": 0.01}, "a", seed=3)
    assert torch.equal(weights(first), weights(train({"model.init_args.lr": 0.01}, "b", seed=3)))
    assert not torch.equal(weights(first), weights(train({"model.lr": 0.02}, "c", seed=3)))
    assert not torch.equal(weights(first), weights(train({"model.lr": 0.01}, "d", seed=4)))
    own_seed = train({"model.lr": 0.01, "seed_everything": 3}, "e", seed=4)
    assert torch.equal(weights(first), weights(own_seed))


def checkpoint(**options):
    return {"class_path": "ModelCheckpoint", "init_args": options}


def test_the_base_configs_checkpoint_decides_and_its_metric_is_that_of_the_ingredient(train):
    best = checkpoint(monitor="val_acc", mode="max", dirpath="shared", save_last=True, filename="{epoch}")
    trained = train(model="Getting", max_epochs=3, callbacks=[best])
    assert trained.checkpoint.name == "epoch=1.ckpt"
    assert trained.metrics["val_acc"] == pytest.approx(0.9)
    assert trained.metrics["val_loss"] == 3.0
    assert sorted(path.name for path in trained.checkpoint.parent.iterdir()) == ["epoch=1.ckpt", "last.ckpt"]
    last = train(name="last", model="Getting", max_epochs=3, callbacks=[checkpoint(save_last=True, save_top_k=0)])
    assert last.checkpoint.name == "last.ckpt"
    assert last.metrics["val_acc"] == pytest.approx(0.4)
    single = train(name="single", callbacks=checkpoint(filename="one"), enable_checkpointing=False)
    assert single.checkpoint.name == "one.ckpt"


def test_a_run_that_saved_nothing_is_an_error(train):
    with pytest.raises(LightningSoupError, match=r"base.yaml: the training saved no checkpoint"):
        train(callbacks=[checkpoint(save_top_k=0)])


def test_the_saved_config_gives_the_same_weights(train, tmp_path):
    trained = train({"model.lr": 0.01}, seed=5, devices="auto")
    saved = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(saved.read_text())
    assert content["seed_everything"] == 5
    assert content["trainer"]["devices"] == 1
    again = SoupCLI(["fit", "--config", str(saved), "--trainer.callbacks=null", "--trainer.enable_checkpointing=false"])
    module = torch.cat([tensor.flatten() for tensor in again.model.state_dict().values()])
    assert torch.equal(module, weights(trained))


def test_loggers_write_into_the_runs_folder(train, tmp_path):
    loggers = [{"class_path": "CSVLogger", "init_args": {"save_dir": "shared", "version": 7}}]
    train(logger=loggers, log_every_n_steps=1)
    assert (tmp_path / "run" / "lightning_logs" / "version_7" / "metrics.csv").exists()
    train(name="one", logger=loggers[0], log_every_n_steps=1)
    assert (tmp_path / "one" / "lightning_logs" / "version_7" / "metrics.csv").exists()


WANDB = {"class_path": "WandbLogger", "init_args": {"project": "p", "id": "shared", "save_dir": "shared"}}


@pytest.mark.filterwarnings("ignore:The `anonymous` setting")
def test_each_run_has_a_wandb_run_of_its_own(train, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen = []

    def finish(exit_code=None):
        run = wandb.run
        seen.append((run.id, run.name, run.group, run.dir, dict(run.config), exit_code))
        original(exit_code=exit_code)

    import wandb

    wandb.teardown()  # what an earlier test has read of the environment is kept until then
    original = wandb.finish
    monkeypatch.setattr(wandb, "finish", finish)
    train({"model.lr": 0.5}, "first", seed=8, logger=WANDB, log_every_n_steps=1)
    with pytest.raises(RuntimeError, match="diverged"):
        train({}, "second", logger=WANDB, log_every_n_steps=1, model="Diverging")
    assert wandb.run is None
    assert [run[1:3] for run in seen] == [("first", "the sweep"), ("second", "the sweep")]
    assert len({run[0] for run in seen} | {"shared"}) == 3
    assert all(str(tmp_path / name) in run[3] for name, run in zip(("first", "second"), seen, strict=True))
    assert seen[0][4]["model.lr"] == 0.5
    assert seen[0][4]["seed"] == 8
    assert [run[5] for run in seen] == [0, 1]


class Diverging(TinyClassifier):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("diverged")


def test_names_that_the_config_gives_are_kept(tmp_path):
    logger = {"class_path": "WandbLogger", "init_args": {"name": "mine", "group": "ours"}}
    base = write_yaml(tmp_path / "base.yaml", base_config(logger=logger))
    cli = RunCLI(base, {}, tmp_path, "the sweep", work=lambda trainer, model, datamodule: None)
    (logger,) = cli.trainer.loggers
    assert isinstance(logger, WandbLogger)
    assert cli.config.fit.trainer.logger.init_args.name == "mine"
    assert cli.config.fit.trainer.logger.init_args.group == "ours"


def test_ctrl_c_stays_ctrl_c(train):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(model="Interrupted")
    assert signal.getsignal(signal.SIGINT) is handler


def test_run_cli_hands_over_what_the_config_describes(tmp_path):
    base = write_yaml(tmp_path / "base.yaml", base_config())
    given = []
    RunCLI(base, {"model.lr": 0.3}, tmp_path, "", work=lambda *objects: given.extend(objects))
    trainer, model, datamodule = given
    assert json.dumps([model.hparams.lr, datamodule.batch_size, trainer.max_epochs]) == "[0.3, 16, 2]"
