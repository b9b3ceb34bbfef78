"""Every file in configs/ is one that the commands in its own head take."""

from pathlib import Path

import pytest
import yaml

from lightning_soup.cli.main import main
from lightning_soup.data import HandwritingDataModule
from lightning_soup.runs.sweep_file import read_sweep_file

CONFIGS = Path(__file__).parents[2] / "configs"
COMMANDS = {
    "image_classifier.yaml": ["fit"],
    "lcsc.yaml": ["fit"],
    "ama.yaml": ["soup", "--config", str(CONFIGS / "image_classifier.yaml")],
    "aware_net_deepfake.yaml": ["fit"],
    "crowd_digits.yaml": ["fit"],
    "zoo_digits.yaml": ["fit"],
    "aware_net_digits.yaml": ["fit"],
    "torchvision.yaml": ["fit"],
    "model_soup_clip.yaml": ["fit"],
    "model_soup.yaml": ["fit", "--config", str(CONFIGS / "image_classifier.yaml")],
    "zscl_digits.yaml": ["fit"],
    "zscl_mtil.yaml": ["fit"],
    "ewa_vit.yaml": ["fit"],
    "ewa_vit_cifar100.yaml": ["fit"],
    "ewa_finetune.yaml": ["fit", "--config", str(CONFIGS / "image_classifier.yaml")],
    "resolution_digits.yaml": ["fit"],
    "mwa_text.yaml": ["fit"],
    "mwa_lora.yaml": ["fit", "--config", str(CONFIGS / "image_classifier.yaml")],
    "reference_kl.yaml": ["fit", "--config", str(CONFIGS / "image_classifier.yaml")],
    "salsa_ppo.yaml": ["fit"],
    "sms_digits.yaml": ["fit"],
    "sms_vit.yaml": ["fit", "--config", str(CONFIGS / "image_classifier.yaml")],
    "weight_ensemble.yaml": ["fit"],
    "fedau.yaml": ["federated"],
    "noloco.yaml": ["fit"],
    "gossip.yaml": ["fit"],
    "model_soups.yaml": ["soup", "--config", str(CONFIGS / "image_classifier.yaml")],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_config_is_taken(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*COMMANDS[name], "--config", str(CONFIGS / name), "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    if name == "model_soup.yaml":
        assert "lightning_soup.callbacks.ModelSoup" in printed
        assert "GreedySoup" in printed
    if name == "model_soups.yaml":
        assert printed.index("GreedySoup") < printed.index("LearnedSoup")


def test_votes_are_a_file_or_a_simulated_crowd(tmp_path, capsys):
    """The file is there: jsonargparse would read it as a config; and what is saved can be read again."""
    (tmp_path / "votes.csv").write_text("task,worker,label\n0,a,1\n")
    config = str(CONFIGS / "crowd_digits.yaml")

    def printed(*options):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", config, *options, "--print_config"])
        assert stop.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["votes"]

    assert printed("--data.votes", str(tmp_path / "votes.csv")) == str(tmp_path / "votes.csv")
    crowd = printed("--data.votes.good", "16")
    assert (crowd["good"], crowd["poor"]) == (16, 7)
    again = printed("--data.votes", yaml.safe_dump(crowd, default_flow_style=True))
    assert again.get("init_args", again) == crowd


def test_sweep_file_is_taken():
    settings = read_sweep_file(CONFIGS / "model_soups_sweep.yaml").settings(seed=0)
    assert len(settings) == 12
    assert all(1e-5 <= setting["model.lr"] <= 5e-5 for setting in settings)


def test_none_is_left_out():
    sweeps = {"model_soups_sweep.yaml", "model_soup_clip_sweep.yaml"}
    assert {path.name for path in CONFIGS.glob("*.yaml")} == {*COMMANDS, *sweeps}


@pytest.mark.parametrize("name", [name for name in COMMANDS if "HandwritingDataModule" in (CONFIGS / name).read_text()])
def test_there_are_as_many_digits_as_a_config_asks_for(name):
    options = yaml.safe_load((CONFIGS / name).read_text())["data"].get("init_args", {})
    data = HandwritingDataModule(**options.get("items", {}).get("init_args", options))
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == data.train_size
