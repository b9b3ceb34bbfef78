"""Several combinations in one pass: each is what ``combine`` gives, to the rounding, from any kind of checkpoint."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightning_soup.errors import IncompatibleIngredients, LightningSoupError, NonFiniteWeights, RecipeError
from lightning_soup.weights import batches, combine
from lightning_soup.weights.combine import combine_many
from lightning_soup.weights.geometry import differing
from tests.helpers.weights import assert_same

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def models(count=5, dtype=torch.float32, size=70_000):
    draw = torch.Generator().manual_seed(count)
    frozen = torch.randn(9, generator=draw)
    return [
        {
            "w": torch.randn(size, generator=draw).to(dtype),
            "m": torch.randn(33, 7, generator=draw).T.to(dtype),  # not contiguous
            "s": torch.randn((), generator=draw).to(dtype),
            "frozen": frozen.clone(),
            "n.num_batches_tracked": torch.tensor(3 + i),
            "empty": torch.zeros(0, 4),
        }
        for i in range(count)
    ]


def rows(b, k, seed=0):
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(b, k, generator=draw, dtype=torch.float64)
    return (found - (found.sum(1, keepdim=True) - 1) / k).tolist()


def assert_near(found, expected, eps):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        torch.testing.assert_close(found[name], value, rtol=8 * eps, atol=32 * eps)


@pytest.mark.parametrize("accumulate", ["float32", "float64"])
@pytest.mark.parametrize("dtype", TYPES)
def test_each_is_what_combine_gives(dtype, accumulate):
    given_models, coefficients = models(dtype=dtype), rows(4, 5)
    found = combine_many(given_models, coefficients, accumulate=accumulate)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if accumulate == "float32" else 0)
    assert len(found) == 4
    for result, row in zip(found, coefficients, strict=True):
        assert_near(result, combine(given_models, row, accumulate=accumulate), eps)
        assert torch.equal(result["frozen"], given_models[0]["frozen"])
        assert result["n.num_batches_tracked"].item() == 7


def test_from_files_and_with_threads(tmp_path):
    given_models, coefficients = models(), rows(3, 5)
    for i, model in enumerate(given_models):
        save_file({name: value.contiguous() for name, value in model.items()}, tmp_path / f"{i}.safetensors")
    files = [tmp_path / f"{i}.safetensors" for i in range(5)]
    one = combine_many(files, coefficients, threads=1)
    two = combine_many(files, coefficients, threads=2)
    for a, b, row in zip(one, two, coefficients, strict=True):
        assert_same(a, b)
        assert_near(a, combine(files, row), torch.finfo(torch.float32).eps)


def test_into_tensors_that_are_there():
    given_models, first, second = models(), rows(3, 5), rows(3, 5, seed=1)
    out = combine_many(given_models, first)
    kept = [dict(result) for result in out]
    again = combine_many(given_models, second, out)
    for result, place, row in zip(again, kept, second, strict=True):
        assert all(result[name].data_ptr() == place[name].data_ptr() for name in place)
        assert_near(result, combine(given_models, row), torch.finfo(torch.float32).eps)
    apart = [{name: value.clone() for name, value in result.items()} for result in out]  # in no common storage
    for result, expected in zip(
        combine_many(given_models, first, apart), combine_many(given_models, first), strict=True
    ):
        assert_same(result, expected)


@settings(deadline=None, max_examples=30)
@given(b=st.integers(1, 5), k=st.integers(1, 6), size=st.integers(0, 40), room=st.integers(64, 4096), data=st.data())
def test_any_number_of_anything(b, k, size, room, data):
    seed = data.draw(st.integers(0, 99))
    draw = torch.Generator().manual_seed(seed)
    given_models = [{"w": torch.randn(size, generator=draw, dtype=torch.float64)} for _ in range(k)]
    coefficients = rows(b, k, seed)
    before = batches._BATCH_BYTES
    batches._BATCH_BYTES = room  # so that small tensors take several chunks
    try:
        found = combine_many(given_models, coefficients, accumulate="float64", threads=1)
    finally:
        batches._BATCH_BYTES = before
    for result, row in zip(found, coefficients, strict=True):
        expected = sum(c * model["w"] for c, model in zip(row, given_models, strict=True))
        torch.testing.assert_close(result["w"], expected, rtol=1e-12, atol=1e-12)


def test_coefficients_by_name_and_zeros():
    given_models = models(3)
    by_name = {"w": (0.5, 0.5, 0.0), "*": (2.0, 0.0, -1.0)}
    found = combine_many(given_models, [by_name, (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
    assert_near(found[0], combine(given_models, by_name), torch.finfo(torch.float32).eps)
    assert_same({**found[1], "n.num_batches_tracked": torch.tensor(4)}, given_models[1] | {"w": found[1]["w"]})
    torch.testing.assert_close(found[1]["w"], given_models[1]["w"], rtol=1e-6, atol=0)


def test_the_widest_checkpoint_says_how_precisely_all_are_added():
    near = torch.linspace(1.0, 2.0, 50, dtype=torch.float64)
    files = [{"w": torch.ones(50)}, {"w": near + 1e-6 * near}, {"w": near}]
    first, second = combine_many(files, [(1, 0, 0), (1, 1e4, -1e4)])  # the first of them leaves the wider ones out
    assert torch.equal(first["w"], torch.ones(50))
    torch.testing.assert_close(second["w"].double(), 1 + 0.01 * near, rtol=0, atol=1e-7)


def test_tied_tensors_are_one():
    given_models = [{"a": value, "b": value} for value in (torch.ones(3), torch.full((3,), 3.0))]
    found = combine_many(given_models, [[0.5, 0.5], [2, -1]])
    assert [result["a"].tolist() for result in found] == [[2.0] * 3, [-1.0] * 3]
    assert all(result["a"].data_ptr() == result["b"].data_ptr() for result in found)


def test_values_that_overflow_only_in_the_sum_of_all():
    given_models = [{"w": torch.full((8,), 2e38)}, {"w": torch.full((8,), 1e38)}]
    found = combine_many(given_models, [[0.5, 0.5], [1.0, 0.0]])
    assert found[0]["w"].tolist() == pytest.approx([1.5e38] * 8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_refused_with_its_place(bad):
    given_models = models(3)
    given_models[1]["w"][12_345] = bad
    with pytest.raises(NonFiniteWeights, match="w"):
        combine_many(given_models, rows(2, 3))


def test_a_zero_coefficient_hides_no_broken_checkpoint_of_others():
    given_models = models(3)
    given_models[1]["w"][0] = math.nan
    with pytest.raises(NonFiniteWeights):
        combine_many(given_models, [[0.5, 0.0, 0.5], [0.2, 0.3, 0.5]])


def test_what_does_not_fit():
    given_models = models(3)
    with pytest.raises(RecipeError, match="2 combinations, but 1 mappings"):
        combine_many(given_models, rows(2, 3), [dict(given_models[0])])
    with pytest.raises(LightningSoupError):
        combine_many(given_models, [[0.5, 0.5]])
    narrow = [{name: value.clone() for name, value in given_models[0].items()} for _ in range(2)]
    narrow[1]["w"] = narrow[1]["w"][:5]
    with pytest.raises(IncompatibleIngredients):
        combine_many(given_models, rows(2, 3), narrow)
    assert combine_many(given_models, []) == []


def tensors(tied):
    first = torch.zeros(3)
    return {"a": first, "b": first if tied else torch.zeros(3)}


def test_mappings_in_which_tensors_would_be_lost():
    tied = [tensors(True), tensors(True)]
    with pytest.raises(RecipeError, match="'a' and 'b' are one tensor in the checkpoints, but two in a mapping"):
        combine_many(tied, rows(2, 2), [tensors(True), tensors(False)])
    apart = [tensors(False), tensors(False)]
    for out in ([tensors(False), tensors(True)], [apart[0], tensors(False)], [tensors(False)] * 2):
        with pytest.raises(RecipeError, match="shares its memory with another tensor"):
            combine_many(apart, rows(2, 2), out)
    wide = {name: value.double() for name, value in tensors(False).items()}
    with pytest.raises(RecipeError, match="'a' is of different types in the mappings"):
        combine_many(apart, rows(2, 2), [tensors(False), wide])


def test_types_of_the_results():
    files = [{"w": torch.tensor([1.0, 1.0]).bfloat16()}, {"w": torch.tensor([1.0, 1.0078125]).bfloat16()}]
    like = {"w": torch.zeros(2)}
    found = combine_many(files, [(0.75, 0.25), (0.5, 0.5)], like=like)
    assert [row["w"].tolist() for row in found] == [[1.0, 1.001953125], [1.0, 1.00390625]]
    again = combine_many(files, [(0.5, 0.5), (0.75, 0.25)], found)
    assert [row["w"].tolist() for row in again] == [[1.0, 1.00390625], [1.0, 1.001953125]]


# ------------------------------------------------------------------------------------------------------- differing


def test_which_tensors_differ(tmp_path):
    given_models = models(3, size=300_000)
    for model in given_models[1:]:
        model["w"] = given_models[0]["w"].clone()
    assert differing(given_models) == ("m", "s", "n.num_batches_tracked")
    given_models[2]["w"][-1] += 1  # the last element of the last chunk
    assert differing(given_models)[0] == "w"
    for i, model in enumerate(given_models):
        torch.save(model, tmp_path / f"{i}.pt")
    assert differing([tmp_path / f"{i}.pt" for i in range(3)]) == differing(given_models)
    assert differing(given_models[:1]) == ()


def test_another_type_is_a_difference():
    assert differing([{"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.float64)}]) == ("w",)
