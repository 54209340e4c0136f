"""Faults of servers: requests are repeated while that may help, else the fault is named."""

import re
import threading
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mlsae.store import DamagedStoreError, RemoteError
from mlsae.store.places.retry import Patience

LARGE = "activations/resid_post/0/c.0.0"


# --- failures that pass


def test_requests_that_fail_now_and_then_are_asked_again(web, content, open_quickly):
    """One in twenty is answered 503; threads share the objects."""
    web.faults.unavailable = 0.05
    objects = open_quickly(f"{web.url}/store")

    def read(start: int) -> bool:
        out = np.empty(1000, np.uint8)
        objects.read_into(LARGE, start, out)
        return out.tobytes() == content[LARGE][start : start + 1000]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(0, 200_000, 500)))
    assert 10 <= web.faults.served["503"] <= 40
    assert len(web.faults.requests) == 400 + web.faults.served["503"]


@pytest.mark.parametrize("place", ["web", "s3", "hub"])
def test_an_answer_that_is_cut_goes_on_where_it_ended(locate, place, content, open_quickly):
    location, faults, prefix = locate(place)
    faults.cuts[f"{prefix}{LARGE}"] = 3
    faults.cuts[f"{prefix}plan.json"] = 1
    objects = open_quickly(location)
    out = np.empty(299_000, np.uint8)
    assert objects.read_into(LARGE, 500, out) == 299_000
    assert out.tobytes() == content[LARGE][500:299_500]
    assert objects.read("plan.json", 100) == content["plan.json"]
    asked = [part for _, of, part in faults.requests if of.endswith(LARGE)]
    starts = [int(part.removeprefix("bytes=").split("-")[0]) for part in asked]
    assert starts[0] == 500
    # Half of what was asked for has come, but for a piece of the stream.
    for start, following in pairwise(starts):
        assert 0 <= (start + 299_500) // 2 - following <= 2**14
    assert len(starts) == 4
    assert faults.served["cut"] == 4


def test_tries_that_bring_something_do_not_count(web, open_quickly):
    """More cuts than there are tries."""
    size = 2**24
    (web.root / "store/long").write_bytes(bytes(size))
    web.faults.cuts["store/long"] = 7
    out = np.ones(size, np.uint8)
    patience = Patience(first_wait=0.005, tries=2)
    assert open_quickly(f"{web.url}/store", patience=patience).read_into("long", 0, out) == size
    assert not out.any()


def test_a_slow_server_is_waited_for(web, open_quickly):
    """50 ms before each answer: sixteen threads wait side by side."""
    web.faults.latency = 0.05
    objects = open_quickly(f"{web.url}/store")
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(lambda _: objects.size(LARGE), range(64)))
    assert sizes == [300_000] * 64
    assert web.faults.most_at_once > 8


def test_a_server_that_asks_for_fewer_requests_is_given_time(web, caplog, content, open_quickly):
    """More refusals than there are tries; one line says why it takes long."""
    web.faults.busy["store/plan.json"] = 10
    patience = Patience(first_wait=0.005, longest_wait=0.01)
    objects = open_quickly(f"{web.url}/store", patience=patience)
    assert objects.read("plan.json", 100) == content["plan.json"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{web.url}/store/plan.json cannot be read for now: the server answered 429 Too Many "
        f"Requests; waiting"
    ]
    web.faults.busy["store/plan.json"] = 10
    patience = Patience(first_wait=0.005, busy_seconds=0.02)
    with pytest.raises(RemoteError, match=r"answered 429 Too Many Requests .* tries in"):
        open_quickly(f"{web.url}/store", patience=patience).read("plan.json", 100)


# --- failures that do not


def test_a_server_that_goes_away_is_said_to_have(web, open_quickly):
    """After all tries, one line; what is asked for first and what is asked for later."""
    objects = open_quickly(f"{web.url}/store")
    assert objects.exists("plan.json")
    web.faults.unavailable = 1.0
    with pytest.raises(RemoteError) as raised:
        objects.read("plan.json", 100)
    assert re.sub(r"\d+ s\)", "… s)", str(raised.value)) == (
        f"{web.url}/store/plan.json cannot be read: the server answered 503 Service Unavailable "
        f"(6 tries in … s); nothing was lost: check the address and the network, then run the "
        f"same command again"
    )
    assert web.faults.served["503"] == 6


