import os
import pickle
import random

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_soup.errors import UnreadableCheckpoint
from lightning_soup.weights import combine, open_checkpoint, save_weights
from lightning_soup.weights.save import save_combination
from lightning_soup.weights.stored_tensor import PiecewiseTensor, Scratch
from tests.helpers.boring import TinyClassifier
from tests.helpers.distributed import grid, save, write_shards
from tests.helpers.memory import extra_memory
from tests.helpers.two_ranks import run_on_two_ranks
from tests.helpers.weights import assert_same, every_layout, every_type

TENSORS = every_type() | every_layout()
STATE = {"state": {"w": torch.ones(3)}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (TENSORS, None),
        ({"model": TENSORS, "optimizer": STATE, "epoch": 3, "step": torch.tensor(5)}, "model"),
        ({"state_dict": TENSORS, "optimizer_0": STATE}, "state_dict"),
        ({"app": {"model": TENSORS, "optim": STATE}}, "model"),
        ({"net_of_mine": TENSORS, "optimizer": STATE}, "net_of_mine"),
        ({"model": {f"module.{name}": tensor for name, tensor in TENSORS.items()}}, "model"),
    ],
    ids=["bare", "model", "state_dict", "app", "own name", "ddp"],
)
def test_every_type_and_layout_wherever_the_weights_stand(tmp_path, content, key):
    opened = open_checkpoint(save(content, tmp_path / "a"))
    assert_same(opened, TENSORS)
    assert (opened.key, opened.format, opened.path, opened.label) == (key, "torch distributed", tmp_path / "a", "a")
    assert not any("optim" in name for name in opened.dropped)
    assert opened.digest() == open_checkpoint(TENSORS).digest()


def test_averages_and_raw_weights_in_one_folder(tmp_path):
    raw, average = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    folder = save({"model": raw, "ema": average}, tmp_path / "a")
    assert_same(open_checkpoint(folder), average)
    assert_same(open_checkpoint(folder, which="raw"), raw)


def test_several_models_are_not_guessed_among(tmp_path):
    folder = save({"generator": {"w": torch.ones(3)}, "critic": {"w": torch.ones(3)}}, tmp_path / "a")
    with pytest.raises(UnreadableCheckpoint, match=r"no weights found. It holds 'generator' \(dict\), 'critic'"):
        open_checkpoint(folder)


def test_like_a_folder(tmp_path):
    weights = {"module.w": torch.ones(3)}
    folder = save({"model": weights}, tmp_path / "a")
    path = save_weights({"w": torch.zeros(3)}, tmp_path / "b.pt", like=folder)
    assert torch.load(path, weights_only=True)["model"]["module.w"].tolist() == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------
# shards

BIG = torch.randn(700, 900)  # more than two chunks
SHARDED = {
    "rows": (BIG, grid(BIG.shape, [[3, 333], []])),
    "columns": (BIG, grid(BIG.shape, [[], [1, 500]])),
    "grid": (BIG, grid(BIG.shape, [[100, 650], [333]])),
    "pinwheel": (
        BIG[:3, :3],
        [([0, 0], [1, 2]), ([0, 2], [2, 1]), ([2, 1], [1, 2]), ([1, 0], [2, 1]), ([1, 1], [1, 1])],
    ),
    "cube": (torch.randn(7, 5, 6), grid((7, 5, 6), [[2], [1, 4], [5]])),
    "half": (BIG[0].half(), grid((900,), [[899]])),
    "counts": (torch.arange(10), grid((10,), [[4]])),
    "one row": (torch.randn(1, 4), [([0, 0], [1, 4]), ([1, 0], [0, 4])]),
    "scalar": (torch.tensor(2.5), [([], [])]),
    "empty": (torch.zeros(0, 4), [([0, 0], [0, 4])]),
}
WHOLE = {name: tensor for name, (tensor, _) in SHARDED.items()}


def folder_of(path, tensors=SHARDED, **options):
    return write_shards(path, {f"model.{name}": value for name, value in tensors.items()}, **options)


def test_shards_of_any_kind(tmp_path):
    folder = folder_of(tmp_path / "a")
    dcp_to_torch_save(folder, tmp_path / "b.pt")  # torch finds the same in what the helper wrote
    assert_same(torch.load(tmp_path / "b.pt", weights_only=True)["model"], WHOLE)
    opened = open_checkpoint(folder)
    assert_same(opened, WHOLE)
    assert opened.digest() == open_checkpoint(WHOLE).digest()
    assert_same(pickle.loads(pickle.dumps(opened)), WHOLE)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
