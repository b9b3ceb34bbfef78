import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_soup.errors import UnreadableCheckpoint, UnwritableOutput
from lightning_soup.progress import silent
from lightning_soup.weights import chunks, combine, open_checkpoint, save_weights
from tests.helpers.weights import assert_same, every_layout, every_type

BIG = 300_000  # elements: more than one chunk in any type


def vector(*values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


# ---------------------------------------------------------------------------------------------------------------- files


def test_any_format_of_ingredient_and_any_number_of_threads_give_the_same_bytes(tmp_path):
    torch.manual_seed(6)
    tensors = {n: t for n, t in (every_type() | every_layout()).items() if t.dtype != torch.complex128}
    models = [
        {
            n: t + torch.randn(t.shape, dtype=t.dtype) if t.dtype in (torch.float32, torch.float64) else t
            for n, t in tensors.items()
        }
        | {"big": torch.randn(2 * BIG)}
        for _ in range(3)
    ]
    for i, model in enumerate(models):
        save_weights(model, tmp_path / f"{i}.safetensors")
        torch.save(model, tmp_path / f"{i}.pt")
        torch.save({"state_dict": model}, tmp_path / f"{i}.ckpt", _use_new_zipfile_serialization=False)
    written = set()
    for sources in (
        models,
        *([tmp_path / f"{i}{suffix}" for i in range(3)] for suffix in (".safetensors", ".pt", ".ckpt")),
    ):
        for threads in (1, 4):
            combine(sources, [0.5, 0.25, 0.3], tmp_path / "out.safetensors", threads=threads)
            written.add((tmp_path / "out.safetensors").read_bytes())
    assert len(written) == 1


def test_the_file_may_be_one_of_the_ingredients(tmp_path):
    for i in range(2):
        save_weights({"w": torch.full((BIG,), float(i))}, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    assert combine(paths, [0.5, 0.5], paths[0])["w"].unique().tolist() == [0.5]
    assert load_file(paths[1])["w"].unique().tolist() == [1]


def test_metadata_is_written(tmp_path):
    opened = combine([vector(1)], [1.0], tmp_path / "deep" / "er" / "a.safetensors", metadata={"note": "ü"})
    assert opened.metadata == {"format": "pt", "note": "ü"}


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux does")
def test_three_hundred_checkpoints(tmp_path):
    resource = pytest.importorskip("resource")
    for i in range(300):
        save_file({"a": torch.full((50,), float(i)), "b": torch.ones(2)}, tmp_path / f"{i}.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 150, hard))
    try:
        opened = [open_checkpoint(tmp_path / f"{i}.safetensors") for i in range(300)]
        tensors = [weights["a"] for weights in opened]  # all mapped at once
        found = combine(opened, [1 / 300] * 300, tmp_path / "out.safetensors", threads=4)
        torch.testing.assert_close(found["a"], torch.full((50,), 149.5))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert tensors[299][0].item() == 299


def test_a_checkpoint_that_is_overwritten_meanwhile_is_noticed(tmp_path):
    save_weights({"w": torch.ones(BIG)}, tmp_path / "last.safetensors")
    opened = open_checkpoint(tmp_path / "last.safetensors")
    save_weights({"w": torch.zeros(BIG)}, tmp_path / "last.safetensors")
    with pytest.raises(UnreadableCheckpoint, match=r"last\.safetensors: was replaced"):
        combine([opened, {"w": torch.ones(BIG)}], [0.5, 0.5])


# ------------------------------------------------------------------------------------------------- nothing half-written


def interrupted(after):
    def progress(items, description, total=None):
        for number, item in enumerate(items):
            if number == after:
                raise KeyboardInterrupt
            yield item

    return progress


def only(folder, *names):
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("threads", [1, 3])
def test_ctrl_c_leaves_the_old_file_and_nothing_else(tmp_path, threads):
    models = [{"w": torch.randn(8 * BIG)} for _ in range(2)]
    combine(models, [1.0, 0.0], tmp_path / "out.safetensors")
    before = (tmp_path / "out.safetensors").read_bytes()
    running = threading.active_count()
    for after in range(4):
        with pytest.raises(KeyboardInterrupt):
            combine(models, [0.5, 0.5], tmp_path / "out.safetensors", threads=threads, progress=interrupted(after))
        assert only(tmp_path, "out.safetensors")
        assert (tmp_path / "out.safetensors").read_bytes() == before
        assert threading.active_count() == running


def test_a_real_ctrl_c_while_threads_work(tmp_path):
    models = [{"w": torch.randn(8 * BIG)} for _ in range(2)]

    def progress(items, description, total=None):
        for number, item in enumerate(items):
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    with pytest.raises(KeyboardInterrupt):
        combine(models, [0.5, 0.5], tmp_path / "out.safetensors", threads=3, progress=progress)
    assert only(tmp_path)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_an_error_inside_a_thread_comes_out_as_it_is(tmp_path, monkeypatch, threads, error):
    calls = []

    def broken(part, start, stop, buffers):
        calls.append(start)
        if len(calls) == 3:
            raise error("in the middle")
        return chunks_combine(part, start, stop, buffers)

    chunks_combine = chunks.combine_chunk
    monkeypatch.setattr("lightning_soup.weights.streaming.combine_chunk", broken)
    models = [{"w": torch.randn(12 * BIG)} for _ in range(2)]
    running = threading.active_count()
    with pytest.raises(error, match="in the middle"):
        combine(models, [0.5, 0.5], tmp_path / "out.safetensors", threads=threads)
    assert only(tmp_path)
    assert len(calls) <= 3 + threads
    assert threading.active_count() == running


@pytest.mark.parametrize("threads", [1, 3])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, threads):
    written, original = [], os.pwrite

    def full(descriptor, data, offset):
        written.append(len(data))
        if sum(written) > 3_000_000:
            raise OSError(28, "No space left on device")
        return original(descriptor, data, offset)

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UnwritableOutput, match=r"out\.safetensors: cannot be written .the disk is full."):
        combine([{"w": torch.randn(8 * BIG)}], [1.0], tmp_path / "out.safetensors", threads=threads)
    assert only(tmp_path)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    original = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda fd, data, at: original(fd, memoryview(data)[:1001], at))
    model = {"w": torch.randn(5000), "n": torch.arange(3)}
    assert_same(combine([model], [1.0], tmp_path / "out.safetensors"), model)


