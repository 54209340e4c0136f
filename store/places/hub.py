"""A store in a data set of the Hugging Face hub, at one commit."""

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.hf_api import RepoFile
from obstore.store import HTTPStore

from mlsae.base.errors import InputError
from mlsae.store.places.failures import RequestError
from mlsae.store.places.retry import Patience
from mlsae.store.places.web import RemoteObjects, client_options

T = TypeVar("T")

_LOCATION = re.compile(
    r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<folder>.*))?",
    re.IGNORECASE,
)
_CREDENTIALS = "log in with `hf auth login` or set HF_TOKEN, with access to the data set"


class HubObjects(RemoteObjects):
    """A store in a data set of the hub. A branch or tag is resolved once, when opened.

    Endpoint and token are those of the hub's own tools (`HF_ENDPOINT`, `HF_TOKEN`,
    `hf auth login`).

    Raises:
        InputError: `location` names no data set.
        RemoteError: the hub cannot be reached, or does not have the data set or revision.
    """

    def __init__(self, location: str, patience: Patience) -> None:
        found = _LOCATION.fullmatch(location)
        if found is None:
            raise InputError(
                f"{location}: expected hf://datasets/owner/name[@revision][/path]; a revision "
                f"with a slash has %2F for it"
            )
        self._repository = found["repository"]
        self._folder = (found["folder"] or "").strip("/")
        revision = unquote(found["revision"] or "main")
        token = get_token()
        self._api = HfApi(token=token or False)
        name = f"hf://datasets/{self._repository}"

        def resolve() -> str:
            info = self._api.dataset_info(
                self._repository, revision=revision, timeout=patience.stall_seconds
            )
            return str(info.sha)

        self._commit = patience.persist(f"{name} cannot be opened", self._asking(resolve))
        place = f"{name}@{self._commit}"
        path = f"datasets/{self._repository}/resolve/{self._commit}"
        if self._folder:
            place = f"{place}/{self._folder}"
            path = f"{path}/{quote(self._folder)}"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = HTTPStore(
            f"{constants.ENDPOINT}/{path}",
            client_options=client_options(patience, headers),
            retry_config={"max_retries": 0},
        )
        super().__init__(place, client, _CREDENTIALS, patience, constants.ENDPOINT)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process asks for itself, for the same commit."""
        return HubObjects, (self.place, self._patience)

    def walk(self) -> Iterator[tuple[str, int]]:
        """See `Objects`."""

        def attempt() -> list[tuple[str, int]]:
            entries = self._api.list_repo_tree(
                self._repository,
                self._folder or None,
                recursive=True,
                revision=self._commit,
                repo_type="dataset",
            )
            return [(entry.path, entry.size) for entry in entries if isinstance(entry, RepoFile)]

        found = self._patience.persist(f"{self.place} cannot be listed", self._asking(attempt))
        prefix = f"{self._folder}/" if self._folder else ""
        yield from ((path.removeprefix(prefix), size) for path, size in found)

    def _asking(self, attempt: Callable[[], T]) -> Callable[[], T]:
        """`attempt`, with the errors of the hub's library as RequestError."""

        def asking() -> T:
            try:
                return attempt()
            except errors.HFValidationError as error:
                raise InputError(f"hf://datasets/{self._repository}: {error}") from None
            except Exception as error:
                failure = _understand(error)
                if failure is None:
                    raise
                raise failure from None

        return asking


def _understand(error: Exception) -> RequestError | None:
    """Explain an error from the hub; None for a defect in a program."""
    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return RequestError(
            "access to it is restricted", remedy=f"ask for access on {hub}, then {_CREDENTIALS}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"{hub} has no such revision of it", remedy="check what is behind @")
    if isinstance(error, errors.RepositoryNotFoundError):
        return RequestError(
            f"{hub} has no such data set, or it is private",
            remedy=f"check the name, or {_CREDENTIALS}",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return RequestError("the hub may not be asked", remedy="unset HF_HUB_OFFLINE")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return RequestError(
            f"{hub} answered {status}",
            passes=status in (408, 429) or status >= 500,
            is_busy=status == 429,
            remedy=_CREDENTIALS if status in (401, 403) else "check the address",
        )
    # Errors of the HTTP client, which has changed and may again.
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests"):
        return RequestError(f"{hub} cannot be reached ({error})", passes=True)
    return None
