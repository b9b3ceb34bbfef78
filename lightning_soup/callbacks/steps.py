"""The one signal of the package for "an optimizer step really happened".

Lightning has no hook after the optimizer's step: ``on_before_zero_grad`` shows the previous step's weights and never
fires in manual optimization, and ``global_step`` adds up all optimizers, counts steps that the gradient scaler skipped
and misses raw optimizers. torch's own post-step hook is exact, so everything here listens to it.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary, ref

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightning_soup.errors import UnsupportedSetup

Phase = Literal["mutate", "observe"]
Listener = Callable[[int], None]


class OptimizerSteps:
    """Tells callbacks of one Trainer about each real optimizer step, in two phases.

    Whatever the order of the Trainer's callbacks, those that *mutate* weights after a step (masks, averaged experts,
    outer steps) are called first and those that *observe* them (averages, trails) afterwards. Within a phase the order
    is that of the callback list. A listener is called with the index of the optimizer in ``trainer.optimizers``.

    Steps count wherever the module or a callback takes them in ``fit``: in ``training_step``, and in other hooks such
    as ``on_train_batch_end`` or ``on_validation_end``. Saving and loading sharded optimizer states takes one, too, but
    with a learning rate of 0, only to have the state: it does not count.

    Listen in ``on_fit_start`` and stop in ``teardown``::

        self._steps = OptimizerSteps.of(trainer)
        self._steps.listen(self, self._after_step, phase="observe")
        ...
        self._steps.stop(self)
    """

    _of: ClassVar["WeakKeyDictionary[Trainer, OptimizerSteps]"] = WeakKeyDictionary()

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = ref(trainer)
        self._listeners: dict[Phase, dict[int, Listener]] = {"mutate": {}, "observe": {}}
        self._hooks: list[Any] = []
        self._attached: list[Optimizer] = []

    @classmethod
    def of(cls, trainer: Trainer) -> "OptimizerSteps":
        """The signal of this Trainer, hooked to the optimizers that it has now."""
        steps = cls._of.get(trainer)
        if steps is None:
            steps = cls._of[trainer] = cls(trainer)
        steps.attach(trainer)
        return steps

    def attach(self, trainer: Trainer) -> None:
        """Follow the Trainer's optimizers; again after they were rebuilt.

        Raises:
            UnsupportedSetup: The Trainer has no optimizer to listen to.
        """
        optimizers = list(trainer.optimizers)
        if not optimizers:
            raise UnsupportedSetup(
                f"{type(trainer.lightning_module).__name__}.configure_optimizers returned no optimizer, so there is no "
                "step to follow. Return the optimizers that train the module, also those stepped by hand."
            )
        if len(optimizers) == len(self._attached) and all(map(_same, optimizers, self._attached)):
            return
        self._detach()
        self._attached = optimizers
        # Not a closure over the Trainer: the hook must not keep it alive, nor be pickled with the optimizer's owner.
        self._hooks = [optimizer.register_step_post_hook(self._stepped) for optimizer in optimizers]

    def listen(self, owner: object, listener: Listener, phase: Phase) -> None:
        """Call ``listener(optimizer_index)`` after each real step, until :meth:`stop`."""
        self._listeners[phase][id(owner)] = listener

    def stop(self, owner: object) -> None:
        """Call this owner no more. The optimizers are let go with the last one."""
        for listeners in self._listeners.values():
            listeners.pop(id(owner), None)
        if not any(self._listeners.values()):
            self._detach()

    def _detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._attached = [], []

    def _stepped(self, optimizer: Optimizer, *_: object) -> None:
        trainer = self._trainer()
        if trainer is None or not _in_fit(trainer) or not (_in_batch(trainer) or _moves(optimizer)):
            return
        # A fused optimizer is stepped by the gradient scaler even where it found an overflow, and then does nothing.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return
        index = next(i for i, other in enumerate(self._attached) if other is optimizer)
        for phase in ("mutate", "observe"):
            for listener in list(self._listeners[phase].values()):
                listener(index)


def _in_fit(trainer: Trainer) -> bool:
    return trainer.training or (trainer.validating and trainer.state.fn == "fit")


def _in_batch(trainer: Trainer) -> bool:
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return trainer.training and progress.started > progress.processed


def _moves(optimizer: Optimizer) -> bool:
    return any(float(group.get("lr", 1.0)) != 0.0 for group in optimizer.param_groups)


def _same(a: Optimizer, b: Optimizer) -> bool:
    return a is b
