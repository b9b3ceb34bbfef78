"""One parameter of a sweep: W&B's distributions, what they take and how a value is drawn from each.

The reference for names, options and defaults is https://docs.wandb.ai/models/sweeps/sweep-config-keys.
"""

import difflib
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_soup.errors import UnsupportedSetup

__all__ = ["PARAMETER_KEYS", "Parameter", "read_parameter", "refuse_unknown"]


@dataclass(frozen=True)
class _Distribution:
    """The options a distribution takes (None: must be given), and how one value is drawn."""

    options: Mapping[str, Any]
    draw: Callable[[random.Random, Mapping[str, Any]], Any]


def _exp_between(rng: random.Random, low: float, high: float) -> float:
    """Draw X between low and high with log X uniform, without the last-digit overshoot of exp(log(high))."""
    return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)


_RANGE: Mapping[str, Any] = {"min": None, "max": None}
_MOMENTS: Mapping[str, Any] = {"mu": 0.0, "sigma": 1.0}

_CONTINUOUS = {
    "uniform": _Distribution(_RANGE, lambda rng, o: rng.uniform(o["min"], o["max"])),
    "log_uniform": _Distribution(_RANGE, lambda rng, o: math.exp(rng.uniform(o["min"], o["max"]))),
    "log_uniform_values": _Distribution(_RANGE, lambda rng, o: _exp_between(rng, o["min"], o["max"])),
    "normal": _Distribution(_MOMENTS, lambda rng, o: rng.gauss(o["mu"], o["sigma"])),
    "log_normal": _Distribution(_MOMENTS, lambda rng, o: math.exp(rng.gauss(o["mu"], o["sigma"]))),
    "beta": _Distribution({"a": 1, "b": 1}, lambda rng, o: rng.betavariate(o["a"], o["b"])),
}


def _quantized(distribution: _Distribution) -> _Distribution:
    """`round(X / q) * q`; an integer q (the default, 1) gives integers, which fit options of type int."""
    return _Distribution(
        {**distribution.options, "q": 1},
        lambda rng, o: round(distribution.draw(rng, o) / o["q"]) * o["q"],
    )


_DISTRIBUTIONS = {
    "constant": _Distribution({"value": None}, lambda rng, o: o["value"]),
    "categorical": _Distribution({"values": None}, lambda rng, o: rng.choice(o["values"])),
    "categorical_w_probabilities": _Distribution(
        {"values": None, "probabilities": None},
        lambda rng, o: rng.choices(o["values"], o["probabilities"])[0],
    ),
    "int_uniform": _Distribution(_RANGE, lambda rng, o: rng.randint(o["min"], o["max"])),
    **_CONTINUOUS,
    **{f"q_{name}": _quantized(distribution) for name, distribution in _CONTINUOUS.items()},
    # log(1/X) is uniform: between min and max; or between log(1/max) and log(1/min), as in log_uniform_values
    "inv_log_uniform": _Distribution(_RANGE, lambda rng, o: math.exp(-rng.uniform(o["min"], o["max"]))),
    "inv_log_uniform_values": _Distribution(_RANGE, lambda rng, o: _exp_between(rng, o["min"], o["max"])),
}

PARAMETER_KEYS = {"distribution"}.union(*(distribution.options for distribution in _DISTRIBUTIONS.values()))
_NUMBERS = {"min", "max", "mu", "sigma", "q", "a", "b"}
_LARGEST_EXPONENT = 700  # exp overflows from 710 on


@dataclass(frozen=True)
class Parameter:
    """A distribution of W&B's with its options, checked and complete."""

    distribution: str
    options: dict[str, Any]

    def draw(self, rng: random.Random) -> Any:
        """Draw one value."""
        return _DISTRIBUTIONS[self.distribution].draw(rng, self.options)

    def grid(self) -> list[Any] | None:
        """All values in order, or None where there is no finite list of them."""
        options = self.options
        if self.distribution == "constant":
            return [options["value"]]
        if self.distribution == "categorical":
            return list(options["values"])
        if self.distribution == "int_uniform":
            return list(range(options["min"], options["max"] + 1))
        if self.distribution == "q_uniform":  # as W&B does: from min in steps of q, max excluded
            steps = math.ceil((options["max"] - options["min"]) / options["q"])
            return [options["min"] + step * options["q"] for step in range(steps)]
        return None


