import pytest

from tests.benchmarks import pruning


@pytest.mark.slow
def test_the_benchmark_runs_on_a_small_model(capsys):
    pruning.main(["--model", "test_vit", "--trained", "test_vit", "--rounds", "1", "--images", "1"])
    printed = capsys.readouterr().out
    assert printed.count("1.00 x") >= 3
    assert printed.count("kth_smallest") == 2
    assert printed.count("global_unstructured") == 1
    assert "masks on weights, gradients and both moments" in printed
