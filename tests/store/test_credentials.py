"""Settings of S3 as the tools of AWS read them; each that cannot be used is told in one line."""

import os
from pathlib import Path

import pytest

from mlsae.store import RemoteError
from mlsae.store.places.credentials import bucket_access
from mlsae.store.places.remote import open_objects

KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
SERVICES = """
[profile m]
region = us-east-1
services = local
endpoint_url = http://unused:9
s3 =
  addressing_style = virtual
[services local]
s3 =
  endpoint_url = http://127.0.0.1:9
dynamodb =
  endpoint_url = http://other:9
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `.aws` of nobody, and no settings in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    return tmp_path / ".aws"


def test_the_endpoint_is_that_of_the_nearest_setting(home, monkeypatch):
    """Variable for S3, variable, section of services, profile."""
    (home / "config").write_text(SERVICES)
    monkeypatch.setenv("AWS_PROFILE", "m")
    found = bucket_access("s3://b")
    assert found == {
        "region": "us-east-1",
        "endpoint": "http://127.0.0.1:9",
        "virtual_hosted_style_request": True,
    }
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all:9")
    assert bucket_access("s3://b")["endpoint"] == "http://all:9"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3:9")
    assert bucket_access("s3://b")["endpoint"] == "http://s3:9"
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert "endpoint" not in bucket_access("s3://b")


@pytest.mark.parametrize(
    "content",
    [
        b"[default]\nregion = a\nregion = b\n",
        b"[default]\nregion = a\n[default]\nregion = b\n",
        b"\xef\xbb\xbf[default]\nregion = b\n",
        b'[profile "default"]\nregion = c\n[default]\nregion = b\n',
    ],
    ids=["option twice", "section twice", "byte order mark", "quotes"],
)
def test_files_are_read_as_leniently_as_can_be(home, content):
    """The last value counts."""
    (home / "config").write_bytes(content)
    assert bucket_access("s3://b")["region"] == "b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[default]\nregion\n", r"is no file of settings of AWS \(.*\[line *2\]: 'region"),
        (b"region = a\n", r"is no file of settings of AWS \(File contains no section headers"),
        (b"[default]\nregion = \xff\n", r"is no file of settings of AWS \('utf-8' codec"),
    ],
)
def test_a_file_that_is_none_is_named(home, content, message):
    (home / "config").write_bytes(content)
    with pytest.raises(RemoteError, match=rf"^s3://b: {home}/config {message}") as raised:
        bucket_access("s3://b")
    assert "\n" not in str(raised.value)


def test_a_profile_that_is_not_there_is_named(home, monkeypatch):
    (home / "config").write_text("[default]\nregion = a\n[profile work]\n[services local]\n")
    (home / "credentials").write_text("[mine]\naws_access_key_id = x\n")
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    with pytest.raises(RemoteError) as raised:
        bucket_access("s3://b")
    assert str(raised.value) == (
        f"s3://b: there is no profile nosuch in {home}/config or {home}/credentials; set "
        "AWS_PROFILE to one of default, mine, work, or unset it"
    )
    # Whoever gives keys needs no profile.
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    assert bucket_access("s3://b") == {}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"AWS_ENDPOINT_URL": "minio:9000"},
            "s3://b: AWS_ENDPOINT_URL is 'minio:9000', expected a URL that begins with http:// or "
            "https://, such as http://minio:9000",
        ),
        (
            {"AWS_ENDPOINT_URL_S3": "ftp://minio"},
            "s3://b: AWS_ENDPOINT_URL_S3 is 'ftp://minio', expected a URL that begins with http:// "
            "or https://",
        ),
        ({"AWS_ENDPOINT_URL": "http://h:port"}, "AWS_ENDPOINT_URL is 'http://h:port', expected a"),
        ({"AWS_ENDPOINT_URL": ""}, "s3://b: AWS_ENDPOINT_URL is set but empty; unset it, or give"),
        ({"AWS_SECRET_ACCESS_KEY": "y\n"}, "AWS_SECRET_ACCESS_KEY holds spaces or line breaks at"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "the setting SecretAccessKey is missing; set AWS_ACCESS_K"),
        (
            {"AWS_S3_EXPRESS": "perhaps"},
            "s3://b cannot be opened: AWS_S3_EXPRESS is 'perhaps', expected true or false; change",
        ),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(home, monkeypatch, variables, message, capfd):
    """The network library panics at some of them, and prints where it did."""
    assert home.exists()
    for name, value in {**KEYS, **variables}.items():
        monkeypatch.setenv(name, value)
    if not os.environ["AWS_SECRET_ACCESS_KEY"]:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteError) as raised:
        open_objects("s3://b", cache_bytes=0)
    assert message in str(raised.value)
    assert "y" not in str(raised.value).split()
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""
