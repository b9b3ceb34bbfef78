"""The weights of an ensemble's families as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_soup.runs.figures import BLACK, BLUE, COLOURS, GREY, MARKERS, Picture, new_figure
from lightning_soup.runs.tracking import folder_of_run, log_pictures
from lightning_soup.weights.atomic import atomic_path

__all__ = ["draw_weights", "told_weights", "weights_picture"]


def weights_picture(history: Sequence[Sequence[float]], names: Sequence[str], name: str = "family_weights") -> Picture:
    """Draw α of every family: how it came about, where there is more than a start and an end, and the end as bars.

    Args:
        history: α by family, at the start and after each epoch.
        names: Of the families.
        name: Of the picture.
    """
    curves = len(history) > 3
    pictures: list[Picture] = []
    height = max(2.4, 0.3 * len(names) + 1.0)
    caption = "weight of each family"
    with new_figure(7.2 if curves else 4.2, height, pictures, name, caption) as figure:
        axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
        if curves:
            looks = zip(names, zip(*history, strict=True), (BLUE, *COLOURS) * len(names), strict=False)
            for number, (family, values, colour) in enumerate(looks):
                marker = ("o", *MARKERS)[number % (1 + len(MARKERS))]
                axes[0].plot(values, label=family, color=colour, marker=marker, markevery=max(1, len(values) // 10))
            axes[0].set(xlabel="epoch", ylabel="α", ylim=(0, 1))
            axes[0].legend()
        bars, rows = axes[-1], range(len(names))
        bars.barh(rows, history[-1], color=BLUE)
        for row, value in zip(rows, history[-1], strict=True):
            inside = value > 0.8
            place, side, colour = (value - 0.02, "right", "white") if inside else (value + 0.02, "left", BLACK)
            bars.text(place, row, f"{value:.3f}", va="center", ha=side, color=colour)
        bars.axvline(1 / len(names), color=GREY, linestyle="--", linewidth=1)
        bars.text(1 / len(names), -0.62, "all alike", color=GREY, fontsize=7, ha="center")
        bars.set(yticks=rows, yticklabels=names, xlabel="α", xlim=(0, 1))
        bars.invert_yaxis()
    return pictures[0]


def draw_weights(
    history: Sequence[Sequence[float]], names: Sequence[str], trainer: Trainer, picture: str
) -> Path | None:
    """Draw α into the run's folder, and log the picture to W&B; on rank 0.

    Args:
        history: See :func:`weights_picture`.
        names: Likewise.
        trainer: The Trainer.
        picture: Its name, without suffix.

    Returns:
        Where the picture is; None for a run that keeps nothing (no loggers, no checkpoints).
    """
    if not trainer.loggers and not trainer.checkpoint_callbacks:
        return None
    path = folder_of_run(trainer) / f"{picture}.png"
    if trainer.is_global_zero:
        drawn = weights_picture(history, names, picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(drawn.png)
        log_pictures(trainer.loggers, "ensemble", [drawn])
    return path


def told_weights(owner: str, alpha: Mapping[str, float], path: Path | None) -> str:
    """A line on what was learned."""
    shares = ", ".join(f"{name} {value:.3f}" for name, value in alpha.items())
    return f"{owner}: α = {shares}" + (f" ({path})" if path else "")
