"""LightningModules: classifiers with any model of timm and of open_clip, ensembles, any causal language model.

Each name is imported when it is first used, since Lightning, timm and open_clip are slow to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_soup.modules.alignment import SalsaPPO as SalsaPPO
    from lightning_soup.modules.causal_lm import CausalLM as CausalLM
    from lightning_soup.modules.classifier import ImageClassifier as ImageClassifier
    from lightning_soup.modules.clip import CLIPClassifier as CLIPClassifier
    from lightning_soup.modules.ensemble import AwareNet as AwareNet
    from lightning_soup.modules.families import Family as Family
    from lightning_soup.modules.lora import LoRA as LoRA
    from lightning_soup.modules.policy_gradient import kl_to_reference as kl_to_reference
    from lightning_soup.modules.regularizers import L2SP as L2SP
    from lightning_soup.modules.regularizers import ReferenceKL as ReferenceKL
    from lightning_soup.modules.rewards import RewardModel as RewardModel
    from lightning_soup.modules.soup_reference import SoupReference as SoupReference
    from lightning_soup.modules.zscl import ZSCL as ZSCL

_HOME = {
    "L2SP": "regularizers",
    "ReferenceKL": "regularizers",
    "AwareNet": "ensemble",
    "CLIPClassifier": "clip",
    "CausalLM": "causal_lm",
    "Family": "families",
    "ImageClassifier": "classifier",
    "LoRA": "lora",
    "RewardModel": "rewards",
    "SalsaPPO": "alignment",
    "SoupReference": "soup_reference",
    "ZSCL": "zscl",
    "kl_to_reference": "policy_gradient",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
