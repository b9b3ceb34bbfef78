"""Writing files so that a reader sees the old content or the new, never a part."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_soup.errors import UnwritableOutput


@contextmanager
def atomic_path(path: str | os.PathLike, *, size: int = 0) -> Iterator[Path]:
    """Give a temporary path beside ``path``, which takes its place when the block ends without an error.

    On any error, Ctrl-C included, the temporary file is removed and ``path`` is left as it was.

    Args:
        path: The final path; missing parent folders are created.
        size: Bytes that will be written, where known: too little space is then said before the work and not after.

    Raises:
        UnwritableOutput: The folder cannot be created or written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UnwritableOutput(f"{path}: is a folder. Give the name of a file in it.")
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise UnwritableOutput(
                f"{path}: needs {size / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free. Make room or write elsewhere."
            )
        temporary.touch()
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, UnwritableOutput) or not _concerns_output(error, temporary):
            raise
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise UnwritableOutput(f"{path}: cannot be written ({reason}). Choose another output path.") from error
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


def _concerns_output(error: OSError, temporary: Path) -> bool:
    """Whether an error came from writing, and not from reading an input inside the block."""
    named = [name for name in (error.filename, error.filename2) if name is not None]
    return not named or any(Path(os.fsdecode(name)).parent in (temporary.parent, *temporary.parents) for name in named)