def test_a_server_that_is_not_there_is_said_to_be_absent(tmp_path, open_quickly, servers):
    with servers.serving_files(tmp_path) as web:
        pass
    objects = open_quickly(f"{web.url}/store")
    with pytest.raises(RemoteError, match=r"cannot be read: Connection refused \(6 tries in "):
        objects.exists("plan.json")


def test_a_server_that_falls_silent_is_not_waited_for(web, open_quickly):
    """Half an answer, and then nothing."""
    over = threading.Event()

    def silent(handler: Any) -> None:
        handler.answer(206, b"12", {"Content-Range": "bytes 0-8/9", "Content-Length": "9"})
        handler.wfile.flush()
        over.wait(20)

    web.replies["store/plan.json"] = silent
    patience = Patience(first_wait=0.005, tries=2, stall_seconds=0.1)
    with pytest.raises(RemoteError, match=r"plan\.json cannot be read: no answer in time \(2 trie"):
        open_quickly(f"{web.url}/store", patience=patience).read("plan.json", 9)
    over.set()


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("web", "the server wants a login: https://USER:PASSWORD@… gives one"),
        (
            "s3",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or "
            "AWS_SKIP_SIGNATURE=true for a public bucket",
        ),
        (
            "hub",
            "log in with `hf auth login` or set HF_TOKEN, with access to the data set",
        ),
    ],
)
def test_a_refusal_names_the_credentials(locate, place, remedy, status, open_quickly):
    location, faults, prefix = locate(place)
    objects = open_quickly(location)
    faults.refused[prefix] = status
    for ask in (lambda: objects.read("plan.json", 10), lambda: objects.exists("plan.json")):
        with pytest.raises(RemoteError) as raised:
            ask()
        text = str(raised.value)
        assert text.startswith(
            f"{objects.place}/plan.json cannot be read: the server answered {status}"
        )
        assert f"; {remedy}" in text
        assert "\n" not in text
    assert faults.served["refused"] == 2


def test_an_error_that_does_not_pass_is_not_asked_again(web, open_quickly):
    web.faults.refused["store/"] = 400
    with pytest.raises(RemoteError) as raised:
        open_quickly(f"{web.url}/store").read("plan.json", 10)
    assert str(raised.value) == (
        f"{web.url}/store/plan.json cannot be read: the server answered 400 Bad Request; check "
        f"the address and the server"
    )
    assert len(web.faults.requests) == 1


# --- answers that lie


class Endless:
    """An answer whose body goes on for as long as the client listens, up to 64 MiB."""

    def __init__(self, status: int, headers: dict[str, str | None]) -> None:
        self.status, self.headers = status, headers
        self.num_bytes = 0
        self.ended = threading.Event()

    def __call__(self, handler: Any) -> None:
        handler.answer(self.status, b"", self.headers)
        is_chunked = "Transfer-Encoding" in self.headers
        piece = b"x" * 65536
        try:
            while self.num_bytes < 2**26:
                handler.wfile.write(b"10000\r\n%b\r\n" % piece if is_chunked else piece)
                self.num_bytes += len(piece)
        except OSError:
            handler.close_connection = True
        self.ended.set()


CHUNKED = {"Transfer-Encoding": "chunked", "Content-Length": None}


