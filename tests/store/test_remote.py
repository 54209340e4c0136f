"""Objects elsewhere: a web server, an S3 server and a hub on the loopback, sound and failing."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.base.errors import InputError
from mlsae.store import DamagedStoreError, RemoteError, open_store
from mlsae.store.objects import LocalObjects
from mlsae.store.remote import is_remote, open_objects, open_writable
from mlsae.store.retry import Patience

QUICK = Patience(first_wait=0.005, stall_seconds=5.0)
CONTENT = {
    "plan.json": b'{"a": 1}\n',
    "empty": b"",
    "activations/resid_post/0/c.0.0": np.random.default_rng(0).bytes(300_000),
    "moments/00000.safetensors": np.random.default_rng(1).bytes(5000),
}
LARGE = "activations/resid_post/0/c.0.0"


def servers_module() -> Any:
    """tests/servers.py; the tests are no package."""
    path = Path(__file__).parents[1] / "servers.py"
    spec = spec_from_file_location("loopback_servers", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


servers = servers_module()


def write_content(directory: Path) -> Path:
    for name, data in CONTENT.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Any]:
    write_content(tmp_path / "served" / "store")
    with servers.serving_files(tmp_path / "served") as web:
        yield web


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with servers.serving_bucket() as s3:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in s3.environment().items():
            monkeypatch.setenv(name, value)
        s3.upload(write_content(tmp_path / "uploaded"), "a b/store")
        yield s3


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from huggingface_hub import constants

    write_content(tmp_path / "hub/datasets/someone/acts/v 1")
    with servers.serving_hub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.hub.url)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


def open_quickly(location: str, **options: Any) -> Any:
    return open_objects(location, **{"cache_bytes": 0, "patience": QUICK, **options})


@pytest.fixture(params=["local", "web", "s3", "hub"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The same objects in each kind of place."""
    if request.param == "local":
        return LocalObjects(write_content(tmp_path / "local"))
    server = request.getfixturevalue(request.param)
    return open_quickly(
        {
            "web": lambda: f"{server.url}/store/",
            "s3": lambda: "s3://bucket/a b/store",
            "hub": lambda: "hf://datasets/someone/acts/v 1",
        }[request.param]()
    )


def test_every_place_gives_the_same_bytes(objects):
    for name, data in CONTENT.items():
        assert objects.read(name, len(data)) == data
        assert objects.size(name) == len(data)
        assert objects.exists(name)
        for offset in (0, 1, len(data) - 1, len(data), len(data) + 10):
            for length in (0, 1, 1000, 400_000):
                if offset >= 0:
                    out = np.full(length, 7, np.uint8)
                    expected = data[offset : offset + length]
                    assert objects.read_into(name, offset, out) == len(expected)
                    assert out.tobytes() == expected + bytes([7]) * (length - len(expected))
    wide = np.zeros((10, 50), np.float32)
    assert objects.read_into(LARGE, 400, wide) == 2000
    assert wide.tobytes() == CONTENT[LARGE][400:2400]


def test_every_place_says_what_is_not_there_and_what_is_too_large(objects):
    out = np.zeros(5, np.uint8)
    assert not objects.exists("complete.json")
    for ask in (
        lambda: objects.read("complete.json", 10),
        lambda: objects.size("complete.json"),
        lambda: objects.read_into("complete.json", 0, out),
    ):
        with pytest.raises(FileNotFoundError, match=r"complete\.json"):
            ask()
    with pytest.raises(DamagedStoreError, match=r"moments.* has 5000 bytes, over the 4999 that it"):
        objects.read("moments/00000.safetensors", 4999)
    assert objects.forget("plan.json", 0, 5) is False


