"""Building open_clip models and their tokenizers, by name or from a JSON architecture."""

import difflib
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.evaluation.image_sizes import check_patches, timm_at_size
from lightning_soup.modules.zero_shot import evaluating
from lightning_soup.weights.positions import resample_positions

__all__ = [
    "FORMER_TENSORS",
    "build_clip",
    "clip_at_size",
    "clip_tokenizer",
    "image_size",
    "read_model_config",
    "without_tower_weights",
]

_NEEDED = ("embed_dim", "vision_cfg", "text_cfg")

FORMER_TENSORS = (
    *("attn_mask", "text.attn_mask"),  # the causal mask, which models make themselves now
    *("input_resolution", "context_length", "vocab_size"),  # in the archives of CLIP's authors
    "text.transformer.embeddings.position_ids",
)
"""Tensors in older files that the models do not hold any more."""


def read_model_config(model_name: str, model_config: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The architecture as open_clip's JSON files write it.

    Args:
        model_name: A name of open_clip, or ``hf-hub:owner/name``, ``local-dir:folder``.
        model_config: An architecture instead: a mapping, or a JSON file.

    Raises:
        UnsupportedSetup: An unknown name, a file that is no JSON, or an architecture that lacks a part.
    """
    place = "model_config"
    if model_config is None:
        place, model_config = f"model_name={model_name!r}", _named_config(model_name)
    if isinstance(model_config, str):
        place = model_config
        try:
            model_config = json.loads(Path(model_config).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise UnsupportedSetup(
                f"model_config={place!r} cannot be read: {error.strerror}. Expected a JSON file."
            ) from error
        except ValueError as error:
            raise UnsupportedSetup(f"model_config={place!r} is not JSON: {error}.") from error
    if isinstance(model_config, Mapping):
        model_config = model_config.get("model_cfg", model_config)  # open_clip_config.json has it one level deeper
    if not isinstance(model_config, Mapping) or any(part not in model_config for part in _NEEDED):
        given = ", ".join(model_config) if isinstance(model_config, Mapping) else type(model_config).__name__
        raise UnsupportedSetup(
            f"{place}: expected an architecture with {', '.join(_NEEDED)}; got {given or 'nothing'}. For example "
            "{embed_dim: 64, vision_cfg: {layers: 4, width: 64, head_width: 16, patch_size: 7, image_size: 28}, "
            "text_cfg: {context_length: 16, width: 64, heads: 4, layers: 2}}."
        )
    return deepcopy(dict(model_config))


def without_tower_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture that is built without weights of timm and transformers in its towers: all of them come later."""
    towers = {
        "vision_cfg": ("timm_model_name", "timm_model_pretrained"),
        "text_cfg": ("hf_model_name", "hf_model_pretrained"),
    }
    found = deepcopy(dict(config))
    for tower, (name, pretrained) in towers.items():
        if found[tower].get(name):
            found[tower][pretrained] = False
    return found


def _named_config(model_name: str) -> dict[str, Any]:
    import open_clip

    try:
        config = open_clip.get_model_config(model_name)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:  # the last for a JSON file without a mapping
        raise UnsupportedSetup(f"model_name={model_name!r}: open_clip cannot find it: {error}") from error
    if config is None:
        known = open_clip.list_models()
        close = difflib.get_close_matches(model_name, known, n=5, cutoff=0.4)
        hint = f"Closest names: {', '.join(close)}." if close else "open_clip.list_models() prints all names."
        raise UnsupportedSetup(f"model_name={model_name!r}: open_clip has no model of this name. {hint}")
    return config


def build_clip(config: Mapping[str, Any], model_name: str | None = None, pretrained: str | None = None) -> nn.Module:
    """Build a model.

    Args:
        config: Its architecture, from :func:`read_model_config`.
        model_name: Its name, where its weights are open_clip's: those of ``pretrained``, or those that the hub or
            folder of the name holds. None: random weights.
        pretrained: A tag of open_clip; downloaded once.

    Raises:
        UnsupportedSetup: open_clip has no such weights, cannot get or read them, or cannot build the architecture; or
            its towers do not give features ``[B, embed_dim]``.
    """
    import open_clip

    if model_name is not None and (pretrained or ":" in model_name):
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if pretrained and pretrained not in tags:
            raise UnsupportedSetup(
                f"pretrained={pretrained!r}: open_clip has no such weights of {model_name}. It has: "
                f"{', '.join(tags) or 'none'}. A file of your own goes to checkpoint_path."
            )
        try:
            return open_clip.create_model(model_name, pretrained=pretrained, require_pretrained=True)
        except Exception as error:  # a damaged file raises whatever its format's reader does: EOFError, KeyError, …
            raise UnsupportedSetup(
                f"open_clip could not load {model_name} (pretrained={pretrained}): "
                f"{str(error).strip().rstrip('.') or type(error).__name__}. Without a network, or to read a file that "
                "open_clip refuses, give checkpoint_path, a file of the weights."
            ) from error
    arguments = deepcopy(dict(config))
    custom = arguments.pop("custom_text", False) or "hf_model_name" in arguments["text_cfg"]
    kind = open_clip.CoCa if "multimodal_cfg" in arguments else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    try:
        model = kind(**arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, OSError, ZeroDivisionError, ImportError) as error:
        raise UnsupportedSetup(
            f"open_clip could not build this architecture: {str(error).rstrip('.')}. Given: {json.dumps(config)}"
        ) from error
    if kind is open_clip.CoCa:  # which leaves this one as the memory was, NaN perhaps, and no soup takes that
        nn.init.normal_(model.text_decoder.text_projection, std=model.text_decoder.text_projection.shape[0] ** -0.5)
    _check_towers(model, config)
    return model


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that an open_clip model takes."""
    size = model.visual.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def clip_at_size(model: nn.Module, config: Mapping[str, Any], size: tuple[int, int]) -> nn.Module:
    """A model with the same weights for images of another size; itself at its own.

    Position embeddings are resampled from those of the model (bicubic, antialias, in float32), also to another grid
    with as many tokens, which open_clip's own loader leaves as it was.

    Args:
        model: The model, which is not changed.
        config: Its architecture, from :func:`read_model_config`.
        size: Height and width.

    Raises:
        UnsupportedSetup: Its patches do not divide the size, or it cannot be built so.
    """
    if tuple(size) == image_size(model):
        return model
    if hasattr(model.visual, "trunk"):  # a tower of timm
        changed = deepcopy(model)
        changed.visual.trunk = timm_at_size(model.visual.trunk, size)
        changed.visual.image_size = tuple(size)
        return changed
    check_patches(model, size)
    arguments = deepcopy(dict(config))
    arguments["vision_cfg"]["image_size"] = size[0] if size[0] == size[1] else tuple(size)
    changed = build_clip(arguments)
    state, wanted = model.state_dict(), changed.state_dict()
    for name, value in state.items():
        if value.shape != wanted[name].shape or (name.startswith("visual.") and name.endswith("positional_embedding")):
            state[name] = _resampled(value, image_size(model), tuple(size), len(wanted[name]))
    changed.load_state_dict(state)
    device = next(iter(state.values())).device
    return changed.to(device).train(model.training)


def _resampled(embedding: Tensor, old: tuple[int, int], new: tuple[int, int], tokens: int) -> Tensor:
    """The embedding ``[1 + h·w, D]`` of a grid for another one of the same stride."""
    stride = (old[0] * old[1] / (len(embedding) - 1)) ** 0.5
    grids = [(round(size[0] / stride), round(size[1] / stride)) for size in (old, new)]
    if [1 + h * w for h, w in grids] != [len(embedding), tokens]:
        raise UnsupportedSetup(
            f"The model has {len(embedding)} position embeddings for images of {old[0]}×{old[1]}: they are no grid, "
            "and cannot be resampled. Evaluate it at its own size."
        )
    return resample_positions(embedding, grids[1], grids[0], prefix=1)


class _Towers(nn.Module):
    """Both towers in one call, for ``functional_call``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor | None) -> list[Tensor]:
        texts = [] if tokens is None else [self.model.encode_text(tokens)]
        return [self.model.encode_image(images), *texts]


