"""`lightning-soup federated`: trains, tells, goes on where it was ended, and refuses what cannot work."""

import json
import signal

import pytest
import yaml
from lightning.pytorch import Callback
from safetensors import safe_open

from lightning_soup.cli.main import main
from lightning_soup.distributed import dirichlet_participation
from lightning_soup.weights import open_checkpoint
from tests.helpers.boring import TinyClassifier

CONFIG = {
    "model": {"class_path": "tests.helpers.boring.TinyClassifier", "init_args": {"batch_norm": True}},
    "data": {"class_path": "tests.helpers.boring.TinyData"},
    "classes": 3,
    "clients": 6,
    "mean_rate": 0.5,
    "local_steps": 2,
    "rounds": 4,
    "evaluate_every": 2,
    "cutoff": 5,
}

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 10 closed gaps")


def command(folder, *options, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **changes}))
    main(["federated", "--config", str(folder / "config.yaml"), "--folder", str(folder / "run"), *options])


def test_it_trains_and_goes_on(tmp_path, capsys):
    command(tmp_path / "whole")
    told = capsys.readouterr().out
    assert "6 clients with rates" in told
    assert "0 of 4 rounds are done" in told
    assert [line.split(":")[0] for line in told.splitlines() if "val_acc" in line] == ["round 2", "round 4"]
    command(tmp_path / "parts", "--rounds=3")
    command(tmp_path / "parts")
    assert "3 of 4 rounds are done" in capsys.readouterr().out
    whole, parts = (open_checkpoint(tmp_path / name / "run/weights.safetensors") for name in ("whole", "parts"))
    assert all((whole[name] == value).all() for name, value in parts.items())
    assert len(whole) == len(parts) > 4


@pytest.mark.parametrize("rule", ["AverageParticipating", "AverageAll", "KnownParticipation", "MIFA", "FedVARP"])
def test_every_rule_can_be_asked_for(tmp_path, capsys, rule):
    command(tmp_path, f"--rule={rule}", "--rounds=1", "--pattern=Cyclic")
    assert "round 1" in capsys.readouterr().out


def test_errors_are_one_line(tmp_path, capsys):
    for options, message in (
        (["--clients=0"], "clients=0"),
        (["--cutoff=0"], "cutoff=0"),
        (["--evaluate_every=0"], "evaluate_every=0"),
        (["--rounds=-1"], "rounds=-1"),
        (["--seed=5000000000"], "seed=5000000000: expected an integer from 0 to 4294967295"),
        (["--pattern=Markov", "--arrival=2"], "arrival=2"),
        (["--pattern=Cyclic", "--period=0"], "period=0"),
        (["--trainer.acelerator=cpu"], "'acelerator' is no option"),
        (["--classes=2"], "the mixes are over 2 classes"),
        (["--trainer.max_epochs=3"], "max_epochs is decided by local_steps"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(tmp_path, *options)
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
    (tmp_path / "run").write_text("")
    with pytest.raises(SystemExit):
        command(tmp_path)
    told = capsys.readouterr()
    assert "cannot be written" in told.err
    assert "round 2" not in told.out
    (tmp_path / "run").unlink()
    command(tmp_path)
    with pytest.raises(SystemExit):
        command(tmp_path, "--seed=1")
    assert "the state of another training" in capsys.readouterr().err


class Interrupted(TinyClassifier):
    def training_step(self, batch, batch_idx):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_told(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            command(tmp_path, model={"class_path": "tests.cli.test_federated.Interrupted"})
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_callbacks_and_patterns_of_the_config(tmp_path, capsys):
    monitor = {"class_path": "tests.cli.test_federated.Mark"}
    given = {"mean_rate": 0.9, "concentration": 0.5, "preference": 3.0, "least_rate": 0.3, "seed": 4, "server_lr": 0.5}
    command(tmp_path, "--pattern=Markov", "--arrival=1", trainer={"callbacks": [monitor]}, **given)
    assert "round 4" in capsys.readouterr().out
    with safe_open(tmp_path / "run/federated.safetensors", "pt") as file:
        about = json.loads(file.metadata()["lightning_soup.federated"])
    rates = dirichlet_participation(
        6, 3, mean_rate=0.9, concentration=0.5, preference=3.0, least=0.3, seed=4
    ).rates.tolist()
    expected = {"arrival": 1.0, "lr": 0.5, "cutoff": 5, "local_seed": 4, "pattern_seed": 4, "pattern_rates": rates}
    assert {name: about["settings"][name] for name in expected} == expected
    assert about["settings"]["local_steps"] == 2
    assert {row["mark"] for row in about["extra"]["history"] if row["participants"]} == {1.0}


class Mark(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.log("mark", 1.0)