def test_every_place_but_a_web_server_lists_what_it_holds(objects):
    if objects.place.startswith("http"):
        with pytest.raises(RemoteError, match="/store: a web server does not list what it holds"):
            list(objects.walk())
    else:
        assert dict(objects.walk()) == {name: len(data) for name, data in CONTENT.items()}


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("some/store", "some/store"),
        ("/some:/store//", "/some:/store"),
        ("file:///some/a%20store", "/some/a store"),
        ("FILE://localhost/some", "/some"),
    ],
)
def test_paths_and_file_urls_are_local(location, path):
    objects = open_objects(location)
    assert isinstance(objects, LocalObjects)
    assert objects.directory == Path(path)
    assert not is_remote(location)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (
            "ftp://host/store",
            "ftp://host/store: expected a directory, https://host/path, s3://bucket/prefix or "
            "hf://datasets/owner/name[@revision][/path]",
        ),
        ("https:///store", "https:///store: expected https://host/path, without ? or #"),
        ("http://host/a?b=1", "http://host/a?b=1: expected https://host/path, without ? or #"),
        ("s3:///store", "s3:///store: expected s3://bucket/prefix"),
        (
            "file://some/store",
            "file://some/store: a file URL has three slashes, as in file:///path",
        ),
        (
            "hf://models/someone/acts",
            "hf://models/someone/acts: expected hf://datasets/owner/name[@revision][/path]; a "
            "revision with a slash has %2F for it",
        ),
        (
            "hf://datasets/some one/acts",
            "hf://datasets/some one/acts: Repo id must use alphanumeric chars, '-', '_' or '.'. "
            "The name cannot start or end with '-' or '.' and the maximum length is 96: "
            "'some one/acts'.",
        ),
    ],
)
def test_other_locations_are_refused(location, message):
    with pytest.raises(InputError) as raised:
        open_objects(location)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("https://host/store", "a web server takes no uploads; copy to a directory that it serves"),
        (
            "hf://datasets/someone/acts",
            "cannot be written directly; copy to a directory, then run `hf upload-large-folder "
            "owner/name --repo-type=dataset DIRECTORY`",
        ),
        ("gs://bucket/store", "expected s3://bucket/prefix"),
    ],
)
def test_only_s3_is_written_to(location, message):
    with pytest.raises(InputError) as raised:
        open_writable(location)
    assert str(raised.value) == f"{location}: {message}"


def test_a_local_store_loads_no_network_library(sample):
    script = (
        "import sys; from mlsae.store import open_store; open_store(sys.argv[1])\n"
        "sys.exit(', '.join({'obstore', 'huggingface_hub', 'boto3'} & set(sys.modules)) or None)"
    )
    command = [sys.executable, "-c", script, str(sample.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_store_reads_the_same_from_a_web_server(tmp_path, sample_maker, compression):
    made = sample_maker("acts", compression=compression)
    local = open_store(made.path)
    with servers.serving_files(tmp_path) as web:
        web.faults.unavailable = 0.05
        store = open_store(f"{web.url}/acts", cache_dir=tmp_path / "cache")
        assert store.store_id == local.store_id
        for layer in local.layers:
            for ours, theirs in zip(
                store.read("resid_post", layer), local.read("resid_post", layer), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(store.tokens(), local.tokens())


# --- failures that pass


def test_requests_that_fail_now_and_then_are_asked_again(web):
    """One in twenty is answered 503; threads share the objects."""
    web.faults.unavailable = 0.05
    objects = open_quickly(f"{web.url}/store")

    def read(start: int) -> bool:
        out = np.empty(1000, np.uint8)
        objects.read_into(LARGE, start, out)
        return out.tobytes() == CONTENT[LARGE][start : start + 1000]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(0, 200_000, 500)))
    assert 10 <= web.faults.served["503"] <= 40
    assert len(web.faults.requests) == 400 + web.faults.served["503"]


@pytest.mark.parametrize("place", ["web", "s3", "hub"])
def test_an_answer_that_is_cut_goes_on_where_it_ended(request, place):
    server = request.getfixturevalue(place)
    location, faults, name = {
        "web": lambda: (f"{server.url}/store", server.faults, "store"),
        "s3": lambda: ("s3://bucket/a b/store", server.faults, "bucket/a b/store"),
        "hub": lambda: (
            "hf://datasets/someone/acts/v 1",
            server.files.faults,
            "datasets/someone/acts/v 1",
        ),
    }[place]()
    faults.cuts[f"{name}/{LARGE}"] = 3
    faults.cuts[f"{name}/plan.json"] = 1
    objects = open_quickly(location)
    out = np.empty(299_000, np.uint8)
    assert objects.read_into(LARGE, 500, out) == 299_000
    assert out.tobytes() == CONTENT[LARGE][500:299_500]
    assert objects.read("plan.json", 100) == CONTENT["plan.json"]
    asked = [part for _, of, part in faults.requests if of.endswith(LARGE)]
    starts = [int(part.removeprefix("bytes=").split("-")[0]) for part in asked]
    assert starts[0] == 500
    # Half of what was asked for has come, but for a piece of the stream.
    for start, following in zip(starts, starts[1:], strict=False):
        assert 0 <= (start + 299_500) // 2 - following <= 2**14
    assert len(starts) == 4
    assert faults.served["cut"] == 4


def test_tries_that_bring_something_do_not_count(web):
    """More cuts than there are tries."""
    size = 2**24
    (web.root / "store/long").write_bytes(bytes(size))
    web.faults.cuts["store/long"] = 7
    out = np.ones(size, np.uint8)
    patience = Patience(first_wait=0.005, tries=2)
    assert open_quickly(f"{web.url}/store", patience=patience).read_into("long", 0, out) == size
    assert not out.any()


def test_a_slow_server_is_waited_for(web):
    """50 ms before each answer: sixteen threads hide most of it."""
    web.faults.latency = 0.05
    objects = open_quickly(f"{web.url}/store")
    start = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(lambda _: objects.size(LARGE), range(64)))
    assert sizes == [300_000] * 64
    assert time.monotonic() - start < 64 * 0.05


