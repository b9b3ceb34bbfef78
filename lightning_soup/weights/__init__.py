"""Weights at rest: opening any format, checking, combining and saving. Knows torch, not Lightning."""

from lightning_soup.weights.combine import combine as combine
from lightning_soup.weights.compatibility import check_compatible as check_compatible
from lightning_soup.weights.save import save_weights as save_weights
from lightning_soup.weights.weights_file import WeightsFile as WeightsFile
from lightning_soup.weights.weights_file import open_checkpoint as open_checkpoint
