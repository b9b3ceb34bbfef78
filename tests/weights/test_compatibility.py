import pytest
import timm
import torch
from torch import nn

from lightning_soup.errors import IncompatibleIngredients
from lightning_soup.weights import check_compatible, save_weights
from lightning_soup.weights.compatibility import kind


def tiny(**options):
    return timm.create_model(
        "vit_tiny_patch16_224",
        **{"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 3, "num_classes": 5, **options},
    )


def why(*checkpoints):
    with pytest.raises(IncompatibleIngredients) as caught:
        check_compatible(checkpoints)
    return str(caught.value)


def test_what_can_be_added():
    a = {"w": torch.ones(2), "n": torch.tensor(1), "m": torch.tensor(True)}
    check_compatible([])
    check_compatible([a])
    check_compatible(
        [a, dict(reversed(a.items())), a | {"w": torch.ones(2).half(), "n": torch.tensor(1, dtype=torch.int8)}]
    )
    check_compatible(iter([nn.Linear(2, 2), {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)}]))


def test_at_most_ten_tensors_are_listed_with_file_shape_and_type(tmp_path):
    a, b = {f"t{i:02}": torch.ones(2, 3) for i in range(20)}, {f"t{i:02}": torch.ones(2, 4).half() for i in range(20)}
    save_weights(a, tmp_path / "a.safetensors")
    save_weights(b, tmp_path / "b.safetensors")
    text = why(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "20 tensors differ" in text
    assert "t00: float32 [2, 3] in a.safetensors, float16 [2, 4] in b.safetensors" in text
    assert "t09" in text
    assert "t10" not in text
    assert "… and 10 more" in text


def test_kinds_may_not_be_mixed():
    for other in (
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2, dtype=torch.complex64),
    ):
        assert "element types" in why({"w": torch.ones(2)}, {"w": other})
    assert [kind(dtype) for dtype in (torch.float8_e5m2, torch.complex64, torch.bool, torch.uint16)] == [
        "floating",
        "complex",
        "bool",
        "integer",
    ]


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        (lambda: tiny(num_classes=7), "another number of classes (5 against 7)"),
        (lambda: tiny(img_size=64), "another image size"),
        (lambda: tiny(depth=2), "another architecture or depth"),
        (lambda: tiny(embed_dim=24), "another architecture or width"),
        (lambda: tiny(num_classes=0), "has a classifier head"),
        (lambda: nn.Linear(3, 3), "no tensor in common"),
        (lambda: nn.ModuleDict({"model": tiny()}), "begin with 'model.'"),
        (lambda: {"base.q.lora_A.weight": torch.ones(2, 12)}, "an adapter, the other a full model"),
    ],
)
def test_the_likely_cause_is_named(other, cause):
    assert cause in why(tiny(), other())
    if "against" not in cause:
        assert cause.split(" (")[0] in why(other(), tiny())


def test_a_resized_tokenizer():
    def language_model(size):
        return {
            "embed_tokens.weight": torch.ones(size, 4),
            "lm_head.weight": torch.ones(size, 4),
            "norm": torch.ones(4),
        }

    assert "tokenizer was resized (100 against 104 rows)" in why(language_model(100), language_model(104))


def test_all_checkpoints_are_compared_with_the_first():
    text = why({"a": torch.ones(1)}, {"a": torch.ones(1)}, {"a": torch.ones(2)}, {"b": torch.ones(1)})
    assert "3 tensors differ" in text
    assert text.count("Likely cause") == 2
