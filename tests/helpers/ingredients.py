"""Fine-tunes of one start, made once per test run."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

from tests.helpers.boring import TinyClassifier, TinyData
from tests.helpers.trainers import quiet_trainer


@cache
def tiny_run() -> tuple[Path, list[Path]]:
    """The start and three fine-tunes of it, as Lightning checkpoints."""
    folder = Path(mkdtemp(prefix="ingredients-"))
    torch.manual_seed(5)
    module = TinyClassifier(lr=0.05)
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(module, datamodule=TinyData())
    trainer.save_checkpoint(folder / "start.ckpt")
    start = {name: value.clone() for name, value in module.state_dict().items()}
    for run in range(3):
        torch.manual_seed(run)
        module = TinyClassifier(lr=0.02 * (run + 1))
        module.load_state_dict(start)
        trainer = quiet_trainer(max_epochs=3)
        trainer.fit(module, datamodule=TinyData())
        trainer.save_checkpoint(folder / f"run-{run}" / "last.ckpt")
    return folder / "start.ckpt", sorted(folder.glob("run-*/last.ckpt"))
