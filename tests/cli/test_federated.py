"""`lightning-soup federated`: trains, tells, goes on where it was ended, and refuses what cannot work."""

import pytest
import yaml

from lightning_soup.cli.main import main
from lightning_soup.weights import open_checkpoint

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
        (["--classes=2"], "the mixes are over 2 classes"),
        (["--trainer.max_epochs=3"], "max_epochs is decided by local_steps"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(tmp_path, *options)
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
    command(tmp_path)
    with pytest.raises(SystemExit):
        command(tmp_path, "--seed=1")
    assert "the state of another training" in capsys.readouterr().err
