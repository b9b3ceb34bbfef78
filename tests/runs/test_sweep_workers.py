import dataclasses
import shutil
from functools import partial

import pytest

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.sweep import run_sweep
from tests.helpers.sweeps import fake_training, starts
from tests.helpers.workers import Stack
from tests.runs.trainings import training

SETTINGS = [{"model.lr": 0.1}, {"model.lr": 0.2}, {"model.lr": 0.3}]


@pytest.fixture
def train(tmp_path):
    return partial(fake_training, calls=str(tmp_path / "calls.jsonl"))


def records(folder):
    return {path.parent.name: path.read_text() for path in folder.glob("*/run.json")}


def test_runs_are_those_of_one_after_the_other_whatever_the_order_of_their_ends(tmp_path, train):
    engine = Stack()
    here = run_sweep(SETTINGS, train, tmp_path / "here", seed=3)
    apart = run_sweep(SETTINGS, train, tmp_path / "apart", seed=3, engine=engine)
    assert engine.ended == [1, 2, 0]
    assert not engine.open
    assert [run.index for run in apart.runs] == [0, 1, 2]
    moved = [
        dataclasses.replace(run, folder=tmp_path / "here" / run.folder.name, checkpoint=here.runs[run.index].checkpoint)
        for run in apart.runs
    ]
    assert moved == here.runs
    assert records(tmp_path / "apart") == records(tmp_path / "here")
    assert len(records(tmp_path / "apart")) == 3


def test_an_engine_goes_on_where_another_stopped(tmp_path, train):
    first = run_sweep(SETTINGS[:1], train, tmp_path / "runs")
    engine = Stack()
    both = run_sweep(SETTINGS, train, tmp_path / "runs", engine=engine)
    assert both.runs[:1] == first.runs
    assert sorted(engine.ended) == [1, 2]
    assert run_sweep(SETTINGS, train, tmp_path / "runs") == both
    assert run_sweep(SETTINGS, train, tmp_path / "runs", engine=engine) == both
    assert engine.made == 1
    assert [start["seed"] for start in starts(tmp_path / "calls.jsonl")] == [0, 2, 1]


def test_a_run_whose_process_died_is_tried_again_from_an_empty_folder(tmp_path, train):
    engine = Stack(dying={0: 2, 1: 3})
    with pytest.warns(UserWarning, match=r"00\d-.*: the process was lost; retry \d of 2\.") as told:
        result = run_sweep(SETTINGS, train, tmp_path / "runs", engine=engine, retries=2)
    assert [str(note.message).partition("; ")[2] for note in told] == ["retry 1 of 2.", "retry 2 of 2."] * 2
    assert [run.index for run in result.finished] == [0, 2]
    assert sorted(engine.ended) == [0, 0, 0, 1, 1, 1, 2]
    assert engine.found == [[]] * 7
    (failed,) = result.failed
    assert failed.error == "The process was lost, after 2 that died before it; see log.txt."
    assert (failed.folder / "error.txt").read_text() == failed.error
    assert not (failed.folder / "checkpoints").exists()


def test_without_retries_a_death_is_a_failure(tmp_path, train):
    engine = Stack(dying={0: 1})
    result = run_sweep(SETTINGS, train, tmp_path / "runs", engine=engine)
    assert result.failed[0].error == "The process was lost; see log.txt."
    assert len(run_sweep(SETTINGS, train, tmp_path / "runs", engine=engine).finished) == 3


def test_an_error_of_the_training_is_not_tried_again(tmp_path, train):
    engine = Stack()
    result = run_sweep([{"do": "fail"}, {}], train, tmp_path / "runs", engine=engine, retries=5)
    assert result.failed[0].error == "in epoch 3"
    assert sorted(engine.ended) == [0, 1]


def test_an_interruption_leaves_nothing_half_written(tmp_path, train):
    engine = Stack(dying={1: 1}, interrupted_after=2)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="001-.*retry 1 of 1"):
        run_sweep(SETTINGS, train, tmp_path / "runs", engine=engine, retries=1)
    assert engine.ended == [1, 2]
    assert not engine.open
    (finished,) = (tmp_path / "runs").iterdir()
    assert finished.name.startswith("002-")
    assert (finished / "run.json").exists()


@pytest.mark.parametrize("engine", [None, Stack()])
def test_a_run_that_another_sweep_has_finished_meanwhile_is_kept(tmp_path, train, engine):
    last = run_sweep(SETTINGS, train, tmp_path / "other").runs[2]
    (tmp_path / "calls.jsonl").unlink()

    def beside_another(setting, folder, seed):
        shutil.copytree(last.folder, folder.parent / last.folder.name, dirs_exist_ok=True)
        return train(setting, folder, seed)

    result = run_sweep(SETTINGS, beside_another, tmp_path / "runs", engine=engine)
    assert sorted(start["seed"] for start in starts(tmp_path / "calls.jsonl")) == [0, 1]
    assert len(result.finished) == 3
    assert result.runs[2].checkpoint == tmp_path / "runs" / last.folder.name / "checkpoints" / "weights.ckpt"


def test_a_number_of_retries_that_cannot_be(tmp_path, train):
    with pytest.raises(UnsupportedSetup, match=r"retries is -1; expected 0 or more"):
        run_sweep(SETTINGS, train, tmp_path, engine=Stack(), retries=-1)
    with pytest.raises(UnsupportedSetup, match=r"retries is 1 with jobs 1.*Set jobs to 2 or more, or engine to ray"):
        run_sweep(SETTINGS, train, tmp_path, retries=1)


def test_processes_of_this_machine_are_tried_again_too(tmp_path):
    calls = tmp_path / "calls.jsonl"
    train = partial(training, calls=str(calls))
    with pytest.warns(UserWarning, match="000-.*: the process was killed by SIGKILL.*; retry 1 of 1"):
        (failed,) = run_sweep([{"do": "die"}], train, tmp_path / "runs", jobs=2, retries=1).failed
    assert failed.error == (
        "The process was killed by SIGKILL before it finished (out of memory? try fewer jobs), after 1 that died "
        "before it; see log.txt."
    )
    assert len(starts(calls)) == 2
