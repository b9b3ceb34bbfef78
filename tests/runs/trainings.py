"""Trainings that children of a test are sent; light, because each child imports this file."""

import os

from tests.helpers.sweeps import fake_training


class Stopped(SystemExit):
    """As signals end a program: not a plain SystemExit."""


def training(setting, folder, seed, calls):
    """`fake_training`, which also writes which GPUs it would see, and may be told to terminate."""
    with open(f"{calls}.gpus", "a") as file:
        file.write(f"{seed} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    if setting.get("do") == "terminate":
        raise Stopped
    return fake_training(setting, folder, seed, calls)