def test_a_server_that_asks_for_fewer_requests_is_given_time(web, caplog):
    """More refusals than there are tries; one line says why it takes long."""
    web.faults.busy["store/plan.json"] = 10
    patience = Patience(first_wait=0.005, longest_wait=0.01)
    objects = open_quickly(f"{web.url}/store", patience=patience)
    assert objects.read("plan.json", 100) == CONTENT["plan.json"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{web.url}/store/plan.json cannot be read for now: the server answered 429 Too Many "
        f"Requests; waiting"
    ]
    web.faults.busy["store/plan.json"] = 10
    patience = Patience(first_wait=0.005, busy_seconds=0.02)
    with pytest.raises(RemoteError, match=r"answered 429 Too Many Requests .* tries in 0 s"):
        open_quickly(f"{web.url}/store", patience=patience).read("plan.json", 100)


# --- failures that do not


def test_a_server_that_goes_away_is_said_to_have(web):
    """After all tries, one line; what is asked for first and what is asked for later."""
    objects = open_quickly(f"{web.url}/store")
    assert objects.exists("plan.json")
    web.faults.unavailable = 1.0
    with pytest.raises(RemoteError) as raised:
        objects.read("plan.json", 100)
    assert str(raised.value) == (
        f"{web.url}/store/plan.json cannot be read: the server answered 503 Service Unavailable "
        f"(6 tries in 0 s); nothing was lost: check the address and the network, then run the "
        f"same command again"
    )
    assert web.faults.served["503"] == 6


def test_a_server_that_is_not_there_is_said_to_be_absent(tmp_path):
    with servers.serving_files(tmp_path) as web:
        pass
    objects = open_quickly(f"{web.url}/store")
    with pytest.raises(RemoteError, match=r"cannot be read: Connection refused \(6 tries in 0 s\)"):
        objects.exists("plan.json")


def test_a_server_that_falls_silent_is_not_waited_for(web):
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
def test_a_refusal_names_the_credentials(request, place, remedy, status):
    server = request.getfixturevalue(place)
    location = {
        "web": lambda: f"{server.url}/store",
        "s3": lambda: "s3://bucket/a b/store",
        "hub": lambda: "hf://datasets/someone/acts/v 1",
    }[place]()
    objects = open_quickly(location)
    faults = server.files.faults if place == "hub" else server.faults
    faults.refused[{"web": "store/", "s3": "bucket/", "hub": "datasets/"}[place]] = status
    for ask in (lambda: objects.read("plan.json", 10), lambda: objects.exists("plan.json")):
        with pytest.raises(RemoteError) as raised:
            ask()
        text = str(raised.value)
        assert text.startswith(
            f"{objects.place}/plan.json cannot be read: the server answered {status}"
        )
        assert text.endswith(f"; {remedy}")
        assert "\n" not in text
    assert faults.served["refused"] == 2


