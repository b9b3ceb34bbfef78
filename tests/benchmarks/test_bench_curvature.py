import pytest

from tests.benchmarks import bench_curvature


@pytest.mark.slow
def test_the_benchmark_runs_on_a_small_model(capsys):
    bench_curvature.main(["--width", "16", "--depth", "1", "--samples", "4", "--steps", "3", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "1.00 x" in printed
    assert "top eigenvalue, 3 steps" in printed
