"""Sweep files: the settings that a W&B sweep file asks for, listed without a server.

The format is the one `wandb sweep FILE` reads, so one file serves a laptop and a cluster. The reference is
https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.sweep_parameter import PARAMETER_KEYS, Parameter, read_parameter, refuse_unknown

__all__ = ["SweepFile", "read_sweep_file", "read_yaml"]

_USED_KEYS = {"method", "name", "parameters", "run_cap"}
_AGENT_KEYS = {  # for W&B's server and agent, which check them; without effect here
    "apiVersion",
    "command",
    "controller",
    "description",
    "early_terminate",
    "entity",
    "image_uri",
    "job",
    "kind",
    "metric",
    "metrics",
    "program",
    "project",
    "scheduler",
}


@dataclass(frozen=True)
class SweepFile:
    """A checked sweep file; nested parameters are flattened to dotted names (`model.lr`)."""

    path: Path
    name: str
    method: Literal["grid", "random"]
    run_cap: int | None
    parameters: dict[str, Parameter]
    metric: str | None = None
    goal: Literal["minimize", "maximize"] = "minimize"

    def settings(self, seed: int = 0) -> list[dict[str, Any]]:
        """List the settings to train, each a mapping from dotted name to value.

        A grid takes the parameters in the order of the file, the last one changing fastest, and stops at
        `run_cap`. A random search draws each value from a stream of its own, made of the seed, the number
        of the setting and the parameter's name: a larger `run_cap` continues the same list, and a parameter
        added later leaves the values of the others as they were.

        Args:
            seed: Seed of the random search; a grid does not use it.
        """
        if self.method == "grid":
            values = [parameter.grid() or [] for parameter in self.parameters.values()]
            combinations = itertools.islice(itertools.product(*values), self.run_cap)
            return [dict(zip(self.parameters, combination, strict=True)) for combination in combinations]
        return [
            {
                name: parameter.draw(random.Random(f"{seed}/{index}/{name}"))
                for name, parameter in self.parameters.items()
            }
            for index in range(self.run_cap or 0)
        ]


def read_sweep_file(path: str | Path) -> SweepFile:
    """Read and check a W&B sweep file.

    Keys that only W&B's server and agent use (program, command, project, early_terminate, ...) are accepted
    and have no effect here.

    Args:
        path: A YAML file with `method: grid|random`, `parameters:` and, for a random search, `run_cap:`.

    Raises:
        UnsupportedSetup: The file is missing or no sweep file, or asks for what only W&B's server can do.
    """
    path = Path(path)
    config = read_yaml(path, "sweep file")
    refuse_unknown(config, _USED_KEYS | _AGENT_KEYS, f"{path}: sweep files have no key")
    method, run_cap = config.get("method"), config.get("run_cap")
    if method in ("bayes", "custom"):
        raise UnsupportedSetup(
            f"{path}: method: {method} picks settings from earlier results on W&B's server. Run this file "
            "with `wandb sweep`, or set method: random and a run_cap to train here."
        )
    if method not in ("grid", "random"):
        raise UnsupportedSetup(f"{path}: method is {method!r}; expected method: grid or method: random.")
    if run_cap is not None and (not isinstance(run_cap, int) or isinstance(run_cap, bool) or run_cap < 1):
        raise UnsupportedSetup(f"{path}: run_cap is {run_cap!r}; expected a whole number from 1 on.")
    if method == "random" and run_cap is None:
        raise UnsupportedSetup(f"{path}: a random search has no end; add the number of runs, e.g. run_cap: 8.")
    parameters = _flatten(config.get("parameters"), f"{path}: parameters", "")
    if method == "grid":
        for name, parameter in parameters.items():
            if parameter.grid() is None:
                raise UnsupportedSetup(
                    f"{path}: parameters.{name}: a grid cannot list the values of {parameter.distribution}. "
                    "Give values: [...], value:, whole min and max, or q_uniform; or set method: random."
                )
    metric = config.get("metric") or {}
    if not isinstance(metric, dict) or metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise UnsupportedSetup(f"{path}: metric is {metric!r}; expected metric: {{name: val_acc, goal: maximize}}.")
    goal = metric.get("goal", "minimize")  # which is what W&B takes it for
    return SweepFile(path, str(config.get("name") or path.stem), method, run_cap, parameters, metric.get("name"), goal)


def read_yaml(path: Path, kind: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.
        kind: What it is, for messages.

    Raises:
        UnsupportedSetup: It is missing, unreadable, or something else.
    """
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise UnsupportedSetup(f"{path}: no such {kind}.") from None
    except UnicodeDecodeError as error:
        raise UnsupportedSetup(f"{path}: cannot be read as a {kind}: not UTF-8 ({error}). Save it as UTF-8.") from error
    except OSError as error:
        raise UnsupportedSetup(f"{path}: cannot be read as a {kind}: {error.strerror or error}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UnsupportedSetup(f"{path}: not a {kind}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        found = "nothing" if config is None else f"a {type(config).__name__}"
        raise UnsupportedSetup(f"{path}: not a {kind}: expected a mapping from names to values; found {found}.")
    return config


class _UniqueKeys(yaml.SafeLoader):
    """Of two equal keys YAML's loader silently keeps the last: one of two tasks of a name would be lost."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys.count((key.tag, key.value)) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
        super().flatten_mapping(node)


def _flatten(block: Any, where: str, prefix: str) -> dict[str, Parameter]:
    """Read `parameters:` and the blocks nested in it."""
    if not isinstance(block, dict) or not block:
        raise UnsupportedSetup(f"{where}: expected parameters, for example model.lr: {{values: [0.1, 0.01]}}.")
    found: dict[str, Parameter] = {}
    for key, options in block.items():
        name, here = f"{prefix}{key}", f"{where}.{key}"
        if not isinstance(options, dict):
            raise UnsupportedSetup(f"{here}: expected a mapping such as {{value: {options!r}}}.")
        refuse_unknown(options, PARAMETER_KEYS | {"parameters"}, f"{here}: parameters have no key")
        if "parameters" not in options:
            inner = {name: read_parameter(options, here)}
        elif len(options) == 1:
            inner = _flatten(options["parameters"], here, f"{name}.")
        else:
            others = ", ".join(sorted(set(options) - {"parameters"}))
            raise UnsupportedSetup(f"{here}: holds nested parameters and also {others}; keep one of them.")
        if twice := sorted(set(inner) & set(found)):
            raise UnsupportedSetup(f"{where}: {twice[0]} is given twice, dotted and nested; keep one of them.")
        found.update(inner)
    return found