def test_an_error_that_does_not_pass_is_not_asked_again(web):
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
        (200, {"Content-Length": str(2**40)}, "the server sends whole objects, or a page"),
        (200, CHUNKED, "the server sends whole objects, or a page"),
        (
            206,
            {"Content-Length": str(2**40), "Content-Range": "bytes 0-999/5000"},
            "the server sent more bytes than it was asked for",
        ),
        (
            206,
            {**CHUNKED, "Content-Range": "bytes 0-999/5000"},
            "Content-Length Header missing from response",
        ),
        (
            206,
            {"Content-Length": "1000", "Content-Range": "bytes 5-1004/5000"},
            r"Requested 0\.\.1000, got 5\.\.1005",
        ),
        (206, {"Content-Length": "1000"}, "Content-Range header not present"),
    ],
)
def test_an_answer_of_other_bytes_is_refused_and_not_read_to_its_end(web, status, headers, cause):
    endless = web.replies["store/plan.json"] = Endless(status, headers)
    objects = open_quickly(f"{web.url}/store")
    with pytest.raises(
        RemoteError, match=f"^{web.url}/store/plan.json cannot be read: {cause}.*; "
    ):
        objects.read_into("plan.json", 0, np.empty(1000, np.uint8))
    assert endless.ended.wait(20)
    # Buffers of the system hold a few megabytes.
    assert endless.num_bytes < 2**24


def test_memory_is_not_taken_for_a_size_that_is_only_claimed(web):
    """An object of a petabyte is refused; one that ends before its size is a cut."""
    headers = {"Content-Length": "9", "Content-Range": f"bytes 0-8/{2**50}"}
    web.replies["store/plan.json"] = lambda handler: handler.answer(206, b"123456789", headers)
    objects = open_quickly(f"{web.url}/store")
    with pytest.raises(DamagedStoreError, match=r"plan\.json has 1125899906842624 bytes, over the"):
        objects.read("plan.json", 9)
    with pytest.raises(RemoteError, match=r"the connection was cut|Requested"):
        objects.read("plan.json", 2**60)


def test_a_web_server_without_range_requests_is_refused(web):
    web.answers_ranges = False
    with pytest.raises(RemoteError) as raised:
        open_quickly(f"{web.url}/store").read("plan.json", 100)
    assert str(raised.value) == (
        f"{web.url}/store/plan.json cannot be read: the server sends whole objects, or a page in "
        f"their place, where a part is asked for; use a server that answers HTTP Range requests, "
        f"or copy the store here"
    )


def test_redirects_are_followed_while_they_end(web):
    def elsewhere(handler: Any) -> None:
        handler.answer(302, b"", {"Location": "/store/plan.json"})

    def around(handler: Any) -> None:
        handler.answer(302, b"", {"Location": "/store/around"})

    web.replies |= {"store/moved": elsewhere, "store/around": around}
    objects = open_quickly(f"{web.url}/store")
    assert objects.read("moved", 100) == CONTENT["plan.json"]
    with pytest.raises(RemoteError, match="around cannot be read: its redirects do not end; check"):
        objects.read("around", 100)


def test_a_password_in_an_address_is_used_and_never_shown(web):
    url = web.url.replace("://", "://us%40er:pass word@")
    objects = open_quickly(f"{url}/store")
    assert objects.read("plan.json", 100) == CONTENT["plan.json"]
    expected = "Basic " + b64encode(b"us@er:pass word").decode()
    assert web.authorizations == [expected]
    assert objects.place == f"{web.url}/store"


# --- S3


