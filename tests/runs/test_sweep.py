import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_soup.errors import UnsupportedSetup, UnwritableOutput
from lightning_soup.recipes.ingredient import gather_ingredients
from lightning_soup.runs import sweep_processes, sweep_workers
from lightning_soup.runs.sweep import run_sweep
from lightning_soup.runs.sweep_run import Trained
from tests.helpers.sweeps import is_running, starts
from tests.runs.trainings import Stopped, training

SETTINGS = [{"model.lr": 0.1}, {"model.lr": 0.2}, {"model.lr": 0.3}]


@pytest.fixture
def calls(tmp_path):
    return tmp_path / "calls.jsonl"


@pytest.fixture
def train(calls):
    return partial(training, calls=str(calls))


def folders(path):
    return sorted(folder.name for folder in path.iterdir())


def test_each_setting_gets_a_folder_a_seed_and_a_record(tmp_path, train, calls):
    seen = []

    def progress(items, description, total=None):
        for item in items:
            seen.append((description, total, item.index))
            yield item

    result = run_sweep(SETTINGS, train, tmp_path / "runs", seed=5, progress=progress)
    assert [run.setting for run in result.finished] == SETTINGS
    assert [run.seed for run in result.runs] == [5, 6, 7] == [start["seed"] for start in starts(calls)]
    assert [run.metrics for run in result.runs] == [{"val_acc": 0.5}, {"val_acc": 0.6}, {"val_acc": 0.7}]
    assert seen == [("Training ingredients", 3, index) for index in range(3)]
    assert [run.folder.name for run in result.runs] == folders(tmp_path / "runs")
    run = result.runs[1]
    assert run.folder.name.startswith("001-")
    assert json.loads((run.folder / "run.json").read_text()) == {
        "status": "finished",
        "index": 1,
        "setting": {"model.lr": 0.2},
        "seed": 6,
        "metrics": {"val_acc": 0.6},
        "checkpoint": "checkpoints/weights.ckpt",
    }
    assert result.checkpoints[1] == run.checkpoint == run.folder / "checkpoints" / "weights.ckpt"
    assert sorted(os.listdir(run.folder)) == ["checkpoints", "run.json"]
    assert {start["pid"] for start in starts(calls)} == {os.getpid()}


def test_finished_runs_are_not_repeated_and_a_longer_sweep_goes_on(tmp_path, train, calls):
    first = run_sweep(SETTINGS, train, tmp_path / "runs")
    assert run_sweep(SETTINGS, train, tmp_path / "runs") == first
    assert len(starts(calls)) == 3
    longer = run_sweep([*SETTINGS, {"model.lr": 0.4}], train, tmp_path / "runs")
    assert longer.runs[:3] == first.runs
    assert [start["seed"] for start in starts(calls)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"fingerprint": "new base"}, {"settings": [{"model.lr": lr} for lr in (7, 8, 9)]}]
)
def test_another_sweep_in_the_folder_is_left_alone_and_not_reported(tmp_path, train, calls, change):
    first = run_sweep(SETTINGS, train, tmp_path / "runs")
    other = run_sweep(**{"settings": SETTINGS, "train": train, "folder": tmp_path / "runs", **change})
    assert len(starts(calls)) == 6
    assert not {run.folder for run in first.runs} & {run.folder for run in other.runs}
    assert len(other.runs) == 3
    assert run_sweep(SETTINGS, train, tmp_path / "runs") == first
    assert len(starts(calls)) == 6


def cut_short(folder):
    (folder / "run.json").unlink()


def lose_checkpoint(folder):
    (folder / "checkpoints" / "weights.ckpt").unlink()


def damage_record(folder):
    (folder / "run.json").write_text('{"status": "fini')


def unfinished_record(folder):
    (folder / "run.json").write_text('{"status": "running", "checkpoint": "run.json", "metrics": {}}')


@pytest.mark.parametrize("damage", [cut_short, lose_checkpoint, damage_record, unfinished_record])
def test_incomplete_runs_start_again_from_an_empty_folder(tmp_path, train, calls, damage):
    first = run_sweep(SETTINGS, train, tmp_path / "runs")
    damage(first.runs[1].folder)
    (first.runs[1].folder / "leftover").touch()
    assert run_sweep(SETTINGS, train, tmp_path / "runs") == first
    assert [start["seed"] for start in starts(calls)] == [0, 1, 2, 1]
    assert sorted(os.listdir(first.runs[1].folder)) == ["checkpoints", "run.json"]


