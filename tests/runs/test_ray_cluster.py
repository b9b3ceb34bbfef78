import os
import signal
import socket
import sys
from types import SimpleNamespace

import pytest

from lightning_soup.errors import MissingExtra, UnsupportedSetup
from lightning_soup.runs import ray_cluster
from lightning_soup.runs.ray_cluster import Pulse, connected, enough_room, is_address
from lightning_soup.runs.sweep_ray import RayCluster


class RayError(Exception):
    """In place of `ray.exceptions.RayError`."""


class FakeRay(SimpleNamespace):
    """What `connected` needs of Ray: it takes over SIGTERM, as the real one does."""

    exceptions = SimpleNamespace(RayError=RayError)

    def __init__(self, error=None, running=False):
        super().__init__(calls=[], error=error, running=running)

    def is_initialized(self):
        return self.running

    def init(self, address, **options):
        self.calls.append((address, options, os.environ.get("RAY_USAGE_STATS_ENABLED")))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.error:
            raise self.error

    def shutdown(self):
        self.calls.append("shutdown")


@pytest.fixture
def use(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)

    def install(ray):
        monkeypatch.setitem(sys.modules, "ray", ray)
        return ray

    return install


def node(name, cpus, gpus=None, alive=True):
    return {
        "NodeManagerHostname": name,
        "Alive": alive,
        "Resources": {"CPU": cpus} | ({} if gpus is None else {"GPU": gpus}),
    }


def cluster(*nodes):
    return SimpleNamespace(nodes=lambda: list(nodes))


def test_addresses():
    for text in ("auto", "10.0.0.1:6379", "ray://head:10001", "[::1]:6379"):
        assert is_address(text)
        assert RayCluster(text).address == text
    for text in ("", "local", "head", "http://head:1", "ray://head", "head:port", "my head:1"):
        with pytest.raises(
            UnsupportedSetup, match=rf"address is '{text}'; expected auto, HOST:PORT or ray://HOST:PORT"
        ):
            RayCluster(text)


@pytest.mark.parametrize("number", [0, -1, 1.5, float("nan"), float("inf")])
def test_cpus_that_ray_does_not_take(number):
    with pytest.raises(UnsupportedSetup, match=rf"num_cpus is {number}; expected a whole number of CPUs or a part"):
        RayCluster(num_cpus=number)


@pytest.mark.parametrize("number", [-1, 2, 1.5, float("nan")])
def test_gpus_that_a_training_cannot_have(number):
    with pytest.raises(UnsupportedSetup, match=rf"num_gpus is {number}; expected 1, a part of 1, or 0"):
        RayCluster(num_gpus=number)


def test_numbers_that_ray_takes():
    for cpus, gpus in ((0.5, 0), (1, None), (8, 0.25), (2.0, 1)):
        assert RayCluster(num_cpus=cpus, num_gpus=gpus).num_gpus == gpus


def test_without_an_address_a_cluster_is_started_and_stopped_and_tells_nobody(use, monkeypatch):
    ray, handler = use(FakeRay()), signal.getsignal(signal.SIGTERM)
    with connected(None) as module:
        assert module is ray
        ((address, options, usage),) = ray.calls
        assert signal.getsignal(signal.SIGTERM) is handler
    assert (address, usage) == ("local", "0")
    assert options["include_dashboard"] is False
    assert options["num_cpus"] == len(os.sched_getaffinity(0))
    assert ray.calls[1:] == ["shutdown"]
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    with connected(None):
        assert ray.calls[2][2] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"


def test_an_error_in_the_block_disconnects(use):
    ray = use(FakeRay())
    with pytest.raises(KeyboardInterrupt), connected("auto"):
        raise KeyboardInterrupt
    assert ray.calls[0][0] == "auto"
    assert "num_cpus" not in ray.calls[0][1]
    assert ray.calls[1:] == ["shutdown"]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_where_nobody_answers_is_told_at_once(use, monkeypatch, scheme):
    with socket.socket() as bound:  # bound and not listening: refused
        bound.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{bound.getsockname()[1]}"
        ray = use(FakeRay())
        expected = rf"address is '{address}', where no Ray cluster can be reached: .*refused\. Expected auto.*ray start"
        with pytest.raises(UnsupportedSetup, match=expected), connected(address):
            pass
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UnsupportedSetup, match=expected), connected("auto"):
            pass
    assert ray.calls == []
    with pytest.raises(UnsupportedSetup, match="no Ray cluster can be reached"), connected("127.0.0.1:99999"):
        pass


