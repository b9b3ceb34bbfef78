import os
import stat
import threading

import pytest

from lightning_soup.errors import UnreadableCheckpoint, UnwritableOutput
from lightning_soup.weights.atomic import atomic_folder, atomic_path, check_writable


def fail_after_writing(path, error):
    path.write_text("half")
    raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "folder" / "a.txt"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent  # the same file system, so that the exchange is one step
        temporary.write_text("first")
        assert not target.exists()
    assert target.read_text() == "first"
    with atomic_path(target) as temporary:
        temporary.write_text("second")
        assert target.read_text() == "first"
    assert target.read_text() == "second"
    assert names(target.parent) == ["a.txt"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("x")
    (tmp_path / "b").write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, UnreadableCheckpoint])
def test_errors_come_out_as_they_are_and_leave_nothing(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), atomic_path(tmp_path / "a") as temporary:
        fail_after_writing(temporary, error)
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_errors_of_writing_are_told_from_those_of_reading(tmp_path):
    with pytest.raises(UnwritableOutput, match="the disk is full"), atomic_path(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    with pytest.raises(UnwritableOutput, match="the disk is full"), atomic_path(tmp_path / "a"):
        raise OSError(122, "Disk quota exceeded")
    with pytest.raises(UnwritableOutput, match="Input/output error"), atomic_path(tmp_path / "a") as temporary:
        raise OSError(5, "Input/output error", str(temporary))
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        (tmp_path / "input").read_text()
    assert names(tmp_path) == []


def test_two_writers_of_one_path_do_not_disturb_each_other(tmp_path):
    barrier, failed = threading.Barrier(4), []

    def write(text):
        try:
            for _ in range(20):
                barrier.wait()
                with atomic_path(tmp_path / "a") as temporary:
                    temporary.write_text(text * 1000)
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert names(tmp_path) == ["a"]
    text = (tmp_path / "a").read_text()
    assert len(text) == 1000
    assert len(set(text)) == 1


def test_a_target_that_turns_into_a_folder(tmp_path):
    with pytest.raises(UnwritableOutput, match="directory"), atomic_path(tmp_path / "a"):
        (tmp_path / "a" / "b").mkdir(parents=True)
    assert names(tmp_path) == ["a"]


def test_checking_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    check_writable(tmp_path / "a")
    check_writable(tmp_path / "b")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]
    for path in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(UnwritableOutput):
            check_writable(path)


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    original = os.open

    def refuse(path, flags, *rest, **named):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return original(path, flags, *rest, **named)

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(UnwritableOutput, match=r"a\.txt: cannot be written .Permission denied.\. Choose another"):
        atomic_path(tmp_path / "a.txt").__enter__()


def test_a_symbolic_link_stays_and_its_file_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("there", "new"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "there").write_text("old")
    for name in ("there", "new"):
        with atomic_path(tmp_path / name) as temporary:
            temporary.write_text("soup")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "disk" / name).read_text() == "soup"
    assert names(tmp_path / "disk") == ["new", "there"]


def test_a_link_that_leads_to_itself(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(UnwritableOutput, match="symbolic links"):
        check_writable(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "mine" / "new" / "er" / "a"):
        raise KeyboardInterrupt
    with pytest.raises(UnwritableOutput), atomic_path(tmp_path / "mine" / "new" / ("x" * 300) / "a"):
        pass
    assert names(tmp_path / "mine") == []
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "mine" / "new" / "a"):
        fail_after_writing(tmp_path / "mine" / "new" / "other", KeyboardInterrupt)
    assert names(tmp_path / "mine" / "new") == ["other"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "out"
    for text in ("old", "new"):
        with atomic_folder(target, files=["a.txt", "b.txt"]) as temporary:
            (temporary / "a.txt").write_text(text)
            if text == "new":
                assert (target / "a.txt").read_text() == "old"
    assert (target / "a.txt").read_text() == "new"
    with pytest.raises(ValueError, match="stop"), atomic_folder(target, files=["a.txt"]) as temporary:
        fail_after_writing(temporary / "a.txt", ValueError("stop"))
    assert (target / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_others_use_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    message = r"holds other files \(mine\.txt\)"
    with pytest.raises(UnwritableOutput, match=message), atomic_folder(tmp_path, files=["a.txt"]):
        raise AssertionError("not reached")
    with pytest.raises(UnwritableOutput, match="is a file"), atomic_folder(tmp_path / "mine.txt", files=[]):
        raise AssertionError("not reached")
