"""What combining checkpoints costs, beside what it must cost and beside loading them whole.

    python -m tests.benchmarks.combine --checkpoints 8 --model vit_base_patch16_224

The limit reads the needed bytes once through a 512 KiB buffer and writes as many as the result has. All methods run in
turn in each round, the order turned round every time; a ratio is the median of the ratios within the rounds. Times are
CPU times on one thread, which other load moves least. Each method starts right after a file of the result's size was
written and deleted: memory that a virtual machine touches for the first time costs several times the write itself,
and would be charged to whoever writes next.
"""

import argparse
import inspect
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file, save_file

from lightning_soup.weights import combine
from tests.benchmarks.measures import Work, extra_memory, in_turn, measures_memory, median_ratio, ratios

Load = Callable[[Path], dict[str, torch.Tensor]]
_OUT = "out.safetensors"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the files, measure, print, and delete them."""
    options = _options(arguments)
    torch.set_num_threads(1)
    shapes = _shapes(options.model)
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    print(f"{options.checkpoints} x {options.model}: {len(shapes)} tensors, {size / 1e6:.0f} MB each")
    with tempfile.TemporaryDirectory(prefix="combine-", dir=options.folder) as name:
        folder = Path(name)
        files = [_safetensors(shapes, folder / f"{i}.safetensors", i) for i in range(options.checkpoints)]
        loops = {"load whole and add": _whole_safetensors, "map and add": load_file}
        _table("safetensors", _methods(files, folder / _OUT, size, loops), options.rounds, folder, size)
        _two_threads(files, folder, options.rounds)
        _memory(files, folder, size)
        for file in files:
            file.unlink()
        files = [_lightning(shapes, folder / f"{i}.ckpt", i) for i in range(options.checkpoints)]
        title = f"Lightning .ckpt with AdamW state ({files[0].stat().st_size / 1e6:.0f} MB each)"
        loops = {"load whole and add": _whole_checkpoint, "map and add": _mapped_checkpoint}
        _table(title, _methods(files, folder / _OUT, size, loops), options.rounds, folder, size)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=8, help="how many to average")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm model, for its shapes only")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; one more goes before to warm up")
    parser.add_argument("--folder", help="where to make the files; they should fit in memory (the page cache)")
    return parser.parse_args(arguments)


# --------------------------------------------------------------------------------------------------------------- files


def _shapes(model: str) -> dict[str, torch.Size]:
    import timm

    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in timm.create_model(model).state_dict().items()}


def _random(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}


def _safetensors(shapes: dict[str, torch.Size], path: Path, seed: int) -> Path:
    save_file(_random(shapes, seed), path)
    return path


def _lightning(shapes: dict[str, torch.Size], path: Path, seed: int) -> Path:
    weights = _random(shapes, seed)
    moments = {
        i: {"step": torch.tensor(1000.0), "exp_avg": weight * 0.1, "exp_avg_sq": weight.square()}
        for i, weight in enumerate(weights.values())
    }
    torch.save(
        {
            "epoch": 7,
            "global_step": 1000,
            "pytorch-lightning_version": "2.6.0",
            "state_dict": weights,
            "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-5, "params": list(moments)}]}],
            "lr_schedulers": [{"last_epoch": 7}],
            "loops": {},
            "callbacks": {},
            "hyper_parameters": {"lr": 1e-5},
        },
        path,
    )
    return path


# ------------------------------------------------------------------------------------------------------------- methods


def _methods(files: list[Path], out: Path, size: int, loops: dict[str, Load]) -> dict[str, Work]:
    share = [1 / len(files)] * len(files)
    return {
        "limit": lambda: _limit(files, out, size),
        "ours": lambda: combine(files, share, out, threads=1),
        "ours, float64": lambda: combine(files, share, out, threads=1, accumulate="float64"),
        **{name: partial(_soup, files, out, load) for name, load in loops.items()},
    }


def _limit(files: list[Path], out: Path, size: int) -> None:
    buffer = memoryview(bytearray(512 << 10))
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            left = size
            while left > 0:
                left -= stream.readinto(buffer[: min(left, len(buffer))])
    with open(out, "wb", buffering=0) as stream:
        left = size
        while left > 0:
            left -= stream.write(buffer[: min(left, len(buffer))])


def _soup(files: list[Path], out: Path, load: Load) -> None:
    """The loop of the model soups paper's code."""
    share, soup = 1 / len(files), {}
    for file in files:
        weights = load(file)
        if not soup:
            soup = {name: tensor * share for name, tensor in weights.items()}
        else:
            soup = {name: tensor * share + soup[name] for name, tensor in weights.items()}
    save_file(soup, out)


