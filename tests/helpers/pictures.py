"""What was drawn: matplotlib's own figures of pictures, to be asked for their lines, bars and labels."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure


@contextmanager
def figures_kept() -> Iterator[list[Figure]]:
    """Every figure that is rendered in the block, in order."""
    kept, save = [], Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *a, **k: [kept.append(figure), save(figure, *a, **k)])
        yield kept
