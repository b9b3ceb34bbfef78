"""What the demo cannot do is said before it trains anything."""

import pytest
import torch

from lightning_soup.cli import demo as demo_module
from lightning_soup.cli.main import main
from lightning_soup.weights import save_weights

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_module, "train_once", lambda *_: pytest.fail("trained first"))
    save_weights({"w": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "sweep.yaml").write_text("method: grid\nparameters: {model.lrr: {value: 1}}")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "0"], "train_size=0"),
        (["--labels", "100000"], "train_size=100000"),
        (["--seed", "-1"], "seed is -1; expected a number from 0"),
        (["--jobs", "0"], "jobs is 0"),
        (["--start", "gone.ckpt"], "gone.ckpt: no such file"),
        (["--start", "other.pt"], "other.pt does not fit the model"),
        (["--sweep_file", "gone.yaml"], "gone.yaml: no such sweep file"),
        (["--sweep_file", "sweep.yaml"], "sweep.yaml: there is no option model.lrr"),
        (["--folder", "other.pt"], "other.pt/soup.safetensors: cannot be written"),
    ],
)
def test_what_cannot_be_is_said_at_once(folder, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *words])
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_file_in_the_way_of_the_configs(folder, capsys):
    (folder / "mine").mkdir()
    (folder / "mine" / "configs").touch()
    with pytest.raises(SystemExit):
        main(["demo", "--folder", "mine"])
    assert "mine: cannot be used" in capsys.readouterr().err
