import pytest

from tests.benchmarks import experts


@pytest.mark.slow
def test_the_benchmark_runs(capsys):
    experts.main(["--rounds", "1", "--images", "1"])
    printed = capsys.readouterr().out
    assert printed.count("1.00 x") >= 5
    assert printed.count("EWA, all layers") == 2
