import argparse
import sys
import warnings

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from lightning_soup.cli.soup_cli import SoupCLI
from lightning_soup.cli.trainer import SoupTrainer
from lightning_soup.errors import LightningSoupError, UnreadableCheckpoint, UnsupportedSetup
from lightning_soup.weights import save_weights
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.sweeps import base_config, write_yaml

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")  # data of 100 samples


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(model=None, **trainer):
    """Without checkpoints: several fits in one folder."""
    return base_config(model=model, enable_checkpointing=False, **trainer)


@pytest.fixture
def base(tmp_path):
    return str(write_yaml(tmp_path / "base.yaml", config()))


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_fit_from_flags_and_from_a_mapping_give_the_same_weights(base):
    by_flags = SoupCLI(["fit", "--config", base, "--model.lr=0.01", "--seed_everything=3"])
    assert type(by_flags.trainer) is SoupTrainer
    assert type(by_flags.model) is TinyClassifier
    assert type(by_flags.datamodule) is TinyData
    assert by_flags.trainer.global_step == 12
    mapping = {**config(model={"lr": 0.01}), "seed_everything": 3}
    by_mapping = SoupCLI({"subcommand": "fit", "fit": mapping})
    assert torch.equal(weights(by_flags.model), weights(by_mapping.model))
    other = SoupCLI(["fit", "--config", base, "--model.lr=0.01", "--seed_everything=4"])
    assert not torch.equal(weights(by_flags.model), weights(other.model))


def test_run_false_only_builds():
    cli = SoupCLI(config(model={"lr": 0.01}), run=False)
    assert cli.model.hparams.lr == 0.01
    assert cli.trainer.global_step == 0
    assert cli.config.seed_everything == 0


def test_saved_config_can_be_run_again_and_gives_the_same_weights(base, tmp_path):
    first = SoupCLI(["fit", "--config", base, "--model.lr=0.01", "--trainer.default_root_dir=logs"])
    saved = tmp_path / "logs" / "config.yaml"
    content = yaml.safe_load(saved.read_text())
    assert content["seed_everything"] == 0
    assert content["model"]["init_args"] == {"batch_norm": False, "lr": 0.01}
    again = SoupCLI(["fit", "--config", str(saved), "--trainer.default_root_dir=again"])
    assert torch.equal(weights(first.model), weights(again.model))


def test_saving_the_config_replaces_an_earlier_one_but_never_the_users(tmp_path):
    own = write_yaml(tmp_path / "config.yaml", config(max_epochs=1))
    before = own.read_text()
    for lr in (0.01, 0.02):
        SoupCLI(["fit", "--config", "config.yaml", f"--model.lr={lr}"])
        assert own.read_text() == before
        saved = yaml.safe_load((tmp_path / "config.saved.yaml").read_text())
        assert saved["model"]["init_args"]["lr"] == lr
    (tmp_path / "sub").mkdir()
    whole = write_yaml(tmp_path / "sub" / "config.yaml", {"fit": config(max_epochs=1)})
    before = whole.read_text()
    SoupCLI(["--config", "sub/config.yaml", "fit", "--trainer.default_root_dir=sub"])
    assert whole.read_text() == before


def test_saving_the_config_leaves_other_files_of_that_name_alone(tmp_path):
    write_yaml(tmp_path / "mine.yaml", config(max_epochs=1))
    (tmp_path / "config.yaml").write_text("my: notes\n")
    SoupCLI(["fit", "--config", "mine.yaml"])
    assert (tmp_path / "config.yaml").read_text() == "my: notes\n"
    assert (tmp_path / "config.saved.yaml").exists()


def test_public_classes_have_short_names():
    cli = SoupCLI({**config(), "data": "HandwritingDataModule"}, run=False)
    assert type(cli.datamodule).__module__ == "lightning_soup.data.handwriting"
    assert cli.config.data.class_path.endswith("HandwritingDataModule")


