"""The ``lightning-soup`` command: which part of the package answers, and how errors reach the terminal."""

import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from lightning_soup.errors import LightningSoupError

_HELP = """\
usage: lightning-soup COMMAND [options]        (lightning-soup COMMAND --help explains one)

  soup      cook a soup from checkpoints: from files alone, or with --config/--model/--data by validation
  sweep     train one ingredient per setting of a W&B sweep file, then cook them if asked
  show      what a checkpoint or soup holds, and how it was cooked
  recook    cook a soup again from its provenance
  demo      the whole way on real data: pre-train, fine-tune eight ingredients, cook, report
  fit, validate, test, predict
            LightningCLI for any LightningModule and LightningDataModule

  --debug   show the traceback of an error
"""
_COMMANDS = {
    "show": "lightning_soup.cli.files",
    "recook": "lightning_soup.cli.files",
    "sweep": "lightning_soup.cli.sweep",
    "demo": "lightning_soup.cli.demo",
}
_LIGHTNING = ("fit", "validate", "test", "predict")
_NEEDS_LIGHTNING = ("--config", "-c", "--model", "--data", "--trainer", "--help", "-h", "--print_config")


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; an error of the package is one message and exit status 1, a wrong option exit status 2."""
    arguments = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_HELP)
        return
    try:
        _run(arguments[0], arguments[1:])
    except LightningSoupError as error:
        if debug:
            raise
        sys.stderr.write(f"lightning-soup: {error}\n")
        raise SystemExit(1) from None
    except SystemExit as stop:
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, which would otherwise end as a success
            raise SystemExit(143) from None
        raise
    except KeyboardInterrupt:
        if debug:
            raise
        sys.stderr.write("lightning-soup: interrupted; nothing half-written was left.\n")
        raise SystemExit(130) from None


def _run(command: str, arguments: list[str]) -> None:
    if command == "soup":
        arguments = _one_list(arguments, "--ingredients")
    if command in _COMMANDS:
        _call(getattr(import_module(_COMMANDS[command]), command), arguments, positional=True)
    elif command == "soup" and not any(a.startswith(_NEEDS_LIGHTNING) for a in arguments):
        _call(import_module("lightning_soup.cli.files").soup, arguments, positional=False)
    elif command == "soup" or command in _LIGHTNING:
        import_module("lightning_soup.cli.soup_cli").SoupCLI([command, *arguments])
    else:
        known = ", ".join(["soup", *_COMMANDS, *_LIGHTNING])
        sys.stderr.write(f"lightning-soup: unknown command {command!r}. Known: {known}.\n")
        raise SystemExit(2)


def _one_list(arguments: list[str], flag: str) -> list[str]:
    """Let a list option take several words, ``--ingredients a.ckpt b.ckpt``: a shell makes them of a bare pattern."""
    found = []
    words = iter(arguments)
    for word in words:
        if word != flag:
            found.append(word)
            continue
        values = []
        for word in words:
            if word.startswith("--"):
                found.append(f"{flag}={json.dumps(values, ensure_ascii=False)}")
                found.append(word)
                break
            values.append(word)
        else:
            found.append(f"{flag}={json.dumps(values, ensure_ascii=False)}")
    return found


def _call(function: Callable[..., object], arguments: list[str], *, positional: bool) -> None:
    from jsonargparse import auto_cli

    program = f"lightning-soup {function.__name__}"
    result = auto_cli(function, args=arguments, as_positional=positional, prog=program, allow_abbrev=False)
    if getattr(result, "failed", None):  # a sweep that went on past failed runs, and has named them
        raise SystemExit(1)