def test_what_ray_says_of_a_cluster_that_does_not_fit(use):
    ray, handler = use(FakeRay(RuntimeError("Version mismatch:\n  Python 3.9"))), signal.getsignal(signal.SIGTERM)
    with pytest.raises(UnsupportedSetup, match=r"reached: Version mismatch: Python 3\.9\. Expected"), connected("auto"):
        pass
    assert ray.calls[1:] == ["shutdown"]
    assert signal.getsignal(signal.SIGTERM) is handler
    with pytest.raises(UnsupportedSetup, match="could not start a cluster on this machine: Version"), connected(None):
        pass
    use(FakeRay(ValueError("Ray Client requires pip package `ray[client]`.")))
    with pytest.raises(MissingExtra, match=r'pip install "ray\[client\]"'), connected("auto"):
        pass


def test_a_cluster_whose_token_is_missing(use):
    ray = use(FakeRay(RayError("Token authentication is enabled but no authentication token was found.")))
    expected = r"address is 'auto'.*no authentication token was found\. Expected auto.*RAY_AUTH_MODE=token"
    with pytest.raises(UnsupportedSetup, match=expected), connected("auto"):
        pass
    assert ray.calls[1:] == ["shutdown"]


def test_ray_that_the_program_uses_already_is_left_alone(use):
    ray = use(FakeRay(running=True))
    with pytest.raises(UnsupportedSetup, match=r"Call ray.shutdown\(\) first"), connected(None):
        pass
    assert ray.calls == []


def test_without_ray_the_command_that_brings_it_is_told(use):
    use(None)
    with pytest.raises(MissingExtra, match=r'pip install "lightning_soup\[ray\]"'), connected(None):
        pass


def test_trainings_run_where_there_is_room_and_on_a_gpu_where_there_is_one():
    small, large, dead = node("small", 2), node("large", 8, 4), node("dead", 99, 9, alive=False)
    assert enough_room(cluster(small, dead), None, 2, None) == ([small], 0)
    assert enough_room(cluster(small, large), None, 1, None) == ([large], 1)
    assert enough_room(cluster(small, large), None, 1, 0) == ([small, large], 0)
    assert enough_room(cluster(small, large), None, 4, 0.5) == ([large], 0.5)


def test_a_cluster_without_enough_room():
    small, large = node("small", 8), node("large", 2, 4)
    with pytest.raises(UnsupportedSetup) as error:
        enough_room(cluster(small, large), "head:6379", 4, 1)
    assert str(error.value) == (
        "num_cpus is 4 and num_gpus is 1; expected what a node of the cluster at head:6379 has: small with 8 and 0; "
        "large with 2 and 4. Ask for less, or add a node."
    )
    with pytest.raises(UnsupportedSetup, match="expected what this machine has: small with 8 and 0"):
        enough_room(cluster(small), None, 9, None)


def connection(address, client=False):
    return SimpleNamespace(
        util=SimpleNamespace(client=SimpleNamespace(ray=SimpleNamespace(is_connected=lambda: client))),
        get_runtime_context=lambda: SimpleNamespace(gcs_address=address),
    )


def test_a_head_node_that_is_silent_for_long_is_gone(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ray_cluster, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with socket.socket() as bound:  # bound and not listening: refused
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        pulse = Pulse(connection(address))
        for clock.now in (0.0, 29.0):
            pulse.feel()
        clock.now = 31.0
        with pytest.raises(
            ConnectionError, match=rf"head node at {address} has not answered for 30 seconds \(Connection refused\)"
        ):
            pulse.feel()
        Pulse(connection(address, client=True)).feel()
        bound.listen()
        pulse.feel()  # it is back
    clock.now = 99.0
    pulse.feel()  # and has just gone again
