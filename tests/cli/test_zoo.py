import json
import math
import re

import pyarrow.parquet
import pytest
import torch
from jsonargparse import auto_cli

import lightning_soup.runs.zoo_measures as zoo_measures
from lightning_soup.cli.main import main
from lightning_soup.cli.zoo import zoo
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation import ModuleEvaluator
from lightning_soup.landscape import Objective, hessian_top_eigenvalues, loss_barrier
from lightning_soup.runs.zoo import COLUMNS, read_zoo
from lightning_soup.weights import combine, open_checkpoint
from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.sweeps import base_config, write_yaml

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

SECTION = {
    "temperature": {"data.batch_size": [12]},
    "load": {"model.batch_norm": [False, True]},
    "seeds": 2,
    "measures": {"samples": 60, "average_epochs": 2, "curve_epochs": 2, "lanczos": 40, "probes": 4},
    "thresholds": {"mc": 100, "trace": 1e6, "similar": 0.5},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_yaml(folder / "zoo.yaml", {**base_config(max_epochs=3), "zoo": SECTION})
        result = auto_cli(zoo, args=["zoo.yaml", "--folder=out"], as_positional=True)
    return folder / "out", result


@pytest.fixture
def out(made):
    return made[0]


@pytest.fixture
def rows(out):
    return read_zoo(out)


def test_the_table_has_a_row_for_each_model(out, rows):
    assert pyarrow.parquet.read_table(out / "zoo.parquet").column_names == list(COLUMNS)
    assert [(row["temperature"], row["load"], row["seed"]) for row in rows] == [
        (12, norm, seed) for norm in (False, True) for seed in (0, 1)
    ]
    assert [row["cell"] for row in rows] == [0, 0, 1, 1]
    assert all((out / row[name]).is_file() for row in rows for name in ("model", "average", "soup"))
    figures = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert len(figures) == 4 * 15
    assert all(map(math.isfinite, figures))
    files = {path.name for path in (out / rows[0]["model"]).parent.iterdir()}
    assert files == {"model.safetensors", "average.safetensors", "run.json", "config.yaml"}


def test_figures_are_those_of_the_files(out, rows):
    data = TinyData()
    for row in (rows[0], rows[3]):
        module = TinyClassifier(row["load"])
        weights = open_checkpoint(out / row["model"])
        accuracy, loss = ModuleEvaluator(module, data), ModuleEvaluator(module, data, "val_loss")
        assert accuracy.score(weights) == pytest.approx(row["val_acc"])
        assert -loss.score(weights) == pytest.approx(row["val_loss"], rel=1e-5)
        if not row["load"]:
            gain = accuracy.score(open_checkpoint(out / row["average"])) - row["val_acc"]
            assert gain == pytest.approx(row["delta_epochs"], abs=1e-6)


def test_training_figures_are_over_the_fixed_samples(out, rows):
    data, module = TinyData(), TinyClassifier()
    module.load_state_dict(combine([out / rows[1]["model"]], [1.0]), strict=False)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:60]
    x, y = (part[order] for part in data.train.tensors)
    with torch.no_grad():
        logits = module.net(x)
    assert rows[1]["train_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert rows[1]["train_acc"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert rows[1]["majority"] == pytest.approx(float(y.bincount().max() / 60))
    top = hessian_top_eigenvalues(Objective.of_module(module, [(x, y)]), max_steps=40).values[0]
    assert rows[1]["lambda_max"] == pytest.approx(top, rel=2e-3)


def test_cells_are_pairs_of_seeds_and_their_average(out, rows):
    files = [out / row["model"] for row in rows[:2]]
    data, module = TinyData(), TinyClassifier()
    soup = combine([out / rows[0]["soup"]], [1.0])
    half = combine(files, [0.5, 0.5])
    assert all(torch.equal(soup[name], half[name]) for name in half)
    gain = ModuleEvaluator(module, data).score(soup) - (rows[0]["val_acc"] + rows[1]["val_acc"]) / 2
    assert rows[0]["cell_delta_seeds"] == rows[1]["cell_delta_seeds"] == pytest.approx(gain, abs=1e-6)
    ends = [combine([file], [1.0]) for file in files]
    apart = sum(float((ends[0][name] - ends[1][name]).double().square().sum()) for name in half) ** 0.5
    assert rows[0]["cell_distance"] == pytest.approx(apart, rel=1e-5)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))[:60]
    data.val = torch.utils.data.TensorDataset(*(part[order] for part in data.train.tensors))
    barrier = loss_barrier(*files, ModuleEvaluator(module, data, "val_loss"), 5).barrier
    assert rows[0]["cell_barrier"] == pytest.approx(barrier, rel=1e-4, abs=1e-6)


