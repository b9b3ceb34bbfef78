"""What the record in a soup's file must hold, so that those who read it need not look twice."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_soup.errors import UnreadableCheckpoint


def check_record(record: Mapping[str, Any], where: object) -> None:
    """Check the provenance of a soup. A record without ingredients is somebody's own, and may be anything.

    Args:
        record: The record.
        where: The file, for messages.

    Raises:
        UnreadableCheckpoint: An entry is missing or of another type.
    """
    if "ingredients" not in record:
        return
    problem = _mapping(record, _RECORD) or _lengths(record)
    if problem:
        raise UnreadableCheckpoint(
            f"{where}: its provenance is damaged: {problem}. The file was changed after it was cooked; take another "
            "copy of it. The weights themselves can be saved without the record: lightning_soup.save_weights(old, new)."
        )


Check = Callable[[Any], str]  # says what is wrong, nothing where all is well


def _is(kinds: type | tuple[type, ...], expected: str) -> Check:
    def check(value: Any) -> str:
        fits = isinstance(value, kinds) and (not isinstance(value, bool) or kinds is bool)
        return "" if fits else f"is {_short(value)}, expected {expected}"

    return check


def _optional(check: Check) -> Check:
    return lambda value: "" if value is None else check(value)


def _one_of(*words: Any) -> Check:
    return lambda value: "" if value in words else f"is {_short(value)}, expected one of {', '.join(map(str, words))}"


def _list_of(check: Check) -> Check:
    def check_all(value: Any) -> str:
        if not isinstance(value, list):
            return f"is {_short(value)}, expected a list"
        return next((f"entry {i + 1} {wrong}" for i, item in enumerate(value) if (wrong := check(item))), "")

    return check_all


def _dict_of(check: Check) -> Check:
    def check_all(value: Any) -> str:
        if not isinstance(value, dict):
            return f"is {_short(value)}, expected a mapping"
        return next((f"entry {_short(key)} {wrong}" for key, item in value.items() if (wrong := check(item))), "")

    return check_all


def _fields(fields: Mapping[str, Check]) -> Check:
    def check(value: Any) -> str:
        return _mapping(value, fields) if isinstance(value, dict) else f"is {_short(value)}, expected a mapping"

    return check


def _mapping(value: Mapping[str, Any], fields: Mapping[str, Check]) -> str:
    for name, check in fields.items():
        wrong = check(value[name]) if name in value else "is missing"
        if wrong:
            return f"{name!r} {wrong}"
    return ""


def _coefficients(value: Any) -> str:
    return (_dict_of(_numbers) if isinstance(value, dict) else _numbers)(value)


def _lengths(record: Mapping[str, Any]) -> str:
    count, coefficients = len(record["ingredients"]), record["coefficients"]
    rows = coefficients if isinstance(coefficients, dict) else {"coefficients": coefficients}
    for name, row in {"shares": record["shares"], **rows}.items():
        if len(row) != count:
            return f"{name!r} has {len(row)} numbers for {count} ingredients"
    return "" if count else "'ingredients' is empty"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


_text, _number = _is(str, "a string"), _is((int, float), "a number")
_numbers = _list_of(_number)
_INGREDIENT = {
    "label": _text,
    "digest": _text,
    "source": _optional(_text),
    "metrics": _dict_of(_number),
}
_TRIAL = {"label": _text, "kept": _one_of(True, False, None), "reason": _text}
_RECORD = {
    "recipe": _text,
    "coefficients": _coefficients,
    "shares": _numbers,
    "accumulate": _one_of("float32", "float64"),
    "ingredients": _list_of(_fields(_INGREDIENT)),
    "metric": _optional(_text),
    "mode": _one_of("min", "max"),
    "score": _optional(_number),
    "history": _list_of(_fields(_TRIAL)),
    "notes": _list_of(_text),
}
