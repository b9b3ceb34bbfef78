import json
import threading
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch.distributed as dist

from lightning_soup.errors import LightningSoupError, UnsupportedSetup
from lightning_soup.runs import launched as launched_module
from lightning_soup.runs import sweep_replicas
from lightning_soup.runs.launched import World, launched, unlaunched
from lightning_soup.runs.sweep import run_sweep
from lightning_soup.runs.sweep_replicas import run_on_ranks
from tests.helpers.sweeps import fake_training, starts
from tests.runs.trainings import training

SETTINGS = [{"model.lr": rate} for rate in (0.1, 0.2, 0.3)]


@pytest.fixture
def train(tmp_path):
    return partial(training, calls=str(tmp_path / "calls.jsonl"))


@pytest.fixture
def store():
    return dist.HashStore()


def world(rank, store, size=2):
    return World(rank, size, rank, 1, store)


def other_rank(work):
    """Run rank 1 beside the test; gives what it returned or raised once it has ended."""
    found = []

    def body():
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=body)
    thread.start()

    def end():
        thread.join(60)
        assert not thread.is_alive()
        return found[0]

    return end


def on_two(store, train, folder, settings=SETTINGS, **options):
    """Runs of both ranks."""
    second = other_rank(lambda: run_on_ranks(world(1, store), settings, train, folder))
    return run_on_ranks(world(0, store), settings, train, folder, **options), second()


def records(folder):
    return {path.parent.name: path.read_text() for path in folder.glob("*/run.json")}


def test_runs_are_those_of_one_process_and_both_ranks_train(tmp_path, train, store):
    here = run_sweep(SETTINGS, train, tmp_path / "here")
    (tmp_path / "calls.jsonl").unlink()
    first, second = on_two(store, train, tmp_path / "apart")
    assert records(tmp_path / "apart") == records(tmp_path / "here")
    assert len(records(tmp_path / "apart")) == 3
    assert first == second
    assert [run.setting for run in first.runs] == [run.setting for run in here.runs]
    assert sorted(start["seed"] for start in starts(tmp_path / "calls.jsonl")) == [0, 1, 2]
    assert store.check([sweep_replicas._ENDED.format(1, 0)])
    assert int(store.get(sweep_replicas._TASK.format(1, 0))) == 0  # this one was first, so the other had its share
    assert not list((tmp_path / "apart").glob(".ranks-*"))


def test_finished_runs_are_found_by_both_ranks_and_not_repeated(tmp_path, train, store):
    run_sweep(SETTINGS, train, tmp_path / "runs")
    count = len(starts(tmp_path / "calls.jsonl"))
    first, second = on_two(store, train, tmp_path / "runs")
    assert first == second
    assert len(first.finished) == 3
    assert len(starts(tmp_path / "calls.jsonl")) == count


def test_a_failed_training_is_named_on_both_ranks(tmp_path, train, store):
    first, second = on_two(store, train, tmp_path / "runs", [{"do": "fail"}, {"do": "fail", "x": 1}, {}])
    assert [run.error for run in first.runs] == [run.error for run in second.runs] == ["in epoch 3", "in epoch 3", None]


def test_ranks_with_other_settings_are_refused_before_any_training(tmp_path, train, store):
    second = other_rank(lambda: run_on_ranks(world(1, store), SETTINGS[:2], train, tmp_path / "runs"))
    with pytest.raises(UnsupportedSetup, match=r"rank 1 has another version of the sweep file, of the config"):
        run_on_ranks(world(0, store), SETTINGS, train, tmp_path / "runs")
    error = second()
    assert isinstance(error, LightningSoupError)
    assert "the sweep ended on rank 0: UnsupportedSetup: engine is replicas" in str(error)
    assert list((tmp_path / "runs").iterdir()) == []


def test_ranks_that_do_not_see_the_folder_are_refused(tmp_path, train, store):
    second = other_rank(lambda: run_on_ranks(world(1, store), SETTINGS, train, tmp_path / "elsewhere"))
    with pytest.raises(
        UnsupportedSetup, match=r"rank 1 does not see the folder of the runs, .*elsewhere.*same command"
    ):
        run_on_ranks(world(0, store), SETTINGS, train, tmp_path / "runs")
    second()