def test_phases_follow_the_thresholds_that_travel_with_them(out, rows):
    told = json.loads((out / "zoo.json").read_text())
    assert told["thresholds"] == {"mc": 100, "trace": 1e6, "loss": 0.05, "similar": 0.5, "sharp_by": "trace"}
    assert not told["calibrated"]
    assert told["columns"] == COLUMNS
    for row in rows:
        assert row["phase"] == ("IV-B" if row["cell_cka"] >= 0.5 else "IV-A")
    assert sum(phase["cells"] for phase in told["phases"].values()) == 2


def test_pictures(out):
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("phases", "measures"))


def test_the_command_goes_on_where_it_was(made, monkeypatch, capsys):
    out, _ = made
    monkeypatch.chdir(out.parent)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    config = {**base_config(max_epochs=3), "zoo": {**SECTION, "thresholds": {"mc": 0.0}}}
    write_yaml(out.parent / "again.yaml", config)
    found = zoo("again.yaml", folder="out")  # other thresholds train nothing anew
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    assert found.thresholds.mc == 0
    assert "averaging seeds" in capsys.readouterr().out


class Diverging(TinyClassifier):
    def on_train_epoch_end(self):
        if self.hparams.lr > 1:
            with torch.no_grad():
                self.net[0].weight.fill_(float("nan"))


class Failing(TinyClassifier):
    def on_train_start(self):
        if self.hparams.lr > 1:
            raise RuntimeError("no memory")


@pytest.mark.parametrize("kind", ["Diverging", "Failing"])
def test_models_that_diverge_or_fail_are_told_and_the_others_go_on(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    config = base_config(max_epochs=1)
    config["model"]["class_path"] = f"tests.cli.test_zoo.{kind}"
    section = {**SECTION, "temperature": {"model.lr": [0.05, 2.0]}, "load": {"data.noise": [1.0]}, "thresholds": None}
    write_yaml(tmp_path / "zoo.yaml", {**config, "zoo": section})
    with pytest.raises(SystemExit) as stop:
        main(["zoo", "zoo.yaml", "--folder", "out"])
    assert stop.value.code == 1
    rows = read_zoo("out")
    assert [row["model"] != "" for row in rows] == [True, True, False, False]
    assert [row["phase"] for row in rows] == ["undetermined"] * 4
    printed = capsys.readouterr()
    assert printed.err.count("failed: ") == 2
    assert "No phases: too few cells" in printed.out


def test_one_seed_has_no_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = {**SECTION, "temperature": {"data.batch_size": [48]}, "load": {"model.batch_norm": [False]}, "seeds": 1}
    write_yaml(tmp_path / "zoo.yaml", {**base_config(max_epochs=1), "zoo": section})
    result = zoo("zoo.yaml", folder="out")
    (row,) = read_zoo("out")
    assert (row["phase"], row["soup"], row["average"]) == ("undetermined", "", "")
    assert math.isnan(row["cell_mc"])
    assert math.isnan(row["delta_epochs"])
    assert not result.failed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measures": {"metric": "val_f1"}}, r"does not log 'val_f1'; it logs val_acc, val_loss"),
        ({"measures": {"metric": "val_loss"}}, r"zoo.measures.metric is 'val_loss', which is .*expected an accuracy"),
    ],
)
def test_metrics_that_cannot_be(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    section = {**SECTION, "temperature": {"model.lr": [1e-6]}, "load": {"model.batch_norm": [False]}, **changes}
    write_yaml(tmp_path / "zoo.yaml", {**base_config(max_epochs=1), "zoo": {**section, "seeds": 1}})
    with pytest.raises(Exception, match="none of the 1 trainings finished"):
        zoo("zoo.yaml", folder="out")
    (error,) = tmp_path.glob("out/models/*/error.txt")
    assert re.search(message, error.read_text())


def test_wrong_files_are_told_before_any_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "zoo.yaml", {**base_config(), "zoo": {**SECTION, "load": {"model.widht": [1]}}})
    with pytest.raises(UnsupportedSetup, match=r"there is no option model.widht"):
        zoo("zoo.yaml", folder="out")
    config = base_config()
    del config["data"]
    write_yaml(tmp_path / "zoo.yaml", {**config, "zoo": {**SECTION, "temperature": {"model.lr": [1e-6]}}})
    with pytest.raises(UnsupportedSetup, match=r"zoo.yaml: has no data"):
        zoo("zoo.yaml", folder="out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_zoo(tmp_path):
    with pytest.raises(UnsupportedSetup, match=r"zoo.parquet: cannot be read as the table of a zoo"):
        read_zoo(tmp_path)


def test_majority():
    assert (
        zoo_measures._majority([(torch.zeros(3), torch.tensor([0, 2, 2])), (torch.zeros(1), torch.tensor([2]))]) == 0.75
    )
    assert math.isnan(zoo_measures._majority([(torch.zeros(3), torch.rand(3))]))
    assert math.isnan(zoo_measures._majority([torch.zeros(3)]))
