"""Servers on the loopback that fail as real ones do: for files, S3, data sets of the hub.

    with serving_files(root) as web:     web.url + "/store", web.faults
    with serving_bucket() as s3:         "s3://bucket/store" in the environment s3.environment()
    with serving_hub(root) as hub:       "hf://datasets/someone/acts" in hub.environment(home)

Tests are no package: they load this file by its path.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import quote, unquote, urlsplit

BUCKET = "bucket"
ACCESS_KEY = "AKIDEXAMPLE"


class Faults:
    """Faults to make, and requests that came. A name is the path of the URL without its first /."""

    def __init__(self) -> None:
        self.unavailable = 0.0
        """Share of the requests that are answered 503; the same ones for the same requests."""
        self.refused: dict[str, int] = {}
        """Name, or a folder with a / at its end → status that is answered."""
        self.busy: Counter[str] = Counter()
        """Name → how many more requests are answered 429."""
        self.cuts: Counter[str] = Counter()
        """Name → how many more answers end after half of their bytes."""
        self.latency = 0.0
        """Seconds before each answer."""
        self.requests: list[tuple[str, str, str | None]] = []
        """(method, name, Range header) of every request."""
        self.served: Counter[str] = Counter()
        """Fault (`503`, `429`, `cut`, `refused`) → number of requests that met it."""
        self.most_at_once = 0
        """Most requests that waited for `latency` at one time."""
        self._waiting = 0
        self._random = random.Random(0)
        self._lock = Lock()

    def status(self, method: str, name: str, asked: str | None) -> int | None:
        """Take note of a request, wait, and say which error it is answered with, if any."""
        with self._lock:
            self._waiting += 1
            self.most_at_once = max(self.most_at_once, self._waiting)
        Event().wait(self.latency)
        with self._lock:
            self._waiting -= 1
            self.requests.append((method, name, asked))
            for of, status in self.refused.items():
                if name == of or (of.endswith("/") and name.startswith(of)):
                    self.served["refused"] += 1
                    return status
            if self.busy[name] > 0:
                self.busy[name] -= 1
                self.served["429"] += 1
                return 429
            if self._random.random() < self.unavailable:
                self.served["503"] += 1
                return 503
            return None

    def cuts_now(self, method: str, name: str) -> bool:
        """True if this answer ends in the middle."""
        with self._lock:
            is_cut = method == "GET" and self.cuts[name] > 0
            self.cuts[name] -= is_cut
            self.served["cut"] += is_cut
            return is_cut


class Handler(BaseHTTPRequestHandler):
    """One connection to a web server of files."""

    protocol_version = "HTTP/1.1"
    wbufsize = 2**16
    web: "WebServer"

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""

    def do_HEAD(self) -> None:
        """Answer."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer."""
        name = unquote(urlsplit(self.path).path).removeprefix("/")
        asked = self.headers.get("Range") if self.web.answers_ranges else None
        self.web.authorizations.append(self.headers.get("Authorization"))
        if status := self.web.faults.status(self.command, name, self.headers.get("Range")):
            self.answer(status, b"<html>not now</html>\n")
        elif reply := self.web.replies.get(name):
            reply(self)
        elif not (path := self.web.root / name).is_file():
            self.answer(404, b"<html>not found</html>\n")
        elif asked is None:
            self.answer(200, path.read_bytes(), path=name)
        else:
            self._answer_range(path, name, asked)

    def _answer_range(self, path: Path, name: str, asked: str) -> None:
        size = path.stat().st_size
        first, _, last = asked.removeprefix("bytes=").partition("-")
        if first:
            start, stop = int(first), min(int(last) + 1, size) if last else size
        else:
            start, stop = max(size - int(last), 0), size
        if start >= size:
            self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
            return
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        self.answer(206, data, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}, path=name)

    def answer(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str | None] | None = None,
        *,
        path: str = "",
    ) -> None:
        """Send a whole answer, or half of one to a path whose answers are cut.

        `headers` may say what is not true; None leaves one out.
        """
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        is_cut = bool(path) and self.web.faults.cuts_now(self.command, path)
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
        self.close_connection = self.close_connection or is_cut


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that goes away in the middle is no fault."""


class WebServer:
    """A directory, served to whoever asks for its files or parts of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.faults = Faults()
        self.answers_ranges = True
        """True: a request for a part is answered with the part; False: with the whole file."""
        self.replies: dict[str, Callable[[Handler], None]] = {}
        """Name → what is answered in place of a file."""
        self.authorizations: list[str | None] = []
        """Authorization header of every request."""