@pytest.mark.parametrize(
    ("status", "headers", "cause"),
    [
        (
            206,
            {"Content-Length": str(2**40), "Content-Range": "bytes 0-999/5000"},
            "the server sent more bytes than it was asked for",
        ),
        (
            206,
            {"Content-Length": "1000", "Content-Range": "bytes 5-1004/5000"},
            r"Requested 0\.\.1000, got 5\.\.1005",
        ),
        (206, {"Content-Length": "1000"}, "Content-Range header not present"),
    ],
)
def test_an_answer_of_other_bytes_is_not_read_to_its_end(web, status, headers, cause, open_quickly):
    endless = web.replies["store/plan.json"] = Endless(status, headers)
    objects = open_quickly(f"{web.url}/store")
    with pytest.raises(
        RemoteError, match=f"^{web.url}/store/plan.json cannot be read: {cause}.*; "
    ):
        objects.read_into("plan.json", 0, np.empty(1000, np.uint8))
    assert endless.ended.wait(20)
    # Buffers of the system hold a few megabytes.
    assert endless.num_bytes < 2**24


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, {"Content-Length": str(2**40)}),
        (200, CHUNKED),
        (206, {**CHUNKED, "Content-Range": "bytes 0-999/5000"}),
        (206, {**CHUNKED, "Content-Range": "bytes 0-999/*"}),
    ],
)
def test_of_a_longer_answer_no_more_than_asked_for_is_taken(web, status, headers, open_quickly):
    """The network library takes none of these; the rest is never read."""
    endless = web.replies["store/plan.json"] = Endless(status, headers)
    objects = open_quickly(f"{web.url}/store")
    out = np.ones(1000, np.uint8)
    assert objects.read_into("plan.json", 0, out) == 1000
    assert (out == ord("x")).all()
    del objects
    assert endless.ended.wait(20)
    assert endless.num_bytes < 2**24


def test_memory_is_not_taken_for_a_size_that_is_only_claimed(web, open_quickly):
    """An object of a petabyte is refused; one that ends before its size is a cut."""
    headers = {"Content-Length": "9", "Content-Range": f"bytes 0-8/{2**50}"}
    web.replies["store/plan.json"] = lambda handler: handler.answer(206, b"123456789", headers)
    objects = open_quickly(f"{web.url}/store")
    with pytest.raises(DamagedStoreError, match=r"plan\.json has 1125899906842624 bytes, over the"):
        objects.read("plan.json", 9)
    with pytest.raises(RemoteError, match=r"the connection was cut|Requested"):
        objects.read("plan.json", 2**60)


def test_an_answer_that_ends_before_it_says_is_a_cut(web, content, open_quickly):
    """The answer's length fits its body, and neither fits the part that it claims to be."""

    def short(handler: Any) -> None:
        del web.replies["store/plan.json"]
        handler.answer(206, content["plan.json"][:4], {"Content-Range": "bytes 0-8/9"})

    web.replies["store/plan.json"] = short
    assert open_quickly(f"{web.url}/store").read("plan.json", 9) == content["plan.json"]
    assert [part for _, _, part in web.faults.requests] == ["bytes=0-8", "bytes=4-8"]


def test_an_object_that_is_replaced_while_it_is_read_is_refused(web, open_quickly):
    """The first half is of another object than what is sent next."""

    def cut(handler: Any) -> None:
        del web.replies[f"store/{LARGE}"]
        headers = {"Content-Range": "bytes 0-399999/500000", "Content-Length": "400000"}
        handler.answer(206, bytes(200_000), headers)
        handler.close_connection = True

    web.replies[f"store/{LARGE}"] = cut
    with pytest.raises(RemoteError) as raised:
        open_quickly(f"{web.url}/store").read_into(LARGE, 0, np.empty(400_000, np.uint8))
    assert str(raised.value) == (
        f"{web.url}/store/{LARGE} cannot be read: the object was replaced while it was read; run "
        f"the same command again when nobody writes to it"
    )