def _whole_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Read every byte, as the safetensors package did before it mapped files."""
    if "backend" in inspect.signature(load_file).parameters:
        return load_file(file, backend="pread")
    return load_file(file)


def _whole_checkpoint(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def _mapped_checkpoint(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True, mmap=True)["state_dict"]


# ------------------------------------------------------------------------------------------------------------- measures


def _table(title: str, methods: dict[str, Work], rounds: int, folder: Path, size: int) -> None:
    times = in_turn(methods, rounds, before=partial(_make_room, folder, size))
    print(f"\n{title}\n{'':22}{'CPU s':>8}{'x limit':>9}{'least':>8}{'most':>8}{'x ours':>9}")
    for name, seconds in times.items():
        to_limit = ratios(seconds, times["limit"])
        to_ours = median_ratio(seconds, times["ours"])
        print(
            f"{name:22}{statistics.median(seconds):8.3f}{statistics.median(to_limit):9.2f}{min(to_limit):8.2f}"
            f"{max(to_limit):8.2f}{to_ours:9.2f}"
        )


def _make_room(folder: Path, size: int) -> None:
    """Leave pages to write to that this machine has touched already."""
    (folder / _OUT).unlink(missing_ok=True)
    junk = bytes(1 << 20)
    with open(folder / "room", "wb", buffering=0) as stream:
        for _ in range(size // len(junk) + 1):
            stream.write(junk)
    (folder / "room").unlink()


def _two_threads(files: list[Path], folder: Path, rounds: int) -> None:
    """Wall time of one and two threads on two cores, one of which another process keeps busy."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        print("\ntwo threads: needs two cores")
        return
    all_cores = os.sched_getaffinity(0)
    cores = sorted(all_cores)[:2]
    spinner = multiprocessing.get_context("spawn").Process(target=_spin, args=(cores[1],), daemon=True)
    spinner.start()
    os.sched_setaffinity(0, cores)
    share, out = [1 / len(files)] * len(files), folder / _OUT
    work = {count: partial(combine, files, share, out, threads=int(count)) for count in ("1", "2")}
    try:
        times = in_turn(work, rounds, time.perf_counter, partial(_make_room, folder, files[0].stat().st_size))
    finally:
        os.sched_setaffinity(0, all_cores)
        spinner.terminate()
        spinner.join()
    one, two = map(statistics.median, times.values())
    ratio = median_ratio(times["2"], times["1"])
    print(f"\none core of two busy: one thread {one:.3f} s, two threads {two:.3f} s wall, ratio {ratio:.2f}")


def _spin(core: int) -> None:
    os.sched_setaffinity(0, [core])
    while os.getppid() != 1:
        for _ in range(1_000_000):
            pass


def _memory(files: list[Path], folder: Path, size: int) -> None:
    """Anonymous memory beyond that of the imports, at its peak, each number of checkpoints in a fresh process."""
    if not measures_memory():
        print("\nmemory: needs Linux")
        return
    print("\nextra anonymous memory, MiB")
    context = multiprocessing.get_context("spawn")
    for count, threads in ((2, 1), (8, 1), (32, 1), (32, 2)):
        given = [files[i % len(files)] for i in range(count)]
        with context.Pool(1) as pool:
            extra = pool.apply(_peak, (given, folder / _OUT, threads))
        print(f"{count:4} checkpoints, {threads} threads{extra:8.1f}")


def _peak(files: list[Path], out: Path, threads: int) -> float:
    return extra_memory(lambda: combine(files, [1 / len(files)] * len(files), out, threads=threads))


if __name__ == "__main__":
    main(sys.argv[1:])
