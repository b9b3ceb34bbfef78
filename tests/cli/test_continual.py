import json
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest
import torch
import yaml
from jsonargparse import auto_cli

from lightning_soup.cli.continual import continual
from lightning_soup.cli.main import main
from lightning_soup.cli.sweep_check import check_settings
from lightning_soup.data.reference import Reference
from lightning_soup.errors import LightningSoupError, UnreadableCheckpoint, UnsupportedSetup
from lightning_soup.modules import ZSCL
from lightning_soup.runs.task_file import read_task_file
from lightning_soup.weights import open_checkpoint, save_weights
from tests.cli.test_configs import CONFIGS
from tests.helpers.clip import ROWS, TINY_CLIP
from tests.helpers.sweeps import base_config, write_yaml
from tests.helpers.torchvision_files import MTIL, without_md5, write_mtil
from tests.helpers.zscl import TEXTS, noise

COLUMNS = ["left", "centre", "right"]
TASKS = {
    "rows": {"data.class_names": ROWS},
    "columns": {"data.class_names": COLUMNS, "data.columns": True, "model.templates": ["the {} column"]},
}


LOST = {"name": "CIFAR10", "root": "lost", "img_size": 8}


class NoiseReference(Reference):
    def __init__(self):
        super().__init__(noise(), TEXTS, batch_size=6)


class Watched(ZSCL):
    """Remembers with what each training began and ended."""

    trainings: ClassVar = []

    def on_fit_start(self):
        super().on_fit_start()
        if self.trainer.max_steps == 0:  # a rehearsal
            return
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        teacher = None if self._teacher is None else self._teacher.model.state_dict()
        Watched.trainings.append({"start": weights, "teacher": teacher, "names": self.classnames})

    def on_train_batch_end(self, *_):
        Watched.trainings[-1].setdefault("path", []).append(self.model.visual.proj.detach().clone())


def config(**section):
    base = base_config(max_steps=8, max_epochs=-1, limit_val_batches=0)
    base["trainer"]["callbacks"] = [
        {"class_path": "lightning_soup.callbacks.WeightEnsemble", "init_args": {"every": 2}}
    ]
    options = {"model_config": TINY_CLIP, "templates": ["the {} row"], "lr": 2.0e-3, "warmup": 2}
    reference = {"class_path": f"{__name__}.NoiseReference"}
    base["model"] = {"class_path": f"{__name__}.Watched", "init_args": {**options, "reference": reference}}
    base["data"] = {"class_path": "tests.helpers.clip.RowData"}
    return {"seed_everything": 3, **base, "continual": {"tasks": TASKS, **section}}


def run(*arguments, **section):
    write_yaml(CONFIG, config(**section))
    return auto_cli(continual, args=["tasks.yaml", *arguments])


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    global CONFIG
    CONFIG = tmp_path / "tasks.yaml"
    monkeypatch.chdir(tmp_path)
    Watched.trainings.clear()


def same(weights, checkpoint):
    found = open_checkpoint(checkpoint)
    return all(torch.equal(value, found[f"model.{name}"]) for name, value in weights.items())


def test_each_task_starts_from_the_average_of_the_one_before(tmp_path, capsys):
    result = run()
    assert result.folder.as_posix() == "runs/tasks"
    rows, columns = Watched.trainings
    assert (rows["names"], columns["names"]) == (ROWS, COLUMNS)
    assert len(rows["path"]) == len(columns["path"]) == 8
    start = result.folder / "start.safetensors"
    assert same(rows["start"], start)
    assert same(columns["start"], result.checkpoints["rows"])
    terms = [rows["start"]["visual.proj"], *rows["path"][::2]]  # samples after the steps k = 0, 2, 4, 6
    torch.testing.assert_close(columns["start"]["visual.proj"], torch.stack(terms).mean(0))
    # the teacher of every task is the model before the first
    assert same(rows["teacher"], start)
    assert same(columns["teacher"], start)
    content = json.loads((result.folder / "continual.json").read_text())
    assert content["metrics"]["order"] == ["rows", "columns"]
    assert content["notes"]["tasks"]["columns"]["model.templates"] == ["the {} column"]
    shown = capsys.readouterr().out
    assert "after columns" in shown
    assert "Transfer" in shown


