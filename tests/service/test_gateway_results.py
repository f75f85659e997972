"""Results: whole, by ranges, by names. The oracle is a slice of the bytes that the worker wrote."""

from __future__ import annotations

import httpx
import pytest

from tests.service.gate import House, bearer, live
from weft.service.gateway.results import cut
from weft.wire.results import decode_result


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
def done(house: House) -> tuple[str, bytes]:
    id = house.job()
    return f"/api/jobs/{id}/result", house.do()


def test_a_result_is_the_file_that_the_worker_wrote(house: House, done: tuple[str, bytes]) -> None:
    path, data = done
    reply = house.ask("GET", path)
    assert (reply.status_code, reply.content) == (200, data)
    assert reply.headers["content-length"] == str(len(data))
    assert reply.headers["accept-ranges"] == "bytes"
    job = house.ask("GET", path.removesuffix("/result")).json()
    assert reply.headers["etag"] == f'"{job["result"]["sha256"]}"'


@pytest.mark.parametrize(
    "spec", ["0-0", "0-", "5-20", "5-", "-1", "-7", "0-99999", "-99999", "{last}-", "3-3"]
)
def test_a_range_is_that_part(house: House, done: tuple[str, bytes], spec: str) -> None:
    path, data = done
    spec = spec.format(last=len(data) - 1)
    first, _, last = spec.partition("-")
    part = data[int(first) :] if first else data[-int(last) :]
    if first and last:
        part = data[int(first) : int(last) + 1]
    reply = house.ask("GET", path, headers={"Range": f"bytes={spec}"})
    assert (reply.status_code, reply.content) == (206, part)
    start = (
        data.index(part) if len(part) > 4 else len(data) - len(part) if not first else int(first)
    )
    expected = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
    assert reply.headers["content-range"] == expected
    assert reply.headers["content-length"] == str(len(part))


@pytest.mark.parametrize(
    "header",
    [
        "bytes=5-3",
        "bytes=",
        "bytes=-",
        "lines=0-1",
        "bytes=0-1,4-5",
        "bytes=a-b",
        "0-1",
        "bytes=1 -2",
    ],
)
def test_what_is_not_one_range_is_answered_whole(
    house: House, done: tuple[str, bytes], header: str
) -> None:
    path, data = done
    reply = house.ask("GET", path, headers={"Range": header})
    assert (reply.status_code, reply.content) == (200, data)


@pytest.mark.parametrize("spec", ["{size}-", "{size}-{size}", "-0", "999999999999999999-"])
def test_a_range_beyond_the_end_is_refused(
    house: House, done: tuple[str, bytes], spec: str
) -> None:
    path, data = done
    reply = house.ask("GET", path, headers={"Range": f"bytes={spec.format(size=len(data))}"})
    assert reply.status_code == 416
    assert reply.headers["content-range"] == f"bytes */{len(data)}"


def test_a_range_is_given_only_of_the_file_it_was_meant_for(
    house: House, done: tuple[str, bytes]
) -> None:
    path, data = done
    tag = house.ask("GET", path).headers["etag"]
    same = house.ask("GET", path, headers={"Range": "bytes=4-", "If-Range": tag})
    other = house.ask("GET", path, headers={"Range": "bytes=4-", "If-Range": '"other"'})
    assert (same.status_code, same.content) == (206, data[4:])
    assert (other.status_code, other.content) == (200, data)


def test_a_result_is_not_sent_twice(house: House, done: tuple[str, bytes]) -> None:
    path, _ = done
    tag = house.ask("GET", path).headers["etag"]
    for known in (tag, f'"x", W/{tag}'):
        reply = house.ask("GET", path, headers={"If-None-Match": known})
        assert (reply.status_code, reply.content) == (304, b"")


def test_some_saves_are_a_result_of_their_own(house: House, done: tuple[str, bytes]) -> None:
    path, data = done
    _, tensors = decode_result(data)
    reply = house.ask("GET", f"{path}?name=k")
    manifest, part = decode_result(reply.content)
    assert [name for name, _ in manifest.saved] == ["k"]
    assert part == {"1": tensors["1"]}
    assert decode_result(house.ask("GET", f"{path}?name=k&name=h").content)[1] == tensors


def test_a_part_has_ranges_and_a_tag_of_its_own(house: House, done: tuple[str, bytes]) -> None:
    path, _ = done
    whole, part = house.ask("GET", path), house.ask("GET", f"{path}?name=k")
    assert whole.headers["etag"] != part.headers["etag"]
    size = len(part.content)
    for start in range(0, size, 7):
        asked = {"Range": f"bytes={start}-{start + 9}", "If-Range": part.headers["etag"]}
        reply = house.ask("GET", f"{path}?name=k", headers=asked)
        assert reply.content == part.content[start : start + 10]


def test_a_name_that_was_not_saved_is_refused(house: House, done: tuple[str, bytes]) -> None:
    reply = house.ask("GET", f"{done[0]}?name=nope")
    assert (reply.status_code, reply.json()["code"]) == (404, "no-such")


def test_there_is_no_result_before_the_end(house: House) -> None:
    id = house.job()
    reply = house.ask("GET", f"/api/jobs/{id}/result")
    assert (reply.status_code, reply.json()["code"]) == (409, "not-finished")


def test_a_job_without_a_result_says_why(house: House) -> None:
    id = house.job()
    house.ask("POST", f"/api/jobs/{id}/cancel")
    reply = house.ask("GET", f"/api/jobs/{id}/result")
    assert (reply.status_code, reply.json()["code"]) == (409, "cancelled")


def test_a_result_that_was_cleared_away_is_gone(house: House) -> None:
    id = house.job()
    house.do()
    house.objects.delete(f"results/{id}")
    assert house.ask("GET", f"/api/jobs/{id}/result").status_code == 410


def test_a_download_that_broke_off_goes_on(house: House, done: tuple[str, bytes]) -> None:
    path, data = done
    with live(house) as url, httpx.Client(base_url=url, headers=bearer(), timeout=60) as client:
        got, tag = b"", client.get(path).headers["etag"]
        while len(got) < len(data):
            asked = {"Range": f"bytes={len(got)}-", "If-Range": tag}
            with client.stream("GET", path, headers=asked) as reply:
                got += next(reply.iter_bytes(5))  # and the connection is dropped
        assert got == data


def test_spans_are_cut_as_the_sequence_of_their_bytes() -> None:
    data = bytes(range(40))
    spans = [(3, 9), (9, 9), (20, 21), (30, 38)]
    joined = b"".join(data[start:end] for start, end in spans)
    for start in range(-2, len(joined) + 2):
        for end in range(start, len(joined) + 2):
            found = b"".join(data[low:high] for low, high in cut(spans, start, end))
            assert found == joined[max(start, 0) : max(end, 0)]
