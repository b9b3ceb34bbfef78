"""ZSCL: fine-tuning an image-text model on a task without losing what it knows of all others."""

import inspect
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_soup.data.reference import Reference
from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.classification import Batch, in_a_loop
from lightning_soup.modules.clip import CLIPClassifier
from lightning_soup.modules.distillation import feature_distillation, similarities, weight_consolidation
from lightning_soup.modules.teacher import Teacher
from lightning_soup.modules.zero_shot import evaluating, fill

__all__ = ["ZSCL"]

_STATE = "zscl"  # where checkpoints keep what is no weight


class ZSCL(CLIPClassifier):
    """A CLIPClassifier whose both towers learn one task of a sequence, held to its zero-shot self.

    ``L = L_CE + a·(L_img + L_txt) + λ·L_WC``. L_CE is the task's cross entropy, with one sentence a class. L_img and
    L_txt compare the similarities of unlabelled reference images and texts with those of a frozen teacher, the model
    before any task (:func:`.feature_distillation`). L_WC holds the weights to those that this task started from
    (:func:`.weight_consolidation`). The method's fourth part, the mean of the weights over training, is
    :class:`.WeightEnsemble`: add it to the Trainer, and start the next task from the checkpoint, which holds the mean.
    ``lightning-soup continual`` does all of this for a list of tasks.

    With ``distillation=0, consolidation=0`` it is plain fine-tuning; with ``teacher="start", reference="task"`` it is
    LwF. The defaults are those of the paper's multi-domain benchmark. λ belongs to a sum over all weights: the paper's
    1 suits a ViT-B at a rate of 1e-5; small models at high rates want less.

    Args:
        model_name: As of :class:`.CLIPClassifier`, like the following.
        pretrained: A tag of open_clip's weights, for the first task.
        model_config: An architecture instead of a name.
        checkpoint_path: Start from the weights of a checkpoint: those of the task before.
        classnames: What the classes of this task are called; None: the ``class_names`` of the data module.
        templates: The sentences of evaluation.
        train_template: The one sentence of training; by default the first of your own templates.
        reference: Unlabelled images and texts: see :class:`.Reference` and :class:`.ReferenceFiles`. ``task``: the
            training images and class sentences of the task itself.
        teacher: Where the frozen teacher comes from: a checkpoint file, or a tag of open_clip's weights. None: the
            weights of ``pretrained``. ``start``: what this task starts from, another teacher for every task.
        text_side: Whose embeddings of the reference texts the student's images are compared with. ``teacher``, as
            released: distillation moves the image tower only, and the text tower is held by L_WC and the weight
            ensemble alone. ``student``: both towers are distilled, and the texts are encoded in every step.
        texts_per_step: Reference texts in a step, drawn at random; None: all.
        distillation: a, the weight of L_img + L_txt. 0: neither teacher nor reference is needed.
        temperature: T of the distillation.
        consolidation: λ, the weight of L_WC.
        lr: Highest learning rate.
        weight_decay: Of matrices only.
        betas: Of AdamW.
        warmup: Steps of linear warm-up: a whole number, or a fraction of the training.
        label_smoothing: Share of the target spread over all classes, in training only.

    Raises:
        UnsupportedSetup: When built or before training: what :class:`.CLIPClassifier` refuses, a value out of range, no
            teacher, no reference, or reference images of another size than the model takes.
        UnreadableCheckpoint: A file cannot be opened.
    """

    def __init__(
        self,
        model_name: str = "ViT-B-16-quickgelu",
        pretrained: str | None = None,
        model_config: str | dict[str, Any] | None = None,
        checkpoint_path: str | None = None,
        classnames: list[str] | str | None = None,
        templates: list[str] | str = "simple",
        train_template: str | None = None,
        reference: Reference | Literal["task"] | None = None,
        teacher: str | None = None,
        text_side: Literal["teacher", "student"] = "teacher",
        texts_per_step: int | None = None,
        distillation: float = 1.0,
        temperature: float = 2.0,
        consolidation: float = 1.0,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: int | float = 100,
        label_smoothing: float = 0.2,
    ):
        _check_values(text_side, texts_per_step, distillation, temperature, consolidation)
        super().__init__(
            model_name=model_name,
            pretrained=pretrained,
            model_config=model_config,
            checkpoint_path=checkpoint_path,
            classnames=classnames,
            templates=templates,
            train_template=train_template,
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            warmup=warmup,
            label_smoothing=label_smoothing,
        )
        source = (checkpoint_path or pretrained) if teacher == "start" else teacher or pretrained
        self.hparams.update(teacher=source)  # plain, so that a resumed run builds the same teacher
        self.reference = reference
        self._teacher: Teacher | None = None
        self._held_to: Reference | None = None
        self._tokens: Tensor | None = None
        self._batches: Iterator[Tensor] | None = None
        self._position = 0  # reference batches used
        self._start: dict[str, Tensor] | None = None  # θ_start

    def save_hyperparameters(self, *args: Any, frame: FrameType | None = None, **options: Any) -> None:
        """All but the reference, which may be large and is no plain value."""
        frame = frame or inspect.currentframe().f_back
        super().save_hyperparameters(*args, frame=frame, **{**options, "ignore": ["reference"]})
        # Under LightningCLI only what a config can name is there; the base reads all of its own options.
        for name, parameter in inspect.signature(CLIPClassifier).parameters.items():
            self.hparams.setdefault(name, parameter.default)

    # -------------------------------------------------------------------------------------------------------- the loss

    def training_loss(self, batch: Batch) -> Tensor:
        """L of a batch of the task and the next batch of the reference."""
        loss = super().training_loss(batch)
        parts = {"task": loss}
        if self.hparams.distillation:
            l_img, l_txt = self._distillation()
            parts |= {"l_img": l_img, "l_txt": l_txt}
            loss = loss + self.hparams.distillation * (l_img + l_txt)
        if self.hparams.consolidation and self._start is not None:
            weights = [value for name, value in self.named_parameters() if name in self._start]
            parts["l_wc"] = weight_consolidation(weights, self._start.values())
            loss = loss + self.hparams.consolidation * parts["l_wc"]
        if in_a_loop(self) and len(parts) > 1:
            self.log_dict({f"train_{name}": value.detach() for name, value in parts.items()})
        return loss

    def _distillation(self) -> tuple[Tensor, Tensor]:
        if self._batches is None:
            self._batches = self._held_to.batches(self._position, self.global_rank)
        images = next(self._batches).to(self.device, self.dtype)
        chosen = self._chosen_texts()
        texts = self._teacher.texts[chosen]
        z_t = similarities(self._teacher.images(images), texts, self.logit_scale())
        if self.hparams.text_side == "student":
            texts = self.encode_text(self._tokens[chosen])
        z_s = similarities(self.encode_image(images), texts, self.logit_scale())
        self._position += 1
        return feature_distillation(z_t.detach(), z_s, self.hparams.temperature)

    def _chosen_texts(self) -> Tensor | slice:
        count, total = self.hparams.texts_per_step, len(self._held_to.texts)
        if count is None or count >= total:
            return slice(None)
        generator = torch.Generator().manual_seed(1_000_003 * self._held_to.seed + self._position)
        return torch.randperm(total, generator=generator)[:count].to(self.device)

    # ----------------------------------------------------------------------------------------------------------- hooks

    def setup(self, stage: str) -> None:
        """Build the teacher and look at the reference, before anything is trained."""
        super().setup(stage)
        if stage != "fit":
            return
        self._start = self._batches = None
        self._position = 0
        if not self.hparams.distillation:
            return
        self._held_to = self._task_as_reference() if self.reference == "task" else self.reference
        if self._held_to is None:
            raise UnsupportedSetup(
                f"distillation={self.hparams.distillation} needs reference: unlabelled images and texts, such as "
                "ReferenceFiles(images=folder, texts=file). Without any, set distillation=0."
            )
        if self.hparams.teacher is None and ":" not in self.hparams.model_name:
            raise UnsupportedSetup(
                f"distillation={self.hparams.distillation} needs teacher: a file with the weights before any task, or "
                "a tag of open_clip's weights; or 'start' beside checkpoint_path or pretrained. It is never taken from "
                "the model that is trained."
            )
        if self._teacher is None:
            self._teacher = Teacher(self.hparams.model_config, self.hparams.model_name, self.hparams.teacher)
            self._teacher.check_same(self.model)
        with evaluating(self.model.visual), torch.no_grad():
            image = next(self._held_to.batches())[:1].to(self.device, self.dtype)
            try:
                self.encode_image(image)
            except UnsupportedSetup as error:
                raise UnsupportedSetup(f"The reference images do not fit. {error}") from error

    def _task_as_reference(self) -> Reference:
        data = self.trainer.datamodule
        if data is None:
            raise UnsupportedSetup("reference='task' needs a data module, whose training images it takes.")
        loader = data.train_dataloader()
        texts = fill(self._named(), [self.train_template])
        return Reference(loader.dataset, texts, loader.batch_size or 64, num_workers=loader.num_workers)

    def on_fit_start(self) -> None:
        """Everything is on its device and in its type now: θ_start is taken, and the texts are embedded."""
        if self.hparams.consolidation:
            held = self._start or {}
            self._start = {
                name: held.get(name, value).detach().to(value).clone()
                for name, value in self.named_parameters()
                if value.requires_grad
            }
        if self.hparams.distillation:
            texts = self._held_to.texts
            self._teacher.model.to(self.dtype)
            self._teacher.prepare(texts, self.tokenize, self.device)
            if self.hparams.text_side == "student":
                self._tokens = self.tokenize(texts).to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep θ_start, the place in the reference, and which teacher it was. The teacher itself is not written."""
        super().on_save_checkpoint(checkpoint)
        resumable = "optimizer_states" in checkpoint  # θ_start would double a file of weights only, for nothing
        checkpoint[_STATE] = {"position": self._position, "start": dict(self._start or {}) if resumable else {}}
        if self._teacher is not None:
            checkpoint[_STATE]["teacher"] = self._teacher.digest
        hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        known = inspect.signature(type(self)).parameters
        for name in inspect.signature(CLIPClassifier).parameters:  # LightningCLI passes all of them to the class
            if name not in known:
                hparams.pop(name, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with θ_start and the reference where training was ended.

        Raises:
            UnsupportedSetup: The teacher is another one now.
        """
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(_STATE)
        if state is None or self._trainer is None or self._trainer.state.fn != "fit":
            return
        theirs = state.get("teacher")
        if self._teacher is not None and theirs not in (None, self._teacher.digest):
            raise UnsupportedSetup(
                f"The checkpoint was trained with the teacher {theirs}, but teacher={self.hparams.teacher!r} is "
                f"{self._teacher.digest}. Give the same teacher, or start this task anew."
            )
        self._position, self._start = state["position"], state["start"] or None


def _check_values(
    text_side: str, texts_per_step: int | None, distillation: float, temperature: float, consolidation: float
) -> None:
    expectations = (
        (text_side in ("teacher", "student"), f"text_side={text_side!r}: expected one of teacher, student."),
        (texts_per_step is None or texts_per_step > 0, f"texts_per_step={texts_per_step}: expected 1 or more."),
        (distillation >= 0, f"distillation={distillation}: expected 0 or more."),
        (temperature > 0, f"temperature={temperature}: expected more than 0."),
        (consolidation >= 0, f"consolidation={consolidation}: expected 0 or more."),
    )
    for holds, message in expectations:
        if not holds:
            raise UnsupportedSetup(message)
