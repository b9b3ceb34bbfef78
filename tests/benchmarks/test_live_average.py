import pytest

from tests.benchmarks import live_average


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--busy"]])
def test_the_benchmark_runs_on_a_small_model(arguments, capsys):
    live_average.main(["--model", "test_vit", "--rounds", "1", *arguments])
    printed = capsys.readouterr().out
    assert printed.count("\nLightning's EMA") == printed.count("\nlimit ") == 2
