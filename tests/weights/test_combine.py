import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lightning_soup.errors import NonFiniteWeights, RecipeError
from lightning_soup.weights import chunks, combine
from tests.helpers.weights import assert_same, slow_combination

BIG = 300_000  # elements: more than one chunk in any type


def vector(*values):
    return {"w": torch.tensor(values, dtype=torch.float64)}


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


# --------------------------------------------------------------------------------------------------------------- golden


def test_g1_uniform_and_weighted():
    models = [vector(1, 2), vector(3, -2), vector(5, 6)]
    close(combine(models, [1 / 3] * 3)["w"], [3, 2])
    close(combine(models, [0.5, 0.3, 0.2])["w"], [2.4, 1.6])


def test_g4_interpolation_with_exact_ends(tmp_path):
    zero_shot = {"w": torch.tensor([1.0, 0, -2]), "b": torch.tensor(0.5)}
    fine_tuned = {"w": torch.tensor([3.0, 4, 2]), "b": torch.tensor(-0.5)}
    found = combine([zero_shot, fine_tuned], [0.75, 0.25])
    assert (found["w"].tolist(), found["b"].item()) == ([1.5, 1, -1], 0.25)
    torch.manual_seed(1)
    models = [{"w": torch.randn(BIG), "h": torch.randn(33).half()} for _ in range(2)]
    for i in range(2):
        coefficients = [float(i == 0), float(i == 1)]
        assert_same(combine(models, coefficients), models[i])
        assert_same(combine(models, coefficients, tmp_path / "a.safetensors"), models[i])


def test_g7_batch_norm_statistics_are_averaged_entrywise():
    models = [nn.BatchNorm1d(1) for _ in range(2)]
    for model, mean, count in zip(models, (0.0, 2.0), (3, 7), strict=True):
        model.running_mean.fill_(mean)
        model.num_batches_tracked.fill_(count)
    found = combine(models, [0.5, 0.5])
    assert (found["running_mean"].item(), found["running_var"].item()) == (1, 1)
    assert found["num_batches_tracked"].item() == 7
    assert found["num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(("count", "tracked"), [(72, 100), (49, 391)])
def test_counters_do_not_lose_one_by_rounding(count, tracked):
    models = [{"n.num_batches_tracked": torch.tensor(tracked)}] * count
    assert combine(models, [1 / count] * count)["n.num_batches_tracked"].item() == tracked


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_not_accumulated_in_low_precision(dtype):
    models = [{"w": torch.full((5,), 0.1, dtype=dtype) + i * 1e-3} for i in range(72)]
    expected = slow_combination(models, [1 / 72] * 72)["w"].to(dtype)
    assert torch.equal(combine(models, [1 / 72] * 72)["w"], expected)


# ---------------------------------------------------------------------------------------- against the slow right answer


DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@st.composite
def models_and_coefficients(draw):
    count = draw(st.integers(1, 5))
    shapes = draw(st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 5), max_size=3), min_size=1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    models = [
        {name: torch.randn(shape, generator=generator).to(draw(DTYPES)) for name, shape in shapes.items()}
        for _ in range(count)
    ]
    numbers = st.floats(-3, 3).map(lambda x: round(x, 3))
    coefficients = draw(st.lists(numbers, min_size=count, max_size=count).filter(any))
    return models, coefficients


def tolerance(dtype):
    return 4 * torch.finfo(dtype).eps


