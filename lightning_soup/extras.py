"""Importing optional packages, with the install command in the error when one is missing."""

import importlib
from types import ModuleType

from lightning_soup.errors import MissingExtra


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: Dotted name of the module, for example ``"sklearn.datasets"``.
        extra: The extra of lightning_soup that installs it, for example ``"demo"``.

    Raises:
        MissingExtra: The module is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{module.partition('.')[0]!r} is not installed. It comes with an extra: "
            f'pip install "lightning_soup[{extra}]"'
        ) from error
