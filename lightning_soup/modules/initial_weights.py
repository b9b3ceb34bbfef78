"""Starting a model of timm or open_clip from a checkpoint of any format."""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn

from lightning_soup.errors import NonFiniteWeights, UnsupportedSetup
from lightning_soup.weights.weights_file import WeightsFile, open_checkpoint

__all__ = ["head_layers", "load_initial_weights", "names_in_file"]

_PREFIX = "model."  # where the classifiers keep their timm or open_clip model
_OPTIONS = "model_name, img_size, in_chans, model_args"


def load_initial_weights(
    model: nn.Module,
    path: str | Path,
    reset_head: bool = False,
    *,
    optional: Collection[str] = (),
    options: str = _OPTIONS,
    prefix: str = _PREFIX,
) -> None:
    """Copy the weights of a checkpoint into a model.

    Args:
        model: The model, of timm or open_clip.
        path: A checkpoint in any format that :func:`open_checkpoint` opens: of a classifier of this package (a
            Lightning checkpoint, a soup), or of the bare model.
        reset_head: Leave the classifier's last layer as it was initialised; for timm models, which name it.
        optional: Tensors that older files hold and the model does not need.
        options: The arguments that the model was built with, for the message.
        prefix: What the names of the model begin with in the file, where it is that of a LightningModule.

    Raises:
        UnreadableCheckpoint: The file cannot be opened.
        UnsupportedSetup: The checkpoint's tensors are not those of the model; lists them.
        NonFiniteWeights: A parameter in it holds NaN or an infinity.
    """
    weights = open_checkpoint(path)
    names = names_in_file(
        model, weights, str(path), reset_head=reset_head, optional=optional, options=options, prefix=prefix
    )
    found = {name: weights[stored] for name, stored in names.items()}
    for name, parameter in model.named_parameters():  # buffers may hold infinities, such as a causal mask's
        if name in found and parameter.is_floating_point() and not found[name].isfinite().all():
            raise NonFiniteWeights(
                f"{path}: {names[name]} holds NaN or an infinity: its training diverged, or the file is damaged. Start "
                "from another checkpoint."
            )
    model.load_state_dict(found, strict=False)


def names_in_file(
    model: nn.Module,
    weights: WeightsFile,
    path: str,
    *,
    reset_head: bool = False,
    optional: Collection[str] = (),
    options: str = _OPTIONS,
    prefix: str = _PREFIX,
    new_head: bool = True,
) -> dict[str, str]:
    """Under which name each tensor of a model stands in a checkpoint; see :func:`load_initial_weights`.

    ``new_head`` says whether the head could be begun anew, for the message.

    Raises:
        UnsupportedSetup: The checkpoint's tensors are not those of the model; lists them.
    """
    own = model.state_dict()
    # Name in the model -> name in the file.
    names = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
    if not names.keys() & own.keys():
        names = {name: name for name in weights}
    names = {name: stored for name, stored in names.items() if name in own or name not in optional}
    for tied in open_checkpoint(model).ties:  # safetensors hold a tied tensor once, under one of its names
        stored = next((names[name] for name in tied if name in names), None)
        names |= {} if stored is None else {name: names.get(name, stored) for name in tied}
    head = {name for name in own if name.startswith(_head_prefixes(model))}
    if reset_head:
        wanted = own.keys() - head
        names = {name: stored for name, stored in names.items() if not name.startswith(_head_prefixes(model))}
    else:
        wanted = own.keys()
    shapes = {name: tuple(weights.specs[stored].shape) for name, stored in names.items()}
    wrong = {name for name in wanted & names.keys() if shapes[name] != tuple(own[name].shape)}
    # Files from before BatchNorm counted its batches lack the counter; it is not used in fine-tuning.
    missing = {name for name in wanted - names.keys() if not name.endswith("num_batches_tracked")}
    unknown = names.keys() - own.keys()
    if wrong and wrong <= head and not missing and not unknown:
        raise UnsupportedSetup(_head_message(path, wrong, own, shapes, new_head))
    if wrong or missing or unknown:
        lines = [
            *(f"  {name}: shape {shapes[name]}, expected {tuple(own[name].shape)}" for name in sorted(wrong)),
            *(f"  {name}: not in the file" for name in sorted(missing)),
            *(f"  {name}: not in the model" for name in sorted(unknown)),
        ]
        raise UnsupportedSetup(
            f"{path} does not fit the model, {len(lines)} tensors disagree:\n"
            + "\n".join(lines[:10])
            + (f"\n  and {len(lines) - 10} more" if len(lines) > 10 else "")
            + f"\nBuild the model as the checkpoint's was built: {options}."
        )
    return names


def head_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's last layers, of timm models, which tell them."""
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{layer}." for layer in head_layers(model))


def _head_message(
    path: str | Path,
    wrong: Collection[str],
    own: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    new_head: bool,
) -> str:
    name = min(wrong, key=lambda name: -own[name].ndim)  # the matrix says it best
    anew = "Pass reset_head=True to keep all other weights and start the head anew, or" if new_head else "Expected"
    return (
        f"{path} has a head for {shapes[name][0]} classes ({name}: {shapes[name]}), but the model one for "
        f"{own[name].shape[0]} ({tuple(own[name].shape)}). {anew} num_classes={shapes[name][0]}."
    )