@pytest.mark.parametrize("mode", ["whole", "chunked", "of unknown size"])
def test_any_answer_that_http_allows_is_read(web, content, open_quickly, caplog, mode):
    """A whole object for a part, a part without its length, and one without the whole's size."""
    web.answers_ranges = mode != "whole"

    def answer(handler: Any, name: str) -> None:
        data = content[name]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if asked is None:
            handler.answer(200, data)
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(data))
        if start >= len(data):
            handler.answer(416, b"")
            return
        total = "*" if mode == "of unknown size" else len(data)
        headers: dict[str, str | None] = {"Content-Range": f"bytes {start}-{stop - 1}/{total}"}
        part = data[start:stop]
        if mode == "chunked":
            headers |= CHUNKED
            part = b"%x\r\n%b\r\n0\r\n\r\n" % (len(part), part)
        handler.answer(206, part, headers)

    if mode != "whole":
        web.replies = {
            f"store/{name}": lambda handler, name=name: answer(handler, name) for name in content
        }
    objects = open_quickly(f"{web.url}/store")
    for name, data in content.items():
        assert objects.read(name, 2**20) == data
        assert objects.size(name) == len(data)
    out, found = np.empty(70_000, np.uint8), b""
    while count := objects.read_into(LARGE, len(found), out):
        found += out[:count].tobytes()
    assert found == content[LARGE]
    assert objects.read_part(LARGE, 100_000, 10) == content[LARGE][100_000:100_010]
    assert not objects.exists("complete.json")
    warned = [record.message for record in caplog.records]
    assert len(warned) == (mode == "whole")
    if warned:
        assert "sends whole objects where parts are asked for, which takes long" in warned[0]
        # One request for the whole, one for what lies in front of its end.
        assert [name for _, name, _ in web.faults.requests].count(f"store/{LARGE}") == 4


def test_redirects_are_followed_while_they_end(web, content, open_quickly):
    def elsewhere(handler: Any) -> None:
        handler.answer(302, b"", {"Location": "/store/plan.json"})

    def around(handler: Any) -> None:
        handler.answer(302, b"", {"Location": "/store/around"})

    web.replies |= {"store/moved": elsewhere, "store/around": around}
    objects = open_quickly(f"{web.url}/store")
    assert objects.read("moved", 100) == content["plan.json"]
    with pytest.raises(RemoteError, match="around cannot be read: its redirects do not end; check"):
        objects.read("around", 100)


def test_a_password_in_an_address_is_used_and_never_shown(web, content, open_quickly):
    url = web.url.replace("://", "://us%40er:pass word@")
    objects = open_quickly(f"{url}/store")
    assert objects.read("plan.json", 100) == content["plan.json"]
    expected = "Basic " + b64encode(b"us@er:pass word").decode()
    assert web.authorizations == [expected]
    assert objects.place == f"{web.url}/store"


@pytest.mark.parametrize("place", ["web", "s3"])
def test_a_refusal_of_one_object_is_an_absence_once_another_was_read(locate, place, open_quickly):
    """Who may not list a bucket is told 403, not 404, of what is not there."""
    location, faults, prefix = locate(place)
    objects = open_quickly(location)
    faults.refused[f"{prefix}complete.json"] = 403
    faults.refused[f"{prefix}{LARGE}"] = 403
    with pytest.raises(RemoteError, match=r"403 Forbidden.*servers answer so for what is not th"):
        objects.exists("complete.json")
    objects.size("plan.json")
    assert not objects.exists("complete.json")
    with pytest.raises(FileNotFoundError):
        objects.read("complete.json", 10)
    # Rows that a record names are there, and somebody may not read them.
    with pytest.raises(RemoteError, match="403 Forbidden"):
        objects.read_into(LARGE, 0, np.empty(10, np.uint8))


@pytest.mark.parametrize("proxy", ["http://me:secret@127.0.0.1:9", "me:secret@127.0.0.1:9"])
def test_a_proxy_that_cannot_be_reached_is_named(monkeypatch, open_quickly, quick, proxy):
    """Without its password; the address itself may be well."""
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    objects = open_quickly("http://acts.example/a", patience=replace(quick, tries=1))
    with pytest.raises(RemoteError) as raised:
        objects.read("plan.json", 10)
    shown = proxy.replace("me:secret@", "")
    assert (
        f"plan.json cannot be read: Connection refused (through the proxy {shown} of HTTP_PROXY; "
        "NO_PROXY=acts.example goes round it); nothing was lost"
    ) in str(raised.value)
