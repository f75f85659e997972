"""Files of tensors: the same as the `safetensors` library reads and writes, and ours back whole."""

from __future__ import annotations

import hashlib
import io
import math
import tracemalloc

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import MessageError
from weft.graph.frame import ITEM_SIZES, Frame, frame_bytes
from weft.kernels.frames import to_frame, to_tensor
from weft.testing.same import bitwise
from weft.wire.frames import CODES, digest, read, write, write_to

SHAPES = [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (1,) * 9]
HELD = sorted(ITEM_SIZES)
FOREIGN = ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"]


def numbers(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Different numbers of a dtype."""
    flat = torch.arange(math.prod(shape), dtype=torch.float64) - 2
    kind = getattr(torch, dtype)
    return (flat % 2 if dtype == "bool" else flat * 0.75).to(kind).reshape(shape)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    dtype = draw(st.sampled_from(HELD))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    size = frame_bytes(dtype, shape)
    byte = st.sampled_from(b"\0\1") if dtype == "bool" else st.integers(0, 255)
    return Frame(dtype, shape, bytes(draw(st.lists(byte, min_size=size, max_size=size))))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TEXTS = st.dictionaries(NAMES.filter(lambda key: key != "dtypes"), NAMES, max_size=3)


def alike(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    bitwise({name: got[name] for name in sorted(got)}, dict(sorted(expected.items())))


# With the library


@pytest.mark.parametrize("dtype", sorted(CODES))
def test_the_library_reads_what_we_write(dtype):
    tensors = {f"{shape}": numbers(dtype, shape) for shape in SHAPES}
    data = write({name: to_frame(tensor) for name, tensor in tensors.items()}, {"a": "b"})
    alike(safetensors.torch.load(data), tensors)


@pytest.mark.parametrize("dtype", sorted(CODES))
def test_we_read_what_the_library_writes(dtype):
    tensors = {f"{shape}": numbers(dtype, shape) for shape in SHAPES}
    found, metadata = read(safetensors.torch.save(tensors, {"a": "b", "é": "\n"}))
    alike({name: to_tensor(frame) for name, frame in found.items()}, tensors)
    assert metadata == {"a": "b", "é": "\n"}


def test_dtypes_of_every_width_stand_beside_each_other_in_both(tmp_path):
    tensors = {f"x.{dtype}": numbers(dtype, (3,)) for dtype in CODES}
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    ours = {name: to_frame(tensor) for name, tensor in tensors.items()}
    assert read((tmp_path / "theirs").read_bytes())[0] == ours
    (tmp_path / "ours").write_bytes(write(ours))
    alike(safetensors.torch.load_file(tmp_path / "ours"), tensors)


@pytest.mark.parametrize("dtype", FOREIGN)
def test_a_dtype_that_no_graph_holds_is_refused_by_name(dtype):
    data = safetensors.torch.save({"x": torch.zeros(2).to(getattr(torch, dtype))})
    with pytest.raises(MessageError, match="'x' has dtype"):
        read(data)


def test_what_the_library_has_no_dtype_for_stands_in_it_as_bytes():
    tensor = numbers("complex128", (2, 3))
    data = write({"x": to_frame(tensor), "y": to_frame(torch.zeros(2))})
    raw = safetensors.torch.load(data)["x"]
    assert (raw.dtype, raw.shape) == (torch.uint8, (2, 3, 16))
    bitwise(raw.view(torch.complex128).squeeze(-1), tensor)
    found, metadata = read(data)
    bitwise(to_tensor(found["x"]), tensor)
    assert metadata == {}


@pytest.mark.parametrize("dtype", HELD)
def test_every_tensor_lies_where_its_dtype_may(dtype):
    some = {name: to_frame(numbers(name, (3,))) for name in HELD}
    data = write(some)
    at = data.index(bytes(some[dtype].data)) if dtype not in ("bool", "uint8", "int8") else 0
    assert at % min(ITEM_SIZES[dtype], 8) == 0


# Round trips


@settings(max_examples=200, deadline=None)
@given(tensors=st.dictionaries(NAMES, frames(), max_size=4), metadata=TEXTS)
def test_what_is_written_is_read(tensors, metadata):
    assert read(write(tensors, metadata)) == (tensors, metadata)


@settings(max_examples=50, deadline=None)
@given(tensors=st.dictionaries(NAMES, frames(), max_size=4), metadata=TEXTS)
def test_a_file_written_in_pieces_is_the_same(tensors, metadata):
    file = io.BytesIO()
    size, sha = write_to(file, tensors, metadata)
    data = file.getvalue()
    assert data == write(tensors, metadata)
    assert (size, sha) == (len(data), hashlib.sha256(data).hexdigest())


@settings(max_examples=100, deadline=None)
@given(frame=frames())
def test_tensors_of_every_dtype_go_there_and_back(frame):
    again = to_frame(to_tensor(frame))
    assert again == frame
    assert digest(again) == digest(frame)


def test_the_order_of_the_tensors_does_not_matter():
    a, b = to_frame(torch.ones(2)), to_frame(torch.zeros(3))
    assert write({"a": a, "b": b}) == write({"b": b, "a": a})


STRANGE = {
    "transposed": lambda x: x.mT,
    "a slice": lambda x: x[:, 1::2],
    "expanded": lambda x: x[0, 0].expand(4, 5),
    "conjugated": lambda x: x.to(torch.complex64).mul(1j).conj(),
    "negated": lambda x: x.to(torch.complex64).mul(1j).conj().imag,
    "with a gradient": lambda x: (x * 1.0).requires_grad_(),
    "made without gradients": torch.inference_mode()(lambda x: x + 1),
    "a parameter": lambda x: torch.nn.Parameter(x),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_frame_has_the_numbers_of_any_tensor(strange):
    tensor = STRANGE[strange](torch.arange(20.0).reshape(4, 5))
    got = to_tensor(to_frame(tensor))
    bitwise(got, tensor.detach().resolve_conj().resolve_neg().contiguous())
    assert type(got) is torch.Tensor and not got.requires_grad


def test_a_frame_does_not_follow_its_tensor():
    tensor = torch.zeros(3)
    frame = to_frame(tensor)
    tensor += 1
    bitwise(to_tensor(frame), torch.zeros(3))


def test_a_tensor_may_be_written_and_its_frame_stays():
    data = write({"x": to_frame(torch.zeros(3))})
    tensor = to_tensor(read(data)[0]["x"])
    tensor += 1
    bitwise(to_tensor(read(data)[0]["x"]), torch.zeros(3))
    assert tensor.resize_(5).shape == (5,)


def test_a_frame_of_another_size_makes_no_tensor():
    with pytest.raises(ValueError, match=r"8 bytes are no float32\[3\]"):
        to_tensor(Frame("float32", (3,), bytes(8)))


# Digests


def test_a_digest_is_of_dtype_shape_and_bytes():
    frame = to_frame(torch.tensor([[1.0, 2.0]]))
    by_hand = hashlib.sha256(b"float32[1, 2]" + bytes(frame.data)).hexdigest()
    assert digest(frame) == by_hand
    others = [torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)]
    others.append(torch.tensor([[1.0, 2.0]]).view(torch.int32))
    assert len({digest(to_frame(other)) for other in others} | {by_hand}) == 5


# Memory

LARGE = 8 << 20


def peak(do) -> int:
    """The most bytes that Python has meanwhile."""

    def once() -> int:
        tracemalloc.start()
        do()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    return min(once() for _ in range(3))  # threads of other tests take some, too


def test_large_tensors_are_not_copied_to_be_read_or_written():
    frame = Frame("uint8", (LARGE,), bytes(LARGE))
    data = write({"x": frame})
    assert peak(lambda: read(data)) < LARGE // 8
    assert peak(lambda: write_to(io.BufferedWriter(Sink()), {"x": frame})) < LARGE // 8
    assert peak(lambda: digest(frame)) < LARGE // 8


class Sink(io.RawIOBase):
    """A file that keeps nothing."""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        return len(data)


# What cannot be written

WRONG = {
    "too few bytes": ({"x": Frame("float32", (2,), b"1234")}, {}),
    "too many bytes": ({"x": Frame("float32", (), b"12345")}, {}),
    "a tensor with the name of the metadata": ({"__metadata__": Frame("bool", (0,), b"")}, {}),
    "metadata that the format uses itself": ({}, {"dtypes": "{}"}),
    "half a character": ({"\ud800": Frame("bool", (0,), b"")}, {}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_could_not_be_read_is_not_written(wrong):
    with pytest.raises(ValueError):
        write(*WRONG[wrong])
