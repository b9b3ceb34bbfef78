import os
import subprocess
import sys

import pytest
from jsonargparse import auto_cli

import lightning_soup.cli.sweep as sweep_module
from lightning_soup.cli.sweep import sweep
from lightning_soup.errors import MissingExtra, UnsupportedSetup
from lightning_soup.weights import open_checkpoint
from tests.helpers.sweeps import base_config, write_yaml
from tests.helpers.workers import Stack

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")  # data of 100 samples


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Give the command, of a sweep over two learning rates, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    parameters = {"model.lr": {"values": [0.01, 0.05]}, "seed_everything": {"value": 1}}
    write_yaml(tmp_path / "sweep.yaml", {"method": "grid", "parameters": parameters})

    def run(*arguments, **trainer):
        write_yaml(tmp_path / "base.yaml", base_config(**{"max_epochs": 1, **trainer}))
        return auto_cli(sweep, args=["base.yaml", "sweep.yaml", "--folder=runs", *arguments])

    return run


@pytest.fixture
def chosen(monkeypatch):
    """What `run_sweep` is given, in place of a training."""
    given = {}

    class Given(Exception):
        pass

    def run_sweep(*_, **options):
        given.update(options)
        raise Given

    def choose(command, *arguments, **trainer):
        with pytest.raises(Given):
            command(*arguments, **trainer)
        return given

    monkeypatch.setattr(sweep_module, "run_sweep", run_sweep)
    return choose


@pytest.fixture
def _with_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", sys.modules[__name__])  # all that is asked before a sweep starts


@pytest.mark.parametrize("option", ["address=auto", "num_cpus=2", "num_gpus=0"])
def test_options_of_ray_need_ray(command, option):
    name, _, value = option.partition("=")
    with pytest.raises(UnsupportedSetup, match=rf"{name} is {value}.*an option of engine ray. Add --engine ray"):
        command(f"--{option}")


def test_wrong_options_are_told_before_anything_is_made(command, tmp_path):
    for options, message in (
        (["--jobs=2"], r"jobs is 2 with engine ray.*Leave it out"),
        (["--num_gpus=2"], r"num_gpus is 2.0; expected 1, a part of 1, or 0"),
        (["--num_cpus=0"], r"num_cpus is 0.0; expected a whole number"),
        (["--address=head"], r"address is 'head'; expected auto"),
    ):
        with pytest.raises(UnsupportedSetup, match=message):
            command("--engine=ray", *options)
    with pytest.raises(UnsupportedSetup, match=r"trainer.devices is \[1\].*Set devices: 1"):
        command("--engine=ray", devices=[1], accelerator="auto")
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("_with_ray")
def test_negative_retries(command, tmp_path):
    for engine in ("local", "ray"):
        with pytest.raises(UnsupportedSetup, match=r"retries is -1; expected 0 or more"):
            command("--retries=-1", f"--engine={engine}")
    assert not (tmp_path / "runs").exists()


def test_without_ray_the_command_that_brings_it_is_told(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r'pip install "lightning_soup\[ray\]"'):
        command("--engine=ray")
    assert not (tmp_path / "runs").exists()


def test_this_machine_is_the_default(command, chosen):
    assert chosen(command, "--jobs=2", "--retries=1")["engine"] is None
    assert chosen(command, "--jobs=2", "--retries=1")["retries"] == 1


@pytest.mark.usefixtures("_with_ray")
def test_the_options_reach_ray(command, chosen):
    options = ["--engine=ray", "--address=auto", "--num_cpus=2", "--num_gpus=0.5", "--retries=3"]
    given = chosen(command, *options)
    cluster = given["engine"]
    assert (cluster.address, cluster.num_cpus, cluster.num_gpus, given["retries"]) == ("auto", 2, 0.5, 3)
    assert cluster.same() == given["fingerprint"]
    assert chosen(command, "--engine=ray", accelerator="auto")["engine"].num_gpus is None
    given = chosen(command, "--engine=ray")
    assert (given["engine"].address, given["engine"].num_cpus, given["engine"].num_gpus) == (None, 1, 0)
    assert given["retries"] == 0


@pytest.mark.usefixtures("_with_ray")
def test_progress_is_a_bar_where_the_trainings_own_bars_go_to_their_logs(command, chosen):
    bar = chosen(command, "--jobs=2", enable_progress_bar=True)["progress"]
    assert chosen(command, "--engine=ray", enable_progress_bar=True)["progress"] is bar
    assert chosen(command, enable_progress_bar=True)["progress"] is not bar


def test_runs_of_an_engine_are_those_of_this_machine(command, tmp_path, monkeypatch):
    here = command("--folder=here", "--cook=UniformSoup")
    monkeypatch.setattr(sweep_module, "choose_engine", lambda *_, **__: Stack())
    apart = command("--engine=ray", "--folder=apart", "--cook=UniformSoup")
    assert [run.setting for run in apart.runs] == [run.setting for run in here.runs]
    ours, theirs = (
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")) for name in ("here", "apart")
    )
    assert ours == theirs
    for path in tmp_path.glob("here/*/run.json"):
        assert path.read_text() == (tmp_path / "apart" / path.parent.name / "run.json").read_text()
    a, b = (open_checkpoint(tmp_path / name / "soup.safetensors") for name in ("here", "apart"))
    assert all((a[name] == b[name]).all() for name in a)
    assert a


@pytest.mark.slow
def test_ray_is_imported_by_nobody_who_does_not_ask_for_it():
    code = "import sys, lightning_soup.cli.sweep, lightning_soup.runs.sweep_ray; sys.exit('ray' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_options_with_replicas(command, tmp_path):
    for options, message in (
        (["--jobs=2"], r"jobs is 2 with engine replicas, where each rank trains one. Leave it out"),
        (["--num_gpus=1"], r"num_gpus is 1.0, an option of engine ray"),
        ([], r"none did. Start the command with .*torchrun"),
    ):
        with pytest.raises(UnsupportedSetup, match=message):
            command("--engine=replicas", *options)
    with pytest.raises(UnsupportedSetup, match=r"trainer.devices is \[1\].*sees only its rank's own. Set devices: 1"):
        command("--engine=replicas", devices=[1], accelerator="auto")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_under_torchrun_runs_are_those_of_this_machine(command, tmp_path):
    here = command("--folder=here", "--cook=UniformSoup")
    program = tmp_path / "program.py"
    program.write_text('from lightning_soup.cli.main import main\n\nif __name__ == "__main__":\n    main()\n')
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    arguments = ["base.yaml", "sweep.yaml", "--engine=replicas", "--folder=apart", "--cook=UniformSoup"]
    done = subprocess.run(
        [*launch, "sweep", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("apart: 2 ingredients") == 1  # rank 0 speaks for all
    for run in here.runs:
        apart = tmp_path / "apart" / run.folder.name
        assert (apart / "run.json").read_text() == (run.folder / "run.json").read_text()
        assert (apart / run.checkpoint.relative_to(run.folder)).read_bytes() == run.checkpoint.read_bytes()
    a, b = (open_checkpoint(tmp_path / name / "soup.safetensors") for name in ("here", "apart"))
    assert all((a[name] == b[name]).all() for name in a)