def test_uploads_are_checked_and_whole(s3, tmp_path):
    """Bytes, and a file of several parts, while three of ten requests are answered 503."""
    s3.faults.unavailable = 0.3
    objects = open_writable("s3://bucket/new", patience=QUICK)
    data = np.random.default_rng(0).bytes(20 * 2**20)
    (tmp_path / "file").write_bytes(data)
    for number in range(20):
        objects.put(f"commits/{number}.json", b"%d" % number)
    objects.put_file(LARGE, tmp_path / "file")
    objects.put("commits/7.json", b"again")
    digest = b64encode(hashlib.sha256(b"again").digest()).decode()
    assert s3.checksums["bucket/new/commits/7.json"] == digest
    assert f"bucket/new/{LARGE}" in s3.checksums
    assert s3.faults.served["503"] > 0
    found = dict(objects.walk())
    assert len(found) == 21
    assert found[LARGE] == objects.size(LARGE) == len(data)
    s3.download("new", tmp_path / "new")
    assert (tmp_path / "new" / LARGE).read_bytes() == data
    assert (tmp_path / "new/commits/7.json").read_bytes() == b"again"


def test_uploads_that_are_refused_say_so(s3, tmp_path):
    (tmp_path / "file").write_bytes(bytes(20 * 2**20))
    s3.faults.unavailable = 1.0
    objects = open_writable("s3://bucket/new", patience=QUICK)
    for put in (lambda: objects.put("a", b"1"), lambda: objects.put_file("a", tmp_path / "file")):
        with pytest.raises(RemoteError) as raised:
            put()
        assert str(raised.value) == (
            "s3://bucket/new/a cannot be written: the server answered 503 Service Unavailable (Not "
            "now); nothing was lost: check the address and the network, then run the same command "
            "again"
        )
    s3.faults.unavailable = 0.0
    with pytest.raises(RemoteError, match="s3://none/a cannot be written: there is no such bucket"):
        open_writable("s3://none", patience=QUICK).put("a", b"1")
    with pytest.raises(RemoteError, match=r"s3://none cannot be listed: .* 404 .*does not exist"):
        list(open_quickly("s3://none").walk())


def test_listing_a_bucket_is_asked_again_and_knows_its_folder(s3, tmp_path):
    """More objects than one answer names, and a neighbour whose name begins alike."""
    for number in range(1100):
        (tmp_path / f"many/{number // 600}/{number}").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"many/{number // 600}/{number}").write_bytes(bytes(number % 7))
    s3.upload(tmp_path / "many", "many")
    s3.upload(tmp_path / "many/0", "many-more")
    s3.faults.unavailable = 0.3
    found = dict(open_quickly("s3://bucket/many").walk())
    assert len(found) == 1100
    assert found["1/1000"] == 1000 % 7


