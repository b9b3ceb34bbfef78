"""CLIPClassifier: fine-tuning any open_clip model as a classifier built from class names."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.modules.classification import ClassificationModule
from lightning_soup.modules.clip_head import (
    adopt_head,
    check_classnames,
    check_head,
    check_stored_head,
    fingerprint,
    named_device,
    text_parameters,
    without_head,
)
from lightning_soup.modules.clip_models import (
    FORMER_TENSORS,
    build_clip,
    clip_at_size,
    clip_tokenizer,
    image_size,
    read_model_config,
    without_tower_weights,
)
from lightning_soup.modules.initial_weights import load_initial_weights
from lightning_soup.modules.optimization import check_ranges
from lightning_soup.modules.regularizers import Regularizer
from lightning_soup.modules.zero_shot import (
    IMAGENET,
    check_tokens,
    evaluating,
    fill,
    read_classnames,
    read_templates,
    zero_shot_head,
)

__all__ = ["CLIPClassifier"]


class CLIPClassifier(ClassificationModule):
    """An image-text model of open_clip as a classifier: its head is written in words.

    The row of class c is w_c = normalise(mean_t normalise(text(t(c)))) over the templates t, and the logits are
    exp(logit_scale)·⟨image, w_c⟩ + logit_bias, of images of unit length too. Before any training this is the
    zero-shot classifier. Then, by ``train`` and ``head``:

    - ``train="both"``: both towers learn, and the head follows the text tower. Training encodes one sentence a class
      in every step (``train_template``), evaluation all templates, once for each set of weights.
    - ``train="image", head="trained"``: the image tower and a linear head that starts as the zero-shot head learn:
      what WiSE-FT and the model soups of the paper do.
    - ``train="image", head="text"``: only the image tower learns, under the frozen head. Fine-tunes on different data
      sets have the same tensors then, so they can be averaged, and each judged on all the sets.
    - ``train="head"``: only the linear head learns, from the zero-shot head on.

    The logit scale and bias are never trained, nor is the decoder of a CoCa. Logs ``train_loss``, ``val_loss``,
    ``val_acc``, ``test_loss`` and ``test_acc``; further test sets as ``test_acc/<name>``, with the names from the data
    module's ``test_names``. The open_clip model is ``self.model``; a trained head is ``self.head``, a ``Linear``.

    Checkpoints hold plain values only, the architecture and class names among them: ``load_from_checkpoint(path)``
    needs nothing but its file. With ``head="text", classnames=[...]`` beside the path it judges other classes.

    Args:
        model_name: A model of open_clip, for example ``ViT-B-32``; also ``hf-hub:owner/name`` or ``local-dir:folder``.
        pretrained: A tag of open_clip's weights, for example ``openai``, ``laion2b_s34b_b79k`` (downloaded once).
        model_config: An architecture instead of a name: a JSON file or a mapping as in open_clip's ``model_configs``,
            for tiny models.
        checkpoint_path: Start from the weights of a checkpoint: Lightning, safetensors, bare open_clip, a soup. A
            trained head in it is taken over with the rest.
        reset_head: Start from the zero-shot head where the checkpoint has a trained one.
        classnames: What the classes are called, by number: a list, a text file with one name a line, or a folder of
            class folders, or ``imagenet``. None, for a text head only: the ``class_names`` of the data module.
        templates: ``openai`` (80 sentences written for ImageNet), ``simple`` (7 of them), or sentences with ``{}``.
        train_template: The one sentence of training with ``train="both"``. By default the first of your own templates,
            or ``a photo of a {}.``
        train: What learns: both towers, the image tower, or only the head.
        head: Whether the head stays what the text tower says (``text``) or is a trained layer (``trained``). By
            default ``text`` with ``train="both"``, else ``trained``.
        zero_shot: Start a trained head from the class names. False: at random, which ruins WiSE-FT; checkpoints say
            so, as they bring their own.
        head_device: Where the head is built from its texts, for example ``cuda``; ``auto``: there if there is a GPU.
            1000 classes with 80 templates take minutes on a CPU.
        lr: Highest learning rate.
        weight_decay: Of matrices only; biases, norms and position embeddings have none.
        betas: Of AdamW.
        warmup: Steps of linear warm-up: a whole number, or a fraction of the training.
        label_smoothing: Share of the target spread over all classes, in training only.
        mixup: α of mixup (Zhang et al. 2018): pairs of images are blended with λ ~ Beta(α, α). 0: none.
        regularizer: What holds the training to an earlier model or a soup: :class:`.ReferenceKL`, :class:`.L2SP`.

    Raises:
        UnsupportedSetup: open_clip does not know the model or its weights, class names or templates are unusable, a
            value is out of range, or the checkpoint does not fit the model.
        UnreadableCheckpoint: ``checkpoint_path`` cannot be opened.
        NonFiniteWeights: It holds NaN or an infinity.
    """

    def __init__(
        self,
        model_name: str = "ViT-B-32",
        pretrained: str | None = None,
        model_config: str | dict[str, Any] | None = None,
        checkpoint_path: str | None = None,
        reset_head: bool = False,
        classnames: list[str] | str | None = None,
        templates: list[str] | str = "simple",
        train_template: str | None = None,
        train: Literal["both", "image", "head"] = "both",
        head: Literal["text", "trained"] | None = None,
        zero_shot: bool = True,
        head_device: str = "cpu",
        lr: float = 3e-5,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup: int | float = 0.1,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        regularizer: Regularizer | None = None,
    ):
        super().__init__()
        check_ranges(lr, weight_decay, betas, warmup, label_smoothing, mixup)
        head = head or ("text" if train == "both" else "trained")
        check_head(train, head, classnames)
        if pretrained and (checkpoint_path or model_config):
            other = f"checkpoint_path={checkpoint_path!r}" if checkpoint_path else "model_config"
            raise UnsupportedSetup(
                f"pretrained={pretrained!r} beside {other}: pretrained names open_clip's own weights of model_name. "
                "Give one of them."
            )
        self.save_hyperparameters(ignore=["regularizer"])
        self.regularizer = regularizer
        names = None if classnames is None else read_classnames(classnames)
        self.templates = read_templates(templates)
        own = not isinstance(templates, str) or "{}" in templates
        self.train_template = train_template or (self.templates[0] if own else "a photo of a {}.")
        read_templates([self.train_template])
        if ":" not in model_name:
            model_name = model_name.replace("/", "-")  # ViT-B/32, as the papers write it
        config = read_model_config(model_name, model_config)
        bare = without_tower_weights(config)
        if checkpoint_path:
            self.model = build_clip(bare)
        else:
            self.model = build_clip(config, None if model_config else model_name, pretrained)
        self.tokenize = clip_tokenizer(config, model_name)
        if checkpoint_path:
            built_by = "model_name or model_config"
            load_initial_weights(self.model, checkpoint_path, optional=FORMER_TENSORS, options=built_by)
        learns = {"both": (True, True), "image": (True, False), "head": (False, False)}[train]
        self.model.requires_grad_(False).visual.requires_grad_(learns[0])
        for parameter in text_parameters(self.model):
            parameter.requires_grad_(learns[1])
        # Loggers show where training started (they read the initial hyperparameters), but what a checkpoint holds are
        # its own weights and architecture: restoring it must neither read old files again nor download.
        no_start = {"pretrained": None, "checkpoint_path": None, "reset_head": False, "zero_shot": False}
        words = classnames if classnames == IMAGENET else names
        self.hparams.update(
            model_config=bare, classnames=words, train_template=self.train_template, head=head, **no_start
        )
        self._words_from_data = names is None
        self.classnames = names
        self._held: tuple[Tensor, Tensor] | None = None  # rows of a text head, and the fingerprint of its text tower
        self._train_tokens: Tensor | None = None
        self.head: nn.Linear | None = None
        if head == "trained":
            self.head = nn.Linear(config["embed_dim"], len(names))
            adopted = checkpoint_path and not reset_head and adopt_head(self.head, names, checkpoint_path)
            if zero_shot and not adopted:
                self._start_head(head_device)

    @torch.no_grad()
    def _start_head(self, device: str) -> None:
        """W = exp(logit_scale)·[w_c] and b = logit_bias, or 0."""
        rows = zero_shot_head(self.model, self.tokenize, self.classnames, self.templates, named_device(device))
        self.head.weight.copy_(self.logit_scale() * rows)
        bias = self.model.logit_bias
        self.head.bias.fill_(0.0 if bias is None else bias.item())

    # ---------------------------------------------------------------------------------------------------------- model

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, 3, H, W]`` (grey ones ``[B, 1, H, W]`` are repeated).

        In mixed precision the head still works in float32: logits near 25, as CLIP's are, would be rounded to eighths
        in bfloat16, and classes would tie.
        """
        features = self.encode_image(images)
        rows = self._rows() if self.head is None else self.head.weight
        with torch.autocast(self.device.type, enabled=False):
            if self.head is not None:
                return self.head(features.to(rows.dtype))
            full = torch.promote_types(rows.dtype, torch.float32)
            logits = self.logit_scale() * F.linear(features.to(full), rows.to(full))
        return logits if self.model.logit_bias is None else logits + self.model.logit_bias

    def encode_image(self, images: Tensor) -> Tensor:
        """Image features of unit length, ``[B, D]``.

        Raises:
            UnsupportedSetup: The images are not of the size that the model takes.
        """
        size = image_size(self.model)
        if images.ndim != 4 or images.shape[1] not in (1, 3) or tuple(images.shape[2:]) != size:
            raise UnsupportedSetup(
                f"The model takes images [B, 3, {size[0]}, {size[1]}], the data gives {list(images.shape)}. Set the "
                "data's img_size, or vision_cfg.image_size of model_config."
            )
        frozen = self.training and self.hparams.train == "head"  # its dropout and batch statistics rest too
        with evaluating(self.model.visual) if frozen else nullcontext():
            return self.model.encode_image(images.expand(-1, 3, -1, -1), normalize=True)

    def model_at_size(self, size: tuple[int, int]) -> nn.Module:
        """``model``, or one with its weights for images of this height and width; see :func:`.clip_at_size`."""
        return clip_at_size(self.model, self.hparams.model_config, size)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text features of unit length, ``[M, D]``, of tokens ``[M, L]`` made by ``self.tokenize``."""
        return self.model.encode_text(tokens, normalize=True)

    def logit_scale(self) -> Tensor:
        """exp(logit_scale), the inverse temperature of the logits."""
        return self.model.logit_scale.exp()

    def class_weights(self, classnames: Sequence[str], templates: Sequence[str] | str) -> Tensor:
        """Zero-shot rows ``[C, D]`` of unit length: each class's template embeddings averaged, then renormalised."""
        return zero_shot_head(self.model, self.tokenize, classnames, read_templates(templates))

    @property
    def num_classes(self) -> int:
        """Number of class names."""
        return len(self._named())

    def _named(self) -> list[str]:
        if self.classnames is None:
            raise UnsupportedSetup(
                "The classes have no names yet: give classnames, or train with a data module that has class_names."
            )
        return self.classnames

    def set_classes(self, classnames: Sequence[str] | str, templates: Sequence[str] | str | None = None) -> None:
        """Judge other classes from now on, by a head built from their names; a trained head is dropped.

        Args:
            classnames: Their names, as in ``__init__``.
            templates: Other templates, for other data.
        """
        if templates is not None:
            self.templates = read_templates(templates)
        self._name(read_classnames(classnames))
        self.head, self._words_from_data = None, False
        train = "image" if self.hparams.train == "head" else self.hparams.train
        self.hparams.update(head="text", train=train, templates=self.templates)

    def _name(self, classnames: list[str]) -> None:
        self.classnames = self.hparams["classnames"] = classnames
        self._held = self._train_tokens = None

    def _rows(self) -> Tensor:
        """The rows of a text head: in the graph where the text tower learns, else kept while its weights stay."""
        text = text_parameters(self.model)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in text):
            if not self.training:
                return self.class_weights(self._named(), self.templates)
            if self._train_tokens is None:
                self._train_tokens = self.tokenize(fill(self._named(), [self.train_template]))
                check_tokens(self._named(), self._train_tokens)
            self._train_tokens = self._train_tokens.to(text[0].device)
            return self.encode_text(self._train_tokens)
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode is of no use in training
            mark = fingerprint(text)
            held = self._held
            if held is None or held[0].device != mark.device or not torch.equal(held[1], mark):
                self._held = self.class_weights(self._named(), self.templates), mark
            return self._held[0]

    # ---------------------------------------------------------------------------------------------------------- hooks

    def setup(self, stage: str) -> None:
        """Take the class names from the data where none were given, else compare both."""
        found = getattr(self.trainer.datamodule, "class_names", None)
        if self._words_from_data:
            if found is None:
                raise UnsupportedSetup(
                    "The classes have no names: classnames is not given, and there is no data module with class_names. "
                    "Give classnames, a list or a text file with one name a line."
                )
            words = read_classnames([name.replace("_", " ") for name in found])
            if words != self.classnames:
                self._name(words)
        elif found is not None:
            check_classnames(self.classnames, found)
        super().setup(stage)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the checkpoint's trained head where this one is written in words; refuse one of other classes.

        Raises:
            UnsupportedSetup: A trained head of another number of classes, or of the same in another order.
        """
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        if self.head is None:
            checkpoint["state_dict"] = without_head(state)
        elif "head.weight" in state:
            hparams = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY) or {}
            shape = state["head.weight"].shape
            check_stored_head(self.head, self._named(), shape, hparams.get("classnames"), "The checkpoint")

    def trained_part(self) -> nn.Module:
        """All of it: the parameters that do not learn are frozen."""
        return self

    def no_weight_decay(self) -> set[str]:
        """Position and class embeddings."""
        spared = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in spared}