class BucketServer:
    """An S3 server with one bucket."""

    def __init__(self) -> None:
        self.url = ""
        self.faults = Faults()
        self.checksums: dict[str, str] = {}
        """Name → SHA-256 that its last upload, or last part, came with."""
        self.authorizations: list[str | None] = []
        """Authorization header of every request."""

    def environment(self) -> dict[str, str]:
        """Environment in which a process reaches the bucket, and not the user's own profile."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "NO_PROXY": "127.0.0.1",
        }

    def upload(self, directory: Path, prefix: str) -> None:
        """Put the files of a directory under `s3://bucket/<prefix>`, without this package."""
        from moto.s3.models import s3_backends

        backend = s3_backends["123456789012"]["aws"]
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            key = f"{prefix}/{path.relative_to(directory).as_posix()}"
            backend.put_object(BUCKET, key, path.read_bytes())

    def download(self, prefix: str, directory: Path) -> None:
        """Write what is under `s3://bucket/<prefix>` to a new directory, without this package."""
        from moto.s3.models import s3_backends

        backend = s3_backends["123456789012"]["aws"]
        for key, value in backend.buckets[BUCKET].keys.items():
            if key.startswith(f"{prefix}/"):
                path = directory / key.removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(value.value)


class HubServer:
    """A hub that sends readers of files to another host, as the real one does with large ones."""

    def __init__(self, hub: Any, files: WebServer) -> None:
        self.hub = hub
        """Hub that tests/hub.py serves."""
        self.files = files
        """The other host."""
        self.token: str | None = None
        """Token that the hub asks for; None where everything is public."""

    def environment(self, home: Path) -> dict[str, str]:
        """Environment in which a process reaches the hub, and not the user's own cache or token."""
        found: dict[str, str] = self.hub.environment(home)
        return found


def _faulty(server: BucketServer, application: Any) -> Any:
    """A WSGI application that fails as `server.faults` says, and else asks another."""

    def call(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, name = environ["REQUEST_METHOD"], environ["PATH_INFO"].removeprefix("/")
        server.authorizations.append(environ.get("HTTP_AUTHORIZATION"))
        if checksum := environ.get("HTTP_X_AMZ_CHECKSUM_SHA256"):
            server.checksums[name] = checksum
        status = server.faults.status(method, name, environ.get("HTTP_RANGE"))
        if status is not None:
            code = b"AccessDenied" if status == 403 else b"Injected"
            body = b"<Error><Code>%b</Code><Message>Not now</Message></Error>" % code
            headers = [("Content-Length", str(len(body))), ("Content-Type", "application/xml")]
            start_response(f"{status} Injected", headers)
            return [body]
        parts = application(environ, start_response)
        if not server.faults.cuts_now(method, name):
            return parts  # type: ignore[no-any-return]
        data = b"".join(parts)
        return [data[: len(data) // 2]]

    return call


@contextmanager
def _running(server: Any) -> Iterator[str]:
    """The URL of a server that runs until the block ends."""
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving_files(root: Path, port: int = 0) -> Iterator[WebServer]:
    """A web server of `root` until the block ends, on a port of its own unless one is given."""
    web = WebServer(root)
    handler = type("BoundHandler", (Handler,), {"web": web})
    with _running(_Server(("127.0.0.1", port), handler)) as web.url:
        yield web


@contextmanager
def serving_bucket() -> Iterator[BucketServer]:
    """An S3 server with an empty bucket, on a port of its own until the block ends."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import WSGIRequestHandler, make_server

    class QuietHandler(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            """Stay quiet."""

    backend = s3_backends["123456789012"]["aws"]
    backend.reset()
    backend.create_bucket(BUCKET, "us-east-1")
    server = BucketServer()
    application = _faulty(server, DomainDispatcherApplication(create_backend_app))
    made = make_server("127.0.0.1", 0, application, threaded=True, request_handler=QuietHandler)
    made.daemon_threads = True
    with _running(made) as server.url:
        yield server
    backend.reset()


@contextmanager
def serving_hub(root: Path) -> Iterator[HubServer]:
    """A hub of `<root>/datasets/<owner>/<name>/…`, and a host that holds their files."""
    spec = spec_from_file_location("loopback_hub", Path(__file__).with_name("hub.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    class Redirecting(module.Handler):  # type: ignore[misc, name-defined]
        server_of_files: HubServer

        def _check_token(self) -> None:
            wanted = self.server_of_files.token
            if wanted and self.headers.get("Authorization") != f"Bearer {wanted}":
                raise module.Refusal(401, "RepoNotFound", "Repository not found")

        def _api(self, *asked: Any) -> None:
            self._check_token()
            super()._api(*asked)

        def _resolve(self, parts: list[str]) -> None:
            self._check_token()
            _, folder, rest = self.hub.find(parts)
            self._check_revision(folder, rest[1])
            path = folder.joinpath(*rest[2:])
            if not path.is_file():
                raise module.Refusal(404, "EntryNotFound", "Entry not found")
            host = self.server_of_files.files.url.replace("127.0.0.1", "localhost")
            location = f"{host}/{quote(path.relative_to(root).as_posix())}"
            self._send(302, b"", {"Location": location})

    with serving_files(root) as files:
        server = HubServer(module.Hub(root), files)
        handler = type("Bound", (Redirecting,), {"hub": server.hub, "server_of_files": server})
        with _running(_Server(("127.0.0.1", 0), handler)) as server.hub.url:
            yield server
