"""Unpickling without running anything from the file.

A pickle can name any class or function of the interpreter. Here a name is looked up in a small table of
builders that make plain containers and tensor records; every other name becomes an inert
:class:`Placeholder`. So a malicious file opens as a lump of placeholders, and a Lightning checkpoint full of
foreign hyperparameter objects opens as usual.

The interpreter's own unpickler does the work, since it is ten times faster than one in Python, but it
believes the sizes that the stream names and allocates them. So each stream is walked first
(:func:`pickle_end`).
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

Builders = Mapping[tuple[str, str], Any]


class Placeholder(dict):
    """Stands for an object of a class that is not opened. Holds what the pickle puts into it."""

    name = "object of an unknown type"
    state: dict[str, Any] = {}  # noqa: RUF012 - replaced, never filled

    def __new__(cls, *args: object, **kwargs: object) -> "Placeholder":
        """Make one, whatever the arguments are."""
        return dict.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Keep the attributes that the pickle gives."""
        if isinstance(state, dict):
            self.state = state

    def append(self, item: object) -> None:
        """Accept a list item and drop it."""

    def extend(self, items: object) -> None:
        """Accept list items and drop them."""

    add = append

    def __call__(self, *args: object, **kwargs: object) -> "Placeholder":
        """Do nothing: the object may stand for a function."""
        return self

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __repr__(self) -> str:
        return f"<{self.name}>"


class StatefulDict(dict):
    """An ``OrderedDict`` of the file. ``state`` holds its attributes: a state dict's ``_metadata``."""

    state: dict[str, Any] = {}  # noqa: RUF012 - replaced, never filled

    def __setstate__(self, state: object) -> None:
        """Keep the attributes that the pickle gives."""
        if isinstance(state, dict):
            self.state = state


class Sealed:
    """Base of what builder tables hold and make: a pickle may ask to set attributes of any object it met."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Refuse."""
        raise pickle.UnpicklingError(f"the file tries to change a {type(self).__name__}")


class Builder(Sealed):
    """A function that a pickle may call."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, builders: Builders, persistent: Callable[[Any], Any]) -> None:
        super().__init__(stream, encoding="utf-8", errors="replace")
        self._builders, self._persistent = builders, persistent

    def find_class(self, module: str, name: str) -> Any:
        known = self._builders.get((module, name))
        return type("Placeholder", (Placeholder,), {"name": f"{module}.{name}"}) if known is None else known

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)


def load_inert(data: bytes | bytearray, builders: Builders, persistent: Callable[[Any], Any]) -> Any:
    """Unpickle into containers, plain values, what ``builders`` make, and :class:`Placeholder` objects.

    Args:
        data: One pickle, walked by :func:`pickle_end` before.
        builders: By module and name, the objects that the pickle may use.
        persistent: Resolves persistent identifiers.
    """
    return _InertUnpickler(io.BytesIO(data), builders, persistent).load()


_LINE, _TWO_LINES, _BIG_INDEX, _TEXT_INDEX = -1, -10, -11, -12
_SIZE_FIELDS = {  # pickletools' codes for 'the size is in the stream', and the bytes of that field
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _widths() -> list[int | None]:
    """By opcode: the bytes of its argument, or a negative code for arguments whose size is in the stream."""
    table: list[int | None] = [None] * 256
    for opcode in pickletools.opcodes:
        table[ord(opcode.code)] = 0 if opcode.arg is None else opcode.arg.n
    for name, code in (("c", _TWO_LINES), ("i", _TWO_LINES), ("r", _BIG_INDEX), ("p", _TEXT_INDEX)):
        table[ord(name)] = code
    return table


_WIDTHS = _widths()
_STOP = ord(pickle.STOP)


def pickle_end(data: Any, start: int = 0) -> int:
    """Walk a pickle and find where it ends, so that none of its sizes can lead to a huge allocation.

    Args:
        data: Bytes, or anything that is indexed like bytes and has ``find`` (a memory map).
        start: Where the pickle begins.

    Raises:
        pickle.UnpicklingError: A size or a memo index that cannot be true, an unknown opcode, or no end.
    """
    position, end = start, len(data)
    while position < end:
        code = data[position]
        width = _WIDTHS[code]
        position += 1
        if width is None:
            raise pickle.UnpicklingError(f"unknown opcode {code:#x} at byte {position - 1}")
        if width >= 0:
            if code == _STOP:
                return position
            position += width
        elif width in _SIZE_FIELDS:
            field = _SIZE_FIELDS[width]
            position += field + int.from_bytes(data[position : position + field], "little")
        elif width == _BIG_INDEX:
            # The memo is an array as long as its largest index; true ones number the objects of the stream.
            if int.from_bytes(data[position : position + 4], "little") > position - start:
                raise pickle.UnpicklingError(f"a memo index out of range at byte {position - 1}")
            position += 4
        else:
            line, position = position, _after_newline(data, position)
            if width == _TWO_LINES:
                position = _after_newline(data, position)
            elif width == _TEXT_INDEX and int(data[line : position - 1]) > line - start:
                raise pickle.UnpicklingError(f"a memo index out of range at byte {line - 1}")
    raise pickle.UnpicklingError("pickle data was truncated")


def _after_newline(data: Any, position: int) -> int:
    found = data.find(b"\n", position)
    if found < 0:
        raise pickle.UnpicklingError("pickle data was truncated")
    return found + 1
