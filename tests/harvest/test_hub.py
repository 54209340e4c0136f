"""Hub data sets, from a server that speaks the hub's protocol: found, refused, missing, cut off."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

TEXTS = [f"w{i} w{i + 1} w{i + 2}" for i in range(40)]
SHARD = "data/train-00000-of-00001.parquet"


def hub_module() -> Any:
    """tests/hub.py; the tests are no package."""
    path = Path(__file__).parents[1] / "hub.py"
    spec = spec_from_file_location("hub", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


READ = """
import sys
from mlsae.base.errors import InputError
from mlsae.harvest.text.sources import TextSettings, open_sources
for name in sys.argv[1:]:
    try:
        print(len(list(open_sources(TextSettings(dataset=name))[0].documents)))
    except InputError as error:
        print(error)
"""


@dataclass(frozen=True)
class Outcome:
    """Printed lines, exit status and duration of a command."""

    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def error(self) -> str:
        """The command's one line for the user."""
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("Error: ")]
        return line.removeprefix("Error: ")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A hub of six data sets: two that can be had, three that cannot, one that is not there."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("found", "interrupted", "gated-401", "gated-403", "cut-off"):
        path = root / "datasets" / "someone" / name / SHARD
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"text": TEXTS}), path)
    with hub_module().serving(root) as hub:
        hub.gated.update({"someone/gated-401": 401, "someone/gated-403": 403})
        hub.cuts.update({("someone/interrupted", SHARD): 2, ("someone/cut-off", SHARD): 10**9})
        yield hub


@pytest.fixture(scope="module")
def processes(forking: Any, hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Processes that see this hub and have imported what harvests."""
    modules = ("mlsae.harvest.pipeline", "datasets", "transformers.models.gpt_neox")
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    with forking.importing(*modules, environment=environment) as processes:
        yield processes


@pytest.fixture(scope="module")
def outcomes(
    processes: Any, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    """Two commands, both at once: the one that is cut off takes its time."""
    out = tmp_path_factory.mktemp("runs") / "acts"
    began = time.monotonic()
    running = {
        name: processes.start(
            "import runpy; runpy.run_module('mlsae', run_name='__main__', alter_sys=True)",
            *("harvest", "--model", model, "--context-length", "16"),
            *("--dataset", f"someone/{name}", "--out", out, "--dry-run"),
        )
        for name in ("cut-off", "interrupted")
    }
    return {
        name: Outcome(process.wait(), process.output, process.errors, time.monotonic() - began)
        for name, process in running.items()
    }


def test_hub_data_set_is_packed_whole(hub: Any, outcomes: dict[str, Outcome]) -> None:
    """Though the connection broke twice: 40 documents of 3 tokens and a separator."""
    outcome = outcomes["interrupted"]
    assert outcome.status == 0, outcome.stderr
    assert hub.cuts["someone/interrupted", SHARD] == 0
    assert "packed 160 tokens: 10 sequences of 16 from 40 documents" in outcome.stdout
    assert "'w0 w1 w2 <|endoftext|> w1 w2 w3 <|endoftext|>" in outcome.stdout


def test_connection_that_stays_cut_is_one_line_in_good_time(outcomes: dict[str, Outcome]) -> None:
    """The hub's client tries again for 23 seconds; the library around it would for 15 minutes."""
    outcome = outcomes["cut-off"]
    assert outcome.status == 1
    start = "the connection to the hub was lost while data set someone/cut-off was read"
    assert outcome.error.startswith(start)
    assert outcome.error.endswith("run the same command again")
    assert outcome.seconds < 200


def test_what_is_there_is_read_and_what_is_not_is_refused(processes: Any) -> None:
    names = [f"someone/{name}" for name in ("found", "gated-401", "gated-403", "missing")]
    process = processes.start(READ, *names)
    assert process.wait() == 0, process.errors
    found, gated_401, gated_403, missing = process.output.splitlines()
    assert found == "40"
    assert gated_401 == (
        "data set someone/gated-401, split 'train', cannot be read: Dataset 'someone/gated-401' is "
        "a gated dataset on the Hub. You must be authenticated to access it."
    )
    assert "'someone/gated-403' is a gated dataset on the Hub. Visit the dataset page" in gated_403
    assert missing == (
        "data set someone/missing, split 'train', cannot be read: Dataset 'someone/missing' "
        "doesn't exist on the Hub or cannot be accessed."
    )
