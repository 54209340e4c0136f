"""Meaning of the network library's errors, which only their texts tell apart.

Every text of obstore that the package depends on stands here; recorded samples lie in
tests/store/obstore_errors.json.
"""

import os
import re

from mlsae.base.errors import without_secrets

_STATUS = re.compile(r"status code: (\d{3}[^:\n]*)(?::\s*(.*?))?(?:\n\nDebug source|$)", re.S)
_DETAIL = re.compile(r'(?:message|error): "([^"]+)"')
_XML = re.compile(r"<(Code|Message)>([^<]*)</")
_PLAIN = re.compile(
    r"Range request not supported|Content-Length Header missing"
    r"|CONTENT_RANGE header: \"bytes [^\"]*\*"
)
_SETTING = re.compile(r"failed to parse \"(.*?)\" as (\w+)")
_MISSING = re.compile(r"Missing(?: |_)?(SecretAccessKey|AccessKeyId|Region|BucketName)")
_KIND = re.compile(r"kind: (Connect|Request|Timeout|Interrupted|Decode|Unknown)\b")


class RequestError(Exception):
    """A request that failed.

    Args:
        cause: the event, as a clause: `it answered 503 Service Unavailable`.
        passes: a second try may well succeed later.
        is_busy: the server asked for fewer requests.
        is_past_end: the object has none of the bytes asked for.
        may_be_absent: the server may also answer so where there is nothing.
        is_unreached: there was no answer.
        is_plain: HTTP allows the answer, but the network library does not take it.
        remedy: advice to the user, other than to try again.
    """

    def __init__(
        self,
        cause: str,
        *,
        passes: bool = False,
        is_busy: bool = False,
        is_past_end: bool = False,
        may_be_absent: bool = False,
        is_plain: bool = False,
        is_unreached: bool = False,
        remedy: str = "",
    ) -> None:
        cause = without_secrets(cause)
        super().__init__(cause)
        self.cause = cause
        self.passes = passes
        self.is_busy = is_busy
        self.is_past_end = is_past_end
        self.may_be_absent = may_be_absent
        self.is_plain = is_plain
        self.is_unreached = is_unreached
        self.remedy = remedy


def understand(error: Exception, credentials: str) -> RequestError:
    """Translate an error of the network library, whose classes tell only a few failures apart.

    Args:
        error: a BaseError of obstore.
        credentials: remedy where credentials are missing or refused.
    """
    text = str(error)
    # The library asks for the machine's role last.
    if "/latest/api/token" in text or "/latest/meta-data/" in text:
        return RequestError("no credentials were found", remedy=credentials)
    if status := _STATUS.search(text):
        return understand_status(status[1].strip(), status[2] or "", credentials)
    if "incorrectly configured region" in text:
        return RequestError("the bucket is in another region", remedy="set AWS_REGION")
    if "Wanted range starting at" in text:
        return RequestError("the object ends before", is_past_end=True)
    if _PLAIN.search(text):
        return RequestError(
            "the server sends answers without their size, or whole objects",
            is_plain=True,
            remedy="use a server that answers HTTP Range requests",
        )
    if setting := _SETTING.search(text):
        names = [n for n, v in os.environ.items() if n.startswith("AWS_") and v == setting[1]]
        where = " and ".join(names) or "a setting"
        kind_of = {"boolean": "true or false"}.get(setting[2], setting[2])
        return RequestError(
            f"{where} is {setting[1]!r}, expected {kind_of}", remedy="change the setting"
        )
    if missing := _MISSING.search(text):
        return RequestError(f"the setting {missing[1]} is missing", remedy=credentials)
    if kind := _KIND.search(text):
        if "TooManyRedirects" in text:
            return RequestError("its redirects do not end", remedy="check the address")
        causes = {"Timeout": "no answer in time", "Interrupted": "the connection was cut"}
        details = _DETAIL.findall(text)
        detail = details[-1] if details else text.split("\n")[0]
        cause = causes.get(kind[1], _brief(detail))
        return RequestError(cause, passes=True, is_unreached=kind[1] in ("Connect", "Timeout"))
    return RequestError(_brief(text.split("\n")[0]), remedy="check the address and the server")


def understand_status(status: str, body: str, credentials: str) -> RequestError:
    """Translate an answer other than success.

    Args:
        status: number and reason.
        body: body of the answer.
        credentials: remedy where credentials are missing or refused.
    """
    number = int(status[:3])
    told = dict(_XML.findall(body))
    detail = f" ({_brief(told.get('Message') or told['Code'])})" if told else ""
    cause = f"the server answered {status}{detail}"
    if number == 403 and told.get("Code", "AccessDenied") == "AccessDenied":
        # Who may not list a bucket is told so of what is not there, too.
        remedy = f"{credentials}; and check the address: servers answer so for what is not there"
        return RequestError(cause, may_be_absent=True, remedy=remedy)
    if number in (401, 403) or told.get("Code") in ("ExpiredToken", "InvalidToken"):
        return RequestError(cause, remedy=credentials)
    if told.get("Code") == "NoSuchBucket":
        return RequestError("there is no such bucket", remedy="check its name, or create it first")
    if told.get("Code") == "AuthorizationHeaderMalformed":
        return RequestError(cause, remedy="set AWS_REGION")
    return RequestError(
        cause,
        passes=number in (408, 425, 429) or number >= 500,
        is_busy=number == 429,
        is_past_end=number == 416,
        remedy="check the address and the server",
    )


def _brief(text: str) -> str:
    text = re.sub(r"^Generic \w+ error: ", "", text)
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 160 else f"{line[:159]}…"
