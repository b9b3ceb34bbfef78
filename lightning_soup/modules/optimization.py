"""Parameter groups and the learning-rate schedule of fine-tuning."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from lightning_soup.errors import UnsupportedSetup

__all__ = ["adamw_with_cosine", "batches_in_all", "check_ranges", "parameter_groups", "warmup_cosine", "warmup_steps"]


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, layer_decay: float | None) -> list[dict]:
    """Groups for the optimizer: no weight decay on biases, norms and embeddings of position; lower rates below.

    Layer l of L gets the rate lr · layer_decay^(L − l), the head being layer L (Bao et al. 2022, BEiT).

    Args:
        model: A timm model: it names the parameters without decay and the order of its layers.
        lr: Rate of the last layer, and of all of them without ``layer_decay``.
        weight_decay: For the parameters that have any.
        layer_decay: Factor between one layer and the next; None: one rate for all.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    model = getattr(model, "_orig_mod", model)  # of torch.compile: the names of its parameters have a prefix
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    # Parts of it may be compiled too.
    spared |= {name for name, _ in model.named_parameters() if name.replace("_orig_mod.", "") in spared}
    if layer_decay is None:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spared)
    groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay)
    # timm leaves the scale for its own schedulers to apply; those of torch start from each group's rate.
    return [{**group, "lr": lr * group["lr_scale"]} for group in groups]


def warmup_steps(warmup: int | float, total_steps: int | float) -> int:
    """Steps of warm-up: as given where it is a whole number, else that fraction of the total.

    Raises:
        UnsupportedSetup: A fraction of a training without an end.
    """
    if isinstance(warmup, int):
        return warmup
    if math.isinf(total_steps):
        raise UnsupportedSetup(
            f"warmup={warmup} is a fraction of the training, but the Trainer has no last step (max_steps=-1 with no "
            "max_epochs, or a data set without a length). Set trainer.max_steps, or give warmup as a number of steps."
        )
    return round(warmup * total_steps)


def warmup_cosine(step: int, warmup: int, total_steps: int | float) -> float:
    """Factor of the learning rate: linear rise over ``warmup`` steps, then half a cosine down to 0 at the end.

    Step 0 already learns, with 1/``warmup`` of the rate. A training without an end keeps the full rate.

    Args:
        step: Optimizer steps made so far.
        warmup: Steps of the rise.
        total_steps: Steps of the training; may be infinite.
    """
    if step < warmup:
        return (step + 1) / warmup
    if math.isinf(total_steps):
        return 1.0
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress))


def batches_in_all(trainer: Trainer, steps_per_batch: int) -> int:
    """How many batches a training with manual optimization will see; ``max_steps`` counts optimizer steps there.

    Args:
        trainer: In ``configure_optimizers`` or later.
        steps_per_batch: Optimizer steps that are taken for each batch.

    Raises:
        UnsupportedSetup: A training without an end.
    """
    endless = math.isinf(trainer.estimated_stepping_batches)  # it also looks at the data
    limits = [] if trainer.max_steps < 0 else [math.ceil(trainer.max_steps / steps_per_batch)]
    if not endless and (trainer.max_epochs or -1) > 0:
        limits.append(trainer.num_training_batches * trainer.max_epochs)
    if not limits:
        raise UnsupportedSetup("schedule='linear' needs an end: give the Trainer max_steps or max_epochs.")
    return min(limits)


def adamw_with_cosine(module: LightningModule, groups: list[dict[str, Any]]) -> OptimizerLRScheduler:
    """What ``configure_optimizers`` returns: AdamW with warm-up and cosine, stepped with the optimizer.

    Args:
        module: Attached to a Trainer, with ``lr``, ``betas`` and ``warmup`` among its hyperparameters.
        groups: Groups of parameters.
    """
    hparams, trainer = module.hparams, module.trainer
    # The fused step takes 0.4 ms instead of 2.3 ms for a tiny ViT on a CPU. In mixed precision Lightning refuses to
    # clip gradients before it.
    refused = "mixed" in str(trainer.precision) and trainer.gradient_clip_val
    fused = module.device.type in ("cpu", "cuda") and not refused
    optimizer = torch.optim.AdamW(groups, lr=hparams.lr, betas=hparams.betas, fused=fused)
    total = trainer.estimated_stepping_batches
    total = float("inf") if total < 0 else total  # how Lightning says endless where the data has no length
    warmup = warmup_steps(hparams.warmup, total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def check_ranges(
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    warmup: int | float,
    label_smoothing: float = 0.0,
    mixup: float = 0.0,
    layer_decay: float | None = None,
) -> None:
    """Refuse settings that cannot work.

    Raises:
        UnsupportedSetup: A value is out of range.
    """
    expectations = (
        (lr > 0, f"lr={lr}: expected more than 0."),
        (weight_decay >= 0, f"weight_decay={weight_decay}: expected 0 or more."),
        (all(0 <= beta < 1 for beta in betas), f"betas={betas}: expected two numbers in [0, 1)."),
        (
            warmup >= 0 and (isinstance(warmup, int) or warmup < 1),
            f"warmup={warmup}: expected a number of steps (500), or a fraction of the training below 1 (0.1).",
        ),
        (layer_decay is None or 0 < layer_decay <= 1, f"layer_decay={layer_decay}: expected a number in (0, 1]."),
        (0 <= label_smoothing < 1, f"label_smoothing={label_smoothing}: expected a number in [0, 1)."),
        (mixup >= 0, f"mixup={mixup}: expected 0 or more."),
    )
    for holds, message in expectations:
        if not holds:
            raise UnsupportedSetup(message)
