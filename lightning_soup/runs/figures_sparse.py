"""The picture of a sparse soup: scores over sparsity, and what is left of each layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_soup.runs.figures import BLUE, COLOURS, MARKERS, Picture, new_figure
from lightning_soup.weights.atomic import atomic_path

Curve = Sequence[tuple[float, float, float]]


def sparse_picture(curves: Mapping[str, Curve], masks: Mapping[str, Tensor], metric: str, path: Path) -> Path:
    """Draw one curve for each method over the sparsity, beside the density of each layer.

    Args:
        curves: By method: sparsity, metric, and its error (0: none is drawn), in order of sparsity.
        masks: The masks at the end.
        metric: What the scores are.
        path: A PNG.
    """
    names, pictures = list(masks), list[Picture]()
    height = max(2.8, 0.16 * len(names) + 0.9)
    with new_figure(7.2 if curves else 4.0, height, pictures, path.stem, "scores over sparsity, layers") as figure:
        axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
        for (name, rows), colour, marker in zip(curves.items(), (BLUE, *COLOURS), ("o", *MARKERS), strict=False):
            x, y, error = zip(*rows, strict=True)
            shown = error if any(error) else None
            axes[0].errorbar([100 * s for s in x], y, shown, marker=marker, capsize=2, color=colour, label=name)
        if curves:
            axes[0].set(xlabel="weights pruned, %", ylabel=metric)
            axes[0].legend()
        bars = axes[-1]
        bars.barh(range(len(names)), [100 * float(mask.double().mean()) for mask in masks.values()], color=BLUE)
        bars.set(yticks=range(len(names)), yticklabels=names, xlabel="kept of each layer, %", xlim=(0, 100))
        bars.tick_params(axis="y", labelsize=6)
        bars.invert_yaxis()
    with atomic_path(path) as temporary:
        temporary.write_bytes(pictures[0].png)
    return path


def curves_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """The soups of a fit and the mean of their copies."""
    scored = [record for record in records if record["soup"] is not None]
    if not scored:
        return {}
    copies = [(r["sparsity"], sum(r["copies"]) / len(r["copies"]), 0.0) for r in scored]
    soups = [(r["sparsity"], r["soup"], 0.0) for r in scored]
    return {"soup": soups, "mean copy": copies} if len(scored[0]["copies"]) > 1 else {"one copy": soups}
