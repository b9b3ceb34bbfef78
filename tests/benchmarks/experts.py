"""What experts cost, beside the plain network: the layer, the averaging step, a training step and an evaluation step.

    python -m tests.benchmarks.experts

At the size of ViT-S (384, 1536), four experts, one thread, CPU time. All run in turn in each round; a ratio is the
median of the ratios within the rounds. The averaging step is that of six layers, more than the caches hold.

One batched product instead of a loop over experts is shown for comparison: it took 1.01 × the plain network for 3152
tokens where the layer took 0.96 ×, and 2.27 × for 197 where the layer took 1.26 ×.
"""

import argparse
import copy
import os
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from torch import Tensor, nn

from lightning_soup.layers import RandomUniformMoE, average_experts_, use_experts
from lightning_soup.layers.conversion import experts_of
from tests.benchmarks.measures import Work, print_ratios

WIDTH, HIDDEN, EXPERTS, LAYERS = 384, 1536, 4, 6


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=4, help="a batch of the training and evaluation steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for tokens in (3152, 197):
        print_ratios(f"layer, forward and backward, {tokens} tokens", _layers(tokens), options.rounds)
    print_ratios(f"averaging step, {LAYERS} layers", _averaging(), options.rounds)
    print_ratios(f"ViT-S, training step, {options.images} images", _steps(options.images, train=True), options.rounds)
    print_ratios(
        f"ViT-S, evaluation step, {options.images} images", _steps(options.images, train=False), options.rounds
    )


def _mlp() -> nn.Module:
    return timm.layers.Mlp(WIDTH, HIDDEN)


class Masked(nn.Module):
    """A mask for each expert, as routers do it."""

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        expert_of = torch.randperm(x.shape[1]) % len(self.experts)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = expert_of == number
            out[:, mask] = expert(x[:, mask])
        return out


class Everywhere(Masked):
    """Every expert on every token, with weights 0 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        expert_of = torch.randperm(x.shape[1]) % len(self.experts)
        parts = [expert(x) * (expert_of == number).view(1, -1, 1) for number, expert in enumerate(self.experts)]
        return sum(parts[1:], parts[0])


class Batched(nn.Module):
    """One batched product for all experts. They own their weights, as averaging and conversion need: stacked anew.

    Parts of unequal length are padded with the last tokens again.

    Args:
        experts: As made by :func:`_mlp`.
        stacked: Stack the weights once, which is what the products alone cost.
    """

    def __init__(self, experts: nn.ModuleList, stacked: bool) -> None:
        super().__init__()
        self.experts = experts
        self.once = [nn.Parameter(weights.detach()) for weights in self.stack()] if stacked else None

    def stack(self) -> list[Tensor]:
        layers = [[getattr(expert, name) for expert in self.experts] for name in ("fc1", "fc2")]
        return [torch.stack([getattr(m, kind) for m in row]) for row in layers for kind in ("weight", "bias")]

    def forward(self, x: Tensor) -> Tensor:
        first, first_bias, second, second_bias = self.once or self.stack()
        count, tokens = len(self.experts), x[0]
        order = torch.randperm(len(tokens))
        length = -(-len(tokens) // count)
        padded = torch.cat([order, order[len(tokens) - count * length :]]) if len(tokens) % count else order
        parts = tokens.index_select(0, padded).view(count, length, -1)
        hidden = nn.functional.gelu(torch.baddbmm(first_bias.unsqueeze(1), parts, first.mT))
        done = torch.baddbmm(second_bias.unsqueeze(1), hidden, second.mT).flatten(0, 1)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return done.index_select(0, back).unsqueeze(0)


def _layers(tokens: int) -> dict[str, Work]:
    x = torch.randn(1, tokens, WIDTH, requires_grad=True)
    moe = RandomUniformMoE.from_dense(_mlp(), EXPERTS)

    def both(layer: nn.Module) -> Work:
        return lambda: layer(x).sum().backward()

    return {
        "plain network": both(_mlp()),
        "RandomUniformMoE": both(moe),
        "one batched product": both(Batched(copy.deepcopy(moe.experts), stacked=False)),
        "the same, its weights stacked once": both(Batched(copy.deepcopy(moe.experts), stacked=True)),
        "a mask for each expert": both(Masked(copy.deepcopy(moe.experts))),
        "every expert on every token": both(Everywhere(copy.deepcopy(moe.experts))),
    }


def _averaging() -> dict[str, Work]:
    layers = [[_mlp() for _ in range(EXPERTS)] for _ in range(LAYERS)]
    source = [parameter.detach() for experts in layers for expert in experts for parameter in expert.parameters()]
    target = [torch.empty_like(tensor) for tensor in source]

    def by_state_dict(experts: list[nn.Module]) -> None:
        states = [{name: value.clone() for name, value in expert.state_dict().items()} for expert in experts]
        for number, expert in enumerate(experts):
            others = [state for other, state in enumerate(states) if other != number]
            mixed = {n: 0.9 * v + 0.1 / 3 * sum(other[n] for other in others) for n, v in states[number].items()}
            expert.load_state_dict(mixed)

    return {
        "one read and one write of the experts": lambda: [t.copy_(s) for s, t in zip(source, target, strict=True)],
        "average_experts_": lambda: [average_experts_(experts, 0.1) for experts in layers],
        "state dict by state dict": lambda: [by_state_dict(experts) for experts in layers],
    }


def _steps(images: int, train: bool) -> dict[str, Work]:
    x, y = torch.randn(images, 3, 224, 224), torch.arange(images)
    work: dict[str, Work] = {}
    for name in ("dense", "EWA, every other layer", "EWA, all layers"):
        model = timm.create_model("vit_small_patch16_224", num_classes=10)
        if name != "dense":
            use_experts(model, EXPERTS, "all" if "all" in name else "every_other")
        layers = list(experts_of(model).values())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(model=model, layers=layers, optimizer=optimizer) -> None:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            for layer in layers:
                average_experts_(layer.experts, 0.1)

        def evaluate(model=model) -> None:
            with torch.no_grad():
                model(x)

        model.train(train)
        work[name] = step if train else evaluate
    return work


if __name__ == "__main__":
    main()