@settings(max_examples=80, deadline=None)
@given(models_and_coefficients(), st.sampled_from(["float32", "float64"]))
def test_any_floating_combination(tmp_path_factory, drawn, accumulate):
    models, coefficients = drawn
    expected = slow_combination(models, coefficients)
    found = combine(models, coefficients, accumulate=accumulate)
    scale = sum(abs(c) for c in coefficients) * 4
    for name, tensor in expected.items():
        assert found[name].dtype == models[0][name].dtype
        narrow = max(tolerance(found[name].dtype), tolerance(torch.float32) if accumulate == "float32" else 0)
        used = [model[name].dtype for model, c in zip(models, coefficients, strict=True) if c]
        if torch.float64 in (found[name].dtype, *used):
            narrow = tolerance(found[name].dtype)
        torch.testing.assert_close(found[name].double(), tensor, rtol=narrow, atol=narrow * scale)
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    assert_same(combine(models, coefficients, path, accumulate=accumulate), found)
    in_place = {name: torch.full_like(tensor, 9.0) for name, tensor in models[0].items()}
    assert_same(combine(models, coefficients, in_place, accumulate=accumulate), found)
    assert_same(in_place, found)


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("sizes", [[BIG], [chunks.CHUNK_BYTES // 4, 1, chunks.CHUNK_BYTES // 4 + 1, 700_001, 0]])
def test_tensors_of_many_chunks(tmp_path, count, sizes):
    torch.manual_seed(2)
    models = [{f"t{i}": torch.randn(size) for i, size in enumerate(sizes)} for _ in range(count)]
    for i, model in enumerate(models):
        save_file(model, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(count)]
    coefficients = [0.3 * (i + 1) for i in range(count)]
    expected = slow_combination(models, coefficients)
    for accumulate, rtol in (("float32", 3e-6), ("float64", 1.2e-7)):
        found = combine(paths, coefficients, accumulate=accumulate)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=rtol, atol=rtol * sum(coefficients))


@pytest.mark.parametrize("accumulate", ["float32", "float64"])
def test_float32_of_eight_is_within_three_units_in_the_last_place(accumulate):
    torch.manual_seed(3)
    models = [{"w": torch.rand(20_000) + 1} for _ in range(8)]
    found = combine(models, [1 / 8] * 8, accumulate=accumulate)["w"].double()
    units = (found - slow_combination(models, [1 / 8] * 8)["w"]).abs().max() / torch.finfo(torch.float32).eps
    assert units <= (3 if accumulate == "float32" else 0.51)


def test_complex_tensors():
    torch.manual_seed(4)
    models = [{"w": torch.randn(7, dtype=torch.complex64)}, {"w": torch.randn(7, dtype=torch.complex128)}]
    expected = 0.25 * models[0]["w"].to(torch.complex128) + 2 * models[1]["w"]
    found = combine(models, [0.25, 2.0])["w"]
    assert found.dtype == torch.complex64
    torch.testing.assert_close(found, expected.to(torch.complex64), rtol=1e-7, atol=0)
    wide = combine([models[1], models[0]], [2.0, 0.25])["w"]
    torch.testing.assert_close(wide, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8(dtype):
    models = [{"w": torch.tensor([0.5, 1.0, -2.0]).to(dtype)}, {"w": torch.tensor([1.5, 3.0, 2.0]).to(dtype)}]
    assert combine(models, [0.5, 0.5])["w"].float().tolist() == [1, 2, 0]
    large = [{"w": torch.tensor([torch.finfo(dtype).max]).to(dtype)}] * 2
    with pytest.raises(NonFiniteWeights, match="overflows"):
        combine(large, [1.0, 1.0])


def test_mixed_types_give_the_type_of_the_first():
    half, full = {"w": torch.tensor([0.1, 1.0]).half()}, {"w": torch.tensor([0.3, 3.0])}
    assert torch.equal(combine([half, full], [0.5, 0.5])["w"], ((half["w"].float() + full["w"]) / 2).half())
    assert torch.equal(combine([full, half], [0.5, 0.5])["w"], (half["w"].float() + full["w"]) / 2)


def test_equal_bytes_of_other_types_are_not_equal_values():
    one = torch.ones(3, dtype=torch.bfloat16)
    other = one.view(torch.float16)  # the same bytes are 1.875 there
    assert combine([{"w": one}, {"w": other}], [0.5, 0.5])["w"].tolist() == [1.4375] * 3


# --------------------------------------------------------------------------------------------------------- coefficients


def test_a_row_of_coefficients_per_tensor():
    models = [{"body.w": torch.zeros(2), "head.w": torch.zeros(2)}, {"body.w": torch.ones(2), "head.w": torch.ones(2)}]
    found = combine(models, {"head.*": [0.9, 0.1], "*": [0.25, 0.75]})
    assert found["body.w"].tolist() == [0.75, 0.75]
    assert found["head.w"].tolist() == pytest.approx([0.1, 0.1])


def test_tied_tensors_are_computed_once_and_stay_tied(tmp_path):
    def tied(value):
        weight = torch.full((BIG,), value)
        return {"embedding": weight, "output": weight, "other": torch.zeros(1)}

    models = [tied(1.0), tied(3.0)]
    found = combine(models, [0.5, 0.5])
    assert found["embedding"] is found["output"]
    assert list(found) == ["embedding", "output", "other"]
    opened = combine(models, [0.5, 0.5], tmp_path / "a.safetensors")
    assert opened.ties == (("embedding", "output"),)
    assert (tmp_path / "a.safetensors").stat().st_size < 1.1 * BIG * 4
    with pytest.raises(RecipeError, match="embedding, output share one storage"):
        combine(models, {"embedding": [1, 0], "*": [0, 1]})
    untied = {name: tensor.clone() for name, tensor in models[0].items()}
    free = combine([untied, models[1]], [0.5, 0.5])
    assert free["embedding"] is not free["output"]
    assert torch.equal(free["embedding"], found["embedding"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": [], "coefficients": []}, "no checkpoints"),
        ({"coefficients": [1.0]}, "got 1 numbers for 2 checkpoints"),
        ({"coefficients": [0.0, 0.0]}, "all zero"),
        ({"coefficients": [float("nan"), 1.0]}, "not finite"),
        ({"coefficients": [float("inf"), 1.0]}, "not finite"),
        ({"coefficients": 0.5}, "expected 2 numbers"),
        ({"coefficients": {"x": [1, 1], "*": [1, 1]}}, "'x', but no tensor has that name"),
        ({"accumulate": "float16"}, "expected 'float32' or 'float64'"),
        ({"threads": 0}, "expected at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    given = {"checkpoints": [vector(1), vector(2)], "coefficients": [0.5, 0.5]} | arguments
    with pytest.raises(RecipeError, match=message):
        combine(**given)
