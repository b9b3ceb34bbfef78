"""What merging adapters costs: the SVD of the small core against that of the dense matrix, and a whole model's shapes.

    python -m tests.benchmarks.adapters

One layer: ten rank-16 updates of one matrix are merged and cut to rank 16, on one thread, in CPU time; a ratio is the
median of the ratios within the rounds. The dense way (PEFT's ``svd``) adds the products and decomposes the matrix; it
takes minutes at the full width of 4096, so it is measured on a narrower layer, and at full width only if asked. Then
ten adapters of all layers of a model of 7 B parameters are merged once, in a process of its own, for time and memory.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from lightning_soup.weights import open_checkpoint
from lightning_soup.weights.adapter_merging import AdapterMerging, save_adapter
from lightning_soup.weights.low_rank import stack, truncate
from tests.benchmarks.measures import extra_memory, in_turn, measures_memory, median_ratio
from tests.helpers.adapters import write_adapter

_RANK, _COUNT = 16, 10
_SHAPES = {  # of Llama 2 7B: out, in
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
Factors = list[tuple[float, Tensor, Tensor]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds; one more goes before to warm up")
    parser.add_argument("--width", type=int, default=1024, help="of the layer that is decomposed in both ways")
    parser.add_argument("--layers", type=int, default=32, help="of the whole model")
    parser.add_argument("--scale", type=int, default=1, help="divide the whole model's widths by this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    _one_layer(options.width, options.rounds)
    _whole(options.layers, options.scale)


def _factors(out: int, width: int) -> Factors:
    """Updates of one run: what they have in common is larger than what they differ by."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(_RANK, width, generator=draw), torch.randn(out, _RANK, generator=draw)
    return [
        (
            1 / _COUNT,
            a + 0.1 * torch.randn(a.shape, generator=draw),
            b + 0.1 * torch.randn(b.shape, generator=draw),
        )
        for _ in range(_COUNT)
    ]


def _core(factors: Factors) -> Tensor:
    found = truncate(*stack(factors), _RANK)
    return found.left @ found.right


def _dense(factors: Factors) -> Tensor:
    u, s, vt = torch.linalg.svd(sum(c * (b @ a) for c, a, b in factors), full_matrices=False)
    return (u[:, :_RANK] * s[:_RANK]) @ vt[:_RANK]


def _one_layer(width: int, rounds: int) -> None:
    factors = _factors(width, width)
    apart = float((_core(factors) - _dense(factors)).norm() / _dense(factors).norm())
    times = in_turn({"core": lambda: truncate(*stack(factors), _RANK), "dense": lambda: _dense(factors)}, rounds)
    ratio = median_ratio(times["dense"], times["core"])
    print(f"one layer, [{width}, {width}], {_COUNT} adapters of rank {_RANK}")
    print(f"  dense SVD / SVD of the core {ratio:8.1f} x   (results apart by {apart:.1e})")


def _whole(layers: int, scale: int) -> None:
    shapes = {
        f"model.layers.{i}.{name}": (out // scale, width // scale)
        for i in range(layers)
        for name, (out, width) in _SHAPES.items()
    }
    size = sum(_RANK * (out + width) for out, width in shapes.values())
    print(f"\n{len(shapes)} layers, {_COUNT} adapters of rank {_RANK}, {size / 1e6:.1f} M parameters each")
    print(f"  {'once, in a process of its own':34}{'CPU s':>9}{'extra MiB':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(_COUNT):
            draw = torch.Generator().manual_seed(number)
            factors = {
                name: (torch.randn(_RANK, width, generator=draw), torch.randn(out, _RANK, generator=draw))
                for name, (out, width) in shapes.items()
            }
            write_adapter(Path(folder) / str(number), factors)
        for mode in ("factor", "svd", "exact"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, extra = pool.apply(_once, (folder, mode))
            print(f"  {mode:34}{seconds:9.1f}{extra:11.0f}")


def _once(folder: str, mode: str) -> tuple[float, float]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "the merged update was cut")  # random ones have little in common
    took = 0.0

    def merge() -> None:
        nonlocal took
        begin = time.process_time()
        files = [open_checkpoint(Path(folder) / str(number)) for number in range(_COUNT)]
        save_adapter(*AdapterMerging(mode).terms(files, (1 / _COUNT,) * _COUNT), Path(folder) / mode)
        took = time.process_time() - begin

    extra = extra_memory(merge) if measures_memory() else float("nan")
    if not measures_memory():
        merge()
    return took, extra


if __name__ == "__main__":
    main()
