"""Damaged bytes in any format give an error of ours or weights: no other error, no hang, no huge allocation."""

import json
import random
import time
import tracemalloc
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_soup.errors import LightningSoupError
from lightning_soup.weights import combine, open_checkpoint
from tests.helpers.weights import with_pickle

SMALL = {
    "a.weight": torch.arange(24.0).reshape(6, 4),
    "b.weight": torch.arange(24.0).reshape(4, 6).t() / 7,
    "h": torch.arange(5).half(),
    "n": torch.tensor(3),
    "m": torch.tensor([True, False]),
}
CHECKPOINT = {
    "epoch": 3,
    "pytorch-lightning_version": "2.6.0",
    "state_dict": SMALL,
    "hyper_parameters": {"lr": 0.1, "names": ["x"] * 3, "tuple": (1, 2.5), "text": "y" * 300},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(6, 4)}}}],
    "callbacks": {f"Callback{i}": {"best": torch.tensor(0.5), "path": "p", "list": [i]} for i in range(70)},
}


def write(kind, path):
    if kind == "safetensors":
        safetensors.torch.save_file({n: t.contiguous() for n, t in SMALL.items()}, path, metadata={"c": "b.weight"})
    elif kind == "zip":
        torch.save(CHECKPOINT, path)
    elif kind == "protocol 5":
        torch.save(CHECKPOINT, path, pickle_protocol=5)
    elif kind == "legacy":
        torch.save(CHECKPOINT, path, _use_new_zipfile_serialization=False)
    elif kind == "script":
        torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).save(str(path))
    elif kind == "pickle":  # damaged inside a sound archive, whose checksums would find it first
        torch.save(CHECKPOINT, path)
        with zipfile.ZipFile(path) as archive:
            return archive.read(f"{path.stem}/data.pkl")
    return path.read_bytes()


KINDS = ["safetensors", "zip", "protocol 5", "legacy", "script", "pickle"]


def damaged(good, rng):
    """One file with a few random changes."""
    data = bytearray(good)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(data))
        change = rng.randrange(7)
        if change == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at] = rng.choice(b"\x00\x01\x7f\x80\xff.(}]rpqRbcVXQ\x95\x8a")
        elif change == 2:
            data[at : at + rng.choice([1, 4, 8])] = rng.choice([b"\xff" * 8, b"\0" * 8, b"9" * 8, rng.randbytes(4)])
        elif change == 3:
            del data[at : at + rng.choice([1, 2, 50])]
        elif change == 4:
            data[at:at] = rng.choice([b"\xff", b"x", b"1", rng.randbytes(3)])
        elif change == 5 and len(data) > 10:
            del data[at:]
        else:
            other = rng.randrange(len(data))
            data[at : at + 16] = data[other : other + 16]
        if not data:
            break
    return bytes(data)


def opened_or_refused(path):
    """What a user would do with the file: open it, look at it, read it, combine it."""
    try:
        weights = open_checkpoint(path)
        assert str(weights.specs)
        assert weights.ties is not None
        assert json.dumps(weights.metadata, default=str, skipkeys=True)
        if sum(spec.nbytes for spec in weights.specs.values()) < 1_000_000:
            weights.digest()
            dict(weights)
            combine([weights, weights], [0.5, 0.5])
    except LightningSoupError:
        return False
    return True


def check(kind, path, count, seed):
    good = write(kind, path)
    assert opened_or_refused(path)
    rng = random.Random(seed)
    survived = 0
    tracemalloc.start()
    try:
        for _ in range(count):
            data = damaged(good, rng)
            if kind == "pickle":
                with_pickle(path, data, storages=90)
            else:
                path.write_bytes(data)
            started = time.perf_counter()
            try:
                survived += opened_or_refused(path)
            except BaseException:
                path.with_suffix(".culprit").write_bytes(data)
                raise
            assert time.perf_counter() - started < 5
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
    return survived


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage(tmp_path, kind):
    survived = check(kind, tmp_path / "a.ckpt", 60, 1)
    assert 0 < survived < 60  # damaged numbers cannot be seen, damaged structure must be


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_random_damage(tmp_path, kind):
    check(kind, tmp_path / "a.ckpt", 1500, 2)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_every_length(tmp_path, kind):
    path = tmp_path / "a.ckpt"
    good = write(kind, path)
    for end in {*range(0, len(good), 199), *range(100), *range(len(good) - 60, len(good))}:
        path.write_bytes(good[:end])
        assert not opened_or_refused(path)
