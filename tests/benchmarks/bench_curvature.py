"""What the largest eigenvalue and the trace cost beyond the Hessian products that they need.

    python -m tests.benchmarks.bench_curvature --steps 30

Each method is compared with as many plain products of the same objective. All run in turn in each round; a ratio is the
median of the ratios within the rounds. CPU times on one thread, of a small ViT with its graph kept, the worst case: a
product costs least then.
"""

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from lightning_soup.landscape import Objective, hessian_top_eigenvalues, hessian_trace
from lightning_soup.modules import ImageClassifier
from tests.benchmarks.measures import print_ratios


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the objective, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128, help="of the ViT")
    parser.add_argument("--depth", type=int, default=4, help="of the ViT")
    parser.add_argument("--samples", type=int, default=[16, 64], nargs="+", help="images in the batch")
    parser.add_argument("--steps", type=int, default=30, help="Lanczos' steps and probes of the trace")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; one more goes before to warm up")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "embed_dim": options.width, "depth": options.depth, "num_heads": 4}
    module = ImageClassifier("vit_tiny_patch16_224", img_size=32, model_args=sizes)
    for samples in options.samples:
        batch = torch.randn(samples, 3, 32, 32), torch.arange(samples) % 10
        objective = Objective.of_module(module, [batch])
        _report(objective, f"{samples} images, {objective.size / 1e6:.2f} M parameters", options.steps, options.rounds)


def _report(objective: Objective, title: str, steps: int, rounds: int) -> None:
    vector = torch.randn(objective.size)

    def top() -> None:
        found = hessian_top_eigenvalues(objective, steps, max_steps=steps)  # as many values take all steps
        assert found.steps == steps

    work = {
        f"{steps} products": lambda: [objective.product(vector) for _ in range(steps)],
        f"top eigenvalue, {steps} steps": top,
        f"trace, {steps} probes": lambda: hessian_trace(objective, max_probes=steps, min_probes=steps),
    }
    print_ratios(f"{title}: CPU time, in units of the products", work, rounds)


if __name__ == "__main__":
    main()
