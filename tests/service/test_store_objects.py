"""What every store of objects promises, tried on the folder and on the fake alike.

Then what only the folder has: modes, drafts, the order of what is flushed.
"""

from __future__ import annotations

import io
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.leftovers import only_here
from tests.service.jobs import together
from weft.service.store import shelf
from weft.service.store.bells import Bells
from weft.service.store.folder import NEW, PIECE, FolderObjects
from weft.service.store.interface import Objects
from weft.service.store.memory import MemoryObjects
from weft.settings import Settings


@pytest.fixture(params=["memory", "folder", "shelf", "shelf of large ones"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> Iterator[Objects]:
    with ExitStack() as stack:
        if request.param == "memory":
            made: Objects = MemoryObjects()
        elif request.param == "folder":
            made = FolderObjects(tmp_path / "objects")
        else:
            if request.param != "shelf":
                monkeypatch.setattr(shelf, "SMALL", -1)
            made = stack.enter_context(opened(tmp_path))
        stack.callback(made.close)
        yield made


@contextmanager
def opened(path: Path) -> Iterator[shelf.Shelf]:
    """A shelf, with its ledger."""
    with Bells.of_models() as bells:
        ledger, made = shelf.open_store(path / "x", path / "objects", Settings(), bells)
        yield made
        made.close()
        ledger.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[FolderObjects]:
    made = FolderObjects(tmp_path / "objects")
    yield made
    made.close()


# -- both ----------------------------------------------------------------------------------------


def test_what_is_put_is_there(objects):
    assert objects.put("results/a", b"bytes")
    assert objects.get("results/a") == b"bytes"
    assert objects.size("results/a") == 5


def test_nothing_at_all_can_be_put(objects):
    assert objects.put("results/a", b"")
    assert objects.get("results/a") == b""
    assert objects.size("results/a") == 0
    assert list(objects.stream("results/a")) == []


def test_the_first_one_stays(objects):
    assert objects.put("results/a", b"first")
    assert not objects.put("results/a", b"second")
    assert not objects.put("results/a", io.BytesIO(b"third"))
    assert objects.get("results/a") == b"first"


def test_a_file_is_put_from_where_it_stands(objects):
    data = os.urandom(3 * PIECE + 17)
    file = io.BytesIO(b"head" + data)
    file.seek(4)
    assert objects.put("constants/ann/a", file)
    assert objects.get("constants/ann/a") == data
    assert b"".join(objects.stream("constants/ann/a")) == data


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_anything_that_holds_bytes_can_be_put(objects, kind):
    assert objects.put("results/a", kind(b"bytes"))
    assert objects.get("results/a") == b"bytes"


@pytest.mark.parametrize(
    ("start", "end"), [(0, None), (0, 0), (3, 7), (9, None), (10, None), (12, 20), (5, 99), (5, 5)]
)
def test_a_part_is_the_part(objects, start, end):
    objects.put("results/a", b"0123456789")
    assert b"".join(objects.stream("results/a", start, end)) == b"0123456789"[start:end]


def test_a_large_part_comes_in_pieces(objects):
    data = os.urandom(2 * PIECE + 5)
    objects.put("results/a", data)
    pieces = list(objects.stream("results/a", 1, len(data) - 1))
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= PIECE
    assert b"".join(pieces) == data[1:-1]


@pytest.mark.parametrize(("start", "end"), [(-1, None), (5, 4), (0, -1)])
def test_a_part_that_cannot_be(objects, start, end):
    objects.put("results/a", b"0123456789")
    with pytest.raises(ValueError, match="no bytes from"):
        objects.stream("results/a", start, end)


def test_what_is_not_there(objects):
    objects.put("results/a", b"")
    with pytest.raises(KeyError, match="results/b"):
        objects.get("results/b")
    with pytest.raises(KeyError, match="results/b"):
        objects.stream("results/b")
    assert objects.size("results/b") is None
    assert objects.touched("results/b") is None
    assert not objects.touch("results/b")
    objects.delete("results/b")
    objects.delete("nothing/at/all")


def test_what_is_deleted_is_gone_and_can_be_put_again(objects):
    objects.put("results/a", b"first")
    objects.delete("results/a")
    assert objects.size("results/a") is None
    assert objects.put("results/a", b"second")
    assert objects.get("results/a") == b"second"


def test_names_by_folder(objects):
    for name in ("results/b", "results/a", "constants/ann/d", "constants/bob/d", "resultsx"):
        objects.put(name, b"")
    assert objects.names("results/") == ["results/a", "results/b"]
    assert objects.names("constants/") == ["constants/ann/d", "constants/bob/d"]
    assert objects.names("constants/ann/") == ["constants/ann/d"]
    assert objects.names("nothing/") == []
    assert len(objects.names("")) == 5


@pytest.mark.parametrize("prefix", ["results", "../", "/", "a//", ".new/"])
def test_no_other_prefix(objects, prefix):
    with pytest.raises(ValueError):
        objects.names(prefix)


BAD = [
    *("", "/", "a/", "/a", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".new/a", "a.b", "a b"),
    *("a\\b", "a\0", "a\n", "é", "a:b", "~", "a" * 129, "/".join("abcdefghi"), "%2e%2e/a"),
]


@pytest.mark.parametrize("name", BAD)
def test_nothing_else_is_a_name(objects, name):
    for act in (
        lambda: objects.put(name, b"x"),
        lambda: objects.get(name),
        lambda: objects.size(name),
        lambda: objects.stream(name),
        lambda: objects.delete(name),
        lambda: objects.touch(name),
        lambda: objects.touched(name),
    ):
        with pytest.raises(ValueError, match="cannot be an object's name"):
            act()
    assert objects.names("") == []


def test_the_longest_name(objects):
    name = "/".join(["a" * 128] * 8)
    assert objects.put(name, b"x")
    assert objects.names("") == [name]


def test_touched_says_when_an_object_was_wanted_last(objects):
    before = time.time() - 0.1  # a file's time may be a clock tick behind
    objects.put("constants/ann/a", b"")
    first = objects.touched("constants/ann/a")
    assert before <= first <= time.time()
    time.sleep(0.02)
    assert objects.touch("constants/ann/a")
    assert objects.touched("constants/ann/a") > first


def test_of_eight_threads_one_puts(objects):
    put: list[int] = []

    def act(number: int) -> None:
        if objects.put("results/a", io.BytesIO(bytes([number]) * 100_000)):
            put.append(number)

    together(8, act)
    (winner,) = put
    assert objects.get("results/a") == bytes([winner]) * 100_000


class Broken(io.RawIOBase):
    """Gives some pieces, then an error; who wants all at once gets the error."""

    def __init__(self) -> None:
        self.reads = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if size < 0 or self.reads > 2:
            raise OSError("the connection broke")
        return b"x" * 10


def test_a_file_that_breaks_leaves_nothing(objects):
    with pytest.raises(OSError, match="the connection broke"):
        objects.put("results/a", Broken())
    assert objects.size("results/a") is None
    assert objects.put("results/a", b"whole")


# -- the folder ----------------------------------------------------------------------------------


def drafts(path: Path) -> list[Path]:
    return [file for file in (path / NEW).rglob("*") if file.is_file()]


def test_only_its_owner_may_look(tmp_path):
    path = tmp_path / "objects"
    path.mkdir(mode=0o755)
    made = FolderObjects(path)
    made.put("constants/ann/a", b"secret")
    assert path.stat().st_mode & 0o777 == 0o700
    assert (path / "constants/ann").stat().st_mode & 0o777 == 0o700
    assert (path / "constants/ann/a").stat().st_mode & 0o777 == 0o600
    made.close()


def test_it_is_there_for_the_next_one_that_opens_it(tmp_path):
    first = FolderObjects(tmp_path)
    first.put("results/a", b"bytes")
    first.close()
    second = FolderObjects(tmp_path)
    assert second.get("results/a") == b"bytes"
    assert second.names("") == ["results/a"]
    second.close()


def test_no_draft_stays(folder, tmp_path):
    folder.put("results/a", b"bytes")
    folder.put("results/a", b"bytes")
    with pytest.raises(OSError):
        folder.put("results/b", Broken())
    assert drafts(tmp_path / "objects") == []


def test_a_draft_is_no_object(folder, tmp_path):
    class Watched(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert folder.names("") == []
            assert folder.size("results/a") is None
            return super().read(size)

    folder.put("results/a", Watched(b"x" * (2 * PIECE)))
    assert folder.names("") == ["results/a"]


def test_only_drafts_of_the_dead_are_cleared(tmp_path):
    path = tmp_path / "objects"
    dead = path / NEW / "1-1-dead"
    dead.mkdir(parents=True)
    (dead / "draft").write_bytes(b"half")
    living = FolderObjects(path)

    class Opens(io.BytesIO):
        """While it is read, another process opens the folder."""

        def read(self, size: int | None = -1) -> bytes:
            FolderObjects(path).close()
            return super().read(size)

    assert not dead.exists()
    assert living.put("results/a", Opens(b"whole"))
    assert living.get("results/a") == b"whole"
    living.close()
    assert list((path / NEW).iterdir()) == []


def test_a_closed_folder_takes_nothing(folder):
    folder.put("results/a", b"bytes")
    folder.close()
    folder.close()
    with pytest.raises(FileNotFoundError):
        folder.put("results/b", b"bytes")
    assert folder.get("results/a") == b"bytes"


def test_a_name_is_flushed_after_its_bytes(folder, monkeypatch):
    """What a power cut would leave cannot be tried; the order of what is asked of the disk can."""
    asked: list[str] = []
    flush, link = os.fsync, os.link

    def watched_flush(fd: int) -> None:
        asked.append("flush " + Path(f"/proc/self/fd/{fd}").readlink().name[:7])
        flush(fd)

    def watched_link(*args, **options) -> None:
        asked.append("link")
        link(*args, **options)

    folder.put("results/first", b"makes the folder")
    monkeypatch.setattr(os, "fsync", only_here(watched_flush, flush))
    monkeypatch.setattr(os, "link", only_here(watched_link, link))
    draft = only_here(lambda _: "draft", secrets.token_hex)
    monkeypatch.setattr("weft.service.store.folder.secrets.token_hex", draft)
    assert folder.put("results/a", b"bytes")
    assert asked == ["flush draft", "link", "flush results"]
    asked.clear()
    assert not folder.put("results/a", b"bytes")
    assert asked == ["flush results"], "who put it may not have come to that yet"


# -- the shelf ---------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [shelf.SMALL, shelf.SMALL + 1])
@pytest.mark.parametrize("second", [shelf.SMALL, shelf.SMALL + 1])
@pytest.mark.parametrize("kind", [bytes, io.BytesIO])
def test_the_first_one_stays_whatever_their_sizes(tmp_path, first, second, kind):
    with opened(tmp_path) as objects:
        assert objects.put("results/a", kind(b"1" * first))
        assert not objects.put("results/a", kind(b"2" * second))
        assert objects.get("results/a") == b"1" * first
        assert objects.size("results/a") == first
        assert objects.names("results/") == objects.names("") == ["results/a"]
        files = [path for path in (tmp_path / "objects").rglob("*") if path.is_file()]
        assert len(files) == (first > shelf.SMALL)
        objects.delete("results/a")
        assert objects.names("") == [] and not any(path.exists() for path in files)


def test_of_threads_with_objects_of_all_sizes_one_puts(tmp_path):
    with opened(tmp_path) as objects:
        for turn in range(20):
            name, done = f"results/{turn}", []

            def put(number: int, name: str = name, done: list = done) -> None:
                data = bytes([number]) * (shelf.SMALL + number % 2)
                if objects.put(name, data):
                    done.append(data)

            together(6, put)
            assert len(done) == 1
            assert objects.get(name) == done[0]
            assert objects.names("results/").count(name) == 1


def test_what_is_put_for_a_row_is_on_the_disk_with_it(tmp_path):
    """A copy of the files as a power cut would leave them: what was flushed, and no more."""
    with opened(tmp_path) as objects:
        levels = []
        write = objects._database.write

        @contextmanager
        def seen(**how):
            with write(**how) as rows:
                levels.append(rows.execute("PRAGMA synchronous").fetchone()[0])
                yield rows

        objects._database.write = seen
        objects.put("submits/a", b"x", durable=False)
        objects.put("constants/a", b"x")
        assert levels == [1, 2]  # NORMAL, FULL


def test_names_are_those_below_a_folder_only(tmp_path):
    with opened(tmp_path) as objects:
        for name in ("a/b", "a-b", "a0", "a/b/c", "ab/c", "a", "Z/z"):
            objects.put(name, b"")
        objects.put("a/large", bytes(shelf.SMALL + 1))
        assert objects.names("a/") == ["a/b", "a/b/c", "a/large"]
        assert len(objects.names("")) == 8
