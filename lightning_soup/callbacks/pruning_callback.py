"""PruningCallback: the base of callbacks that prune, which keeps what is pruned at zero through training and resume."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_soup.callbacks.experts_averaging import ExpertsWeightAveraging
from lightning_soup.callbacks.pruned_weights import PrunedWeights
from lightning_soup.callbacks.steps import OptimizerSteps
from lightning_soup.callbacks.strategies import check_strategy
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.masks import Masks
from lightning_soup.layers.prunable_weights import unmatched
from lightning_soup.layers.pruning import check_selection, check_shapes


def is_lightnings_average(callback: Callback) -> bool:
    """Whether it is one of Lightning's averages, which cannot be pruned; by name, for versions that lack one."""
    return any(kind.__name__ in ("WeightAveraging", "StochasticWeightAveraging") for kind in type(callback).__mro__)


class PruningCallback(Callback):
    """Keeps one mask true, through any optimizer.

    After every optimizer step what is pruned is exactly zero: the weights, and what the optimizer remembers of them
    (momentum, moments). Gradients are masked before they are clipped. Masks are no part of the module: names, order and
    sharing of its parameters stay, and so do its files. They are in the callback's own state in checkpoints, one bit a
    weight.

    Args:
        sparsity: The share of the prunable weights that is pruned in the end; None: no more than is given.
        selection: What is pruned first; see :func:`.prune_`.
        exclude: Patterns of parameters that are not pruned; None: embeddings, tokens and temperatures.
        skip_first: Leave out the input layer: the first by order of registration; refused where that does not tell.
        skip_head: Leave out the last layer, likewise.
        seed: Of the selection ``random``.
    """

    def __init__(
        self,
        sparsity: float | None,
        selection: str,
        exclude: Sequence[str] | None,
        skip_first: bool,
        skip_head: bool,
        seed: int,
    ) -> None:
        check_selection(selection)
        if isinstance(exclude, str):
            raise UnsupportedSetup(f"exclude={exclude!r}: expected a list of patterns: [{exclude!r}].")
        self.sparsity = None if sparsity is None else float(sparsity)
        self.selection, self.seed = selection, seed
        self.exclude = None if exclude is None else list(exclude)
        self.skip_first, self.skip_head = skip_first, skip_head
        self._pruned: PrunedWeights | None = None
        self._resumed: dict[str, Any] | None = None
        self._made_with: dict[str, Any] = {}  # the options of the fit that is resumed
        self._steps: OptimizerSteps | None = None

    replicas: ClassVar[bool] = False
    """Whether it can work on the models of several replicas."""

    def __getstate__(self) -> dict[str, Any]:
        """Launchers pickle the Trainer before it runs: what belongs to a run stays here."""
        return {**self.__dict__, "_pruned": None, "_resumed": None, "_steps": None}

    @property
    def masks(self) -> Masks | None:
        """The masks, once the fit has begun."""
        return self._pruned.masks if self._pruned else None

    @property
    def sparsity_reached(self) -> float:
        """The share of the prunable weights that is pruned, counted from the masks."""
        return self._pruned.masks.sparsity if self._pruned else 0.0

    # ------------------------------------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies and callbacks under which masks cannot hold."""
        if stage != "fit":
            return
        name = type(self).__name__
        self._resumed, self._made_with = None, {}
        check_strategy(trainer, name, "masks are laid over whole parameters", replicas=self.replicas)
        for callback in trainer.callbacks:
            kind = type(callback).__name__
            if any(base.__name__ == "ModelPruning" for base in type(callback).__mro__):
                raise UnsupportedSetup(
                    f"{kind} of Lightning stands beside {name}. It moves weights to other names and another order, "
                    f"forgets its masks in checkpoints, and prunes its amount again in each epoch. Remove it: {name} "
                    "prunes alone."
                )
            if isinstance(callback, ExpertsWeightAveraging):
                raise UnsupportedSetup(
                    f"{kind} stands beside {name}: averaging experts, each with its own mask, fills what is pruned. "
                    "Train with experts first, and prune the plain network in a fit of its own."
                )
            if callback is not self and isinstance(callback, PruningCallback):
                raise UnsupportedSetup(f"{name} stands beside another {kind}, and both prune. Keep one of them.")
        if any(True for _ in pl_module.parameters()):  # else they are made in configure_model
            self._find_weights(pl_module)

    def _find_weights(self, module: LightningModule) -> PrunedWeights:
        found = PrunedWeights(module, self.exclude, self.skip_first, self.skip_head)
        if self.sparsity is not None:
            check_shapes(found.tensors, self.selection, self.sparsity)
        return found

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights on their device, and lay the masks of a checkpoint or of an earlier fit over them."""
        self._check_options()
        earlier = self._pruned
        self._pruned = self._find_weights(pl_module)
        self._tell_what_may_not_be_meant(pl_module)
        if self._resumed is not None:
            self._pruned.resume(self._resumed, "the checkpoint")
        elif earlier is not None and earlier.is_of(self._pruned.tensors):
            self._pruned.masks = earlier.masks  # in another fit of the same module what is pruned stays so
        self._pruned.mask_weights()

    def _tell_what_may_not_be_meant(self, module: LightningModule) -> None:
        """Patterns, order and freezing decide on layers that the user may not have thought of."""
        name, tensors = type(self).__name__, self._pruned.tensors
        if self._pruned.skipped:
            rank_zero_info(f"{name}: not pruned is {' or '.join(self._pruned.skipped)} (skip_first, skip_head).")
        if useless := unmatched(module, self.exclude or ()):
            rank_zero_warn(
                f"{name}: exclude={useless} fits no parameter of {type(module).__name__}, so it leaves out nothing. "
                f"Names are such as {', '.join(list(tensors)[:3])}; * stands for any part."
            )
        frozen = [name for name, tensor in tensors.items() if not tensor.requires_grad]
        if frozen and self.sparsity is not None:
            rank_zero_warn(
                f"{name}: {len(frozen)} of the {len(tensors)} weights to prune are frozen: {', '.join(frozen[:3])}"
                f"{', …' if len(frozen) > 3 else ''}. They are pruned too, and no training makes up for it. Leave them "
                "out (exclude), or let them train."
            )

    def _options(self) -> dict[str, Any]:
        """What must be the same when a fit is resumed, as plain values."""
        seed = {"seed": int(self.seed)} if self.selection == "random" else {}
        return {"selection": self.selection, **seed}

    def _check_options(self) -> None:
        own, made_with = self._options(), self._made_with
        other = [f"{n}={made_with[n]!r}, not {own[n]!r}" for n in own if n in made_with and made_with[n] != own[n]]
        if other:
            raise UnsupportedSetup(
                f"{type(self).__name__}: the checkpoint is of a fit with {', '.join(other)}. Resume it with the "
                "options it was made with, or begin a fit of its own from its weights, without ckpt_path."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """States of optimizers are loaded now."""
        for optimizer in trainer.optimizers:
            self._pruned.mask_optimizer(optimizer)
        self._steps = OptimizerSteps.of(trainer)
        self._steps.listen(self, partial(self._after_step, trainer), phase="mutate")

    # ------------------------------------------------------------------------------------------------ during training

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are unscaled now, and not yet clipped."""
        self._pruned.mask_gradients()

    def _after_step(self, trainer: Trainer, optimizer: int) -> None:
        self._pruned.mask_optimizer(trainer.optimizers[optimizer])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sparsity."""
        if trainer.state.fn == "fit" and not trainer.barebones:
            self.log("sparsity", self.sparsity_reached, sync_dist=False, rank_zero_only=True)

    # ------------------------------------------------------------------------------------------------------------ end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the masks have held."""
        if not self._pruned.holds():
            rank_zero_warn(
                f"{type(self).__name__}: something wrote to pruned weights after the last optimizer step. They are "
                "zero again."
            )
            self._pruned.mask_weights()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follow the optimizers no more; the masks stay, to be looked at."""
        if self._steps is not None:
            self._steps.stop(self)
            self._steps = None

    # ---------------------------------------------------------------------------------------------------------- files

    def state_dict(self) -> dict[str, Any]:
        """The masks, one bit a weight, and the options they were made with."""
        masks = {} if self._pruned is None else {"masks": self._pruned.masks.state()}
        return {**masks, "options": self._options()}

    def _check_state(self, state: Mapping[str, Any], keys: Iterable[str]) -> None:
        """Refuse the state of a damaged checkpoint, or of another version."""
        if missing := [key for key in keys if key not in state]:
            raise UnsupportedSetup(
                f"{type(self).__name__}: its state in the checkpoint lacks {', '.join(missing)}: the file is damaged, "
                "or was written by another version of lightning_soup. Resume from another checkpoint, or begin a fit "
                "of its own from its weights, without ckpt_path."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the masks of a checkpoint."""
        self._resumed, self._made_with = state_dict.get("masks"), state_dict.get("options", {})
