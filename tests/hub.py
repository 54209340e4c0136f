"""A hub on the loopback: models and data sets of a folder, served as the client library asks.

    <root>/models/<owner>/<name>/…      <root>/datasets/<owner>/<name>/…

Each has one revision. `HF_ENDPOINT=hub.url` points a process at it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = ("models", "datasets")


class Refusal(Exception):  # noqa: N818
    """An answer other than success: status and the hub's error code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """Files that are served, refusals to give, and requests that came."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.gated: dict[str, int] = {}
        """Repository, such as `someone/some-text` → 401 or 403."""
        self.cuts: Counter[tuple[str, str]] = Counter()
        """(repository, path in it) → how many more answers end in the middle."""
        self.requests: list[tuple[str, str]] = []
        """(method, path) of every request."""

    def environment(self, home: Path) -> dict[str, str]:
        """Environment in which a process sees this hub, and not the user's own cache or token."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def find(self, parts: list[str]) -> tuple[str, Path, list[str]]:
        """Kind and folder of the repository that `parts` begin with, and the parts behind it."""
        kind, *rest = parts if parts[:1] == ["datasets"] else ["models", *parts]
        if rest[:1] == ["models"]:
            rest = rest[1:]
        repository = "/".join(rest[:2])
        folder = self.root / kind / repository
        if len(rest) < 2 or not folder.is_dir():
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if status := self.gated.get(repository):
            raise Refusal(status, "GatedRepo", f"Access to {repository} is restricted")
        return kind, folder, rest[2:]


def revision_of(folder: Path) -> str:
    """40 hex digits that name the content of a repository."""
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)} {etag_of(path)}\n".encode())
    return digest.hexdigest()


def etag_of(path: Path) -> str:
    """A file's git object id."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def entry(folder: Path, path: Path) -> dict[str, Any]:
    """A file or folder, as the tree and the paths-info answers list it."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    return {"type": "file", "oid": etag_of(path), "size": path.stat().st_size, "path": name}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.hub.requests.append((self.command, unquote(url.path)))
        parts = [part for part in unquote(url.path).split("/") if part]
        try:
            if parts[:1] == ["api"]:
                self._api(parts[1:], parse_qs(url.query), body)
            else:
                self._resolve(parts)
        except Refusal as refusal:
            self._send(
                refusal.status,
                json.dumps({"error": str(refusal)}).encode(),
                {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)},
            )

    def _api(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        if parts[:1] not in (["models"], ["datasets"]):
            raise Refusal(404, "NotFound", "No such endpoint")
        kind, folder, rest = self.hub.find(parts)
        what, revision, *inside = rest if len(rest) > 1 else ["revision", "main"]
        self._check_revision(folder, revision)
        answer: Any
        if what == "revision":
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            answer = {
                "id": folder.relative_to(self.hub.root / kind).as_posix(),
                "sha": revision_of(folder),
                "private": False,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path.relative_to(folder).as_posix()} for path in files],
            }
        elif what == "tree":
            start = folder.joinpath(*inside)
            if not start.is_dir():
                raise Refusal(404, "EntryNotFound", "Entry not found")
            deep = query.get("recursive", ["false"])[0].lower() in {"true", "1"}
            found = start.rglob("*") if deep else start.iterdir()
            answer = [entry(folder, path) for path in sorted(found)]
        elif what == "paths-info":
            asked = (
                json.loads(body)["paths"]
                if "json" in self.headers.get("Content-Type", "")
                else parse_qs(body.decode())["paths"]
            )
            answer = [entry(folder, folder / path) for path in asked if (folder / path).exists()]
        else:
            raise Refusal(404, "NotFound", "No such endpoint")
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _resolve(self, parts: list[str]) -> None:
        _, folder, rest = self.hub.find(parts)
        if len(rest) < 3 or rest[0] != "resolve":
            raise Refusal(404, "NotFound", "No such page")
        self._check_revision(folder, rest[1])
        path = folder.joinpath(*rest[2:])
        headers = {"X-Repo-Commit": revision_of(folder), "Accept-Ranges": "bytes"}
        if not path.is_file():
            raise Refusal(404, "EntryNotFound", "Entry not found")
        data, status = path.read_bytes(), 200
        headers["ETag"] = f'"{etag_of(path)}"'
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1, len(data)) if last else len(data)
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
            data, status = data[int(first) : stop], 206
        name = (f"{folder.parent.name}/{folder.name}", path.relative_to(folder).as_posix())
        is_cut = self.command == "GET" and self.hub.cuts[name] > 0
        self.hub.cuts[name] -= is_cut
        self._send(status, data, headers, num_sent=len(data) // 2 if is_cut else len(data))

    def _check_revision(self, folder: Path, revision: str) -> None:
        if revision not in {"main", revision_of(folder)}:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], num_sent: int | None = None
    ) -> None:
        """An answer; one of which not all bytes are sent ends the connection."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:num_sent])
        if num_sent is not None and num_sent < len(data):
            self.close_connection = True


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub that serves `root` from a port of its own until the block ends."""
    hub = Hub(root)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
