"""Servers that fail: training from them gives the SAE that it gives from disk."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
MLSAE = (sys.executable, "-m", "mlsae")
TRAIN = (
    "-R", "4", "-k", "8", "--batch-size", "256", "--device", "cpu", "--checkpoint-seconds", "0",
)  # fmt: skip


def train(cache: object, out: Path, *more: object) -> list[object]:
    """The command."""
    return [*MLSAE, "train", "--cache", cache, "--out", out, *TRAIN, *more]


@pytest.fixture(scope="module")
def expected(kit: Any, unbroken: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that training from disk gives."""
    out = tmp_path_factory.mktemp("sae") / "sae"
    done = kit.run(train(unbroken, out))
    assert done.returncode == 0, done.stderr
    return (out / "sae.safetensors").read_bytes()


@pytest.mark.parametrize("kept", ["0", "1GB"])
@pytest.mark.parametrize("kind", ["web", "s3"])
def test_training_through_faults_gives_equal_weights(
    kit: Any,
    counts: Any,
    servers: Any,
    unbroken: Path,
    expected: bytes,
    kind: str,
    kept: str,
    tmp_path: Path,
) -> None:
    """5% of requests are answered 503, answers are cut in the middle, each takes 50 ms."""
    with ExitStack() as stack:
        if kind == "web":
            server = stack.enter_context(servers.serving_files(unbroken.parent))
            place, prefix, environment = f"{server.url}/acts", "acts", {}
        else:
            server = stack.enter_context(servers.serving_bucket())
            server.upload(unbroken, "acts")
            place, prefix, environment = "s3://bucket/acts", "bucket/acts", server.environment()
        server.faults.unavailable = 0.05
        server.faults.latency = 0.05
        shards = (f"activations/resid_post/{layer}/c.{layer}.0" for layer in range(3))
        for name in ("plan.json", "token_flags/c.0", *shards):
            server.faults.cuts[f"{prefix}/{name}"] = 1
        done = kit.run(
            train(place, tmp_path / "sae", "--cache-dir", tmp_path / "kept", "--cache-size", kept),
            **environment,
        )
        served, requests = dict(server.faults.served), len(server.faults.requests)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sae/sae.safetensors").read_bytes() == expected
    assert served["503"] > 0.02 * requests
    assert served["cut"] == 5
    counts.add("remote", runs=1, requests=requests, unavailable=served["503"], cut=served["cut"])


@contextmanager
def serving(root: Path, port: int) -> Iterator[tuple[Any, int]]:
    """A server in a process of its own, and its port."""
    script = [sys.executable, HERE / "serving.py", str(root), str(port), "0.02"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_a_server_that_goes_away_stops_training_which_then_goes_on(
    kit: Any, counts: Any, unbroken: Path, expected: bytes, tmp_path: Path
) -> None:
    """Killed after the first checkpoint; back at the same address, --resume ends alike."""
    out = tmp_path / "sae"
    with serving(unbroken.parent, 0) as (server, port):
        place = f"http://127.0.0.1:{port}/acts"
        command = train(place, out, "--cache-dir", tmp_path / "kept", "--cache-size", "0")
        process = kit.start(command)
        while not list(out.glob("checkpoints/*.json")) and process.poll() is None:
            time.sleep(0.001)
        server.kill()
        errors = process.communicate(timeout=kit.PATIENCE_SECONDS)[1]
    done = subprocess.CompletedProcess(command, process.returncode, "", errors)
    line = kit.assert_refused(done, f"{place}/", "cannot be read: ")
    assert line.endswith(
        "; nothing was lost: check the address and the network, then run the same command again"
    )
    assert not (out / "sae.safetensors").exists()
    with serving(unbroken.parent, port):
        again = kit.run([*command, "--resume"])
    assert again.returncode == 0, again.stderr
    assert "resuming after step " in again.stdout
    assert (out / "sae.safetensors").read_bytes() == expected
    counts.add("remote", servers_gone=1)


def test_a_flipped_byte_on_a_server_is_never_read(
    kit: Any, counts: Any, unbroken: Path, tmp_path: Path, servers: Any
) -> None:
    """Nor kept: the store made whole again, all is well with the same cache."""
    store = tmp_path / "served/acts"
    shutil.copytree(unbroken, store)
    shard = store / "activations/resid_post/1/c.5.0"
    whole = shard.read_bytes()
    harmed = bytearray(whole)
    harmed[1000] ^= 8
    environment = {"XDG_CACHE_HOME": str(tmp_path / "kept")}
    with servers.serving_files(store.parent) as web:
        place = f"{web.url}/acts"
        shard.write_bytes(harmed)
        done = kit.run(train(place, tmp_path / "sae"), **environment)
        kit.assert_refused(done, f"{place}/activations/resid_post/1/c.5.0 (shard 5 of ")
        verified = kit.run([*kit.MLSAE, "store", "verify", place], **environment)
        assert verified.returncode == 1
        assert "activations/resid_post/1/c.5.0" in verified.stdout
        shard.write_bytes(whole)
        again = kit.run([*kit.MLSAE, "store", "verify", place], **environment)
        assert again.returncode == 0, again.stdout
    counts.add("remote", flips=1)
