"""What a training of replicas ends with: their mean, the best of them, or all as they are."""

import math
from typing import Literal

import torch
import xxhash
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_soup.distributed.ranks import Ranks
from lightning_soup.errors import NonFiniteScore, NonFiniteWeights
from lightning_soup.evaluation.fit_evaluator import FitEvaluator
from lightning_soup.weights.weights_file import metric_prefixes

__all__ = ["saved_tensors", "take_best", "take_mean"]


def saved_tensors(module: LightningModule) -> dict[str, Tensor]:
    """Parameters and buffers that a state dict holds, tied ones once, those of metrics left out; they share memory."""
    counted, seen, found = metric_prefixes(module), set(), {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not name.startswith(counted) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


@torch.no_grad()
def take_mean(module: LightningModule, ranks: Ranks) -> None:
    """Give every rank the mean of all replicas; of counters and other whole numbers the largest.

    Raises:
        NonFiniteWeights: On all ranks, where one of them holds NaN or an infinity that the others do not.
    """
    tensors = saved_tensors(module)

    infinities = ranks.object_from(ranks.members[0], _infinities(tensors))  # masks of −inf are alike on all

    def check() -> None:
        own = _infinities(tensors)
        for name, tensor in tensors.items():
            odd = "NaN" if tensor.isnan().any() else "an infinity"
            if odd == "NaN" or own.get(name) != infinities.get(name):
                raise NonFiniteWeights(
                    f"{name} holds {odd} at the end of training, so there is no mean of the replicas. Train with a "
                    "smaller lr or with clipped gradients; final='all' ends without a mean."
                )

    ranks.agree(check)
    ranks.mean_(tensors.values())
    if any(isinstance(part, _BatchNorm) for part in module.modules()):
        rank_zero_warn(
            "ReplicaStrategy: the mean of the replicas has the mean of their BatchNorm statistics, which need not fit "
            "it. Estimate them anew from training data (`lightning-soup soup --recalibrate`, or torch's update_bn)."
        )


def _infinities(tensors: dict[str, Tensor]) -> dict[str, str]:
    """By tensor that has some, a digest of where they lie."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.isinf().any():
            real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            signs = torch.where(real.isinf(), real.sign(), 0).to("cpu", torch.int8)
            found[name] = xxhash.xxh3_128_hexdigest(signs.contiguous().numpy())
    return found


@torch.no_grad()
def take_best(
    trainer: Trainer, module: LightningModule, ranks: Ranks, metric: str, mode: Literal["min", "max"]
) -> list[float]:
    """Give every rank the replica that scores best on the validation data of all ranks, and give all scores.

    Each replica in turn goes to all ranks, which validate it together.

    Raises:
        NonFiniteScore: No replica has a score that is a number.
    """
    tensors = saved_tensors(module)
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    evaluator = FitEvaluator(trainer, module, metric, mode)
    sign = 1 if mode == "max" else -1
    scores = []
    for rank in ranks.members:
        _share(tensors, own, ranks, rank)
        try:
            scores.append(sign * evaluator._signed(evaluator.metrics()))
        except NonFiniteScore:
            scores.append(math.nan)
    known = [number for number, score in enumerate(scores) if not math.isnan(score)]
    if not known:
        _restore(tensors, own)
        raise NonFiniteScore(f"the metric {metric!r} is NaN for all replicas, so there is no best one.")
    best = max(known, key=lambda number: sign * scores[number])
    _share(tensors, own, ranks, ranks.members[best])
    rank_zero_info(
        f"ReplicaStrategy: replica {ranks.members[best]} is the best: {metric} {scores[best]:.4g} of {_told(scores)}."
    )
    return scores


def _share(tensors: dict[str, Tensor], own: dict[str, Tensor], ranks: Ranks, source: int) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(ranks.send_from(source, own[name]))


def _restore(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(own[name])


def _told(scores: list[float]) -> str:
    return ", ".join(f"{score:.4g}" for score in scores)