def _check_towers(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Encode an image and a text on the meta device: shapes without arithmetic, so it costs next to nothing.

    open_clip builds towers that give tokens instead of features, or that take images of another size than they say.
    """
    images = torch.empty(3, 3, *image_size(model), device="meta")
    text = config["text_cfg"]
    tokens = None
    if not text.get("hf_model_name"):  # those of transformers look at the tokens' values, of which there are none here
        tokens = torch.zeros(3, _context_length(text), dtype=torch.long, device="meta")
    towers = _Towers(model)
    tensors = {**dict(towers.named_parameters()), **dict(towers.named_buffers())}
    cause = None
    try:
        with evaluating(towers), torch.no_grad():
            held = {name: value.to("meta") for name, value in tensors.items()}
            found = torch.func.functional_call(towers, held, (images, tokens))
        shapes = [list(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in found]
        fault = ", ".join(str(shape) for shape in shapes if shape != [len(images), config["embed_dim"]])
    except Exception as error:  # whatever a tower makes of what it cannot work with
        fault, cause = str(error).rstrip("."), error
    if fault:
        raise UnsupportedSetup(
            f"The towers of this architecture do not give features [B, {config['embed_dim']}] of images "
            f"{list(images.shape[1:])} and of texts: {fault}. Check image_size, pool_type, proj_type, embed_cls, and "
            f"output_tokens, which CoCa needs in both towers and others cannot have. Given: {json.dumps(config)}"
        ) from cause


def clip_tokenizer(config: Mapping[str, Any], model_name: str = "") -> Callable[[list[str]], Tensor]:
    """The tokenizer of an architecture: texts to tokens ``[M, context_length]``; longer texts are cut.

    Args:
        config: The architecture.
        model_name: Its name: the folder of a ``local-dir:`` name holds the tokenizer too, if it is one of transformers.

    Raises:
        UnsupportedSetup: The text tower has fewer tokens than the tokenizer, or that cannot be loaded.
    """
    import open_clip

    text = config["text_cfg"]
    length = _context_length(text)
    if name := text.get("hf_tokenizer_name"):
        folder = model_name.removeprefix("local-dir:")
        if folder != model_name and Path(folder).is_dir():
            name = folder
        options = {"tokenizer_mode": text.get("tokenizer_mode"), **(text.get("tokenizer_kwargs") or {})}
        try:
            return open_clip.tokenizer.HFTokenizer(name, context_length=length, **options)
        except (OSError, ValueError, ImportError) as error:
            raise UnsupportedSetup(
                f"The tokenizer {name!r} (text_cfg.hf_tokenizer_name) cannot be loaded: {error}. It needs "
                "transformers, and a folder with its files or a network."
            ) from error
    needed = open_clip.CLIPTextCfg().vocab_size
    if text.get("vocab_size", needed) < needed:
        raise UnsupportedSetup(
            f"text_cfg.vocab_size={text['vocab_size']}: open_clip's tokenizer makes {needed} different tokens. "
            "Leave vocab_size out, or name another tokenizer in text_cfg.hf_tokenizer_name."
        )
    return partial(open_clip.tokenize, context_length=length)


def _context_length(text: Mapping[str, Any]) -> int:
    import open_clip

    return text.get("context_length", open_clip.CLIPTextCfg().context_length)
