"""Tensors of every kind, exact comparison, and the slow and obviously right combination."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
INTEGER = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


def every_type() -> dict[str, Tensor]:
    """One tensor of every element type that can be stored, with odd sizes."""
    torch.manual_seed(3)
    found = {f"floating.{dtype}": torch.randn(5, 3).to(dtype) for dtype in FLOATING + FLOAT8}
    found |= {f"complex.{dtype}": torch.randn(3, 5).to(dtype) for dtype in (torch.complex64, torch.complex128)}
    found |= {f"integer.{dtype}": torch.randint(0, 100, (7,)).to(dtype) for dtype in INTEGER}
    found["bool"] = torch.tensor([True, False, True])
    found["scalar"] = torch.tensor(2.5)
    found["empty"] = torch.zeros(0, 4)
    return found


def every_layout() -> dict[str, Tensor]:
    """Tensors that are not row-major, and views into one storage."""
    torch.manual_seed(4)
    base = torch.randn(40)
    grid = torch.randn(6, 10)
    return {
        "transposed": torch.randn(5, 7).t(),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view.front": base[:10],
        "view.back": base[7:31].view(4, 6),
        "strided": base[1::3],
        "block": grid[1:5, 2:9],
        "column": grid[:, 3],
        "permuted": torch.randn(2, 3, 4, 5).permute(3, 1, 0, 2),
        "half": torch.randn(4, 4).half().t(),
    }


def bits(tensor: Tensor) -> bytes:
    """The bytes of the elements in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, types, shapes and bits."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def slow_combination(models: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Σ cᵢ·θᵢ of floating tensors in float64, nothing else."""
    return {
        name: sum(c * model[name].to(torch.float64) for c, model in zip(coefficients, models, strict=True))
        for name in models[0]
    }


def with_pickle(path: Path, content: bytes, storages: int = 0) -> Path:
    """A ``torch.save`` archive with another pickle: one storage of three ones, or some of 256 zero bytes each."""
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        entries = {name: source.read(name) for name in source.namelist()} | {"archive/data.pkl": content}
        entries |= {f"archive/data/{i}": bytes(256) for i in range(storages)}
        for name, data in entries.items():
            target.writestr(name, data)
    return path
