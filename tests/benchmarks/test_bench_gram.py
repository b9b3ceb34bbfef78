import pytest

from tests.benchmarks import bench_gram


@pytest.mark.slow
def test_the_benchmark_runs_on_a_small_model(capsys):
    bench_gram.main(["--model", "test_vit", "--checkpoints", "3", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "1.00 x" in printed
    assert "inspect_weights" in printed
