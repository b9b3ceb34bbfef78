"""What the examples share: a quiet Trainer, how numbers over seeds are written, and their place in RESULTS.md."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

RESULTS = Path(__file__).parent / "RESULTS.md"


class SavesReplicas(Callback):
    """Keeps all replicas when training ends, and in ``sent`` how many MB rank 0 has sent to peers.

    Args:
        folder: Gets ``end.ckpt`` and ``sent``.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        trainer.save_checkpoint(self.folder / "end.ckpt")
        if trainer.is_global_zero:
            (self.folder / "sent").write_text(str(trainer.strategy.ranks.bytes_sent / 1e6))


def quiet_trainer(epochs: int, callbacks: Sequence[Callback], max_steps: int = -1, **options: Any) -> Trainer:
    """Trains on a CPU, without validation, files and bars."""
    return Trainer(
        max_epochs=epochs,
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
        **options,
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def verdicts(claims: Sequence[tuple[str, bool]]) -> str:
    """A list of claims, and whether each holds."""
    return "\n".join(f"- {'holds' if held else '**does not hold**'}: {claim}." for claim, held in claims)


def write(name: str, text: str, path: Path = RESULTS) -> None:
    """Replace the part of RESULTS.md between an example's marks, or add it at the end."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = path.read_text() if path.exists() else "# Results\n"
    if begin not in content:
        content = f"{content.rstrip()}\n\n{begin}\n{end}\n"
    before, _, rest = content.partition(begin)
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")
