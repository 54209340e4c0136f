"""Credentials and address of an S3 server: settings that the environment leaves to the profile.

The network library reads the environment (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL`,
`AWS_SKIP_SIGNATURE`, …) and asks the machine for its role, but knows no `~/.aws`.
"""

import configparser
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlsae.store.errors import RemoteError

S3_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or AWS_SKIP_SIGNATURE=true "
    "for a public bucket"
)
_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}
_ELSEWHERE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Variables that give credentials, or say that none are needed, without a profile."""
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_PROVIDED = ("sso_", "role_", "credential_", "login_", "web_identity_")
"""Openings of keys of a profile that gets its credentials elsewhere."""


def bucket_access(place: str) -> dict[str, Any]:
    """Arguments of obstore's S3Store that the environment does not give.

    Raises:
        RemoteError: a setting cannot be used, there is no such profile, or the profile gets its
            credentials in a way that needs boto3, which is absent.
    """
    name = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE") or "default"
    settings = _Settings(place)
    profile = settings.profile(name)
    if profile is None and name != "default" and not _is_set(*_ELSEWHERE):
        raise RemoteError(
            f"{place}: there is no profile {name} in {settings.places}; set AWS_PROFILE to one of "
            f"{', '.join(settings.names()) or '(none is there)'}, or unset it"
        )
    profile = profile or {}
    access: dict[str, Any] = {}
    if "region" in profile and not _is_set("AWS_REGION", "AWS_DEFAULT_REGION"):
        access["region"] = profile["region"]
    if endpoint := _endpoint(place, settings, profile):
        access["endpoint"] = endpoint
    if _nested(profile.get("s3", "")).get("addressing_style") == "virtual":
        access["virtual_hosted_style_request"] = True
    _check_credentials(place)
    if _is_set(*_ELSEWHERE):
        return access
    if "aws_access_key_id" in profile:
        return access | {_KEYS[key]: value for key, value in profile.items() if key in _KEYS}
    if any(key.startswith(_PROVIDED) for key in profile):
        access["credential_provider"] = _provider(place, name)
    return access


def _is_set(*names: str) -> bool:
    return any(os.environ.get(name) for name in names)


def _check_credentials(place: str) -> None:
    """Refuse values that no header can carry, over which the network library ends the process."""
    for name in _SECRETS:
        value = os.environ.get(name, "")
        if not value.isprintable() or value != value.strip():
            raise RemoteError(
                f"{place}: {name} holds spaces or line breaks at its ends, or signs that are not "
                f"printed; set it again without them"
            )


def _endpoint(place: str, settings: "_Settings", profile: Mapping[str, str]) -> str | None:
    """URL of the server, from the first place that has one as the tools of AWS look for it."""
    for name in _ENDPOINTS:
        if name in os.environ:
            if _is_set(name):
                return _checked_endpoint(place, name, os.environ[name])
            raise RemoteError(f"{place}: {name} is set but empty; unset it, or give a URL")
    if os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    services = settings.services(profile.get("services"))
    found = _nested(services.get("s3", "")).get("endpoint_url", profile.get("endpoint_url"))
    return found and _checked_endpoint(place, f"endpoint_url in {settings.places}", found)


def _checked_endpoint(place: str, name: str, text: str) -> str:
    try:
        url = urlsplit(text)
        is_url = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_url = False
    if is_url and text.isprintable() and " " not in text:
        return text
    cure = "" if "://" in text else f", such as http://{text}"
    raise RemoteError(
        f"{place}: {name} is {text!r}, expected a URL that begins with http:// or https://{cure}"
    )


class _Settings:
    """Files of the tools of AWS, `~/.aws/config` and `~/.aws/credentials`.

    Args:
        place: store that they are read for.

    Raises:
        RemoteError: a file is none of these.
    """

    def __init__(self, place: str) -> None:
        home = Path.home() / ".aws"
        paths = [
            Path(os.environ.get("AWS_CONFIG_FILE") or home / "config").expanduser(),
            Path(
                os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials"
            ).expanduser(),
        ]
        self.places = " or ".join(map(str, paths))
        self._config, self._credentials = (_parsed(place, path) for path in paths)

    def profile(self, name: str) -> dict[str, str] | None:
        """Keys of a profile; the file of credentials goes before. None where none has it."""
        sections = [
            self._config.get("default" if name == "default" else f"profile {name}"),
            self._credentials.get(name),
        ]
        if sections == [None, None]:
            return None
        return {key: value for of in sections if of for key, value in of.items()}

    def names(self) -> list[str]:
        """Profiles that are there."""
        found = {name.removeprefix("profile ") for name in self._config if "services " not in name}
        return sorted(found | self._credentials.keys())

    def services(self, name: str | None) -> dict[str, str]:
        """Settings of services under a name that a profile refers to."""
        return self._config.get(f"services {name}", {})


def _parsed(place: str, path: Path) -> dict[str, dict[str, str]]:
    """Section → keys and values of a file; none where there is no file."""
    parser = configparser.RawConfigParser(default_section="", strict=False)
    try:
        parser.read_string(path.read_text("utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (configparser.Error, UnicodeDecodeError) as error:
        what = " ".join(str(error).replace("<string>", "the file").split())
        raise RemoteError(f"{place}: {path} is no file of settings of AWS ({what})") from None
    sections = {}
    for section in parser.sections():
        kind, _, name = section.partition(" ")
        name = name.strip().strip("\"'")
        sections[f"{kind} {name}" if name else kind] = dict(parser[section])
    return sections


def _nested(text: str) -> dict[str, str]:
    """Settings in the lines below a key."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _provider(place: str, profile: str) -> Any:
    try:
        import boto3
    except ImportError:
        raise RemoteError(
            f"{place}: profile {profile} of ~/.aws gets its credentials by single sign-on, a role "
            f"or a command, which needs boto3: run `pip install boto3`"
        ) from None
    from obstore.auth.boto3 import Boto3CredentialProvider

    return Boto3CredentialProvider(boto3.Session(profile_name=profile))
