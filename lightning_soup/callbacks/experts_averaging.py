"""ExpertsWeightAveraging: train feed-forward networks as experts that are averaged, ship the plain network."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import SGD

from lightning_soup.callbacks import expert_files
from lightning_soup.callbacks.experts_checks import check_experts, check_options, check_others, owner_of
from lightning_soup.callbacks.experts_conversion import convert_with_averages
from lightning_soup.callbacks.schedule import Schedule, When, planned_time
from lightning_soup.callbacks.steps import OptimizerSteps
from lightning_soup.callbacks.strategies import check_strategy
from lightning_soup.callbacks.weights_only import take_off
from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.layers.conversion import convert_to_dense, experts_of, replace_networks, unwrapped
from lightning_soup.layers.experts import average_experts_, check_share_rate, expert_spread
from lightning_soup.layers.feed_forward import Layers, some
from lightning_soup.layers.moe import RandomUniformMoE
from lightning_soup.layers.topk_moe import TopKMoE

ShareRate = Callable[[int, int], float]
"""β at a step, counted from 0, of so many."""

_FAR = 0.1  # spread from which the mean network may not do what its experts did


class ExpertsWeightAveraging(Callback):
    """EWA: in training, feed-forward networks are N experts each; what is evaluated and shipped is the plain model.

    Add it to any training of a ViT. Before the optimizer is made, the chosen feed-forward networks become
    :class:`.RandomUniformMoE`: N networks of the same shape that share the tokens out at random, at the cost of one.
    After every optimizer step the experts move towards their mean by the share rate β
    (:func:`.average_experts_`). Validation sees the mean network, and when the fit ends the model has its former
    architecture, keys and cost again, with the mean weights.

    Checkpoints hold the plain model under ``state_dict``, so that ``load_from_checkpoint`` of any module, ``test`` and
    other loaders find what they know, and the experts under ``current_model_state``, from which training resumes.
    ``open_checkpoint(path, which="raw")`` gives those. Files of weights only hold the plain model alone. Training and
    its optimizer state need memory for N networks. After a fit that failed, the module is plain, too.

    A frozen network is left plain. What is frozen in the experts is not averaged, until it is unfrozen. A
    :class:`.LiveAverage` beside this callback is one of the plain model in files and, after the fit, in tests.

    A model with :class:`.TopKMoE` layers, which have routers, gets the same averaging and keeps its experts: then
    ``layers``, ``init``, ``target`` and ``scope`` have no meaning. Averaging early only is ``stop_at``.

    Args:
        num_experts: N, 2 or more.
        layers: Which feed-forward networks: ``all``, ``every_other`` (the second, the fourth, …), ``last_k``, or
            numbers from 0.
        share_rate: β, at most (N − 1)/N.
        schedule: How β gets there. ``linear``: from 0 over the first half of the training. ``constant``: at once. Or a
            function of the step, from 0, and their number.
        init: ``copy``: experts begin as the network that was there, so that weights worth keeping are kept.
            ``independent``: each is drawn anew, for training from scratch.
        stop_at: Experts are averaged up to here only: optimizer steps, a fraction, or text (``"2 epochs"``).
        target: Patterns of the modules to replace, where they are not called ``mlp`` or ``ffn``.
        scope: As of :class:`.RandomUniformMoE`.

    Raises:
        UnsupportedSetup: Before training: an option has no meaning, no network is found, one cannot be replaced or all
            are frozen, the strategy shards parameters, an optimizer lacks the experts, or the checkpoint is of other
            experts.

    Source: Huang et al., Experts Weights Averaging (arXiv 2308.06093). There is no official code; the schedule and the
    layers are our choice.
    """

    def __init__(
        self,
        num_experts: int = 4,
        layers: Layers = "every_other",
        share_rate: float = 0.3,
        schedule: Literal["linear", "constant"] | ShareRate = "linear",
        init: Literal["copy", "independent"] = "copy",
        stop_at: When | None = None,
        target: list[str] | None = None,
        scope: Literal["tokens", "positions"] = "tokens",
    ) -> None:
        self.num_experts, self.layers, self.share_rate, self.schedule = num_experts, layers, share_rate, schedule
        self.init, self.target, self.scope = init, target, scope
        check_options(self, stop_at)
        self._open = Schedule(0, stop_at, 1, owner=type(self).__name__)
        self._experts: dict[str, RandomUniformMoE | TopKMoE] = {}
        self._steps_done = 0
        self._loaded: dict[str, Any] | None = None
        self._total: float | None = None
        self._optimizer = 0
        self._steps: OptimizerSteps | None = None

    @property
    def state_key(self) -> str:
        """Shown by Lightning where a file is resumed without this callback."""
        return (
            "ExpertsWeightAveraging (without this callback training cannot go on, for the optimizer's state in the "
            "file is of experts; begin a training from the plain model in it instead, which is its state_dict)"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Launchers pickle the Trainer before it runs: what belongs to a run stays here."""
        return {**self.__dict__, "_experts": {}, "_loaded": None, "_steps": None}

    # ------------------------------------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the networks, before optimizers are made and checkpoints are loaded."""
        if stage != "fit":
            return
        check_strategy(trainer, type(self).__name__, "experts are averaged whole", replicas=True)
        self._steps_done, self._loaded = 0, None
        check_others(trainer, self)
        take_off(trainer, self)  # of a fit that failed
        if _routed(pl_module):
            return
        if experts_of(pl_module):
            if not is_overridden("configure_model", pl_module):
                rank_zero_warn(
                    "ExpertsWeightAveraging: the model has experts already and goes on with them, so layers, init, "
                    "target and scope have no effect. lightning_soup.convert_to_dense(module) makes it plain again."
                )
        elif is_overridden("configure_model", pl_module) and not any(True for _ in pl_module.parameters()):
            pass  # made there, or missed in on_fit_start
        else:
            self._replace(pl_module)
        expert_files.follow(trainer, self, pl_module)

    def _replace(self, module: LightningModule) -> None:
        options = (self.num_experts, self.layers, self.init, self.target, self.scope)
        if frozen := replace_networks(module, *options)[1]:
            rank_zero_info(
                f"ExpertsWeightAveraging: frozen networks stay plain, also if they are unfrozen later: {some(frozen)}. "
                "To give them experts for then, list this callback before the one that freezes them."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizer that owns the experts."""
        self._experts = experts_of(pl_module) or _routed(pl_module)
        check_experts(pl_module, self._experts, self.num_experts)
        self._check_loaded()
        self._optimizer = owner_of(trainer, self._experts)
        self._steps = OptimizerSteps.of(trainer)
        self._steps.listen(self, partial(self._after_step, trainer), phase="mutate")
        first = next(iter(self._experts.values())).experts[0]
        count = sum(p.numel() for p in first.parameters()) * (self.num_experts - 1) * len(self._experts)
        rank_zero_info(
            f"ExpertsWeightAveraging: {len(self._experts)} feed-forward networks have {self.num_experts} experts each "
            f"while training ({count / 1e6:,.1f} M more parameters)."
        )
        if any(p.dtype.itemsize < 4 for p in first.parameters()):
            rank_zero_warn(
                "ExpertsWeightAveraging: the weights have 16 bits, in which the small steps of a small share rate are "
                "lost. Use a mixed precision ('bf16-mixed'), which keeps them in 32."
            )
        if isinstance(trainer.optimizers[self._optimizer], SGD):
            rank_zero_info(
                f"ExpertsWeightAveraging: under SGD an expert moves at 1/{self.num_experts} of the dense rate, for it "
                f"sees 1/{self.num_experts} of the tokens. Give experts {self.num_experts} × the rate, or use Adam."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The length of training is known now."""
        self._open.check(trainer)
        self._total = planned_time(trainer)
        if trainer.fast_dev_run:
            self._total = float(trainer.fast_dev_run)
        if self._loaded is None and len(trainer.optimizers) == 1:
            self._steps_done = trainer.global_step  # a Trainer that goes on counts on, as its epochs do
        if self.schedule == "linear" and self._total is None:
            by_hand = not pl_module.automatic_optimization
            raise UnsupportedSetup(
                "schedule='linear' needs to know how many steps training has, but "
                + ("optimization is by hand" if by_hand else "it is endless. Set max_steps or max_epochs")
                + ". Or give schedule='constant', or a function of the step."
            )

    # ------------------------------------------------------------------------------------------------ during training

    def share_rate_at(self, step: int) -> float:
        """β after optimizer step number ``step``, from 0."""
        if callable(self.schedule):
            beta = self.schedule(step, int(self._total or 0))
            check_share_rate(beta, self.num_experts)
            return beta
        if self.schedule == "constant":
            return self.share_rate
        return self.share_rate * min(1.0, step / max(self._total / 2, 1.0))

    def _after_step(self, trainer: Trainer, optimizer: int) -> None:
        if optimizer != self._optimizer:
            return
        step = self._steps_done
        self._steps_done += 1
        if not self._open.open(trainer, self._steps_done):
            return
        beta = self.share_rate_at(step)
        for layer in self._experts.values():
            average_experts_(_trained(layer.experts), beta)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how far experts are apart, in the weights that are validated: live averages stand there by now."""
        if trainer.barebones:  # logs nothing, and warns of each attempt
            return
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._steps_done:
            self.log("ewa/spread", self.spread, sync_dist=False, rank_zero_only=True)

    @property
    def spread(self) -> float:
        """‖W − W̄‖ / ‖W‖ of the layer where experts are farthest apart; NaN where one has diverged."""
        spreads = [expert_spread(layer.experts) for layer in self._experts.values()]
        return math.nan if any(map(math.isnan, spreads)) else max(spreads, default=0.0)

    # ------------------------------------------------------------------------------------------------------------ end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the model its former architecture, with the mean weights.

        Raises:
            NonFiniteWeights: An expert has a NaN or an infinite value.
        """
        spread = self.spread if experts_of(pl_module) else 0.0  # routed experts are not merged
        self._experts = {}
        if math.isnan(spread):
            convert_to_dense(pl_module)
            raise NonFiniteWeights(
                "ExpertsWeightAveraging: an expert has a NaN or an infinite value, and so has the mean: training has "
                "diverged. Lower the learning rate or clip gradients; checkpoints from before are unharmed."
            )
        if experts_of(pl_module):
            convert_with_averages(trainer, pl_module)
        if spread > _FAR:
            rank_zero_warn(
                f"ExpertsWeightAveraging: the experts ended {spread:.0%} apart, so the mean network may do something "
                "else than they did. Raise share_rate, or average to the end (stop_at)."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the optimizers go."""
        if stage != "fit":
            return
        convert_to_dense(pl_module)  # where Lightning's tuner has ended the fit before it began
        if self._steps is not None:
            self._steps.stop(self)
            self._steps = None
        take_off(trainer, self)

    # ---------------------------------------------------------------------------------------------------------- files

    def state_dict(self) -> dict[str, Any]:
        """How many steps there were, and which experts; β follows from the step."""
        return {"steps": self._steps_done, "layers": list(self._experts), "num_experts": self.num_experts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the count of steps."""
        self._loaded = dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Resume from experts. A training without them cannot go on with them: its optimizer knows none."""
        states = checkpoint.get("callbacks", {})
        for key in [key for key in states if str(key).startswith("ExpertsWeightAveraging")]:
            states[self.state_key] = states.pop(key)  # its explanation may have had other words
        resumed = trainer.state.fn == "fit" and bool(checkpoint.get("optimizer_states")) and experts_of(pl_module)
        if resumed and self.state_key not in states:
            raise UnsupportedSetup(
                "The checkpoint is of a training without ExpertsWeightAveraging, which cannot go on with experts. "
                "Begin a training from its weights instead: load them into the module, and give no ckpt_path."
            )
        if trainer.state.fn == "fit":
            expert_files.restore_experts(pl_module, checkpoint, self.layers)

    def _check_loaded(self) -> None:
        if self._loaded is None:
            return
        theirs, ours = list(self._loaded["layers"]), list(self._experts)
        if theirs and theirs != ours:
            raise UnsupportedSetup(
                f"the checkpoint has experts at {', '.join(theirs)}, but layers={self.layers!r} puts them at "
                f"{', '.join(ours)}. Resume with the layers of the first time."
            )
        self._steps_done = self._loaded["steps"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say where experts are; when all is gathered, the plain model is put first (:class:`.PlainFirst`)."""
        expert_files.note(checkpoint, pl_module)


def _trained(experts: nn.ModuleList) -> Sequence[nn.Module]:
    """What is averaged: what is trained. Rounding would move the rest, which has to stay."""
    if all(parameter.requires_grad for parameter in experts.parameters()):
        return experts
    return [nn.ParameterList(p for p in expert.parameters() if p.requires_grad) for expert in experts]


def _routed(module: LightningModule) -> dict[str, TopKMoE]:
    """The layers of experts with routers, by path."""
    return {unwrapped(name): part for name, part in module.named_modules() if isinstance(part, TopKMoE)}
