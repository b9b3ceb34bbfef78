"""A callback through YAML and back."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LightningCLI

from tests.helpers.boring import TinyData


def through_yaml(module: type[LightningModule], path: str, options: dict[str, Any], folder: Path) -> list[Callback]:
    """Build a callback by its class path, save the config, build it again from that: both callbacks."""

    def cli(arguments: Any) -> LightningCLI:
        return LightningCLI(
            module,
            TinyData,
            args=arguments,
            run=False,
            seed_everything_default=0,
            save_config_callback=None,
            trainer_defaults={"logger": False, "accelerator": "cpu"},
        )

    first = cli({"trainer": {"callbacks": [{"class_path": path, "init_args": options}]}})
    saved = folder / "saved.yaml"
    saved.write_text(first.parser.dump(first.config, skip_none=False))
    kind = path.rpartition(".")[2]
    return [
        one
        for built in (first, cli(["--config", str(saved)]))
        for one in built.trainer.callbacks
        if type(one).__name__ == kind
    ]