@pytest.mark.parametrize("threads", [1, 3])
def test_combinations_are_those_of_the_whole_tensors_bit_for_bit(tmp_path, suffix, threads, monkeypatch):
    other = {name: t if name == "counts" else torch.randn(t.shape).to(t.dtype) for name, t in WHOLE.items()}
    # Cut elsewhere: another number of ranks wrote it.
    cuts = {n: [[s // 2] if s > 1 else [] for s in t.shape] for n, t in other.items()}
    folders = [
        folder_of(tmp_path / "a"),
        folder_of(tmp_path / "b", {n: (t, grid(t.shape, cuts[n])) for n, t in other.items()}, files=5),
    ]
    expected = combine([WHOLE, other], [0.3, 0.7])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(PiecewiseTensor, "tensor", None)  # nothing is put together
    path = save_combination(folders, [0.3, 0.7], tmp_path / f"out{suffix}")
    monkeypatch.undo()
    assert_same(open_checkpoint(path), expected)
    assert_same(combine(folders, [0.3, 0.7]), expected)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory as Linux tells it")
@pytest.mark.parametrize(
    "cuts", [[[1000], []], pytest.param([[], [1000]], marks=pytest.mark.slow)], ids=["rows", "columns"]
)
def test_no_tensor_is_held_in_memory(tmp_path, cuts):
    size = 64 << 20
    for i in range(2):
        tensor = torch.full((size // 8192, 2048), float(i))
        folder_of(tmp_path / str(i), {"w": (tensor, grid(tensor.shape, cuts))})
    assert extra_memory(tmp_path, ["0", "1"], "soup.safetensors") < size / 4
    assert open_checkpoint(tmp_path / "soup.safetensors")["w"].unique().tolist() == [0.5]


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "a")
    reads = []
    original = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at: reads.append(len(buffers[0])) or original(fd, buffers, at)
    )
    opened = open_checkpoint(folder)
    assert {name: spec.shape for name, spec in opened.specs.items()} == {n: tuple(t.shape) for n, t in WHOLE.items()}
    assert not reads
    opened.tensors["rows"].read(5, 25, Scratch(80))
    assert sum(reads) < 8000  # one archive's directory and pickle, and 20 numbers


def _ranks(folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 1))
    torch.save(model.state_dict(), f"{folder}/fsdp{dist.get_rank()}.pt")
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters())
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=f"{folder}/fsdp")
    whole = torch.arange(7 * 9.0).view(7, 9)
    both = init_device_mesh("cpu", (1, 2))
    spread = {
        "columns": distribute_tensor(whole, mesh, [Shard(1)]),
        "both": distribute_tensor(whole, both, [Shard(0), Shard(1)]),
        "twice": distribute_tensor(whole, both, [Shard(0), Shard(0)]),
        "everywhere": distribute_tensor(whole, mesh, [Replicate()]),
        "nothing on one": distribute_tensor(whole[:1], mesh, [Shard(0)]),
        "plain": whole,
    }
    dcp.save(spread, checkpoint_id=f"{folder}/spread")
    dist.destroy_process_group()


def test_folders_that_two_ranks_wrote(tmp_path):
    run_on_two_ranks(_ranks, str(tmp_path))
    fsdp = open_checkpoint(tmp_path / "fsdp")
    assert_same(fsdp, torch.load(tmp_path / "fsdp0.pt", weights_only=True))
    assert len(fsdp.tensors["0.weight"].files) == 2
    whole = torch.arange(7 * 9.0).view(7, 9)
    expected = dict.fromkeys(("columns", "both", "twice", "everywhere", "plain"), whole) | {"nothing on one": whole[:1]}
    assert_same(open_checkpoint(tmp_path / "spread"), expected)


# ------------------------------------------------------------------------------------------------------
# Lightning


def _lightning(folder):
    import logging
    import warnings

    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from tests.helpers.averages import ROWS, fit, loaders

    class Sharded(TinyClassifier):
        def configure_model(self):
            if not isinstance(self.net[0].weight, DTensor):
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=True)
    trainer, _, _ = fit(ROWS[0].make(), devices=2, module=Sharded, strategy=strategy, data=loaders(8))
    trainer.save_checkpoint(f"{folder}/sharded.ckpt")
    strategy._save_distributed_checkpoint = False
    trainer.save_checkpoint(f"{folder}/whole.ckpt")


def test_lightning_folders_open_as_lightning_files_do(tmp_path):
    run_on_two_ranks(_lightning, str(tmp_path))
    sharded, whole = tmp_path / "sharded.ckpt", tmp_path / "whole.ckpt"
    assert (sharded / ".metadata").is_file()
    for which in ("average", "raw", "ema"):
        ours, theirs = open_checkpoint(sharded, which=which), open_checkpoint(whole, which=which)
        assert_same(ours, theirs)
        assert (ours.format, ours.key) == (theirs.format, theirs.key)
        assert set(ours.dropped) == set(theirs.dropped)
    assert not torch.equal(open_checkpoint(sharded)["net.0.bias"], open_checkpoint(sharded, which="raw")["net.0.bias"])
    assert ours.metadata["hyper_parameters"] == {"batch_norm": False, "lr": 0.05}
    with pytest.raises(UnreadableCheckpoint, match=r"no live average 'swa' \(of those it holds 'ema'\)"):
        open_checkpoint(sharded, which="swa")
    save_weights(sharded, tmp_path / "saved.ckpt", like=sharded)
    loaded = TinyClassifier.load_from_checkpoint(tmp_path / "saved.ckpt", map_location="cpu")
    assert_same(loaded.state_dict(), open_checkpoint(sharded))


