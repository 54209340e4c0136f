"""Passwords in URLs: never in a message, a file or a page."""

import pytest

from mlsae.base.errors import without_secrets
from mlsae.base.settings import ReadsStores, words_of
from mlsae.store.places.failures import RequestError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:secret@host/a cannot be read", "https://host/a cannot be read"),
        ("https://user:sec/ret@host/a", "https://host/a"),
        ("https://user:sec@ret@host:80/a", "https://host:80/a"),
        ("http://token@host", "http://host"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("GET https://b/k?X-Amz-Signature=ab12&c=d, then", "GET https://b/k?…, then"),
        ("proxy http://me:secret@proxy:3128 (NO_PROXY)", "proxy http://proxy:3128 (NO_PROXY)"),
        ("two: https://a:b@c https://d:e@f/", "two: https://c https://f/"),
        # Nothing secret: ports, revisions, signs in a path.
        ("http://127.0.0.1:8000/a", "http://127.0.0.1:8000/a"),
        ("http://[::1]:8000/a@b", "http://[::1]:8000/a@b"),
        ("hf://datasets/someone/acts@main/v 1", "hf://datasets/someone/acts@main/v 1"),
        ("https://host/a@b/c", "https://host/a@b/c"),
        ("host:PORT, what? me@home", "host:PORT, what? me@home"),
        ("https://host:PORT/a", "https://host:PORT/a"),
    ],
)
def test_urls_stand_without_what_lets_others_in(text: str, shown: str):
    assert without_secrets(text) == shown


def test_a_recorded_command_has_no_password():
    """The command that repeats an analysis stands on its page."""
    config = ReadsStores(cache=("https://me:secret@host/a", "acts"))
    assert words_of(config) == ["--cache", "https://host/a", "--cache", "acts"]


def test_a_failed_request_has_no_password():
    """The network library names the whole address, that of a proxy too."""
    assert str(RequestError("GET http://us:pw@h/k failed")) == "GET http://h/k failed"
