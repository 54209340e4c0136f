"""Type-check the package under its own name, the benchmarks and the script of the docs.

The checkout is the package, so a type checker that starts from files would name the modules after
the checkout's folder. Here mypy sees the tree as `<temporary>/mlsae`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run mypy in strict mode; its exit status is ours."""
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "mlsae"
        package.mkdir()
        for entry in ROOT.iterdir():
            is_room = entry.is_dir() and (entry / "__init__.py").exists()
            if is_room or entry.suffix == ".py" or entry.name == "py.typed":
                (package / entry.name).symlink_to(entry)
        for folder in ("benchmarks", "docs"):
            (Path(temporary) / folder).symlink_to(ROOT / folder)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "setup.cfg")]
        command += [
            "--cache-dir",
            str(ROOT / ".mypy_cache"),
            "-p",
            "mlsae",
            "-p",
            "benchmarks",
            "-p",
            "docs",
        ]
        # A finder of an editable install is no type information; the tree above is.
        environment = {**os.environ, "MYPYPATH": temporary}
        return subprocess.run(command, cwd=temporary, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