def test_the_other_name_that_lightning_gives_and_fabric(tmp_path):
    weights = {"w": torch.arange(3.0)}
    folder = save({"model": weights, "optimizer_0": STATE}, tmp_path / "a")
    torch.save({"step": torch.tensor(3), "lr": 0.1}, folder / "meta.pt")
    opened = open_checkpoint(folder)
    assert_same(opened, weights)
    assert (opened.format, opened.key) == ("torch distributed", "model")
    assert opened.metadata == {"step": 3, "lr": 0.1}
    torch.save({"pytorch-lightning_version": "2.5.0", "epoch": 4}, folder / "meta.pt")
    opened = open_checkpoint(folder)
    assert_same(opened, weights)
    assert (opened.format, opened.key, opened.metadata["epoch"]) == ("lightning", "state_dict", 4)


# ------------------------------------------------------------------------------------------------------
# damage


def test_missing_and_truncated_files(tmp_path):
    folder = folder_of(tmp_path / "a")
    shard = folder / "__1_0.distcp"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UnreadableCheckpoint, match=rf"__1_0.distcp: ends at byte {len(data) - 1}, .*Copy the whole"):
        open_checkpoint(folder)
    shard.unlink()
    with pytest.raises(UnreadableCheckpoint, match=r"'__1_0.distcp' is missing.*a shard of 'model.rows'"):
        open_checkpoint(folder)
    shard.write_bytes(bytes(len(data)))
    with pytest.raises(UnreadableCheckpoint, match=r"__1_0.distcp: a damaged or truncated"):
        combine([folder], [1.0])
    shard.write_bytes(data)
    (folder / ".metadata").unlink()
    with pytest.raises(UnreadableCheckpoint, match=r"no \.metadata, which is written last"):
        open_checkpoint(folder)
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(UnreadableCheckpoint, match="damaged or truncated"):
        open_checkpoint(folder)


def test_a_file_that_changes_between_opening_and_reading(tmp_path):
    folder = folder_of(tmp_path / "a")
    opened = open_checkpoint(folder)
    (folder / "__0_0.distcp").write_bytes(b"other")
    with pytest.raises(UnreadableCheckpoint, match=r"__0_0.distcp: was replaced or changed"):
        combine([opened], [1.0])


def test_an_archive_of_something_else(tmp_path):
    def swap(index):
        (a, b), (c, d), *others = index.storage_data.items()
        index.storage_data = {a: d, c: b, **dict(others)}

    pair = {"a": (torch.ones(3), [([0], [3])]), "b": (torch.ones(3, dtype=torch.int32), [([0], [3])])}
    folder = folder_of(tmp_path / "a", pair, change=swap)
    with pytest.raises(UnreadableCheckpoint, match=r"lies a int32 \[3\], where .metadata says .* 'model.a' \(float32"):
        _ = open_checkpoint(folder)["a"]
    for content, what in (([1, 2], "list"), (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear")):
        torch.save(content, tmp_path / "other")
        size = (tmp_path / "other").stat().st_size

        def point(index, size=size):
            next(iter(index.storage_data.values())).length = size

        folder = folder_of(tmp_path / "b", {"a": pair["a"]}, change=point)
        (folder / "__0_0.distcp").write_bytes((tmp_path / "other").read_bytes())
        with pytest.raises(UnreadableCheckpoint, match=f"at byte 0 lies a {what}, .*Only dense"):
            _ = open_checkpoint(folder)["a"]


def test_random_damage_is_found_or_changes_only_values(tmp_path):
    tensors = {"a": (torch.randn(6, 4), grid((6, 4), [[2], [1]])), "b": (torch.randn(3), [([0], [3])])}
    folder = folder_of(tmp_path / "a", tensors)
    rng = random.Random(5)
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        for _ in range(300):
            bad = bytearray(good)
            for _ in range(rng.choice((1, 1, 4))):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            file.write_bytes(bad[: rng.randrange(len(bad))] if rng.random() < 0.1 else bad)
            try:
                for name, tensor in open_checkpoint(folder).items():
                    assert tensor.numel() < 1000, name
            except UnreadableCheckpoint:
                pass
        file.write_bytes(good)