def test_a_failed_run_does_not_stop_the_rest_and_is_tried_again(tmp_path, train, calls):
    settings = [{"do": "fail"}, {"do": "finish"}]
    result = run_sweep(settings, train, tmp_path / "runs")
    assert [run.setting for run in result.finished] == [{"do": "finish"}]
    assert len(result.checkpoints) == 1
    (failed,) = result.failed
    assert failed.setting == {"do": "fail"}
    assert failed.error == "in epoch 3"
    assert failed.checkpoint is None
    text = (failed.folder / "error.txt").read_text()
    assert "Traceback" in text
    assert "fake_training" in text
    assert "RuntimeError: the loss became NaN\nin epoch 3" in text
    run_sweep(settings, train, tmp_path / "runs")
    assert [start["seed"] for start in starts(calls)] == [0, 1, 0]


def test_a_training_without_its_checkpoint_has_failed(tmp_path):
    def train(setting, folder, seed):
        return Trained({}, folder / "none.ckpt")

    (failed,) = run_sweep([{}], train, tmp_path / "runs").failed
    assert failed.error.endswith("none.ckpt")
    assert not (failed.folder / "run.json").exists()


def test_a_full_disk_fails_the_run_with_its_reason(tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)

    def train(setting, folder, seed):
        (folder / "w.ckpt").touch()
        return Trained({}, folder / "w.ckpt")

    (failed,) = run_sweep([{}], train, tmp_path / "runs").failed
    assert "the disk is full" in failed.error
    assert os.listdir(failed.folder) == ["w.ckpt"]


def test_an_exit_in_a_training_is_its_failure(tmp_path, train):
    result = run_sweep([{}, {"do": "exit"}, {}], train, tmp_path / "runs")
    assert [run.index for run in result.finished] == [0, 2]
    assert result.failed[0].error == "SystemExit: 7"
    assert not (result.failed[0].folder / "checkpoints").exists()


@pytest.mark.parametrize(("do", "error"), [("interrupt", KeyboardInterrupt), ("terminate", Stopped)])
def test_stopping_leaves_finished_runs_and_nothing_half_written(tmp_path, train, do, error):
    with pytest.raises(error):
        run_sweep([{}, {"do": do}, {}], train, tmp_path / "runs")
    (finished,) = (tmp_path / "runs").iterdir()
    assert finished.name.startswith("000-")
    assert (finished / "run.json").exists()


def test_run_folders_are_ingredients(tmp_path):
    def train(setting, folder, seed):
        torch.save({"state_dict": {"w": torch.zeros(2)}}, folder / "w.ckpt")
        return Trained({"val_acc": 0.25}, folder / "w.ckpt")

    result = run_sweep([{"lr": 0.1}, {"lr": 0.2}], train, tmp_path / "runs")
    by_folder = gather_ingredients([run.folder for run in result.finished])
    by_file = gather_ingredients(result.checkpoints)
    for found in (by_folder, by_file):
        assert [ingredient.metrics for ingredient in found] == [{"val_acc": 0.25}] * 2
        assert [ingredient.hparams for ingredient in found] == [{"lr": 0.1}, {"lr": 0.2}]


def test_wrong_arguments(tmp_path, train):
    with pytest.raises(UnsupportedSetup, match="jobs is 0; expected 1 or more"):
        run_sweep(SETTINGS, train, tmp_path, jobs=0)
    for seed in (-1, 2**32 - 2):
        with pytest.raises(UnsupportedSetup, match=f"seed is {seed}; expected a number from 0 to 4294967292"):
            run_sweep(SETTINGS, train, tmp_path, seed=seed)
    with pytest.raises(UnsupportedSetup, match="no settings to train"):
        run_sweep([], train, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableOutput, match="file: this folder cannot be created"):
        run_sweep(SETTINGS, train, tmp_path / "file")
    with pytest.raises(UnsupportedSetup, match=r"cannot be sent to another process.*top-level function"):
        run_sweep(SETTINGS, lambda setting, folder, seed: None, tmp_path / "runs", jobs=2)
    assert folders(tmp_path / "runs") == []


def test_a_folder_that_may_not_be_written(tmp_path, train, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UnwritableOutput, match="no permission to write"):
        run_sweep(SETTINGS, train, tmp_path)


