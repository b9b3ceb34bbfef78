"""The coefficients of a combination: one number per checkpoint, or a row of numbers per tensor."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from lightning_soup.errors import RecipeError

Coefficients = Sequence[float] | Mapping[str, Sequence[float]]
Row = tuple[float, ...]


def coefficient_rows(names: Iterable[str], coefficients: Coefficients, count: int) -> dict[str, Row]:
    """Give every tensor its row of coefficients.

    Args:
        names: Tensor names.
        coefficients: ``count`` numbers, or a mapping from tensor names or patterns (``"blocks.3.*"``,
            ``"*"``) to rows of ``count`` numbers. A tensor takes the row under its exact name, else that of
            the first pattern that matches.
        count: Number of checkpoints.

    Raises:
        RecipeError: A wrong number of coefficients, one that is not finite, a tensor without a row, or a row
            (but for the one under ``"*"``) without a tensor.

    Example:
        >>> coefficient_rows(["head.weight", "body.weight"], {"head.*": [0, 1], "*": [0.5, 0.5]}, 2)
        {'head.weight': (0.0, 1.0), 'body.weight': (0.5, 0.5)}
    """
    names = list(names)
    if not isinstance(coefficients, Mapping):
        return dict.fromkeys(names, _row("the coefficients", coefficients, count))
    rows = {pattern: _row(f"the coefficients of {pattern!r}", row, count) for pattern, row in coefficients.items()}
    patterns = [pattern for pattern in rows if any(mark in pattern for mark in "*?[")]
    exact = set(names)
    idle = [
        key
        for key in rows
        if key != "*" and key not in exact and not (key in patterns and any(fnmatchcase(n, key) for n in names))
    ]
    if idle:
        raise RecipeError(f"coefficients for {idle[0]!r}, but no tensor has that name. Tensors: {_some(names)}.")
    found = {}
    for name in names:
        key = name if name in rows else next((p for p in patterns if fnmatchcase(name, p)), None)
        if key is None:
            raise RecipeError(
                f"no coefficients for tensor {name!r}. Name it, or add a pattern that matches it ('*' matches all)."
            )
        found[name] = rows[key]
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _row(what: str, row: Sequence[float], count: int) -> Row:
    try:
        values = tuple(float(value) for value in row)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{what}: expected {count} numbers, got {row!r}.") from error
    if len(values) != count:
        raise RecipeError(f"{what}: got {len(values)} numbers for {count} checkpoints.")
    if not all(math.isfinite(value) for value in values):
        raise RecipeError(f"{what}: {values} holds a number that is not finite.")
    if not any(values):
        raise RecipeError(f"{what} are all zero: nothing would be left of the weights.")
    return values
