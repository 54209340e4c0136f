"""Objects elsewhere: the same from a web server, S3 and the hub; who may ask; what is refused."""

import hashlib
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.base.errors import InputError
from mlsae.store import DamagedStoreError, RemoteError, open_store
from mlsae.store.places.objects import LocalObjects
from mlsae.store.places.remote import is_remote, open_objects, open_writable

LARGE = "activations/resid_post/0/c.0.0"


@pytest.fixture(params=["local", "web", "s3", "hub"])
def objects(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    write_content: Callable[[Path], Path],
    locate: Callable[[str], Any],
    open_quickly: Callable[..., Any],
) -> Any:
    """Equal objects in each kind of place."""
    if request.param == "local":
        return LocalObjects(write_content(tmp_path / "local"))
    return open_quickly(f"{locate(request.param).location}/")


def test_every_place_gives_the_same_bytes(objects, content):
    for name, data in content.items():
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
    assert wide.tobytes() == content[LARGE][400:2400]


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


def test_every_place_but_a_web_server_lists_what_it_holds(objects, content):
    if objects.place.startswith("http"):
        with pytest.raises(RemoteError, match="/store: a web server does not list what it holds"):
            list(objects.walk())
    else:
        assert dict(objects.walk()) == {name: len(data) for name, data in content.items()}


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
        (
            "https:///store",
            "https:///store: expected https://host/path or https://host:port/path, without ? or #",
        ),
        (
            "http://host/a?b=1",
            "http://host/a?…: expected https://host/path or https://host:port/path, without ? or #",
        ),
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
            "cannot be written directly; copy to a directory, then run `hf upload owner/name "
            "DIRECTORY . --repo-type dataset`",
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
def test_a_store_reads_the_same_from_a_web_server(tmp_path, sample_maker, compression, servers):
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


# --- S3


def test_uploads_are_checked_and_whole(s3, tmp_path, quick):
    """Bytes, and a file of several parts, while three of ten requests are answered 503."""
    s3.faults.unavailable = 0.3
    objects = open_writable("s3://bucket/new", patience=quick)
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


def test_uploads_that_are_refused_say_so(s3, tmp_path, open_quickly, quick):
    (tmp_path / "file").write_bytes(bytes(20 * 2**20))
    s3.faults.unavailable = 1.0
    objects = open_writable("s3://bucket/new", patience=quick)
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
        open_writable("s3://none", patience=quick).put("a", b"1")
    with pytest.raises(RemoteError, match="s3://none cannot be listed: there is no such bucket; "):
        list(open_quickly("s3://none").walk())


def test_listing_a_bucket_is_asked_again_and_knows_its_folder(s3, tmp_path, open_quickly):
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
def authorizations(s3, monkeypatch, tmp_path, open_quickly) -> Callable[[], str | None]:
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
        '#!/bin/sh\necho \'{"Version": 1, "AccessKeyId": "MADE", "SecretAccessKey": "secret"}\'\n'
    )
    script.chmod(0o755)
    (tmp_path / "config").write_text(
        f"[default]\nregion = eu-west-1\nendpoint_url = {s3.url}\ncredential_process = {script}\n"
    )
    assert "Credential=MADE/" in authorizations()


@pytest.mark.usefixtures("authorizations")
def test_a_profile_that_needs_boto3_says_so(monkeypatch, tmp_path, open_quickly):
    (tmp_path / "config").write_text("[default]\nsso_session = work\n")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(RemoteError) as raised:
        open_quickly("s3://bucket/store")
    assert str(raised.value) == (
        "s3://bucket/store: profile default of ~/.aws gets its credentials by single sign-on, a "
        "role or a command, which needs boto3: run `pip install boto3`"
    )


@pytest.mark.usefixtures("authorizations")
def test_no_credentials_at_all_are_named(monkeypatch, tmp_path, open_quickly, servers):
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


def test_a_revision_is_looked_up_once_and_the_token_stays_with_the_hub(hub, content, open_quickly):
    hub.token = "hf_secret"
    objects = open_quickly("hf://datasets/someone/acts@main/v 1/")
    assert objects.read("plan.json", 100) == content["plan.json"]
    assert objects.size(LARGE) == 300_000
    assert len(list(objects.walk())) == 4
    # The client asks a hub for a registry too, once a process.
    asked = [path for _, path in hub.hub.requests if "/datasets/" in path]
    commit = objects.place.partition("@")[2].partition("/")[0]
    assert len(commit) == 40
    assert asked == [
        "/api/datasets/someone/acts/revision/main",
        f"/datasets/someone/acts/resolve/{commit}/v 1/plan.json",
        f"/datasets/someone/acts/resolve/{commit}/v 1/{LARGE}",
        f"/api/datasets/someone/acts/tree/{commit}/v 1",
    ]
    assert hub.files.authorizations == [None, None]
    same = open_quickly(f"hf://datasets/someone/acts@{commit}/v 1")
    assert same.place == objects.place


def test_what_the_hub_does_not_have_is_named(hub, monkeypatch, open_quickly):
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


def test_a_hub_that_is_not_there_is_said_to_be_absent(tmp_path, monkeypatch, open_quickly, servers):
    with servers.serving_hub(tmp_path) as hub:
        pass
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.hub.url)
    with pytest.raises(RemoteError, match=r"acts cannot be opened: .* cannot be reached .*6 tries"):
        open_quickly("hf://datasets/someone/acts")
