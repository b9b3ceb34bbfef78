"""What benchmarks have in common: methods in turn, ratios within rounds, memory at its peak."""

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Work = Callable[[], object]


def in_turn(
    work: Mapping[str, Work],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each in each round, after a round to warm up; the order is turned round every time.

    Args:
        work: What to measure, by name.
        rounds: How many count.
        clock: CPU time of the process, which other load moves least, or wall time.
        before: Done before each, and not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name in list(work)[:: 1 if number % 2 else -1]:
            before()
            begin = clock()
            work[name]()
            found[name].append(clock() - begin)
    return {name: seconds[1:] for name, seconds in found.items()}


def ratios(seconds: Sequence[float], base: Sequence[float]) -> list[float]:
    """Within each round."""
    return [one / other for one, other in zip(seconds, base, strict=True)]


def median_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Of the ratios within the rounds."""
    return statistics.median(ratios(seconds, base))


def print_ratios(
    title: str, work: Mapping[str, Work], rounds: int, before: Callable[[], object] = lambda: None
) -> None:
    """Cost of each in CPU time, in units of the first."""
    print(f"\n{title}")
    times = in_turn(work, rounds, before=before)
    for name, seconds in times.items():
        print(f"  {name:48} {median_ratio(seconds, times[next(iter(work))]):6.2f} x")


def measures_memory() -> bool:
    """Whether :func:`extra_memory` works: on Linux."""
    return Path("/proc/self/status").exists()


def extra_memory(work: Work) -> float:
    """MiB of anonymous memory that some work takes at its peak beyond what there was; in a process of its own."""
    done, before = threading.Event(), _anonymous()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return (max(peak, _anonymous()) - before) / 1024


def _anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0])
