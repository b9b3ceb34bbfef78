import pytest
import torch
from safetensors.torch import save_file

from lightning_soup.errors import IncompatibleIngredients, NonFiniteWeights
from lightning_soup.weights import combine, open_checkpoint, save_weights
from tests.helpers.weights import assert_same, bits, every_type

BIG = 300_000  # elements: more than one chunk in any type


# ------------------------------------------------------------------------------------------------ what is kept as it is


def test_frozen_tensors_stay_bit_exact():
    torch.manual_seed(5)
    frozen = torch.randn(BIG)
    models = [{"frozen": frozen.clone(), "w": torch.randn(3)} for _ in range(7)]
    for coefficients in ([1 / 7] * 7, torch.softmax(torch.randn(7), 0).tolist(), [3, -2, 0.5, -0.5, 0, 0, 0]):
        for accumulate in ("float32", "float64"):
            assert bits(combine(models, coefficients, accumulate=accumulate)["frozen"]) == bits(frozen)
    doubled = combine(models, [2 / 7] * 7)["frozen"]
    torch.testing.assert_close(doubled, 2 * frozen, rtol=3e-6, atol=0)


def test_tensors_that_begin_alike_are_not_frozen():
    models = [{"w": torch.zeros(BIG)} for _ in range(3)]
    models[2]["w"][-1] = 3.0
    found = combine(models, [1 / 3] * 3)["w"]
    assert found[-1].item() == 1
    assert not found[:-1].any()


def test_masks_of_minus_infinity_stay(tmp_path):
    mask = torch.full((5, 5), -torch.inf).triu(1)
    models = [{"attn_mask": mask.clone(), "w": torch.randn(2)} for _ in range(3)]
    for coefficients in ([1 / 3] * 3, [2.0, -1.0, 0.0], [1.0, 1.0, 1.0], [1.0, -0.5, -0.25], [0, 1, 0]):
        assert torch.equal(combine(models, coefficients)["attn_mask"], mask)
        assert torch.equal(combine(models, coefficients, tmp_path / "a.safetensors")["attn_mask"], mask)


def test_infinities_stay_where_they_are_shared_and_the_rest_is_averaged():
    models = [{"w": torch.tensor([-torch.inf, 1.0, torch.inf])}, {"w": torch.tensor([-torch.inf, 3.0, torch.inf])}]
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2):
        typed = [{"w": model["w"].to(dtype)} for model in models]
        assert combine(typed, [1.5, -0.5])["w"].float().tolist() == [-torch.inf, 0, torch.inf]
    with pytest.raises(NonFiniteWeights, match="infinity"):
        combine([*models, {"w": torch.tensor([torch.inf, 3.0, torch.inf])}], [1 / 3] * 3)


def test_an_overflow_of_equal_tensors_is_not_hidden():
    models = [{"w": torch.full((4,), 3e38)}] * 2
    with pytest.raises(NonFiniteWeights, match="overflows"):
        combine(models, [1.0, 1.0])


def test_pruned_weights_stay_zero():
    mask = torch.rand(1000) < 0.9
    models = [{"w": torch.randn(1000).masked_fill(mask, 0.0)} for _ in range(4)]
    found = combine(models, [0.4, -0.3, 0.2, 0.7])["w"]
    assert not found[mask].any()


@pytest.mark.parametrize("name", [n for n in every_type() if n.startswith(("integer", "bool"))])
def test_integers_and_bools_are_kept_when_equal(name):
    tensor = every_type()[name]
    models = [{"ids": tensor.clone()} for _ in range(3)]
    assert_same(combine(models, [0.5, 0.7, -0.2]), {"ids": tensor})
    other = tensor.clone().view(torch.uint8)
    other[-1] ^= 1
    with pytest.raises(IncompatibleIngredients, match=r"'ids' .* differs between weights.* and weights"):
        combine([*models, {"ids": other.view(tensor.dtype)}], [0.25] * 4)
    assert_same(combine([*models, {"ids": other.view(tensor.dtype)}], [0.5, 0.5, 0, 0]), {"ids": tensor})


def test_integers_of_other_widths():
    narrow, wide = {"ids": torch.tensor([1, 2], dtype=torch.int32)}, {"ids": torch.tensor([1, 2])}
    assert_same(combine([narrow, wide], [0.5, 0.5]), narrow)
    assert_same(combine([wide, narrow], [0.5, 0.5]), wide)
    counters = [
        {"n.num_batches_tracked": torch.tensor(3, dtype=torch.int32)},
        {"n.num_batches_tracked": torch.tensor(1 << 40)},
    ]
    assert combine(counters[::-1], [0.5, 0.5])["n.num_batches_tracked"].item() == 1 << 40
    with pytest.raises(IncompatibleIngredients, match="do not fit int32"):
        combine(counters, [0.5, 0.5])


def test_ingredients_with_coefficient_zero_are_not_read(tmp_path):
    good, bad = {"w": torch.ones(3), "n": torch.tensor(1)}, {"w": torch.full((3,), torch.nan), "n": torch.tensor(2)}
    assert_same(combine([good, bad], [1.0, 0.0]), good)
    rows = {"w": [1.0, 0.0], "n": [0.0, 1.0]}
    assert combine([good, bad], rows)["n"].item() == 2
    save_weights(good, tmp_path / "gone.safetensors")
    opened = open_checkpoint(tmp_path / "gone.safetensors")
    (tmp_path / "gone.safetensors").unlink()
    assert_same(combine([good, opened], [1.0, 0.0]), good)


# ----------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "infinity"), (-torch.inf, "infinity")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, BIG // 2, BIG - 1])
def test_the_ingredient_and_tensor_that_are_not_finite_are_named(tmp_path, value, word, dtype, place):
    for i in range(3):
        tensor = torch.ones(BIG, dtype=dtype)
        if i == 1:
            tensor[place] = value
        save_file({"good": torch.ones(2), "layer.bad": tensor}, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for out in (None, tmp_path / "out.safetensors"):
        with pytest.raises(NonFiniteWeights, match=rf"1\.safetensors: tensor 'layer\.bad' .* holds .*{word}"):
            combine(paths, [0.2, 0.3, 0.5], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}.safetensors" for i in range(3)]


def test_two_infinities_of_other_signs_are_an_error_of_the_ingredients():
    with pytest.raises(NonFiniteWeights, match="holds an infinity"):
        combine([{"w": torch.tensor([torch.inf])}, {"w": torch.tensor([-torch.inf])}], [0.5, 0.5])


def test_a_single_checkpoint_with_nan_is_refused():
    with pytest.raises(NonFiniteWeights, match="NaN"):
        combine([{"w": torch.tensor([1.0, torch.nan])}], [1.0])


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)])
def test_overflow_is_told_apart_from_bad_ingredients(dtype, value):
    models = [{"w": torch.full((3,), value).to(dtype)}, {"w": torch.full((3,), value / 2).to(dtype)}]
    assert torch.isfinite(combine(models, [0.5, 0.5])["w"]).all()
    with pytest.raises(NonFiniteWeights, match=r"overflows .* although every ingredient is finite"):
        combine(models, [1.0, 1.0])


def test_a_large_but_finite_tensor_whose_sum_overflows_is_fine():
    models = [{"w": torch.full((1000,), 1e38)}, {"w": torch.full((1000,), 2e38)}]
    torch.testing.assert_close(combine(models, [0.5, 0.5])["w"], torch.full((1000,), 1.5e38))
