"""What forming candidates costs: one combination of K checkpoints, a whole generation of them, a learned soup's step.

    python -m tests.benchmarks.candidates --checkpoints 20 --model vit_small_patch16_224

The limit of one candidate reads the K checkpoints through a 512 KiB buffer and writes one result. All methods run in
turn in each round; a ratio is the median of the ratios within the rounds, for each candidate. CPU times on one thread.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_soup.weights import combine, open_checkpoint
from lightning_soup.weights.combine import combine_many
from lightning_soup.weights.geometry import inner_products
from tests.benchmarks.measures import Work, in_turn, median_ratio

Weights = Mapping[str, Tensor]
_BUFFER = 128 << 10  # elements of float32


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the checkpoints, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm model, for its shapes only")
    parser.add_argument("--checkpoints", type=int, default=20, help="K; all are held in memory")
    parser.add_argument("--generations", type=int, nargs="+", default=[4, 8, 16], help="candidates formed together")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; one more goes before to warm up")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in timm.create_model(options.model).state_dict().items()}
    models = [_random(shapes, seed) for seed in range(options.checkpoints)]
    size = sum(value.numel() for value in models[0].values())
    print(f"{options.checkpoints} x {options.model}: {len(shapes)} tensors, {4 * size / 1e6:.0f} MB each")
    _report("in memory", models, options.generations, options.rounds, peers=True)
    with tempfile.TemporaryDirectory(prefix="candidates-") as folder:
        files = [Path(folder) / f"{i}.safetensors" for i in range(len(models))]
        for file, model in zip(files, models, strict=True):
            save_file(dict(model), file)
        del models
        opened = [open_checkpoint(file) for file in files]
        _report("safetensors files", opened, options.generations, options.rounds)


def _random(shapes: Mapping[str, torch.Size], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) * 0.02 for name, shape in shapes.items()}


def _report(
    title: str, models: Sequence[Weights], generations: Sequence[int], rounds: int, peers: bool = False
) -> None:
    count = len(models)
    alphas = torch.randn(max(generations), count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (alphas - (alphas.sum(1, keepdim=True) - 1) / count).tolist()
    out = combine_many(models, rows)
    work: dict[str, tuple[int, Work]] = {
        "limit": (1, lambda: _limit(models, out[0])),
        "one": (1, lambda: combine(models, rows[0], out[0], threads=1)),
        "two coefficients of another one changed": (
            1,
            lambda: combine([out[1], models[0], models[1]], [1.0, 0.1, -0.1], out[0], threads=1),
        ),
    }
    work["a step of a learned soup, gradients of coefficients too"] = (1, lambda: _learned(models, rows[0], out))
    for number in generations:
        work[f"a generation of {number}"] = (number, _generation(models, rows[:number], out[:number]))
    if peers:
        work["a loop over dictionaries"] = (1, lambda: _loop(models, rows[0]))
    print(f"\n{title}: CPU time of each candidate, in units of the limit")
    times = in_turn({name: do for name, (_, do) in work.items()}, rounds)
    for name, (number, _) in work.items():
        print(f"  {name:58} {median_ratio(times[name], times['limit']) / number:6.2f} x")


def _generation(models: Sequence[Weights], rows: Sequence[Sequence[float]], out: Sequence[Weights]) -> Work:
    return lambda: combine_many(models, rows, out, threads=1)


def _learned(models: Sequence[Weights], row: Sequence[float], out: Sequence[Weights]) -> None:
    combine(models, row, out[0], threads=1)
    inner_products(models, out[1])  # in place of the gradient of the model


def _limit(models: Sequence[Weights], out: Mapping[str, Tensor]) -> None:
    buffer, raw = torch.empty(_BUFFER), None
    for name, target in out.items():
        to = target.view(-1)
        for model in models:
            source = None if isinstance(model, dict) else model.tensors[name]
            for start in range(0, len(to), _BUFFER):
                part = buffer[: min(_BUFFER, len(to) - start)]
                if source is None:
                    part.copy_(model[name].view(-1)[start : start + len(part)])
                else:
                    raw = memoryview(part.numpy()).cast("B")
                    source.fill(start, part, raw)
        for start in range(0, len(to), _BUFFER):
            to[start : start + _BUFFER].copy_(buffer[: min(_BUFFER, len(to) - start)])


def _loop(models: Sequence[Weights], row: Sequence[float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for model, c in zip(models, row, strict=True):
        for name, value in model.items():
            found[name] = value * c if name not in found else found[name] + value * c
    return found


if __name__ == "__main__":
    main()
