import json
import math
import re
import shutil

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


def test_what_concerns_cells_only_trains_nothing_anew_and_the_folder_can_move(made, monkeypatch, tmp_path):
    shutil.copytree(made[0], tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    config = {**base_config(max_epochs=3), "zoo": SECTION}
    write_yaml(tmp_path / "zoo.yaml", config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    zoo("zoo.yaml", folder=str(tmp_path / "moved"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    config["zoo"] = {**SECTION, "measures": {**SECTION["measures"], "curve_epochs": 1}}
    write_yaml(tmp_path / "zoo.yaml", config)
    assert not zoo("zoo.yaml", folder="moved").failed
    models = {path: path.stat().st_mtime_ns for path in (tmp_path / "moved" / "models").rglob("*.safetensors")}
    assert models == {path: time for path, time in before.items() if path in models}
    assert len(list(tmp_path.glob("moved/cells/*"))) == 4


class Mapped(TinyClassifier):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step((batch["x"], batch["y"]), batch_idx)


def as_mapping(samples):
    x, y = torch.utils.data.default_collate(samples)
    return {"x": x, "y": y}


class Mappings(TinyData):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.train, self.batch_size, shuffle=True, collate_fn=as_mapping)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.val, self.batch_size, collate_fn=as_mapping)


class NotFinite(TinyClassifier):
    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx) * float("nan")
        self.log("val_nan", loss)
        return loss


class OnTwo(TinyClassifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return super().validation_step(batch, batch_idx)


class TwoSets(TinyData):
    def val_dataloader(self):
        return [torch.utils.data.DataLoader(part, self.batch_size) for part in self.test]


def one_cell(tmp_path, monkeypatch, model="TinyClassifier", data="TinyData", measures=None, **trainer):
    monkeypatch.chdir(tmp_path)
    config = base_config(max_epochs=2, **trainer)
    for part, name in (("model", model), ("data", data)):
        if not name.startswith("Tiny"):
            config[part]["class_path"] = f"tests.cli.test_zoo.{name}"
    grid = {"temperature": {"data.batch_size": [48]}, "load": {"model.lr": [0.05]}}
    section = {**SECTION, **grid, "measures": {**SECTION["measures"], **(measures or {})}}
    write_yaml(tmp_path / "zoo.yaml", {**config, "zoo": section})
    return zoo("zoo.yaml", folder="out")


def test_batches_that_give_no_logits_leave_out_the_cka_alone(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="there is no CKA.*predict_step of Mapped that returns logits"):
        result = one_cell(tmp_path, monkeypatch, "Mapped", "Mappings")
    assert not result.failed
    row = read_zoo("out")[0]
    assert [name for name, value in row.items() if value != value] == ["majority", "cell_cka"]


def test_figures_that_are_not_finite_are_no_failure(tmp_path, monkeypatch):
    result = one_cell(tmp_path, monkeypatch, "NotFinite", measures={"loss": "val_nan"})
    assert not result.failed
    row = read_zoo("out")[0]
    assert math.isfinite(row["val_acc"] + row["delta_epochs"] + row["cell_cka"] + row["cell_delta_seeds"])
    assert all(math.isnan(row[name]) for name in ("train_loss", "val_loss", "trace", "lambda_max", "cell_barrier"))
    assert row["phase"] == "undetermined"


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_models_of_other_precisions(tmp_path, monkeypatch, precision):
    assert not one_cell(tmp_path, monkeypatch, precision=precision).failed
    row = read_zoo("out")[0]
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))


def test_metrics_of_one_of_several_validation_sets(tmp_path, monkeypatch):
    names = {"metric": "val_acc/dataloader_idx_1", "loss": "val_loss/dataloader_idx_1"}
    assert not one_cell(tmp_path, monkeypatch, "OnTwo", "TwoSets", measures=names).failed
    assert all(math.isfinite(value) for value in read_zoo("out")[0].values() if isinstance(value, float))


def test_the_gain_of_averaging_epochs_is_over_the_last_epoch_also_beside_a_live_average(tmp_path, monkeypatch):
    section = {"average_epochs": 2}
    plain = one_cell(tmp_path, monkeypatch, measures=section)
    gain = plain.cells[0].mean("delta_epochs")
    (tmp_path / "live").mkdir()
    live = {"class_path": "lightning_soup.WeightEnsemble"}
    beside = one_cell(tmp_path / "live", monkeypatch, measures=section, callbacks=[live])
    assert beside.cells[0].mean("val_loss") != plain.cells[0].mean("val_loss")  # the model is the live average
    assert beside.cells[0].mean("delta_epochs") == pytest.approx(gain)


def test_outputs_are_compared_in_one_order_where_the_loader_shuffles(out, rows):
    data = TinyData()
    data.val_dataloader = lambda: torch.utils.data.DataLoader(data.val, 16, shuffle=True)
    evaluator = ModuleEvaluator(TinyClassifier(), data)
    first, again = zoo_measures._outputs(evaluator, [out / rows[0]["model"]] * 2)
    assert torch.equal(first, again)


class Diverging(TinyClassifier):
    def on_train_epoch_end(self):
        if self.hparams.lr > 1:
            with torch.no_grad():
                self.net[0].weight.fill_(float("nan"))


class Counting(TinyClassifier):
    def on_train_epoch_start(self):
        with open("epochs.txt", "a") as file:
            file.write("epoch\n")


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
    assert len(list(tmp_path.glob("out/models/*/*.safetensors"))) == 2  # none of those that failed
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
    config = base_config(max_epochs=3)
    config["model"]["class_path"] = "tests.cli.test_zoo.Counting"
    write_yaml(tmp_path / "zoo.yaml", {**config, "zoo": {**section, "seeds": 1}})
    with pytest.raises(Exception, match="none of the 1 trainings finished"):
        zoo("zoo.yaml", folder="out")
    (error,) = tmp_path.glob("out/models/*/error.txt")
    assert re.search(message, error.read_text())
    assert (tmp_path / "epochs.txt").read_text() == "epoch\n"  # not after the last one


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
