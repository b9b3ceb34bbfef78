import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_soup.weights.data_file import DataFile
from lightning_soup.weights.stored_tensor import (
    FileTensor,
    MemoryTensor,
    Piece,
    PiecewiseTensor,
    Scratch,
    TensorSpec,
    gather,
    row_major_blocks,
    scatter,
)
from tests.helpers.distributed import grid
from tests.helpers.weights import bits, every_layout, every_type

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_blocks_follow_one_another_and_are_few(shape, data):
    total = math.prod(shape)
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start, total))
    numbers = torch.arange(total).reshape(shape)
    blocks = list(row_major_blocks(shape, start, stop)) if start < stop else []
    walked = list(itertools.chain.from_iterable(numbers[index].reshape(-1).tolist() for index in blocks))
    assert walked == list(range(start, stop))
    assert len(blocks) <= max(1, 2 * len(shape) - 1)


@given(SHAPES, st.data())
def test_gather_and_scatter_any_strides(shape, data):
    order = data.draw(st.permutations(range(len(shape))))
    total = math.prod(shape)
    source = torch.randn(total * 2)[::2].reshape([shape[i] for i in order])
    source = source.permute([order.index(i) for i in range(len(shape))]) if shape else source
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    out = torch.empty(stop - start)
    gather(source, start, out)
    assert torch.equal(out, source.reshape(-1)[start:stop])
    target = torch.zeros(total).as_strided(source.shape, torch.empty(source.shape).stride())
    scatter(out, target, start)
    assert torch.equal(target.reshape(-1)[start:stop], out)
    assert target.count_nonzero() <= stop - start


@given(SHAPES, st.data())
def test_any_run_of_a_tensor_in_pieces(tmp_path_factory, shape, data):
    source = torch.arange(math.prod(shape), dtype=torch.int16).reshape(shape)
    cuts = [sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else [] for n in shape]
    boxes = data.draw(st.permutations(grid(shape, cuts)))
    parts = [source[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for box in boxes]
    path = tmp_path_factory.mktemp("pieces") / "data"
    path.write_bytes(b"x" + b"".join(map(bits, parts)))
    file, place, pieces = DataFile(path), 1, []
    for (start, _), part in zip(boxes, parts, strict=True):
        pieces.append(Piece(tuple(start), FileTensor(file, TensorSpec(part.dtype, tuple(part.shape)), place)))
        place += part.numel() * 2
    stored = PiecewiseTensor(TensorSpec(source.dtype, shape), pieces)
    assert torch.equal(stored.tensor(), source)
    start = data.draw(st.integers(0, source.numel()))
    stop = data.draw(st.integers(start, source.numel()))
    values, raw = stored.read(start, stop, Scratch(2 * (stop - start)))
    assert bits(values) == bytes(raw) == bits(source.reshape(-1)[start:stop])


def test_pieces_have_files_and_an_identity(tmp_path):
    (tmp_path / "a").write_bytes(bytes(32))
    (tmp_path / "b").write_bytes(bytes(32))
    a, b = DataFile(tmp_path / "a"), DataFile(tmp_path / "b")

    def pair(second, offset):
        spec = TensorSpec(torch.float32, (2,))
        pieces = [Piece((2,), FileTensor(second, spec, offset)), Piece((0,), FileTensor(a, spec, 0))]
        return PiecewiseTensor(TensorSpec(torch.float32, (4,)), pieces)

    assert pair(b, 0).identity == pair(b, 0).identity
    assert len({pair(b, 0).identity, pair(b, 8).identity, pair(a, 8).identity}) == 3
    assert (pair(b, 0).files, pair(a, 8).files, MemoryTensor(torch.ones(1)).files) == ((a, b), (a,), ())
    empty = [PiecewiseTensor(TensorSpec(torch.float32, (0, 2)), []) for _ in range(2)]
    assert empty[0].identity != empty[1].identity
    assert empty[0].tensor().shape == (0, 2)


@pytest.mark.parametrize("name", every_layout())
def test_a_chunk_of_any_layout_touches_no_more_than_it_needs(tmp_path, name, monkeypatch):
    """A tensor that is not row-major must not be copied whole for each chunk."""
    tensor = every_layout()[name]
    stored = MemoryTensor(tensor)
    copied = []
    original = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, other: copied.append(other.numel()) or original(self, other)
    )
    monkeypatch.setattr(torch.Tensor, "reshape", None)
    values, data = stored.read(2, 6, Scratch(64))
    monkeypatch.undo()
    assert sum(copied) <= 4
    assert bits(values) == bytes(data) == bits(tensor.reshape(-1)[2:6])


def test_scratch_gives_any_type_and_reuses_its_views():
    scratch = Scratch(64)
    for dtype in (tensor.dtype for tensor in every_type().values()):
        count = 64 // dtype.itemsize
        values, data = scratch.view(dtype, count)
        assert (values.dtype, len(values), len(data)) == (dtype, count, 64)
        assert scratch.view(dtype, count)[0] is values
    for count in range(1, 100):
        assert len(Scratch(128).view(torch.uint8, count)[0]) == count
    first = scratch.view(torch.uint8, 1)[0]
    for count in range(1, 65):
        scratch.view(torch.uint8, count)[0].fill_(count)
        scratch.view(torch.int8, count)
    assert first.item() == 64
    assert len(scratch._views) <= 64


def test_unaligned_data_is_read_too(tmp_path):
    tensor = torch.randn(6, 4)
    for shift in (0, 1, 3, 4):
        (tmp_path / "a").write_bytes(b"x" * shift + bits(tensor))
        file = DataFile(tmp_path / "a")
        straight = FileTensor(file, TensorSpec(torch.float32, (6, 4)), shift)
        turned = FileTensor(file, TensorSpec(torch.float32, (4, 6)), shift, (1, 4))
        assert torch.equal(straight.tensor(), tensor)
        assert torch.equal(turned.tensor(), tensor.t())
        assert torch.equal(turned.read(3, 17, Scratch(100))[0], tensor.t().reshape(-1)[3:17])


def test_a_mapped_tensor_does_not_take_the_whole_file_along(tmp_path):
    (tmp_path / "a").write_bytes(bytes(4000))
    tensor = FileTensor(DataFile(tmp_path / "a"), TensorSpec(torch.float32, (3, 2)), 40).tensor()
    assert tensor.untyped_storage().nbytes() == 24
    torch.save(tensor, tmp_path / "b.pt")
    assert (tmp_path / "b.pt").stat().st_size < 2500


def test_equal_tensors_are_not_the_same_one():
    weight = torch.ones(2, 3)
    assert MemoryTensor(weight).identity == MemoryTensor(weight).identity
    others = weight.clone(), weight.t(), weight[:1], weight.view(torch.int32), weight.view(3, 2)
    assert len({MemoryTensor(other).identity for other in (weight, *others)}) == 6
    assert MemoryTensor(torch.zeros(0)).identity != MemoryTensor(torch.zeros(0)).identity


def test_conjugated_and_negated_views_are_resolved():
    values = torch.randn(4, dtype=torch.complex64)
    assert bits(MemoryTensor(values.conj()).read(0, 4, Scratch(64))[0]) == bits(values.conj().resolve_conj())
    assert bits(MemoryTensor(torch._neg_view(values.real)).tensor()) == bits(-values.real)


def test_specs_say_what_they_are():
    assert str(TensorSpec(torch.bfloat16, (2, 3))) == "bfloat16 [2, 3]"
    assert TensorSpec(torch.float64, ()).nbytes == 8
    assert TensorSpec(torch.float64, (0, 3)).numel == 0