def test_jobs_train_in_processes_of_their_own(tmp_path, train, calls, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    settings = [{}, {"do": "fail"}, {"do": "die"}, {"do": "exit"}]
    result = run_sweep(settings, train, tmp_path / "runs", jobs=2)
    assert [run.index for run in result.finished] == [0]
    assert result.runs[0].metrics == {"val_acc": 0.0}
    assert [run.error for run in result.failed] == [
        "in epoch 3",
        "The process was killed by SIGKILL before it finished (out of memory? try fewer jobs); see log.txt.",
        "SystemExit: 7",
    ]
    assert "RuntimeError" in (result.runs[1].folder / "error.txt").read_text()
    assert "SIGKILL" in (result.runs[2].folder / "error.txt").read_text()
    assert "training {'do': 'fail'}" in (result.runs[1].folder / "log.txt").read_text()
    assert len({start["pid"] for start in starts(calls)} - {os.getpid()}) == 4
    assert {start["threads"] for start in starts(calls)} == {"4"}
    assert run_sweep([{}], train, tmp_path / "runs", jobs=2).runs == result.runs[:1]
    assert len(starts(calls)) == 4


@pytest.mark.parametrize(
    ("cores", "jobs", "asked", "threads"),
    [(8, 2, "", 4), (8, 3, "", 2), (2, 4, "", 1), (8, 2, "1", 1), (8, 2, "6", 4), (8, 2, "2,1", 4)],
)
def test_share_of_cores(monkeypatch, cores, jobs, asked, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert sweep_processes.share_of_cores(jobs) == threads


@pytest.mark.slow
def test_each_job_gets_a_gpu_of_its_own(tmp_path, train, calls, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpus = Path(f"{calls}.gpus")
    run_sweep([{}] * 3, train, tmp_path / "runs", jobs=2)
    first, second, third = [line.partition(" ")[2] for line in sorted(gpus.read_text().splitlines())]
    assert {first, second} == {"0", "1"}
    assert third in ("0", "1")
    gpus.unlink()
    run_sweep([{}], train, tmp_path / "together", jobs=2, spread=False)
    assert gpus.read_text() == "0 None\n"


def test_which_gpus_there_are(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert sweep_processes.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5a,-1,7")
    assert sweep_processes.gpus() == ["3", "GPU-5a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert sweep_processes.gpus() == []


def test_settings_with_keys_of_several_types(tmp_path, train):
    settings = [{"model.weights": {0: 1.0, "other": 2.0, None: 3}}, {"model.weights": {"other": 2.0, 0: 1.5}}]
    result = run_sweep(settings, train, tmp_path / "runs")
    assert len(result.finished) == 2
    assert run_sweep(settings, train, tmp_path / "runs").runs == result.runs


def test_an_interrupted_display_stops_the_children(tmp_path, train, calls, monkeypatch):
    monkeypatch.setattr(sweep_workers, "SECONDS_TO_STOP", 0.2)

    def interrupted(items, description, total=None):
        for item in items:
            yield item
            raise KeyboardInterrupt

    settings = [{"do": "wait for the deaf"}, {"do": "hang on"}, {}]
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_sweep(settings, train, tmp_path / "runs", jobs=2, progress=interrupted)
    assert stopped.traceback  # while the frames live, as in a program that handles Ctrl-C
    (finished,) = (tmp_path / "runs").iterdir()
    assert finished.name.startswith("000-")
    assert len(starts(calls)) == 2
    assert not any(is_running(start["pid"]) for start in starts(calls))


def test_an_interruption_keeps_runs_that_finished_meanwhile(tmp_path, train):
    def interrupted(items, description, total=None):
        for item in items:
            yield item
            wait_for(lambda: len(list((tmp_path / "runs").glob("*/run.json"))) == 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep([{}, {}], train, tmp_path / "runs", jobs=2, progress=interrupted)
    assert len(list((tmp_path / "runs").glob("*/run.json"))) == 2


SCRIPT = """
import sys

if "torch" in sys.argv:
    import torch  # as in a script that defines its model
from functools import partial
from lightning_soup.runs.sweep import run_sweep
from tests.helpers.sweeps import fake_training

if __name__ == "__main__":
    settings = [{}, {"do": "hang"}, {"do": "hang"}]
    run_sweep(settings, partial(fake_training, calls="calls.jsonl"), "runs", jobs=2)
"""


def start_script(tmp_path, *arguments, **environment):
    (tmp_path / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "script.py", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        start_new_session=True,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has one thread anyway")
def test_children_of_a_script_that_imports_torch_get_their_share_of_threads(tmp_path, calls):
    process = start_script(tmp_path, "torch", OMP_NUM_THREADS="")
    wait_for(lambda: len(starts(calls)) == 3)
    process.kill()
    process.communicate()
    assert {start["torch threads"] for start in starts(calls)} == {int(starts(calls)[0]["threads"])}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_signals(tmp_path, calls, stop):
    """Ctrl-C in a terminal reaches the children too; a killed sweep must not leave them training."""
    process = start_script(tmp_path)
    wait_for(lambda: len(starts(calls)) == 3)
    if stop == signal.SIGINT:
        os.killpg(process.pid, stop)
    else:
        process.kill()
    _, errors = process.communicate(timeout=20)
    pids = [start["pid"] for start in starts(calls)]
    wait_for(lambda: not any(is_running(pid) for pid in pids))
    if stop == signal.SIGINT:
        assert b"KeyboardInterrupt" in errors
        assert errors.count(b"Traceback") == 1
        assert [name[:4] for name in folders(tmp_path / "runs")] == ["000-"]
    complete = [folder.name[:4] for folder in (tmp_path / "runs").iterdir() if (folder / "run.json").exists()]
    assert complete == ["000-"]


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
