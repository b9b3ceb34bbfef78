"""Teacher: a frozen open_clip model beside the one that is trained, which no checkpoint, optimizer or DDP sees."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.layers.conversion import dense_state, experts_of
from lightning_soup.modules.clip_models import FORMER_TENSORS, build_clip
from lightning_soup.modules.initial_weights import load_initial_weights
from lightning_soup.weights.weights_file import open_checkpoint

__all__ = ["Teacher"]

_AT_ONCE = 1024  # texts, as for zero-shot heads


class Teacher:
    """A frozen image-text model, built from a source of its own and never from the student.

    It is no ``nn.Module``, so that a module that holds it does not hold its weights.

    Args:
        config: Architecture of the student, which is also the teacher's.
        model_name: A name of open_clip, whose weights ``source`` may name.
        source: A checkpoint file in any format, or a tag of open_clip's weights of ``model_name``. None: the weights
            that a ``hf-hub:`` or ``local-dir:`` name stands for.

    Attributes:
        digest: Hash of the teacher's weights, whatever file they came from.

    Raises:
        UnsupportedSetup: No such tag, or weights of another architecture.
        UnreadableCheckpoint: The file cannot be opened.
    """

    def __init__(self, config: Mapping[str, Any], model_name: str, source: str | None):
        with torch.random.fork_rng(devices=[]):  # the student's training is the same with a teacher and without
            if source is not None and (Path(source).suffix or "/" in source or Path(source).exists()):
                self.model = build_clip(config)
                load_initial_weights(self.model, source, optional=FORMER_TENSORS, options="model_name or model_config")
            else:
                self.model = build_clip(config, model_name, source)
        self.model.requires_grad_(False).eval()
        self.digest = open_checkpoint(self.model).digest()
        self.texts: Tensor | None = None

    def check_same(self, student: nn.Module) -> None:
        """Refuse a teacher that is not of the student's architecture.

        Raises:
            UnsupportedSetup: A tensor differs.
        """
        own, other = (
            {
                name.replace("_orig_mod.", ""): tuple(value.shape)
                for name, value in dense_state(
                    {name: value.to("meta") for name, value in model.state_dict().items()}, list(experts_of(model))
                ).items()
            }
            for model in (self.model, student)
        )
        if differing := sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name)):
            name = differing[0]
            raise UnsupportedSetup(
                f"The teacher is not of the student's architecture: {len(differing)} tensors differ, the first is "
                f"{name} ({own.get(name, 'missing')} against {other.get(name, 'missing')}). Give a teacher of the same "
                "model_name or model_config."
            )

    @torch.no_grad()
    def prepare(self, texts: Sequence[str], tokenize: Callable[[list[str]], Tensor], device: torch.device) -> None:
        """Embed the reference texts once: the teacher does not change.

        Args:
            texts: M texts.
            tokenize: The tokenizer.
            device: Where the teacher lives from now on.
        """
        self.model.to(device)
        parts = [tokenize(list(texts[start : start + _AT_ONCE])) for start in range(0, len(texts), _AT_ONCE)]
        with torch.autocast(device.type, enabled=False):
            embeddings = [self.model.encode_text(tokens.to(device)) for tokens in parts]
        self.texts = F.normalize(torch.cat(embeddings), dim=-1)

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """Image features of unit length, ``[B, D]``, of images ``[B, C, H, W]``."""
        return self.model.encode_image(images.expand(-1, 3, -1, -1), normalize=True)
