import math
import random
import statistics

import pytest

from lightning_soup.errors import UnsupportedSetup
from lightning_soup.runs.sweep_parameter import read_parameter


def draws(options, count=2000):
    parameter = read_parameter(options, "file: lr")
    return [parameter.draw(random.Random(i)) for i in range(count)]


REAL = [  # options, lowest, highest, expected median
    ({"min": 0.0, "max": 4.0}, 0, 4, 2),
    ({"distribution": "uniform", "min": 1, "max": 3}, 1, 3, 2),
    ({"distribution": "log_uniform", "min": -4, "max": 0}, math.exp(-4), 1, math.exp(-2)),
    ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}, 1e-4, 1e-2, 1e-3),
    ({"distribution": "inv_log_uniform", "min": -1, "max": 3}, math.exp(-3), math.e, math.exp(-1)),
    ({"distribution": "inv_log_uniform_values", "min": 1e-4, "max": 1e-2}, 1e-4, 1e-2, 1e-3),
    ({"distribution": "normal", "mu": 5, "sigma": 0.1}, 4, 6, 5),
    ({"distribution": "normal"}, -5, 5, 0),
    ({"distribution": "log_normal", "mu": 1, "sigma": 0.1}, 1.5, 5, math.e),
    ({"distribution": "beta", "a": 2, "b": 2}, 0, 1, 0.5),
    ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, 0, 1, 0.5),
]


@pytest.mark.parametrize(("options", "low", "high", "median"), REAL)
def test_real_valued_distributions(options, low, high, median):
    values = draws(options)
    assert all(type(value) is float and low <= value <= high for value in values)
    assert statistics.median(values) == pytest.approx(median, rel=0.15, abs=0.1 * (high - low))


WHOLE = [  # options, every value that must come up
    ({"min": 2, "max": 5}, {2, 3, 4, 5}),
    ({"distribution": "int_uniform", "min": -1, "max": 1}, {-1, 0, 1}),
    ({"distribution": "q_uniform", "min": 8, "max": 40, "q": 8}, {8, 16, 24, 32, 40}),
    ({"distribution": "q_log_uniform", "min": 0.0, "max": math.log(4)}, {1, 2, 3, 4}),
    ({"distribution": "q_log_uniform_values", "min": 16, "max": 64, "q": 16}, {16, 32, 48, 64}),
    ({"distribution": "q_normal", "sigma": 0.5}, {-2, -1, 0, 1, 2}),
    ({"distribution": "q_log_normal", "mu": 0, "sigma": 0.1}, {1}),
    ({"distribution": "q_beta", "q": 1}, {0, 1}),
]


@pytest.mark.parametrize(("options", "values"), WHOLE)
def test_quantized_distributions_give_integers_for_an_integer_q(options, values):
    drawn = draws(options)
    assert set(drawn) == values
    assert all(type(value) is int for value in drawn)


def test_choices():
    assert {str(value) for value in draws({"values": ["a", None, [1]]})} == {"a", "None", "[1]"}
    assert draws({"value": {"x": 1}}, 2) == [{"x": 1}, {"x": 1}]
    drawn = draws({"values": ["rare", "often"], "probabilities": [0.1, 0.9]})
    assert drawn.count("often") == pytest.approx(1800, rel=0.05)
    assert set(draws({"values": [1, 2], "probabilities": [0, 1]})) == {2}


def test_constant_may_be_null():
    assert draws({"value": None}, 1) == [None]


GRIDS = [
    ({"value": 3}, [3]),
    ({"values": ["b", "a", "b"]}, ["b", "a", "b"]),
    ({"min": 1, "max": 3}, [1, 2, 3]),
    ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, [0, 0.25, 0.5, 0.75]),
    ({"distribution": "q_uniform", "min": 1, "max": 10, "q": 4}, [1, 5, 9]),
    ({"min": 0.0, "max": 1.0}, None),
    ({"values": [1, 2], "probabilities": [0.5, 0.5]}, None),
]


@pytest.mark.parametrize(("options", "values"), GRIDS)
def test_grid(options, values):
    assert read_parameter(options, "lr").grid() == values


WRONG = [
    ({}, "expected value, values, min and max"),
    ({"min": 1}, "expected value, values, min and max"),
    ({"distribution": "unifrom", "min": 0, "max": 1}, "'unifrom'. Did you mean 'uniform'"),
    ({"distribution": ["uniform"]}, "no distribution"),
    ({"distribution": "uniform", "min": 0}, "uniform needs max"),
    ({"distribution": "normal", "min": 0, "max": 1}, "normal takes no 'min'"),
    ({"min": 0, "max": 1, "q": 2}, "int_uniform takes no 'q'"),
    ({"min": 1, "max": 1}, "min below max"),
    ({"min": "1e-4", "max": 1.0}, "min is the text '1e-4'.*1.0e-3"),
    ({"min": True, "max": 3}, "min is True; expected a number"),
    ({"min": 0.0, "max": float("inf")}, "max is inf; expected a number"),
    ({"distribution": "int_uniform", "min": 0, "max": 2.5}, "whole numbers"),
    ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min above 0"),
    ({"distribution": "q_log_uniform_values", "min": -1, "max": 1}, "min above 0"),
    ({"distribution": "log_uniform", "min": 1, "max": 1000}, "exponents of e; log_uniform_values"),
    ({"distribution": "inv_log_uniform", "min": -1000, "max": 1}, "exponents of e"),
    ({"distribution": "log_normal", "mu": 1000}, "mean of log X"),
    ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}, "q above 0"),
    ({"distribution": "normal", "sigma": -1}, "sigma not below 0"),
    ({"distribution": "beta", "a": 0}, "a and b above 0"),
    ({"values": []}, "at least one value"),
    ({"values": "abc"}, "a list with at least one value"),
    ({"values": [1, 2], "probabilities": [0.5]}, "one probability for each"),
    ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "adding up to 1"),
    ({"values": [1, 2], "probabilities": [1.5, -0.5]}, "one probability for each"),
    ({"values": [1, 2], "probabilities": 1}, "one probability for each"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UnsupportedSetup, match=f"^sweep.yaml: lr: .*{message}"):
        read_parameter(options, "sweep.yaml: lr")
