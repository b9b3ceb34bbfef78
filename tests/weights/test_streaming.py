import os
import threading
import time

import pytest
import torch

from lightning_soup.threads import single_threaded_torch
from lightning_soup.weights import combine, data_file, save_weights, streaming

BIG = 4_000_000


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_torch_runs_on_one_thread_inside_and_as_before_after():
    with single_threaded_torch():
        assert torch.get_num_threads() == 1
        with single_threaded_torch():
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), single_threaded_torch():
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_users_in_other_threads_do_not_leave_one_thread_behind():
    inside, leave, found = threading.Barrier(2), threading.Event(), []

    def other():
        with single_threaded_torch():
            inside.wait()
            leave.wait()
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    with single_threaded_torch():
        thread.start()
        inside.wait()
    assert torch.get_num_threads() == 2
    leave.set()
    thread.join()
    assert found == [2]
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2, 2]


@pytest.mark.usefixtures("two_threads")
def test_every_thread_of_a_combination_computes_alone(monkeypatch):
    seen = []
    original = streaming.combine_chunk
    monkeypatch.setattr(
        streaming,
        "combine_chunk",
        lambda *a: seen.append((threading.get_ident(), torch.get_num_threads())) or original(*a),
    )
    combine([{"w": torch.ones(BIG)}] * 2, [0.5, 0.5])
    assert {number for _, number in seen} == {1}
    assert torch.get_num_threads() == 2


def test_no_thread_waits_for_a_slow_one(monkeypatch):
    """With one core taken, its thread gets fewer chunks; it does not hold up the others."""
    original, done = streaming.combine_chunk, {}

    def slow_in_one(*arguments):
        thread = threading.get_ident()
        done.setdefault(thread, 0)
        if thread == next(iter(done)):
            time.sleep(0.1)
        done[thread] += 1
        return original(*arguments)

    monkeypatch.setattr(streaming, "combine_chunk", slow_in_one)
    combine([{"w": torch.ones(BIG)}] * 2, [0.5, 0.5], threads=2)
    slow, fast = done.values()
    assert slow <= 2
    assert slow + fast == 16


def test_no_thread_is_left_when_an_error_comes_out(tmp_path, monkeypatch):
    """A thread that still writes would write into whatever file gets the closed one's number."""
    original, begun, ended = streaming.combine_chunk, [], []

    def slow(*arguments):
        begun.append(1)
        if len(begun) == 3:
            raise ValueError("in the middle")
        time.sleep(0.2)
        ended.append(1)
        return original(*arguments)

    monkeypatch.setattr(streaming, "combine_chunk", slow)
    with pytest.raises(ValueError, match="in the middle"):
        combine([{"w": torch.ones(BIG)}], [1.0], tmp_path / "a.safetensors", threads=3)
    assert len(ended) == len(begun) - 1


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_is_told_chunk_by_chunk(threads):
    told = []

    def progress(items, description, total=None):
        for item in items:
            told.append((description, total))
            yield item

    combine(
        [{"w": torch.ones(BIG), "empty": torch.zeros(0), "scalar": torch.tensor(1.0)}],
        [1.0],
        progress=progress,
        threads=threads,
    )
    assert told == [("averaging", 17)] * 17


def test_few_open_files_are_enough(tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = [save_weights({"w": torch.full((3,), float(i))}, tmp_path / f"{i}.pt") for i in range(100)]
    assert data_file.files_to_hold() == min(128, soft // 4)
    in_use = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(64, in_use + 40), hard))
    try:
        assert combine(files, [0.01] * 100, threads=2)["w"].tolist() == pytest.approx([49.5] * 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
