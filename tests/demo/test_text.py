import hashlib
import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest

from mlsae.demo import text_path
from mlsae.demo.corpus import HELD_OUT_ONE_IN, HELD_OUT_SALT, Module, collect
from mlsae.demo.text_files import difference_from_running, read_sources

Modules = tuple[list[Module], list[Module]]


def test_every_module_has_its_source_and_hash(lines: Any) -> None:
    """Each line names its source file and carries the SHA-256 of its text."""
    for line in lines("train.jsonl") + lines("held_out.jsonl"):
        assert line["source"].startswith("Lib/")
        assert line["source"].endswith(".py")
        assert line["sha256"] == hashlib.sha256(line["text"].encode()).hexdigest()


def test_sources_account_for_both_files(training: dict[str, Any]) -> None:
    """Hashes, sizes and counts are of the shipped files; licence and Python version are named."""
    sources = json.loads((text_path() / "sources.json").read_text())
    assert training["text"] == sources
    for name, account in sources["files"].items():
        data = (text_path() / name).read_bytes()
        assert account["sha256"] == hashlib.sha256(data).hexdigest()
        assert account["num_bytes"] == len(data)
        assert account["num_modules"] == len(data.splitlines())
    assert sources["licence"] == "PSF-2.0"
    assert re.fullmatch(r"CPython 3\.\d+\.\d+", sources["python"])
    licence = (text_path() / sources["licence_file"]).read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence


def test_held_out_modules_are_whole_and_chosen_by_hash(lines: Any) -> None:
    """No module is in both parts, and a hash of its name says which one it is in."""
    parts = {
        name: [line["module"] for line in lines(name)] for name in ("train.jsonl", "held_out.jsonl")
    }
    assert not set(parts["train.jsonl"]) & set(parts["held_out.jsonl"])
    for name, modules in parts.items():
        assert len(modules) == len(set(modules))
        for module in modules:
            digest = hashlib.sha256(f"{HELD_OUT_SALT}{module}".encode()).hexdigest()
            held_out = int(digest[:16], 16) % HELD_OUT_ONE_IN == 0
            assert held_out == (name == "held_out.jsonl")


def test_held_out_text_does_not_repeat_training_text(lines: Any) -> None:
    """At most 10% of the runs of eight held-out words occur anywhere in the training text."""

    def runs(name: str) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+", " ".join(line["text"] for line in lines(name)).lower())
        return list(zip(*(words[i:] for i in range(8)), strict=False))

    seen = set(runs("train.jsonl"))
    held_out = runs("held_out.jsonl")
    assert sum(run in seen for run in held_out) <= 0.10 * len(held_out)


def test_altered_text_is_refused(tmp_path: Path) -> None:
    """A text file that `sources.json` does not account for stops the making of a model."""
    for path in text_path().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"train\.jsonl is not the text that sources\.json"):
        read_sources(tmp_path)


@pytest.fixture(scope="module")
def running() -> Modules:
    """The text of this Python."""
    return collect()


def test_the_named_python_still_gives_the_shipped_text(running: Modules) -> None:
    """Under the Python that the text was taken from, collecting it again changes nothing."""
    sources = json.loads((text_path() / "sources.json").read_text())
    python = f"{platform.python_implementation()} {platform.python_version()}"
    if python != sources["python"]:
        pytest.skip(f"the text was taken from {sources['python']}, this is {python}")
    assert difference_from_running(sources, running) is None


def test_another_python_s_documentation_is_named_in_one_line(running: Modules) -> None:
    """When the running Python says other things, one line says so and what is used instead."""
    sources = json.loads((text_path() / "sources.json").read_text())
    sources["python"] = "CPython 2.7.18"
    sources["files"]["train.jsonl"]["sha256"] = "0" * 64
    line = difference_from_running(sources, running)
    assert line is not None
    assert "\n" not in line
    assert "differs from that of CPython 2.7.18" in line
    assert line.endswith("using the shipped text (--collect takes this Python's)")


def test_module_s_text_is_its_entries() -> None:
    """Entries are separated by an empty line; the text ends with a line end."""
    module = Module(name="m", source="Lib/m.py", entries=("m\n\nA module.", "f(x)\n\nA function."))
    assert module.text == "m\n\nA module.\n\nf(x)\n\nA function.\n"
