import copy
import os
import pickle
import threading
import time

import pytest

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights.data_file import DataFile


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "data.bin"
    found.write_bytes(bytes(range(256)))
    return found


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_reads_at_offsets_and_leaves_nothing_open(path):
    before = descriptors()
    file = DataFile(path)
    assert file.read(3, 4) == bytes([3, 4, 5, 6])
    assert list(file.storage(250, 6, 2)) == [250, 251, 252, 253, 254, 255]
    assert descriptors() == before


def test_holds_nest_and_are_given_back(path):
    before, file = descriptors(), DataFile(path)
    with file.held():
        with file.held():
            assert file.read(0, 1) == b"\0"
            if before:
                assert descriptors() == before + 1
        assert file.read(1, 1) == b"\1"
    assert descriptors() == before


def test_writing_into_mapped_data_does_not_change_the_file(path):
    file = DataFile(path)
    file.storage(0, 256, 1).fill_(0)
    assert path.read_bytes() == bytes(range(256))
    assert file.read(5, 1) == b"\5"


def test_bytes_that_are_not_aligned_or_cannot_be_mapped_are_read(path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("unable to mmap 256 bytes: Cannot allocate memory (12)")

    file = DataFile(path)
    assert list(file.storage(3, 5, 4)) == [3, 4, 5, 6, 7]
    monkeypatch.setattr("torch.UntypedStorage.from_file", refuse)
    for _ in range(2):
        assert list(DataFile(path).storage(4, 3, 4)) == [4, 5, 6]


def test_it_goes_to_other_processes_and_still_knows_its_file(path):
    file = DataFile(path)
    with file.held():
        sent = pickle.loads(pickle.dumps(file))
    assert sent.read(7, 1) == b"\7"
    assert copy.deepcopy(file).read(7, 1) == b"\7"
    os.truncate(path, 255)
    with pytest.raises(UnreadableCheckpoint, match="was replaced or changed"):
        pickle.loads(pickle.dumps(sent)).read(7, 1)


def test_a_read_past_the_end_is_told(path):
    with pytest.raises(UnreadableCheckpoint, match="ends at byte 256"):
        DataFile(path).read(250, 10)


@pytest.mark.parametrize("change", ["deleted", "truncated", "rewritten", "replaced"])
def test_a_file_that_changes_after_it_was_opened_is_refused(path, change):
    file = DataFile(path)
    data = path.read_bytes()
    if change == "deleted":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(data[:100])
    elif change == "rewritten":
        time.sleep(0.02)  # the clock of file times is coarse
        path.write_bytes(data)
    else:
        other = path.with_name("other")
        other.write_bytes(data)
        os.utime(other, ns=(0, path.stat().st_mtime_ns))
        os.replace(other, path)
    for read in (lambda: file.read(0, 1), lambda: file.storage(0, 8, 8)):
        with pytest.raises(UnreadableCheckpoint, match=str(path)):
            read()


def test_truncation_while_the_file_is_held(path):
    file = DataFile(path)
    with file.held():
        os.truncate(path, 10)
        with pytest.raises(UnreadableCheckpoint, match="truncated meanwhile"):
            file.read(0, 20)


def test_an_input_error_names_the_input(path, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    file = DataFile(path)
    monkeypatch.setattr("os.preadv", broken)
    with pytest.raises(UnreadableCheckpoint, match=f"{path}: cannot be read .Input/output error"):
        file.read(0, 1)


def test_many_threads_share_one_file(path):
    file, wrong = DataFile(path), []

    def work(start):
        for i in range(200):
            at = (start + i) % 256
            if i % 50 == 0:
                with file.held():
                    file.read(at, 1)
            if file.read(at, 1) != bytes([at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(i * 31,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
