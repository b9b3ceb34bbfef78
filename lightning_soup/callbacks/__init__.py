"""Callbacks: averaging during fit, one file per method."""

from lightning_soup.callbacks.model_soup import ModelSoup as ModelSoup
