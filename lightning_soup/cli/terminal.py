"""What the command does with its terminal and with signals, so that neither costs work that is done."""

import codecs
import contextlib
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import lightning_soup

_PACKAGE = str(Path(lightning_soup.__file__).parent)
_ASCII = {"█": "#", "…": "...", "±": "+-", "→": "->", "–": "-", "—": "-", "θ": "theta", "α": "alpha"}


class Terminated(SystemExit):
    """SIGTERM or SIGHUP: unwinds, so that files that are half-written are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block by :class:`Terminated`, unless they are ignored (``nohup``) or handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    # In its training loop Lightning, whose handler has called this one, ends after the batch or lets SLURM requeue.
    if number == signal.SIGTERM and signal.getsignal(number) is not _end:
        while frame is not None:
            if frame.f_code.co_filename.endswith("fit_loop.py"):
                return
            frame = frame.f_back
    raise Terminated(number)


class Output:
    """A text stream that takes what its terminal cannot show, and does not raise when its reader or disk is gone.

    Attributes:
        lost: The error after which nothing more was written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        if self.lost is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        if self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = error
        with contextlib.suppress(OSError, ValueError):  # the interpreter flushes once more at its end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_output() -> Iterator[Output]:
    """Print by way of :class:`Output` in the block, and notes of the package as one line each.

    Yields:
        Standard output.
    """
    streams, shown = (sys.stdout, sys.stderr), warnings.showwarning
    codecs.register_error("lightning_soup", _in_other_letters)
    with contextlib.ExitStack() as stack:
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            given = stream or stack.enter_context(open(os.devnull, "w"))  # it is None where it was closed
            if hasattr(given, "reconfigure"):
                stack.callback(given.reconfigure, errors=given.errors)
                given.reconfigure(errors="lightning_soup")
            setattr(sys, name, Output(given))
        warnings.showwarning = _show_warning
        try:
            yield sys.stdout
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            (sys.stdout, sys.stderr), warnings.showwarning = streams, shown


def status_of_loss(lost: OSError) -> int:
    """Tell that the output was not shown, and give the exit status: a closed pipe ends as it ends other programs."""
    if lost.errno == errno.EPIPE:
        return 128 + int(getattr(signal, "SIGPIPE", 13))
    sys.stderr.write(
        f"lightning-soup: the output could not be shown ({lost.strerror}). Files that were asked for are written.\n"
    )
    return 1


def _in_other_letters(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec's error handler: similar ASCII, else the code of the character."""
    assert isinstance(error, UnicodeEncodeError)
    text = _ASCII.get(error.object[error.start])
    one = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    return codecs.lookup_error("backslashreplace")(one) if text is None else (text, error.start + 1)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    if issubclass(category, UserWarning) and filename.startswith(_PACKAGE):
        sys.stderr.write(f"lightning-soup: note: {message}\n")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def plain(text: object) -> str:
    """Text from a file, as rich may print it: without its control characters and without meaning as markup."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)))
