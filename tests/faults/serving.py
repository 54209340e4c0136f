"""A web server to be killed: python tests/faults/serving.py ROOT PORT LATENCY

It prints its port, and serves until it is.
"""

import sys
import threading
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    """Serve a directory."""
    path = Path(__file__).parents[1] / "servers.py"
    spec = spec_from_file_location("loopback_servers", path)
    assert spec is not None
    assert spec.loader is not None
    servers = module_from_spec(spec)
    spec.loader.exec_module(servers)
    with servers.serving_files(Path(sys.argv[1]), int(sys.argv[2])) as web:
        web.faults.latency = float(sys.argv[3])
        print(web.url.rpartition(":")[2], flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
