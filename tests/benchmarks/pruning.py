"""What magnitude pruning costs: the threshold, the whole of prune_, applying masks, and masks in a training step.

    python -m tests.benchmarks.pruning

On the matrices of ViT-B, 90 % pruned over all of them, on one thread, in CPU time. The limit of a threshold is one read
of the weights, that of masks an in-place add. All run in turn in each round; a ratio is the median of the ratios within
the rounds. torch's own ``global_unstructured`` takes long, so it runs once. Memory is that of a process of its own.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_soup.callbacks.pruned_weights import PrunedWeights
from lightning_soup.layers.prunable_weights import prunable
from lightning_soup.layers.pruning import prune_
from lightning_soup.layers.thresholds import kth_smallest
from tests.benchmarks.measures import Work, extra_memory, in_turn, measures_memory, median_ratio, print_ratios

_AMOUNT = 0.9
_READ = "one read of the weights"
_PEERS = ("kth_smallest", "prune_", "torch.kthvalue", "global_unstructured")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds; one more goes before to warm up")
    parser.add_argument("--model", default="vit_base_patch16_224", help="a timm model, for its shapes only")
    parser.add_argument("--trained", default="vit_small_patch16_224", help="a timm model for the training step")
    parser.add_argument("--images", type=int, default=4, help="a batch of the training step")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shapes = _shapes(options.model)
    weights = _weights(shapes)
    print(f"{options.model}: {len(shapes)} matrices, {sum(w.numel() for w in weights.values()) / 1e6:.1f} M weights")
    _thresholds(weights, options.rounds)
    _alone(shapes)
    print_ratios("applying masks", _applying(weights), options.rounds)
    _training(options.trained, options.images, options.rounds)


def _shapes(model: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in prunable(timm.create_model(model, num_classes=0)).items()}


def _weights(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Of other scales in each matrix, as training makes them."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.empty(shape).normal_(0, 0.01 + 0.03 * number / len(shapes), generator=draw)
        for number, (name, shape) in enumerate(shapes.items())
    }


# -------------------------------------------------------------------------------------------------------------- pruning


def _work(name: str, weights: dict[str, Tensor]) -> Work:
    tensors = list(weights.values())
    k = round(_AMOUNT * sum(tensor.numel() for tensor in tensors))
    if name == _READ:
        return lambda: [tensor.sum() for tensor in tensors]
    if name == "kth_smallest":
        return lambda: kth_smallest(tensors, k, absolute=True)
    if name == "prune_":
        return lambda: prune_(weights, _AMOUNT)
    if name == "torch.kthvalue":
        return lambda: torch.cat([tensor.reshape(-1).abs() for tensor in tensors]).kthvalue(k)
    layers = [(nn.ParameterDict({"weight": nn.Parameter(tensor)}), "weight") for tensor in tensors]
    return lambda: prune.global_unstructured(layers, prune.L1Unstructured, amount=_AMOUNT)


def _thresholds(weights: dict[str, Tensor], rounds: int) -> None:
    kept = {name: tensor.clone() for name, tensor in weights.items()}

    def restore() -> None:
        for name, tensor in weights.items():
            tensor.copy_(kept[name])

    names = (_READ, *_PEERS[:3])
    print_ratios("90 % of all weights", {name: _work(name, weights) for name in names}, rounds, before=restore)
    restore()


def _alone(shapes: dict[str, torch.Size]) -> None:
    """Each in a fresh process."""
    if not measures_memory():
        print("\nmemory: needs Linux")
        return
    print(f"\n{'once, in a process of its own':50}{'x one read':>11}{'extra MiB':>11}")
    for name in _PEERS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            ratio, extra = pool.apply(_once, (name, shapes))
        print(f"  {name:48}{ratio:11.1f}{extra:11.1f}")


def _once(name: str, shapes: dict[str, torch.Size]) -> tuple[float, float]:
    torch.set_num_threads(1)
    for known in _PEERS:
        _work(known, {"w": torch.ones(9, 9)})()
    weights = _weights(shapes)
    read = in_turn({_READ: _work(_READ, weights)}, 5)[_READ]
    work, took = _work(name, weights), 0.0

    def measured() -> None:
        nonlocal took
        begin = time.process_time()
        work()
        took = time.process_time() - begin

    extra = extra_memory(measured)
    return median_ratio([took] * len(read), read), extra


# ---------------------------------------------------------------------------------------------------------------- masks


def _applying(weights: dict[str, Tensor]) -> dict[str, Work]:
    masks = prune_({name: tensor.clone() for name, tensor in weights.items()}, _AMOUNT)
    tensors, others = list(weights.values()), [torch.zeros_like(tensor) for tensor in weights.values()]
    gone, shares = [~mask for mask in masks.values()], [mask.float() for mask in masks.values()]
    return {
        "in-place add": lambda: [tensor.add_(other) for tensor, other in zip(tensors, others, strict=True)],
        "Masks.apply_": lambda: masks.apply_(weights),
        "_foreach_mul_ with masks of floats": lambda: torch._foreach_mul_(tensors, shares),
        "masked_fill_": lambda: [tensor.masked_fill_(mask, 0) for tensor, mask in zip(tensors, gone, strict=True)],
    }


def _training(model: str, images: int, rounds: int) -> None:
    module = timm.create_model(model, num_classes=10)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    x, y = torch.randn(images, *module.default_cfg["input_size"]), torch.arange(images) % 10
    pruned = PrunedWeights(module)
    pruned.masks = prune_(pruned.tensors, _AMOUNT)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()

    def masking() -> None:
        pruned.mask_gradients()
        pruned.mask_optimizer(optimizer)

    step()
    print_ratios(
        f"{model}, training step with AdamW, {images} images",
        {"step": step, "masks on weights, gradients and both moments": masking},
        rounds,
    )


if __name__ == "__main__":
    main()
