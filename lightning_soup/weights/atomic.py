"""Writing files so that a reader sees the old content or the new, never a part."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_soup.errors import UnwritableOutput


@contextmanager
def atomic_path(path: str | os.PathLike, *, size: int = 0) -> Iterator[Path]:
    """Give a temporary path beside ``path``, which takes its place when the block ends without an error.

    On any error, Ctrl-C included, the temporary file is removed and ``path`` is left as it was. Two writers
    of one path do not disturb each other: the last one to finish stays. Where ``path`` is a symbolic link, the file
    that it leads to is written and the link stays.

    Args:
        path: The final path; missing parent folders are created, and removed again after an error.
        size: Bytes that will be written, where known: too little space is then said before the work and not
            after.

    Raises:
        UnwritableOutput: The folder cannot be created or written, or the disk is full.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    made: list[Path] = []
    try:
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        made = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise UnwritableOutput(f"{path}: is a folder. Give the name of a file in it.")
        free = shutil.disk_usage(target.parent).free
        if size > free:
            raise UnwritableOutput(
                f"{path}: needs {size / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free. Make room or write elsewhere."
            )
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        os.replace(temporary, target)
        made = []
    except OSError as error:
        if not _concerns_output(error, temporary, target):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise UnwritableOutput(f"{path}: cannot be written ({reason}). Choose another output path.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        for folder in made:  # the innermost first; one that somebody else uses by now is not empty
            with suppress(OSError):
                folder.rmdir()


def user_path(path: str | os.PathLike) -> Path:
    """The path with ``~`` expanded; a name such as ``~x.ckpt`` of no user stays what it is."""
    return Path(os.path.expanduser(path))


def check_writable(path: str | os.PathLike) -> None:
    """Check that ``path`` could be written now, leaving what is there as it is.

    Raises:
        UnwritableOutput: It could not.
    """
    with suppress(_Checked), atomic_path(path):
        raise _Checked


class _Checked(Exception):
    pass


def _concerns_output(error: OSError, temporary: Path, path: Path) -> bool:
    """Whether an error came from writing (which names no file), not from reading an input in the block."""
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return not named or any(name in (temporary, path, *path.parents) for name in named)
