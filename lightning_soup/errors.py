"""The errors of the package: one family, each message names what was given, what was expected and what to do."""

__all__ = [
    "IncompatibleIngredients",
    "LightningSoupError",
    "MissingExtra",
    "NonFiniteScore",
    "NonFiniteWeights",
    "RecipeError",
    "ReplicaLost",
    "UnreadableCheckpoint",
    "UnsupportedSetup",
    "UnwritableOutput",
]


class LightningSoupError(Exception):
    """Root of every error that lightning_soup raises on purpose."""


class UnreadableCheckpoint(LightningSoupError):
    """A file or folder that does not hold weights in a supported format, or is damaged."""


class IncompatibleIngredients(LightningSoupError):
    """Checkpoints whose tensors cannot be added: other names, shapes, kinds, or unequal integer buffers."""


class NonFiniteWeights(LightningSoupError):
    """A NaN or an infinity in a tensor that should be averaged."""


class UnwritableOutput(LightningSoupError):
    """The result cannot be written: no permission, no space, or a folder in the way."""


class UnsupportedSetup(LightningSoupError):
    """A setting or combination of settings that cannot work; raised before any training starts."""


class RecipeError(LightningSoupError):
    """A recipe cannot be cooked from what it was given: ingredients, metric or options."""


class NonFiniteScore(RecipeError):
    """The metric of a candidate is NaN; a search passes over such candidates."""


class ReplicaLost(LightningSoupError, RuntimeError):
    """A process of a distributed training has died, or did not answer in time."""


class MissingExtra(LightningSoupError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""
