"""Progress of long work: one callable shape for the whole package, and its rich implementation."""

import sys
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps an iterable and shows how far its consumer has come."""

    def __call__(self, items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        """Return an iterable over the same items; ``total`` is their number where it is not ``len(items)``."""
        ...


def silent(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Show nothing."""
    return items


def rich_progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Show a rich progress bar on a terminal's standard error, which disappears when done; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import track

    console = Console(file=sys.stderr)
    hidden = not (console.is_terminal or console.is_jupyter)
    yield from track(items, description=description, total=total, console=console, transient=True, disable=hidden)


def progress_lines(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Write a line after each item to standard error: progress beside another bar that is on the screen."""
    for number, item in enumerate(items, 1):
        print(f"{description}: {number} of {total} done", file=sys.stderr, flush=True)
        yield item
