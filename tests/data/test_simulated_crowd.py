"""SimulatedCrowd: workers are as good as they are said to be."""

import numpy as np
import pytest

from lightning_soup.data import SimulatedCrowd
from lightning_soup.data.vote_counts import standard
from lightning_soup.errors import UnsupportedSetup

CLASSES = [str(digit) for digit in range(10)]


def crowd(count=2000, **options):
    labels = np.arange(count) % 10
    votes = SimulatedCrowd(**options).votes(labels, CLASSES, [f"{number:04d}" for number in range(count)])
    return votes, labels[votes.item] == votes.label


def test_every_item_has_votes_of_different_workers():
    votes, _ = crowd(votes_per_item=5)
    assert len(votes) == 10_000
    assert (votes.counts.sum(1) == 5).all()
    assert len(np.unique(votes.item * 100 + votes.worker)) == 10_000
    assert len(votes.workers) == 25


def test_skills_are_as_told():
    votes, right = crowd(difficulty=0.0)
    share = votes.sum_by_worker(right) / votes.sum_by_worker(np.ones(len(votes)))
    assert ((share[:15] > 0.64) & (share[:15] < 0.96)).all()
    assert ((share[15:22] > 0.28) & (share[15:22] < 0.62)).all()
    for spammer in range(22, 25):
        assert len(np.unique(votes.label[votes.worker == spammer])) == 1


def test_wrong_answers_look_alike():
    votes, right = crowd(good=25, poor=0, spammers=0, look_alike_share=0.7)
    truth = (np.arange(2000) % 10)[votes.item]
    of_4 = votes.label[(truth == 4) & ~right]
    assert np.bincount(of_4, minlength=10)[9] / len(of_4) == pytest.approx(0.7 + 0.3 / 9, abs=0.08)
    votes, right = crowd(good=25, poor=0, spammers=0, look_alike={}, look_alike_share=1.0)
    assert set((votes.label - (np.arange(2000) % 10)[votes.item])[~right] % 10) == {1}  # the next class


def test_difficult_items_are_difficult_for_all():
    easy, hard = (standard(crowd(difficulty=d)[0]).max(1) for d in (0.0, 3.0))
    assert hard.std() > easy.std()


def test_the_seed_decides():
    assert crowd()[0].fingerprint == crowd()[0].fingerprint != crowd(seed=1)[0].fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"good": 2, "poor": 0, "spammers": 0}, "2 workers .* cannot give votes_per_item=5"),
        ({"good": -1}, "good=-1"),
        ({"votes_per_item": 0}, "votes_per_item=0"),
        ({"difficulty": -1.0}, "difficulty=-1.0"),
        ({"look_alike_share": 1.5}, "look_alike_share=1.5"),
        ({"look_alike": {"4": "9", "7": "7"}}, "look_alike: 7 would be taken for itself"),
    ],
)
def test_crowds_that_cannot_be(options, message):
    with pytest.raises(UnsupportedSetup, match=message):
        SimulatedCrowd(**options)
