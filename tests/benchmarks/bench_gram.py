"""What `inspect` costs without data: all pairs of K checkpoints, in units of one pass over their files.

    python -m tests.benchmarks.bench_gram --checkpoints 8 --model vit_base_patch16_224

One pass reads the files through a 512 KiB buffer and does nothing with them. All methods run in turn in each round; a
ratio is the median of the ratios within the rounds. CPU times on one thread; the files are in the system's cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from safetensors.torch import save_file

from lightning_soup.landscape.inspection import inspect_weights
from lightning_soup.weights.gram import gram
from tests.benchmarks.measures import extra_memory, measures_memory, print_ratios

_BUFFER = 512 << 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the checkpoints, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm model, for its shapes only")
    parser.add_argument("--checkpoints", type=int, default=8, help="K")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the files")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; one more goes before to warm up")
    parser.add_argument("--memory_of", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory_of:
        print(f"{extra_memory(lambda: inspect_weights(options.memory_of)):.1f}")
        return
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in timm.create_model(options.model).state_dict().items()}
    with tempfile.TemporaryDirectory(prefix="gram-") as folder:
        files = [Path(folder) / f"{i}.safetensors" for i in range(options.checkpoints)]
        draw = torch.Generator().manual_seed(0)
        start = {name: torch.randn(shape, generator=draw) * 0.02 for name, shape in shapes.items()}
        for file in files:
            near = {name: value + 1e-3 * torch.randn(value.shape, generator=draw) for name, value in start.items()}
            save_file({name: value.to(getattr(torch, options.dtype)) for name, value in near.items()}, file)
        size = sum(file.stat().st_size for file in files)
        print(f"{len(files)} x {options.model}, {options.dtype}: {size / 1e6:.0f} MB")
        work = {
            "one pass over the files": lambda: _read(files),
            "gram, all pairs": lambda: gram(files, threads=1),
            "inspect_weights": lambda: inspect_weights(files),
            "a pass for each pair": lambda: [_read([a, b]) for i, a in enumerate(files) for b in files[:i]],
        }
        print_ratios("CPU time, in units of one pass", work, options.rounds)
        if measures_memory():
            command = [sys.executable, "-m", "tests.benchmarks.bench_gram", "--memory_of", *map(str, files)]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"\nmemory of inspect_weights beyond the imports: {float(found):.1f} MiB")


def _read(files: Sequence[Path]) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


if __name__ == "__main__":
    main()