def test_modules_in_the_current_folder_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    (tmp_path / "users_module.py").write_text(
        "from tests.helpers.boring import TinyClassifier\n\n\nclass Mine(TinyClassifier):\n    pass\n"
    )
    assert type(SoupCLI({**config(), "model": "users_module.Mine"}, run=False).model).__name__ == "Mine"


@pytest.mark.parametrize("flag", ["--trainer.max_epoch=1", "--model.lrr=1", "--model.lr=high", "--model.l=1"])
def test_wrong_and_abbreviated_flags(base, flag, capsys):
    with pytest.raises(SystemExit) as stop:
        SoupCLI(["fit", "--config", base, flag])
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err
    with pytest.raises(argparse.ArgumentError):
        SoupCLI(["fit", "--config", base, flag], exit_on_error=False)


def test_arguments_beside_a_command_line_are_no_mistake(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-soup", "sweep", "base.yaml", "sweep.yaml"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        SoupCLI(config(), run=False)


class RefusingModel(TinyClassifier):
    def __init__(self) -> None:
        raise UnsupportedSetup("cannot be built")


class RefusingData(TinyData):
    def __init__(self) -> None:
        raise UnsupportedSetup("cannot be built")


class RefusingCallback(Callback):
    def __init__(self, rate: float = 1.0) -> None:
        raise UnsupportedSetup("cannot be built")


@pytest.mark.parametrize("key", ["model", "data", "trainer.callbacks"])
def test_errors_of_constructors_come_through(base, key):
    name = {"model": "RefusingModel", "data": "RefusingData", "trainer.callbacks": "RefusingCallback"}[key]
    with pytest.raises(UnsupportedSetup, match=r"^cannot be built$"):
        SoupCLI(["fit", "--config", base, f"--{key}={__name__}.{name}"])


def test_hyperparameters_are_saved_as_lightning_cli_saves_them(base):
    model = SoupCLI(["fit", "--config", base, "--model.lr=0.01"]).model
    assert model.hparams["_class_path"] == "tests.helpers.boring.TinyClassifier"
    assert model.hparams.lr == 0.01


def test_soup_takes_its_arguments_and_the_config_that_fit_saved(base, tmp_path, monkeypatch):
    fitted = SoupCLI(["fit", "--config", base, "--trainer.default_root_dir=logs"])
    given = {}

    def soup(self, model, datamodule=None, **arguments):
        given.update(arguments, model=model, datamodule=datamodule)

    parsed = ["soup", "--config", "logs/config.yaml", "--ingredients=['a.ckpt', 'b.ckpt']", "--metric=val_loss"]
    with pytest.raises(UnreadableCheckpoint):  # no such ingredients: the method itself was called
        SoupCLI(parsed)
    monkeypatch.setattr(SoupCLI, "soup", soup, raising=False)  # Lightning prefers a method of the CLI
    SoupCLI([*parsed, "--recipe=GreedySoup", "--recipe.strict=true", "--recalibrate=true"])
    assert given["ingredients"] == ["a.ckpt", "b.ckpt"]
    assert given["metric"] == "val_loss"
    assert type(given["recipe"]).__name__ == "GreedySoup"
    assert given["recipe"].strict
    assert given["recalibrate"] is True
    assert type(given["model"]) is type(fitted.model)
    assert not {"ckpt_path", "weights_only"} & set(given)


@pytest.mark.parametrize(("file", "message"), [("soup.safetensors", "a file of weights"), ("cut.ckpt", "truncated")])
def test_a_ckpt_path_that_lightning_cannot_read(base, tmp_path, file, message):
    path = save_weights(TinyClassifier(), tmp_path / "soup.safetensors")
    if file != path.name:
        torch.save(TinyClassifier().state_dict(), tmp_path / file)
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-200])
    with pytest.raises(LightningSoupError, match=message):
        SoupCLI(["validate", "--config", base, "--ckpt_path", str(tmp_path / file)], exit_on_error=False)