def test_a_rank_that_does_not_answer(tmp_path, train, store, monkeypatch):
    monkeypatch.setattr(sweep_replicas, "SECONDS_OF_SILENCE", 0.5)
    monkeypatch.setattr(sweep_replicas.sweep_workers, "SECONDS_TO_STOP", 0.1)
    with pytest.raises(UnsupportedSetup, match=r"rank 1 has not answered in 0.5 seconds"):
        run_on_ranks(world(0, store), SETTINGS, train, tmp_path / "runs")


def test_a_rank_that_has_ended_before_it_answered(tmp_path, train, store, monkeypatch):
    store.set(sweep_replicas._LEFT.format(1), "")
    with pytest.raises(UnsupportedSetup, match=r"of which rank 1 has ended"):
        run_on_ranks(world(0, store), SETTINGS, train, tmp_path / "runs")


@pytest.mark.parametrize("retries", [0, 1])
def test_a_rank_that_is_lost_counts_as_a_training_that_died(tmp_path, train, store, monkeypatch, retries):
    monkeypatch.setattr(sweep_replicas, "SECONDS_OF_SILENCE", 1.0)
    monkeypatch.setattr(sweep_replicas.sweep_workers, "SECONDS_TO_STOP", 0.1)
    store.set(sweep_replicas._ANSWER.format(1), "")  # then it is never heard of again
    told = pytest.warns(UserWarning, match="was lost with rank 1.*; retry 1 of 1") if retries else nullcontext()
    with told:
        result = run_on_ranks(world(0, store), SETTINGS[:3], train, tmp_path / "runs", retries=retries)
    assert [run.error is None for run in result.runs] == [retries == 1, True, True]
    if not retries:
        assert "was lost with rank 1, which has not been heard of for 1 seconds" in result.failed[0].error


def test_ranks_that_have_ended_are_lost_at_once_and_get_no_retries(tmp_path, train, store):
    for rank in (1, 2):
        store.set(sweep_replicas._ANSWER.format(rank), "")
        store.set(sweep_replicas._LEFT.format(rank), "")
    began = time.monotonic()
    with pytest.warns(UserWarning, match="was lost with rank 1, which has ended; retry 1 of 1"):
        result = run_on_ranks(world(0, store, 3), SETTINGS[:1], train, tmp_path / "runs", retries=1)
    assert len(result.finished) == 1
    assert time.monotonic() - began < sweep_replicas.SECONDS_OF_SILENCE


def test_other_ranks_wait_for_what_rank_0_does_with_the_runs(tmp_path, train, store):
    ends = {}

    def first_ends(result):
        time.sleep(2)
        ends[0] = time.monotonic()

    def of_rank_1():
        found = run_on_ranks(world(1, store), [{"do": "fail"}], train, tmp_path / "runs")
        ends[1] = time.monotonic()
        return found

    second = other_rank(of_rank_1)
    result = run_on_ranks(world(0, store), [{"do": "fail"}], train, tmp_path / "runs", afterwards=first_ends)
    assert second() == result
    assert ends[1] > ends[0]


def test_what_rank_0_cannot_do_with_the_runs_is_told_on_the_others(tmp_path, train, store):
    def fails(result):
        raise LightningSoupError("no common start.")

    second = other_rank(lambda: run_on_ranks(world(1, store), [{}], train, tmp_path / "runs"))
    with pytest.raises(LightningSoupError, match="no common start"):
        run_on_ranks(world(0, store), [{}], train, tmp_path / "runs", afterwards=fails)
    assert str(second()) == "rank 1: the sweep ended on rank 0: LightningSoupError: no common start."


def test_a_training_that_dies_on_another_rank_is_tried_again(tmp_path, train, store):
    with pytest.warns(UserWarning, match="retry 1 of 1"):
        first, second = on_two(store, train, tmp_path / "runs", [{"do": "terminate"}, {}, {"x": 1}], retries=1)
    assert first.runs[0].error == second.runs[0].error
    assert "after 1 that died before it" in first.runs[0].error
    assert len(first.finished) == 2


