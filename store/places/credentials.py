"""Credentials and address of an S3 server: settings that the environment leaves to the profile.

The network library reads the environment (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL`,
`AWS_SKIP_SIGNATURE`, …) and asks the machine for its role, but knows no `~/.aws`.
"""

import configparser
import os
from pathlib import Path
from typing import Any

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


def bucket_access(place: str) -> dict[str, Any]:
    """Arguments of obstore's S3Store that the environment does not give.

    Raises:
        RemoteError: the profile gets its credentials in a way that needs boto3, which is absent.
    """
    name = os.environ.get("AWS_PROFILE", "default")
    profile = _profile(name)
    access: dict[str, Any] = {}
    if "region" in profile and not _is_set("AWS_REGION", "AWS_DEFAULT_REGION"):
        access["region"] = profile["region"]
    if "endpoint_url" in profile and not _is_set("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        access["endpoint"] = profile["endpoint_url"]
    if _is_set(*_ELSEWHERE):
        return access
    if "aws_access_key_id" in profile:
        return access | {_KEYS[key]: value for key, value in profile.items() if key in _KEYS}
    if any(key.startswith(("sso_", "role_", "credential_", "login_")) for key in profile):
        access["credential_provider"] = _provider(place, name)
    return access


def _is_set(*names: str) -> bool:
    return any(os.environ.get(name) for name in names)


def _profile(name: str) -> dict[str, str]:
    """Keys of a profile; the credentials file goes before the config file."""
    home = Path.home() / ".aws"
    files = {
        os.environ.get("AWS_CONFIG_FILE", home / "config"): (
            name if name == "default" else f"profile {name}"
        ),
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"): name,
    }
    found: dict[str, str] = {}
    for path, section in files.items():
        parser = configparser.ConfigParser(interpolation=None, default_section="")
        parser.read(path)
        if parser.has_section(section):
            found |= parser[section]
    return found


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
