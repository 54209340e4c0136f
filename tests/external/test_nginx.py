"""A store behind a real nginx: what is read from it is what lies on the disk."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection, socket

import numpy as np
import pytest

from mlsae.sae.directory import WEIGHTS
from mlsae.store import open_store
from mlsae.store.tools.verify import verify
from mlsae.train import TrainConfig, run

pytestmark = pytest.mark.external

CONFIGURATION = """
daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[str]:
    """Serve a folder; the address."""
    if (program := shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")) is None:
        pytest.skip("needs nginx (Debian: apt-get install nginx-light)")
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir()
    # nginx's workers run as another user, who may not look into the test's folders.
    user = "user root;" if root.owner() == "root" else ""
    text = user + CONFIGURATION.format(folder=folder, port=port, root=root)
    (folder / "nginx.conf").write_text(text)
    command = [program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    with subprocess.Popen(command) as server:
        try:
            _wait_for(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _wait_for(port: int, server: "subprocess.Popen[bytes]") -> None:
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up and server.poll() is None:
        try:
            create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            continue
        return
    pytest.fail("nginx did not start")


@pytest.mark.parametrize("options", [{}, {"encoding": "float32", "compression": "zstd"}])
def test_a_store_behind_nginx_is_the_store_on_disk(sample_maker, tmp_path: Path, options):
    """Every row, verify, and an SAE that is trained from it bit for bit."""
    made = sample_maker(d_model=32, **options)
    with nginx(tmp_path, tmp_path / "nginx") as address:
        place = f"{address}/acts"
        near = open_store(made.path)
        far = open_store(place, cache_dir=tmp_path / "cache")
        assert far.store_id == near.store_id
        for layer in near.layers:
            assert np.array_equal(far.read("resid_post", layer), near.read("resid_post", layer))
        assert verify(place, cache_dir=tmp_path / "cache").problems == []
        weights = []
        for number, cache in enumerate((made.path, place)):
            out = tmp_path / f"sae{number}"
            run(
                TrainConfig(
                    cache=cache,
                    out=out,
                    num_latents=64,
                    k=4,
                    batch_size=48,
                    cache_dir=tmp_path / "cache",
                )
            )
            weights.append((out / WEIGHTS).read_bytes())
        assert weights[0] == weights[1]