def read_parameter(options: Mapping[str, Any], where: str) -> Parameter:
    """Check the options of one parameter and fill in W&B's defaults.

    Args:
        options: What the sweep file says, for example `{"min": 0.0, "max": 1.0}`.
        where: File and parameter, for error messages.

    Raises:
        UnsupportedSetup: An unknown distribution or option, one that is missing, or a value out of range.
    """
    for key in _NUMBERS & set(options):
        value = options[key]
        if isinstance(value, str):
            raise UnsupportedSetup(
                f"{where}: {key} is the text {value!r}. YAML reads an exponent as a number only after a "
                "decimal point and with a sign: 1.0e-3."
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UnsupportedSetup(f"{where}: {key} is {value!r}; expected a number.")
    name = options.get("distribution") or _implied_distribution(options, where)
    refuse_unknown([name], _DISTRIBUTIONS, f"{where}: there is no distribution")
    known = _DISTRIBUTIONS[name].options
    given = {key: value for key, value in options.items() if key != "distribution"}
    refuse_unknown(given, known, f"{where}: {name} takes no")
    if missing := [key for key, default in known.items() if default is None and key not in given]:
        raise UnsupportedSetup(f"{where}: {name} needs {' and '.join(missing)}.")
    parameter = Parameter(name, {**known, **given})
    _check_ranges(parameter, where)
    return parameter


def refuse_unknown(given: Iterable[Any], known: Iterable[str], complaint: str) -> None:
    """Raise `complaint` about the first key that is not known, with the known key closest to it.

    Raises:
        UnsupportedSetup: One of the given keys is not among the known.
    """
    known = sorted(known)
    for key in given:
        if key not in known:
            closest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"Did you mean {closest[0]!r}?" if closest else f"Known: {', '.join(known)}."
            raise UnsupportedSetup(f"{complaint} {key!r}. {hint}")


def _implied_distribution(options: Mapping[str, Any], where: str) -> str:
    """W&B's rule for parameters that name no distribution."""
    if "value" in options:
        return "constant"
    if "values" in options:
        return "categorical_w_probabilities" if "probabilities" in options else "categorical"
    if {"min", "max"} <= set(options):
        whole = isinstance(options["min"], int) and isinstance(options["max"], int)
        return "int_uniform" if whole else "uniform"
    raise UnsupportedSetup(f"{where}: expected value, values, min and max, or a distribution with its options.")


def _check_ranges(parameter: Parameter, where: str) -> None:
    name, options = parameter.distribution, parameter.options

    def require(holds: bool, expected: str) -> None:
        if not holds:
            given = ", ".join(f"{key}: {value!r}" for key, value in options.items())
            raise UnsupportedSetup(f"{where}: {name} got {given}; expected {expected}.")

    if "values" in options:
        require(isinstance(options["values"], list) and bool(options["values"]), "a list with at least one value")
    if "probabilities" in options:
        weights = options["probabilities"]
        require(
            isinstance(weights, list)
            and len(weights) == len(options["values"])
            and all(isinstance(weight, int | float) and weight >= 0 for weight in weights)
            and math.isclose(sum(weights), 1, abs_tol=1e-6),
            "one probability for each of the values, adding up to 1",
        )
    if "min" in options:
        low, high = options["min"], options["max"]
        require(low < high, "min below max")
        if name == "int_uniform":
            require(isinstance(low, int) and isinstance(high, int), "whole numbers; uniform draws real ones")
        if name.endswith("_values"):
            require(low > 0, "min above 0")
        elif "log" in name:
            in_reach = max(abs(low), abs(high)) < _LARGEST_EXPONENT
            require(in_reach, "exponents of e; log_uniform_values takes the values themselves")
    if "mu" in options and "log" in name:
        require(abs(options["mu"]) < _LARGEST_EXPONENT, "mu to be the mean of log X")
    require(options.get("q", 1) > 0, "q above 0")
    require(options.get("sigma", 0) >= 0, "sigma not below 0")
    require(min(options.get("a", 1), options.get("b", 1)) > 0, "a and b above 0")
