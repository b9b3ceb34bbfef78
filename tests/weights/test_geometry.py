import math

import pytest
import torch
from torch import nn

from lightning_soup.errors import IncompatibleIngredients
from lightning_soup.weights import save_weights
from lightning_soup.weights.geometry import cosines, inner_products, relative_distance

SHAPES = {"a": (700, 500), "b": (33,), "c": (), "d": (0, 3)}


def models(count, dtype=torch.float32):
    torch.manual_seed(8)
    return [{name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()} for _ in range(count)]


@pytest.mark.parametrize("kind", ["memory", "file", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_inner_products(tmp_path, kind, dtype):
    found = models(3, dtype)
    direction = {name: torch.randn(SHAPES[name]) for name in ("a", "b", "c", "d")}
    expected = {
        name: torch.stack([(model[name].double() * gradient.double()).sum() for model in found])
        for name, gradient in direction.items()
    }
    if kind == "file":
        for i, model in enumerate(found):
            save_weights(model, tmp_path / f"{i}.safetensors")
        found = [tmp_path / f"{i}.safetensors" for i in range(3)]
    if kind == "transposed":
        found = [model | {"a": model["a"].t().contiguous().t()} for model in found]
        direction["a"] = direction["a"].t().contiguous().t()
    products = inner_products(found, direction)
    assert products.keys() == direction.keys()
    for name, product in products.items():
        assert product.dtype == torch.float64
        torch.testing.assert_close(product, expected[name], rtol=1e-4, atol=1e-2)
    gradient = nn.Parameter(direction["b"])
    assert inner_products(found, {"b": gradient})["b"].tolist() == pytest.approx(expected["b"].tolist(), rel=1e-4)


def test_inner_products_of_a_tensor_that_is_missing():
    with pytest.raises(IncompatibleIngredients, match="'x' is missing in"):
        inner_products(models(2), {"x": torch.ones(3)})
    with pytest.raises(IncompatibleIngredients, match=r"'b' is float32 \[33\] in .*, but the direction has \[3\]"):
        inner_products(models(2), {"b": torch.ones(3)})


def test_relative_distance():
    a, b = models(2)
    assert relative_distance(a, a) == 0
    expected = math.sqrt(
        sum((a[n] - b[n]).double().square().sum() for n in SHAPES) / sum(b[n].double().square().sum() for n in SHAPES)
    )
    assert relative_distance(a, b, sample=10**6) == pytest.approx(expected, rel=1e-6)
    assert relative_distance(a, b) == pytest.approx(expected, rel=0.02)  # from a sample
    doubled = {name: 2 * tensor for name, tensor in a.items()}
    assert relative_distance(a, doubled, scale=0.5) == 0
    assert relative_distance(doubled, a, sample=10**6) == pytest.approx(1)


def test_distances_with_masks_counters_and_zeros():
    mask = torch.full((2, 2), -torch.inf)
    a = {"mask": mask, "w": torch.ones(3), "n": torch.tensor(3)}
    b = {"mask": mask, "w": torch.full((3,), 2.0), "n": torch.tensor(9)}
    assert relative_distance(a, b) == pytest.approx(0.5)
    zero = {"mask": mask, "w": torch.zeros(3), "n": torch.tensor(3)}
    assert relative_distance(a, zero) == math.inf
    assert relative_distance(zero, zero) == 0
    with pytest.raises(IncompatibleIngredients):
        relative_distance(a, {"w": torch.ones(3)})


def test_cosines(tmp_path):
    start = {"w": torch.randn(400, 300), "small": torch.randn(5)}
    near = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in start.items()}
    far = {name: torch.randn_like(tensor) for name, tensor in start.items()}
    save_weights(near, tmp_path / "near.safetensors")
    found = cosines([start, tmp_path / "near.safetensors", far], ["w", "small"])
    assert found["w"].shape == (3, 3)
    assert found["w"][0, 1] == pytest.approx(1 / math.sqrt(1.01), abs=0.005)
    assert abs(found["w"][0, 2]) < 0.05
    rows = torch.stack([start["small"], near["small"], far["small"]]).double()
    torch.testing.assert_close(found["small"], torch.corrcoef(torch.cat([rows, -rows], 1)), rtol=1e-6, atol=1e-6)
    zero = cosines([start, {"w": torch.zeros(400, 300), "small": torch.zeros(5)}], ["w"])["w"]
    assert zero[0, 1] == 0
    assert zero[1, 1] == 0


@pytest.mark.parametrize("sample", [1, 15, 16, 1000, 10**6])
def test_any_size_of_sample(sample):
    a, _ = models(2)
    assert cosines([a, a], ["a", "b", "c"], sample=sample)["a"][0, 1] == pytest.approx(1)