def test_an_interruption_ends_the_trainings_of_all_ranks(tmp_path, store):
    calls = tmp_path / "calls.jsonl"
    train = partial(fake_training, calls=str(calls))

    def interrupted(runs, *_, **__):
        for _ in runs:  # the one that is trained at once; the other sleeps
            raise KeyboardInterrupt
        yield

    sleeping = [{"do": "hang"}, {}]
    second = other_rank(lambda: run_on_ranks(world(1, store), sleeping, train, tmp_path / "runs"))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_on_ranks(world(0, store), sleeping, train, tmp_path / "runs", progress=interrupted)
    error = second()
    assert "the sweep ended on rank 0: it was interrupted" in str(error)
    assert time.monotonic() - began < 60
    assert [json.loads(text)["index"] for text in records(tmp_path / "runs").values()] == [1]
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_another_rank_tells_that_rank_0_is_gone(tmp_path, train):
    class Gone(dist.Store):
        def check(self, keys):
            raise dist.DistNetworkError("Connection reset by peer")

    with pytest.raises(LightningSoupError, match=r"rank 1: rank 0 is gone \(Connection reset.*give the command again"):
        run_on_ranks(world(1, Gone()), SETTINGS, train, tmp_path / "runs")


class TestLaunched:
    def test_a_process_that_nobody_launched(self, monkeypatch):
        for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(UnsupportedSetup, match=r"none did. Start the command with .*torchrun.*--jobs 4"):
            launched()

    @pytest.fixture
    def port(self):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        number = store.port
        del store
        return str(number)

    def test_by_torchrun(self, monkeypatch, port):
        told = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}
        for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(launched_module, "cores", lambda: 8)
        found = launched()
        assert (found.rank, found.size, found.local_rank, found.cores) == (0, 1, 0, 2)
        found.store.set("a", "b")
        assert found.store.get("a") == b"b"

    def test_by_slurm(self, monkeypatch, port):
        told = {
            "PROCID": "0",
            "LOCALID": "0",
            "NTASKS": "1",
            "NTASKS_PER_NODE": "1",
            "CPUS_PER_TASK": "3",
            "NODEID": "0",
        }
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        for name, value in told.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setenv("SLURM_JOB_NAME", "sweep")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        found = launched()
        assert (found.rank, found.size, found.local_rank, found.cores) == (0, 1, 0, 3)

    def test_others_that_do_not_come(self, monkeypatch, port):
        told = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(LightningSoupError, match=r"rank 0 of 2 does not meet the others at 127.0.0.1:"):
            launched(timeout=1)

    def test_the_store_outlives_a_sweep_since_others_may_be_in_the_next_one(self, monkeypatch, port):
        told = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        first = launched()
        first.store.set("a", "1")
        other = dist.TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False)
        del first
        assert other.check([f"lightning_soup/sweep/{launched_module._meetings}/a"])
        assert not launched().store.check(["a"])
        assert other.check([f"lightning_soup/sweep/{launched_module._meetings}/here/0"])

    def test_each_sweep_of_a_program_waits_for_all_ranks(self, monkeypatch):
        told = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        store = dist.HashStore()
        monkeypatch.setitem(launched_module._stores, ("127.0.0.1:1", 0, 2), store)
        store.set(f"lightning_soup/sweep/{launched_module._meetings + 1}/here/1", "")
        assert launched(timeout=1).size == 2
        with pytest.raises(LightningSoupError, match=r"rank 0 of 2 does not meet the others at 127.0.0.1:1"):
            launched(timeout=1)

    def test_trainings_do_not_see_the_launcher(self, monkeypatch):
        import os

        for name in ("RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_ID"):
            monkeypatch.setenv(name, "7")
        with unlaunched():
            left = [
                name for name in ("RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_ID") if name in os.environ
            ]
        assert left == ["SLURM_JOB_ID"]
        assert os.environ["RANK"] == os.environ["TORCHELASTIC_RUN_ID"] == "7"
