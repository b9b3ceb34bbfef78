import pytest

from tests.benchmarks import combine


@pytest.mark.slow
def test_the_benchmark_runs_on_a_small_model(tmp_path, capsys):
    combine.main(["--model", "test_vit", "--checkpoints", "2", "--rounds", "1", "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "2 x test_vit" in printed
    assert printed.count("load whole and add") == 2
    assert printed.count("threads") >= 5
    assert not list(tmp_path.iterdir())
