"""What averaging during training costs: one update, and bringing the average into the module for validation.

    python -m tests.benchmarks.live_average --model vit_base_patch16_224

The limit of an update is one pass ``a += w * (b - a)`` over two flat buffers. All methods run in turn in each round; a
ratio is the median of the ratios within the rounds. With ``--busy`` another process takes a core meanwhile, and torch
may use all threads: wall time is what counts then.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence

import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_soup.callbacks.averaged_tensors import Group
from lightning_soup.callbacks.selected_tensors import select
from lightning_soup.callbacks.shadow import RunningMean
from tests.benchmarks.measures import Work, in_turn, median_ratio


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the module and its averages, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm model, for its shapes only")
    parser.add_argument("--rounds", type=int, default=9, help="rounds; one more goes before to warm up")
    parser.add_argument("--busy", action="store_true", help="another process takes a core")
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1 if options.busy else 1)
    module = _Holder(timm.create_model(options.model))
    count = sum(p.numel() for p in module.parameters())
    print(f"{options.model}: {count / 1e6:.1f} M parameters, {torch.get_num_threads()} threads")
    load = multiprocessing.get_context("fork").Process(target=_spin, daemon=True)
    if options.busy:
        load.start()
    try:
        _report("update", _updates(module, count), options.rounds)
        _report("into the module and out again", _exchanges(module, count), options.rounds)
    finally:
        if options.busy:
            load.kill()


class _Holder(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def _spin() -> None:
    while True:
        pass


def _group(module: LightningModule) -> Group:
    group = Group(0, select(module, (), (), False, "benchmark"), RunningMean())
    group.absorb(1.0)
    return group


def _updates(module: LightningModule, count: int) -> dict[str, Work]:
    a, b, group = torch.zeros(count), torch.ones(count), _group(module)
    stock = AveragedModel(module.model, avg_fn=get_ema_avg_fn(0.999))

    def limit() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        a.lerp_(b, 0.001)
        torch.set_num_threads(threads)

    return {
        "limit": limit,
        "ours": lambda: group.absorb(0.001),
        "Lightning's EMA": lambda: stock.update_parameters(module.model),
    }


def _exchanges(module: LightningModule, count: int) -> dict[str, Work]:
    a, b, group = torch.zeros(count), torch.ones(count), _group(module)
    stock = EMAWeightAveraging()
    stock._average_model = AveragedModel(module)

    def limit() -> None:
        for _ in range(2):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)

    def ours() -> None:
        group.place(exchange=True, check=False)
        group.put_back()

    def checked() -> None:
        group.place(exchange=True)
        group.put_back()

    def lightnings() -> None:
        stock._swap_models(module)
        stock._swap_models(module)

    return {"limit": limit, "ours": ours, "ours, NaN looked for": checked, "Lightning's EMA": lightnings}


def _report(title: str, methods: dict[str, Work], rounds: int) -> None:
    times = in_turn(methods, rounds, time.perf_counter)
    print(f"\n{title:32} {'ms':>9} {'x limit':>9} {'x ours':>9}")
    for name, values in times.items():
        of = [median_ratio(values, times[other]) for other in ("limit", "ours")]
        print(f"{name:32} {1e3 * statistics.median(values):9.2f} {of[0]:9.2f} {of[1]:9.1f}")


if __name__ == "__main__":
    main()
