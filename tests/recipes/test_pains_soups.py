"""How making soups has failed people elsewhere: from one training, from many, and in trackers.

Named as in tests/callbacks/test_live_average_pains.py.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from lightning_soup.callbacks import ModelSoup
from lightning_soup.cli.main import main
from lightning_soup.cli.sweep import sweep
from lightning_soup.cli.sweep_training import flags
from lightning_soup.data.transforms import Augmentation, Preprocessing
from lightning_soup.recipes import UniformSoup, gather_ingredients
from lightning_soup.runs.sweep_file import read_sweep_file
from lightning_soup.runs.tracking import log_soup
from lightning_soup.weights import open_checkpoint
from tests.helpers.averages import assert_close, equal, fit
from tests.helpers.ingredients import tiny_run
from tests.helpers.sweeps import base_config, write_yaml

CONFIGS = Path(__file__).parents[2] / "configs"


def epochs_of(kept):
    """The numbers of the epochs whose files were kept."""
    return sorted(int(Path(path).stem.removeprefix("epoch=")) for path in kept.best_k_models)


def test_l20_the_best_n_checkpoints_are_averaged_by_adding_one_callback(tmp_path):
    kept = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=3)
    options = {"epochs": 6, "enable_checkpointing": True, "num_sanity_val_steps": 0}
    _, module, trail = fit([kept, ModelSoup()], **options)
    assert len(epochs_of(kept)) == 3
    assert_close(module, equal({}, [trail[6 * (epoch + 1)] for epoch in epochs_of(kept)]))
    assert_close(
        dict(open_checkpoint(tmp_path / "soup.ckpt")), equal({}, [trail[6 * (e + 1)] for e in epochs_of(kept)])
    )


def test_l20_the_last_n_epochs_are_averaged_by_one_argument(tmp_path):
    _, module, trail = fit([ModelSoup(last=3)], epochs=6, default_root_dir=tmp_path)
    assert_close(module, equal({}, [trail[24], trail[30], trail[36]]))


# ------------------------------------------------------------------------------------------------------------ trackers


@pytest.mark.filterwarnings("ignore:The `anonymous` setting", "ignore:.*does not have many workers")
@pytest.mark.slow
def test_c06_trainings_in_a_loop_are_runs_of_their_own_in_one_group(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    began, finish = [], wandb.finish

    def finished(**options):
        began.append((wandb.run.id, wandb.run.group, dict(wandb.run.config)["model.lr"]))
        finish(**options)

    monkeypatch.setattr(wandb, "finish", finished)
    logger = {"class_path": "WandbLogger", "init_args": {"project": "p", "save_dir": "logs"}}
    base = write_yaml(tmp_path / "base.yaml", base_config(logger=logger, log_every_n_steps=1, max_epochs=1))
    grid = {"method": "grid", "name": "lr", "parameters": {"model.lr": {"values": [0.01, 0.02]}}}
    result = sweep(str(base), str(write_yaml(tmp_path / "sweep.yaml", grid)))
    assert len(result.finished) == 2
    assert wandb.run is None
    assert len({run for run, _, _ in began}) == 2
    assert [what[1:] for what in began] == [("lr", 0.01), ("lr", 0.02)]


def from_artifacts():
    """A soup whose ingredients were downloaded from W&B."""
    ingredients = []
    for number, ingredient in enumerate(gather_ingredients(tiny_run()[1])):
        opened = ingredient.weights
        ingredient = replace(ingredient, source=f"wandb:team/digits/model-{number}:v0")
        ingredient.__dict__["weights"] = opened  # as gather_ingredients leaves it: opened once
        ingredients.append(ingredient)
    return UniformSoup().cook(ingredients)


SOURCES = [f"wandb:team/digits/model-{number}:v0" for number in range(3)]


def test_c07_offline_the_lineage_is_in_the_metadata_and_in_the_file(tmp_path, monkeypatch, caplog):
    soup = from_artifacts()
    path = soup.save(tmp_path / "soup.safetensors")
    digests = [item.weights.digest() for item in soup.ingredients]
    manifest = open_checkpoint(path).provenance["ingredients"]
    assert [item["artifact"] for item in manifest] == SOURCES
    assert [item["digest"] for item in manifest] == digests

    logger = WandbLogger(project="digits", save_dir=tmp_path, mode="offline")
    artifacts = []
    monkeypatch.setattr(logger.experiment, "log_artifact", artifacts.append)
    with caplog.at_level(logging.WARNING, "lightning_soup"):
        log_soup([logger], soup, path)  # and does not fail
    wandb.finish()
    assert "could not record which artifacts" in caplog.text
    (artifact,) = artifacts
    assert [item["source"] for item in artifact.metadata["ingredients"]] == SOURCES
    assert [item["digest"] for item in artifact.metadata["ingredients"]] == digests


@pytest.mark.parametrize("error", [None, wandb.errors.CommError("the server is away")], ids=["online", "refused"])
def test_c07_online_the_lineage_is_declared_and_no_error_ends_the_run(tmp_path, error):
    class Run:
        id, used, artifacts = "1a2b", [], []

        def log(self, content):
            pass

        def use_artifact(self, name):
            if error is not None:
                raise error
            self.used.append(f"wandb:{name}")

        def log_artifact(self, artifact):
            self.artifacts.append(artifact)

    class Logger(WandbLogger):
        def __init__(self):
            pass

        experiment = Run()

    soup = from_artifacts()
    log_soup([Logger()], soup, soup.save(tmp_path / "soup.safetensors"))
    assert Logger.experiment.used == ([] if error else SOURCES)
    assert len(Logger.experiment.artifacts) == 1


# ------------------------------------------------------------------------------------------------------ sweeps of W&B


def agent_flags(values):
    """What W&B's agent makes of ``${args}``: one flag for each top-level parameter."""
    return create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})["args"]


