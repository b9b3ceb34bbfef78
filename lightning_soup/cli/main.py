"""The ``lightning-soup`` command: which part of the package answers, and how errors reach the terminal."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import takewhile

import lightning_soup
from lightning_soup.cli.terminal import Terminated, ending_signals, status_of_loss, steady_output
from lightning_soup.errors import LightningSoupError

_HELP = """\
usage: lightning-soup COMMAND [options]        (lightning-soup COMMAND --help explains one)

  soup      cook a soup from checkpoints: from files alone, or with --config/--model/--data by validation
  inspect   whether checkpoints can be averaged, and which: by weights, or with --config/--model/--data by validation
  sweep     train one ingredient per setting of a W&B sweep file, then cook them if asked
  resolution  evaluate a model at several image sizes, choose one on validation data, test there
  continual train a list of tasks in order, and judge all tasks after each (ZSCL)
  zoo       train a grid of settings and seeds, measure the loss landscape, and name the phases
  federated simulate federated averaging over clients that come and go (FedAU)
  show      what a checkpoint or soup holds, and how it was cooked
  recook    cook a soup again from its provenance
  demo      the whole way on real data: pre-train, fine-tune eight ingredients, cook, report
  fit, validate, test, predict
            LightningCLI for any LightningModule and LightningDataModule

  --debug    show the traceback of an error
  --version  show the version
"""
_COMMANDS = {
    "show": "lightning_soup.cli.files",
    "recook": "lightning_soup.cli.files",
    "sweep": "lightning_soup.cli.sweep",
    "continual": "lightning_soup.cli.continual",
    "zoo": "lightning_soup.cli.zoo",
    "federated": "lightning_soup.cli.federated",
    "demo": "lightning_soup.cli.demo",
}
_LIGHTNING = ("fit", "validate", "test", "predict")
_NEEDS_LIGHTNING = ("--config", "-c", "--model", "--data", "--trainer", "--help", "-h", "--print_config")


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; an error of the package is one message and exit status 1, a wrong option exit status 2."""
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with steady_output() as output:
        status = _status(arguments, debug)
        output.flush()
        if output.lost is not None and not status:
            status = status_of_loss(output.lost)
    if status is not None:
        raise SystemExit(status)


def _status(arguments: list[str], debug: bool) -> int | str | None:
    """Run a command and give its exit status, None for a success."""
    try:
        with ending_signals():
            _run(arguments)
    except (LightningSoupError, OSError) as error:
        if debug:
            raise
        sys.stderr.write(f"lightning-soup: {_message(error)}\n")
        return 1
    except Terminated as stop:
        sys.stderr.write(f"lightning-soup: ended by {stop.name}; nothing half-written was left.\n")
        return stop.code
    except SystemExit as stop:
        # Lightning's exception for SIGTERM has no status, and would end as a success.
        return 143 if type(stop).__name__ == "SIGTERMException" else stop.code
    except KeyboardInterrupt:
        if debug:
            raise
        sys.stderr.write("lightning-soup: interrupted; nothing half-written was left.\n")
        return 130
    return None


def _message(error: Exception) -> str:
    """What is told of an error; of one from the system, which file it is about."""
    if isinstance(error, LightningSoupError):
        return str(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    what = f"{' and '.join(names)}: {error.strerror}" if names else str(error) or type(error).__name__
    return f"{what}. (--debug shows where this happened.)"


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_HELP)
        return
    command, *rest = arguments
    if command in ("--version", "version"):
        sys.stdout.write(f"lightning-soup {lightning_soup.__version__}\n")
        return
    if command == "soup":
        rest = _switch(_one_list(rest, "--ingredients"), "--recalibrate")
    if command == "inspect":
        rest = _one_list(_named(rest, "--checkpoints"), "--checkpoints")
    if command == "show":
        rest = _switch(rest, "--tensors")
    if command in _COMMANDS:
        positional = command != "federated"  # whose model and data are classes, named in its config
        _call(getattr(import_module(_COMMANDS[command]), command), rest, positional=positional)
    elif command in ("soup", "inspect") and not any(a.startswith(_NEEDS_LIGHTNING) for a in rest):
        _call(getattr(import_module("lightning_soup.cli.files"), command), rest, positional=False)
    elif command in ("soup", "inspect", "resolution") or command in _LIGHTNING:
        import_module("lightning_soup.cli.soup_cli").SoupCLI([command, *rest])
    else:
        known = ", ".join(["soup", "inspect", "resolution", *_COMMANDS, *_LIGHTNING])
        sys.stderr.write(f"lightning-soup: unknown command {command!r}. Known: {known}.\n")
        raise SystemExit(2)


def _named(arguments: list[str], flag: str) -> list[str]:
    """Let the words before the first option be the values of a list option."""
    words = list(takewhile(lambda word: not word.startswith("-"), arguments))
    return [flag, *arguments] if words else arguments


def _one_list(arguments: list[str], flag: str) -> list[str]:
    """Let a list option take several words and be given several times.

    A shell makes several words of a bare pattern: ``--ingredients a.ckpt b.ckpt``. They end at the next option, which
    begins with a dash; a file that does is named ``./-x.ckpt``.
    """
    found, values, place, taking = [], [], None, False
    for word in arguments:
        if word == flag or word.startswith(f"{flag}="):
            place = len(found) if place is None else place
            taking = word == flag
            values += [] if taking else _listed(word.removeprefix(f"{flag}="))
        elif taking and (not word.startswith("-") or word == "-"):
            values += _listed(word)
        else:
            taking = False
            found.append(word)
    if place is not None:  # word by word: a name that is not UTF-8 cannot stand in a JSON list
        found[place:place] = [f"{flag}=[]", *(f"{flag}+={value}" for value in values)]
    return found


def _listed(word: str) -> list[str]:
    """The values in one word, which may be a list: ``[a.ckpt, b.ckpt]``."""
    if word.startswith("[") and word.endswith("]"):
        import yaml

        with suppress(yaml.YAMLError):
            found = yaml.safe_load(word)
            if isinstance(found, list) and all(isinstance(item, str) for item in found):
                return found
    return [word]


def _switch(arguments: list[str], flag: str) -> list[str]:
    """Let a yes-or-no option stand without its value."""
    return [
        f"{flag}=true" if word == flag and arguments[i + 1 : i + 2] not in (["true"], ["false"]) else word
        for i, word in enumerate(arguments)
    ]


def _call(function: Callable[..., object], arguments: list[str], *, positional: bool) -> None:
    from jsonargparse import auto_cli

    program = f"lightning-soup {function.__name__}"
    try:
        result = auto_cli(function, args=arguments, as_positional=positional, prog=program, allow_abbrev=False)
    except ValueError as error:  # jsonargparse wraps what a recipe says of its options
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, LightningSoupError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from error
    if getattr(result, "failed", None):  # a sweep that went on past failed runs, and has named them
        raise SystemExit(1)
