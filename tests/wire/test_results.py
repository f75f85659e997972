"""Result files: what was saved, by name; whole or in part; or refused."""

from __future__ import annotations

import hashlib
import io

import pytest
import safetensors.torch
import torch

from weft.errors import MessageError, NoSuchError
from weft.graph.frame import Frame
from weft.graph.node import Map, Name, Ref, Seq
from weft.graph.site import Site
from weft.kernels.frames import to_frame
from weft.wire import frames as files
from weft.wire.messages import Manifest, encode
from weft.wire.results import decode_result, encode_result, select, write_result

TENSORS = {
    "0": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16),
    "1": torch.arange(3),
    "2": torch.tensor([1 + 2j], dtype=torch.complex128),
    "3": torch.zeros(0, 3),
    "4": torch.tensor(True),
}
FRAMES = {name: to_frame(tensor) for name, tensor in TENSORS.items()}
MANIFEST = Manifest(
    saved=(
        ("h", Ref(0)),
        ("list é", Seq("list", (Ref(1), Ref(2), "text", None))),
        ("again", Map(("x",), (Ref(1),))),
        ("empty", Seq("tuple", (Ref(3),))),
        ("best", Ref(4)),
        ("number", Name("float", "nan")),
    ),
    ended=Site("h.1", "output"),
)
DATA = encode_result(MANIFEST, FRAMES)


def test_a_result_is_read_as_it_was_written():
    assert decode_result(DATA) == (MANIFEST, FRAMES)


def test_a_result_without_tensors_is_one_too():
    for manifest in (Manifest(saved=()), Manifest(saved=(("n", 3.0),))):
        assert decode_result(encode_result(manifest, {})) == (manifest, {})


def test_a_result_is_a_file_of_tensors_for_others_too():
    assert torch.equal(safetensors.torch.load(DATA)["0"], TENSORS["0"])


def test_a_result_written_in_pieces_is_the_same():
    file = io.BytesIO()
    found = write_result(file, MANIFEST, FRAMES)
    assert file.getvalue() == DATA
    assert found == (len(DATA), hashlib.sha256(DATA).hexdigest())


# Parts


class File:
    """A file that keeps account of what was read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.read = 0

    def __call__(self, start: int, end: int) -> bytes:
        self.read += end - start
        return self.data[start:end]


NAMES = [name for name, _ in MANIFEST.saved]
PARTS = [[name] for name in NAMES] + [["best", "h"], ["again", "list é"], NAMES, []]


@pytest.mark.parametrize("names", PARTS, ids=str)
def test_a_part_has_these_names_and_their_tensors_only(names):
    manifest, frames = decode_result(select(File(DATA), names))
    assert manifest.saved == tuple(entry for entry in MANIFEST.saved if entry[0] in names)
    assert manifest.ended == MANIFEST.ended
    assert all(FRAMES[name] == frame for name, frame in frames.items())


def test_a_part_of_everything_is_the_same_file():
    assert select(File(DATA), NAMES) == DATA


def test_no_other_tensor_is_read_for_a_part():
    large = Frame("uint8", (1 << 20,), bytes(1 << 20))
    manifest = Manifest(saved=(("large", Ref(0)), ("small", Ref(1))))
    file = File(encode_result(manifest, {"0": large, "1": FRAMES["1"]}))
    assert decode_result(select(file, ["small"]))[1] == {"1": FRAMES["1"]}
    assert file.read < 1000


def test_a_name_that_was_not_saved_is_refused():
    with pytest.raises(NoSuchError, match="'g'"):
        select(File(DATA), ["h", "g"])


# What is no result


def file(manifest: Manifest, frames: dict[str, Frame], form: str = "weft-result") -> bytes:
    return files.write(frames, {"format": form, "manifest": encode(manifest, "json").decode()})


H = Manifest(saved=(("h", Ref(0)),))
X = FRAMES["0"]
BAD = {
    "nothing": b"",
    "a cut file": DATA[:-1],
    "another format": file(H, {"0": X}, "weft-graph"),
    "no format": files.write({"0": X}),
    "no manifest": files.write({"0": X}, {"format": "weft-result"}),
    "a manifest that is no JSON": files.write(
        {"0": X}, {"format": "weft-result", "manifest": "saved"}
    ),
    "a manifest nested too deeply": files.write(
        {}, {"format": "weft-result", "manifest": '{"saved":[["h",' + '["seq","list",[' * 100_000}
    ),
    "a manifest of slices nested too deeply": files.write(
        {},
        {
            "format": "weft-result",
            "manifest": '{"saved":[["h",' + '["slice",' * 800 + '["ref",0]' + "]" * 800 + "]]}",
        },
    ),
    "a tensor that the manifest does not name": file(H, {"0": X, "1": X}),
    "a tensor that is not there": file(H, {}),
    "a tensor under another name": file(H, {"x": X}),
    "a second part of a tensor": file(Manifest(saved=(("h", Ref(0, 1)),)), {"0": X}),
    "a name twice": file(Manifest(saved=(("h", Ref(0)), ("h", Ref(0)))), {"0": X}),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_result_is_refused(bad):
    assert decode_result(file(H, {"0": X})) == (H, {"0": X})
    with pytest.raises(MessageError):
        decode_result(BAD[bad])


def test_a_result_that_could_not_be_read_is_not_written():
    with pytest.raises(MessageError, match="'1'"):
        encode_result(H, {"0": X, "1": X})
    with pytest.raises(MessageError, match="'0'"):
        write_result(io.BytesIO(), H, {})