def agent_command(file, flags):
    """The command that W&B's agent runs."""
    program, *words = yaml.safe_load(Path(file).read_text())["command"]
    assert program == "lightning-soup"
    return [part for word in words for part in (flags if word == "${args}" else [word])]


def printed(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


def at(config, name):
    """The value of a dotted name in a printed config, with or without ``init_args``."""
    first, *others = name.split(".")
    node = config[first]
    for part in others:
        node = node["init_args"][part] if "init_args" in node and part not in node else node[part]
    return node


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*sweep*.yaml")), ids=lambda path: path.stem)
def test_c08_the_sweep_files_serve_the_agent_in_any_order_of_flags(file, capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)  # which is where their commands are given
    for setting in read_sweep_file(file).settings(seed=0)[:3]:
        given = agent_flags(setting)
        config = printed(capsys, agent_command(file, given))
        for name, value in setting.items():
            if value is not None:
                assert at(config, name) == (pytest.approx(value) if isinstance(value, float) else value), name
        assert printed(capsys, agent_command(file, given[::-1])) == config


@pytest.mark.parametrize("write", [agent_flags, flags], ids=["agent", "here"])
def test_c08_a_setting_without_augmentation_is_taken_as_such(write, capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    file, name = CONFIGS / "model_soup_clip_sweep.yaml", "data.augmentation.auto_augment"
    without = [s for s in read_sweep_file(file).settings(seed=0) if not str(s[name]).startswith("rand")]
    config = printed(capsys, agent_command(file, write(without[0])))
    assert Preprocessing(img_size=8).train(Augmentation(**at(config, "data.augmentation")))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.slow
def test_c08_nested_parameters_train_the_same_here_and_by_the_agent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = write_yaml(tmp_path / "base.yaml", base_config(max_epochs=1))
    nested = {"model": {"parameters": {"lr": {"value": 0.02}}}, "trainer": {"parameters": {"max_epochs": {"value": 2}}}}
    file = write_yaml(tmp_path / "sweep.yaml", {"method": "grid", "name": "nested", "parameters": nested})
    (run,) = sweep(str(base), str(file)).finished
    assert run.setting == {"model.lr": 0.02, "trainer.max_epochs": 2}
    by_agent = agent_flags({"model": {"lr": 0.02}, "trainer": {"max_epochs": 2}})  # where they are dictionaries
    keep = ["--trainer.default_root_dir", "agent", "--seed_everything", str(run.seed)]
    main(["fit", "--config", str(base), *keep, *by_agent])
    (path,) = (tmp_path / "agent").rglob("*.ckpt")
    ours, theirs = open_checkpoint(run.checkpoint), open_checkpoint(path)
    assert theirs.metadata["hyper_parameters"]["lr"] == 0.02
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert json.loads((run.folder / "run.json").read_text())["setting"] == run.setting
