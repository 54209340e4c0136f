"""The commands of docs/sharing.md, against servers on the loopback that hold what they name."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path) -> Any:
    """A file of the tests, which are no package."""
    spec = spec_from_file_location(f"sharing_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # Dataclasses of the module look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_team_publishes_and_another_trains(tmp_path: Path):
    """Every block of the page, in order; for the upload, which needs an account, a plain copy."""
    servers = load(ROOT / "tests/servers.py")
    docs = load(ROOT / "tests/house/test_docs.py")
    for folder in ("work", "work/www", "hub/datasets/our-team"):
        (tmp_path / folder).mkdir(parents=True)
    script = ["set -euo pipefail"]
    for block in docs.blocks(ROOT / "docs/sharing.md"):
        if block.reason is not None:
            assert "hf upload our-team/acts acts . --repo-type dataset" in block.code
            script.append(f"cp -r acts '{tmp_path}/hub/datasets/our-team/acts'")
        elif block.kind == "python":
            script.append(f"python - <<'END_OF_BLOCK'\n{block.code}END_OF_BLOCK")
        else:
            script.append(block.code)
    binaries = Path(sys.executable).parent
    with (
        servers.serving_files(tmp_path / "work/www") as web,
        servers.serving_bucket() as s3,
        servers.serving_hub(tmp_path / "hub") as hub,
    ):
        text = "\n".join(script).replace("https://acts.example.org", web.url)
        text = text.replace("our-bucket", servers.BUCKET)
        # That client asks for https unless it is told that plain http will do.
        text = text.replace(
            f'HTTPStore("{web.url}/acts")',
            f'HTTPStore("{web.url}/acts", client_options={{"allow_http": True}})',
        )
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=tmp_path / "work",
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("AWS_")},
                **s3.environment(),
                **hub.environment(tmp_path / "home"),
                "XDG_CACHE_HOME": str(tmp_path / "cache"),
                "PATH": f"{binaries}:{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    for directory in ("acts", "shared/acts", "acts-here", "acts-int8", "some-layers"):
        assert (tmp_path / "work" / directory / "complete.json").exists(), directory
    assert not (tmp_path / "work/acts-part").exists()
    # Every way to the store leads to the same one.
    lines = done.stdout.splitlines()
    sound = {line.split("store_id ")[1] for line in lines if "is sound" in line}
    assert len(sound) == 1
