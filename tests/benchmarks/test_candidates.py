import pytest

from tests.benchmarks import candidates


@pytest.mark.slow
def test_the_benchmark_runs_on_a_small_model(capsys):
    candidates.main(["--model", "test_vit", "--checkpoints", "3", "--generations", "2", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert printed.count("a generation of 2") == 2
    assert printed.count("1.00 x") >= 2
