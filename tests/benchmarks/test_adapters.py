import pytest

from tests.benchmarks import adapters


@pytest.mark.slow
def test_the_benchmark_runs_on_small_layers(capsys):
    adapters.main(["--width", "256", "--rounds", "1", "--layers", "1", "--scale", "32"])
    printed = capsys.readouterr().out
    assert "dense SVD / SVD of the core" in printed
    assert printed.count("svd") == 1
    assert "7 layers, 10 adapters of rank 16" in printed