@pytest.fixture
def authorizations(s3, monkeypatch, tmp_path) -> Callable[[], str | None]:
    """Forget the environment's keys; the Authorization header that the next request comes with."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def ask() -> str | None:
        assert open_quickly("s3://bucket/a b/store").read("plan.json", 100)
        return s3.authorizations[-1]

    return ask


def test_credentials_come_from_a_profile(s3, authorizations, monkeypatch, tmp_path):
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = DEFAULT\naws_secret_access_key = s%cret\n"
        "[other]\naws_access_key_id = OTHER\naws_secret_access_key = secret\n"
    )
    (tmp_path / "config").write_text(
        f"[default]\nregion = eu-west-1\nendpoint_url = {s3.url}\n"
        f"[profile other]\nregion = us-west-2\nendpoint_url = {s3.url}\n"
    )
    assert "Credential=DEFAULT/" in authorizations()
    assert "/eu-west-1/s3/" in authorizations()
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert "Credential=OTHER/" in authorizations()
    assert "/us-west-2/s3/" in authorizations()
    monkeypatch.setenv("AWS_DEFAULT_REGION", "ap-south-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FIRST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "Credential=FIRST/" in authorizations()
    assert "/ap-south-1/s3/" in authorizations()
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with pytest.raises(RemoteError, match="403 Forbidden"):
        authorizations()
    assert s3.authorizations[-1] is None


def test_credentials_come_from_a_command_by_way_of_boto3(s3, authorizations, tmp_path):
    script = tmp_path / "keys"
    script.write_text(
        f"#!{sys.executable}\n"
        'print(\'{"Version": 1, "AccessKeyId": "MADE", "SecretAccessKey": "secret"}\')\n'
    )
    script.chmod(0o755)
    (tmp_path / "config").write_text(
        f"[default]\nregion = eu-west-1\nendpoint_url = {s3.url}\ncredential_process = {script}\n"
    )
    assert "Credential=MADE/" in authorizations()


def test_a_profile_that_needs_boto3_says_so(s3, authorizations, monkeypatch, tmp_path):  # noqa: ARG001
    (tmp_path / "config").write_text("[default]\nsso_session = work\n")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(RemoteError) as raised:
        open_quickly("s3://bucket/store")
    assert str(raised.value) == (
        "s3://bucket/store: profile default of ~/.aws gets its credentials by single sign-on, a "
        "role or a command, which needs boto3: run `pip install boto3`"
    )


def test_no_credentials_at_all_are_named(s3, authorizations, monkeypatch, tmp_path):  # noqa: ARG001
    """Nothing in the environment, no profile, and a machine without a role."""
    with servers.serving_files(tmp_path) as web:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", web.url)
        with pytest.raises(RemoteError) as raised:
            open_quickly("s3://bucket/store").read("plan.json", 100)
    assert str(raised.value) == (
        "s3://bucket/store/plan.json cannot be read: no credentials were found; set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or AWS_SKIP_SIGNATURE=true "
        "for a public bucket"
    )


# --- the hub


def test_a_revision_is_looked_up_once_and_the_token_goes_to_the_hub_alone(hub):
    hub.token = "hf_secret"
    objects = open_quickly("hf://datasets/someone/acts@main/v 1/")
    assert objects.read("plan.json", 100) == CONTENT["plan.json"]
    assert objects.size(LARGE) == 300_000
    asked = [path for _, path in hub.hub.requests]
    commit = objects.place.partition("@")[2].partition("/")[0]
    assert len(commit) == 40
    assert asked == [
        "/api/datasets/someone/acts/revision/main",
        f"/datasets/someone/acts/resolve/{commit}/v 1/plan.json",
        f"/datasets/someone/acts/resolve/{commit}/v 1/{LARGE}",
    ]
    assert hub.files.authorizations == [None, None]
    same = open_quickly(f"hf://datasets/someone/acts@{commit}/v 1")
    assert same.place == objects.place


def test_what_the_hub_does_not_have_is_named(hub, monkeypatch):
    def error(location: str) -> str:
        with pytest.raises(RemoteError) as raised:
            open_quickly(location)
        return str(raised.value).replace(hub.hub.url, "HUB")

    login = "log in with `hf auth login` or set HF_TOKEN, with access to the data set"
    assert error("hf://datasets/someone/none") == (
        "hf://datasets/someone/none cannot be opened: HUB has no such data set, or it is private; "
        f"check the name, or {login}"
    )
    assert error("hf://datasets/someone/acts@refs/pr/1") == (
        "hf://datasets/someone/acts cannot be opened: HUB has no such revision of it; check what "
        "is behind @"
    )
    hub.hub.gated["someone/acts"] = 403
    assert error("hf://datasets/someone/acts") == (
        "hf://datasets/someone/acts cannot be opened: access to it is restricted; ask for access "
        f"on HUB, then {login}"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert error("hf://datasets/someone/acts") == (
        "hf://datasets/someone/acts cannot be opened: the hub may not be asked; unset "
        "HF_HUB_OFFLINE"
    )


def test_a_hub_that_is_not_there_is_said_to_be_absent(tmp_path, monkeypatch):
    with servers.serving_hub(tmp_path) as hub:
        pass
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.hub.url)
    with pytest.raises(RemoteError, match=r"acts cannot be opened: .* cannot be reached .*6 tries"):
        open_quickly("hf://datasets/someone/acts")
