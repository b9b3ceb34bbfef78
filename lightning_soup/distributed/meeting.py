"""Who takes part in an exchange, agreed upon through the store before anything is sent.

A transfer that is given up closes the connection for good, and its peer then sees a failure instead of a late answer.
So those that want to exchange meet first, and only they send.
"""

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

__all__ = ["Meeting"]

_FIRST_WAIT, _LONGEST_WAIT = 0.0005, 0.02  # seconds between looks


class Meeting:
    """A list of those that have come, which all of them see alike once it is closed.

    It is closed when all are there, or by the first one whose patience ends. Who comes later finds it closed, and is
    alone. The list is only ever changed by compare-and-set, so all see one order of events.

    Making a meeting says that this rank is there; :meth:`wait` waits for the others. So a rank that has several says so
    in all of them before it waits in one.

    Args:
        store: A ``torch.distributed.Store``.
        key: Of this meeting; another one for each.
        rank: This rank.
        members: Ranks that are expected, this one among them.
    """

    def __init__(self, store: Any, key: str, rank: int, members: Sequence[int]) -> None:
        self._store, self._key, self._rank, self._members = store, key, rank, tuple(members)
        kind = "open" if len(members) > 1 else "closed"
        self._read(store.compare_set(key, "", f"{kind}|{rank}"))
        while rank not in self._present and self._open:
            self._change([*self._present, rank])

    def wait(
        self, deadline: float, gone: Callable[[Collection[int]], Collection[int]] = lambda absent: ()
    ) -> list[int]:
        """Those that came, this rank among them, in order; nobody, if this rank came too late.

        Args:
            deadline: When patience ends, as ``time.monotonic()`` counts.
            gone: Of some ranks, those that are known not to come.
        """
        pause = _FIRST_WAIT
        while self._open:
            absent = [member for member in self._members if member not in self._present]
            if time.monotonic() >= deadline or set(absent) <= set(gone(absent)):
                self._change(self._present, close=True)
                continue
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_WAIT)
            self._read(self._store.get(self._key))
        return self._present if self._rank in self._present else []

    def _change(self, present: Collection[int], close: bool = False) -> None:
        kind = "closed" if close or len(present) == len(self._members) else "open"
        wanted = f"{kind}|{','.join(map(str, sorted(present)))}"
        self._read(self._store.compare_set(self._key, self._text, wanted))

    def _read(self, value: bytes) -> None:
        self._text = value.decode()
        kind, _, ranks = self._text.partition("|")
        self._open, self._present = kind == "open", [int(rank) for rank in ranks.split(",")]
