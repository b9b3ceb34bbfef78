"""The pictures of a report: one look, readable at full size, told apart by shape as well as colour."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_soup.runs.report import Entry, SoupReport

__all__ = ["GREY", "Picture", "distinct", "draw", "look_of", "new_figure", "short"]

# Okabe and Ito's palette, made to stay distinct under the common colour deficiencies; black and grey are kept
# for what the soups are compared with.
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("s", "^", "v", "P", "X")
BLUE, BLACK, GREY, FAINT = "#0072B2", "#1a1a1a", "#8c8c8c", "#d9d9d9"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "xtick.color": "#4d4d4d",
    "ytick.color": "#4d4d4d",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "lines.markersize": 6,
    "text.parse_math": False,  # a label is text, whatever signs it holds
    "figure.facecolor": "white",
    "savefig.dpi": 200,
}


@dataclass(frozen=True)
class Picture:
    """A rendered picture: its file name without suffix, what it shows in a sentence, and the PNG."""

    name: str
    caption: str
    png: bytes


def draw(report: "SoupReport") -> list[Picture]:
    """Render every picture that the report has data for."""
    from lightning_soup.runs.figures_comparison import gains, robustness
    from lightning_soup.runs.figures_recipes import coefficients, history, tensor_coefficients

    pictures = []
    for painter in (robustness, gains, history, coefficients, tensor_coefficients):
        pictures.extend(painter(report))
    return pictures


@contextmanager
def new_figure(width: float, height: float, pictures: list[Picture], name: str, caption: str) -> "Iterator[Figure]":
    """Give an empty figure in the common style; when the block ends, its PNG is added to the pictures.

    Args:
        width: In inches; 7.2 is the text width of the report.
        height: In inches.
        pictures: Where the result goes.
        name: File name without suffix.
        caption: What the picture shows.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: no global state, always Agg
        yield figure
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            # A label in a script that the font lacks is drawn as boxes; the table spells it out.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(buffer, format="png")
    pictures.append(Picture(name, caption, buffer.getvalue()))


def look_of(report: "SoupReport", entry: "Entry") -> dict:
    """Marker, colour and size of an entry, the same in every picture."""
    if entry.kind == "ingredient":
        return {"marker": "o", "color": GREY, "s": 26, "alpha": 0.75, "linewidths": 0, "zorder": 3}
    if entry.kind == "init":
        return {"marker": "D", "color": BLACK, "s": 42, "zorder": 4}
    if entry.kind == "ensemble":
        return {"marker": "*", "color": BLUE, "s": 130, "zorder": 5, "linewidths": 0}
    index = report.of_kind("soup").index(entry)
    return {
        "marker": MARKERS[index % len(MARKERS)],
        # Shifted by one after each round, so that the sixth soup repeats neither a pair nor its neighbour's.
        "color": COLOURS[(index + index // len(COLOURS)) % len(COLOURS)],
        "s": 62,
        "zorder": 6,
        "edgecolors": "white",
        "linewidths": 0.7,
    }


def short(label: str, length: int = 30) -> str:
    """A label that fits: on one line, its middle left out when too long (both ends tell runs apart)."""
    label = " ".join(label.split())
    if len(label) <= length:
        return label
    tail = (length - 1) // 2
    return f"{label[: length - 1 - tail]}…{label[-tail:]}"


def distinct(labels: Sequence[str], length: int = 30) -> list[str]:
    """Labels that fit and still differ: those that would look alike lose what they share at both ends."""
    labels = [" ".join(label.split()) for label in labels]
    fitting = [short(label, length) for label in labels]
    for text in set(fitting):
        alike = [i for i, other in enumerate(fitting) if other == text]
        members = [labels[i] for i in alike]
        if len(set(members)) > 1:
            head = _shared(members)
            tail = _shared([label[head:][::-1] for label in members])
            for i, label in zip(alike, members, strict=True):
                fitting[i] = short(f"…{label[head : len(label) - tail]}…", length)
    return fitting


def _shared(texts: Sequence[str]) -> int:
    """With how many equal signs all texts begin."""
    return sum(1 for _ in takewhile(lambda signs: len(set(signs)) == 1, zip(*texts, strict=False)))
