"""Writing files so that a reader sees the old content or the new, never a part."""

import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
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


@contextmanager
def atomic_folder(path: str | os.PathLike, *, files: Collection[str]) -> Iterator[Path]:
    """Give a temporary folder beside ``path``, which takes its place when the block ends without an error.

    Args:
        path: The final folder. One that is there already is replaced, if it holds nothing but such files.
        files: Names that the folder may hold.

    Raises:
        UnwritableOutput: The folder holds other files, is a file, or cannot be written.
    """
    target = Path(os.path.realpath(path))
    check_replaceable(target, files)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except OSError as error:
        if old.exists() and not target.exists():
            os.replace(old, target)
        if not _concerns_output(error, temporary, target):
            raise
        reason = error.strerror or str(error)
        raise UnwritableOutput(f"{path}: cannot be written ({reason}). Choose another output folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path, files: Collection[str]) -> None:
    """Refuse a folder that cannot be replaced as a whole, because something else is in it.

    Args:
        folder: The folder; it need not exist.
        files: Names that it may hold.

    Raises:
        UnwritableOutput: It holds others, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UnwritableOutput(f"{folder}: is a file. Give the name of a new folder.")
    others = sorted({path.name for path in folder.iterdir()} - set(files)) if folder.is_dir() else []
    if others:
        raise UnwritableOutput(
            f"{folder}: holds other files ({', '.join(others[:4])}), which would be lost. Name a new folder."
        )


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
