"""Terminals that take nothing, pipes that close, and signals: what is done stays done, and nothing half-written."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from lightning_soup.cli import terminal
from lightning_soup.cli.terminal import Output, Terminated, ending_signals, plain, steady_output
from lightning_soup.weights import open_checkpoint, save_weights

MAIN = "from lightning_soup.cli.main import main; main()"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        save_weights({"w": torch.full((4, 4), float(i + 1))}, tmp_path / f"run-{i}.pt")
    return tmp_path


def command(*arguments, code=MAIN, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **options.pop("env", {})}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE, **options
    )


SOUP = ("soup", "--ingredients", "run-*.pt", "--output", "soup.ckpt")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_behind_the_output_does_not_undo_the_soup(files):
    with open("/dev/full", "w") as full:
        done = command(*SOUP, stdout=full)
        _, errors = done.communicate()
    assert done.returncode == 1
    assert errors.decode() == (
        "lightning-soup: the output could not be shown (No space left on device). Files that were asked for are "
        "written.\n"
    )
    assert open_checkpoint("soup.ckpt")["w"].unique().tolist() == [1.5]


def test_a_reader_that_stops_and_letters_that_the_terminal_lacks(files):
    reader, writer = os.pipe()
    os.close(reader)
    done = command(*SOUP, stdout=writer)
    os.close(writer)
    assert done.communicate()[1] == b""
    assert done.returncode == 128 + signal.SIGPIPE
    shown = command("show", "soup.ckpt", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    text, errors = shown.communicate()
    assert (shown.returncode, errors) == (0, b"")
    assert b"####" in text


SLOW = """
import os, time
def pwrite(*_):
    print("writing", flush=True)
    time.sleep(60)
os.pwrite = pwrite
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_half_written(files, number):
    before = sorted(os.listdir(files))
    output = str(files / "new" / "soup.ckpt")
    running = command(*SOUP[:-1], output, code=SLOW + MAIN, stdout=subprocess.PIPE)
    assert running.stdout.readline() == b"writing\n"
    assert [path.suffix for path in (files / "new").iterdir()] == [".tmp"]
    running.send_signal(number)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 128 + number
    assert errors.decode() == f"lightning-soup: ended by {number.name}; nothing half-written was left.\n"
    assert sorted(os.listdir(files)) == before


def test_signals_that_are_ignored_or_handled_stay_so():
    handled = []
    for handler in (signal.SIG_IGN, lambda *_: handled.append(1)):
        previous = signal.signal(signal.SIGHUP, handler)
        try:
            with ending_signals():
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0.01)
        finally:
            signal.signal(signal.SIGHUP, previous)
    assert handled == [1]


def test_a_training_loop_ends_by_lightning_and_all_else_at_once():
    def other(number, frame):
        terminal._end(number, frame)

    with ending_signals():
        ours = signal.signal(signal.SIGTERM, other)  # as Lightning does, which calls the handler before its own
        in_a_loop = compile("import os, signal; os.kill(os.getpid(), signal.SIGTERM); sum([])", "x/fit_loop.py", "exec")
        exec(in_a_loop, {})
        elsewhere = compile("import os, signal; os.kill(os.getpid(), signal.SIGTERM); sum([])", "x/save.py", "exec")
        with pytest.raises(Terminated) as stop:
            exec(elsewhere, {})
        signal.signal(signal.SIGTERM, ours)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class Full(io.StringIO):
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_output_after_a_loss_is_dropped():
    output = Output(Full())
    assert [output.write("abc"), output.write("de")] == [3, 2]
    output.flush()
    assert output.lost.errno == errno.ENOSPC
    assert not output.isatty()


def test_streams_and_warnings_are_as_before_afterwards():
    before = sys.stdout, sys.stderr, warnings.showwarning, sys.stdout.errors
    with pytest.raises(KeyError), steady_output():
        raise KeyError
    assert (sys.stdout, sys.stderr, warnings.showwarning, sys.stdout.errors) == before


def test_notes_are_one_line_and_other_warnings_as_ever(capsys):
    with steady_output(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn_explicit("a and b are one file", UserWarning, terminal.__file__, 7)
        warnings.warn_explicit("something else", UserWarning, "/somewhere/else.py", 7)
    shown = capsys.readouterr().err
    assert shown.startswith("lightning-soup: note: a and b are one file\n/somewhere/else.py:7: UserWarning: something")


def test_text_from_a_file_cannot_steer_the_terminal():
    assert plain("a\x1b[31mb\nc\x9b\udcff[red]ä█ d") == "a\\x1b[31mb\\nc\\x9b\\udcff\\[red]ä█ d"
