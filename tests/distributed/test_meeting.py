"""Who takes part in an exchange: all see one list, whatever the order of events."""

import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from lightning_soup.distributed.meeting import Meeting
from lightning_soup.distributed.ranks import _KEY, Ranks, _World


def together(store: dist.Store, members: list[int], delays: dict[int, float], patience: float) -> dict[int, list[int]]:
    """Let ranks come after some seconds each, in threads."""
    found: dict[int, list[int]] = {}

    def come(rank: int, delay: float) -> None:
        time.sleep(delay)
        found[rank] = Meeting(store, "key", rank, members).wait(time.monotonic() + patience)

    threads = [threading.Thread(target=come, args=item) for item in delays.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def test_all_come(store: dist.Store) -> None:
    found = together(store, [0, 1, 2, 3], {3: 0.0, 1: 0.02, 0: 0.01, 2: 0.05}, 10.0)
    assert found == {rank: [0, 1, 2, 3] for rank in range(4)}


def test_one_that_comes_too_late_meets_nobody(store: dist.Store) -> None:
    assert together(store, [0, 1, 2], {0: 0.0, 2: 0.01, 1: 1.0}, 0.2) == {0: [0, 2], 2: [0, 2], 1: []}


def test_nobody_waits_for_one_that_is_gone(store: dist.Store) -> None:
    begun = time.monotonic()
    meeting = Meeting(store, "key", 0, [0, 1])
    assert meeting.wait(begun + 60, gone=lambda absent: absent) == [0]
    assert time.monotonic() - begun < 5


def test_a_pair_whose_other_half_came_first_is_closed_at_once(store: dist.Store) -> None:
    first, second = Meeting(store, "key", 4, [2, 4]), Meeting(store, "key", 2, [2, 4])
    past = time.monotonic() - 1
    assert first.wait(past) == second.wait(past) == [2, 4]


def test_a_group_of_one_meets_nobody(store: dist.Store) -> None:
    assert Meeting(store, "key", 3, [3]).wait(time.monotonic() + 60) == [3]


@pytest.mark.parametrize("patience", [0.0, 0.001])
def test_all_that_are_in_a_list_see_the_same_list(patience: float) -> None:
    for _ in range(30):
        found = together(dist.HashStore(), [0, 1, 2, 3, 4], dict.fromkeys(range(5), 0.0), patience)
        lists = {rank: tuple(present) for rank, present in found.items()}
        together_ = [present for present in lists.values() if len(present) > 1]
        assert len(set(together_)) <= 1
        assert all(not present or rank in present for rank, present in lists.items())
        for present in together_:
            assert all(lists[rank] == present for rank in present)


def _through_tcp(work: Callable[[dist.Store], None]) -> None:
    work(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))


def test_the_store_of_a_process_group_works_alike() -> None:
    def work(store: dist.Store) -> None:
        assert together(store, [0, 1], {0: 0.0, 1: 0.01}, 10.0) == {0: [0, 1], 1: [0, 1]}

    _through_tcp(work)


def test_keys_of_meetings_that_are_over_are_taken_away() -> None:
    store = dist.HashStore()
    both = [Ranks(rank, 2, timeout=20, patience=5) for rank in range(2)]

    def run(ranks: Ranks) -> None:
        for number in range(3):
            assert ranks.meet(f"pairs/{number}", [[0, 1]], 5) == [[0, 1]]
        ranks.assemble()
        ranks.meet("pairs/3", [[0, 1]], 5)
        ranks.assemble()

    for ranks in both:
        ranks._store, ranks._world = store, _World((0, 1))
    threads = [threading.Thread(target=run, args=(ranks,)) for ranks in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    left = [
        key
        for key in [*(f"pairs/{n}/0-1" for n in range(4)), "all/1/0-1", "all/2/0-1"]
        if store.check([f"{_KEY}/{key}"])
    ]
    assert left == ["all/2/0-1"]
