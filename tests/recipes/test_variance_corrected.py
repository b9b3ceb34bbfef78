"""Variance correction: the method's golden cases, what is corrected and what is not, drift, records and refusals."""

import math
import warnings

import pytest
import torch
from torch import nn

from lightning_soup.errors import RecipeError
from lightning_soup.recipes import UniformSoup, VarianceCorrectedSoup, recook
from lightning_soup.recipes.provenance import provenance_of
from lightning_soup.weights import open_checkpoint, save_weights
from lightning_soup.weights.variance import correctable, corrections, moments


def matrix(*values):
    return {"w": torch.tensor([values], dtype=torch.float64).T}  # a row each


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(
        found.flatten().double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance
    )


def soup_of(*models, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return VarianceCorrectedSoup(**options).cook(models)


# ------------------------------------------------------------------------------------------------------ golden cases

FIRST, SECOND, OWN = matrix(1, 2, 3, 4), matrix(4, 2, 0, 2), matrix(0, 1, 0, 3)


def test_the_variance_is_brought_back_and_the_mean_stays():
    soup = soup_of(FIRST, SECOND)
    [factor], [mean] = soup.corrected["w"].factors, soup.corrected["w"].means
    assert factor == pytest.approx(2.280350850198276, abs=1e-12)
    assert mean == pytest.approx(2.25)
    found = soup.weights()["w"]
    close(found, (2.820088, 1.679912, 0.539737, 3.960263))
    assert found.mean().item() == pytest.approx(2.25, abs=1e-12)
    assert found.var(unbiased=False).item() == pytest.approx(1.625, abs=1e-12)


def test_sample_variances_give_the_same_factor():
    variances = [model["w"].var().item() for model in (FIRST, SECOND)]
    average = (FIRST["w"] + SECOND["w"]) / 2
    factor = math.sqrt(sum(variances) / 2 / average.var().item())
    assert soup_of(FIRST, SECOND).corrected["w"].factors == (pytest.approx(factor, abs=1e-12),)


def test_copies_and_orthogonal_ones():
    close(soup_of(FIRST, FIRST, FIRST).weights()["w"], (1, 2, 3, 4), 1e-12)
    found = soup_of(matrix(1, 1, -1, -1), matrix(1, -1, 1, -1))
    close(found.weights()["w"], (math.sqrt(2), 0, 0, -math.sqrt(2)), 1e-12)
    found = soup_of(matrix(0.01, -0.01, 0.02, -0.02), matrix(0.02, 0.01, -0.02, -0.01))
    assert found.corrected["w"].factors[0] == pytest.approx(1.490712, abs=1e-6)  # 1.316561 with the later code's ε
    close(found.weights()["w"], (0.022361, 0, 0, -0.022361))


@pytest.mark.parametrize(
    ("target", "factor", "expected"),
    [
        ("others", 1.520234, (1.054912, 1.434971, 0.294795, 3.715322)),
        ("self", 1.460593, (1.077277, 1.442426, 0.346981, 3.633316)),
        ("mix", 1.490712, (1.065983, 1.438661, 0.320627, 3.674729)),
    ],
)
def test_a_nodes_own_model(target, factor, expected):
    soup = soup_of(OWN, FIRST, SECOND, beta=0.5, target=target)
    assert soup.coefficients == (0.5, 0.25, 0.25)
    assert soup.corrected["w"].factors[0] == pytest.approx(factor, abs=1e-6)
    close(soup.weights()["w"], expected)


def test_norms_are_averaged_only():
    scales = [
        {"norm.weight": torch.tensor(v, dtype=torch.float64), **FIRST} for v in ([1.1, 0.9, 1, 1], [1, 1, 0.9, 1.1])
    ]
    close(soup_of(*scales).weights()["norm.weight"], (1.05, 0.95, 0.95, 1.05), 1e-12)


def test_fused_matrices():
    a = matrix(0.1, -0.1, 0.1, -0.1, 1, -1, -1, 1)
    b = matrix(0.1, 0.1, -0.1, -0.1, 1, -1, -1, 1)
    whole = soup_of(a, b)
    assert whole.corrected["w"].factors[0] == pytest.approx(1.002484, abs=1e-6)
    assert whole.weights()["w"].abs()[:1].item() == pytest.approx(0.100248, abs=1e-6)
    parts = soup_of(a, b, chunks={"w": 2})
    assert parts.corrected["w"].factors == (pytest.approx(math.sqrt(2), abs=1e-12), pytest.approx(1, abs=1e-12))
    close(parts.weights()["w"][[0, 3]], (0.141421, -0.141421))


@pytest.mark.parametrize(
    ("count", "rho", "factor"),
    [(4, 0, 2), (4, 0.5, 1.264911), (4, 0.99, 1.003771), (16, 0.9, 1.050451), (2, 0.999, 1.000250)],
)
def test_factors_of_correlated_models(count, rho, factor):
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(400, 250, generator=draw, dtype=torch.float64)
    models = [
        {"w": math.sqrt(rho) * common + math.sqrt(1 - rho) * torch.randn(400, 250, generator=draw, dtype=torch.float64)}
        for _ in range(count)
    ]
    assert soup_of(*models).corrected["w"].factors[0] == pytest.approx(factor, rel=5e-3)


# ------------------------------------------------------------------------------------------------ what is corrected


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)
    )


