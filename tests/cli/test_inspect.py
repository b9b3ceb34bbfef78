"""The command `inspect`: by files, and by validation; what it says, writes, and refuses."""

import json
import shutil

import pytest
import torch

from lightning_soup.cli.main import main
from lightning_soup.weights import open_checkpoint
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.ingredients import tiny_run
from tests.helpers.trainers import quiet_trainer

WITH_DATA = [
    *("--model", "tests.helpers.boring.TinyClassifier", "--data", "tests.helpers.boring.TinyData"),
    *("--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three fine-tunes of one start, their start, and one of another start."""
    folder = tmp_path_factory.mktemp("runs")
    start, files = tiny_run()
    shutil.copy(start, folder / "start.ckpt")
    for number, file in enumerate(files):
        shutil.copy(file, folder / f"run{number}.ckpt")
    torch.manual_seed(77)
    other = TinyClassifier(lr=0.05)
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(other, datamodule=TinyData())
    trainer.save_checkpoint(folder / "other.ckpt")
    return folder


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_by_files(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["inspect", str(runs / "run*.ckpt"), str(runs / "other.ckpt")])
    told = said(capsys)
    assert "other comes from another start than the other 3" in told
    assert "run0, run1 and run2 can be averaged, as far as weights can tell." in told
    content = json.loads((tmp_path / "inspection" / "inspection.json").read_text())
    assert content["hopeless"] == ["other"]
    assert content["groups"] == [["run0", "run1", "run2"], ["other"]]
    assert (tmp_path / "inspection" / "distances.png").read_bytes().startswith(b"\x89PNG")
    a, b = (open_checkpoint(runs / f"run{i}.ckpt") for i in (0, 1))
    apart = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a if a[n].is_floating_point()) ** 0.5
    assert content["distances"][0][1] == pytest.approx(apart, rel=1e-4)


def test_by_validation(runs, tmp_path, capsys):
    main(
        [
            *("inspect", str(runs / "run*.ckpt"), str(runs / "other.ckpt"), "--init", str(runs / "start.ckpt")),
            *("--output", str(tmp_path / "seen"), "--tolerance", "0.03", *WITH_DATA),
        ]
    )
    told = said(capsys)
    content = json.loads((tmp_path / "seen" / "inspection.json").read_text())
    assert content["metric"] == "val_loss"
    assert content["basins"][0] == ["run0", "run1", "run2"]
    assert content["greedy_order"] == sorted(
        content["greedy_order"], key=lambda name: content["values"][content["evaluated"].index(name)]
    )
    assert "other lies outside the basin of the other 3: a barrier of" in told
    assert content["update_cosines"][0][0] == pytest.approx(1)
    assert content["cka"][0][0] == pytest.approx(1)
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {
        *("inspection.json", "distances.png", "barriers.png", "ways.png", "cka.png")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{runs}/run0.ckpt"], "inspect compares checkpoints, and got 1"),
        (["inspect", "{runs}/none*.ckpt"], "none*.ckpt"),
        (["inspect", "{runs}/run*.ckpt", "--init", "{runs}/no.ckpt"], "no.ckpt: no such file"),
        (["inspect", "{runs}/run*.ckpt", "--budget", "2", *WITH_DATA], "a budget of 2K − 1 (5)"),
        (["inspect", "{runs}/run*.ckpt", "--metric", "val_los", *WITH_DATA], "'val_los' is not logged"),
        (["inspect", "{runs}/run*.ckpt", *WITH_DATA[:2], *WITH_DATA[4:]], "needs a data module"),
    ],
)
def test_bad_input(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([word.replace("{runs}", str(runs)) for word in arguments])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


def test_nothing_to_compare(tmp_path, capsys):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"b": torch.ones(2)}, tmp_path / "b.pt")
    main(["inspect", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--output", str(tmp_path / "seen")])
    assert "There are not two that could be averaged." in said(capsys)
    assert [path.name for path in (tmp_path / "seen").iterdir()] == ["inspection.json"]