def test_too_little_space_is_said_before_the_work(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1_000_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("lightning_soup.weights.streaming.combine_chunk", None)
    with pytest.raises(UnwritableOutput, match=r"needs 1\.2 MB, but 1\.0 MB are free"):
        combine([{"w": torch.ones(BIG)}], [1.0], tmp_path / "out.safetensors")
    assert only(tmp_path)


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.safetensors").mkdir()
    for out, message in (
        (tmp_path / "file" / "out.safetensors", "Not a directory|File exists"),
        (tmp_path / "folder.safetensors", "is a folder"),
        ("/proc/nowhere/out.safetensors", "cannot be written"),
        (tmp_path / ("x" * 250 + ".safetensors"), "File name too long"),
    ):
        with pytest.raises(UnwritableOutput, match=message):
            combine([vector(1)], [1.0], out)
    assert only(tmp_path, "file", "folder.safetensors")


def test_only_safetensors_files_are_written(tmp_path):
    with pytest.raises(UnwritableOutput, match=r"soup\.ckpt: combine writes safetensors"):
        combine([vector(1)], [1.0], tmp_path / "soup.ckpt")


def test_a_full_buffer_is_not_shared_between_results():
    models = [{"a": torch.randn(9), "b": torch.randn(9)} for _ in range(2)]
    found = combine(models, [0.5, 0.5])
    kept = {name: tensor.clone() for name, tensor in found.items()}
    combine(models, [2.0, 2.0], progress=silent)
    assert_same(found, kept)