def test_matrices_only():
    models = [network(seed) for seed in range(4)]
    soup = soup_of(*models)
    assert set(soup.corrected) == {"0.weight", "2.weight", "4.weight"}
    plain = UniformSoup(common_start="ignore").cook(models).weights()
    found = soup.weights()
    for name, value in plain.items():
        if name not in soup.corrected:
            assert torch.equal(found[name], value)
    for name in soup.corrected:
        variances = [dict(model.named_parameters())[name].var(unbiased=False).item() for model in models]
        assert found[name].var(unbiased=False).item() == pytest.approx(sum(variances) / 4, rel=1e-5)
        assert found[name].mean().item() == pytest.approx(plain[name].mean().item(), abs=1e-6)


def test_embeddings_and_single_numbers_are_left_out():
    weights = {"pos_embed": torch.rand(1, 4, 2), "cls_token": torch.rand(1, 1, 2), "scale": torch.rand(1, 1)}
    weights |= {"token_embedding.weight": torch.rand(3, 2), "w": torch.rand(2, 2), "n": torch.ones(2, 2).long()}
    opened = open_checkpoint(weights)
    assert correctable(opened, VarianceCorrectedSoup().exclude) == ["w"]
    assert correctable(opened, ["w"]) == ["pos_embed", "cls_token", "token_embedding.weight"]


def test_tied_tensors_are_corrected_once():
    models = [{"a": value, "b": value} for value in (FIRST["w"], SECOND["w"])]
    soup = soup_of(*models)
    found = soup.weights()
    assert list(soup.corrected) == ["a"]
    close(found["b"], (2.820088, 1.679912, 0.539737, 3.960263))
    assert found["a"].data_ptr() == found["b"].data_ptr()


def test_opposites_keep_their_mean():
    soup = soup_of(matrix(1, -2, 3), matrix(-1, 2, -3))
    assert soup.corrected["w"].factors == (1.0,)
    close(soup.weights()["w"], (0, 0, 0), 0)
    constant = soup_of(matrix(1, 1, 1), matrix(2, 2, 2))
    close(constant.weights()["w"], (1.5, 1.5, 1.5), 0)


def test_related_models_are_told_that_nothing_was_done():
    base = network(0).state_dict()
    near = [
        {n: v + 1e-3 * torch.randn_like(v) if v.is_floating_point() else v for n, v in base.items()} for _ in range(3)
    ]
    assert any("correction does nothing" in note for note in soup_of(*near).notes)
    assert any("factors, " in note for note in soup_of(FIRST, SECOND).notes)


def test_a_thousand_merges_do_not_drift():
    a, b = FIRST, SECOND
    for _ in range(1000):
        a, b = (soup_of(x, y).weights() for x, y in ((a, b), (b, a)))
    assert a["w"].var(unbiased=False).item() == pytest.approx(1.625, rel=1e-9)
    assert a["w"].mean().item() == pytest.approx(2.25, rel=1e-9)


# ------------------------------------------------------------------------------------------------- moments, streamed


@pytest.mark.parametrize("size", [(3, 1), (7, 5), (300, 1100)])
@pytest.mark.parametrize("parts", [1, 3])
def test_moments(size, parts):
    rows = size[0] - size[0] % parts
    values = 1000 + torch.randn(rows, size[1], generator=torch.Generator().manual_seed(0))
    found = list(moments(open_checkpoint({"w": values}).tensors["w"], parts))
    for part, (mean, variance) in zip(values.double().chunk(parts), found, strict=True):
        assert mean == pytest.approx(part.mean().item(), rel=1e-12)
        assert variance == pytest.approx(part.var(unbiased=False).item(), rel=1e-9, abs=1e-12)


# ------------------------------------------------------------------------------------------------------- records


def test_the_file_is_cooked_again(tmp_path):
    files = [save_weights(network(seed), tmp_path / f"{seed}.safetensors") for seed in range(3)]
    soup = soup_of(*files, beta=0.3, chunks={"2.weight": 4})
    path = soup.save(tmp_path / "soup.safetensors")
    assert recook(path).read_bytes() == path.read_bytes()
    assert len(open_checkpoint(path).provenance["corrected"]["2.weight"][0]) == 4
    for name, value in soup.weights().items():
        assert torch.equal(open_checkpoint(path)[name], value)


@pytest.mark.parametrize("damaged", [3, {"w": [[1.0], []]}, {"x": [[1.0], [0.0]]}, {"w": [[math.nan], [0.0]]}])
def test_a_damaged_record_is_not_recooked(tmp_path, damaged):
    files = [save_weights(model, tmp_path / f"{i}.safetensors") for i, model in enumerate((FIRST, SECOND))]
    soup = soup_of(*files)
    record = {**provenance_of(soup, tmp_path), "corrected": damaged}
    path = save_weights(soup.weights(), tmp_path / "soup.safetensors", provenance=record)
    with pytest.raises(RecipeError, match="record of what was corrected after averaging is damaged"):
        recook(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, "beta=1.5"),
        ({"target": "all"}, "target='all'"),
        ({"chunks": {"w": 3}}, "w has 4 rows, which are not divided into 3"),
        ({"chunks": {"w": 0}}, "not divided into 0"),
        ({"chunks": {"x*": 2}}, "pattern 'x\\*' fits none"),
        ({"exclude": ["*"]}, "there is no matrix to correct"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(RecipeError, match=message):
        soup_of(FIRST, SECOND, **options)


def test_shares_that_are_zero_are_not_read():
    broken = {"w": torch.full((4, 1), math.nan)}
    models = [open_checkpoint(model) for model in (broken, FIRST)]
    found = corrections(models, SECOND, (0.0, 1.0), ["w"], {})
    assert found["w"].factors[0] == pytest.approx(math.sqrt(1.25 / 2.0))