@pytest.mark.slow
def test_the_numbers_are_those_of_the_files(tmp_path):
    result = run()
    from tests.helpers.clip import RowData
    from tests.helpers.trainers import quiet_trainer

    model = Watched.load_from_checkpoint(result.checkpoints["columns"], weights_only=True, reference=NoiseReference())
    for name, classes in {"rows": ROWS, "columns": COLUMNS}.items():
        model.set_classes(classes, TASKS[name].get("model.templates", ["the {} row"]))
        data = RowData(classes, columns=name == "columns")
        [found, *_] = quiet_trainer().test(model, datamodule=data, verbose=False)
        assert result.matrix["columns"][name] == pytest.approx(100 * found["test_acc"])


@pytest.mark.slow
def test_a_run_that_is_ended_goes_on_to_the_same_numbers(monkeypatch):
    whole = run("--folder=whole")
    Watched.trainings.clear()

    def interrupted(self):
        if self.classnames == COLUMNS and self.trainer.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Watched, "on_before_zero_grad", lambda self, _: interrupted(self))
        with pytest.raises(KeyboardInterrupt):
            run("--folder=cut")
    result = run("--folder=cut")
    assert [training["names"] for training in Watched.trainings] == [ROWS, COLUMNS, COLUMNS]
    assert result.matrix == whole.matrix
    for name in TASKS:
        ours, theirs = (open_checkpoint(found.checkpoints[name]) for found in (result, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_weight_ensemble_is_not_needed_and_wise_ft_interpolates_with_the_start_of_the_task():
    options = {"model.distillation": 0, "model.consolidation": 0, "trainer.callbacks": None}
    result = run(tasks={name: {**task, **options} for name, task in TASKS.items()}, wise_ft=0.75)
    assert all(training["teacher"] is None for training in Watched.trainings)
    path = result.checkpoints["rows"]
    assert path.name == "wise_ft.safetensors"
    [end] = [open_checkpoint(file) for file in path.parent.glob("*.ckpt")]
    start, found = open_checkpoint(result.folder / "start.safetensors"), open_checkpoint(path)
    for name in start:
        torch.testing.assert_close(found[name], 0.75 * end[name] + 0.25 * start[name])
    assert same(Watched.trainings[1]["start"], path)


@pytest.mark.slow
def test_pre_training_comes_first_and_once():
    pretrain = {"data.class_names": ROWS, "trainer.max_steps": 3, "model.distillation": 0, "model.consolidation": 0}
    result = run(pretrain=pretrain)
    assert [len(training["path"]) for training in Watched.trainings] == [3, 8, 8]
    assert same(Watched.trainings[1]["teacher"], next((result.folder / "pretrain").rglob("*.ckpt")))
    assert run(pretrain=pretrain).matrix == result.matrix
    assert len(Watched.trainings) == 3


def test_a_start_of_ones_own(tmp_path):
    torch.manual_seed(9)
    model = ZSCL(model_config=TINY_CLIP, classnames=ROWS, distillation=0)
    save_weights(model, tmp_path / "mine.safetensors")
    run("--start=mine.safetensors", "--order=columns", pretrain={"trainer.max_steps": 3})
    [only] = Watched.trainings
    assert only["names"] == COLUMNS
    assert same(only["start"], tmp_path / "mine.safetensors")
    assert same(only["teacher"], tmp_path / "mine.safetensors")


@pytest.mark.slow
def test_a_teacher_of_ones_own_stays(tmp_path):
    torch.manual_seed(9)
    save_weights(ZSCL(model_config=TINY_CLIP, classnames=ROWS, distillation=0), tmp_path / "mine.safetensors")
    run(tasks={name: {**task, "model.teacher": "mine.safetensors"} for name, task in TASKS.items()})
    assert all(same(training["teacher"], tmp_path / "mine.safetensors") for training in Watched.trainings)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--order=[columns, rows]"], ["--order=rows"]])
def test_another_order_in_the_same_folder_is_refused(arguments):
    run()
    with pytest.raises(UnsupportedSetup, match="holds a run of the tasks rows, columns; now the order is"):
        run(*arguments)


@pytest.mark.slow
def test_other_options_in_the_same_folder_are_refused():
    run()
    with pytest.raises(UnsupportedSetup, match="holds a run with another seed"):
        run("--seed=8")
    with pytest.raises(UnsupportedSetup, match="another config"):
        run(metric="test_loss")


WRONG = [
    ({"tasks": {"rows": {"model.lrr": 1}}}, [], "there is no option model.lrr"),
    ({"tasks": {"a": {}, "rows": {"model.lr": "fast"}}}, [], "model.lr does not take 'fast'"),
    ({"tasks": {"a": {}, "b": {"model.lr": 1, "model.init_args.lr": 2}}}, [], "are the same option"),
    ({"pretrain": {"trainer.max_step": 1}}, [], "there is no option trainer.max_step"),
    ({"tasks": {"rows": {"trainer.devices": 2}}}, [], "devices"),
    ({"metric": "test_f1"}, [], "continual.metric is 'test_f1', but testing the task 'rows' logged test_acc"),
    ({"tasks": {"rows": {"data.class_names": ["Top", "top", "low"]}}}, [], "'Top' and 'top' become the same tokens"),
    ({"tasks": {"rows": {**TASKS["rows"], "model.templates": ["a row"]}}}, [], "has no {}"),
    ({"tasks": {"rows": {**TASKS["rows"], "model.classnames": ["up", "down"]}}}, [], "data has 3 classes"),
    ({"tasks": {"rows": {**TASKS["rows"], "data.size": 12}}}, [], r"takes images \[B, 3, 8, 8\]"),
    ({"tasks": {**TASKS, "Rows": {}}}, [], "collide"),
    ({}, ["--seed=-1"], "seed is -1"),
    ({}, ["--order=diagonals"], "no task diagonals"),
    ({"metric": "test_loss"}, [], "expected an accuracy from 0 to 1"),
    ({"tasks": {**TASKS, "later": {**TASKS["rows"], "model.teacher": "gone.ckpt"}}}, [], r"gone\.ckpt"),
    ({"pretrain": TASKS["rows"], "tasks": {"rows": {**TASKS["rows"], "model.reference": None}}}, [], "needs reference"),
]


@pytest.mark.parametrize(("section", "arguments", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_found_before_any_task_is_trained(section, arguments, message):
    with pytest.raises((UnsupportedSetup, UnreadableCheckpoint), match=message):
        run(*arguments, **section)
    assert not Watched.trainings


def bare_start(tmp_path, seed=9):
    """A file as open_clip writes it, without the prefix of a module."""
    torch.manual_seed(seed)
    model = ZSCL(model_config=TINY_CLIP, classnames=ROWS, distillation=0).model
    path = tmp_path / f"bare-{seed}"
    path.mkdir(exist_ok=True)
    torch.save(model.half().state_dict(), path / "model.pt")
    return path


@pytest.mark.slow
def test_wise_ft_from_a_bare_start_in_half_precision(tmp_path):
    result = run(f"--start={bare_start(tmp_path) / 'model.pt'}", wise_ft=0.5)
    assert result.checkpoints["rows"].name == "wise_ft.safetensors"
    assert same(Watched.trainings[0]["start"], result.folder / "start.safetensors")


@pytest.mark.slow
def test_another_start_in_a_folder_is_another_run(tmp_path):
    run(f"--start={bare_start(tmp_path)}", "--folder=out")
    run(f"--start={bare_start(tmp_path)}", "--folder=out")
    for arguments in ([f"--start={bare_start(tmp_path, 8)}"], []):
        with pytest.raises(UnsupportedSetup, match="other files"):
            run(*arguments, "--folder=out")


@pytest.mark.slow
@pytest.mark.parametrize("later", [{}, {"model.init_args.teacher": "mine.safetensors"}])
def test_each_task_has_its_own_teacher_or_the_first_start(tmp_path, later):
    torch.manual_seed(9)
    save_weights(ZSCL(model_config=TINY_CLIP, classnames=ROWS, distillation=0), tmp_path / "mine.safetensors")
    first = {} if later else {"model.teacher": "mine.safetensors"}
    result = run(tasks={"rows": {**TASKS["rows"], **first}, "columns": {**TASKS["columns"], **later}})
    start = result.folder / "start.safetensors"
    expected = [start, "mine.safetensors"] if later else ["mine.safetensors", start]
    assert all(same(one["teacher"], file) for one, file in zip(Watched.trainings, expected, strict=True))


@pytest.mark.slow
def test_names_that_are_markup_are_shown_as_they_are(capsys):
    result = run(tasks={"rows [/b]": TASKS["rows"], "[red]x": TASKS["columns"]})
    shown = capsys.readouterr().out
    assert "after rows [/b]" in shown
    assert "[red]x" in shown
    assert "Forget" in shown
    assert list(result.matrix) == ["rows [/b]", "[red]x"]


@pytest.mark.slow
def test_tasks_with_numbers_for_names():
    result = run("--order=[2, 1]", tasks={1: TASKS["rows"], 2: TASKS["columns"]})
    assert result.names == ("2", "1")


def test_a_task_that_is_there_twice(tmp_path):
    write_yaml(CONFIG, config())
    CONFIG.write_text(CONFIG.read_text().replace("columns:", "rows:"))
    with pytest.raises(UnsupportedSetup, match="the key rows is there twice"):
        continual("tasks.yaml")


def test_a_start_that_is_no_checkpoint():
    with pytest.raises(UnreadableCheckpoint, match=r"nowhere\.ckpt"):
        run("--start=nowhere.ckpt")


def test_a_model_that_cannot_start_from_a_checkpoint(tmp_path):
    write_yaml(CONFIG, {**base_config(), "continual": {"tasks": {"one": {}}}})
    with pytest.raises(UnsupportedSetup, match="TinyClassifier has no option checkpoint_path"):
        continual(str(CONFIG))


def test_data_that_is_missing_is_found_before_the_first_task_is_trained():
    tasks = {**TASKS, "lost": {"data": {"class_path": "TorchvisionDataModule", "init_args": LOST}}}
    with pytest.raises(LightningSoupError, match="could not open CIFAR10"):
        run(tasks=tasks)
    assert not Watched.trainings


@pytest.mark.slow
def test_loggers_get_the_result():
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}
    content = config()
    content["trainer"]["logger"] = logger
    write_yaml(CONFIG, content)
    continual("tasks.yaml", folder="out")
    [path] = CONFIG.parent.glob("out/lightning_logs/*/metrics.csv")
    assert "continual/transfer" in path.read_text()
    # each task has its own logs, in its own folder
    assert len(list(CONFIG.parent.glob("out/0*/lightning_logs"))) == 2


def test_the_command(capsys):
    write_yaml(CONFIG, config(order="rows"))
    main(["continual", "tasks.yaml", "--folder", "out"])
    assert "Written: out/continual.json" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["continual", "tasks.yaml", "--folder", "out", "--order", "columns"])
    assert stop.value.code == 1
    shown = capsys.readouterr().err
    assert "now the order is columns" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path):
    whole = run("--folder=whole")
    program = "from lightning_soup.cli.main import main; main(['continual', 'tasks.yaml', '--folder', 'cut'])"
    for wanted in ("cut/accuracies.json", "cut/00-rows/checkpoints", "cut/00-rows/run.json", "cut/01-columns"):
        process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (tmp_path / wanted).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = run("--folder=cut")
    assert result.matrix == whole.matrix


@pytest.mark.parametrize("name", ["zscl_digits.yaml", "zscl_mtil.yaml"])
def test_the_configs_of_the_package_are_taken(name):
    file = read_task_file(CONFIGS / name)
    settings = list(file.tasks.values())
    check_settings(file.path, file.path, settings if file.pretrain is None else [*settings, file.pretrain])


def test_the_orders_of_the_benchmark():
    file = read_task_file(CONFIGS / "zscl_mtil.yaml")
    assert [file.tasks[name]["data.name"] for name in file.ordered("I")] == list(MTIL)
    assert file.ordered(None) == file.ordered("I") == tuple(sorted(file.tasks, key=str.lower))
    assert sorted(file.ordered("II")) == sorted(file.ordered("I"))
    assert file.ordered("II")[:2] == ("StanfordCars", "Food")


def small_mtil(tmp_path):
    """The benchmark's config with a tiny model, tiny images and three steps a task."""
    content = yaml.safe_load((CONFIGS / "zscl_mtil.yaml").read_text())
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    tiny = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"width": 16, "heads": 2, "layers": 1}}
    content["model"]["init_args"] |= {"model_config": tiny, "pretrained": None}
    write_mtil(tmp_path / "data")
    (tmp_path / "texts.txt").write_text("a dog\na cat\n")
    size = {"img_size": 16, "batch_size": 4, "num_workers": 0, "model_name": None}
    content["data"]["init_args"] |= {"root": str(tmp_path / "data"), **size}
    reference = content["model"]["init_args"]["reference"]["init_args"]
    reference |= {"images": str(tmp_path / "data"), "texts": str(tmp_path / "texts.txt"), **size}
    content["trainer"] |= {"max_steps": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    # EuroSAT has four of its ten classes here
    content["continual"]["tasks"]["EuroSAT"].pop("model.classnames")
    return write_yaml(tmp_path / "mtil.yaml", content)


@pytest.mark.parametrize("order", ["[Flowers, CIFAR100]", "II"])
@pytest.mark.slow
def test_the_benchmark_runs_on_generated_images(tmp_path, order):
    with without_md5():
        result = auto_cli(continual, args=[str(small_mtil(tmp_path)), f"--order={order}", "--folder=out"])
    assert len(result.matrix) == len(result.names)
    assert all(0 <= value <= 100 for row in result.rows.values() for value in row.values())
    if order == "II":
        assert result.names[-1] == "CIFAR100"
        assert len(result.metrics.transfer_by_task) == 10
