"""Files of tensor data: opened for as long as they are read, checked against change, mapped on demand."""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from lightning_soup.errors import UnreadableCheckpoint

_HELD_FILES = 128  # more files than this are opened anew for each read; fewer where the system allows few


class DataFile:
    """A file of tensor data. Nothing stays open but while it is read or held (:meth:`held`).

    So any number of checkpoints can be open without running out of file descriptors. Whenever the file is
    opened again it must still be the same one: a training run that overwrites ``last.ckpt`` meanwhile must
    not make old offsets point into new data.

    Raises:
        UnreadableCheckpoint: On any read of a file that has gone, was replaced or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = os.path.abspath(path)  # the program may change its folder before it reads
        status = path.stat()
        self.size = status.st_size
        self._stamp = _stamp(status)
        self._reset()

    def _reset(self) -> None:
        self._descriptor = -1
        self._users = 0
        self._mapped: torch.UntypedStorage | None = None
        self._mappable = True
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the file open for many reads; may be nested and used by several threads."""
        self._acquire()
        try:
            yield
        finally:
            self._release()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        descriptor = self._acquire()
        try:
            done = os.preadv(descriptor, [buffer], offset)
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], offset + done)
                if count == 0:
                    raise UnreadableCheckpoint(
                        f"{self.path}: the file ends at byte {offset + done}, but had {self.size} bytes when "
                        "it was opened. It was truncated meanwhile; write it again and start over."
                    )
                done += count
        except OSError as error:
            raise UnreadableCheckpoint(f"{self.path}: cannot be read ({error.strerror}).") from error
        finally:
            self._release()

    def read(self, offset: int, count: int) -> bytearray:
        """The ``count`` bytes at ``offset``."""
        data = bytearray(count)
        self.read_into(memoryview(data), offset)
        return data

    def storage(self, offset: int, size: int, width: int) -> torch.UntypedStorage:
        """The ``size`` bytes at ``offset`` as a storage for elements of ``width`` bytes.

        They are mapped copy-on-write: a caller that writes into a tensor never changes the file. The mapping is
        torch's own, which keeps no file descriptor open; the storage is cut to what was asked for, so that copying
        or saving a tensor does not take the whole file along. Bytes that are not aligned (old writers do not) are
        read, and so are all bytes of a file that cannot be mapped: Linux refuses one larger than its memory.
        """
        with self.held(), self._lock:
            if self._mapped is None and self._mappable and offset % width == 0:
                try:
                    self._mapped = torch.UntypedStorage.from_file(self.place, False, self.size)
                except RuntimeError:
                    self._mappable = False
        if offset % width or self._mapped is None:
            return torch.frombuffer(self.read(offset, size), dtype=torch.uint8).untyped_storage()
        return self._mapped[offset : offset + size]

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "place": self.place, "size": self.size, "_stamp": self._stamp}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Come from another process, with nothing open."""
        vars(self).update(state)
        self._reset()

    def _acquire(self) -> int:
        with self._lock:
            if not self._users:
                self._descriptor = self._opened()
            self._users += 1
            return self._descriptor

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                os.close(self._descriptor)

    def _opened(self) -> int:
        try:
            descriptor = os.open(self.place, os.O_RDONLY)
        except OSError as error:
            raise UnreadableCheckpoint(f"{self.path}: cannot be read ({error.strerror}).") from error
        if _stamp(os.fstat(descriptor)) != self._stamp:
            os.close(descriptor)
            raise UnreadableCheckpoint(
                f"{self.path}: was replaced or changed since it was opened. Open it again, and combine "
                "copies of files that a running training overwrites."
            )
        return descriptor


@contextmanager
def hold(files: Iterable[DataFile]) -> Iterator[None]:
    """Keep files open for many reads, as many of them as the process may well have open."""
    with ExitStack() as stack:
        for file in list(dict.fromkeys(files))[: files_to_hold()]:
            stack.enter_context(file.held())
        yield


def files_to_hold() -> int:
    """A quarter of what the process may open: the rest is for threads that read other files, and for the caller."""
    try:
        import resource
    except ImportError:  # Windows
        return _HELD_FILES
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _HELD_FILES if limit == resource.RLIM_INFINITY else min(_HELD_FILES, limit // 4)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
