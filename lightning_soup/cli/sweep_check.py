"""Checking a sweep against its base config before any training starts."""

import difflib
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, capture_parser

from lightning_soup.cli.soup_cli import SoupCLI
from lightning_soup.cli.sweep_training import flags
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.sweep_file import read_yaml

__all__ = ["check_settings"]


def check_settings(base: Path, sweep_file: Path, settings: Sequence[Mapping[str, Any]]) -> list[Namespace]:
    """Parse every setting as `lightning-soup fit` would, without building anything.

    Args:
        base: Config file of every run.
        sweep_file: Where the settings come from, for messages.
        settings: Values by dotted name.

    Returns:
        The parsed config of each setting.

    Raises:
        UnsupportedSetup: The base config is missing or wrong, a parameter of the sweep is none of its
            options, a value has the wrong type, or the config asks for what a sweep cannot do.
    """
    for name in read_yaml(base, "config for `lightning-soup fit`"):
        if not isinstance(name, str):
            raise UnsupportedSetup(f"{base}: has the key {name!r}; expected model, data, trainer and the like.")
    for setting in settings:
        _refuse_doubles(sweep_file, setting)
    parser = capture_parser(lambda: SoupCLI(["fit"], exit_on_error=False))
    parsed = []
    for setting in settings:
        try:
            parsed.append(_parse(parser, base, setting))
        except (ArgumentError, SystemExit) as error:
            raise UnsupportedSetup(_explain(parser, base, sweep_file, setting, error)) from None
        _refuse_what_sweeps_cannot(base, parsed[-1])
    _warn_of_several_splits(sweep_file, settings)
    return parsed


def _parse(parser: ArgumentParser, base: Path, setting: Mapping[str, Any]) -> Namespace:
    return parser.parse_args(["fit", "--config", str(base), *flags(setting)]).fit


def _explain(
    parser: ArgumentParser,
    base: Path,
    sweep_file: Path,
    setting: Mapping[str, Any],
    error: ArgumentError | SystemExit,
) -> str:
    """Find the parameters that are to blame, by trying each alone."""
    try:
        options = _options(_parse(parser, base, {}))
    except (ArgumentError, SystemExit):
        return f"{base}: not a config for `lightning-soup fit`: {_reason(error)}"
    problems = []
    for name, value in setting.items():
        try:
            _parse(parser, base, {name: value})
        except (ArgumentError, SystemExit) as reason:
            if _plain(name) in options:
                problems.append(f"{name} does not take {value!r}: {_reason(reason)}")
            else:
                problems.append(f"there is no option {name} in {base}. {_closest(_plain(name), options)}")
    return f"{sweep_file}: {'; '.join(problems or [_reason(error)])}"


def _closest(name: str, options: Sequence[str]) -> str:
    leaves = [option for option in options if not any(other.startswith(f"{option}.") for other in options)]
    matches = difflib.get_close_matches(name, leaves, n=3, cutoff=0.5)
    return f"Did you mean {', '.join(matches)}?" if matches else f"Options: {', '.join(leaves)}."


def _options(config: Namespace) -> list[str]:
    """The dotted names of all options of a parsed config, without `init_args`."""
    names: dict[str, None] = {}

    def walk(node: Any, above: tuple[str, ...]) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            here = above if key == "init_args" else (*above, key)
            names[".".join(here)] = None
            walk(value, here)

    walk(config.as_dict(), ())
    return [name for name in names if name != "config"]


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "init_args")


def _reason(error: ArgumentError | SystemExit) -> str:
    """The telling lines of a parser's message, which repeats every type that was tried."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    telling = ("Expected", "Option", "Validation failed", "Not a valid subclass", "Import")
    found = [line for line in lines if line.startswith(telling) and "NoneType" not in line]
    return "; ".join(dict.fromkeys(found)) or " ".join(str(error).split())


def _refuse_doubles(sweep_file: Path, setting: Mapping[str, Any]) -> None:
    names: dict[str, str] = {}
    for name in setting:
        if (other := names.setdefault(_plain(name), name)) != name:
            raise UnsupportedSetup(f"{sweep_file}: {other} and {name} are the same option; keep one of them.")


def _refuse_what_sweeps_cannot(base: Path, config: Namespace) -> None:
    trainer, devices = config.trainer, config.trainer.devices
    if config.get("ckpt_path"):
        raise UnsupportedSetup(
            f"{base}: has ckpt_path: {config.ckpt_path}. The hyperparameters in that file would win over those of the "
            "runs. To start from trained weights, use an option of the model (checkpoint_path)."
        )
    for option in ("fast_dev_run", "barebones"):
        if trainer[option]:
            raise UnsupportedSetup(f"{base}: trainer.{option} saves no checkpoint, so nothing is left of a training.")
    one_device = devices in ("auto", "1", 1) or (isinstance(devices, list) and len(devices) == 1)
    if not one_device or trainer.num_nodes != 1:
        # Lightning starts the other ranks by running the command again: each would start the sweep anew.
        raise UnsupportedSetup(
            f"{base}: has trainer.devices: {devices} and num_nodes: {trainer.num_nodes}, but each of several trainings "
            "runs on one device. Set devices: 1; a sweep over several takes `wandb sweep`, then `lightning-soup soup`."
        )


def _leaves(setting: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a setting by dotted name, also where one sets several options at once."""
    for name, value in setting.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _warn_of_several_splits(sweep_file: Path, settings: Sequence[Mapping[str, Any]]) -> None:
    """Warn of seeds of the data module that take several values in a sweep."""
    values: dict[str, set[str]] = {}
    for setting in settings:
        for name, value in _leaves(setting):
            above, _, last = name.rpartition(".")
            if above.split(".")[0] == "data" and (last == "seed" or last.endswith("_seed")):
                values.setdefault(name, set()).add(repr(value))
    varied = [name for name, found in values.items() if len(found) > 1]
    if varied:
        warnings.warn(
            f"{sweep_file}: gives the data other seeds in other runs ({', '.join(varied)}). If such a seed splits "
            "training from validation data, what one ingredient is validated on, another was trained on, and the "
            "scores of a soup come out too high. Keep the seed of the split the same in all runs; runs differ by "
            "seed_everything as it is.",
            stacklevel=3,
        )
