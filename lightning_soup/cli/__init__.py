"""The command line: thin commands over the rooms below."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_soup.cli.trainer import SoupTrainer as SoupTrainer


def __getattr__(name: str) -> Any:
    if name == "SoupTrainer":
        from lightning_soup.cli.trainer import SoupTrainer

        return SoupTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
